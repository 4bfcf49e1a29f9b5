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

// A bracket, and how many of the counted elements lie above and inside it.
struct Estimate {
  Bracket bracket;
  uint32_t above;
  uint32_t inside;
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

constexpr int kMaxCountWords = 3;  // see TurnCounts

// The barriers of a cluster, in SharedHeader.
enum ClusterBarrier {
  kCountsBarrier,  // of the first attempt; the second has its own
  kCountsBarrierAgain,
  kCandidatesBarrier,
  kWinnersBarrier,
  kSegmentsBarrier,
  kTotalsBarrier,
  kNumBarriers
};

// Scalars that the threads of a CTA share. Lies at offset 0 of shared memory.
struct SharedHeader {
  MBarrier barriers[kNumBarriers];
  alignas(8) uint2 own_is_free;    // its arrival says so, see SendCandidates
  uint2 ranges[2];                 // of keys seen, see CountAndSeeRange and CountInside
  uint32_t num_chunks;             // of the lists, taken so far
  uint32_t num_groups;             // of their entries, in order
  uint32_t num_own;                // open keys that were copied from them
  uint32_t pivot_key;              // see UpToGreatest too
  uint32_t pivot_ties;             // see RankDirectly
  uint4 found[2];                  // see FindRanks, FindSpread
  uint4 warp_keys[kWarps];         // see FindKeys
  PartCounts warp_counts[kWarps];  // see SumOverWarps
  uint32_t turn_sums[2][kMaxCountWords][kWarps];  // see TurnPlaces
  uint32_t warp_listed[kWarps];                   // entries of each warp's list
  uint32_t warp_totals[2][kWarps];
  uint32_t bin_totals[kBinThreads / 32];
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

__device__ __forceinline__ Cta MakeCta(const TopKArgs& args, int rank) {
  unsigned char* shared = SharedMemory();
  Cta cta{};
  cta.header = reinterpret_cast<SharedHeader*>(shared);
  cta.bins = reinterpret_cast<uint32_t*>(shared + kBinsOffset);
  cta.tiles = shared + kAreaAOffset;
  cta.list = shared + args.layout.b;
  cta.sums = shared + args.layout.b;
  cta.thread = ThreadIndex();
  cta.lane = cta.thread & 31;
  cta.warp = cta.thread >> 5;
  cta.rank = rank;
  cta.num_active = 1;
  return cta;
}

// Elements of the rows before `row`: one multiplication, since neither factor is negative.
__device__ __forceinline__ uint64_t ElementsBefore(uint32_t row, int32_t per_row) {
  return uint64_t{row} * static_cast<uint32_t>(per_row);
}

// For functions that are not inlined. See KnownShared of a pointer.
__device__ __forceinline__ Cta KnownShared(Cta cta) {
  cta.header = KnownShared(cta.header);
  cta.bins = KnownShared(cta.bins);
  cta.tiles = KnownShared(cta.tiles);
  cta.list = KnownShared(cta.list);
  cta.sums = KnownShared(cta.sums);
  cta.gathered = KnownShared(cta.gathered);
  cta.own = KnownShared(cta.own);
  cta.spare = KnownShared(cta.spare);
  return cta;
}

// Places the candidates where the row leaves room for them, see smem_layout.h.
__device__ __forceinline__ void PlaceCandidates(Cta& cta, const TopKArgs& args, bool has_list) {
  unsigned char* candidates = has_list ? cta.tiles : cta.list;
  cta.gathered = reinterpret_cast<uint32_t*>(candidates);
  cta.own = candidates + args.layout.own;
  cta.spare = has_list ? cta.list : cta.tiles;
}

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ uint32_t WarpInclusiveSum(int lane, uint32_t value) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) value = WarpAddShifted(lane, value, delta);
  return value;
}

// A CTA's own open keys fill whole vectors: behind them come zeros, the lowest key there is, up to
// `num_padded`. Of a short row, few enough to be ranked directly, they fill one chunk or two.
__device__ __forceinline__ uint32_t PadToVector(uint32_t count) { return (count + 3) & ~3u; }
constexpr uint32_t kDirectChunk = kMaxDirect / 2;
__device__ __forceinline__ uint32_t PadToChunk(uint32_t count) {
  return count <= kDirectChunk ? kDirectChunk : kMaxDirect;
}
__device__ __forceinline__ void PadOpenKeys(const Cta& cta, uint32_t num_open,
                                            uint32_t num_padded) {
  const uint32_t place = num_open + static_cast<uint32_t>(cta.thread);
  if (place < num_padded) reinterpret_cast<uint32_t*>(cta.own)[place] = 0;
}

// How many of its warp's lanes come before a lane, of those in a ballot.
__device__ __forceinline__ uint32_t LanesBefore(int lane, uint32_t ballot) {
  return __popc(ballot & ((1u << lane) - 1));
}

