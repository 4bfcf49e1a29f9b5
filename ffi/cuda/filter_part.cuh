// Step 2: one pass over a CTA's part of the row that separates it by the bracket.
//
// Elements above the bracket are certain winners (if the bracket is right), those inside it are
// open. Their counts are exact whatever happens to the memory that keeps them; what does not fit is
// counted but not stored, and the caller gives up the bracket then.
//
// A part that one tile holds stays in shared memory and only its open keys are collected. A longer
// part is streamed, and every element at or above the bracket goes to a list as (key, position) in
// ascending position.
//
// Order without sorting: thread t owns consecutive elements of a tile, so a block scan of the
// counts gives every kept element its place. Cost per streamed tile: one pass, one block scan, two
// barriers.

#ifndef JAX_TOPK_CUDA_FILTER_PART_CUH_
#define JAX_TOPK_CUDA_FILTER_PART_CUH_

#include <cstdint>

#include "block.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

struct FilterGoal {
  Bracket bracket;
  uint32_t tie_limit;  // most open elements that are listed if the bracket is a single key
  uint32_t capacity;   // of the list, and of the collected keys
  uint32_t flip;
};

// A run's elements, as bits.
struct RunMasks {
  uint32_t certain;  // above the bracket
  uint32_t open;     // inside it
};

template <typename T>
__device__ __forceinline__ RunMasks MakeMasks(const Run& run, const Bracket& bracket,
                                              uint32_t flip) {
  const RawRange<T> kept(bracket.lowest, flip);
  // Nothing lies above the largest key; its own range is empty, and any will do.
  const bool is_top = bracket.highest == T::kMaxKey;
  const RawRange<T> certain(is_top ? T::kMaxKey : bracket.highest + 1, flip);
  uint32_t kept_mask = 0, certain_mask = 0;
  VisitRun<T>(run, [&](const uint4& vector, int32_t first) {
    uint32_t kept_part = 0, certain_part = 0;
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      const uint32_t bits = T::Element(vector, i);
      if (kept.Contains(bits)) kept_part |= 1u << i;
      if (certain.Contains(bits)) certain_part |= 1u << i;
    }
    kept_mask |= kept_part << first;
    certain_mask |= certain_part << first;
  });
  RunMasks masks;
  masks.certain = is_top ? 0 : certain_mask & run.valid;
  masks.open = kept_mask & run.valid & ~masks.certain;
  return masks;
}

// Collects the run's open keys in cta.own, in any order, and adds the run's counts to the header's
// packed_counts (certain, open << 16: a tile holds fewer than 2^16 elements). The ties of a bracket
// that is a single key are only counted. Ends without a barrier; the header's num_own and
// packed_counts are zero on entry.
template <typename T>
__device__ __forceinline__ void CollectOpenKeys(Cta& cta, const Run& run, const RunMasks& masks,
                                                const FilterGoal& goal) {
  uint32_t open = masks.open;
  const uint32_t num_open = __popc(open);
  const uint32_t packed = WarpSum(__popc(masks.certain) | num_open << 16);
  if (cta.lane == 0 && packed != 0) atomicAdd(&cta.header->packed_counts, packed);
  if (num_open == 0 || goal.bracket.IsSingleKey()) return;
  uint32_t place = atomicAdd(&cta.header->num_own, num_open);
  if (place + num_open > goal.capacity) return;
#pragma unroll 1
  for (; open != 0; open &= open - 1) {
    reinterpret_cast<uint32_t*>(cta.own)[place++] = KeyInRun<T>(run, __ffs(open) - 1, goal.flip);
  }
}

// `bits` without its `count` highest set bits.
__device__ __forceinline__ uint32_t DropLastBits(uint32_t bits, uint32_t count) {
#pragma unroll 1
  for (; bits != 0 && count > 0; --count) bits &= ~(0x80000000u >> __clz(bits));
  return bits;
}

// The streamed part's list so far. `listed` differs from certain + open where the bracket is a
// single key: its open elements are ties, of which the lowest positions win, so that only the first
// `tie_limit` of this CTA are listed and a plateau of equal values does not overflow.
struct ListState {
  PartCounts counts;
  uint32_t listed;
};

