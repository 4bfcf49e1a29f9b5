// Step 2 for a part that no tile holds: it is streamed once, and what may be selected is kept.
//
// Each warp streams a stretch of the part by itself, through its own ring of tiles in area A, so
// that no barrier of the CTA stands between two tiles. Elements at or above the bracket go to the
// warp's list, keys and positions, in ascending position. The lists share area B in chunks of 32
// entries, taken from a common counter, so that any distribution of the elements over the warps
// fits. Once all lists are complete, their chunks are put in order, and the entries are dealt to
// the threads, a few consecutive ones each. Counts are exact whatever happens to the memory that
// keeps the elements; what does not fit is counted but not stored, and the caller gives up the
// bracket then.
//
// The ties of a bracket that is a single key are counted and not kept: a plateau of equal values
// could fill any memory. Those that are selected, the lowest positions, are read again when the
// output is written.
//
// Order without sorting: lane l owns consecutive vectors of a tile, so one scan of the lanes'
// counts gives every kept element its place. A single comparison per element decides what is kept;
// where it stands against the bracket's upper end is asked of kept elements alone.

#ifndef JAX_TOPK_CUDA_STREAM_PART_CUH_
#define JAX_TOPK_CUDA_STREAM_PART_CUH_

#include <cstdint>

#include "block.cuh"
#include "filter_part.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

// The lists of all warps of a CTA, in chunks of kChunkEntries.
struct ListPool {
  uint32_t* keys;
  uint32_t* positions;
  uint32_t* labels;  // of each chunk: the warp, and << 8 how many chunks of the warp come before
  uint32_t* order;   // of all lists, one behind the other: the chunk, and << 16 its entries
  uint32_t num_chunks;
};

