// Rows that one CTA's tile holds.
//
// The row is read once, into registers; a copy in shared memory serves the few elements that are
// looked at by number, and the turns for which there are no registers. Threads take the vectors of
// the row in turns, and a tile has all its turns whatever the row's length, so that nothing
// branches between them: what lies outside the window becomes the lowest key, which is never
// selected of a row of more than k (see AddFirstTies for elements that have that key). All
// elements are counted, so the bracket and its counts are exact and nothing has to be verified.
//
// Order without sorting: elements ascend by turn, then thread, then number in their vector. What a
// warp selects in one turn fits a field of a word, so that one scan of the lanes places several
// turns, and one sum over the warps all of them.

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
#include "write_row.cuh"

namespace jax_topk {

// The sizes of tiles, in turns: the largest of all takes longer for the rows that the middle one
// holds.
template <typename T>
constexpr int kFewTurns = T::kPerVector == 4 ? 3 : 2;
template <typename T>
constexpr int kMiddleTurns = T::kPerVector == 4 ? 6 : 3;
template <typename T>
constexpr int kMostTurns = T::kMaxVectors;
// Of a tile that takes the room of the candidates too, where the launch has it to spare.
template <typename T>
constexpr int kLargeTurns = T::kPerVector == 4 ? kMaxLargeTurns : 6;

// A bit for each of a thread's elements: number i is element i % kPerVector of turn
// i / kPerVector.
template <typename T, int kTurns>
struct TurnBits {
  static constexpr int kTurnsPerWord = 32 / T::kPerVector;
  static constexpr int kWords = (kTurns + kTurnsPerWord - 1) / kTurnsPerWord;
  uint32_t words[kWords] = {};

  __device__ __forceinline__ uint32_t OfTurn(int turn) const {
    return words[turn / kTurnsPerWord] >> (turn % kTurnsPerWord * T::kPerVector) &
           LowBits(T::kPerVector);
  }
  __device__ __forceinline__ void SetTurn(int turn, uint32_t bits) {
    words[turn / kTurnsPerWord] |= bits << (turn % kTurnsPerWord * T::kPerVector);
  }
  __device__ __forceinline__ bool Any() const {
    uint32_t any = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) any |= words[word];
    return any != 0;
  }
  __device__ __forceinline__ void Add(const TurnBits& others) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) words[word] |= others.words[word];
  }
};

// Where a thread's elements stand against a bracket.
template <typename T, int kTurns>
struct TurnMasks {
  TurnBits<T, kTurns> certain;  // above it
  TurnBits<T, kTurns> open;     // inside it
};

// A thread's elements in shared memory, complete after ShortTile::Settle. Whatever looks at few of
// them by number needs no more, nor what is not inlined.
template <typename T>
struct StoredTile {
  uint4* slots;      // the thread's vector of turn 0; a turn is kThreads vectors
  int32_t position;  // of element 0, within the window; negative before its start
  int32_t length;    // of the window
  uint32_t flip;

  __device__ __forceinline__ uint4 Vector(int turn) const {
    return LoadShared(slots + turn * kThreads);
  }
  // By number, without a sign so that divisions are shifts. How far an element is behind the
  // thread's first one, in positions and in elements of shared memory.
  __device__ __forceinline__ static uint32_t Distance(uint32_t i) {
    return i / T::kPerVector * (kThreads * T::kPerVector) + i % T::kPerVector;
  }
  __device__ __forceinline__ int32_t Position(uint32_t i) const {
    return position + static_cast<int32_t>(Distance(i));
  }
  __device__ __forceinline__ uint32_t KeyAt(uint32_t distance) const {
    if constexpr (T::kBytes == 4) {
      return T::Key(reinterpret_cast<const uint32_t*>(slots)[distance], flip);
    } else {
      return T::Key(reinterpret_cast<const uint16_t*>(slots)[distance], flip);
    }
  }
  __device__ __forceinline__ uint32_t Key(uint32_t i) const {
    const uint4* vector = slots + i / T::kPerVector * kThreads;
    if constexpr (T::kBytes == 4) {
      return T::Key(reinterpret_cast<const uint32_t*>(vector)[i % T::kPerVector], flip);
    } else {
      return T::Key(reinterpret_cast<const uint16_t*>(vector)[i % T::kPerVector], flip);
    }
  }
};

// A thread's elements of the row.
template <typename T, int kTurns>
struct ShortTile : StoredTile<T> {
  using StoredTile<T>::slots;
  using StoredTile<T>::flip;
  static constexpr int kMaxHeld = T::kPerVector == 4 ? 7 : 4;
  static constexpr int kHeldTurns = kTurns < kMaxHeld ? kTurns : kMaxHeld;  // in registers as well
  // Turns that every row fills for which a smaller tile would not do.
  static constexpr int kFullTurns = kTurns > kMostTurns<T>     ? kMostTurns<T>
                                    : kTurns > kMiddleTurns<T> ? kMiddleTurns<T>
                                    : kTurns > kFewTurns<T>    ? kFewTurns<T>
                                                               : 0;

  uint4 vectors[kHeldTurns];