// Appends the kept elements of one tile. In: a tile in shared memory, ordered by a barrier. Ends
// without a barrier: the list and the tile are still being accessed.
template <typename T>
__device__ __forceinline__ void FilterTile(Cta& cta, const Run& run, const FilterGoal& goal,
                                           ListState* state) {
  const RunMasks masks = MakeMasks<T>(run, goal.bracket, goal.flip);
  // Both counts in one scan: a tile holds fewer than 2^16 elements.
  const uint32_t num_certain = __popc(masks.certain);
  const uint32_t num_open = __popc(masks.open);
  const Scan scan = BlockScan(cta, num_certain | num_open << 16);
  const uint32_t open_limit = goal.bracket.IsSingleKey() ? goal.tie_limit : 0xffffffffu;
  const uint32_t certain_before = state->counts.certain + (scan.before & 0xffffu);
  const uint32_t open_before = state->counts.open + (scan.before >> 16);
  uint32_t place = certain_before + min(open_before, open_limit);
  state->counts.certain += scan.total & 0xffffu;
  state->counts.open += scan.total >> 16;
  state->listed = state->counts.certain + min(state->counts.open, open_limit);

  uint32_t kept = masks.certain | masks.open;
  if (open_before + num_open > open_limit) {
    kept = masks.certain | DropLastBits(masks.open, open_before + num_open - open_limit);
  }
  if (place + __popc(kept) > goal.capacity) return;
#pragma unroll 1
  for (; kept != 0; kept &= kept - 1) {
    const int32_t i = __ffs(kept) - 1;
    cta.list[place++] =
        make_uint2(KeyInRun<T>(run, i, goal.flip), static_cast<uint32_t>(run.position + i));
  }
}

// Starts copying tile `index` of a part; also commits, so that every tile is one group, even one
// that does not exist.
template <typename T>
__device__ __forceinline__ void StartTile(const Cta& cta, const RowWindow& window, const Part& part,
                                          int32_t index, int slot) {
  const int64_t first = part.first + int64_t{index} * (kThreads * T::kStreamVectors);
  if (first < part.last) {
    const int32_t last = min(static_cast<int32_t>(first) + kThreads * T::kStreamVectors, part.last);
    CopyTile<T>(cta, window, static_cast<int32_t>(first), last,
                cta.tiles + slot * (kThreads * T::kStreamVectors * kVectorBytes));
  }
  CopyAsyncCommit();
}

// Starts the first tiles of a part, to be filtered by FilterStream.
template <typename T>
__device__ __forceinline__ void StartStream(const Cta& cta, const RowWindow& window,
                                            const Part& part, int num_stages) {
#pragma unroll 1
  for (int i = 0; i < num_stages - 1; ++i) StartTile<T>(cta, window, part, i, i);
}

// Filters a part whose first tiles StartStream has started. Ends in a barrier: the list is
// complete, the tiles are dead.
template <typename T>
__device__ __forceinline__ ListState FilterStream(Cta& cta, const RowWindow& window,
                                                  const Part& part, int num_stages,
                                                  const FilterGoal& goal) {
  ListState state{{0, 0}, 0};
  int slot = 0;
#pragma unroll 1
  for (int32_t index = 0;; ++index) {
    const int64_t first = part.first + int64_t{index} * (kThreads * T::kStreamVectors);
    if (first >= part.last) break;
    if (num_stages == 2) {
      CopyAsyncWait<0>();
    } else {
      CopyAsyncWait<2>();
    }
    SyncThreads();  // this tile's copies before its reads; the last tile's reads before its refill
    StartTile<T>(cta, window, part, index + num_stages - 1, slot == 0 ? num_stages - 1 : slot - 1);
    const unsigned char* tile = cta.tiles + slot * (kThreads * T::kStreamVectors * kVectorBytes);
    FilterTile<T>(
        cta,
        MakeRun<T>(cta, window, static_cast<int32_t>(first), part.last, T::kStreamVectors, tile),
        goal, &state);
    slot = slot + 1 == num_stages ? 0 : slot + 1;
  }
  CopyAsyncWait<0>();
  SyncThreads();  // the list before its reads, the last tile before its reuse
  return state;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FILTER_PART_CUH_
