// Block-wide tools: one CTA's view of itself, the scan, and the search in a histogram.

#ifndef JAX_TOPK_CUDA_BLOCK_CUH_
#define JAX_TOPK_CUDA_BLOCK_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "args.h"

namespace jax_topk {

// The keys lowest .. highest, both included.
struct Bracket {
  uint32_t lowest;
  uint32_t highest;
  __device__ __forceinline__ bool Contains(uint32_t key) const {
    return key - lowest <= highest - lowest;
  }
  __device__ __forceinline__ bool IsSingleKey() const { return lowest == highest; }
};

// The histogram bin that holds an element of a given rank.
struct RankBin {
  uint32_t bin;     // counted from the top: 0 holds the largest keys
  uint32_t above;   // elements in the bins before it
  uint32_t inside;  // elements in it
};

// Winners decided (`certain`) and undecided (`open`) elements of one CTA's part.
struct alignas(8) PartCounts {
  uint32_t certain;
  uint32_t open;
};

constexpr int kMaxFinalists = 32;
constexpr int kMaxCountWords = 3;  // see TurnCounts

// Scalars that the threads of a CTA share. Lies at offset 0 of shared memory.
struct SharedHeader {
  MBarrier counts_barriers[2];  // of the first and the second attempt
  MBarrier candidates_barrier;
  MBarrier winners_barrier;
  MBarrier segments_barrier;
  MBarrier totals_barrier;
  int32_t length;                // of the row's window
  alignas(8) uint2 own_is_free;  // its arrival says so, see GatherCandidates
  uint2 ranges[2];               // lowest and highest key seen, see CountAndSeeRange
  uint32_t num_chunks;           // of the lists, taken so far
  uint32_t num_own;              // open keys that were copied from them
  uint32_t num_finalists;
  uint32_t greater_before;
  uint32_t equal_before;
  uint32_t pivot_key;
  uint32_t num_ties;
  uint32_t crowd;                                 // of the fullest bin while pairs are sorted
  uint4 found[2];                                 // as RankBin
  Bracket warp_ranges[kWarps];                    // see KeyRange
  PartCounts warp_counts[kWarps];                 // see SumOverWarps
  uint32_t turn_sums[2][kMaxCountWords][kWarps];  // see TurnPlaces
  uint32_t warp_listed[kWarps];                   // entries of each warp's list
  uint32_t warp_totals[2][kWarps];
  uint32_t bin_totals[kBinThreads / 32];
  alignas(16) uint32_t finalists[kMaxFinalists];  // zero where there is none
  uint32_t finalist_is_before[kMaxFinalists];
  PartCounts records[2][kMaxClusterSize];  // of every CTA of the row, per attempt
};
static_assert(sizeof(SharedHeader) <= kHeaderBytes, "the header outgrew its place");

// One CTA at work on one row.
struct Cta {
  SharedHeader* header;
  uint32_t* bins;        // [kBins], all zero between uses, and a spare bin behind them
  unsigned char* tiles;  // area A
  unsigned char* list;   // area B: kept elements, see ListPool
  unsigned char* sums;   // area B: histograms of the cluster
  uint32_t* gathered;    // candidate keys of the whole row
  unsigned char* own;    // own candidate keys, later the staged output or the pairs to sort
  unsigned char* spare;  // the area that holds no candidates; free once the output is staged
  int thread, lane, warp;
  int rank;            // of this CTA among the CTAs of its row
  int num_active;      // CTAs that share the row
  uint32_t num_scans;  // alternates the scan's scratch, see BlockScan
};

__device__ __forceinline__ Cta MakeCta(const TopKArgs& args) {
  unsigned char* shared = SharedMemory();
  Cta cta{};
  cta.header = reinterpret_cast<SharedHeader*>(shared);
  cta.bins = reinterpret_cast<uint32_t*>(shared + args.layout.bins);
  cta.tiles = shared + args.layout.a;
  cta.list = shared + args.layout.b;
  cta.sums = shared + args.layout.b;
  cta.thread = ThreadIndex();
  cta.lane = cta.thread & 31;
  cta.warp = cta.thread >> 5;
  cta.rank = ClusterRank();
  cta.num_active = 1;
  return cta;
}

// Places the candidates where the row leaves room for them, see smem_layout.h.
__device__ __forceinline__ void PlaceCandidates(Cta& cta, const TopKArgs& args, bool has_list) {
  unsigned char* candidates = SharedMemory() + (has_list ? args.layout.a : args.layout.b);
  cta.gathered = reinterpret_cast<uint32_t*>(candidates);
  cta.own = candidates + args.layout.own;
  cta.spare = SharedMemory() + (has_list ? args.layout.b : args.layout.a);
}

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ uint32_t WarpInclusiveSum(int lane, uint32_t value) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) value = WarpAddShifted(lane, value, delta);
  return value;
}

