// Step 4: the exact k-th largest key among the open elements, and how many of its ties are wanted.
//
// Splits the bracket into bins, keeps the bin that holds the wanted rank, and repeats until the
// bin has at most 32 elements or is a single key; ordinary data needs one round. What every warp
// can find from shared memory by itself needs no barrier: the rank's bin, of few enough bins, and
// the pivot among the few elements that are left. Cost: two passes over the candidates and two
// barriers. The few candidates of a short row are compared with each other at once: one barrier.

#ifndef JAX_TOPK_CUDA_FIND_PIVOT_CUH_
#define JAX_TOPK_CUDA_FIND_PIVOT_CUH_

#include <cstdint>

#include "block.cuh"

namespace jax_topk {

struct Pivot {
  uint32_t key;
  uint32_t num_ties;        // elements equal to the key that are selected, lowest positions first
  uint32_t greater_before;  // among the first `num_before` candidates
  uint32_t equal_before;
};

// The candidates to search: `count` keys in shared memory, among them all open keys of the row. A
// multiple of 4 at a multiple of 16 bytes; the rest is zeros, the lowest key.
struct Candidates {
  const uint32_t* keys;
  uint32_t count;
  uint32_t num_before;  // the first so many belong to the CTAs before this one
};

// Bins of a round: eight for every lane of a warp.
constexpr int kLogPivotBins = 8;
constexpr int kPivotBins = 1 << kLogPivotBins;
static_assert(kPivotBins == 32 * kBinsPerThread, "a warp holds all bins");

// Finds the bin of a rank (1-based, from the top) in every warp alike. In: complete counts of
// kPivotBins bins, ordered by a barrier.
__device__ __forceinline__ RankBin FindRankBinInWarp(const Cta& cta, uint32_t rank) {
  const BinCounts counts(reinterpret_cast<const uint4*>(cta.bins) + kBinsPerThread / 4 * cta.lane);
  const uint32_t before = WarpInclusiveSum(cta.lane, counts.sum) - counts.sum;
  const uint32_t inner = rank - 1 - before;
  const int source = __ffs(WarpBallot(inner < counts.sum)) - 1;
  RankBin found = counts.Find(inner);
  found.bin = WarpBroadcast(found.bin, source) + kBinsPerThread * source;
  found.above = WarpBroadcast(before + found.above, source);
  found.inside = WarpBroadcast(found.inside, source);
  return found;
}

// How many of the first `num` keys are greater than a key, and how many are not smaller. `keys`:
// whole vectors.
struct KeysAhead {
  uint32_t greater = 0, reached = 0;

  __device__ __forceinline__ KeysAhead(const uint32_t* keys, uint32_t num, uint32_t key) {
#pragma unroll 1
    for (uint32_t first = 0; first < num; first += 4) {
      const uint4 others = LoadShared(reinterpret_cast<const uint4*>(keys + first));
      greater += (others.x > key) + (others.y > key) + (others.z > key) + (others.w > key);
      reached += (others.x >= key) + (others.y >= key) + (others.z >= key) + (others.w >= key);
    }
  }
  __device__ __forceinline__ bool Include(uint32_t rank) const {
    return greater < rank && rank <= reached;
  }
};

// Ranks the `num` finalists in every warp alike; lane i looks at the i-th. `rank` is 1-based.
__device__ __forceinline__ Pivot RankFinalists(const Cta& cta, uint32_t num, uint32_t rank) {
  const SharedHeader* header = cta.header;
  const uint32_t key = header->finalists[cta.lane];
  const bool is_before = header->finalist_is_before[cta.lane] != 0;
  const KeysAhead ahead(header->finalists, num, key);
  const bool is_finalist = static_cast<uint32_t>(cta.lane) < num;
  const bool is_pivot = is_finalist && ahead.Include(rank);
  const int source = __ffs(WarpBallot(is_pivot)) - 1;
  Pivot pivot;
  pivot.key = WarpBroadcast(key, source);
  pivot.num_ties = rank - WarpBroadcast(ahead.greater, source);
  pivot.greater_before = __popc(WarpBallot(is_finalist && is_before && key > pivot.key));
  pivot.equal_before = __popc(WarpBallot(is_finalist && is_before && key == pivot.key));
  return pivot;
}

// Four threads compare one candidate with all others.
constexpr int kThreadsPerCandidate = 4;
constexpr uint32_t kMaxDirect = kThreads / kThreadsPerCandidate;

// The pivot of a row that has one CTA.
struct DirectPivot {
  uint32_t key;
  uint32_t num_ties;   // as in Pivot
  uint32_t num_equal;  // candidates equal to the key
};

// Ranks at most kMaxInEveryWarp candidates of a row that has one CTA, in every warp alike. Of more
// candidates, that all warps do the same costs more than the barrier that it saves.
constexpr uint32_t kMaxInEveryWarp = 8;
__device__ __forceinline__ DirectPivot RankInEveryWarp(const Cta& cta, const Candidates& candidates,
                                                       uint32_t rank) {
  const bool has_key = static_cast<uint32_t>(cta.lane) < candidates.count;
  const uint32_t key = has_key ? candidates.keys[cta.lane] : 0;
  const KeysAhead ahead(candidates.keys, candidates.count, key);
  const int source = __ffs(WarpBallot(has_key && ahead.Include(rank))) - 1;
  const uint32_t greater = WarpBroadcast(ahead.greater, source);
  return DirectPivot{WarpBroadcast(key, source), rank - greater,
                     WarpBroadcast(ahead.reached, source) - greater};
}

// Ranks at most kMaxDirect candidates of a row that has one CTA. In: the header's pivot is zero.
// One barrier.
__device__ __forceinline__ DirectPivot RankDirectly(const Cta& cta, const Candidates& candidates,
                                                    uint32_t rank) {
  static_assert(kThreadsPerCandidate == 4, "two steps sum the shares");
  const uint32_t own = static_cast<uint32_t>(cta.thread) / kThreadsPerCandidate;
  const uint32_t share = static_cast<uint32_t>(cta.thread) % kThreadsPerCandidate;
  const uint32_t key = own < candidates.count ? candidates.keys[own] : 0;
  // Greater ones, and not smaller ones << 16.
  uint32_t ahead = 0;
#pragma unroll 1
  for (uint32_t vector = share; 4 * vector < candidates.count; vector += kThreadsPerCandidate) {
    const uint4 others = LoadShared(reinterpret_cast<const uint4*>(candidates.keys) + vector);
    ahead += (others.x > key) + (others.y > key) + (others.z > key) + (others.w > key);
    ahead += ((others.x >= key) + (others.y >= key) + (others.z >= key) + (others.w >= key)) << 16;
  }
  ahead += WarpShiftUp(ahead, 1);
  ahead += WarpShiftUp(ahead, 2);
  const uint32_t greater = ahead & 0xffffu;
  const bool has_sum = share == kThreadsPerCandidate - 1;
  if (has_sum && own < candidates.count && greater < rank && rank <= ahead >> 16) {
    // Several if the pivot has ties, all with the same news.
    atomicMax(&cta.header->pivot_key, key);
    atomicMax(&cta.header->num_ties, (rank - greater) | ((ahead >> 16) - greater) << 16);
  }
  SyncThreads();  // the pivot before its reads
  const uint32_t ties = cta.header->num_ties;
  return DirectPivot{cta.header->pivot_key, ties & 0xffffu, ties >> 16};
}

// Calls visit(key, index) for this thread's share of the candidates.
template <typename Visit>
__device__ __forceinline__ void VisitCandidates(const Cta& cta, const Candidates& candidates,
                                                Visit visit) {
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    const uint4 keys = LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first));
    visit(keys.x, first);
    visit(keys.y, first + 1);
    visit(keys.z, first + 2);
    visit(keys.w, first + 3);
  }
}

