// From the candidates of a row to its results.

#ifndef JAX_TOPK_CPU_WRITE_ROW_H_
#define JAX_TOPK_CPU_WRITE_ROW_H_

#include <cstdint>
#include <memory>

#include "cpu/candidates.h"
#include "cpu/ordered_key.h"

namespace jax_topk::cpu {

// Memory to sort the candidates of one row in, uninitialised.
class SortBuffer {
 public:
  explicit SortBuffer(int64_t capacity)
      : capacity_(capacity), memory_(new uint64_t[static_cast<size_t>(2 * capacity)]) {}

  uint64_t* first() { return memory_.get(); }
  uint64_t* second() { return memory_.get() + capacity_; }
  int64_t capacity() const { return capacity_; }

 private:
  int64_t capacity_;
  std::unique_ptr<uint64_t[]> memory_;
};

// Capacity of the buffer that WriteBestFirst needs for `k` of `length` elements.
int64_t SortCapacity(int64_t length, int64_t k);

// Where the results of one row go. `values` is null where they are not wanted.
template <typename Bits>
struct RowResults {
  Bits* values;      // [k]
  int32_t* indices;  // [k]
  int64_t k;
  Bits padding;  // the value where the row has fewer than k elements; the index is -1
};

// Writes the k best of `candidates`, which come in ascending order of index and are used up: by
// falling key, equal keys by rising index. Cost: k^2 / 8 vector comparisons for few candidates,
// else a radix sort of k to 2k entries.
template <typename Bits>
void WriteBestFirst(Candidates& candidates, Key order_mask, SortBuffer& buffer,
                    const RowResults<Bits>& results);

// The same by rising index. Cost: KeepBest.
template <typename Bits>
void WriteByIndex(Candidates& candidates, Key order_mask, const RowResults<Bits>& results);

extern template void WriteBestFirst<uint32_t>(Candidates&, Key, SortBuffer&,
                                              const RowResults<uint32_t>&);
extern template void WriteBestFirst<uint16_t>(Candidates&, Key, SortBuffer&,
                                              const RowResults<uint16_t>&);
extern template void WriteByIndex<uint32_t>(Candidates&, Key, const RowResults<uint32_t>&);
extern template void WriteByIndex<uint16_t>(Candidates&, Key, const RowResults<uint16_t>&);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_WRITE_ROW_H_
