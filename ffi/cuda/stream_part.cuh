// Step 2 for a part that no tile holds: it is streamed once, and what may be selected is kept.
//
// Each warp streams a stretch of the part by itself, through its own ring of tiles in area A, so
// that no barrier of the CTA stands between two tiles. Elements at or above the bracket go to the
// warp's list as (key, position) in ascending position. The lists share area B in chunks of 32
// entries, taken from a common counter, so that any distribution of the elements over the warps
// fits. Counts are exact whatever happens to the memory that keeps the elements; what does not fit
// is counted but not stored, and the caller gives up the bracket then.
//
// The ties of a bracket that is a single key are counted and not kept: a plateau of equal values
// could fill any memory. Those that are selected, the lowest positions, are read again when the
// output is written.
//
// Order without sorting: lane l owns consecutive vectors of a tile, so one scan of the lanes' counts
// gives every kept element its place. A single comparison per element decides what is kept; where
// it stands against the bracket's upper end is asked of kept elements alone.

#ifndef JAX_TOPK_CUDA_STREAM_PART_CUH_
#define JAX_TOPK_CUDA_STREAM_PART_CUH_

#include <cstdint>

#include "block.cuh"
#include "filter_part.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

// The lists of all warps of a CTA.
struct ListPool {
  uint2* entries;    // (key, position), kChunkEntries in a chunk; position kNoPosition: no entry
  uint32_t* labels;  // of each chunk: the warp, and << 8 how many chunks of the warp come before
  uint32_t num_chunks;
};
constexpr uint32_t kNoPosition = 0xffffffffu;

__device__ __forceinline__ ListPool MakeListPool(const Cta& cta, const SmemLayout& layout) {
  const uint32_t num_chunks = static_cast<uint32_t>(layout.num_chunks);
  uint32_t* labels = reinterpret_cast<uint32_t*>(cta.list + num_chunks * kChunkEntries);
  return ListPool{cta.list, labels, num_chunks};
}

// What one warp found in its stretch; but for num_open the same in all lanes.
struct WarpPart {
  Part part;
  uint32_t num_kept;
  uint32_t num_open;    // met by this lane: among kept elements, or ties that are not kept
  uint32_t num_listed;  // all that is kept, or what came before something that did not fit
  uint32_t last_chunk;
  bool is_full;  // something did not fit

  __device__ __forceinline__ uint32_t NumChunks() const {
    return (num_listed + kChunkEntries - 1) / kChunkEntries;
  }
};

// Vectors of a warp's tile.
template <typename T>
constexpr int32_t kWarpTile = 32 * T::kMaxVectors;

// The stretch of a part that a warp streams.
__device__ __forceinline__ WarpPart MakeWarpPart(const Cta& cta, const Part& part) {
  const int32_t each = (part.last - part.first + kWarps - 1) / kWarps;
  WarpPart warp{};
  warp.part.first = min(part.first + each * cta.warp, part.last);
  warp.part.last = min(warp.part.first + each, part.last);
  return warp;
}

// The place of a warp's tile in the ring.
template <typename T>
__device__ __forceinline__ unsigned char* WarpTile(const Cta& cta, int slot) {
  return cta.tiles + (slot * kWarps + cta.warp) * (kWarpTile<T> * kVectorBytes);
}

// Starts copying tile `index` of a warp's stretch; also commits, so that every tile is one group,
// even one that does not exist.
template <typename T>
__device__ __forceinline__ void StartTile(const Cta& cta, const RowWindow& window, const Part& part,
                                          int32_t index, int slot) {
  const int64_t first = part.first + int64_t{index} * kWarpTile<T>;
  if (first < part.last) {
    const int32_t count = part.last - static_cast<int32_t>(first);  // it may exceed a tile
    const unsigned char* from = window.vectors + (first + cta.lane) * kVectorBytes;
    unsigned char* to = WarpTile<T>(cta, slot) + cta.lane * kVectorBytes;
    if (Unlikely(window.leaves_operand)) {
#pragma unroll 1
      for (int32_t at = cta.lane; at < min(count, kWarpTile<T>); at += 32) {
        *reinterpret_cast<uint4*>(to) =
            LoadVectorAtEdge<T>(window, static_cast<int32_t>(first) + at);
        to += 32 * kVectorBytes;
      }
    } else {
#pragma unroll
      for (int v = 0; v < T::kMaxVectors; ++v) {
        if (32 * v + cta.lane < count) {
          CopyAsync16(to + 32 * v * kVectorBytes, from + 32 * v * kVectorBytes);
        }
      }
    }
  }
  CopyAsyncCommit();
}