  // Starts loading the row.
  __device__ __forceinline__ ShortTile(const Cta& cta, const RowWindow& window, uint32_t sign_flip)
      : StoredTile<T>{reinterpret_cast<uint4*>(cta.tiles) + cta.thread,
                      cta.thread * T::kPerVector - window.skew, window.length, sign_flip} {
    if (Unlikely(window.leaves_operand)) {
      CopyAtEdge<T>(window, cta.thread, window.num_vectors, kThreads,
                    cta.tiles + cta.thread * kVectorBytes, kThreads);
#pragma unroll
      for (int turn = 0; turn < kHeldTurns; ++turn) {
        vectors[turn] = LoadShared(slots + turn * kThreads);
      }
      return;
    }
    const uint4* from = reinterpret_cast<const uint4*>(window.vectors) + cta.thread;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn >= kFullTurns && turn * kThreads + cta.thread >= window.num_vectors) continue;
      if (turn < kHeldTurns) {
        vectors[turn] = LoadReadOnly(from + turn * kThreads);
      } else {
        CopyAsync16(slots + turn * kThreads, from + turn * kThreads);
      }
    }
    if (kTurns > kHeldTurns) CopyAsyncCommit();
  }

  // Replaces what lies outside the window, and completes the copy in shared memory.
  __device__ __forceinline__ void Settle(const Cta& cta, const RowWindow& window) {
    const uint32_t lowest = T::kPerVector == 4 ? T::Bits(0, flip) : BothHalves(T::Bits(0, flip));
    const int32_t tail = (window.length + window.skew) % T::kPerVector;
    const uint32_t valid = LowBits(tail);
    // Vectors of the row behind the thread's first one.
    const int32_t vectors_behind = window.num_vectors - 1 - cta.thread;
#pragma unroll
    for (int turn = kFullTurns; turn < kHeldTurns; ++turn) {
      if (turn * kThreads > vectors_behind) {
        vectors[turn] = make_uint4(lowest, lowest, lowest, lowest);
      }
    }
    if (tail != 0) {
#pragma unroll
      for (int turn = kFullTurns; turn < kHeldTurns; ++turn) {
        if (turn * kThreads == vectors_behind) KeepValid(&vectors[turn], valid, lowest);
      }
    }
    if (Unlikely(window.skew != 0) && cta.thread == 0) {
      KeepValid(&vectors[0], ~LowBits(window.skew), lowest);
    }
#pragma unroll
    for (int turn = 0; turn < kHeldTurns; ++turn) slots[turn * kThreads] = vectors[turn];
    if constexpr (kTurns > kHeldTurns) {
      CopyAsyncWait<0>();
#pragma unroll
      for (int turn = kHeldTurns; turn < kTurns; ++turn) {
        uint4* slot = slots + turn * kThreads;
        if (turn * kThreads > vectors_behind) *slot = make_uint4(lowest, lowest, lowest, lowest);
        if (tail != 0 && turn * kThreads == vectors_behind) KeepValid(slot, valid, lowest);
      }
    }
  }

  // The vector of a turn.
  __device__ __forceinline__ uint4 Vector(int turn) const {
    return turn < kHeldTurns ? vectors[turn < kHeldTurns ? turn : 0] : StoredTile<T>::Vector(turn);
  }

 private:
  // Every element that `valid` does not name becomes the lowest key.
  __device__ __forceinline__ static void KeepValid(uint4* vector, uint32_t valid, uint32_t lowest) {
    if constexpr (T::kPerVector == 4) {
      vector->x = valid & 1 ? vector->x : lowest;
      vector->y = valid & 2 ? vector->y : lowest;
      vector->z = valid & 4 ? vector->z : lowest;
      vector->w = valid & 8 ? vector->w : lowest;
    } else {
      vector->x = KeepValidHalves(vector->x, valid, lowest);
      vector->y = KeepValidHalves(vector->y, valid >> 2, lowest);
      vector->z = KeepValidHalves(vector->z, valid >> 4, lowest);
      vector->w = KeepValidHalves(vector->w, valid >> 6, lowest);
    }
  }
  __device__ __forceinline__ static uint32_t KeepValidHalves(uint32_t pair, uint32_t valid,
                                                             uint32_t lowest) {
    const uint32_t kept = (valid & 1 ? 0xffffu : 0) | (valid & 2 ? 0xffff0000u : 0);
    return (pair & kept) | (lowest & ~kept);
  }
};

// The bins of a thread's elements, as numbers of 16 bits, two to a word.
template <typename T, int kTurns>
struct BinsOfTile {
  static constexpr int kWordsPerTurn = T::kPerVector / 2;
  uint32_t words[kTurns * kWordsPerTurn];

  // Where the elements stand against the bins first .. end - 1: two instructions for an element,
  // where keys would take five.
  __device__ __forceinline__ TurnMasks<T, kTurns> MasksOf(uint32_t first, uint32_t end) const {
    TurnMasks<T, kTurns> masks{Below(first), Below(end)};
#pragma unroll
    for (int word = 0; word < masks.open.kWords; ++word) {
      masks.open.words[word] &= ~masks.certain.words[word];
    }
    return masks;
  }

 private:
  // The elements whose bin is below a limit. Both are at most 2^15.
  __device__ __forceinline__ TurnBits<T, kTurns> Below(uint32_t limit) const {
    using Bits = TurnBits<T, kTurns>;
    // Less a half that is below the limit, a half of it keeps its sign bit.
    const uint32_t bound = BothHalves(0x8000 + limit - 1);
    Bits below;
#pragma unroll
    for (int word = 0; word < Bits::kWords; ++word) {
      const int first = word * Bits::kTurnsPerWord;
      const int last = first + Bits::kTurnsPerWord < kTurns ? first + Bits::kTurnsPerWord : kTurns;
      uint32_t negative = 0;  // the bits, negated
#pragma unroll
      for (int turn = last - 1; turn >= first; --turn) {
#pragma unroll
        for (int i = kWordsPerTurn - 2; i >= 0; i -= 2) {
          const uint32_t* pairs = words + turn * kWordsPerTurn + i;
          // Which four of the eight bits of a byte.
          const bool is_upper = (turn * kWordsPerTurn + i) % 4 != 0;
          if (is_upper) negative <<= 8;  // what is above this byte is complete
          negative = SubtractWeights(negative, SignsOfHalves(bound - pairs[0], bound - pairs[1]),
                                     is_upper ? 0x80402010u : 0x08040201u);
        }
      }
      below.words[word] = 0u - negative;
    }
    return below;
  }
};

