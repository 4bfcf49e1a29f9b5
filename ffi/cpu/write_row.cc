// Few candidates: the rank of each, by comparing it with all others, is its place. Many: a radix
// sort, least significant digit first, of entries that hold the distance to the best key above the
// index.

#include "cpu/write_row.h"

#include <algorithm>
#include <utility>

#include "cpu/simd.h"

namespace jax_topk::cpu {
namespace {

// Candidates above 2k are cut to k first: that is cheaper than to sort them.
constexpr int64_t kMaxSortedPerK = 2;

// Sorts by the upper half, equal ones in the order in which they come; returns the array that holds
// the result. Radix sort, least significant digit first; `range` is the largest upper half.
uint64_t* SortByUpperHalf(uint64_t* from, uint64_t* to, int64_t size, uint32_t range) {
  constexpr int kMaxDigitBits = 8;
  int range_bits = 0;
  while (range_bits < 32 && (range >> range_bits) != 0) ++range_bits;
  const int num_passes = (range_bits + kMaxDigitBits - 1) / kMaxDigitBits;
  for (int pass = 0; pass < num_passes; ++pass) {
    const int digit_begin = range_bits * pass / num_passes;
    const int digit_end = range_bits * (pass + 1) / num_passes;
    const int num_digits = 1 << (digit_end - digit_begin);
    const int shift = 32 + digit_begin;
    uint32_t offsets[1 << kMaxDigitBits];
    std::fill_n(offsets, num_digits, 0);
    for (int64_t i = 0; i < size; ++i) ++offsets[(from[i] >> shift) & (num_digits - 1)];
    uint32_t sum = 0;
    for (int digit = 0; digit < num_digits; ++digit) sum += std::exchange(offsets[digit], sum);
    for (int64_t i = 0; i < size; ++i)
      to[offsets[(from[i] >> shift) & (num_digits - 1)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

template <typename Bits>
void Pad(int64_t num_written, const RowResults<Bits>& results) {
  if (num_written == results.k) return;
  std::fill(results.indices + num_written, results.indices + results.k, -1);
  if (results.values != nullptr) {
    std::fill(results.values + num_written, results.values + results.k, results.padding);
  }
}

}  // namespace

int64_t SortCapacity(int64_t length, int64_t k) {
  return length <= kMaxRanked ? 0 : std::min(length, kMaxSortedPerK * k);  // few are ranked
}

template <typename Bits>
void WriteBestFirst(Candidates& candidates, Key order_mask, SortBuffer& buffer,
                    const RowResults<Bits>& results) {
  if (candidates.size > kMaxRanked && candidates.size > buffer.capacity()) {
    KeepBest(candidates, results.k);
  }
  const int64_t size = candidates.size;
  const int64_t num_written = std::min(size, results.k);
  if (size <= kMaxRanked) {
    int32_t ranks[kMaxRanked];
    Simd().ranks(candidates.keys, size, ranks);
    // All places first, and then the wanted ones: a branch for each candidate would be mispredicted
    // half of the time.
    int32_t by_rank[kMaxRanked];
    for (int64_t i = 0; i < size; ++i) by_rank[ranks[i]] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < num_written; ++i) {
      results.indices[i] = candidates.indices[by_rank[i]];
    }
    if (results.values != nullptr) {
      for (int64_t i = 0; i < num_written; ++i) {
        results.values[i] = BitsOfKey<Bits>(candidates.keys[by_rank[i]], order_mask);
      }
    }
  } else {
    Key low;
    Key high;
    Simd().min_max(candidates.keys, size, &low, &high);
    uint64_t* const entries = buffer.first();
    for (int64_t i = 0; i < size; ++i) {
      entries[i] =
          uint64_t{high - candidates.keys[i]} << 32 | static_cast<uint32_t>(candidates.indices[i]);
    }
    const uint64_t* const sorted = SortByUpperHalf(entries, buffer.second(), size, high - low);
    for (int64_t i = 0; i < num_written; ++i) {
      results.indices[i] = static_cast<int32_t>(sorted[i]);
    }
    if (results.values != nullptr) {
      for (int64_t i = 0; i < num_written; ++i) {
        results.values[i] = BitsOfKey<Bits>(high - static_cast<Key>(sorted[i] >> 32), order_mask);
      }
    }
  }
  Pad(num_written, results);
}

template <typename Bits>
void WriteByIndex(Candidates& candidates, Key order_mask, const RowResults<Bits>& results) {
  if (candidates.size > results.k) KeepBest(candidates, results.k);
  std::copy_n(candidates.indices, candidates.size, results.indices);
  if (results.values != nullptr) {
    for (int64_t i = 0; i < candidates.size; ++i) {
      results.values[i] = BitsOfKey<Bits>(candidates.keys[i], order_mask);
    }
  }
  Pad(candidates.size, results);
}

template void WriteBestFirst<uint32_t>(Candidates&, Key, SortBuffer&, const RowResults<uint32_t>&);
template void WriteBestFirst<uint16_t>(Candidates&, Key, SortBuffer&, const RowResults<uint16_t>&);
template void WriteByIndex<uint32_t>(Candidates&, Key, const RowResults<uint32_t>&);
template void WriteByIndex<uint16_t>(Candidates&, Key, const RowResults<uint16_t>&);

}  // namespace jax_topk::cpu
