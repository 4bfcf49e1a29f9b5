// Step 5: the selected elements of a part, in the order the contract fixes, to the output.
//
// Threads own elements in ascending position, so counts of what is selected before them give every
// selected element its place in ascending order. The output of a tile is staged in shared memory
// and stored coalesced: 2048 scattered stores of 4 bytes would cost 1 us. Sorted output goes to the
// row's first CTA, see sort_pairs.cuh.

#ifndef JAX_TOPK_CUDA_WRITE_ROW_CUH_
#define JAX_TOPK_CUDA_WRITE_ROW_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"
#include "filter_part.cuh"
#include "row_window.cuh"
#include "sort_pairs.cuh"
#include "stream_part.cuh"

namespace jax_topk {

// Where one row's results go.
template <typename T>
struct RowOutput {
  unsigned char* values;  // [k] or null
  int32_t* indices;       // [k]
  int32_t k;
  uint32_t flip;
  bool is_sorted;  // best first; otherwise ascending index

  __device__ RowOutput(const TopKArgs& args, uint32_t row, uint32_t sign_flip, bool sorted)
      : values(args.values == nullptr ? nullptr
                                      : static_cast<unsigned char*>(args.values) +
                                            ElementsBefore(row, args.k) * T::kBytes),
        indices(args.indices + ElementsBefore(row, args.k)),
        k(args.k),
        flip(sign_flip),
        is_sorted(sorted) {}

  __device__ __forceinline__ void StoreBits(int32_t place, uint32_t bits) const {
    if constexpr (T::kBytes == 4) {
      reinterpret_cast<uint32_t*>(values)[place] = bits;
    } else {
      reinterpret_cast<uint16_t*>(values)[place] = static_cast<uint16_t>(bits);
    }
  }
};

// Fills the places from `first` on: fewer than k valid elements.
template <typename T>
__device__ __noinline__ void PadRow(const RowOutput<T> output, int32_t first) {
  for (int32_t place = first + ThreadIndex(); place < output.k; place += kThreads) {
    output.indices[place] = -1;
    if (output.values != nullptr) {
      output.StoreBits(place, T::kSign ^ T::kInfinity ^ output.flip);  // the worst value
    }
  }
}

// The values of a row of at most k elements, ascending, then padding.
template <typename T>
__device__ __forceinline__ void CopyValues(const RowWindow window, const RowOutput<T> output) {
  for (int32_t i = ThreadIndex(); i < output.k; i += kThreads) {
    uint32_t bits = T::kSign ^ T::kInfinity ^ output.flip;  // the worst value
    if (i < window.length) {
      const unsigned char* address = window.vectors + (int64_t{i} + window.skew) * T::kBytes;
      if constexpr (T::kBytes == 4) {
        bits = *reinterpret_cast<const uint32_t*>(address);
      } else {
        bits = *reinterpret_cast<const uint16_t*>(address);
      }
    }
    output.StoreBits(i, bits);
  }
}

// The indices of a row of at most k elements: all of them, then padding.
__device__ __forceinline__ void CopyIndices(int32_t length, int32_t* indices, int32_t k) {
  // Four per store where the row's output allows it: this path is all latency.
  const int32_t num_quads = reinterpret_cast<uintptr_t>(indices) % sizeof(int4) == 0 ? k / 4 : 0;
#pragma unroll 1
  for (int32_t quad = ThreadIndex(); quad < num_quads; quad += kThreads) {
    const int32_t i = 4 * quad;
    reinterpret_cast<int4*>(indices)[quad] =
        make_int4(i < length ? i : -1, i + 1 < length ? i + 1 : -1, i + 2 < length ? i + 2 : -1,
                  i + 3 < length ? i + 3 : -1);
  }
#pragma unroll 1
  for (int32_t i = 4 * num_quads + ThreadIndex(); i < k; i += kThreads) {
    indices[i] = i < length ? i : -1;
  }
}

// Stores staged indices, from vectors in shared memory, four at a time where the output allows it.
__device__ __forceinline__ void StoreIndices(const int32_t* staged, int32_t* indices,
                                             int32_t count) {
  const int32_t num_quads =
      reinterpret_cast<uintptr_t>(indices) % sizeof(int4) == 0 ? count / 4 : 0;
#pragma unroll 1
  for (int32_t quad = ThreadIndex(); quad < num_quads; quad += kThreads) {
    reinterpret_cast<int4*>(indices)[quad] = reinterpret_cast<const int4*>(staged)[quad];
  }
#pragma unroll 1
  for (int32_t i = 4 * num_quads + ThreadIndex(); i < count; i += kThreads) indices[i] = staged[i];
}

// What of the row is selected, as seen by one CTA.
struct Selection {
  uint32_t pivot;           // everything greater is selected
  uint32_t num_ties;        // of the row that are selected, lowest positions first
  uint32_t greater_before;  // elements greater than the pivot in the CTAs before this one
  uint32_t equal_before;    // elements equal to it there
  bool is_only_key;         // the pivot is the only key inside the bracket
  uint32_t count;           // selected elements of the row

