// Step 5: the selected elements of a part, in the order the contract fixes, to the output.
//
// Threads own elements in ascending position, so a scan over "greater than the pivot" and "equal to
// it" gives every selected element its place in ascending order. The output is staged in shared
// memory and stored coalesced: 2048 scattered stores of 4 bytes would cost 1 us. Sorted output goes
// to the row's first CTA, which sorts (key descending, position ascending).

#ifndef JAX_TOPK_CUDA_WRITE_ROW_CUH_
#define JAX_TOPK_CUDA_WRITE_ROW_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"
#include "filter_part.cuh"
#include "row_window.cuh"

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
__device__ __forceinline__ void PadRow(const RowOutput<T> output, int32_t first) {
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

// Sorts ascending in shared memory; `size` is a power of two. Bitonic: log2(size)^2 / 2 steps of
// one barrier each. In and out: ordered by a barrier.
__device__ __forceinline__ void SortPairs(const Cta& cta, uint64_t* pairs, int size) {
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = cta.thread; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        const uint64_t a = pairs[low], b = pairs[low + stride];
        const bool ascending = (low & run) == 0;
        if ((a > b) == ascending) {
          pairs[low] = b;
          pairs[low + stride] = a;
        }
      }
      SyncThreads();  // this step's exchanges before the next step's reads
    }
  }
}

// Which of a thread's elements are greater than the pivot, and which equal to it, as bits.
struct PivotMasks {
  uint32_t greater;
  uint32_t equal;
};

// The elements of a part that one tile holds, and where they stood against the bracket.
template <typename T>
struct TileSource {
  static constexpr int kPerStep = T::kPerVector;
  Run run;
  RunMasks masks;
  uint32_t flip;

  // Only open elements are looked at again.
  __device__ __forceinline__ PivotMasks Against(uint32_t pivot) const {
    PivotMasks result{masks.certain, 0};
#pragma unroll 1
    for (uint32_t left = masks.open; left != 0; left &= left - 1) {
      const uint32_t bit = left & (0 - left);
      const uint32_t key = Key(__ffs(left) - 1);
      if (key > pivot) result.greater |= bit;
      if (key == pivot) result.equal |= bit;
    }
    return result;
  }
  // The same if the pivot is the only key inside the bracket.
  __device__ __forceinline__ PivotMasks AgainstOnlyKey(uint32_t) const {
    return PivotMasks{masks.certain, masks.open};
  }
  __device__ __forceinline__ int32_t Position(int i) const { return run.position + i; }
  __device__ __forceinline__ uint32_t Key(int i) const { return KeyInRun<T>(run, i, flip); }
};

// The kept elements of a part that was streamed: a list of (key, position).
struct ListSource {
  static constexpr int kPerStep = 1;
  const uint2* entries;  // of this thread
  int count;             // at most 32

  __device__ __forceinline__ ListSource(const Cta& cta, uint32_t num_listed) {
    const uint32_t each = (num_listed + kThreads - 1) / kThreads;
    const uint32_t first = min(cta.thread * each, num_listed);
    entries = cta.list + first;
    count = static_cast<int>(min(each, num_listed - first));
  }
  __device__ __forceinline__ PivotMasks Against(uint32_t pivot) const {
    PivotMasks result{0, 0};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint32_t key = entries[i].x;
      if (key > pivot) result.greater |= 1u << i;
      if (key == pivot) result.equal |= 1u << i;
    }
    return result;
  }
  __device__ __forceinline__ PivotMasks AgainstOnlyKey(uint32_t pivot) const {
    return Against(pivot);
  }
  __device__ __forceinline__ int32_t Position(int i) const {
    return static_cast<int32_t>(entries[i].y);
  }
  __device__ __forceinline__ uint32_t Key(int i) const { return entries[i].x; }
};
static_assert((kMaxK + 4096 + kThreads - 1) / kThreads <= 32, "a thread's entries fit one mask");

// What of the row is selected, as seen by one CTA.
struct Selection {
  uint32_t pivot;           // everything greater is selected
  uint32_t num_ties;        // of the row that are selected, lowest positions first
  uint32_t greater_before;  // elements greater than the pivot in the CTAs before this one
  uint32_t equal_before;    // elements equal to it there
  bool is_only_key;         // the pivot is the only key inside the bracket
  uint32_t count;           // selected elements of the row
};

// Where a thread's selected elements stand in the row's output.
struct Place {
  uint32_t selected;  // bits of this thread's elements
  uint32_t local;     // of the first of them, within this CTA's output
  uint32_t count;     // of this CTA's selected elements
  uint32_t base;      // of this CTA's output, within the row's
};

