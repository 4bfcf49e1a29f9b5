// Sorted output: a row's selected elements, best first, by one CTA.
//
// Counts the pairs by 4096 bins, places every pair in its bin by an exclusive scan, and ranks it
// there among the few that share the bin: five passes over the pairs and five barriers, whatever k
// is. Bins are even in key; if that spans too many octaves (keys around zero, most of all), even in
// value, or 32 to an octave where a few large values or an infinity would crowd those. Where values
// crowd into few bins all the same, the ties of the lowest key are set apart, since k most often
// cuts a plateau; and if that does not help, a bitonic sort takes over, with log2(k)^2 / 2 steps of
// one barrier each. Loops stay rolled: fetching more instructions takes longer than waiting in few.

#ifndef JAX_TOPK_CUDA_SORT_PAIRS_CUH_
#define JAX_TOPK_CUDA_SORT_PAIRS_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"
#include "ordered_key.cuh"

namespace jax_topk {

// Most pairs of one bin that are ranked by comparing all of them, and so many of one that is even
// in value that coarse bins are tried.
constexpr uint32_t kMaxCrowd = 256;
constexpr uint32_t kMaxCrowdByValue = 64;
// A pair is (position, ~key): as a 64-bit number, ~key above position, ascending is best first.
__device__ __forceinline__ bool IsBetter(const uint2& a, const uint2& b) {
  return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// Sorts ascending in shared memory; `size` is a power of two. In and out: ordered by a barrier.
__device__ __forceinline__ void SortBitonic(const Cta& cta, uint2* pairs, int size) {
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int i = cta.thread; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        const uint2 a = pairs[low], b = pairs[low + stride];
        const bool is_ascending = (low & run) == 0;
        if (IsBetter(b, a) == is_ascending) {
          pairs[low] = b;
          pairs[low + stride] = a;
        }
      }
      SyncThreads();  // this step's exchanges before the next step's reads
    }
  }
}

// Bins of pairs: two to a word of the histogram, which never counts more than kMaxK.
constexpr uint32_t kPairBins = 2 * kBins;
static_assert(kMaxK < 1 << 16, "a half word counts all pairs");

// Counts a pair; returns how many were counted in its bin before, or the place that was there.
__device__ __forceinline__ uint32_t CountPair(const Cta& cta, uint32_t bin) {
  const uint32_t shift = bin % 2 * 16;
  return atomicAdd(&cta.bins[bin / 2], 1u << shift) >> shift & 0xffffu;
}

// Turns the histogram into the first place of every bin; returns the size of the fullest one.
__device__ __forceinline__ uint32_t ScanBins(Cta& cta) {
  uint32_t* own_bins = cta.bins + kBinsPerThread * cta.thread;
  const bool has_bins = cta.thread < kBinThreads;
  uint32_t counts[kBinsPerThread] = {};
  uint32_t sum = 0, crowd = 0;
  if (has_bins) {
    LoadWords(own_bins, counts);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      sum += counts[i];  // of both halves
      crowd = max(crowd, max(counts[i] & 0xffffu, counts[i] >> 16));
    }
  }
  crowd = WarpMax(crowd);
  if (cta.lane == 0) atomicMax(&cta.header->crowd, crowd);
  uint32_t place = BlockScan(cta, (sum & 0xffffu) + (sum >> 16)).before;
  if (has_bins) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t odd = place + (counts[i] & 0xffffu);
      own_bins[i] = place | odd << 16;
      place = odd + (counts[i] >> 16);
    }
  }
  SyncThreads();  // the places and the crowd before their reads
  return cta.header->crowd;
}

// The bin of a pair, 0 being that of the best.
template <typename T>
struct PairBins {
  uint32_t highest_key, key_scale;
  bool is_wide;
  bool is_by_value;
  float highest, scale;  // by value

  __device__ __forceinline__ explicit PairBins(const Bracket& range)
      : highest_key(range.highest), is_wide(range.highest - range.lowest > T::kWidestEven) {
    // kPairBins / (range + 1), with 32 bits behind the point. A little less, because the quotient
    // is not exact; at most a word.
    constexpr float kScaledBins = 4294967296.0f * static_cast<float>(kPairBins) * 0.999999f;
    const float num_keys = static_cast<float>(range.highest - range.lowest) + 1.0f;
    key_scale = static_cast<uint32_t>(min(FastDivide(kScaledBins, num_keys), 4294967040.0f));
    highest = T::OrderedValue(range.highest);
    const float width = highest - T::OrderedValue(range.lowest);
    scale = FastDivide(static_cast<float>(kPairBins), width);
    // Neither infinities nor NaNs, nor a quotient that is 0 or infinite.
    constexpr float kMost = 0x1p120f;
    is_by_value = is_wide && width < kMost && scale < kMost && scale > 0.0f;
  }
  // Every step is monotone, so better keys never come to later bins.
  __device__ __forceinline__ uint32_t Of(const uint2& pair) const {
    const uint32_t key = ~pair.y;
    if (!is_wide) return min(UpperProduct(highest_key - key, key_scale), kPairBins - 1);
    if (!is_by_value) return CoarseBinOfKey<T>(key);
    const float depth = (highest - T::OrderedValue(key)) * scale;
    return min(static_cast<uint32_t>(depth), kPairBins - 1);
  }
};