// Starts the first tiles of a warp's stretch, to be filtered by FilterStream.
template <typename T>
__device__ __forceinline__ void StartStream(const Cta& cta, const RowWindow& window,
                                            const Part& part, int num_stages) {
#pragma unroll 1
  for (int i = 0; i < num_stages; ++i) StartTile<T>(cta, window, part, i, i);
}

// Makes room for `count` more entries of the warp's list. Returns the chunk of the first entry that
// does not go to the last chunk so far. By the whole warp; `warp` still describes the list before.
__device__ __forceinline__ uint32_t TakeChunks(const Cta& cta, const ListPool& pool, uint32_t count,
                                               WarpPart* warp) {
  const uint32_t had = warp->NumChunks();
  const uint32_t needs = (warp->num_listed + count + kChunkEntries - 1) / kChunkEntries - had;
  if (needs == 0) return 0;
  uint32_t taken = 0;
  if (cta.lane == 0) taken = atomicAdd(&cta.header->num_chunks, needs);
  taken = WarpBroadcast(taken, 0);
  if (taken + needs > pool.num_chunks) {
    warp->is_full = true;
    return 0;
  }
  const uint32_t turn = static_cast<uint32_t>(cta.lane);
  if (turn < needs) {
    pool.labels[taken + turn] = static_cast<uint32_t>(cta.warp) | (had + turn) << 8;
  }
  return taken;
}

// Appends the elements of the lanes' runs that `kept` names to the warp's list, and counts those
// whose key is at most `highest_open`.
template <typename T>
__device__ __forceinline__ void AppendRuns(const Cta& cta, const ListPool& pool, const Run& run,
                                           uint32_t kept, uint32_t highest_open, uint32_t flip,
                                           WarpPart* warp) {
  const uint32_t count = __popc(kept);
  const uint32_t inclusive = WarpInclusiveSum(cta.lane, count);
  const uint32_t total = WarpBroadcast(inclusive, 31);
  if (total == 0) return;
  warp->num_kept += total;
  if (warp->is_full) return;
  const uint32_t taken = TakeChunks(cta, pool, total, warp);
  if (warp->is_full) return;
  const uint32_t had = warp->NumChunks();
  // Entry p of the list lies in the last chunk so far, or in one of those taken, which are
  // neighbours: at p of one of two stretches of memory.
  uint2* old_entries = pool.entries + static_cast<int32_t>(warp->last_chunk + 1 - had) * kChunkEntries;
  uint2* new_entries = pool.entries + static_cast<int32_t>(taken - had) * kChunkEntries;
  uint32_t place = warp->num_listed + inclusive - count;
#pragma unroll 1
  for (; kept != 0; kept &= kept - 1) {
    const int32_t i = __ffs(kept) - 1;
    const uint32_t key = KeyInRun<T>(run, i, flip);
    if (key <= highest_open) ++warp->num_open;
    (place < had * kChunkEntries ? old_entries : new_entries)[place] =
        make_uint2(key, static_cast<uint32_t>(run.position + i));
    ++place;
  }
  warp->num_listed += total;
  const uint32_t has = warp->NumChunks();
  if (has > had) warp->last_chunk = taken + (has - had) - 1;
}

// Appends what is kept of one tile, whose first vector is `first`, to the warp's list.
template <typename T>
__device__ __forceinline__ void FilterWarpTile(const Cta& cta, const RowWindow& window,
                                               const ListPool& pool, const unsigned char* tile,
                                               int32_t first, const Bracket& bracket, uint32_t flip,
                                               WarpPart* warp) {
  const Run run =
      MakeRun<T>(cta.lane, window, first, warp->part.last, T::kMaxVectors, tile);
  if (Unlikely(bracket.IsSingleKey())) {
    const RunMasks masks = MakeMasks<T>(run, bracket, flip);
    warp->num_open += __popc(masks.open);
    AppendRuns<T>(cta, pool, run, masks.certain, 0, flip, warp);
    return;
  }
  AppendRuns<T>(cta, pool, run, AtLeast<T>(run, bracket.lowest, flip), bracket.highest, flip, warp);
}

// The counts of a warp's finished stretch. Where something did not fit, all that is kept counts as
// open: no more is known, and the bracket is given up.
__device__ __forceinline__ PartCounts CountStretch(const WarpPart& warp, const Bracket& bracket) {
  const uint32_t open = WarpSum(warp.num_open);
  if (bracket.IsSingleKey()) return PartCounts{warp.num_kept, open};
  return warp.is_full ? PartCounts{0, warp.num_kept} : PartCounts{warp.num_kept - open, open};
}

