// Rows that one CTA's tile holds.
//
// The row is read once, into shared memory, for the few elements that are looked at by number, and
// from there into registers, for the passes over all of them. Each warp owns a stretch of the row
// and its lanes take the vectors of the stretch in turns, so that loads are coalesced, and a thread
// waits for its own copies alone. All elements are counted, so the bracket and its counts are exact
// and nothing has to be verified.
//
// Order without sorting: in a warp's stretch, elements ascend by turn, then lane, then number in
// their vector. What a warp selects in one turn fits a field of a word, so that one scan of the
// lanes places several turns, and warps need only each other's totals.

#ifndef JAX_TOPK_CUDA_SHORT_ROW_CUH_
#define JAX_TOPK_CUDA_SHORT_ROW_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "args.h"
#include "block.cuh"
#include "estimate_bracket.cuh"
#include "filter_part.cuh"
#include "find_pivot.cuh"
#include "row_window.cuh"
#include "stream_part.cuh"
#include "write_row.cuh"

namespace jax_topk {

// The row, and a thread's elements of it: number i is element i % kPerVector of turn
// i / kPerVector.
template <typename T>
struct ShortTile {
  static constexpr int kTurns = T::kMaxVectors;
  static constexpr int kStep = 32 * T::kPerVector;  // elements of a warp's turn
  static_assert(kTurns * T::kPerVector <= 32, "one bit per element");

  uint4* slots;       // in shared memory: the lane's vector of turn 0; a turn is 32 vectors
  int32_t num_turns;  // the same for all threads
  int32_t position;   // of element 0, within the window; negative before its start
  uint32_t valid;     // bit i: element i lies in the window
  uint32_t flip;
  uint4 vectors[kTurns];

  // Starts the copies; nothing waits for them here.
  __device__ __forceinline__ ShortTile(const Cta& cta, const RowWindow& window, uint32_t sign_flip)
      : num_turns((window.num_vectors + kThreads - 1) / kThreads), flip(sign_flip) {
    const int32_t first = 32 * num_turns * cta.warp + cta.lane;
    slots = reinterpret_cast<uint4*>(cta.tiles) + first;
    const int32_t own_turns = max(min(num_turns, (window.num_vectors - first + 31) >> 5), 0);
    if (Unlikely(window.leaves_operand)) {
#pragma unroll 1
      for (int turn = 0; turn < own_turns; ++turn) {
        slots[32 * turn] = LoadVectorAtEdge<T>(window, first + 32 * turn);
      }
    } else {
      const unsigned char* from = window.vectors + int64_t{first} * kVectorBytes;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        if (turn < own_turns) CopyAsync16(slots + 32 * turn, from + 32 * kVectorBytes * turn);
      }
    }
    CopyAsyncCommit();
    position = first * T::kPerVector - window.skew;
    valid = LowBits(own_turns * T::kPerVector);
    // The window's first vector may begin before it, and its last one end behind it.
    if (first == 0) valid &= ~LowBits(window.skew);
    const int32_t tail = (window.length + window.skew) % T::kPerVector;
    if (tail != 0 && own_turns > 0 && first + 32 * (own_turns - 1) == window.num_vectors - 1) {
      valid &= LowBits((own_turns - 1) * T::kPerVector + tail);
    }
  }

