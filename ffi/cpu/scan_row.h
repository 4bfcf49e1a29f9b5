// The passes over a row: those that append its elements to the candidates.

#ifndef JAX_TOPK_CPU_SCAN_ROW_H_
#define JAX_TOPK_CPU_SCAN_ROW_H_

#include <cstdint>

#include "cpu/candidates.h"
#include "cpu/ordered_key.h"

namespace jax_topk::cpu {

// Appends to `candidates`, in order, the elements of row[begin, end) whose key is at least
// `threshold`, and returns the index of the first element not looked at: `end`, or less where the
// candidates might no longer fit. Gets further than `begin` if at least kScanBlock entries are
// free. Cost: one comparison per element, and one store and one load per candidate.
template <typename Bits>
int64_t ScanRow(const Bits* row, int64_t begin, int64_t end, Key order_mask, Key threshold,
                Candidates& candidates);

// Appends all elements of row[begin, end), which must fit.
template <typename Bits>
void AppendAll(const Bits* row, int64_t begin, int64_t end, Key order_mask, Candidates& candidates);

extern template int64_t ScanRow<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Key, Candidates&);
extern template int64_t ScanRow<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Key, Candidates&);
extern template void AppendAll<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Candidates&);
extern template void AppendAll<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Candidates&);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_SCAN_ROW_H_
