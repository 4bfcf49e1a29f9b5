// Radix selection on the range of keys that are there (not on all 32 bits, of which the keys of one
// row differ in few), then one stable pass to compact.

#include "cpu/candidates.h"

#include <algorithm>

namespace jax_topk::cpu {
namespace {

// The k-th best of few keys, by their ranks.
Pivot FindPivotOfFew(const Key* keys, int64_t size, int64_t k) {
  int32_t ranks[kMaxRanked];
  Simd().ranks(keys, size, ranks);
  const int64_t at = std::find(ranks, ranks + size, static_cast<int32_t>(k - 1)) - ranks;
  // Equal keys rank by their position, so those before the pivot are the other selected ones.
  const int64_t num_equal_before = std::count(keys, keys + at, keys[at]);
  return {keys[at], num_equal_before + 1};
}

}  // namespace

Pivot FindPivot(const Key* keys, int64_t size, int64_t k) {
  if (size <= kMaxRanked) return FindPivotOfFew(keys, size, k);

  // Bins cost about as much to clear and to sum as keys cost to count.
  constexpr int kMaxBinBits = 10;
  constexpr int kMinBinBits = 6;
  int bin_bits = kMinBinBits;
  while (bin_bits < kMaxBinBits && (int64_t{4} << bin_bits) < size) ++bin_bits;
  const Key num_bins = Key{1} << bin_bits;
  uint32_t counts[1 << kMaxBinBits];

  Key low;
  Key high;
  Simd().min_max(keys, size, &low, &high);
  int64_t rank = k;  // of the pivot among the keys in [low, high]; the best has rank 1
  while (low != high) {
    const Key range = high - low;
    int shift = 0;
    while ((range >> shift) >= num_bins) ++shift;
    std::fill_n(counts, num_bins, 0);
    for (int64_t i = 0; i < size; ++i) {
      // A key below `low` wraps around to beyond the range, and is left out as one above `high` is.
      const Key offset = keys[i] - low;
      if (offset <= range) ++counts[offset >> shift];
    }
    Key bin = range >> shift;
    while (rank > counts[bin]) rank -= counts[bin--];
    low += bin << shift;
    high = static_cast<Key>(std::min<uint64_t>(high, uint64_t{low} + (uint64_t{1} << shift) - 1));
    if (counts[bin] <= kMaxRanked) {
      Key few[kMaxRanked + 1];
      int64_t num_few = 0;
      for (int64_t i = 0; i < size; ++i) {
        few[num_few] = keys[i];
        num_few += keys[i] - low <= high - low;
      }
      return FindPivotOfFew(few, num_few, rank);
    }
  }
  return {low, rank};
}

Key KeepBest(Candidates& candidates, int64_t k) {
  Key* const keys = candidates.keys;
  int32_t* const indices = candidates.indices;
  const Pivot pivot = FindPivot(keys, candidates.size, k);
  int64_t num_equal_left = pivot.num_equal;
  int64_t num_kept = 0;
  for (int64_t i = 0; i < candidates.size; ++i) {
    const Key key = keys[i];
    const bool is_equal = key == pivot.key;
    const bool is_kept = (key > pivot.key) | (is_equal & (num_equal_left > 0));
    num_equal_left -= is_equal;
    // Writes at or before i, so nothing unread is lost.
    keys[num_kept] = key;
    indices[num_kept] = indices[i];
    num_kept += is_kept;
  }
  candidates.size = num_kept;
  return pivot.key;
}

}  // namespace jax_topk::cpu