// Counts the elements by coarse bin. Gives their bins as CoarseOffsets has them, times four.
template <typename T, int kTurns>
__device__ __forceinline__ BinsOfTile<T, kTurns> CountAll(const Cta& cta,
                                                          const ShortTile<T, kTurns>& tile) {
  const uint32_t coarse_flip = CoarseFlip(tile.flip);
  BinsOfTile<T, kTurns> bins;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint4 vector = tile.Vector(turn);
#pragma unroll
    for (int i = 0; i < bins.kWordsPerTurn; ++i) {
      const uint32_t offsets = CoarseOffsets<T>(T::Halves(vector, i), coarse_flip);
      CountAt(cta, offsets & 0xffffu);
      CountAt(cta, offsets >> 16);
      bins.words[turn * bins.kWordsPerTurn + i] = offsets;
    }
  }
  return bins;
}

// Of a thread's elements, those that lie in the window. `position`: of the first element.
template <typename T, int kTurns>
__device__ __forceinline__ TurnBits<T, kTurns> ValidElements(int32_t position, int32_t length) {
  TurnBits<T, kTurns> valid;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    valid.SetTurn(turn, LowBits(min(length - position, T::kPerVector)) & ~LowBits(-position));
    position += kThreads * T::kPerVector;
  }
  return valid;
}

// Counts the elements inside a bracket, of which the keys lie in one half of the order, by linear
// bins, and finds the range of keys that they have. `of_tile`: the bins of the elements, kBins
// outside the bracket. In: the histogram is zero, the header's second range is the greatest words,
// ordered by a barrier. One barrier.
template <typename T, int kTurns>
__device__ __forceinline__ Bracket CountInside(const Cta& cta, const StoredTile<T>& tile,
                                               const Bracket& bracket, const LinearBins& bins,
                                               BinsOfTile<T, kTurns>* of_tile) {
  const uint32_t mask = KeyTest<T>(bracket.highest, tile.flip).mask;
  const uint32_t range = bracket.highest - bracket.lowest;
  // How far the highest and the lowest element inside are from the bracket's ends. Unsigned: of
  // elements outside, both distances are greater than `range`.
  uint32_t from_top = range, from_bottom = range;
  const auto count = [&](uint32_t element) {
    const uint32_t word = element ^ mask;
    const uint32_t depth = bracket.highest - word;
    const uint32_t bin = depth <= range ? depth >> bins.shift : kBins;
    atomicAdd(&cta.bins[bin], 1u);
    from_top = min(from_top, depth);
    from_bottom = MinOfSum(word, 0u - bracket.lowest, from_bottom);
    return bin;
  };
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint4 vector = tile.Vector(turn);
#pragma unroll
    for (int i = 0; i < T::kPerVector; i += 2) {
      const uint32_t first = count(T::Element(vector, i));
      of_tile->words[(turn * T::kPerVector + i) / 2] = first | count(T::Element(vector, i + 1))
                                                                   << 16;
    }
  }
  from_top = WarpMin(from_top);
  from_bottom = WarpMin(from_bottom);
  if (cta.lane == 0) {
    atomicMin(&cta.header->ranges[1].x, from_top);
    atomicMin(&cta.header->ranges[1].y, from_bottom);
  }
  SyncThreads();  // counts and distances before their reads
  return Bracket{bracket.lowest + cta.header->ranges[1].y,
                 bracket.highest - cta.header->ranges[1].x};
}

// The bins of a row's elements stand for themselves: what FindRank gives is a bin, not its keys.
__device__ __forceinline__ Bracket BinItself(uint32_t bin) { return Bracket{bin, bin}; }

// Narrows a bracket that holds the `rank`-th largest element (from 1) and more than `open_limit`,
// until it holds no more or is a single key. `masks`: where the elements stand against it. In: as
// CountInside.
template <typename T, int kTurns>
__device__ __forceinline__ Estimate NarrowCrowded(const Cta& cta, const StoredTile<T>& tile,
                                                  Estimate estimate, uint32_t rank,
                                                  uint32_t open_limit,
                                                  TurnMasks<T, kTurns>* masks) {
#pragma unroll 1
  for (int round = 0; estimate.inside > open_limit && !estimate.bracket.IsSingleKey(); ++round) {
    if (Unlikely(round > 0)) {
      if (cta.thread == 0) cta.header->ranges[1] = make_uint2(~0u, ~0u);
      SyncThreads();  // the distances made anew before their use
    }
    const LinearBins bins(estimate.bracket);
    BinsOfTile<T, kTurns> of_tile;
    const Bracket seen = CountInside<T>(cta, tile, estimate.bracket, bins, &of_tile);
    if (seen.IsSingleKey()) {  // a plateau
      estimate.bracket = seen;
      break;
    }
    const uint32_t above = estimate.above;
    const Bracket outer = estimate.bracket;
    estimate = FindRank<false>(cta, rank - above, BinItself);
    const uint32_t bin = estimate.bracket.lowest;
    const TurnMasks<T, kTurns> of_bin = of_tile.MasksOf(bin, bin + 1);
    masks->certain.Add(of_bin.certain);
    masks->open = of_bin.open;
    estimate.above += above;
    estimate.bracket = bins.Keys(bin, bin, outer);
    estimate.bracket.lowest = max(estimate.bracket.lowest, seen.lowest);
    estimate.bracket.highest = min(estimate.bracket.highest, seen.highest);
  }
  return estimate;
}