  // Ties that are left for this CTA and those behind it.
  __device__ __forceinline__ uint32_t TiesLeft() const {
    return num_ties > equal_before ? num_ties - equal_before : 0;
  }
  // Selected elements in the CTAs before this one.
  __device__ __forceinline__ uint32_t Before() const {
    return greater_before + min(equal_before, num_ties);
  }
};

// Where a thread's selected elements stand in the row's output.
struct Place {
  uint32_t selected;  // bits of this thread's elements
  uint32_t local;     // of the first of them, within this CTA's output
  uint32_t count;     // of this CTA's selected elements
  uint32_t base;      // of this CTA's output, within the row's
};

// The elements of a part that one tile holds, and where they stood against the bracket.
template <typename T>
struct TileSource {
  Run run;
  RunMasks masks;
  uint32_t flip;

  __device__ __forceinline__ int32_t Position(int i) const { return run.position + i; }
  __device__ __forceinline__ uint32_t Key(int i) const { return KeyInRun<T>(run, i, flip); }

  // Where the selected elements go: open elements are compared with the pivot, and one scan of both
  // counts tells their places. One barrier, behind which the open keys are no longer needed.
  __device__ __forceinline__ Place FindPlaces(Cta& cta, const Selection& selection,
                                              bool is_dense) const {
    uint32_t greater = masks.certain;
    uint32_t equal = selection.is_only_key ? masks.open : 0;
    uint32_t open = masks.open & ~equal;
    if (Unlikely(is_dense)) {
      MaskBuilder<T> builder(Bracket{selection.pivot, selection.pivot}, flip);
      PrependRun<T, true>(run, &builder);
      const RunMasks of_all = builder.Masks(open);
      greater |= of_all.certain;
      equal |= of_all.open;
      open = 0;
    }
    const KeyTest<T> test(selection.pivot, flip);
#pragma unroll 1
    while (open != 0) {
      const BitPair pair = TakeBits(&open);
      const uint32_t words[2] = {BitsInRun<T>(run, pair.First()) ^ test.mask,
                                 BitsInRun<T>(run, pair.Second()) ^ test.mask};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (words[i] > test.key) greater |= pair.bits[i];
        if (words[i] == test.key) equal |= pair.bits[i];
      }
    }
    const uint32_t num_equal = __popc(equal);
    const Scan scan = BlockScan(cta, __popc(greater) | num_equal << 16);
    const uint32_t ties_left = selection.TiesLeft();
    const uint32_t equal_before = scan.before >> 16;
    if (Unlikely(equal_before + num_equal > ties_left)) {
      equal = DropLastBits(equal, equal_before + num_equal - ties_left);
    }
    Place place;
    place.selected = greater | equal;
    place.local = (scan.before & 0xffffu) + min(equal_before, ties_left);
    place.count = (scan.total & 0xffffu) + min(scan.total >> 16, ties_left);
    place.base = selection.Before();
    return place;
  }
};

// The elements of a part that was streamed, and what was kept of them. `Deal`: see Dealing.
template <typename T, typename Deal>
struct StreamSource {
  const RowWindow& window;
  Part part;
  ListPool pool;
  PartCounts counts;  // of the CTA
  Bracket bracket;
  uint32_t flip;