struct Scan {
  uint32_t before;  // sum over the threads, or the warp's lanes, before this one
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

// The sum of `value` over the CTA. One barrier.
__device__ __forceinline__ uint32_t BlockSum(Cta& cta, uint32_t value) {
  uint32_t* totals = cta.header->warp_totals[cta.num_scans & 1];
  cta.num_scans += 1;
  const uint32_t of_own = WarpSum(value);
  if (cta.lane == 0) totals[cta.warp] = of_own;
  SyncThreads();  // warp totals before their reads
  return WarpSum(cta.lane < kWarps ? totals[cta.lane] : 0);
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

// A thread's bins: as many counts, in registers.
struct BinCounts {
  uint32_t of[kBinsPerThread] = {};
  uint32_t sum = 0;

  __device__ __forceinline__ BinCounts() {}
  // The share of `thread` in a histogram. Every other four lanes read their second vector first:
  // so eight neighbours do not meet in the same banks.
  __device__ __forceinline__ BinCounts(const uint32_t* bins, int thread) {
    static_assert(kBinsPerThread == 8, "two vectors");
    const uint4* own = reinterpret_cast<const uint4*>(bins) + 2 * thread;
    const int first = SwappedFirst(thread);
    const uint4 a = LoadShared(own + first);
    const uint4 b = LoadShared(own + (first ^ 1));
    const uint4 low = first == 0 ? a : b, high = first == 0 ? b : a;
    of[0] = low.x, of[1] = low.y, of[2] = low.z, of[3] = low.w;
    of[4] = high.x, of[5] = high.y, of[6] = high.z, of[7] = high.w;
    sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }
  __device__ __forceinline__ static void Clear(uint32_t* bins, int thread) {
    uint4* own = reinterpret_cast<uint4*>(bins) + 2 * thread;
    const int first = SwappedFirst(thread);
    own[first] = make_uint4(0, 0, 0, 0);
    own[first ^ 1] = make_uint4(0, 0, 0, 0);
  }
  // The bin, from 0, that holds element `inner` < sum of them, from 0.
  __device__ __forceinline__ RankBin Find(uint32_t inner) const {
    uint32_t before[kBinsPerThread + 1] = {};
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) before[i + 1] = before[i] + of[i];
    // Halved until before[0] and before[1] are those of the bin.
    uint32_t bin = 0;
#pragma unroll
    for (int half = kBinsPerThread / 2; half > 0; half /= 2) {
      const bool is_upper = inner >= before[half];
      bin += is_upper ? half : 0;
#pragma unroll
      for (int i = 0; i <= half; ++i) before[i] = is_upper ? before[i + half] : before[i];
    }
    return RankBin{bin, before[0], before[1] - before[0]};
  }

 private:
  __device__ __forceinline__ static int SwappedFirst(int thread) { return thread >> 2 & 1; }
};

// Finds the bins that hold ranks (1-based, from the top): `keys_of(bin)` gives the keys of a bin,
// counted from the top. In: complete counts, ordered by a barrier, not all zero. Out: the bins,
// known to all threads; the histogram is zero again. Two barriers. `kMayBeBeyond`: ranks are
// clamped to 1 .. total, which is returned; otherwise they are in that range.
//
// Only the warps in which a rank falls look further than at their sums.
template <bool kMayBeBeyond, int kRanks, typename KeysOf>
__device__ __forceinline__ uint32_t FindRanks(const Cta& cta, const uint32_t (&ranks)[kRanks],
                                              KeysOf keys_of, Estimate (&found)[kRanks]) {
  static_assert(kRanks <= 2, "the header has room for two");
  constexpr int kSearchWarps = kBinThreads / 32;
  uint32_t* totals = cta.header->bin_totals;
  const int thread = UseHere(cta.thread);
  const bool has_bins = cta.warp < kSearchWarps;
  BinCounts counts;
  uint32_t before = 0;  // the thread's bins, in its warp
  if (has_bins) {
    counts = BinCounts(cta.bins, thread);
    BinCounts::Clear(cta.bins, thread);
    const uint32_t inclusive = WarpInclusiveSum(cta.lane, counts.sum);
    if (cta.lane == 31) totals[cta.warp] = inclusive;
    before = inclusive - counts.sum;
  }
  SyncThreads();  // totals before their reads
  const uint32_t of_warp = cta.lane < kSearchWarps ? totals[cta.lane] : 0;
  const uint32_t total = kMayBeBeyond ? WarpSum(of_warp) : 0;
  if (has_bins) {
    before += WarpSum(cta.lane < cta.warp ? of_warp : 0);
    uint32_t inner[kRanks];
    uint32_t held = 0;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      inner[i] = (kMayBeBeyond ? max(min(ranks[i], total), 1u) : ranks[i]) - 1 - before;
      // Unsigned: ranks before these bins are as wrong as those behind them.
      if (inner[i] < counts.sum) held |= 1u << i;
    }
#pragma unroll 1
    for (; held != 0; held &= held - 1) {
      const bool is_first = (held & 1) != 0;
      const RankBin own = counts.Find(is_first ? inner[0] : inner[kRanks - 1]);
      const Bracket keys = keys_of(kBinsPerThread * static_cast<uint32_t>(thread) + own.bin);
      cta.header->found[is_first ? 0 : kRanks - 1] =
          make_uint4(keys.lowest, keys.highest, before + own.above, own.inside);
    }
  }
  SyncThreads();  // the found bins before their reads; the cleared bins before the next counts
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    const uint4 of_rank = LoadShared(&cta.header->found[i]);
    found[i] = Estimate{Bracket{of_rank.x, of_rank.y}, of_rank.z, of_rank.w};
  }
  return total;
}

// The same for one rank.
template <bool kMayBeBeyond, typename KeysOf>
__device__ __forceinline__ Estimate FindRank(const Cta& cta, uint32_t rank, KeysOf keys_of) {
  Estimate found[1];
  FindRanks<kMayBeBeyond>(cta, {rank}, keys_of, found);
  return found[0];
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