// A thread's bits, counted by turn, in fields that hold the sum over a warp.
template <typename T, int kTurns>
struct TurnCounts {
  static constexpr int kFieldBits = 2 * T::kPerVector;
  static constexpr int kFields = 32 / kFieldBits;  // turns per word: those of 16 elements
  static constexpr int kWords = (kTurns + kFields - 1) / kFields;
  static_assert(32 * T::kPerVector < 1 << kFieldBits, "a field holds all of a warp's turn");
  static_assert(kWords <= kMaxCountWords, "the header holds the words of all warps");
  uint32_t words[kWords];

  __device__ __forceinline__ explicit TurnCounts(const TurnBits<T, kTurns>& bits) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint32_t of_word = bits.words[i / 2];
      uint32_t x = of_word - (of_word >> 1 & 0x55555555u);
      x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);  // the sums of four bits
      if constexpr (T::kPerVector != 4) x = (x + (x >> 4)) & 0x0f0f0f0fu;
      words[i] = Spread(x & 0xffffu);
      if (i + 1 < kWords) words[i + 1] = Spread(x >> 16);
    }
  }
  __device__ __forceinline__ uint32_t OfField(int word, int field) const {
    return words[word] >> (field * kFieldBits) & LowBits(kFieldBits);
  }

 private:
  // Nibbles, or bytes, to the low ends of fields.
  __device__ __forceinline__ static uint32_t Spread(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ffu;
    return T::kPerVector == 4 ? (x | x << 4) & 0x0f0f0f0fu : x;
  }
};

// The fields of every warp's word of TurnCounts, summed: over the warps before this one and over
// all. In words of two fields.
template <typename T>
struct FieldSums {
  static constexpr int kWords = TurnCounts<T, 1>::kFields / 2;
  uint32_t before[kWords], total[kWords];

  // `word`: of warp `lane`; zero behind the last.
  __device__ __forceinline__ FieldSums(const Cta& cta, uint32_t word) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t pair = kWords == 1 ? word : word >> (8 * i) & 0x00ff00ffu;
      before[i] = WarpSum(cta.lane < cta.warp ? pair : 0);
      total[i] = WarpSum(pair);
    }
  }
  __device__ __forceinline__ uint32_t Before(int field) const { return Field(before, field); }
  __device__ __forceinline__ uint32_t Total(int field) const { return Field(total, field); }

 private:
  __device__ __forceinline__ static uint32_t Field(const uint32_t* words, int field) {
    return words[field % kWords] >> (field / kWords * 16) & 0xffffu;
  }
};

// The place of a thread's first bit of each turn among the bits of all threads, in ascending order
// of position.
template <typename T, int kTurns>
struct TurnPlaces {
  uint32_t of[kTurns];

  // `slot` 0 and 1 alternate between calls, so that one barrier serves.
  __device__ __forceinline__ TurnPlaces(const Cta& cta, const TurnBits<T, kTurns>& bits, int slot) {
    using Counts = TurnCounts<T, kTurns>;
    const Counts own(bits);
    Counts before = own;
#pragma unroll
    for (int i = 0; i < Counts::kWords; ++i) {
      before.words[i] = WarpInclusiveSum(cta.lane, own.words[i]);
      if (cta.lane == 31) cta.header->turn_sums[slot][i][cta.warp] = before.words[i];
      before.words[i] -= own.words[i];
    }
    SyncThreads();  // the warps' sums before their reads
    uint32_t start = 0;
#pragma unroll
    for (int i = 0; i < Counts::kWords; ++i) {
      const uint32_t of_warp = cta.lane < kWarps ? cta.header->turn_sums[slot][i][cta.lane] : 0;
      const FieldSums<T> sums(cta, of_warp);
#pragma unroll
      for (int field = 0; field < Counts::kFields; ++field) {
        const int turn = i * Counts::kFields + field;
        if (turn >= kTurns) break;
        of[turn] = start + sums.Before(field) + before.OfField(i, field);
        start += sums.Total(field);
      }
    }
  }
};

// A thread's elements that are selected, and those that may be.
template <typename T, int kTurns>
struct ShortSelection {
  TurnBits<T, kTurns> selected;
  TurnBits<T, kTurns> ties;  // of which `num_ties` are, the lowest positions first
  uint32_t num_ties;
  uint32_t tied_key;
};

// The selected elements of a thread, with those of the ties that are.
template <typename T, int kTurns>
__device__ __forceinline__ TurnBits<T, kTurns> AddFirstTies(
    const Cta& cta, const StoredTile<T>& tile, const ShortSelection<T, kTurns>& selection) {
  TurnBits<T, kTurns> bits = selection.selected, ties = selection.ties;
  if (Unlikely(selection.tied_key == 0)) {  // which is also the key of what is not in the window
    const auto valid = ValidElements<T, kTurns>(tile.position, tile.length);
#pragma unroll
    for (int word = 0; word < valid.kWords; ++word) ties.words[word] &= valid.words[word];
  }
  const TurnPlaces<T, kTurns> places(cta, ties, 1);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint32_t of_turn = ties.OfTurn(turn);
    const int32_t room = static_cast<int32_t>(selection.num_ties - places.of[turn]);
    uint32_t dropped = of_turn;
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) dropped &= room > i ? dropped - 1 : ~0u;
    bits.SetTurn(turn, of_turn ^ dropped);
  }
  return bits;
}

