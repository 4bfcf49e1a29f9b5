// The kernel: one cluster of CTAs per row, one row per cluster.
//
// Per row, on the device, by its length:
//   copy    length <= k: everything is selected
//   short   one CTA holds the row in registers and shared memory and histograms all of it
//   medium  one or several CTAs guess a bracket of keys from a sample; each CTA's part stays in
//           shared memory
//   long    the same, but parts are streamed through shared memory by warps on their own
// Medium and long rows are counted against the bracket, the CTAs exchange exact counts, and the
// guess is verified; where it failed, the exact path narrows the bracket by exact histograms. Then
// the k-th key is found among the few elements inside the bracket, and each CTA writes the selected
// elements of its part. CTAs that a row does not need return at once.
//
// The launch depends on static shapes alone. Nothing outlives the call: no global memory besides
// the operands, so no memset, and a launch is safe in CUDA graphs and beside other launches. CTAs
// may start while the kernel before them in the stream ends, see WaitForKernelsBefore.
// One row per cluster, not a loop over rows: the hardware hands out clusters as CTAs finish, which
// balances rows of mixed lengths, and no state can leak from one row into the next.
//
// Where code lies matters, not in a chain of the same launches but in a decode step, in which other
// kernels have driven the kernel's instructions out of the caches. With a launch the hardware
// fetches the first 64 KB (as measured on an H200); every jump to what lies behind waits for
// memory, 5 to 8 us for a row. So what ordinary rows need comes first: SelectWindow says in which
// order, tests/code_layout.py whether the compiler did it. What few of them need comes behind, in
// one of two ways. In functions that are not inlined; they take copies of what they are given,
// since what a pointer leads to would lie in local memory everywhere (see KnownShared), and return
// what ordinary code goes on with. Or as an end of its own of a path, where a call would take
// registers from a loop: CompleteStreamedRow.

#ifndef JAX_TOPK_CUDA_KERNEL_CUH_
#define JAX_TOPK_CUDA_KERNEL_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "../plan.h"
#include "args.h"
#include "block.cuh"
#include "estimate_bracket.cuh"
#include "exchange.cuh"
#include "filter_part.cuh"
#include "find_pivot.cuh"
#include "narrow_bracket.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"
#include "short_row.cuh"
#include "stream_part.cuh"
#include "write_row.cuh"

