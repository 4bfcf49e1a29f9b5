// The elements of a row that may still be among its k best, and the step that cuts them down to k.

#ifndef JAX_TOPK_CPU_CANDIDATES_H_
#define JAX_TOPK_CPU_CANDIDATES_H_

#include <cstdint>
#include <memory>

#include "cpu/ordered_key.h"
#include "cpu/simd.h"

namespace jax_topk::cpu {

// Keys and their indices in the row's window, in ascending order of index. Does not own its memory.
struct Candidates {
  Key* keys = nullptr;         // [capacity]
  int32_t* indices = nullptr;  // [capacity + kScanBlock]: scans write beyond what they append
  int64_t size = 0;
  int64_t capacity = 0;
};

// Memory for candidates, uninitialised.
class CandidateBuffer {
 public:
  explicit CandidateBuffer(int64_t capacity)
      : keys_(new Key[static_cast<size_t>(capacity)]),
        indices_(new int32_t[static_cast<size_t>(capacity + kScanBlock)]),
        capacity_(capacity) {}

  Candidates Empty() { return {keys_.get(), indices_.get(), 0, capacity_}; }

 private:
  std::unique_ptr<Key[]> keys_;
  std::unique_ptr<int32_t[]> indices_;
  int64_t capacity_;
};

// The k-th best of keys that may repeat: `num_equal` of the k best have this key.
struct Pivot {
  Key key;
  int64_t num_equal;
};

// Finds the k-th best of `keys`. 0 < k <= size.
//
// Cost: O(size) whatever the keys are. A histogram of the range between the smallest and the
// largest key; the bin that holds the pivot is the next range, until few keys are left: twice in
// practice, at most once per 6 bits of a key.
Pivot FindPivot(const Key* keys, int64_t size, int64_t k);

// Cuts `candidates` down to the k best, still in ascending order of index, and returns the key of
// the worst that is left. Of equal keys those of the lowest index stay. 0 < k <= candidates.size.
// Cost: FindPivot and one pass to compact.
Key KeepBest(Candidates& candidates, int64_t k);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_CANDIDATES_H_