// Writes the selected elements. Of a sorted row, puts their positions where SortAndStore takes them
// from.
template <typename T, int kTurns>
__device__ __forceinline__ void WriteShortRow(const Cta& cta, const StoredTile<T>& tile,
                                              const TurnBits<T, kTurns>& selected,
                                              const RowOutput<T>& output) {
  const TurnPlaces<T, kTurns> places(cta, selected, 0);
  int32_t* positions = reinterpret_cast<int32_t*>(cta.own);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    SharedCursor cursor(positions + places.of[turn]);
#pragma unroll
    for (int i = turn * T::kPerVector; i < (turn + 1) * T::kPerVector; ++i) {
      cursor.AppendIf(selected.words[i / 32] & 1u << i % 32, tile.Position(i));
    }
  }
  if (output.is_sorted) return;
  SyncThreads();  // the staged output before its reads
  StoreIndices(positions, output.indices, output.k);
  if (!Unlikely(output.values != nullptr)) return;
  const int32_t skew = cta.thread * T::kPerVector - tile.position;
#pragma unroll 1
  for (int32_t i = cta.thread; i < output.k; i += kThreads) {
    output.StoreBits(i, ElementInTile<T>(cta, positions[i] + skew));
  }
}

// One of a thread's open elements: its bit and its number. No bit and any number if there is none.
template <typename T, int kTurns>
struct OpenElement {
  TurnBits<T, kTurns> bit;
  uint32_t number;
};
template <typename T, int kTurns>
__device__ __forceinline__ OpenElement<T, kTurns> TakeElement(TurnBits<T, kTurns>* open) {
  OpenElement<T, kTurns> first{{}, 0};
  bool is_first = true;
#pragma unroll
  for (int word = 0; word < open->kWords; ++word) {
    const uint32_t left = open->words[word];
    first.bit.words[word] = is_first ? left & (0 - left) : 0;
    if (is_first && left != 0) first.number = 32 * word + __ffs(left) - 1;
    is_first = is_first && left == 0;
    open->words[word] ^= first.bit.words[word];
  }
  return first;
}

// Two of them, so that they are waited for together.
struct OpenPair {
  uint32_t bits[2];  // in their words; zero if there is none, which the first one may be too
  uint32_t words[2];
  uint32_t numbers[2];  // any if there is none
};
// Takes the first and the last of a word, or the first of each of two words.
template <typename T, int kTurns>
__device__ __forceinline__ OpenPair TakePair(TurnBits<T, kTurns>* open) {
  static_assert(open->kWords <= 2, "a word for each");
  OpenPair pair;
  if constexpr (open->kWords == 1) {
    uint32_t& left = open->words[0];
    pair.bits[0] = left & (0 - left);
    pair.numbers[0] = static_cast<uint32_t>(max(__ffs(left), 1) - 1);
    pair.numbers[1] = static_cast<uint32_t>(31 - __clz(left | 1));
    pair.bits[1] = (1u << pair.numbers[1]) & left & ~pair.bits[0];
    pair.words[0] = pair.words[1] = 0;
    left &= ~(pair.bits[0] | pair.bits[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& left = open->words[i];
      pair.bits[i] = left & (0 - left);
      left ^= pair.bits[i];
      pair.words[i] = i;
      pair.numbers[i] = 32 * i + static_cast<uint32_t>(max(__ffs(pair.bits[i]), 1) - 1);
    }
  }
  return pair;
}

// Calls visit(pair) for all of a thread's open elements.
template <typename T, int kTurns, typename Visit>
__device__ __forceinline__ void VisitOpenPairs(TurnBits<T, kTurns> open, Visit visit) {
#pragma unroll 1
  while (open.Any()) visit(TakePair(&open));
}

// A thread's open elements, looked at twice. Most threads have a pair at most: what was seen of
// that, a Look of both, stays in registers from the first time to the second.
template <typename T, int kTurns, typename Look>
class OpenLooks {
 public:
  __device__ __forceinline__ explicit OpenLooks(const TurnBits<T, kTurns>& open)
      : open_(open), others_(open), own_(TakePair(&others_)) {}

  // Both call visit(pair, look) for all of them, look_at(pair, &look) for what was not kept.
  template <typename LookAt, typename Visit>
  __device__ __forceinline__ void First(LookAt look_at, Visit visit) {
    if (open_.Any()) {
      look_at(own_, &seen_);
      visit(own_, seen_);
      VisitOthers(look_at, visit);
    }
    SyncWarp();  // after loops of different lengths
  }
  template <typename LookAt, typename Visit>
  __device__ __forceinline__ void Again(LookAt look_at, Visit visit) const {
    if (open_.Any()) {
      visit(own_, seen_);
      VisitOthers(look_at, visit);
    }
    SyncWarp();  // after loops of different lengths
  }

 private:
  template <typename LookAt, typename Visit>
  __device__ __forceinline__ void VisitOthers(LookAt look_at, Visit visit) const {
    VisitOpenPairs(others_, [&](const OpenPair& pair) {
      Look look;
      look_at(pair, &look);
      visit(pair, look);
    });
  }

  TurnBits<T, kTurns> open_, others_;
  OpenPair own_;
  Look seen_;
};

// Calls visit(word, bit, number) for each of a thread's open elements.
template <typename T, int kTurns, typename Visit>
__device__ __forceinline__ void VisitOpen(const TurnBits<T, kTurns>& open, Visit visit) {
#pragma unroll
  for (int word = 0; word < open.kWords; ++word) {
#pragma unroll 1
    for (uint32_t left = open.words[word]; left != 0; left &= left - 1) {
      visit(word, left & (0 - left), 32 * word + __ffs(left) - 1);
    }
  }
}

// Whether an element is among the `rank` first of `count` open ones: by key, and of equal keys by
// position. Asked by the thread that has it, of at most kMaxByOwner: so all learn at once what is
// selected of their own. `keys`: kMaxByOwner of them, zeros behind the last; none is zero.
__device__ __forceinline__ bool IsAmongFirst(const uint32_t* keys, const uint32_t* positions,
                                             uint32_t count, uint32_t key, uint32_t position,
                                             uint32_t rank) {
  static_assert(kMaxByOwner == 8, "two vectors");
  const uint4 first = LoadShared(reinterpret_cast<const uint4*>(keys));
  const uint4 second = LoadShared(reinterpret_cast<const uint4*>(keys) + 1);
  KeysAhead ahead;
  ahead.Count(first, key);
  ahead.Count(second, key);
  const bool has_ties = ahead.greater < rank && rank < ahead.reached;
  if (!Unlikely(has_ties)) return ahead.greater < rank;
  uint32_t before = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    before += keys[i] > key || (keys[i] == key && positions[i] < position);
  }
  return before < rank;
}