  // Gives the CTA's selected elements to sink.Put(place, key, position), or several at once to
  // sink.PutEntries(place of the first, bits of those selected, entries, positions); `place` counts
  // from the CTA's first. Returns how many there are. In: the groups' order, ordered by a barrier.
  // Barriers.
  template <typename Sink>
  __device__ __forceinline__ uint32_t VisitSelected(Cta& cta, const Selection& selection,
                                                    const Sink& sink) const {
    const uint32_t ties_left = selection.TiesLeft();
    // The ties of a single key are not in the lists.
    const uint32_t unlisted_ties = selection.is_only_key ? min(counts.open, ties_left) : 0;
    const uint32_t num_done =
        Unlikely(unlisted_ties != 0) ? VisitTies(cta, selection.pivot, unlisted_ties, sink) : 0;
    uint32_t before = 0;  // greater than the pivot, and equal << 16
    const Deal deal(cta);
#pragma unroll 1
    for (uint32_t turn = 0; turn < deal.num_groups; turn += deal.GroupsPerRound()) {
      const Entries<Deal> entries(cta, pool, deal, turn);
      const uint32_t greater = entries.Where([&](uint32_t key) { return key > selection.pivot; });
      uint32_t equal = entries.Where([&](uint32_t key) { return key == selection.pivot; });
      const Scan scan = BlockScan(cta, __popc(greater) | __popc(equal) << 16);
      const uint32_t sums = before + scan.before;
      before += scan.total;
      const uint32_t equal_before = sums >> 16;
      const uint32_t room = ties_left > equal_before ? ties_left - equal_before : 0;
      const uint32_t num_equal = __popc(equal);
      if (Unlikely(num_equal > room)) equal = DropLastBits(equal, num_equal - room);
      uint32_t selected = greater | equal;
      if (selected == 0) continue;
      uint32_t positions[Deal::kMostEntries] = {};
      deal.ForGroups([&](uint32_t group) { entries.Load(pool.positions, group, positions); });
      uint32_t place = (sums & 0xffffu) + min(equal_before, ties_left);
      for (; Unlikely(place < num_done) && selected != 0; ++place) selected &= selected - 1;
      sink.PutEntries(place + unlisted_ties, selected, entries, positions);
    }
    return (before & 0xffffu) + min(before >> 16, ties_left) + unlisted_ties;
  }

 private:
  // Vectors that a thread reads at once.
  static constexpr int kAtOnce = 4;
  static_assert(kAtOnce * T::kPerVector <= 32, "one bit per element");

  // Reads the part again and emits what is selected there until `ties` elements equal to the pivot
  // are found; these and all that is greater, up to some place behind the last of them. Returns how
  // many greater ones that were. Barriers.
  template <typename Sink>
  __device__ __forceinline__ uint32_t VisitTies(Cta& cta, uint32_t pivot, uint32_t ties,
                                                const Sink& sink) const {
    uint32_t num_greater = 0, num_ties = 0;
#pragma unroll 1
    for (int32_t first = part.first; num_ties < ties && first < part.last;
         first += kThreads * kAtOnce) {
      const int64_t own = int64_t{first} + kAtOnce * cta.thread;
      const auto index = [&](int v) {
        return own + v < part.last ? static_cast<int32_t>(own) + v : -1;
      };
      uint4 vectors[kAtOnce];
      LoadVectors<T>(window, index, vectors);
      uint32_t greater = 0, equal = 0;
#pragma unroll 1
      for (int v = 0; v < kAtOnce; ++v) {
        uint32_t above = 0, same = 0;
#pragma unroll
        for (int i = 0; i < T::kPerVector; ++i) {
          const uint32_t key = T::Key(T::Element(vectors[0], i), flip);
          if (key > pivot) above |= 1u << i;
          if (key == pivot) same |= 1u << i;
        }
        MoveAround(vectors);
        if (index(v) < 0) continue;
        const uint32_t valid = ValidInVector(window, index(v), T::kPerVector);
        greater |= (above & valid) << (v * T::kPerVector);
        equal |= (same & valid) << (v * T::kPerVector);
      }
      const uint32_t num_equal = __popc(equal);
      const Scan scan = BlockScan(cta, __popc(greater) | num_equal << 16);
      const uint32_t equal_before = num_ties + (scan.before >> 16);
      const uint32_t room = ties > equal_before ? ties - equal_before : 0;
      if (num_equal > room) equal = DropLastBits(equal, num_equal - room);
      uint32_t place = num_greater + (scan.before & 0xffffu) + min(equal_before, ties);
      uint32_t selected = greater | equal;
#pragma unroll 1
      for (int v = 0; v < kAtOnce; ++v) {
#pragma unroll
        for (int i = 0; i < T::kPerVector; ++i) {
          if ((selected >> i & 1) == 0) continue;
          const int64_t position = (own + v) * T::kPerVector + i - window.skew;
          sink.Put(place++, T::Key(T::Element(vectors[0], i), flip),
                   static_cast<int32_t>(position));
        }
        selected >>= T::kPerVector;
        MoveUp(vectors);
      }
      num_greater += scan.total & 0xffffu;
      num_ties += scan.total >> 16;
    }
    return num_greater;
  }
};

