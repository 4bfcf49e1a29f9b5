// Sorted output: a row's selected elements, best first, by one CTA.
//
// Counts the pairs by 2048 bins, places every pair in its bin by an exclusive scan, and ranks it
// there among the few that share the bin: six passes over the pairs and seven barriers, whatever k
// is. Bins are even in key; if that spans too many octaves (keys around zero, most of all), even in
// value, or 32 to an octave where a few large values or an infinity would crowd those. Where values
// crowd into few bins all the same, a bitonic sort takes over, with log2(k)^2 / 2 steps of one
// barrier each.

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

// The range of the keys of `count` >= 1 pairs. Two barriers.
__device__ __forceinline__ Bracket KeyRange(Cta& cta, const uint2* pairs, int count) {
  if (cta.thread == 0) {
    cta.header->ranges[0] = make_uint2(0xffffffffu, 0);
    cta.header->crowd = 0;
  }
  SyncThreads();  // the reset before the minima
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    lowest = min(lowest, ~pairs[i].y);
    highest = max(highest, ~pairs[i].y);
  }
  lowest = WarpMin(lowest);
  highest = WarpMax(highest);
  if (cta.lane == 0) {
    atomicMin(&cta.header->ranges[0].x, lowest);
    atomicMax(&cta.header->ranges[0].y, highest);
  }
  SyncThreads();  // minima and maxima before their reads
  return Bracket{cta.header->ranges[0].x, cta.header->ranges[0].y};
}

// Turns the histogram into the first place of every bin; returns the size of the fullest one.
__device__ __forceinline__ uint32_t ScanBins(Cta& cta) {
  uint4* own_bins = reinterpret_cast<uint4*>(cta.bins) + kBinsPerThread / 4 * cta.thread;
  const bool has_bins = kBinThreads == kThreads || cta.thread < kBinThreads;
  uint32_t sum = 0, crowd = 0;
  if (has_bins) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread / 4; ++i) {
      const uint4 bins = own_bins[i];
      sum += bins.x + bins.y + bins.z + bins.w;
      crowd = max(crowd, max(max(bins.x, bins.y), max(bins.z, bins.w)));
    }
  }
  crowd = WarpMax(crowd);
  if (cta.lane == 0) atomicMax(&cta.header->crowd, crowd);
  uint32_t place = BlockScan(cta, sum).before;
  if (has_bins) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread / 4; ++i) {
      const uint4 bins = own_bins[i];
      const uint4 places = make_uint4(place, place + bins.x, place + bins.x + bins.y,
                                      place + bins.x + bins.y + bins.z);
      own_bins[i] = places;
      place = places.w + bins.w;
    }
  }
  SyncThreads();  // the places and the crowd before their reads
  return cta.header->crowd;
}

// The bin of a pair, 0 being that of the best.
template <typename T>
struct PairBins {
  LinearBins by_key;
  bool is_wide;
  bool is_by_value;
  float highest, scale;  // by value

  __device__ __forceinline__ explicit PairBins(const Bracket& range)
      : by_key(range), is_wide(range.highest - range.lowest > T::kWidestEven) {
    highest = T::OrderedValue(range.highest);
    const float width = highest - T::OrderedValue(range.lowest);
    scale = FastDivide(static_cast<float>(kBins), width);
    // Neither infinities nor NaNs, nor a quotient that is 0 or infinite.
    constexpr float kMost = 0x1p120f;
    is_by_value = is_wide && width < kMost && scale < kMost && scale > 0.0f;
  }
  __device__ __forceinline__ uint32_t Of(const uint2& pair) const {
    const uint32_t key = ~pair.y;
    if (!is_wide) return by_key.FromTop(key);
    if (!is_by_value) return CoarseBinOfKey<T>(key);
    // Every step is monotone, so better keys never come to later bins.
    const float depth = (highest - T::OrderedValue(key)) * scale;
    return min(static_cast<uint32_t>(depth), static_cast<uint32_t>(kBins - 1));
  }
};

// Counts pairs by bin and turns the counts into the first place of every bin. Returns the size of
// the fullest one. In: the histogram and the crowd are zero, ordered by a barrier.
template <typename T>
__device__ __forceinline__ uint32_t PlaceBins(Cta& cta, const uint2* pairs, int count,
                                              const PairBins<T>& bins) {
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) atomicAdd(&cta.bins[bins.Of(pairs[i])], 1u);
  SyncThreads();  // counts before the scan
  return ScanBins(cta);
}

// Calls store(rank, pair) for `count` pairs in ascending position, rank 0 being the best.
// `spare` holds as many pairs. `pairs` has room for a power of two. In: pairs, and the last use of
// the histogram and of `spare`, ordered by a barrier.
template <typename T, typename Store>
__device__ __forceinline__ void SortPairs(Cta& cta, uint2* pairs, uint2* spare, int count,
                                          Store store) {
  if (count == 0) return;
  ClearBins(cta);
  const Bracket range = KeyRange(cta, pairs, count);
  if (range.IsSingleKey()) {  // ties: in ascending position already
#pragma unroll 1
    for (int i = cta.thread; i < count; i += kThreads) store(i, pairs[i]);
    return;
  }
  PairBins<T> bins(range);
  uint32_t crowd = PlaceBins(cta, pairs, count, bins);
  if (Unlikely(bins.is_by_value && crowd > kMaxCrowdByValue)) {
    bins.is_by_value = false;
    SyncThreads();  // the reads of the crowd before it is reset
    ClearBins(cta);
    if (cta.thread == 0) cta.header->crowd = 0;
    SyncThreads();  // the cleared histogram before its use
    crowd = PlaceBins(cta, pairs, count, bins);
  }
  if (Unlikely(crowd > kMaxCrowd)) {
    const int size = count == 1 ? 1 : 1 << (32 - __clz(count - 1));
#pragma unroll 1
    for (int i = count + cta.thread; i < size; i += kThreads) pairs[i] = make_uint2(~0u, ~0u);
    SyncThreads();  // the padding before the sort
    SortBitonic(cta, pairs, size);
#pragma unroll 1
    for (int i = cta.thread; i < count; i += kThreads) store(i, pairs[i]);
    return;
  }
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    spare[atomicAdd(&cta.bins[bins.Of(pairs[i])], 1u)] = pairs[i];
  }
  SyncThreads();  // pairs in their bins, and the bins' ends, before their reads
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    const uint2 pair = spare[i];
    const uint32_t bin = bins.Of(pair);
    const uint32_t begin = bin == 0 ? 0 : cta.bins[bin - 1];
    const uint32_t end = cta.bins[bin];
    uint32_t rank = begin;
#pragma unroll 4
    for (uint32_t j = begin; j < end; ++j) rank += IsBetter(spare[j], pair);
    store(static_cast<int>(rank), pair);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SORT_PAIRS_CUH_
