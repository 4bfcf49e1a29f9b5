// Step 2 for a part that no tile holds: it is streamed once, and what may be selected is kept.
//
// Each warp streams a stretch of the part by itself, through its own ring of tiles in area A, so
// that no barrier of the CTA stands between two tiles. Elements at or above the bracket go to the
// warp's list, keys and positions, in ascending position. The lists share area B in chunks of 32
// entries, taken from a common counter, so that any distribution of the elements over the warps
// fits. Once all lists are complete, they are put in order, and their entries are dealt to the
// threads, a few consecutive ones each (Dealing). Counts are exact whatever happens to the memory
// that keeps the elements; what does not fit is counted but not stored, and the caller gives up
// the bracket then.
//
// The ties of a bracket that is a single key are counted and not kept: a plateau of equal values
// could fill any memory. Those that are selected, the lowest positions, are read again when the
// output is written.
//
// Order without sorting: lane l owns consecutive vectors of a tile, so the counts of the lanes
// before it give every kept element its place. A single comparison per element decides what is
// kept; where it stands against the bracket's upper end is asked of kept elements alone.
//
// A warp's tile takes as long as its instructions wait for one another: three warps to a scheduler
// do not fill the gaps. So steps whose parts are independent are preferred to shorter ones: ballots
// to shuffles, two elements at a time, predicates to branches.

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
  uint16_t* order;   // of all lists' groups, one behind the other: first entry | entries - 1
  uint32_t num_chunks;
};

__device__ __forceinline__ ListPool MakeListPool(const Cta& cta, const SmemLayout& layout) {
  const uint32_t num_chunks = static_cast<uint32_t>(layout.num_chunks);
  uint32_t* keys = reinterpret_cast<uint32_t*>(cta.list);
  uint32_t* positions = keys + num_chunks * kChunkEntries;
  uint32_t* labels = positions + num_chunks * kChunkEntries;
  return ListPool{keys, positions, labels, reinterpret_cast<uint16_t*>(labels + num_chunks),
                  num_chunks};
}