// The selected elements of a CTA on their way to the first CTA of a sorted row. There they are put
// where they belong; elsewhere they are collected first, and sent by vectors.
struct PairSink {
  uint32_t first;  // place in the row of this CTA's first selected element
  uint32_t head;   // of those before it, how many are in its vector
  uint2* pairs;    // as uint64: ~key above position

  __device__ __forceinline__ PairSink(const Cta& cta, uint32_t first_place)
      : first(first_place),
        head(first_place % 2),
        pairs(reinterpret_cast<uint2*>(cta.own) + head) {}

  __device__ __forceinline__ void Put(uint32_t place, uint32_t key, int32_t position) const {
    pairs[place] = make_uint2(static_cast<uint32_t>(position), ~key);
  }
  // See StreamSource.
  template <typename Deal>
  __device__ __forceinline__ void PutEntries(
      uint32_t place, uint32_t selected, const Entries<Deal>& entries,
      const uint32_t (&positions)[Deal::kMostEntries]) const {
    uint32_t key[Deal::kMostEntries], position[Deal::kMostEntries];
#pragma unroll
    for (uint32_t i = 0; i < Deal::kMostEntries; ++i) {
      key[i] = entries.keys[i];
      position[i] = positions[i];
    }
#pragma unroll 1
    for (; selected != 0; selected >>= 1) {
      if (selected & 1) Put(place++, key[0], static_cast<int32_t>(position[0]));
      MoveUp(key);
      MoveUp(position);
    }
  }

  // Sends this CTA's `count` pairs of the row's `of_row`. A barrier.
  __device__ __forceinline__ void Send(const Cta& cta, uint32_t count, uint32_t of_row) const {
    if (cta.num_active == 1) return;
    MBarrier* barrier = &cta.header->barriers[kWinnersBarrier];
    if (cta.rank == 0) {
      if (cta.thread == 0) BarrierExpect(barrier, (of_row - count) * sizeof(uint2));
      return;
    }
    SyncThreads();  // pairs before their reads
    const uint32_t end = head + count;
    const uint2* from = reinterpret_cast<const uint2*>(cta.own);
    const uint32_t to = RemoteAddress(from + (first - head), 0);
    const uint32_t remote_barrier = RemoteAddress(barrier, 0);
#pragma unroll 1
    for (uint32_t i = 2 * cta.thread; i < end; i += 2 * kThreads) {
      const uint4 both = LoadShared(reinterpret_cast<const uint4*>(from + i));
      const uint32_t remote = to + i * sizeof(uint2);
      if (i >= head && i + 1 < end) {
        SendAsync(remote, both, remote_barrier);
      } else if (i >= head) {
        SendAsync(remote, make_uint2(both.x, both.y), remote_barrier);
      } else if (i + 1 < end) {
        SendAsync(remote + sizeof(uint2), make_uint2(both.z, both.w), remote_barrier);
      }
    }
  }
};

// The bits of an element in the tile in shared memory, by its number there.
template <typename T>
__device__ __forceinline__ uint32_t ElementInTile(const Cta& cta, int32_t number) {
  if constexpr (T::kBytes == 4) {
    return reinterpret_cast<const uint32_t*>(cta.tiles)[number];
  } else {
    return reinterpret_cast<const uint16_t*>(cta.tiles)[number];
  }
}

// What a CTA has to sort.
enum class Unsorted {
  kNothing,
  kPairs,      // in cta.own, or on their way there from other CTAs
  kPositions,  // in cta.own, of elements that lie in the tile
};

