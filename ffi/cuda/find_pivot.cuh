// Step 4: the exact k-th largest key among the open elements, and how many of its ties are wanted.
//
// Splits the bracket into bins, keeps the bin that holds the wanted rank, and repeats until the
// bin has at most 32 elements or is a single key; ordinary data needs one round. The few elements
// that are left, and those of a short row at once, are compared with each other. Cost: two passes
// over the candidates and four barriers; of few candidates one barrier.

#ifndef JAX_TOPK_CUDA_FIND_PIVOT_CUH_
#define JAX_TOPK_CUDA_FIND_PIVOT_CUH_

#include <cstdint>

#include "block.cuh"

namespace jax_topk {

// The k-th key of a row, and how many of its ties are selected.
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

// Finds the bin of a rank (1-based, from the top), by the first warp: all warps together would take
// longer for it, since they share the units for shuffles and shared memory. In: complete counts of
// kPivotBins bins, ordered by a barrier. One barrier.
__device__ __forceinline__ RankBin FindPivotBin(const Cta& cta, uint32_t rank) {
  if (cta.warp == 0) {
    const BinCounts counts(cta.bins, UseHere(cta.lane));
    const uint32_t before = WarpInclusiveSum(cta.lane, counts.sum) - counts.sum;
    const uint32_t inner = rank - 1 - before;
    // A rank behind all candidates means that the operand has changed meanwhile: any bin will do.
    if (inner < counts.sum || (cta.lane == 31 && rank > before + counts.sum)) {
      const RankBin own = counts.Find(inner);
      cta.header->found[0] = make_uint4(kBinsPerThread * static_cast<uint32_t>(cta.lane) + own.bin,
                                        before + own.above, own.inside, 0);
    }
  }
  SyncThreads();  // the found bin before its reads
  const uint4 found = LoadShared(&cta.header->found[0]);
  return RankBin{found.x, found.y, found.z};
}

// How many keys are greater than a key, and how many are not smaller.
struct KeysAhead {
  uint32_t greater = 0, reached = 0;

  // By sums that carry if other > key, and if other >= key. The second never does if the key is
  // zero, which all keys reach.
  __device__ __forceinline__ void Count(const uint4& others, uint32_t key) {
    greater = CountCarry(greater, others.x, ~key);
    reached = CountCarry(reached, others.x, 0u - key);
    greater = CountCarry(greater, others.y, ~key);
    reached = CountCarry(reached, others.y, 0u - key);
    greater = CountCarry(greater, others.z, ~key);
    reached = CountCarry(reached, others.z, 0u - key);
    greater = CountCarry(greater, others.w, ~key);
    reached = CountCarry(reached, others.w, 0u - key);
  }
};

// The key of a rank among few.
struct DirectPivot {
  uint32_t key;
  uint32_t num_ties;   // as in Pivot
  uint32_t num_equal;  // keys equal to it
};

// Ranks `count` <= kMaxDirect keys in shared memory, by four threads each: whole chunks of kChunk,
// ordered by a barrier. Zeros behind the last key are taken for keys: if these are ties of the
// pivot, too many ties are counted, but not too many selected ones. In: the header's pivot is zero.
// One barrier.
template <uint32_t kChunk>
__device__ __forceinline__ DirectPivot RankDirectly(const Cta& cta, const uint32_t* keys,
                                                    uint32_t count, uint32_t rank) {
  static_assert(kThreadsPerCandidate == 4, "two steps sum the shares");
  constexpr uint32_t kPerWarp = 32 / kThreadsPerCandidate;
  constexpr uint32_t kVectors = kChunk / 4 / kThreadsPerCandidate;  // of a chunk, per thread
  static_assert(kVectors * 4 * kThreadsPerCandidate == kChunk, "whole vectors for each thread");
  const uint32_t thread = static_cast<uint32_t>(UseHere(cta.thread));
  if (thread / 32 * kPerWarp < count) {  // the whole warp
    const uint32_t own = thread / kThreadsPerCandidate;
    const uint32_t share = thread % kThreadsPerCandidate;
    const uint32_t key = keys[own];
    KeysAhead of_share;
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += kChunk) {
      const auto* vectors = reinterpret_cast<const uint4*>(keys + first) + share;
      uint4 others[kVectors];
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) {
        others[i] = LoadShared(vectors + i * kThreadsPerCandidate);
      }
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) of_share.Count(others[i], key);
    }
    if (key == 0) of_share.reached = count / kThreadsPerCandidate;
    // Greater ones, and not smaller ones << 16.
    uint32_t ahead = of_share.greater | of_share.reached << 16;
    ahead += WarpShiftUp(ahead, 1);
    ahead += WarpShiftUp(ahead, 2);
    const uint32_t greater = ahead & 0xffffu;
    const bool has_sum = share == kThreadsPerCandidate - 1;
    if (has_sum && greater < rank && rank <= ahead >> 16) {
      // Several if the pivot has ties, all with the same news.
      RaiseTo(&cta.header->pivot_key, key);
      RaiseTo(&cta.header->pivot_ties, (rank - greater) | ((ahead >> 16) - greater) << 16);
    }
  }
  SyncThreads();  // the pivot before its reads
  const uint32_t ties = cta.header->pivot_ties;
  return DirectPivot{cta.header->pivot_key, ties & 0xffffu, ties >> 16};
}