namespace jax_topk {

// Makes the CTA reachable for its peers, from the end of ClusterWait on. Called before the CTA's
// loads, for which the fence would wait.
__device__ __forceinline__ void JoinCluster(const Cta& cta) {
  static_assert(kNumBarriers <= kWarps, "a warp for each barrier");
  if (cta.lane == 0 && cta.warp < kNumBarriers) {
    BarrierInit(&cta.header->barriers[cta.warp]);
    BarrierInitFence();
  }
  SyncWarp();
  ClusterArrive();
}

// Prepares the header. The caller puts a barrier between this and its use.
__device__ __forceinline__ void InitHeader(const Cta& cta) {
  SharedHeader* header = cta.header;
  if (cta.thread == kThreads - 1) {  // of a warp that has no barrier to do
    header->num_chunks = 0;
    header->num_own = 0;
    header->ranges[0] = make_uint2(~0u, 0);
    header->ranges[1] = make_uint2(~0u, ~0u);
    header->pivot_key = 0;
    header->pivot_ties = 0;
  }
}

// The CTAs that need all open keys: those that have some, and those between them. The others know
// what is selected before them. But all do if the output is sorted: a CTA that sent its winners at
// once could overwrite open keys of the first one.
__device__ __forceinline__ CtaRange CtasThatSearch(const Cta& cta, const RowCounts& row,
                                                   bool is_sorted) {
  const uint32_t all = LowBits(cta.num_active);
  if (!Unlikely(row.with_open != all) || is_sorted) return CtaRange{0, cta.num_active - 1};
  return CtaRange{__ffs(row.with_open) - 1, 31 - __clz(row.with_open)};
}

// Steps 4 and 5 of a row of more than k elements, once the counts have proved the bracket. In: own
// open keys complete in cta.own, ordered by a barrier.
template <typename T, bool kMayBeSingleKey, typename Source>
__device__ __forceinline__ void FinishRow(Cta& cta, const TopKArgs& args, Source& source,
                                          const Bracket& bracket, const PartCounts& mine,
                                          const RowCounts& row, const RowOutput<T>& output) {
  const uint32_t k = static_cast<uint32_t>(args.k);
  const uint32_t rank = k - row.certain;
  const bool is_single_key = kMayBeSingleKey && bracket.IsSingleKey();
  Selection selection{bracket.lowest, rank, row.certain_before, row.open_before, is_single_key, k};
  if (!is_single_key) {
    const CtaRange ctas = CtasThatSearch(cta, row, output.is_sorted);
    if (Unlikely(cta.rank < ctas.first || cta.rank > ctas.last)) {
      if (cta.rank > ctas.last) selection.greater_before += rank;
      selection.num_ties = selection.equal_before = 0;
    } else {
      Candidates candidates{reinterpret_cast<const uint32_t*>(cta.own), PadToVector(row.open), 0,
                            0};
      bool has_ties = false;
      const bool is_shared = ctas.first != ctas.last;
      const auto look_for_ties = [&] {
        if (mine.open >= 32) has_ties = HasManyTies(candidates.keys, cta.lane);
      };
      if (output.is_sorted) look_for_ties();  // before others may overwrite own open keys
      if (is_shared) SendCandidates(cta, mine, row, ctas, output.is_sorted);
      // While the candidates are on their way.
      const EvenBins bins(Bracket{UseHere(bracket.lowest), UseHere(bracket.highest)});
      if (!output.is_sorted) look_for_ties();
      if (is_shared) {
        AwaitCandidates(cta);
        candidates = Candidates{cta.gathered, row.padded_open, row.padded_open_before,
                                row.padded_open_before - row.open_before};
      }
      auto* kept = reinterpret_cast<uint16_t*>(cta.own + args.layout.kept);
      const bool is_open_above = bracket.highest == T::kMaxKey;
      const Pivot pivot =
          FindPivot(cta, candidates, bins, rank, kept, FirstRound{is_open_above, has_ties});
      selection.pivot = pivot.key;
      selection.num_ties = pivot.num_ties;
      selection.greater_before += pivot.greater_before;
      selection.equal_before = pivot.equal_before;
      // The padding of the shares is zero, which is also the lowest key.
      if (pivot.key == 0) selection.equal_before -= candidates.padding_before;
    }
  }
  WriteRow<T>(cta, source, selection, mine.open, output);
}

// Vectors per thread of a tile of `num_vectors`: odd where it matters, see PlaceInTile.
template <typename T>
__device__ __forceinline__ int32_t VectorsPerThread(int32_t num_vectors) {
  const int32_t each = (num_vectors + kThreads - 1) / kThreads;
  return each == 4 && kMaxRunVectors<T> > 4 ? 5 : each;
}

// The bracket of a long row, before any exact count. The exact path begins with one that counts
// refute: the greatest key alone. So does a row too short for a sample, which only a test sends
// here.
template <typename T>
__device__ __forceinline__ Bracket GuessBracket(Cta& cta, const TopKArgs& args,
                                                const RowWindow& window, Sample<T>& sample,
                                                uint32_t flip) {
  if (Unlikely(args.path == static_cast<int>(Path::kExact) || !sample.HasElements())) {
    return {T::kMaxKey, T::kMaxKey};
  }
  const uint32_t k = static_cast<uint32_t>(args.k);
  const BracketGoal goal = SampleGoal(k, static_cast<uint32_t>(window.length),
                                      sample.num_elements(), args.list_capacity - k);
  return EstimateBracket<T>(cta, window, sample, goal, flip);
}

// Whether exact counts prove that the bracket holds the k-th key and that what is kept of it fits:
// all that is open, unless the bracket is a single key.
__device__ __forceinline__ bool IsProved(const Bracket& bracket, const RowCounts& row, uint32_t k,
                                         uint32_t capacity) {
  const uint32_t kept = bracket.IsSingleKey() ? 0 : row.open;
  return row.certain < k && k <= row.certain + row.open && row.certain + kept <= capacity;
}

// Whether counts say that the k-th key lies above a bracket that is a single key, and that all that
// lies there was kept.
__device__ __forceinline__ bool IsAllAboveKept(const Bracket& bracket, const RowCounts& row,
                                               uint32_t k, uint32_t capacity) {
  return bracket.IsSingleKey() && row.certain >= k && row.certain <= capacity;
}

// A row of which every CTA's part fits one tile: it is read once and stays in shared memory.
template <typename T>
__device__ __forceinline__ void SelectResidentRow(Cta& cta, const TopKArgs& args,
                                                  const RowWindow& window, Sample<T>& sample,
                                                  const Part& part, int32_t per_thread,
                                                  const RowOutput<T>& output) {
  const bool is_spaced = per_thread == kMaxRunVectors<T>;
  CopyTile<T>(cta, window, part.first, part.last, is_spaced, cta.tiles);
  CopyAsyncCommit();
  PlaceCandidates(cta, args, /*has_list=*/false);
  TileSource<T> source{
      MakeRun<T>(cta.thread, window, part.first, part.last, per_thread, is_spaced, cta.tiles),
      {},
      output.flip};
  SyncThreads();  // the cleared histogram before the guess
  Bracket bracket = GuessBracket<T>(cta, args, window, sample, output.flip);
  CopyAsyncWait<0>();
  SyncThreads();  // the tile before its use
  const uint32_t k = static_cast<uint32_t>(args.k);
  const uint32_t capacity = static_cast<uint32_t>(args.list_capacity);
  PartCounts counts;
  RowCounts row;
#pragma unroll 1
  for (uint32_t attempt = 0;; ++attempt) {
    source.masks = MakeMasks<T>(source.run, per_thread, bracket, output.flip);
    counts = CountMasks(cta, source.masks);
    SendCounts(cta, counts, attempt);
    if (!bracket.IsSingleKey() && counts.open <= capacity) {
      CollectOpenKeys<T>(cta, source.run, source.masks.open, counts.open, output.flip);
    }
    row = ReceiveCounts(cta, counts, attempt);
    // A narrowed bracket is right; if counts refute it all the same, the operand has changed
    // meanwhile.
    if (!Unlikely(!IsProved(bracket, row, k, capacity)) || attempt > 0) break;
    SyncThreads();  // the open keys before they are begun anew
    if (cta.thread == 0) cta.header->num_own = 0;
    bracket = NarrowBracket<T>(cta, window, part, output.flip, k, capacity - k,
                               LearnFromFailure<T>(bracket, row, k, window.length));
  }
  SyncThreads();  // open keys before their reads
  FinishRow<T, true>(cta, args, source, bracket, counts, row, output);
}

// What SelectStreamedRow knows of a row that it leaves undone.
struct StreamRest {
  Bracket bracket;
  bool has_counts;    // against it
  PartCounts counts;  // of the CTA
  RowCounts row;
};

// Counts what is kept of a row's stream against the bracket, and puts the lists in order. Ends
// without a barrier.
template <typename T, typename Deal>
__device__ __forceinline__ RowCounts CountStream(Cta& cta, StreamSource<T, Deal>& source,
                                                 const WarpPart& warp, uint32_t attempt) {
  if (cta.lane == 0) cta.header->warp_listed[cta.warp] = warp.num_listed;
  source.counts = SumOverWarps(cta, CountStretch(warp, source.bracket));
  SendCounts(cta, source.counts, attempt);
  OrderGroups<Deal>(cta, source.pool);
  return ReceiveCounts(cta, source.counts, attempt);
}

// Steps 4 and 5 of a streamed row, as FinishRow. `kMayBeSingleKey`: the bracket may be one.
template <typename T, bool kMayBeSingleKey, typename Deal>
__device__ __forceinline__ void FinishStreamedRow(Cta& cta, const TopKArgs& args,
                                                  StreamSource<T, Deal>& source,
                                                  const RowCounts& row,
                                                  const RowOutput<T>& output) {
  SyncThreads();  // the order of the groups before its reads
  if (!kMayBeSingleKey || !source.bracket.IsSingleKey()) {
    CopyOpenKeys<Deal>(cta, source.pool, source.bracket.highest);
    PadOpenKeys(cta, source.counts.open, PadToVector(source.counts.open));
    SyncThreads();  // own open keys before their reads
  }
  FinishRow<T, kMayBeSingleKey>(cta, args, source, source.bracket, source.counts, row, output);
}

// A row whose parts are streamed: elements at or above the bracket are kept in lists. Returns
// whether that is done: not if the guess is no bracket for plain comparisons, or counts refute it.
// See CompleteStreamedRow.
template <typename T, typename Deal>
__device__ __forceinline__ bool SelectStreamedRow(Cta& cta, const TopKArgs& args,
                                                  const RowWindow& window, Sample<T>& sample,
                                                  const Part& part, const RowOutput<T>& output,
                                                  StreamRest* rest) {
  WarpPart warp = MakeWarpPart(cta, part);
  StartStream<T>(cta, window, warp.part, args.num_stages);
  PlaceCandidates(cta, args, /*has_list=*/true);
  SyncThreads();  // the cleared histogram before the guess
  StreamSource<T, Deal> source{window,
                               part,
                               MakeListPool(cta, args.layout),
                               {},
                               GuessBracket<T>(cta, args, window, sample, output.flip),
                               output.flip};
  RowCounts row{};
  const bool is_plain = IsPlain<T>(source.bracket, output.flip);
  if (!Unlikely(!is_plain)) {
    FilterPlainStream<T>(cta, window, source.pool, args.num_stages, source.bracket, output.flip,
                         &warp);
    row = CountStream(cta, source, warp, 0);
    if (!Unlikely(!IsProved(source.bracket, row, static_cast<uint32_t>(args.k),
                            static_cast<uint32_t>(args.list_capacity)))) {
      FinishStreamedRow<T, false>(cta, args, source, row, output);
      return true;
    }
  }
  *rest = StreamRest{source.bracket, is_plain, source.counts, row};
  return false;
}

// Completes what SelectStreamedRow has left undone.
template <typename T, typename Deal>
__device__ __forceinline__ void CompleteStreamedRow(Cta& cta, const TopKArgs& args,
                                                    const RowWindow& window, const Part& part,
                                                    const StreamRest& rest,
                                                    const RowOutput<T>& output) {
  StreamSource<T, Deal> source{window,      part,         MakeListPool(cta, args.layout),
                               rest.counts, rest.bracket, output.flip};
  const uint32_t k = static_cast<uint32_t>(args.k);
  const uint32_t capacity = static_cast<uint32_t>(args.list_capacity);
  RowCounts row = rest.row;
  WarpPart warp = MakeWarpPart(cta, part);  // of which the first tiles have been started
  bool has_counts = rest.has_counts;
#pragma unroll 1
  for (uint32_t attempt = 0;;) {
    if (has_counts) {
      if (IsProved(source.bracket, row, k, capacity)) break;
      // Beside a plateau: then all of it is open.
      if (IsAllAboveKept(source.bracket, row, k, capacity)) {
        source.bracket = Bracket{source.bracket.lowest + 1, T::kMaxKey};
        const PartCounts record = ReceiveRecord(cta, source.counts, attempt);
        row = SumRecords(cta, PartCounts{0, record.certain});
        source.counts = PartCounts{0, source.counts.certain};
        break;
      }
      // A narrowed bracket is right; if counts refute it all the same, the operand has changed
      // meanwhile.
      if (attempt > 0) break;
      attempt = 1;
      SyncThreads();  // the lists' last reads before they are begun anew
      source.bracket =
          NarrowBracket<T>(cta, window, part, output.flip, k, capacity - k,
                           LearnFromStream<T>(source.bracket, row, k, capacity, window.length));
      warp = MakeWarpPart(cta, part);
      StartStream<T>(cta, window, warp.part, args.num_stages);
      if (cta.thread == 0) cta.header->num_chunks = 0;
      SyncThreads();  // the reset before the next lists
    }
    FilterAnyStream<T>(cta, window, source.pool, args.num_stages, source.bracket, output.flip,
                       &warp);
    row = CountStream(cta, source, warp, attempt);
    has_counts = true;
  }
  FinishStreamedRow<T, true>(cta, args, source, row, output);
}

// Vectors of each CTA's part: the row in equal parts, but no part shorter than the plan wants.
__device__ __forceinline__ int32_t VectorsPerCta(const TopKArgs& args, int32_t num_vectors) {
  // Multiplied by the reciprocal rounded up: at least the quotient, and no division.
  const uint32_t each = static_cast<uint32_t>(
      (static_cast<uint64_t>(num_vectors + args.cluster_size - 1) * args.cluster_reciprocal) >> 32);
  return max(static_cast<int32_t>(each), args.part_vectors);
}

// Selects from a row that is not copied. Returns what this CTA has to sort if the output is sorted.
// In the order of the code: rows of few turns; without clusters, of a middle number of turns; with
// clusters, resident rows; streams; all others. What is asked first costs those that are asked
// later up to 0.05 us.
template <typename T, bool kHasClusters>
__device__ __forceinline__ Unsorted SelectWindow(Cta& cta, const TopKArgs& args,
                                                 const RowWindow& window,
                                                 const RowOutput<T>& output) {
  const bool is_forced_short =
      args.path == static_cast<int>(Path::kShort) || window.length <= args.k;
  const int32_t short_vectors = kThreads * (args.uses_large_tile ? kLargeTurns<T> : kMostTurns<T>);
  const bool is_short = (args.path == static_cast<int>(Path::kAuto) || is_forced_short) &&
                        window.num_vectors <= short_vectors;
  const auto has_turns = [&](int turns) {
    return is_short && window.num_vectors <= kThreads * turns;
  };
  if (AsItIs(has_turns(kFewTurns<T>))) {
    if (cta.rank != 0) return Unsorted::kNothing;
    SelectShortRow<T, kFewTurns<T>>(cta, args, window, output);
    return Unsorted::kPositions;
  }
  const bool is_middle = has_turns(kMiddleTurns<T>);
  if (kHasClusters ? Unlikely(is_middle) : AsItIs(is_middle)) {
    if (cta.rank != 0) return Unsorted::kNothing;
    SelectShortRow<T, kMiddleTurns<T>>(cta, args, window, output);
    return Unsorted::kPositions;
  }
  if (Unlikely(is_short)) {
    if (cta.rank != 0) return Unsorted::kNothing;
    if (kMiddleTurns<T> == kMostTurns<T> || window.num_vectors > kThreads * kMostTurns<T>) {
      SelectShortRow<T, kLargeTurns<T>>(cta, args, window, output);
    } else {
      SelectShortRow<T, kMostTurns<T>>(cta, args, window, output);
    }
    return Unsorted::kPositions;
  }
  // Its loads come first: what follows takes as long as they do.
  Sample<T> sample(cta.thread, window);
  int32_t each = window.num_vectors;
  if (kHasClusters) {
    each = VectorsPerCta(args, window.num_vectors);
    // CTAs whose part is not empty.
    cta.num_active = __popc(
        WarpBallot(cta.lane < args.cluster_size && int64_t{each} * cta.lane < window.num_vectors));
    if (cta.rank >= cta.num_active) return Unsorted::kNothing;
  }
  Part part;
  part.first = each * cta.rank;
  part.last = min(part.first + each, window.num_vectors);
  // As many as have a bit each, where two streamed tiles have room, or else as many as one has.
  constexpr int64_t kSpacedBytes = int64_t{kThreads} * kMaxRunVectors<T> * kVectorBytes * 9 / 8;
  static_assert(kSpacedBytes <= 2 * kMaxTileBytes, "where two tiles have room");
  const bool is_resident = each <= kThreads * T::kMaxVectors ||
                           (args.num_stages > 1 && each <= kThreads * kMaxRunVectors<T>);
  // Where each row has one CTA, short rows take a large tile, and resident ones are rare.
  if (kHasClusters ? Unlikely(!is_resident) : !is_resident) {
    StreamRest rest;
    using Deal = Dealing<kHasClusters>;
    if (!SelectStreamedRow<T, Deal>(cta, args, window, sample, part, output, &rest)) {
      CompleteStreamedRow<T, Deal>(cta, args, window, part, rest, output);
    }
  } else {
    SelectResidentRow<T>(cta, args, window, sample, part, VectorsPerThread<T>(each), output);
  }
  return cta.rank == 0 ? Unsorted::kPairs : Unsorted::kNothing;
}

// What the launch fixes for all rows is fixed when the kernel is compiled: whether rows are sorted,
// and how many pairs of theirs a thread has at most, or 0; several CTAs per row or one. One kernel
// for all launches takes 2 to 6 % longer.
template <typename T, int kPairTurns, bool kHasClusters>
__device__ __forceinline__ void SelectRow(const TopKArgs& args) {
  constexpr bool kIsSorted = kPairTurns > 0;
  AllowNextKernel();
  // What needs no global memory comes before the wait.
  const uint32_t row = RowIndex();
  Cta cta = MakeCta(args, kHasClusters ? ClusterRank() : 0);
  InitHeader(cta);
  if (kHasClusters) JoinCluster(cta);
  const unsigned char* row_begin =
      static_cast<const unsigned char*>(args.operand) + ElementsBefore(row, args.width) * T::kBytes;
  RowOutput<T> output(args, row, T::SignFlip(args.is_smallest), kIsSorted);
  ComputeHere(row_begin);
  ComputeHere(output.indices);
  const int32_t* start_at = args.starts + row;
  const int32_t* length_at = args.lengths + row;
  WaitForKernelsBefore(start_at, length_at);
  const int32_t raw_start = LoadWord(start_at);
  const int32_t raw_length = LoadWord(length_at);
  // While the length is on its way: where kernels do not overlap, whatever comes before its load
  // delays the row.
  ClearBins(cta);
  // By CTAs that leave next, too: one that has arrived and left might be counted twice, and the
  // others would go on too early.
  if (kHasClusters) ClusterWait();
  // Clamped to the row: any int32 is legal.
  const int32_t start = min(max(raw_start, 0), args.width);
  const int32_t length = min(max(raw_length, 0), args.width - start);
  const bool is_copy = length <= args.k && !kIsSorted;
  if (is_copy) {
    if (cta.rank != 0) return;
    CopyIndices(length, output.indices, args.k);
    if (output.values == nullptr) return;
  }
  const RowWindow window = args.are_rows_aligned && start == 0
                               ? MakeAlignedWindow<T>(row_begin, length)
                               : MakeWindow<T>(args, row_begin, start, length);
  if (Unlikely(is_copy)) {
    CopyValues(window, output);
    return;
  }
  const Unsorted unsorted = SelectWindow<T, kHasClusters>(cta, args, window, output);
  if constexpr (kIsSorted) {
    if (unsorted == Unsorted::kNothing) return;
    const int32_t count = min(length, args.k);
    SortAndStore<T, kPairTurns>(cta, unsorted, count, window.skew, output);
    if (count < args.k) PadRow(output, count);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_KERNEL_CUH_
