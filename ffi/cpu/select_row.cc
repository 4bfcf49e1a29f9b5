// Filters with a threshold into a bounded list; when it is full, cuts it and raises the threshold.

#include "cpu/select_row.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "cpu/estimate_threshold.h"
#include "cpu/scan_row.h"

namespace jax_topk::cpu {

int64_t SelectCapacity(int64_t length, int64_t k) {
  // As many entries beyond the k best, so that cuts cost no more than the scan between them. Few
  // more: on a plateau everything passes until the first cut raises the threshold.
  constexpr int64_t kSpare = 128;
  return std::min(length, 2 * k + kSpare) + kScanBlock;
}

template <typename Bits>
void SelectPart(const Bits* row, int64_t begin, int64_t end, int64_t k, Key order_mask,
                Key threshold, Candidates& candidates) {
  // So a scan stops early only where more than k candidates are there, and a cut then makes room.
  assert(candidates.capacity >= SelectCapacity(end - begin, k));
  if (threshold == 0 && end - begin <= candidates.capacity) {
    AppendAll(row, begin, end, order_mask, candidates);
    return;
  }
  for (;;) {
    begin = ScanRow(row, begin, end, order_mask, threshold, candidates);
    if (begin == end) return;
    const Key pivot = KeepBest(candidates, k);
    if (pivot == std::numeric_limits<Bits>::max()) return;  // nothing is better
    // k elements of lower index are at least as good as the pivot: an equal one comes too late.
    threshold = pivot + 1;
  }
}

template <typename Bits>
void SelectRow(const Bits* row, int64_t length, int64_t k, Key order_mask, Candidates& candidates) {
  const Key threshold = k < length ? EstimateThreshold(row, length, k, order_mask) : 0;
  SelectPart(row, 0, length, k, order_mask, threshold, candidates);
  if (candidates.size < std::min(k, length)) {
    candidates.size = 0;
    SelectPart(row, 0, length, k, order_mask, 0, candidates);
  }
}

template void SelectPart<uint32_t>(const uint32_t*, int64_t, int64_t, int64_t, Key, Key,
                                   Candidates&);
template void SelectPart<uint16_t>(const uint16_t*, int64_t, int64_t, int64_t, Key, Key,
                                   Candidates&);
template void SelectRow<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Candidates&);
template void SelectRow<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Candidates&);

}  // namespace jax_topk::cpu