// Ranks the finalists; as RankDirectly.
__device__ __forceinline__ Pivot RankFinalists(const Cta& cta, uint32_t rank) {
  const SharedHeader* header = cta.header;
  const DirectPivot pivot =
      RankDirectly<kMaxFinalists>(cta, header->finalists, kMaxFinalists, rank);
  // Behind the last finalist there are zeros.
  const int lane = UseHere(cta.lane);
  const uint32_t key = header->finalists[lane];
  const bool is_before = header->finalist_is_before[lane] != 0;
  return Pivot{pivot.key, pivot.num_ties,
               static_cast<uint32_t>(__popc(WarpBallot(is_before && key > pivot.key))),
               static_cast<uint32_t>(__popc(WarpBallot(is_before && key == pivot.key)))};
}

// Calls visit(vector, index of its first) for this thread's share of the candidates.
template <typename Visit>
__device__ __forceinline__ void VisitCandidates(const Cta& cta, const Candidates& candidates,
                                                Visit visit) {
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    visit(LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first)), first);
  }
}

// Finds the key of 1-based rank `rank` among the candidates inside the bracket. In: candidates
// ordered by a barrier; the histogram, the finalists, the pivot and the header's counters are zero.
// Ends after a barrier behind which candidates and histogram are no longer needed.
__device__ __forceinline__ Pivot FindPivot(Cta& cta, const Candidates& candidates, Bracket bracket,
                                           uint32_t rank) {
  SharedHeader* header = cta.header;
  if (cta.num_active == 1 && candidates.count <= kMaxDirect) {
    const DirectPivot pivot =
        RankDirectly<kDirectChunk>(cta, candidates.keys, PadToChunk(candidates.count), rank);
    return Pivot{pivot.key, pivot.num_ties, 0, 0};
  }
  uint32_t inside = candidates.count;
#pragma unroll 1
  for (int round = 0; inside > kMaxFinalists && !bracket.IsSingleKey(); ++round) {
    if (Unlikely(round > 0)) {
      SyncThreads();  // the last search before its bins are cleared
      if (cta.thread < kPivotBins) cta.bins[cta.thread] = 0;
      SyncThreads();  // the cleared histogram before its use
    }
    const LinearBins bins(bracket, kLogPivotBins);
    const auto count = [&](uint32_t key) {
      atomicAdd(&cta.bins[bracket.Contains(key) ? bins.FromTop(key) : kBins], 1u);
    };
    VisitCandidates(cta, candidates, [&](const uint4& keys, uint32_t) {
      count(keys.x);
      count(keys.y);
      count(keys.z);
      count(keys.w);
    });
    SyncThreads();  // counts before the search
    const RankBin found = FindPivotBin(cta, rank);
    bracket = bins.Keys(found.bin, found.bin, bracket);
    rank -= found.above;
    inside = found.inside;
  }
  const bool is_single = bracket.IsSingleKey();
  uint32_t greater_before = 0, equal_before = 0;
  VisitCandidates(cta, candidates, [&](const uint4& keys, uint32_t first) {
    const bool is_before = first < candidates.num_before;  // all of them: whole vectors
    uint32_t inside = (bracket.Contains(keys.x) ? 1 : 0) | (bracket.Contains(keys.y) ? 2 : 0) |
                      (bracket.Contains(keys.z) ? 4 : 0) | (bracket.Contains(keys.w) ? 8 : 0);
    if (is_before) {
      greater_before += (keys.x > bracket.highest) + (keys.y > bracket.highest) +
                        (keys.z > bracket.highest) + (keys.w > bracket.highest);
      equal_before += __popc(inside);
    }
    if (is_single) return;
#pragma unroll 1
    for (; inside != 0; inside &= inside - 1) {
      const uint32_t place = FetchAndAdd(&header->num_finalists, 1u);
      header->finalists[place] = candidates.keys[first + __ffs(inside) - 1];
      header->finalist_is_before[place] = is_before;
    }
  });
  if (candidates.num_before != 0) {
    greater_before = WarpSum(greater_before);
    equal_before = is_single ? WarpSum(equal_before) : 0;
    if (cta.lane == 0) {
      FetchAndAdd(&header->greater_before, greater_before);
      if (is_single) FetchAndAdd(&header->equal_before, equal_before);
    }
  }
  SyncThreads();  // finalists and sums before their reads
  Pivot pivot{bracket.lowest, rank, 0, 0};
  if (!is_single) pivot = RankFinalists(cta, rank);
  pivot.greater_before += header->greater_before;
  pivot.equal_before += header->equal_before;
  return pivot;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FIND_PIVOT_CUH_