__device__ __forceinline__ ListPool MakeListPool(const Cta& cta, const SmemLayout& layout) {
  const uint32_t num_chunks = static_cast<uint32_t>(layout.num_chunks);
  uint32_t* keys = reinterpret_cast<uint32_t*>(cta.list);
  uint32_t* positions = keys + num_chunks * kChunkEntries;
  uint32_t* labels = positions + num_chunks * kChunkEntries;
  return ListPool{keys, positions, labels, labels + num_chunks, num_chunks};
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

// Starts copying the tile that begins at vector `first` of a warp's stretch, which ends at `last`;
// also commits, so that every tile is one group, even one that does not exist.
template <typename T>
__device__ __forceinline__ void StartTile(const Cta& cta, const RowWindow& window, int32_t first,
                                          int32_t last, int slot) {
  const int32_t count = last - first;  // it may exceed a tile
  if (count > 0) {
    const unsigned char* from = window.vectors + int64_t{first + cta.lane} * kVectorBytes;
    unsigned char* to = WarpTile<T>(cta, slot) + cta.lane * kVectorBytes;
    if (Unlikely(window.leaves_operand)) {
      CopyAtEdge<T>(window, first + cta.lane, first + min(count, kWarpTile<T>), 32, to, 32);
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

// Starts the first tiles of a warp's stretch, which FilterPlainStream or FilterAnyStream filters.
template <typename T>
__device__ __forceinline__ void StartStream(const Cta& cta, const RowWindow& window,
                                            const Part& part, int num_stages) {
#pragma unroll 1
  for (int i = 0; i < num_stages; ++i) {
    StartTile<T>(cta, window, part.first + i * kWarpTile<T>, part.last, i);
  }
}

// Makes room for `count` more entries of the warp's list. Returns the chunk of the first entry that
// does not go to the last chunk so far. By the whole warp; `warp` still describes the list before.
__device__ __forceinline__ uint32_t TakeChunks(const Cta& cta, const ListPool& pool, uint32_t count,
                                               WarpPart* warp) {
  const uint32_t had = warp->NumChunks();
  const uint32_t needs = (warp->num_listed + count + kChunkEntries - 1) / kChunkEntries - had;
  if (needs == 0) return 0;
  uint32_t taken = 0;
  if (cta.lane == 0) taken = FetchAndAdd(&cta.header->num_chunks, needs);
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

// How elements are compared with the bracket's lower end; see SignedTest. Plainly if the largest
// are wanted and the end is positive: then so is all that is kept. The ties of a plateau are not
// kept.
enum class Comparison { kPlain, kPlainPlateau, kGeneral };

// A warp's tile of which more elements than this are kept is taken by vectors, not by elements.
constexpr uint32_t kDenseTile = 160;

// Appends the elements of the lanes' runs that `kept` names to the warp's list, and counts those
// whose key is at most `highest_open`.
template <typename T, Comparison kComparison>
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
  // An entry's place in the list tells its place in the pool, by one shift for the last chunk so
  // far and one for those taken, which are neighbours. Unsigned: a shift may be negative.
  const uint32_t old_shift = (warp->last_chunk + 1 - had) * kChunkEntries;
  const uint32_t new_shift = (taken - had) * kChunkEntries;
  uint32_t place = warp->num_listed + inclusive - count;
  const auto key_of = [&](uint32_t bits) {
    return kComparison == Comparison::kGeneral ? T::Key(bits, flip) : bits | T::kSign;
  };
  const auto entry_of = [&](uint32_t at) {
    return at + (at < had * kChunkEntries ? old_shift : new_shift);
  };
  if (Unlikely(total > kDenseTile)) {
    const uint4* from = run.vectors;
    uint32_t position = static_cast<uint32_t>(run.position);
#pragma unroll 1
    for (; kept != 0; kept >>= T::kPerVector) {
      const uint4 vector = LoadShared(from++);
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) {
        const uint32_t is_kept = kept >> i & 1;
        const uint32_t key = key_of(T::Element(vector, i));
        const uint32_t entry = entry_of(place);
        StoreIf(is_kept, pool.keys + entry, key);
        StoreIf(is_kept, pool.positions + entry, position + i);
        warp->num_open += key <= highest_open ? is_kept : 0;
        place += is_kept;
      }
      position += T::kPerVector;
    }
  }
#pragma unroll 1
  for (; kept != 0; kept &= kept - 1) {
    const int32_t i = __ffs(kept) - 1;
    const uint32_t key = key_of(BitsInRun<T>(run, i));
    if (key <= highest_open) ++warp->num_open;
    const uint32_t entry = entry_of(place);
    pool.keys[entry] = key;
    pool.positions[entry] = static_cast<uint32_t>(run.position + i);
    ++place;
  }
  warp->num_listed += total;
  const uint32_t has = warp->NumChunks();
  if (has > had) warp->last_chunk = taken + (has - had) - 1;
}

// Appends what is kept of one tile, whose first vector is `first`, to the warp's list.
template <typename T, Comparison kComparison>
__device__ __forceinline__ void FilterWarpTile(const Cta& cta, const RowWindow& window,
                                               const ListPool& pool, const unsigned char* tile,
                                               int32_t first, const Bracket& bracket, uint32_t flip,
                                               WarpPart* warp) {
  const Run run = MakeRun<T>(cta.lane, window, first, warp->part.last, T::kMaxVectors,
                             /*is_spaced=*/false, tile);
  const SignedTest<T> test(bracket.lowest, flip);
  uint32_t kept = test.template AtLeast<kComparison == Comparison::kGeneral>(run);
  if (kComparison == Comparison::kPlainPlateau ||
      (kComparison == Comparison::kGeneral && bracket.IsSingleKey())) {
    const uint32_t ties = EqualTo<T>(run, T::Bits(bracket.lowest, flip));
    warp->num_open += __popc(ties);
    kept &= ~ties;
  }
  AppendRuns<T, kComparison>(cta, pool, run, kept, bracket.highest, flip, warp);
}

// The counts of a warp's finished stretch. Where something did not fit, all that is kept counts as
// open: no more is known, and the bracket is given up.
__device__ __forceinline__ PartCounts CountStretch(const WarpPart& warp, const Bracket& bracket) {
  const uint32_t open = WarpSum(warp.num_open);
  if (bracket.IsSingleKey()) return PartCounts{warp.num_kept, open};
  return warp.is_full ? PartCounts{0, warp.num_kept} : PartCounts{warp.num_kept - open, open};
}

// As FilterPlainStream. A loop for each comparison: one that jumps over code that it does not need
// waits for instructions.
template <typename T, Comparison kComparison>
__device__ __forceinline__ void FilterStreamBy(const Cta& cta, const RowWindow& window,
                                               const ListPool& pool, int num_stages,
                                               const Bracket& bracket, uint32_t flip,
                                               WarpPart* warp) {
  int slot = 0;
#pragma unroll 1
  for (int32_t first = warp->part.first; first < warp->part.last; first += kWarpTile<T>) {
    if (num_stages == 1) {
      CopyAsyncWait<0>();
    } else {
      CopyAsyncWait<1>();
    }
    SyncWarp();  // this tile's copies before its reads
    FilterWarpTile<T, kComparison>(cta, window, pool, WarpTile<T>(cta, slot), first, bracket, flip,
                                   warp);
    SyncWarp();  // the tile's reads before its refill; the list before its reads
    StartTile<T>(cta, window, first + num_stages * kWarpTile<T>, warp->part.last, slot);
    slot = slot + 1 == num_stages ? 0 : slot + 1;
  }
}

// Whether a stream is filtered by plain comparisons.
template <typename T>
__device__ __forceinline__ bool IsPlain(const Bracket& bracket, uint32_t flip) {
  return !bracket.IsSingleKey() && SignedTest<T>(bracket.lowest, flip).mask == 0;
}

// Filters a warp's stretch whose first tiles StartStream has started, where IsPlain. In: the
// header's num_chunks is zero. Ends without a barrier.
template <typename T>
__device__ __forceinline__ void FilterPlainStream(const Cta& cta, const RowWindow& window,
                                                  const ListPool& pool, int num_stages,
                                                  const Bracket& bracket, uint32_t flip,
                                                  WarpPart* warp) {
  FilterStreamBy<T, Comparison::kPlain>(cta, window, pool, num_stages, bracket, flip, warp);
  CopyAsyncWait<0>();
}

// The same for any bracket.
template <typename T>
__device__ __forceinline__ void FilterAnyStream(const Cta& cta, const RowWindow& window,
                                                const ListPool& pool, int num_stages,
                                                const Bracket& bracket, uint32_t flip,
                                                WarpPart* warp) {
  if (bracket.IsSingleKey() && SignedTest<T>(bracket.lowest, flip).mask == 0) {
    FilterStreamBy<T, Comparison::kPlainPlateau>(cta, window, pool, num_stages, bracket, flip,
                                                 warp);
  } else {
    FilterStreamBy<T, Comparison::kGeneral>(cta, window, pool, num_stages, bracket, flip, warp);
  }
  CopyAsyncWait<0>();
}

// The counts of all warps' stretches. One barrier.
__device__ __forceinline__ PartCounts SumOverWarps(const Cta& cta, const PartCounts& of_warp) {
  if (cta.lane == 0) cta.header->warp_counts[cta.warp] = of_warp;
  SyncThreads();  // the warps' counts before their reads
  const PartCounts counts = cta.lane < kWarps ? cta.header->warp_counts[cta.lane] : PartCounts{};
  return PartCounts{WarpSum(counts.certain), WarpSum(counts.open)};
}

// Of all lists: none if something did not fit, since no chunk may then be labelled.
__device__ __forceinline__ uint32_t NumChunksTaken(const Cta& cta, const ListPool& pool) {
  const uint32_t taken = cta.header->num_chunks;
  return taken <= pool.num_chunks ? taken : 0;
}

// Puts the chunks in order. In: complete lists and the header's warp_listed, ordered by a barrier.
// Ends without one.
__device__ __forceinline__ void OrderChunks(const Cta& cta, const ListPool& pool) {
  const uint32_t listed = cta.lane < kWarps ? cta.header->warp_listed[cta.lane] : 0;
  const uint32_t own_chunks = (listed + kChunkEntries - 1) / kChunkEntries;
  const uint32_t first_of_list = WarpInclusiveSum(cta.lane, own_chunks) - own_chunks;
  const uint32_t num_taken = NumChunksTaken(cta, pool);
#pragma unroll 1
  for (uint32_t first = 32 * cta.warp; first < num_taken; first += kThreads) {
    const uint32_t chunk = first + static_cast<uint32_t>(cta.lane);
    const uint32_t label = chunk < num_taken ? pool.labels[chunk] : 0;
    const int warp = static_cast<int>(label & 0xffu);
    const uint32_t turn = label >> 8;
    const uint32_t place = WarpBroadcast(first_of_list, warp) + turn;
    const uint32_t rest = WarpBroadcast(listed, warp) - turn * kChunkEntries;
    if (chunk < num_taken) {
      pool.order[place] = chunk | min(rest, uint32_t{kChunkEntries}) << 16;
    }
  }
}

// A thread's entries in one round over the lists: consecutive ones, or none.
constexpr uint32_t kEntriesPerThread = 8;
constexpr uint32_t kThreadsPerChunk = kChunkEntries / kEntriesPerThread;
constexpr uint32_t kChunksPerRound = kThreads / kThreadsPerChunk;

struct Entries {
  uint32_t first;  // in the pool
  uint32_t valid;
  uint32_t keys[kEntriesPerThread];

  // In: `pool.order`, ordered by a barrier.
  __device__ __forceinline__ Entries(const Cta& cta, const ListPool& pool, uint32_t first_chunk)
      : first(0), valid(0), keys{} {
    const uint32_t thread = static_cast<uint32_t>(UseHere(cta.thread));
    const uint32_t turn = first_chunk + thread / kThreadsPerChunk;
    if (turn >= NumChunksTaken(cta, pool)) return;
    const uint32_t chunk = pool.order[turn];
    const uint32_t offset = thread % kThreadsPerChunk * kEntriesPerThread;
    first = (chunk & 0xffffu) * kChunkEntries + offset;
    valid = LowBits(static_cast<int32_t>(chunk >> 16)) >> offset & LowBits(kEntriesPerThread);
    LoadWords(pool.keys + first, keys);
  }
  // Those for which test(key), as bits.
  template <typename Test>
  __device__ __forceinline__ uint32_t Where(Test test) const {
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t i = 0; i < kEntriesPerThread; ++i) bits |= test(keys[i]) ? 1u << i : 0;
    return bits & valid;
  }
};

// Copies the open keys of all lists to cta.own, in any order. In: chunks in order, ordered by a
// barrier; the header's num_own is zero. Ends without a barrier.
__device__ __forceinline__ void CopyOpenKeys(const Cta& cta, const ListPool& pool,
                                             uint32_t highest_open) {
  int32_t* own = reinterpret_cast<int32_t*>(cta.own);
#pragma unroll 1
  for (uint32_t turn = 0; turn < NumChunksTaken(cta, pool); turn += kChunksPerRound) {
    const Entries entries(cta, pool, turn);
    const uint32_t open = entries.Where([&](uint32_t key) { return key <= highest_open; });
    const uint32_t count = __popc(open);
    const uint32_t inclusive = WarpInclusiveSum(cta.lane, count);
    uint32_t place = 0;
    if (cta.lane == 31) place = FetchAndAdd(&cta.header->num_own, inclusive);
    place = WarpBroadcast(place, 31) + inclusive - count;
    SharedCursor cursor(own + place);
#pragma unroll
    for (uint32_t i = 0; i < kEntriesPerThread; ++i) {
      cursor.AppendIf(open & 1u << i, static_cast<int32_t>(entries.keys[i]));
    }
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_STREAM_PART_CUH_