// Bins that spread the open elements, the elements that each has room for, and the most that are
// spread: of so few hardly any bin has more than room.
constexpr int kSpreadBins = 128;
constexpr uint32_t kSpreadRoom = 12;
template <typename T>
constexpr uint32_t kMaxSpread = T::kBits == 32 ? 5 * kSpreadBins : 1024;

// Adds the `rank` first of the open elements of an even bin of a 16-bit type, by counting each of
// its keys; those of the lowest key are given as ties unless all of them are. In: the histogram is
// zero, ordered by a barrier. One barrier.
template <typename T, int kTurns>
__device__ __forceinline__ void AddByCounting(const Cta& cta, const StoredTile<T>& tile,
                                              const TurnBits<T, kTurns>& open, uint32_t coarse_bin,
                                              uint32_t rank, ShortSelection<T, kTurns>* selection) {
  static_assert(T::kKeysPerStep <= 32, "a key for each lane");
  struct Look {
    uint32_t from_top[2];
  };
  const auto look_at = [&](const OpenPair& pair, Look* look) {
#pragma unroll
    for (int i = 0; i < 2; ++i) look->from_top[i] = ~tile.Key(pair.numbers[i]) % T::kKeysPerStep;
  };
  OpenLooks<T, kTurns, Look> looks(open);
  looks.First(look_at, [&](const OpenPair& pair, const Look& look) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      atomicAdd(&cta.bins[pair.bits[i] != 0 ? look.from_top[i] : kBins], 1u);
    }
  });
  SyncThreads();  // counts before their reads
  const int lane = UseHere(cta.lane);
  const uint32_t count = cta.bins[lane];
  const uint32_t reached = WarpInclusiveSum(lane, count);
  const uint32_t holder = static_cast<uint32_t>(__ffs(WarpBallot(reached >= rank))) - 1;
  const uint32_t num_equal = WarpBroadcast(count, static_cast<int>(holder));
  const uint32_t num_ties = rank - (WarpBroadcast(reached, static_cast<int>(holder)) - num_equal);
  const bool drops_ties = num_equal > num_ties;
  selection->tied_key = CoarseKeys<T>(coarse_bin).highest - holder;
  if (drops_ties) selection->num_ties = num_ties;
  const uint32_t end = holder + !drops_ties;
  looks.Again(look_at, [&](const OpenPair& pair, const Look& look) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = pair.words[i];
      if (look.from_top[i] < end) selection->selected.words[word] |= pair.bits[i];
      if (look.from_top[i] == holder) selection->ties.words[word] |= pair.bits[i];
    }
  });
}

// How many words are greater.
__device__ __forceinline__ uint32_t CountGreater(uint32_t count, const uint4& words,
                                                 uint32_t word) {
  count = CountCarry(count, words.x, ~word);
  count = CountCarry(count, words.y, ~word);
  count = CountCarry(count, words.z, ~word);
  return CountCarry(count, words.w, ~word);
}