  // Waits for the thread's own copies, and takes them into registers.
  __device__ __forceinline__ void Load() {
    CopyAsyncWait<0>();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn < num_turns) vectors[turn] = LoadShared(slots + 32 * turn);
    }
  }

  // Calls visit(vector, valid) for every vector, those that do not count included.
  template <typename Visit>
  __device__ __forceinline__ void VisitAll(Visit visit) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn < num_turns) visit(vectors[turn], valid >> (turn * T::kPerVector));
    }
  }
  // The same from shared memory, in a loop: for code that is rarely needed, and should be small.
  template <typename Visit>
  __device__ __forceinline__ void VisitAgain(Visit visit) const {
#pragma unroll 1
    for (int turn = 0; turn < num_turns; ++turn) {
      visit(LoadShared(slots + 32 * turn), valid >> (turn * T::kPerVector));
    }
  }

  __device__ __forceinline__ int32_t Position(int i) const {
    return position + i / T::kPerVector * kStep + i % T::kPerVector;
  }
  __device__ __forceinline__ uint32_t Key(int i) const {
    const uint4* vector = slots + i / T::kPerVector * 32;
    if constexpr (T::kBytes == 4) {
      return T::Key(reinterpret_cast<const uint32_t*>(vector)[i % T::kPerVector], flip);
    } else {
      return T::Key(reinterpret_cast<const uint16_t*>(vector)[i % T::kPerVector], flip);
    }
  }

  // Where the elements stand against a bracket.
  __device__ __forceinline__ RunMasks MasksOf(const Bracket& bracket) const {
    MaskBuilder<T> builder(bracket, flip);
    if (builder.HasOneMask()) {
#pragma unroll
      for (int turn = kTurns - 1; turn >= 0; --turn) {
        if (turn < num_turns) builder.template Prepend<true>(vectors[turn]);
      }
    } else {
#pragma unroll
      for (int turn = kTurns - 1; turn >= 0; --turn) {
        if (turn < num_turns) builder.template Prepend<false>(vectors[turn]);
      }
    }
    return builder.Masks(valid);
  }

  // Writes the thread's open keys, of `num_open` in all, to cta.own, behind those of other warps,
  // in any order, and pads them. In: the header's num_own is zero. Ends without a barrier.
  __device__ __forceinline__ void CollectOpenKeys(const Cta& cta, uint32_t open,
                                                  uint32_t num_open) const {
    PadOpenKeys(cta, num_open);
    const uint32_t count = __popc(open);
    const uint32_t inclusive = WarpInclusiveSum(cta.lane, count);
    uint32_t first = 0;
    if (cta.lane == 31 && inclusive != 0) first = atomicAdd(&cta.header->num_own, inclusive);
    uint32_t* place =
        reinterpret_cast<uint32_t*>(cta.own) + WarpBroadcast(first, 31) + (inclusive - count);
#pragma unroll 1
    for (; open != 0; open &= open - 1) *place++ = Key(__ffs(open) - 1);
  }
};

// A thread's bits, counted by turn: even turns in one word, odd ones in the other, in fields that
// hold the sum over a warp.
template <typename T>
struct TurnCounts {
  static constexpr int kFieldBits = 2 * T::kPerVector;
  static_assert(32 * T::kPerVector < 1 << kFieldBits, "a field holds all of a warp's turn");
  uint32_t even, odd;

  __device__ __forceinline__ explicit TurnCounts(uint32_t bits) {
    uint32_t x = bits - (bits >> 1 & 0x55555555u);
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);  // the sums of four bits
    if constexpr (T::kPerVector == 4) {
      even = x & 0x0f0f0f0fu;
      odd = x >> 4 & 0x0f0f0f0fu;
    } else {
      x = (x + (x >> 4)) & 0x0f0f0f0fu;
      even = x & 0x00ff00ffu;
      odd = x >> 8 & 0x00ff00ffu;
    }
  }
  __device__ __forceinline__ uint32_t Of(int turn) const {
    return (turn % 2 == 0 ? even : odd) >> (turn / 2 * kFieldBits) & LowBits(kFieldBits);
  }
};

// Of some bits of a warp's lanes: how many come before each turn of a lane.
template <typename T>
struct TurnPlaces {
  TurnCounts<T> before;  // the lane, in the same turn
  TurnCounts<T> total;   // of a turn

