// Guesses, from a small part of a row, a key that most of the row is below.

#ifndef JAX_TOPK_CPU_ESTIMATE_THRESHOLD_H_
#define JAX_TOPK_CPU_ESTIMATE_THRESHOLD_H_

#include <cstdint>

#include "cpu/ordered_key.h"

namespace jax_topk::cpu {

// Returns a key that at least k of the `length` elements of `row` probably reach, and not many
// more; 0, which all reach, where looking would not pay. A guess: whoever uses it counts, and
// starts again from 0 if fewer than k were found. 0 < k < length. The same arguments give the same
// key.
//
// Up to k = 16: the k-th best of the maxima of 32 interleaved groups of elements. Each of k groups
// has an element that good, so this one is never too high. Cost: a pass over up to 2048 elements.
//
// Beyond: of a stratified sample of about 3 cbrt(k * length) elements the one whose rank, scaled to
// the row, is four standard deviations worse than k. Cost: FindPivot in the sample.
template <typename Bits>
Key EstimateThreshold(const Bits* row, int64_t length, int64_t k, Key order_mask);

extern template Key EstimateThreshold<uint32_t>(const uint32_t*, int64_t, int64_t, Key);
extern template Key EstimateThreshold<uint16_t>(const uint16_t*, int64_t, int64_t, Key);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_ESTIMATE_THRESHOLD_H_