// Adds the `rank` first of the open elements of an even bin of float32, by bins of their own, which
// keep them: every warp finds the bin of the rank, and the threads compare their own elements of it
// with the others. Returns whether that bin had room for all of its own; if not, nothing is added.
// In: the histogram is zero, ordered by a barrier. One barrier.
template <typename T, int kTurns>
__device__ __forceinline__ bool AddBySpreading(const Cta& cta, const StoredTile<T>& tile,
                                               const TurnBits<T, kTurns>& open, uint32_t rank,
                                               TurnBits<T, kTurns>* selected) {
  static_assert(kSpreadBins == 4 * 32, "a vector of bins for each lane");
  static_assert(kSpreadRoom == 12 && kSpreadBins * (1 + kSpreadRoom) <= kBins,
                "three vectors of words");
  constexpr int kShift = 11;
  static_assert(T::kKeysPerStep == kSpreadBins << kShift, "the keys of a coarse bin");
  static_assert(kShift <= 16 && kThreads * kLargeTurns<T> * T::kPerVector <= 1 << 16,
                "what tells a bin's elements apart, and their numbers, are halves of a word");
  uint32_t* kept = cta.bins + kSpreadBins;  // words of each bin, behind the counts
  const uint32_t first_number = static_cast<uint32_t>(cta.thread * T::kPerVector);
  struct Look {
    uint32_t bin[2];
    uint32_t word[2];  // greater if the key is, or with equal keys the position is lower
  };
  const auto look_at = [&](const OpenPair& pair, Look* look) {
    uint32_t distance[2], key[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      distance[i] = tile.Distance(pair.numbers[i]);
      key[i] = tile.KeyAt(distance[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      look->bin[i] = ~key[i] >> kShift & (kSpreadBins - 1);
      look->word[i] = LowerHalves(~first_number - distance[i], key[i]);
    }
  };
  OpenLooks<T, kTurns, Look> looks(open);
  looks.First(look_at, [&](const OpenPair& pair, const Look& look) {
    uint32_t place[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      place[i] = FetchAndAdd(&cta.bins[look.bin[i]], pair.bits[i] != 0 ? 1 : 0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (pair.bits[i] != 0 && place[i] < kSpreadRoom) {
        kept[kSpreadRoom * look.bin[i] + place[i]] = look.word[i];
      }
    }
  });
  SyncThreads();  // counts and words before their reads
  const uint32_t lane = static_cast<uint32_t>(UseHere(cta.lane));
  const uint4 counts = LoadShared(reinterpret_cast<const uint4*>(cta.bins) + lane);
  const uint32_t two = counts.x + counts.y, three = two + counts.z, sum = three + counts.w;
  const uint32_t before = WarpInclusiveSum(cta.lane, sum) - sum;
  const uint32_t inner = rank - 1 - before;  // unsigned: below `sum` in one lane alone
  const bool is_second = inner >= counts.x, is_third = inner >= two, is_last = inner >= three;
  const uint32_t last_bin = 4 * lane + is_second + is_third + is_last;
  const uint32_t above = before + (is_last ? three : is_third ? two : is_second ? counts.x : 0);
  const uint32_t inside = is_last     ? counts.w
                          : is_third  ? counts.z
                          : is_second ? counts.y
                                      : counts.x;
  const int holder = 31 - __clz(WarpBallot(inner < sum));
  const uint32_t found = WarpBroadcast(last_bin | above << 8 | inside << 20, holder);
  if (Unlikely(found >> 20 > kSpreadRoom)) return false;
  const uint32_t bin_of_rank = found & 0xffu;
  const uint32_t rank_in_bin = rank - (found >> 8 & 0xfffu);
  const bool has_many = found >> 20 > 4;
  // Behind the last word there are zeros, which are greater than none.
  const auto* of_bin = reinterpret_cast<const uint4*>(kept + kSpreadRoom * bin_of_rank);
  const uint4 first_words = LoadShared(of_bin);
  looks.Again(look_at, [&](const OpenPair& pair, const Look& look) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t greater = CountGreater(0, first_words, look.word[i]);
      if (Unlikely(has_many)) {
        greater = CountGreater(greater, LoadShared(of_bin + 1), look.word[i]);
        greater = CountGreater(greater, LoadShared(of_bin + 2), look.word[i]);
      }
      if (look.bin[i] < bin_of_rank || (look.bin[i] == bin_of_rank && greater < rank_in_bin)) {
        selected->words[pair.words[i]] |= pair.bits[i];
      }
    }
  });
  return true;
}

// Collects the keys of the open elements, of which none is the lowest: too many elements are not
// selected, and not above so few open ones. One barrier.
template <typename T, int kTurns>
__device__ __forceinline__ void CollectOpen(const Cta& cta, const StoredTile<T>& tile,
                                            const TurnBits<T, kTurns>& open, uint32_t count) {
  static_assert(kThreads * kFewTurns<T> * T::kPerVector - kMaxK > kMaxDirect, "of any tile");
  uint32_t* own = reinterpret_cast<uint32_t*>(cta.own);
  PadOpenKeys(cta, count, PadToChunk(count));
  VisitOpen(open, [&](int, uint32_t, int number) {
    own[FetchAndAdd(&cta.header->num_own, 1u)] = tile.Key(number);
  });
  SyncThreads();  // the open keys before their reads
}

// Adds the `rank` first of `count` open elements, at most kMaxByOwner, of which none is the lowest
// key: each thread asks for its own. Most have one at most, which stays in registers. One barrier.
template <typename T, int kTurns>
__device__ __forceinline__ void AddByOwner(const Cta& cta, const StoredTile<T>& tile,
                                           const TurnBits<T, kTurns>& open, uint32_t count,
                                           uint32_t rank, TurnBits<T, kTurns>* selected) {
  uint32_t* own = reinterpret_cast<uint32_t*>(cta.own);
  uint32_t* positions = own + kMaxByOwner;
  PadOpenKeys(cta, count, kMaxByOwner);
  const auto collect = [&](uint32_t key, uint32_t position) {
    const uint32_t place = FetchAndAdd(&cta.header->num_own, 1u);
    own[place] = key;
    positions[place] = position;
  };
  TurnBits<T, kTurns> others = open;
  const OpenElement<T, kTurns> first = TakeElement(&others);
  uint32_t first_key = 0, first_position = 0;
  if (open.Any()) {
    first_key = tile.Key(first.number);
    first_position = static_cast<uint32_t>(tile.Position(first.number));
    collect(first_key, first_position);
    VisitOpen(others, [&](int, uint32_t, int number) {
      collect(tile.Key(number), static_cast<uint32_t>(tile.Position(number)));
    });
  }
  SyncWarp();     // after loops of different lengths
  SyncThreads();  // the open keys before their reads
  if (open.Any()) {
    if (IsAmongFirst(own, positions, count, first_key, first_position, rank)) {
      selected->Add(first.bit);
    }
    VisitOpen(others, [&](int word, uint32_t bit, int number) {
      if (IsAmongFirst(own, positions, count, tile.Key(number),
                       static_cast<uint32_t>(tile.Position(number)), rank)) {
        selected->words[word] |= bit;
      }
    });
  }
  SyncWarp();  // after loops of different lengths
}

// Adds the open elements above a pivot, and those that have its key if all of these are selected.
template <typename T, int kTurns>
__device__ __forceinline__ void AddByPivot(const StoredTile<T>& tile,
                                           const TurnBits<T, kTurns>& open,
                                           const DirectPivot& pivot,
                                           ShortSelection<T, kTurns>* selection) {
  const bool drops_ties = pivot.num_equal > pivot.num_ties;
  if (Unlikely(drops_ties)) selection->num_ties = pivot.num_ties;
  selection->tied_key = pivot.key;
  VisitOpenPairs(open, [&](const OpenPair& pair) {
    uint32_t key[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) key[i] = tile.Key(pair.numbers[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bit = pair.bits[i];
      const uint32_t word = pair.words[i];
      if (key[i] > pivot.key || (key[i] == pivot.key && !drops_ties)) {
        selection->selected.words[word] |= bit;
      }
      if (key[i] == pivot.key) selection->ties.words[word] |= bit;
    }
  });
  SyncWarp();  // after loops of different lengths
}

// What is selected where the bin of the k-th element is too crowded to rank its elements, or not
// even. `estimate`: the bracket that is this bin; `masks`: where the elements stand against it. In:
// as CountInside.
template <typename T, int kTurns>
__device__ __forceinline__ ShortSelection<T, kTurns> SelectCrowded(const Cta& cta,
                                                                   const StoredTile<T>& tile,
                                                                   Estimate estimate,
                                                                   TurnMasks<T, kTurns> masks,
                                                                   uint32_t k, uint32_t capacity) {
  estimate = NarrowCrowded(cta, tile, estimate, k, min(uint32_t{kMaxDirect}, capacity), &masks);
  const uint32_t rank = k - estimate.above;
  ShortSelection<T, kTurns> selection{masks.certain, {}, 0, 0};
  if (Unlikely(estimate.bracket.IsSingleKey())) {
    if (estimate.inside > rank) {
      return ShortSelection<T, kTurns>{masks.certain, masks.open, rank, estimate.bracket.lowest};
    }
    selection.selected.Add(masks.open);
  } else if (estimate.inside <= kMaxByOwner) {
    AddByOwner(cta, tile, masks.open, estimate.inside, rank, &selection.selected);
  } else {
    CollectOpen(cta, tile, masks.open, estimate.inside);
    const uint32_t* own = reinterpret_cast<const uint32_t*>(cta.own);
    AddByPivot(tile, masks.open, RankDirectly(cta, own, PadToChunk(estimate.inside), rank),
               &selection);
  }
  return selection;
}

// What is selected of a rare row. Not inlined, see kernel.cuh.
template <typename T, int kTurns>
__device__ __noinline__ TurnBits<T, kTurns> SelectRare(Cta cta, StoredTile<T> tile,
                                                       Estimate estimate,
                                                       TurnMasks<T, kTurns> masks, uint32_t k,
                                                       uint32_t capacity) {
  cta = KnownShared(cta);
  tile.slots = KnownShared(tile.slots);
  const ShortSelection<T, kTurns> selection =
      SelectCrowded(cta, tile, estimate, masks, k, capacity);
  return selection.num_ties == 0 ? selection.selected : AddFirstTies(cta, tile, selection);
}

// Selects from a row that a tile of kTurns turns holds.
template <typename T, int kTurns>
__device__ __forceinline__ void SelectShortRow(Cta& cta, const TopKArgs& args,
                                               const RowWindow& window,
                                               const RowOutput<T>& output) {
  ShortTile<T, kTurns> tile(cta, window, output.flip);
  PlaceCandidates(cta, args, /*has_list=*/false);
  if (kTurns > kMostTurns<T>) cta.own = cta.tiles + kLargeTileBytes;
  SyncThreads();  // the cleared histogram before its use
  tile.Settle(cta, window);
  if (output.is_sorted && Unlikely(window.length <= args.k)) {  // others are copied
    WriteShortRow(cta, tile, ValidElements<T, kTurns>(tile.position, tile.length), output);
    return;
  }
  const uint32_t k = static_cast<uint32_t>(args.k);
  const BinsOfTile<T, kTurns> bins = CountAll(cta, tile);
  SyncThreads();  // counts before the search
  Estimate estimate = FindRank<false>(cta, k, BinItself);
  const uint32_t bin = estimate.bracket.lowest;
  const TurnMasks<T, kTurns> masks = bins.MasksOf(4 * bin, 4 * bin + 4);
  const uint32_t capacity = static_cast<uint32_t>(args.list_capacity);
  const uint32_t rank = k - estimate.above;
  ShortSelection<T, kTurns> selection{masks.certain, {}, 0, 0};
  if (estimate.inside <= min(uint32_t{kMaxByOwner}, capacity)) {
    AddByOwner(cta, tile, masks.open, estimate.inside, rank, &selection.selected);
  } else {
    bool is_done = false;
    if (IsEvenBin(bin) && estimate.inside <= min(kMaxSpread<T>, capacity)) {
      if constexpr (T::kBits == 32) {
        is_done = AddBySpreading(cta, tile, masks.open, rank, &selection.selected);
        if (Unlikely(!is_done)) {
          SyncThreads();  // the last reads of the histogram before it is cleared
          ClearBins(cta);
          SyncThreads();  // the cleared histogram before its use
        }
      } else {
        AddByCounting(cta, tile, masks.open, bin, rank, &selection);
        if (selection.num_ties != 0) selection.selected = AddFirstTies(cta, tile, selection);
        is_done = true;
      }
    }
    if (Unlikely(!is_done)) {
      estimate.bracket = CoarseKeys<T>(bin);
      selection.selected = SelectRare<T, kTurns>(cta, tile, estimate, masks, k, capacity);
    }
  }
  WriteShortRow(cta, tile, selection.selected, output);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SHORT_ROW_CUH_
