// A scan has two halves: vector compares that yield a bit per element, turned into indices, and
// then the keys of the few elements found.

#include "cpu/scan_row.h"

#include <algorithm>

namespace jax_topk::cpu {
namespace {

int64_t Scan(const uint32_t* row, int64_t begin, int64_t end, const Cut<uint32_t>& cut,
             Candidates& candidates) {
  return Simd().scan32(row, begin, end, cut, candidates.indices, candidates.capacity,
                       &candidates.size);
}

int64_t Scan(const uint16_t* row, int64_t begin, int64_t end, const Cut<uint16_t>& cut,
             Candidates& candidates) {
  return Simd().scan16(row, begin, end, cut, candidates.indices, candidates.capacity,
                       &candidates.size);
}

}  // namespace

template <typename Bits>
int64_t ScanRow(const Bits* row, int64_t begin, int64_t end, Key order_mask, Key threshold,
                Candidates& candidates) {
  // The scan finds indices only; the keys follow while this much of the row is in the nearest
  // cache.
  constexpr int64_t kChunk = 4096;
  const Cut<Bits> cut = MakeCut<Bits>(threshold, order_mask);
  while (begin < end) {
    const int64_t old_size = candidates.size;
    const int64_t chunk_end = std::min(end, begin + kChunk);
    begin = Scan(row, begin, chunk_end, cut, candidates);
    for (int64_t i = old_size; i < candidates.size; ++i) {
      candidates.keys[i] = MakeKey(row[candidates.indices[i]], order_mask);
    }
    if (begin != chunk_end) break;
  }
  return begin;
}

template <typename Bits>
void AppendAll(const Bits* row, int64_t begin, int64_t end, Key order_mask,
               Candidates& candidates) {
  Key* const keys = candidates.keys + candidates.size;
  int32_t* const indices = candidates.indices + candidates.size;
  const int64_t length = end - begin;
  for (int64_t i = 0; i < length; ++i) {
    keys[i] = MakeKey(row[begin + i], order_mask);
    indices[i] = static_cast<int32_t>(begin + i);
  }
  candidates.size += length;
}

template int64_t ScanRow<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Key, Candidates&);
template int64_t ScanRow<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Key, Candidates&);
template void AppendAll<uint32_t>(const uint32_t*, int64_t, int64_t, Key, Candidates&);
template void AppendAll<uint16_t>(const uint16_t*, int64_t, int64_t, Key, Candidates&);

}  // namespace jax_topk::cpu