// Finds the key of 1-based rank `rank` among the candidates inside the bracket. In: candidates
// ordered by a barrier; the histogram, the finalists, the pivot and the header's counters are zero.
// Ends after a barrier behind which candidates and histogram are no longer needed.
__device__ __forceinline__ Pivot FindPivot(Cta& cta, const Candidates& candidates, Bracket bracket,
                                           uint32_t rank) {
  SharedHeader* header = cta.header;
  if (cta.num_active == 1 && candidates.count <= kMaxDirect) {
    const DirectPivot pivot = RankDirectly(cta, candidates, rank);
    return Pivot{pivot.key, pivot.num_ties, 0, 0};
  }
  uint32_t inside = candidates.count;
#pragma unroll 1
  for (int round = 0; inside > kMaxFinalists && !bracket.IsSingleKey(); ++round) {
    if (Unlikely(round > 0)) {
      SyncThreads();  // the last reads of the histogram
      if (cta.thread < kPivotBins) cta.bins[cta.thread] = 0;
      SyncThreads();  // the cleared histogram before its use
    }
    const LinearBins bins(bracket, kLogPivotBins);
    VisitCandidates(cta, candidates, [&](uint32_t key, uint32_t) {
      atomicAdd(&cta.bins[bracket.Contains(key) ? bins.FromTop(key) : kBins], 1u);
    });
    SyncThreads();  // counts before the search
    const RankBin found = FindRankBinInWarp(cta, rank);
    bracket = bins.Keys(found.bin, found.bin, bracket);
    rank -= found.above;
    inside = found.inside;
  }
  const bool is_single = bracket.IsSingleKey();
  uint32_t greater_before = 0, equal_before = 0;
  VisitCandidates(cta, candidates, [&](uint32_t key, uint32_t index) {
    const bool is_before = index < candidates.num_before;
    const bool is_inside = bracket.Contains(key);
    greater_before += is_before && key > bracket.highest;
    equal_before += is_before && is_inside;
    if (is_inside && !is_single) {
      const uint32_t place = atomicAdd(&header->num_finalists, 1u);
      header->finalists[place] = key;
      header->finalist_is_before[place] = is_before;
    }
  });
  if (candidates.num_before != 0) {
    greater_before = WarpSum(greater_before);
    equal_before = is_single ? WarpSum(equal_before) : 0;
    if (cta.lane == 0 && greater_before != 0) atomicAdd(&header->greater_before, greater_before);
    if (cta.lane == 0 && equal_before != 0) atomicAdd(&header->equal_before, equal_before);
  }
  SyncThreads();  // finalists and sums before their reads
  Pivot pivot{bracket.lowest, rank, 0, 0};
  if (!is_single) pivot = RankFinalists(cta, header->num_finalists, rank);
  pivot.greater_before += header->greater_before;
  pivot.equal_before += header->equal_before;
  return pivot;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FIND_PIVOT_CUH_