// A CTA's own open keys fill whole vectors: behind them come zeros, the lowest key there is.
__device__ __forceinline__ uint32_t PadToVector(uint32_t count) { return (count + 3) & ~3u; }
__device__ __forceinline__ void PadOpenKeys(const Cta& cta, uint32_t num_open) {
  const uint32_t place = num_open + static_cast<uint32_t>(cta.thread);
  if (place < PadToVector(num_open)) reinterpret_cast<uint32_t*>(cta.own)[place] = 0;
}

struct Scan {
  uint32_t before;  // sum over the threads before this one
  uint32_t total;
};

// Exclusive sum over the block. Ends with every thread knowing the total; one barrier. The scratch
// alternates between two rows: a row is written again only after the next scan's barrier, which
// every reader of it has passed by then.
__device__ __forceinline__ Scan BlockScan(Cta& cta, uint32_t value) {
  const uint32_t inclusive = WarpInclusiveSum(cta.lane, value);
  uint32_t* totals = cta.header->warp_totals[cta.num_scans & 1];
  cta.num_scans += 1;
  if (cta.lane == 31) totals[cta.warp] = inclusive;
  SyncThreads();  // warp totals before their reads
  const uint32_t of_warp = cta.lane < kWarps ? totals[cta.lane] : 0;
  Scan scan;
  scan.before = inclusive - value + WarpSum(cta.lane < cta.warp ? of_warp : 0);
  scan.total = WarpSum(of_warp);
  return scan;
}

// Clears the histogram. The caller puts a barrier between this and the first count.
__device__ __forceinline__ void ClearBins(const Cta& cta) {
#pragma unroll
  for (int i = 0; i < kBinVectors; i += kThreads) {
    if (i + cta.thread < kBinVectors) {
      reinterpret_cast<uint4*>(cta.bins)[i + cta.thread] = make_uint4(0, 0, 0, 0);
    }
  }
}

// Words of shared memory, from whole vectors.
template <int kWords>
__device__ __forceinline__ void LoadWords(const uint32_t* from, uint32_t (&to)[kWords]) {
  static_assert(kWords % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 vector = LoadShared(reinterpret_cast<const uint4*>(from + i));
    to[i] = vector.x;
    to[i + 1] = vector.y;
    to[i + 2] = vector.z;
    to[i + 3] = vector.w;
  }
}

// A thread's bins: as many counts, in registers.
struct BinCounts {
  uint32_t of[kBinsPerThread] = {};
  uint32_t sum = 0;

  __device__ __forceinline__ BinCounts() {}
  // The thread's share of a histogram.
  __device__ __forceinline__ explicit BinCounts(const uint4* own_bins) {
    LoadWords(reinterpret_cast<const uint32_t*>(own_bins), of);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 4) sum += of[i] + of[i + 1] + of[i + 2] + of[i + 3];
  }
  // The bin, from 0, that holds element `inner` < sum of them, from 0.
  __device__ __forceinline__ RankBin Find(uint32_t inner) const {
    RankBin found{0, 0, of[0]};
    uint32_t reached = of[0];
#pragma unroll
    for (int i = 1; i < kBinsPerThread; ++i) {
      if (inner >= reached) found = RankBin{static_cast<uint32_t>(i), reached, of[i]};
      reached += of[i];
    }
    return found;
  }
};