// The range of the keys of `count` >= 1 pairs. One barrier.
__device__ __forceinline__ Bracket KeyRange(const Cta& cta, const uint2* pairs, int count) {
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    lowest = min(lowest, ~pairs[i].y);
    highest = max(highest, ~pairs[i].y);
  }
  lowest = WarpMin(lowest);
  highest = WarpMax(highest);
  if (cta.lane == 0) cta.header->warp_ranges[cta.warp] = Bracket{lowest, highest};
  SyncThreads();  // the warps' ranges before their reads
  const Bracket of_warp = cta.header->warp_ranges[min(cta.lane, kWarps - 1)];
  return Bracket{WarpMin(of_warp.lowest), WarpMax(of_warp.highest)};
}

// Stores the pairs of the lowest key, which come behind all others, and moves the others together;
// both stay in ascending position. Returns how many others there are. Ends behind a barrier.
template <typename Store>
__device__ __forceinline__ int StoreTies(Cta& cta, uint2* pairs, int count, uint32_t lowest,
                                         Store store) {
  uint32_t num_ties = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + cta.thread;
    num_ties += BlockScan(cta, i < count && ~pairs[i].y == lowest).total;
  }
  const int num_others = count - static_cast<int>(num_ties);
  int others_before = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + cta.thread;
    const uint2 pair = i < count ? pairs[i] : make_uint2(0, 0);
    const bool is_tie = i >= count || ~pair.y == lowest;
    // Its barrier: this round's reads before its writes, which go no further than them.
    const Scan others = BlockScan(cta, !is_tie);
    const int place = others_before + static_cast<int>(others.before);
    if (!is_tie) pairs[place] = pair;
    if (is_tie && i < count) store(num_others + i - place, pair);
    others_before += static_cast<int>(others.total);
  }
  SyncThreads();  // the other pairs before their reads
  return num_others;
}

// Counts pairs by bin and turns the counts into the first place of every bin. Returns the size of
// the fullest one. In: the last reads of the histogram and of the crowd, ordered by a barrier.
template <typename T>
__device__ __forceinline__ uint32_t PlaceBins(Cta& cta, const uint2* pairs, int count,
                                              const PairBins<T>& bins) {
  ClearBins(cta);
  if (cta.thread == 0) cta.header->crowd = 0;
  SyncThreads();  // the cleared histogram before its use
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) CountPair(cta, bins.Of(pairs[i]));
  SyncThreads();  // counts before the scan
  return ScanBins(cta);
}

// Calls store(rank, pair) for `count` pairs in ascending position, rank 0 being the best.
// `spare` holds as many pairs; `pairs` has room for a power of two. In: pairs, and the last use of
// the histogram and of `spare`, ordered by a barrier.
template <typename T, typename Store>
__device__ __forceinline__ void SortPairs(Cta& cta, uint2* pairs, uint2* spare, int count,
                                          Store store) {
  if (count == 0) return;
  const Bracket range = KeyRange(cta, pairs, count);
  if (range.IsSingleKey()) {  // ties: in ascending position already
#pragma unroll 1
    for (int i = cta.thread; i < count; i += kThreads) store(i, pairs[i]);
    return;
  }
  PairBins<T> bins(range);
  bool has_ties = true;
#pragma unroll 1
  for (;;) {
    const uint32_t crowd = PlaceBins(cta, pairs, count, bins);
    const uint32_t limit = bins.is_by_value ? kMaxCrowdByValue : kMaxCrowd;
    if (!Unlikely(crowd > limit)) break;
    SyncThreads();  // the reads of the crowd before it is reset
    if (bins.is_by_value) {
      bins.is_by_value = false;
    } else if (has_ties) {
      has_ties = false;
      count = StoreTies(cta, pairs, count, range.lowest, store);
    } else {
      const int size = 1 << (32 - __clz(count - 1));
#pragma unroll 1
      for (int i = count + cta.thread; i < size; i += kThreads) pairs[i] = make_uint2(~0u, ~0u);
      SyncThreads();  // the padding before the sort
      SortBitonic(cta, pairs, size);
#pragma unroll 1
      for (int i = cta.thread; i < count; i += kThreads) store(i, pairs[i]);
      return;
    }
  }
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    const uint2 pair = pairs[i];
    spare[CountPair(cta, bins.Of(pair))] = pair;
  }
  SyncThreads();  // pairs in their bins, and the bins' ends, before their reads
  const uint16_t* ends = reinterpret_cast<const uint16_t*>(cta.bins);
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    const uint2 pair = spare[i];
    const uint32_t bin = bins.Of(pair);
    const uint32_t begin = bin == 0 ? 0 : ends[bin - 1];
    const uint32_t end = ends[bin];
    uint32_t rank = begin;
#pragma unroll 1
    for (uint32_t j = begin; j < end; ++j) rank += IsBetter(spare[j], pair);
    store(static_cast<int>(rank), pair);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SORT_PAIRS_CUH_