// Selects all that is greater than the pivot and the wanted ties, lowest positions first. One
// barrier.
__device__ __forceinline__ Place SelectPlaces(Cta& cta, const PivotMasks& masks,
                                              const Selection& selection) {
  const uint32_t ties_left =
      selection.num_ties > selection.equal_before ? selection.num_ties - selection.equal_before : 0;
  const uint32_t num_ties = __popc(masks.equal);
  // Greater, and equal << 16: a CTA keeps fewer than 2^16 elements.
  const Scan scan = BlockScan(cta, __popc(masks.greater) | num_ties << 16);
  const uint32_t ties_before = scan.before >> 16;
  Place place;
  place.selected = masks.greater | masks.equal;
  if (Unlikely(ties_before + num_ties > ties_left)) {
    place.selected = masks.greater | DropLastBits(masks.equal, ties_before + num_ties - ties_left);
  }
  place.local = (scan.before & 0xffffu) + min(ties_before, ties_left);
  place.count = (scan.total & 0xffffu) + min(scan.total >> 16, ties_left);
  place.base = selection.greater_before + min(selection.equal_before, selection.num_ties);
  return place;
}

// Sorts a row's selected elements in its first CTA and writes them.
template <typename T, typename Source>
__device__ __forceinline__ void SortSelected(const Cta cta, const Source source, const Place place,
                                             int count, const RowOutput<T> output) {
  uint2* pairs = reinterpret_cast<uint2*>(cta.own);  // as uint64: ~key above position
  const bool is_remote = cta.num_active > 1;
  if (is_remote && cta.rank == 0 && cta.thread == 0) {
    BarrierExpect(&cta.header->winners_barrier, count * sizeof(uint2));
  }
  const uint32_t barrier = is_remote ? RemoteAddress(&cta.header->winners_barrier, 0) : 0;
  const uint32_t to = is_remote ? RemoteAddress(pairs + place.base, 0) : 0;
  uint32_t at = place.local;
#pragma unroll 1
  for (uint32_t left = place.selected; left != 0; left &= left - 1) {
    const int i = __ffs(left) - 1;
    const uint2 pair = make_uint2(static_cast<uint32_t>(source.Position(i)), ~source.Key(i));
    if (is_remote) {
      SendAsync(to + at * sizeof(uint2), pair, barrier);
    } else {
      pairs[at] = pair;
    }
    ++at;
  }
  if (cta.rank != 0) return;
  const int size = count <= 1 ? 1 : 1 << (32 - __clz(count - 1));
#pragma unroll 1
  for (int i = count + cta.thread; i < size; i += kThreads) pairs[i] = make_uint2(~0u, ~0u);
  if (is_remote) BarrierWait(&cta.header->winners_barrier, 0);
  SyncThreads();  // pairs before the sort
  SortPairs(cta, reinterpret_cast<uint64_t*>(pairs), size);
#pragma unroll 1
  for (int i = cta.thread; i < count; i += kThreads) {
    output.Store(i, ~pairs[i].y, static_cast<int32_t>(pairs[i].x));
  }
}

// Writes this CTA's selected elements in ascending position, by way of shared memory.
template <typename T, typename Source>
__device__ __forceinline__ void StageAndStore(Cta& cta, const Source& source, const Place& place,
                                              const RowOutput<T>& output) {
  int32_t* positions = reinterpret_cast<int32_t*>(cta.own);
  uint32_t* keys = reinterpret_cast<uint32_t*>(cta.own) + output.k;
  uint32_t at = place.local;
  // A few elements per step, so that dense selections take few steps.
#pragma unroll 1
  for (uint32_t left = place.selected, first = 0; left != 0;
       left >>= Source::kPerStep, first += Source::kPerStep) {
#pragma unroll
    for (uint32_t i = 0; i < Source::kPerStep; ++i) {
      if (left >> i & 1) positions[at++] = source.Position(first + i);
    }
  }
  if (Unlikely(output.values != nullptr)) {
    at = place.local;
#pragma unroll 1
    for (uint32_t left = place.selected; left != 0; left &= left - 1) {
      keys[at++] = source.Key(__ffs(left) - 1);
    }
  }
  SyncThreads();  // staged output before its reads
#pragma unroll 1
  for (uint32_t i = cta.thread; i < place.count; i += kThreads) {
    output.indices[place.base + i] = positions[i];
  }
  if (Unlikely(output.values != nullptr)) {
#pragma unroll 1
    for (uint32_t i = cta.thread; i < place.count; i += kThreads) {
      output.StoreBits(static_cast<int32_t>(place.base + i), T::Bits(keys[i], output.flip));
    }
  }
}

// Writes this CTA's selected elements; of a sorted row, the first CTA writes all. In: candidates
// and staging memory no longer needed, ordered by a barrier.
template <typename T, typename Source>
__device__ __forceinline__ void WriteRow(Cta& cta, const Source& source, const Selection& selection,
                                         bool is_sorted, const RowOutput<T>& output) {
  const PivotMasks masks = selection.is_only_key ? source.AgainstOnlyKey(selection.pivot)
                                                 : source.Against(selection.pivot);
  const Place place = SelectPlaces(cta, masks, selection);
  if (Unlikely(is_sorted)) {
    SortSelected(cta, source, place, static_cast<int>(selection.count), output);
  } else {
    StageAndStore(cta, source, place, output);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_WRITE_ROW_CUH_