// Finds the bins that hold two ranks (1-based, from the top; clamped to 1 .. total). In: complete
// counts, bin 0 at the top, ordered by a barrier, not all zero. Out: the bins, known to all
// threads; the histogram is zero again. Returns the total. Two barriers.
//
// Every warp that holds bins learns its own total and those before it; only the warp in which a
// rank falls looks further.
__device__ __forceinline__ uint32_t FindRankBins(Cta& cta, uint32_t first_rank,
                                                 uint32_t second_rank, RankBin* first,
                                                 RankBin* second) {
  constexpr int kSearchWarps = kBinThreads / 32;
  uint32_t* totals = cta.header->bin_totals;
  BinCounts counts;
  uint32_t warp_total = 0;
  if (cta.warp < kSearchWarps) {
    uint4* own_bins = reinterpret_cast<uint4*>(cta.bins) + kBinsPerThread / 4 * cta.thread;
    counts = BinCounts(own_bins);
#pragma unroll
    for (int i = 0; i < kBinsPerThread / 4; ++i) own_bins[i] = make_uint4(0, 0, 0, 0);
    warp_total = WarpSum(counts.sum);
    if (cta.lane == 0) totals[cta.warp] = warp_total;
  }
  SyncThreads();  // totals before their reads
  const uint32_t of_warp = cta.lane < kSearchWarps ? totals[cta.lane] : 0;
  const uint32_t total = WarpSum(of_warp);
  if (cta.warp < kSearchWarps) {
    const uint32_t warp_before = WarpSum(cta.lane < cta.warp ? of_warp : 0);
    const uint32_t first_inner = max(min(first_rank, total), 1u) - 1 - warp_before;
    const uint32_t second_inner = max(min(second_rank, total), 1u) - 1 - warp_before;
    // Unsigned: ranks before this warp are as wrong as those behind it.
    if (first_inner < warp_total || second_inner < warp_total) {
      const uint32_t before = WarpInclusiveSum(cta.lane, counts.sum) - counts.sum;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t in_warp = i == 0 ? first_inner : second_inner;
        const uint32_t inner = in_warp - before;
        if (inner >= counts.sum || in_warp >= warp_total) continue;
        const RankBin own = counts.Find(inner);
        cta.header->found[i] =
            make_uint4(kBinsPerThread * static_cast<uint32_t>(cta.thread) + own.bin,
                       warp_before + before + own.above, own.inside, 0);
      }
    }
  }
  SyncThreads();  // the found bins before their reads; the cleared bins before the next counts
  const uint4 first_found = cta.header->found[0];
  const uint4 second_found = cta.header->found[1];
  *first = RankBin{first_found.x, first_found.y, first_found.z};
  *second = RankBin{second_found.x, second_found.y, second_found.z};
  return total;
}

// Splits a bracket evenly: bin from the top = (highest - key) >> shift, below 2^log_bins.
struct LinearBins {
  uint32_t highest;
  int shift;

  __device__ explicit LinearBins(const Bracket& bracket, int log_bins = kLogBins)
      : highest(bracket.highest) {
    const uint32_t range = bracket.highest - bracket.lowest;
    const int bits = 32 - __clz(range);
    shift = bits > log_bins ? bits - log_bins : 0;
  }
  __device__ __forceinline__ uint32_t FromTop(uint32_t key) const {
    return (highest - key) >> shift;
  }
  // The keys of bins `first` .. `last` (from the top) within `outer`.
  __device__ __forceinline__ Bracket Keys(uint32_t first, uint32_t last,
                                          const Bracket& outer) const {
    Bracket keys;
    keys.highest = highest - (first << shift);
    const uint32_t depth = (last << shift) + ((1u << shift) - 1);
    keys.lowest = depth <= highest - outer.lowest ? highest - depth : outer.lowest;
    return keys;
  }

 private:
  static constexpr int kLogBins = 11;
  static_assert((1 << kLogBins) == kBins, "kLogBins follows kBins");
};

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_BLOCK_CUH_
