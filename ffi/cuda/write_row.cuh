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

  __device__ RowOutput(const TopKArgs& args, int64_t row, uint32_t sign_flip)
      : values(args.values == nullptr
                   ? nullptr
                   : static_cast<unsigned char*>(args.values) + row * args.k * T::kBytes),
        indices(args.indices + row * args.k),
        k(args.k),
        flip(sign_flip) {}

  __device__ __forceinline__ void StoreBits(int32_t place, uint32_t bits) const {
    if constexpr (T::kBytes == 4) {
      reinterpret_cast<uint32_t*>(values)[place] = bits;
    } else {
      reinterpret_cast<uint16_t*>(values)[place] = static_cast<uint16_t>(bits);
    }
  }
  __device__ __forceinline__ void Store(int32_t place, uint32_t key, int32_t position) const {
    indices[place] = position;
    if (values != nullptr) StoreBits(place, T::Bits(key, flip));
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

// The open keys of a CTA against the pivot, 32 per entry, as bits.
struct OpenFlags {
  uint32_t greater;
  uint32_t equal;
};

// `bits` from `offset` < 32 on, continued by `next`.
__device__ __forceinline__ uint32_t BitsFrom(uint32_t bits, uint32_t next, uint32_t offset) {
  return offset == 0 ? bits : bits >> offset | next << (32 - offset);
}

// The elements of a part that one tile holds, and where they stood against the bracket.
template <typename T>
struct TileSource {
  Run run;
  TileShare share;
  PartCounts counts;  // of the CTA
  uint32_t flip;
  const uint32_t* open_keys;  // of the CTA, ascending position, unless the bracket is a single key

  __device__ __forceinline__ int32_t Position(int i) const { return run.position + i; }
  __device__ __forceinline__ uint32_t Key(int i) const { return KeyInRun<T>(run, i, flip); }

  // Where the selected elements go. At most one barrier, behind which the open keys are no longer
  // needed.
  __device__ __forceinline__ Place FindPlaces(const Cta& cta, const Selection& selection) const {
    return selection.is_only_key ? PlaceOnlyKey(selection) : PlaceByFlags(cta, selection);
  }

 private:
  __device__ __forceinline__ Place PlaceOnlyKey(const Selection& selection) const {
    const uint32_t ties_left = selection.TiesLeft();
    const uint32_t ties_before = min(share.open_before, ties_left);
    const uint32_t num_ties = __popc(share.masks.open);
    Place place;
    place.selected = share.masks.certain | share.masks.open;
    if (Unlikely(ties_before + num_ties > ties_left)) {
      place.selected =
          share.masks.certain | DropLastBits(share.masks.open, ties_before + num_ties - ties_left);
    }
    place.local = share.certain_before + ties_before;
    place.count = counts.certain + min(counts.open, ties_left);
    place.base = selection.Before();
    return place;
  }

  // The open keys lie in ascending position, so that flags of them, 32 in a word, tell how many
  // before a thread's own are selected.
  __device__ __forceinline__ Place PlaceByFlags(const Cta& cta, const Selection& selection) const {
    OpenFlags* flags = reinterpret_cast<OpenFlags*>(cta.bins);  // no longer needed
    const int num_words = static_cast<int>((counts.open + 31) / 32);
#pragma unroll 1
    for (int word = cta.warp; word < num_words; word += kWarps) {
      const uint32_t entry = 32 * word + cta.lane;
      const uint32_t key = entry < counts.open ? open_keys[entry] : 0;
      const uint32_t greater = WarpBallot(entry < counts.open && key > selection.pivot);
      const uint32_t equal = WarpBallot(entry < counts.open && key == selection.pivot);
      if (cta.lane == 0) flags[word] = OpenFlags{greater, equal};
    }
    SyncThreads();  // flags before their reads
    // Greater, and equal << 16: before the thread's own word, and in all.
    const int own_word = static_cast<int>(share.open_before / 32);
    uint32_t before = 0, total = 0;
#pragma unroll 1
    for (int first = 0; first < num_words; first += 32) {
      const int word = first + cta.lane;
      const OpenFlags of_lane = word < num_words ? flags[word] : OpenFlags{0, 0};
      const uint32_t count = __popc(of_lane.greater) | __popc(of_lane.equal) << 16;
      const uint32_t ahead = WarpInclusiveSum(cta.lane, count) - count;
      const uint32_t of_own_word = WarpBroadcast(ahead, own_word & 31);
      if (own_word >= first && own_word < first + 32) before = total + of_own_word;
      total += WarpSum(count);
    }
    const uint32_t ties_left = selection.TiesLeft();
    Place place;
    place.selected = share.masks.certain;
    place.local = share.certain_before;
    place.count = counts.certain + (total & 0xffffu) + min(total >> 16, ties_left);
    place.base = selection.Before();
    if (own_word >= num_words) {  // nothing open here or behind
      place.local += (total & 0xffffu) + min(total >> 16, ties_left);
      return place;
    }
    const uint32_t offset = share.open_before % 32;
    const OpenFlags own = flags[own_word];
    const OpenFlags next = own_word + 1 < num_words ? flags[own_word + 1] : OpenFlags{0, 0};
    const uint32_t equal_before = (before >> 16) + __popc(own.equal & LowBits(offset));
    place.local +=
        (before & 0xffffu) + __popc(own.greater & LowBits(offset)) + min(equal_before, ties_left);
    const int32_t num_open = __popc(share.masks.open);
    if (num_open == 0) return place;
    const uint32_t greater = BitsFrom(own.greater, next.greater, offset) & LowBits(num_open);
    uint32_t equal = BitsFrom(own.equal, next.equal, offset) & LowBits(num_open);
    const uint32_t num_equal = __popc(equal);
    if (Unlikely(equal_before + num_equal > ties_left)) {
      equal = DropLastBits(equal, equal_before + num_equal - ties_left);
    }
    // From the order of open elements to their places in the run.
    uint32_t left = share.masks.open;
#pragma unroll 1
    for (uint32_t chosen = greater | equal; chosen != 0; chosen >>= 1, left &= left - 1) {
      if (chosen & 1) place.selected |= left & (0 - left);
    }
    return place;
  }
};

// The elements of a part that was streamed, and what was kept of them.
template <typename T>
struct StreamSource {
  const RowWindow& window;
  Part part;
  ListPool pool;
  PartCounts counts;  // of the CTA
  Bracket bracket;
  uint32_t flip;
  const uint32_t* open_keys;

  // Calls emit(place, key, position) for the CTA's selected elements; `place` counts from the CTA's
  // first. Returns how many there are. In: chunks in order, ordered by a barrier. Barriers.
  template <typename Emit>
  __device__ __forceinline__ uint32_t VisitSelected(Cta& cta, const Selection& selection,
                                                    Emit emit) const {
    const uint32_t ties_left = selection.TiesLeft();
    // The ties of a single key are not in the lists.
    const uint32_t unlisted_ties = selection.is_only_key ? min(counts.open, ties_left) : 0;
    const uint32_t num_done =
        Unlikely(unlisted_ties != 0) ? VisitTies(cta, selection.pivot, unlisted_ties, emit) : 0;
    uint32_t before = 0;  // greater than the pivot, and equal << 16
#pragma unroll 1
    for (uint32_t turn = 0; turn < NumChunksTaken(cta, pool); turn += kChunksPerRound) {
      const Entries entries(cta, pool, turn);
      const uint32_t greater = entries.Where([&](uint32_t key) { return key > selection.pivot; });
      uint32_t equal = entries.Where([&](uint32_t key) { return key == selection.pivot; });
      const Scan scan = BlockScan(cta, __popc(greater) | __popc(equal) << 16);
      const uint32_t sums = before + scan.before;
      before += scan.total;
      const uint32_t equal_before = sums >> 16;
      const uint32_t room = ties_left > equal_before ? ties_left - equal_before : 0;
      const uint32_t num_equal = __popc(equal);
      if (Unlikely(num_equal > room)) equal = DropLastBits(equal, num_equal - room);
      const uint32_t selected = greater | equal;
      uint32_t positions[kEntriesPerThread] = {};
      if (selected != 0) LoadWords(pool.positions + entries.first, positions);
      uint32_t place = (sums & 0xffffu) + min(equal_before, ties_left);
#pragma unroll
      for (uint32_t i = 0; i < kEntriesPerThread; ++i) {
        if ((selected >> i & 1) == 0) continue;
        if (place >= num_done) {
          emit(place + unlisted_ties, entries.keys[i], static_cast<int32_t>(positions[i]));
        }
        ++place;
      }
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
  template <typename Emit>
  __device__ __forceinline__ uint32_t VisitTies(Cta& cta, uint32_t pivot, uint32_t ties,
                                                Emit emit) const {
    uint32_t num_greater = 0, num_ties = 0;
#pragma unroll 1
    for (int32_t first = part.first; num_ties < ties && first < part.last;
         first += kThreads * kAtOnce) {
      const int64_t own = int64_t{first} + kAtOnce * cta.thread;
      uint4 vectors[kAtOnce];
      uint32_t greater = 0, equal = 0;
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        vectors[v] = make_uint4(0, 0, 0, 0);
        if (own + v < part.last) vectors[v] = LoadVector<T>(window, static_cast<int32_t>(own) + v);
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        if (own + v >= part.last) continue;
        uint32_t above = 0, same = 0;
#pragma unroll
        for (int i = 0; i < T::kPerVector; ++i) {
          const uint32_t key = T::Key(T::Element(vectors[v], i), flip);
          if (key > pivot) above |= 1u << i;
          if (key == pivot) same |= 1u << i;
        }
        const uint32_t valid = ValidInVector(window, static_cast<int32_t>(own) + v, T::kPerVector);
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
          emit(place++, T::Key(T::Element(vectors[0], i), flip), static_cast<int32_t>(position));
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

// Where the selected elements of a sorted row are collected: in its first CTA.
struct PairSink {
  uint2* pairs;  // as uint64: ~key above position
  uint32_t remote;
  uint32_t remote_barrier;
  bool is_remote;

  PairSink() = default;
  // `first`: the place in the row of this CTA's first selected element; `count`: of the row's.
  __device__ __forceinline__ PairSink(const Cta& cta, uint32_t first, uint32_t count)
      : pairs(reinterpret_cast<uint2*>(cta.own) + first),
        remote(0),
        remote_barrier(0),
        is_remote(cta.num_active > 1) {
    if (!is_remote) return;
    if (cta.rank == 0 && cta.thread == 0) {
      BarrierExpect(&cta.header->winners_barrier, count * sizeof(uint2));
    }
    remote = RemoteAddress(pairs, 0);
    remote_barrier = RemoteAddress(&cta.header->winners_barrier, 0);
  }
  __device__ __forceinline__ void Put(uint32_t place, uint32_t key, int32_t position) const {
    const uint2 pair = make_uint2(static_cast<uint32_t>(position), ~key);
    if (is_remote) {
      SendAsync(remote + place * sizeof(uint2), pair, remote_barrier);
    } else {
      pairs[place] = pair;
    }
  }
};

// Sorts the pairs of a row in its first CTA and writes them. In: pairs of this CTA, or on their way
// from the others.
template <typename T>
__device__ __forceinline__ void SortAndStore(Cta& cta, int count, const RowOutput<T>& output) {
  uint2* pairs = reinterpret_cast<uint2*>(cta.own);
  if (cta.num_active > 1) BarrierWait(&cta.header->winners_barrier, 0);
  SyncThreads();  // pairs before the sort; the last reads of what the sort overwrites
  SortPairs<T>(cta, pairs, reinterpret_cast<uint2*>(cta.spare), count,
               [&](int rank, const uint2& pair) {
                 output.Store(rank, ~pair.y, static_cast<int32_t>(pair.x));
               });
}

// Selected elements of a CTA on their way to the output.
struct Staging {
  int32_t* positions;
  uint32_t* keys;  // if there are values

  __device__ __forceinline__ Staging(const Cta& cta, int32_t k)
      : positions(reinterpret_cast<int32_t*>(cta.own)),
        keys(reinterpret_cast<uint32_t*>(cta.own) + k) {}

  // Writes `count` of them, to the output's places from `first` on. One barrier.
  template <typename T>
  __device__ __forceinline__ void Store(const Cta& cta, uint32_t count, uint32_t first,
                                        const RowOutput<T>& output) const {
    SyncThreads();  // staged output before its reads
#pragma unroll 1
    for (uint32_t i = cta.thread; i < count; i += kThreads) {
      output.indices[first + i] = positions[i];
    }
    if (Unlikely(output.values != nullptr)) {
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
  const Staging staging(cta, output.k);
  uint32_t at = place.local;
  // A few elements per step, so that dense selections take few steps; gaps are skipped.
#pragma unroll 1
  for (uint32_t left = place.selected, first = 0; left != 0; left >>= kPerStep, first += kPerStep) {
    const int gap = __ffs(left) - 1;
    left >>= gap;
    first += gap;
#pragma unroll
    for (uint32_t i = 0; i < kPerStep; ++i) {
      if (left >> i & 1) staging.positions[at++] = source.Position(first + i);
    }
  }
  if (Unlikely(output.values != nullptr)) {
    at = place.local;
#pragma unroll 1
    for (uint32_t left = place.selected; left != 0; left &= left - 1) {
      staging.keys[at++] = source.Key(__ffs(left) - 1);
    }
  }
  staging.Store(cta, place.count, place.base, output);
}

// Writes the selected elements of a tile; those of a sorted row go to its first CTA, see PairSink.
// In: candidates and staging memory no longer needed by others, ordered by a barrier.
template <typename T>
__device__ __forceinline__ void WriteRow(Cta& cta, const TileSource<T>& source,
                                         const Selection& selection, bool is_sorted,
                                         const RowOutput<T>& output) {
  const Place place = source.FindPlaces(cta, selection);
  if (!Unlikely(is_sorted)) {
    StageAndStore(cta, source, place, output);
    return;
  }
  const PairSink sink(cta, place.base, selection.count);
  uint32_t at = place.local;
#pragma unroll 1
  for (uint32_t left = place.selected; left != 0; left &= left - 1) {
    const int i = __ffs(left) - 1;
    sink.Put(at++, source.Key(i), source.Position(i));
  }
}

// The same for a streamed part.
template <typename T>
__device__ __forceinline__ void WriteRow(Cta& cta, const StreamSource<T>& source,
                                         const Selection& selection, bool is_sorted,
                                         const RowOutput<T>& output) {
  const uint32_t first = selection.Before();
  const Staging staging(cta, output.k);
  const bool has_values = output.values != nullptr;
  PairSink sink{};
  if (Unlikely(is_sorted)) sink = PairSink(cta, first, selection.count);
  const uint32_t count =
      source.VisitSelected(cta, selection, [&](uint32_t place, uint32_t key, int32_t position) {
        if (Unlikely(is_sorted)) {
          sink.Put(place, key, position);
          return;
        }
        staging.positions[place] = position;
        if (Unlikely(has_values)) staging.keys[place] = key;
      });
  if (!Unlikely(is_sorted)) staging.Store(cta, count, first, output);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_WRITE_ROW_CUH_
