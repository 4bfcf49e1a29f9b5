// Exact selection: from a row, or from one part of it, to candidates among which its k best are.

#ifndef JAX_TOPK_CPU_SELECT_ROW_H_
#define JAX_TOPK_CPU_SELECT_ROW_H_

#include <cstdint>

#include "cpu/candidates.h"
#include "cpu/ordered_key.h"

namespace jax_topk::cpu {

// Room for candidates that the functions below need: O(k), whatever the row holds.
int64_t SelectCapacity(int64_t length, int64_t k);

// Fills `candidates`, empty before, with a superset of those of the k best elements of row[begin,
// end) that reach `threshold`, in ascending order of index. k > 0.
//
// Cost: one pass. Where the candidates fill their memory they are cut down to the k best, and the
// worst of these becomes the threshold. A cut costs O(k) and makes room for more than k others, so
// the whole stays O(length) even where every element is better than all before it.
template <typename Bits>
void SelectPart(const Bits* row, int64_t begin, int64_t end, int64_t k, Key order_mask,
                Key threshold, Candidates& candidates);

// Fills `candidates`, empty before, with a superset of the k best elements of `row`, or with all of
// them if there are no more than k, in ascending order of index. k > 0.
//
// Estimates a threshold, keeps what reaches it and counts. Exact whatever the estimate was: if it
// was too high, fewer than k reach it, and a second pass does without one.
template <typename Bits>
void SelectRow(const Bits* row, int64_t length, int64_t k, Key order_mask, Candidates& candidates);

extern template void SelectPart<uint32_t>(const uint32_t*, int64_t, int64_t, int64_t, Key, Key,
                                          Candidates&);
extern template void SelectPart<uint16_t>(const uint16_t*, int64_t, int64_t, int64_t, Key, Key,
                                          Candidates&);
extern template void SelectRow<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Candidates&);
extern template void SelectRow<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Candidates&);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_SELECT_ROW_H_