// Filters a warp's stretch whose first tiles StartStream has started. In: the header's num_chunks
// is zero. Ends without a barrier.
template <typename T>
__device__ __forceinline__ void FilterStream(const Cta& cta, const RowWindow& window,
                                             const ListPool& pool, int num_stages,
                                             const Bracket& bracket, uint32_t flip,
                                             WarpPart* warp) {
  int slot = 0;
#pragma unroll 1
  for (int32_t index = 0;; ++index) {
    const int64_t first = warp->part.first + int64_t{index} * kWarpTile<T>;
    if (first >= warp->part.last) break;
    if (num_stages == 1) {
      CopyAsyncWait<0>();
    } else {
      CopyAsyncWait<1>();
    }
    SyncWarp();  // this tile's copies before its reads
    FilterWarpTile<T>(cta, window, pool, WarpTile<T>(cta, slot), static_cast<int32_t>(first),
                      bracket, flip, warp);
    SyncWarp();  // the tile's reads before its refill; the list before its reads
    StartTile<T>(cta, window, warp->part, index + num_stages, slot);
    slot = slot + 1 == num_stages ? 0 : slot + 1;
  }
  CopyAsyncWait<0>();
  // No entries in the rest of the last chunk.
  const uint32_t in_last = warp->num_listed % kChunkEntries;
  if (in_last != 0 && static_cast<uint32_t>(cta.lane) >= in_last) {
    pool.entries[warp->last_chunk * kChunkEntries + cta.lane] = make_uint2(0, kNoPosition);
  }
}

// Calls visit(key, position, chunk) for this warp's share of the chunks of all lists, in no order;
// lane l sees entry l. Long lists of few warps are dealt out like any others.
template <typename Visit>
__device__ __forceinline__ void VisitChunks(const Cta& cta, const ListPool& pool, Visit visit) {
  const uint32_t num_taken = min(cta.header->num_chunks, pool.num_chunks);
#pragma unroll 1
  for (uint32_t chunk = cta.warp; chunk < num_taken; chunk += kWarps) {
    const uint2 entry = pool.entries[chunk * kChunkEntries + cta.lane];
    visit(entry.x, entry.y, chunk);
  }
}

// Sums over the CTA's warps.
struct WarpPrefix {
  uint2 before;  // the warps before this one
  uint2 total;
};

// Sums pairs. `slot` 0 and 1 alternate, so that one barrier serves.
__device__ __forceinline__ WarpPrefix SumOverWarps(const Cta& cta, uint2 of_warp, int slot) {
  uint2* sums = cta.header->warp_sums[slot];
  if (cta.lane == 0) sums[cta.warp] = of_warp;
  SyncThreads();  // the warps' sums before their reads
  const uint2 value = cta.lane < kWarps ? sums[cta.lane] : make_uint2(0, 0);
  const bool is_before = cta.lane < cta.warp;
  WarpPrefix prefix;
  prefix.before = make_uint2(WarpSum(is_before ? value.x : 0), WarpSum(is_before ? value.y : 0));
  prefix.total = make_uint2(WarpSum(value.x), WarpSum(value.y));
  return prefix;
}

// Copies the open keys of all lists to cta.own, in any order. In: complete lists, ordered by a
// barrier; the header's num_own is zero. Ends without a barrier.
__device__ __forceinline__ void ExtractOpenKeys(const Cta& cta, const ListPool& pool,
                                                uint32_t highest_open) {
  uint32_t* own = reinterpret_cast<uint32_t*>(cta.own);
  VisitChunks(cta, pool, [&](uint32_t key, uint32_t position, uint32_t) {
    const bool is_open = position != kNoPosition && key <= highest_open;
    const uint32_t lanes = WarpBallot(is_open);
    uint32_t place = 0;
    if (cta.lane == 0) place = atomicAdd(&cta.header->num_own, __popc(lanes));
    place = WarpBroadcast(place, 0) + __popc(lanes & LowBits(cta.lane));
    if (is_open) own[place] = key;
  });
}

// Where the lists stand when they are put one behind the other, warp by warp.
struct ListOrder {
  uint32_t first_chunk;  // of the list of the warp whose number is the lane's
  uint32_t num_chunks;
};

// In: the warps' numbers of chunks in the header, ordered by a barrier. By whole warps.
__device__ __forceinline__ ListOrder OrderLists(const Cta& cta) {
  const uint32_t own = cta.lane < kWarps ? cta.header->warp_chunks[cta.lane] : 0;
  const uint32_t inclusive = WarpInclusiveSum(cta.lane, own);
  return ListOrder{inclusive - own, WarpBroadcast(inclusive, 31)};
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_STREAM_PART_CUH_
