// Step 4: the exact k-th largest key among the open elements, and how many of its ties are wanted.
//
// Splits the bracket into bins, keeps the bin that holds the wanted rank, and repeats until the
// bin has at most 32 elements or is a single key; ordinary data needs one round. One warp then
// ranks the few that are left. Cost of a round: one pass over the candidates, three barriers; the
// end: one pass, two barriers.

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

// The candidates to search: `count` keys in shared memory, among them all open keys of the row.
struct Candidates {
  const uint32_t* keys;
  uint32_t count;
  uint32_t num_before;  // the first so many belong to the CTAs before this one
};

// Ranks `num` <= 32 keys; by one whole warp. `rank` is 1-based. `is_before` tells whether the key
// of this lane belongs to a CTA before this one.
__device__ __forceinline__ void RankFinalists(const Cta& cta, const uint32_t* keys, uint32_t num,
                                              bool is_before, uint32_t rank) {
  const bool is_finalist = static_cast<uint32_t>(cta.lane) < num;
  const uint32_t key = is_finalist ? keys[cta.lane] : 0;
  uint32_t greater = 0, equal = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < num; ++i) {
    const uint32_t other = keys[i];
    greater += other > key;
    equal += other == key;
  }
  const bool is_pivot = is_finalist && greater < rank && rank <= greater + equal;
  const int source = __ffs(WarpBallot(is_pivot)) - 1;
  const uint32_t pivot = WarpBroadcast(key, source);
  const uint32_t num_greater = WarpBroadcast(greater, source);
  const uint32_t greater_before = __popc(WarpBallot(is_finalist && is_before && key > pivot));
  const uint32_t equal_before = __popc(WarpBallot(is_finalist && is_before && key == pivot));
  if (cta.lane == 0) {
    SharedHeader* header = cta.header;
    header->pivot_key = pivot;
    header->num_ties = rank - num_greater;
    header->greater_before += greater_before;
    header->equal_before += equal_before;
  }
}

__device__ __forceinline__ Pivot ReadPivot(const SharedHeader* header) {
  return Pivot{header->pivot_key, header->num_ties, header->greater_before, header->equal_before};
}

// Calls visit(key, index) for this thread's share of the candidates.
template <typename Visit>
__device__ __forceinline__ void VisitCandidates(const Cta& cta, const Candidates& candidates,
                                                Visit visit) {
#pragma unroll 1
  for (uint32_t i = cta.thread; i < candidates.count; i += kThreads) visit(candidates.keys[i], i);
}

// Finds the key of 1-based rank `rank` among the candidates inside the bracket, of which there are
// at most `inside`. In: candidates ordered by a barrier; the header's counters are zero. Ends in a
// barrier.
__device__ __forceinline__ Pivot FindPivot(Cta& cta, const Candidates& candidates, Bracket bracket,
                                           uint32_t inside, uint32_t rank) {
  SharedHeader* header = cta.header;
  if (candidates.count <= kMaxFinalists) {
    const bool is_before = static_cast<uint32_t>(cta.lane) < candidates.num_before;
    if (cta.warp == 0) RankFinalists(cta, candidates.keys, candidates.count, is_before, rank);
    SyncThreads();  // the pivot before its reads
    return ReadPivot(header);
  }
  while (inside > kMaxFinalists && !bracket.IsSingleKey()) {
    const LinearBins bins(bracket);
    VisitCandidates(cta, candidates, [&](uint32_t key, uint32_t) {
      atomicAdd(&cta.bins[bracket.Contains(key) ? bins.FromTop(key) : kBins], 1u);
    });
    SyncThreads();  // counts before the search
    RankBin found, same;
    FindRankBins(cta, BinOrder::kFromTop, rank, rank, &found, &same);
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
  if (is_single) {
    return Pivot{bracket.lowest, rank, header->greater_before, header->equal_before};
  }
  if (cta.warp == 0) {
    RankFinalists(cta, header->finalists, header->num_finalists,
                  header->finalist_is_before[cta.lane] != 0, rank);
  }
  SyncThreads();  // the pivot before its reads
  return ReadPivot(header);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FIND_PIVOT_CUH_
