// The loops that pay for wide vectors, once per instruction set, chosen when the program runs.
//
// One binary serves every processor of its architecture: the baseline table always works, the
// others are built where the compiler knows them and taken where the processor has them.

#ifndef JAX_TOPK_CPU_SIMD_H_
#define JAX_TOPK_CPU_SIMD_H_

#include <cstdint>

#include "cpu/ordered_key.h"

namespace jax_topk::cpu {

// Elements compared at once: one bit each in a 64-bit mask.
inline constexpr int64_t kScanBlock = 64;

// Lanes of lane_maxima.
inline constexpr int64_t kNumLanes = 32;

// Largest number of keys that `ranks` takes.
inline constexpr int64_t kMaxRanked = 128;

struct SimdKernels {
  const char* name;

  // Appends to indices[*size...] the i of [begin, end), ascending, for which row[i] passes the cut,
  // and returns the first i not looked at. Stops early where fewer than kScanBlock entries are
  // free. May write, but not count, up to kScanBlock entries beyond what it appends.
  int64_t (*scan32)(const uint32_t* row, int64_t begin, int64_t end, const Cut<uint32_t>& cut,
                    int32_t* indices, int64_t capacity, int64_t* size);
  int64_t (*scan16)(const uint16_t* row, int64_t begin, int64_t end, const Cut<uint16_t>& cut,
                    int32_t* indices, int64_t capacity, int64_t* size);

  // Raises maxima[j] to the largest key of block[j], block[j + kNumLanes], ... for every lane j.
  // `size` is a multiple of kNumLanes.
  void (*lane_maxima32)(const uint32_t* block, int64_t size, Key order_mask, Key* maxima);
  void (*lane_maxima16)(const uint16_t* block, int64_t size, Key order_mask, Key* maxima);

  // ranks[i] = how many keys come before keys[i], best first and of equal keys the lowest i first.
  // size <= kMaxRanked; both arrays have room for kMaxRanked entries. Cost: size^2 / (lanes of a
  // vector).
  void (*ranks)(const Key* keys, int64_t size, int32_t* ranks);

  // The smallest and the largest of `keys`. size > 0.
  void (*min_max)(const Key* keys, int64_t size, Key* smallest, Key* largest);
};

// The best table for this processor. The environment variable JAX_TOPK_CPU_ISA=baseline, read once,
// forces the other one, for tests.
const SimdKernels& Simd();

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_SIMD_H_