  __device__ __forceinline__ TurnPlaces(const Cta& cta, uint32_t bits) : before(bits), total(bits) {
    const uint32_t even = WarpInclusiveSum(cta.lane, total.even);
    const uint32_t odd = WarpInclusiveSum(cta.lane, total.odd);
    before.even = even - total.even;
    before.odd = odd - total.odd;
    total.even = WarpBroadcast(even, 31);
    total.odd = WarpBroadcast(odd, 31);
  }

  // Calls visit(turn, place) with the place of the lane's first bit of each turn.
  template <typename Visit>
  __device__ __forceinline__ void VisitTurns(int num_turns, uint32_t first, Visit visit) const {
#pragma unroll
    for (int turn = 0; turn < T::kMaxVectors; ++turn) {
      if (turn < num_turns) visit(turn, first + before.Of(turn));
      first += total.Of(turn);
    }
  }
};

// What of a row is selected.
struct ShortSelection {
  RunMasks masks;     // against the bracket
  bool is_only_key;   // the pivot is the only key inside the bracket
  uint32_t pivot;     // everything greater is selected
  uint32_t num_ties;  // elements equal to it that are selected, lowest positions first
};

// Where a warp's selected elements go.
template <typename T>
struct WarpPlaces {
  uint32_t selected;    // bits of this thread's elements
  TurnPlaces<T> turns;  // within the warp's
  uint32_t before;      // selected elements of the warps before this one
  uint32_t count;

  // Calls emit(place, i) for the thread's selected elements, i being their number.
  template <typename Emit>
  __device__ __forceinline__ void VisitSelected(int num_turns, Emit emit) const {
    turns.VisitTurns(num_turns, before, [&](int turn, uint32_t place) {
#pragma unroll
      for (int i = turn * T::kPerVector; i < (turn + 1) * T::kPerVector; ++i) {
        if (selected >> i & 1) emit(place++, i);
      }
    });
  }
};

// Of the bits of a warp's lanes, the `wanted` lowest by position.
template <typename T>
__device__ __forceinline__ uint32_t KeepFirst(const Cta& cta, uint32_t bits, int num_turns,
                                              uint32_t wanted) {
  uint32_t kept = 0;
  TurnPlaces<T>(cta, bits).VisitTurns(num_turns, 0, [&](int turn, uint32_t before) {
    const uint32_t of_turn = bits >> (turn * T::kPerVector) & LowBits(T::kPerVector);
    const uint32_t room = wanted > before ? wanted - before : 0;
    const uint32_t count = __popc(of_turn);
    const uint32_t dropped = count > room ? count - room : 0;
    kept |= DropLastBits(of_turn, dropped) << (turn * T::kPerVector);
  });
  return kept;
}

// One barrier, behind which the open keys are no longer needed.
template <typename T>
__device__ __forceinline__ WarpPlaces<T> FindPlaces(const Cta& cta, const ShortTile<T>& tile,
                                                    const ShortSelection& selection) {
  uint32_t greater = selection.masks.certain;
  uint32_t equal = selection.masks.open;
  if (!selection.is_only_key) {
    equal = 0;
#pragma unroll 1
    for (uint32_t open = selection.masks.open; open != 0; open &= open - 1) {
      const uint32_t bit = open & (0 - open);
      const uint32_t key = tile.Key(__ffs(open) - 1);
      if (key > selection.pivot) greater |= bit;
      if (key == selection.pivot) equal |= bit;
    }
  }
  const uint32_t num_equal = WarpSum(__popc(equal));
  const uint32_t num_kept = WarpSum(__popc(greater | equal));
  const WarpPrefix sums = SumOverWarps(cta, make_uint2(num_kept, num_equal), 1);
  uint32_t before = sums.before.x;
  uint32_t count = num_kept;
  if (Unlikely(sums.total.y > selection.num_ties)) {
    const uint32_t ties_before = min(sums.before.y, selection.num_ties);
    const uint32_t ties = min(num_equal, selection.num_ties - ties_before);
    equal = KeepFirst<T>(cta, equal, tile.num_turns, ties);
    before -= sums.before.y - ties_before;
    count -= num_equal - ties;
  }
  const uint32_t selected = greater | equal;
  return WarpPlaces<T>{selected, TurnPlaces<T>(cta, selected), before, count};
}