// A thread's pairs of a row's `count`. `skew`: number of the tile's element at position 0.
template <typename T, int kTurns>
__device__ __forceinline__ void TakePairs(const Cta& cta, Unsorted unsorted, int count,
                                          int32_t skew, uint32_t flip, OwnPairs<kTurns>* own) {
  const auto* pairs = reinterpret_cast<const uint2*>(cta.own);
  const auto* positions = reinterpret_cast<const int32_t*>(cta.own);
  VisitGroups<kTurns>(count, [&](auto group) {
    if (unsorted == Unsorted::kPairs) {
      own->Load(group, pairs, cta.thread, count);
      return;
    }
    int32_t of[group.kCount];
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      of[i] = positions[min(group.Number(i, cta.thread), count - 1)];
    }
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      own->of[group.kFirst + i] = make_uint2(
          static_cast<uint32_t>(of[i]), T::InvertedKey(ElementInTile<T>(cta, of[i] + skew), flip));
    }
  });
}

// Two sorted pairs to the output.
template <typename T>
__device__ __forceinline__ void StoreTwo(const uint4& both, int number,
                                         const RowOutput<T>& output) {
  reinterpret_cast<uint2*>(output.indices)[number] = make_uint2(both.x, both.z);
  if (output.values == nullptr) return;
  const uint32_t first = T::BitsOfInverted(both.y, output.flip);
  const uint32_t second = T::BitsOfInverted(both.w, output.flip);
  if constexpr (T::kBytes == 4) {
    reinterpret_cast<uint2*>(output.values)[number] = make_uint2(first, second);
  } else {
    reinterpret_cast<uint32_t*>(output.values)[number] = first | second << 16;
  }
}

// Sorts what is selected of a row in its first CTA and writes it.
template <typename T, int kTurns>
__device__ __forceinline__ void SortAndStore(Cta& cta, Unsorted unsorted, int count, int32_t skew,
                                             const RowOutput<T>& output) {
  if (cta.num_active > 1) BarrierWait(&cta.header->barriers[kWinnersBarrier], 0);
  SyncThreads();  // what is sorted before its reads; the last reads of what the sort overwrites
  if (count == 0) return;
  ClearBins(cta);
  OwnPairs<kTurns> own;
  TakePairs<T>(cta, unsorted, count, skew, output.flip, &own);
  const uint2* sorted = SortPairs<T>(cta, own, count, reinterpret_cast<uint2*>(cta.own),
                                     unsorted == Unsorted::kPairs, cta.spare);
  // Two per store where the row's output allows it: of four, lanes would meet in the same banks.
  // All of k = 2048 in one round.
  constexpr int kAtOnce = 3;
  const bool is_aligned = reinterpret_cast<uintptr_t>(output.indices) % sizeof(uint2) == 0 &&
                          reinterpret_cast<uintptr_t>(output.values) % (2 * T::kBytes) == 0;
  const int num_twos = is_aligned ? count / 2 : 0;
  const auto* twos = reinterpret_cast<const uint4*>(sorted);
#pragma unroll 1
  for (int first = cta.thread; first < num_twos; first += kAtOnce * kThreads) {
    uint4 both[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      both[i] = LoadShared(twos + min(first + i * kThreads, num_twos - 1));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads < num_twos) StoreTwo<T>(both[i], first + i * kThreads, output);
    }
  }
#pragma unroll 1
  for (int place = 2 * num_twos + cta.thread; place < count; place += kThreads) {
    const uint2 pair = sorted[place];
    output.indices[place] = static_cast<int32_t>(pair.x);
    if (output.values != nullptr) output.StoreBits(place, T::BitsOfInverted(pair.y, output.flip));
  }
}

// Selected elements of a CTA on their way to the output.
struct Staging {
  int32_t* positions;
  uint32_t* keys;
  bool has_keys;  // there are values

  __device__ __forceinline__ Staging(const Cta& cta, int32_t k, bool has_values)
      : positions(reinterpret_cast<int32_t*>(cta.own)),
        keys(reinterpret_cast<uint32_t*>(cta.own) + k),
        has_keys(has_values) {}