// What one warp found in its stretch; but for num_open the same in all lanes.
struct WarpPart {
  Part part;
  uint32_t num_kept;
  uint32_t num_open;    // met by this lane: among kept elements, or ties that are not kept
  uint32_t num_listed;  // all that is kept, or what came before something that did not fit
  uint32_t num_chunks;  // taken for its list
  uint32_t room;        // entries left in them
  uint32_t shift;       // the pool's next entry is num_listed + shift
  bool is_full;         // something did not fit
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
    } else if (count >= kWarpTile<T>) {
#pragma unroll
      for (int v = 0; v < T::kMaxVectors; ++v) {
        CopyAsync16(to + 32 * v * kVectorBytes, from + 32 * v * kVectorBytes);
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

// Starts the first tiles of a warp's stretch, which FilterPlainStream or FilterAnyStream filters.
template <typename T>
__device__ __forceinline__ void StartStream(const Cta& cta, const RowWindow& window,
                                            const Part& part, int num_stages) {
#pragma unroll 1
  for (int i = 0; i < num_stages; ++i) {
    StartTile<T>(cta, window, part.first + i * kWarpTile<T>, part.last, i);
  }
}

// Makes room for `beyond` entries behind those that the warp's list has room for. Returns the first
// chunk of theirs. By the whole warp.
__device__ __forceinline__ uint32_t TakeChunks(const Cta& cta, const ListPool& pool,
                                               uint32_t beyond, WarpPart* warp) {
  const uint32_t needs = max((beyond + kChunkEntries - 1) / kChunkEntries, uint32_t{kLeastChunks});
  uint32_t taken = 0;
  if (cta.lane == 0) taken = FetchAndAdd(&cta.header->num_chunks, needs);
  taken = WarpBroadcast(taken, 0);
  if (taken + needs > pool.num_chunks) {
    warp->is_full = true;
    return 0;
  }
  const uint32_t turn = static_cast<uint32_t>(cta.lane);
  if (turn < needs) {
    pool.labels[taken + turn] = static_cast<uint32_t>(cta.warp) | (warp->num_chunks + turn) << 8;
  }
  warp->num_chunks += needs;
  warp->room += needs * kChunkEntries;
  return taken;
}

// How elements are compared with the bracket's lower end; see SignedTest. Plainly if the largest
// are wanted and the end is positive: then so is all that is kept. The ties of a plateau are not
// kept.
enum class Comparison { kPlain, kPlainPlateau, kGeneral };

// A warp's tile of which more elements than this are kept is taken by vectors, not by elements.
constexpr uint32_t kDenseTile = 160;

// Sums over a warp's lanes, of counts below 32: by a ballot for each bit; these do not wait for one
// another as shuffles do.
__device__ __forceinline__ Scan ScanRuns(int lane, uint32_t count) {
  const uint32_t ones = WarpBallot(count & 1), twos = WarpBallot(count & 2);
  const uint32_t fours = WarpBallot(count & 4), more = WarpBallot(count >= 8);
  Scan scan;
  scan.before =
      LanesBefore(lane, ones) + 2 * LanesBefore(lane, twos) + 4 * LanesBefore(lane, fours);
  scan.total = __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
  if (more != 0) {
    const uint32_t eights = WarpBallot(count & 8), sixteens = WarpBallot(count & 16);
    scan.before += 8 * LanesBefore(lane, eights) + 16 * LanesBefore(lane, sixteens);
    scan.total += 8 * __popc(eights) + 16 * __popc(sixteens);
  }
  return scan;
}

// Appends the elements of the lanes' runs that `kept` names to the warp's list, and counts those
// whose key is at most `highest_open`.
template <typename T, Comparison kComparison>
__device__ __forceinline__ void AppendRuns(const Cta& cta, const ListPool& pool, const Run& run,
                                           uint32_t kept, uint32_t highest_open, uint32_t flip,
                                           WarpPart* warp) {
  const uint32_t count = __popc(kept);
  const Scan scan = ScanRuns(cta.lane, count);
  const uint32_t total = scan.total;
  if (total == 0) return;
  warp->num_kept += total;
  if (warp->is_full) return;
  // The pool's entries lie where the list's places say, shifted by one number up to the end of the
  // chunks so far, and by another one behind it. Unsigned: a shift may be negative.
  const uint32_t old_shift = warp->shift;
  const uint32_t old_end = warp->num_listed + warp->room;
  uint32_t new_shift = old_shift;
  if (total > warp->room) {
    const uint32_t taken = TakeChunks(cta, pool, total - warp->room, warp);
    if (warp->is_full) return;
    new_shift = taken * kChunkEntries - old_end;
  }
  warp->shift = new_shift;
  warp->room -= total;
  uint32_t place = warp->num_listed + scan.before;
  warp->num_listed += total;
  const auto key_of = [&](uint32_t bits) {
    return kComparison == Comparison::kGeneral ? T::Key(bits, flip) : bits | T::kSign;
  };
  const auto entry_of = [&](uint32_t at) { return at + (at < old_end ? old_shift : new_shift); };
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
  if (kept == 0) return;
  // Chunks are taken in ascending order: only a lane that begins in the old ones meets their end.
  PairCursor cursor(pool.keys + entry_of(place), pool.num_chunks * kChunkEntries,
                    pool.keys + (old_end + old_shift), new_shift - old_shift);
  const auto* elements = reinterpret_cast<const unsigned char*>(run.vectors);
#pragma unroll 1
  while (kept != 0) {
    const BitPair pair = TakeBits(&kept);
    int number[2];
    uint32_t bits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      number[i] = max(31 - __clz(static_cast<int>(pair.bits[i])), 0);
      bits[i] = LoadSharedElement<T::kBytes>(elements + number[i] * T::kBytes);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cursor.AppendIf(pair.bits[i], key_of(bits[i]),
                      static_cast<uint32_t>(run.position + number[i]), highest_open);
    }
  }
  warp->num_open += cursor.num_low;
}

// Whether all elements of a tile lie in the window and in the stretch, which ends at `last`.
template <typename T>
__device__ __forceinline__ bool IsWhole(const RowWindow& window, int32_t first, int32_t last) {
  const int32_t end = first + kWarpTile<T>;
  return (first > 0 || window.skew == 0) && end <= last && end < window.num_vectors;
}

// So few vectors of a lane are taken by a loop.
constexpr int32_t kFewVectors = 3;

// Appends what is kept of one tile, whose first vector is `first`, to the warp's list.
template <typename T, Comparison kComparison>
__device__ __forceinline__ void FilterWarpTile(const Cta& cta, const RowWindow& window,
                                               const ListPool& pool, const unsigned char* tile,
                                               int32_t first, const Bracket& bracket, uint32_t flip,
                                               WarpPart* warp) {
  constexpr bool kHasMask = kComparison == Comparison::kGeneral;
  const SignedTest<T> test(bracket.lowest, flip);
  Run run;
  int32_t each = T::kMaxVectors;
  if (IsWhole<T>(window, first, warp->part.last)) {
    run = MakeWholeRun<T>(cta.lane, window, first, tile);
  } else {
    // The few vectors at the end of a stretch are dealt to all lanes, an odd number each.
    const int32_t left = warp->part.last - first;
    if (left <= 32 * kFewVectors) each = (left + 31) / 32 | 1;
    run = MakeRun<T>(cta.lane, window, first, warp->part.last, each, /*is_spaced=*/false, tile);
  }
  uint32_t kept = each == T::kMaxVectors ? test.template AtLeast<kHasMask>(run)
                                         : test.template AtLeast<kHasMask>(run, each);
  if (kComparison == Comparison::kPlainPlateau ||
      (kComparison == Comparison::kGeneral && bracket.IsSingleKey())) {
    const uint32_t ties =
        EqualTo<T, kComparison == Comparison::kPlainPlateau>(run, T::Bits(bracket.lowest, flip));
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

// How entries are dealt to threads: in groups of consecutive ones, of which a thread has as many in
// each round over the lists. A CTA of several has one round in all mostly, of one group of eight. A
// CTA that has the row to itself keeps more: two groups of four, or three if that saves a round.
template <bool kHasClusters>
struct Dealing {
  static constexpr uint32_t kEntries = kHasClusters ? 8 : 4;  // of a group
  static constexpr uint32_t kPerChunk = kChunkEntries / kEntries;
  static constexpr uint32_t kMostGroups = kHasClusters ? 1 : 3;
  static constexpr uint32_t kMostEntries = kMostGroups * kEntries;
  static_assert(kEntries >= kFewestEntries, "the order has room");

  uint32_t num_groups;
  bool has_third;

  // In: the groups' order, ordered by a barrier.
  __device__ __forceinline__ explicit Dealing(const Cta& cta)
      : num_groups(cta.header->num_groups), has_third(!kHasClusters && num_groups > 2 * kThreads) {}
  __device__ __forceinline__ uint32_t Each() const { return kHasClusters ? 1 : has_third ? 3 : 2; }
  __device__ __forceinline__ uint32_t GroupsPerRound() const { return Each() * kThreads; }
  // Visits the numbers of a thread's groups.
  template <typename Visit>
  __device__ __forceinline__ void ForGroups(Visit visit) const {
    visit(0u);
    if (kHasClusters) return;
    visit(1u);
    if (has_third) visit(2u);
  }
};

// Puts the lists' groups in order: none if something did not fit, since no chunk may then be
// labelled. In: complete lists and the header's warp_listed, ordered by a barrier. Ends without
// one.
template <typename Deal>
__device__ __forceinline__ void OrderGroups(const Cta& cta, const ListPool& pool) {
  const uint32_t listed = cta.lane < kWarps ? cta.header->warp_listed[cta.lane] : 0;
  const uint32_t own_groups = (listed + Deal::kEntries - 1) / Deal::kEntries;
  const uint32_t inclusive = WarpInclusiveSum(cta.lane, own_groups);
  const uint32_t taken = cta.header->num_chunks;
  const uint32_t num_taken = taken <= pool.num_chunks ? taken * Deal::kPerChunk : 0;
  if (cta.thread == 31) cta.header->num_groups = num_taken == 0 ? 0 : inclusive;
#pragma unroll 1
  for (uint32_t first = 32 * cta.warp; first < num_taken; first += kThreads) {
    const uint32_t group = first + static_cast<uint32_t>(cta.lane);
    const bool is_taken = group < num_taken;
    const uint32_t label = is_taken ? pool.labels[group / Deal::kPerChunk] : 0;
    const int warp = static_cast<int>(label & 0xffu);
    const uint32_t turn = (label >> 8) * Deal::kPerChunk + group % Deal::kPerChunk;
    const uint32_t before_list = WarpBroadcast(inclusive - own_groups, warp);
    const uint32_t of_list = WarpBroadcast(listed, warp);
    const uint32_t before = turn * Deal::kEntries;
    if (is_taken && before < of_list) {
      const uint32_t here = min(of_list - before, Deal::kEntries);
      pool.order[before_list + turn] = static_cast<uint16_t>(group * Deal::kEntries | (here - 1));
    }
  }
}

// A thread's entries in one round.
template <typename Deal>
struct Entries {
  const Deal& deal;
  uint32_t valid;
  uint32_t first[Deal::kMostGroups];  // entry of each group, in the pool
  uint32_t keys[Deal::kMostEntries];

  __device__ __forceinline__ Entries(const Cta& cta, const ListPool& pool, const Deal& dealing,
                                     uint32_t first_group)
      : deal(dealing), valid(0), first{}, keys{} {
    const uint32_t own = first_group + static_cast<uint32_t>(UseHere(cta.thread)) * deal.Each();
    if (own >= deal.num_groups) return;
    deal.ForGroups([&](uint32_t group) {
      const uint32_t turn = own + group;
      const uint32_t place = pool.order[min(turn, deal.num_groups - 1)];
      first[group] = place / Deal::kEntries * Deal::kEntries;
      const uint32_t count = turn < deal.num_groups ? place % Deal::kEntries + 1 : 0;
      valid |= ((1u << count) - 1) << group * Deal::kEntries;
      Load(pool.keys, group, keys);
    });
  }
  // A group's words of as many as there are entries.
  __device__ __forceinline__ void Load(const uint32_t* from, uint32_t group,
                                       uint32_t (&to)[Deal::kMostEntries]) const {
    const auto* vectors = reinterpret_cast<const uint4*>(from + first[group]);
#pragma unroll
    for (uint32_t i = 0; i < Deal::kEntries; i += 4) {
      const uint4 vector = LoadShared(vectors + i / 4);
      uint32_t* words = to + (group * Deal::kEntries + i);
      words[0] = vector.x;
      words[1] = vector.y;
      words[2] = vector.z;
      words[3] = vector.w;
    }
  }
  // Visits the numbers of the thread's entries.
  template <typename Visit>
  __device__ __forceinline__ void ForEach(Visit visit) const {
    deal.ForGroups([&](uint32_t group) {
#pragma unroll
      for (uint32_t i = 0; i < Deal::kEntries; ++i) visit(group * Deal::kEntries + i);
    });
  }
  // Those for which test(key), as bits.
  template <typename Test>
  __device__ __forceinline__ uint32_t Where(Test test) const {
    uint32_t bits = 0;
    ForEach([&](uint32_t i) { bits |= test(keys[i]) ? 1u << i : 0; });
    return bits & valid;
  }
};

// Copies the open keys of all lists to cta.own, in any order. In: the groups' order, ordered by a
// barrier; the header's num_own is zero. Ends without a barrier.
template <typename Deal>
__device__ __forceinline__ void CopyOpenKeys(const Cta& cta, const ListPool& pool,
                                             uint32_t highest_open) {
  int32_t* own = reinterpret_cast<int32_t*>(cta.own);
  const Deal deal(cta);
#pragma unroll 1
  for (uint32_t turn = 0; turn < deal.num_groups; turn += deal.GroupsPerRound()) {
    const Entries<Deal> entries(cta, pool, deal, turn);
    const uint32_t open = entries.Where([&](uint32_t key) { return key <= highest_open; });
    const uint32_t count = __popc(open);
    const uint32_t inclusive = WarpInclusiveSum(cta.lane, count);
    uint32_t place = 0;
    if (cta.lane == 31) place = FetchAndAdd(&cta.header->num_own, inclusive);
    SharedCursor cursor(own + WarpBroadcast(place, 31) + inclusive - count);
    entries.ForEach([&](uint32_t i) {
      cursor.AppendIf(open & 1u << i, static_cast<int32_t>(entries.keys[i]));
    });
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_STREAM_PART_CUH_