// Writes the selected elements, `num_selected` in all, each warp for itself. By way of shared
// memory: stores straight from the unrolled loop took longer, see ffi/NOTES.md.
template <typename T>
__device__ __forceinline__ void WriteShortRow(Cta& cta, const ShortTile<T>& tile,
                                              const ShortSelection& selection,
                                              uint32_t num_selected, bool is_sorted,
                                              const RowOutput<T>& output) {
  const WarpPlaces<T> places = FindPlaces(cta, tile, selection);
  if (Unlikely(is_sorted)) {
    const PairSink sink(cta, 0, num_selected);
    places.VisitSelected(tile.num_turns, [&](uint32_t place, int i) {
      sink.Put(place, tile.Key(i), tile.Position(i));
    });
    SortAndStore(cta, static_cast<int>(num_selected), output);
    return;
  }
  int32_t* positions = reinterpret_cast<int32_t*>(cta.own);
  places.VisitSelected(tile.num_turns,
                       [&](uint32_t place, int i) { positions[place] = tile.Position(i); });
  SyncWarp();  // the warp's staged output before its reads
  const uint32_t end = places.before + places.count;
#pragma unroll 1
  for (uint32_t place = places.before + cta.lane; place < end; place += 32) {
    output.indices[place] = positions[place];
  }
  if (!Unlikely(output.values != nullptr)) return;
  uint32_t* keys = reinterpret_cast<uint32_t*>(cta.own) + output.k;
  places.VisitSelected(tile.num_turns, [&](uint32_t place, int i) { keys[place] = tile.Key(i); });
  SyncWarp();  // the warp's staged keys before their reads
#pragma unroll 1
  for (uint32_t place = places.before + cta.lane; place < end; place += 32) {
    output.StoreBits(static_cast<int32_t>(place), T::Bits(keys[place], output.flip));
  }
}

template <typename T>
__device__ __forceinline__ void SelectShortRow(Cta& cta, const TopKArgs& args,
                                               const RowWindow& window,
                                               const RowOutput<T>& output) {
  ShortTile<T> tile(cta, window, output.flip);
  PlaceCandidates(cta, args, /*has_list=*/false);
  SyncThreads();  // the cleared histogram before its use
  tile.Load();
  const uint32_t k = static_cast<uint32_t>(args.k);
  if (Unlikely(window.length <= args.k)) {
    const uint32_t length = static_cast<uint32_t>(window.length);
    const ShortSelection all{RunMasks{0, tile.valid}, true, 0, length};
    WriteShortRow(cta, tile, all, length, args.is_sorted, output);
    PadRow(output, window.length);
    return;
  }
  const BracketGoal goal = ExactGoal(k, min(kMaxDirect, static_cast<uint32_t>(args.list_capacity)));
  const Estimate estimate = EstimateBracket<T>(
      cta, goal, output.flip, [&](auto visit) { tile.VisitAll(visit); },
      [&](auto visit) { tile.VisitAgain(visit); });
  const Bracket& bracket = estimate.bracket;
  const uint32_t rank = k - estimate.above;
  ShortSelection selection{tile.MasksOf(bracket), bracket.IsSingleKey(), bracket.lowest, rank};
  if (!selection.is_only_key) {
    tile.CollectOpenKeys(cta, selection.masks.open, estimate.inside);
    SyncThreads();  // the open keys before their reads
    const Candidates candidates{reinterpret_cast<const uint32_t*>(cta.own),
                                PadToVector(estimate.inside), 0};
    const Pivot pivot = FindPivot(cta, candidates, bracket, rank);
    selection.pivot = pivot.key;
    selection.num_ties = pivot.num_ties;
  }
  WriteShortRow(cta, tile, selection, k, args.is_sorted, output);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SHORT_ROW_CUH_