  // See StreamSource.
  __device__ __forceinline__ void Put(uint32_t place, uint32_t key, int32_t position) const {
    positions[place] = position;
    if (Unlikely(has_keys)) keys[place] = key;
  }
  template <typename Deal>
  __device__ __forceinline__ void PutEntries(
      uint32_t place, uint32_t selected, const Entries<Deal>& entries,
      const uint32_t (&entry_positions)[Deal::kMostEntries]) const {
    SharedCursor cursor(positions + place);
    entries.ForEach([&](uint32_t i) {
      cursor.AppendIf(selected & 1u << i, static_cast<int32_t>(entry_positions[i]));
    });
    if (!Unlikely(has_keys)) return;
    SharedCursor key_cursor(reinterpret_cast<int32_t*>(keys) + place);
    entries.ForEach([&](uint32_t i) {
      key_cursor.AppendIf(selected & 1u << i, static_cast<int32_t>(entries.keys[i]));
    });
  }

  // Writes `count` of them, to the output's places from `first` on. One barrier.
  template <typename T>
  __device__ __forceinline__ void Store(const Cta& cta, uint32_t count, uint32_t first,
                                        const RowOutput<T>& output) const {
    SyncThreads();  // staged output before its reads
#pragma unroll 1
    for (uint32_t i = cta.thread; i < count; i += kThreads) {
      output.indices[first + i] = positions[i];
    }
    if (Unlikely(has_keys)) {
#pragma unroll 1
      for (uint32_t i = cta.thread; i < count; i += kThreads) {
        output.StoreBits(static_cast<int32_t>(first + i), T::Bits(keys[i], output.flip));
      }
    }
  }
};

// Writes this CTA's selected elements in ascending position, by way of shared memory.
template <typename T>
__device__ __forceinline__ void StageAndStore(const Cta& cta, const TileSource<T>& source,
                                              const Place& place, const RowOutput<T>& output) {
  constexpr int kPerStep = T::kPerVector;
  const Staging staging(cta, output.k, output.values != nullptr);
  SharedCursor cursor(staging.positions + place.local);
  // A few elements per step, so that dense selections take few steps; gaps are skipped.
#pragma unroll 1
  for (uint32_t left = place.selected, first = 0; left != 0; left >>= kPerStep, first += kPerStep) {
    const int gap = __ffs(left) - 1;
    left >>= gap;
    first += gap;
#pragma unroll
    for (uint32_t i = 0; i < kPerStep; ++i) {
      cursor.AppendIf(left & 1u << i, source.Position(first + i));
    }
  }
  if (Unlikely(staging.has_keys)) {
    uint32_t at = place.local;
#pragma unroll 1
    for (uint32_t left = place.selected; left != 0; left &= left - 1) {
      staging.keys[at++] = source.Key(__ffs(left) - 1);
    }
  }
  staging.Store(cta, place.count, place.base, output);
}

// Writes the selected elements of a tile, of which `num_open` were open; those of a sorted row go
// to its first CTA, see PairSink. In: candidates and staging memory no longer needed by others,
// ordered by a barrier.
template <typename T>
__device__ __forceinline__ void WriteRow(Cta& cta, const TileSource<T>& source,
                                         const Selection& selection, uint32_t num_open,
                                         const RowOutput<T>& output) {
  const Place place = source.FindPlaces(cta, selection, IsDense(num_open));
  if (!output.is_sorted) {
    StageAndStore(cta, source, place, output);
    return;
  }
  const PairSink sink(cta, place.base);
  uint32_t at = place.local;
#pragma unroll 1
  for (uint32_t left = place.selected; left != 0; left &= left - 1) {
    const int i = __ffs(left) - 1;
    sink.Put(at++, source.Key(i), source.Position(i));
  }
  sink.Send(cta, place.count, selection.count);
}

// The same for a streamed part.
template <typename T, typename Deal>
__device__ __forceinline__ void WriteRow(Cta& cta, const StreamSource<T, Deal>& source,
                                         const Selection& selection, uint32_t,
                                         const RowOutput<T>& output) {
  const uint32_t first = selection.Before();
  if (output.is_sorted) {
    const PairSink sink(cta, first);
    sink.Send(cta, source.VisitSelected(cta, selection, sink), selection.count);
    return;
  }
  const Staging staging(cta, output.k, output.values != nullptr);
  const uint32_t count = source.VisitSelected(cta, selection, staging);
  staging.Store(cta, count, first, output);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_WRITE_ROW_CUH_
