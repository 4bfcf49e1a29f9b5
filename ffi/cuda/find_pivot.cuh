// Step 4: the exact k-th largest key among the open elements, and how many of its ties are wanted.
//
// The open keys are spread evenly over bins, each of which keeps where its keys lie. One warp finds
// the bin of the wanted rank and compares its few keys with each other; ordinary data needs no
// more. A bin that has no room for all its keys is spread in its turn, until it is a single key.
// Cost: one pass over the candidates and two barriers. The open keys of a short row are found by
// short_row.cuh; few of them are compared with each other here, for one barrier.

#ifndef JAX_TOPK_CUDA_FIND_PIVOT_CUH_
#define JAX_TOPK_CUDA_FIND_PIVOT_CUH_

#include <cstdint>

#include "block.cuh"

namespace jax_topk {

// The k-th key of a row, and how many of its ties are selected.
struct Pivot {
  uint32_t key;
  uint32_t num_ties;        // elements equal to the key that are selected, lowest positions first
  uint32_t greater_before;  // among the first `num_before` candidates
  uint32_t equal_before;    // padding too, if the key is zero
};

// The candidates to search: `count` keys in shared memory, among them all open keys of the row. A
// multiple of 4 at a multiple of 16 bytes; the rest is zeros, the lowest key.
struct Candidates {
  const uint32_t* keys;
  uint32_t count;
  uint32_t num_before;      // the first so many belong to the CTAs before this one
  uint32_t padding_before;  // zeros among these
};

// Counts of a bin of spread keys, in one word: all of them above the half of those that belong to
// the CTAs before this one. Each comes to fewer than 2^16.
constexpr uint32_t kOneSpread = 1u << 16;
__device__ __forceinline__ uint32_t AllSpread(uint32_t counts) { return counts >> 16; }
__device__ __forceinline__ uint32_t SpreadBefore(uint32_t counts) { return counts & 0xffffu; }

// How many keys are greater than a key, and how many are not smaller.
struct KeysAhead {
  uint32_t greater = 0, reached = 0;

  // By sums that carry if other > key, and if other >= key > 0.
  __device__ __forceinline__ void Count(const uint4& others, uint32_t key) {
    greater = CountCarry(greater, others.x, ~key);
    reached = CountCarry(reached, others.x, 0u - key);
    greater = CountCarry(greater, others.y, ~key);
    reached = CountCarry(reached, others.y, 0u - key);
    greater = CountCarry(greater, others.z, ~key);
    reached = CountCarry(reached, others.z, 0u - key);
    greater = CountCarry(greater, others.w, ~key);
    reached = CountCarry(reached, others.w, 0u - key);
  }
};

// The key of a rank among few.
struct DirectPivot {
  uint32_t key;
  uint32_t num_ties;   // as in Pivot
  uint32_t num_equal;  // keys equal to it
};

// Ranks `count` <= kMaxDirect keys in shared memory, by four threads each: whole chunks of
// kDirectChunk, ordered by a barrier, with zeros behind the last key. None of the keys is zero. In:
// the header's pivot is zero. One barrier.
__device__ __forceinline__ DirectPivot RankDirectly(const Cta& cta, const uint32_t* keys,
                                                    uint32_t count, uint32_t rank) {
  static_assert(kThreadsPerCandidate == 4, "two steps sum the shares");
  constexpr uint32_t kPerWarp = 32 / kThreadsPerCandidate;
  constexpr uint32_t kVectors = kDirectChunk / 4 / kThreadsPerCandidate;  // of a chunk, per thread
  static_assert(kVectors * 4 * kThreadsPerCandidate == kDirectChunk, "whole vectors");
  const uint32_t thread = static_cast<uint32_t>(UseHere(cta.thread));
  if (thread / 32 * kPerWarp < count) {  // the whole warp
    const uint32_t own = thread / kThreadsPerCandidate;
    const uint32_t share = thread % kThreadsPerCandidate;
    const uint32_t key = keys[own];
    KeysAhead of_share;
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += kDirectChunk) {
      const auto* vectors = reinterpret_cast<const uint4*>(keys + first) + share;
      uint4 others[kVectors];
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) {
        others[i] = LoadShared(vectors + i * kThreadsPerCandidate);
      }
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) of_share.Count(others[i], key);
    }
    // Greater ones, and not smaller ones << 16.
    uint32_t ahead = of_share.greater | of_share.reached << 16;
    ahead += WarpShiftUp(ahead, 1);
    ahead += WarpShiftUp(ahead, 2);
    const uint32_t greater = ahead & 0xffffu;
    const bool has_sum = share == kThreadsPerCandidate - 1;
    if (has_sum && greater < rank && rank <= ahead >> 16) {
      // Several if the pivot has ties, all with the same news.
      RaiseTo(&cta.header->pivot_key, key);
      RaiseTo(&cta.header->pivot_ties, (rank - greater) | ((ahead >> 16) - greater) << 16);
    }
  }
  SyncThreads();  // the pivot before its reads
  const uint32_t ties = cta.header->pivot_ties;
  return DirectPivot{cta.header->pivot_key, ties & 0xffffu, ties >> 16};
}

// Splits a bracket of several keys into kPivotBins parts, as even as whole numbers allow. Fewer
// keys than that are parts by themselves.
struct EvenBins {
  uint32_t highest, range;
  int shift;       // until the range fills a word
  uint32_t scale;  // from there to bins

  __device__ __forceinline__ explicit EvenBins(const Bracket& bracket)
      : highest(bracket.highest), range(bracket.highest - bracket.lowest) {
    shift = __clz(static_cast<int>(range));
    // kPivotBins 2^32 / range, rounded down by more than the division may be wrong, so that the
    // last bin is below kPivotBins; and no less than that, so that few keys have a bin each.
    const float width = static_cast<float>((range << shift >> 16) + 1);
    constexpr float kNumerator = 0.9999f * (kPivotBins << 16);
    scale = max(static_cast<uint32_t>(FastDivide(kNumerator, width)), uint32_t{kPivotBins});
  }
  __device__ __forceinline__ bool Contains(uint32_t key) const { return highest - key <= range; }
  __device__ __forceinline__ uint32_t FromTop(uint32_t key) const { return OfDepth(highest - key); }
  __device__ __forceinline__ uint32_t FromTopOrLast(uint32_t key) const {
    return OfDepth(min(highest - key, range));
  }
  __device__ __forceinline__ uint32_t Lowest() const { return highest - range; }
  __device__ __forceinline__ bool HasKeyPerBin() const { return range < kPivotBins; }
  // Ties of a bin's only key in the CTAs before, of the bin's counts. `padding_before`: zeros that
  // were counted there in the last bin; ties too if that is the key.
  __device__ __forceinline__ uint32_t TiesBefore(uint32_t counts, uint32_t key,
                                                 uint32_t padding_before) const {
    return SpreadBefore(counts) - (key == Lowest() && key != 0 ? padding_before : 0);
  }
  // The keys of a bin.
  __device__ __forceinline__ Bracket Keys(uint32_t bin) const {
    const uint32_t first = bin == 0 ? 0 : LastDepth(bin - 1) + 1;
    return Bracket{highest - min(LastDepth(bin), range), highest - first};
  }

 private:
  __device__ __forceinline__ uint32_t OfDepth(uint32_t depth) const {
    return UpperProduct(depth << shift, scale);
  }
  // The greatest depth of a bin or those before it: a product with `scale` below (bin + 1) 2^32.
  // The quotient of two words, upper half first, since bin < scale.
  __device__ __forceinline__ uint32_t LastDepth(uint32_t bin) const {
    const uint32_t upper = bin << 16 | 0xffffu;
    const uint32_t lower = upper % scale << 16 | 0xffffu;
    return (upper / scale << 16 | lower / scale) >> shift;
  }
};

// The bracket of bins that has no upper end ends at the greatest candidate instead, or the keys
// would share few of the bins. Of several keys. In: the header's pivot is zero. One barrier.
__device__ __forceinline__ Bracket UpToGreatest(const Cta& cta, const Candidates& candidates,
                                                const EvenBins& bins) {
  uint32_t highest = 0;
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    const uint4 keys = LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first));
    highest = max(max(max(keys.x, keys.y), max(keys.z, keys.w)), highest);
  }
  highest = WarpMax(highest);
  if (cta.lane == 0) RaiseTo(&cta.header->pivot_key, highest);
  SyncThreads();  // the maxima before their reads
  return Bracket{bins.Lowest(), max(cta.header->pivot_key, bins.Lowest() + 1)};
}

__device__ __forceinline__ uint32_t KeptSlot(uint32_t bin, uint32_t place) {
  return place * kKeptStride + bin;
}

// Keeps the number of a candidate in its bin, if there is room. `before`: the bin's counts without
// it.
__device__ __forceinline__ void KeepCandidate(uint32_t before, uint32_t bin, uint32_t number,
                                              uint16_t* kept) {
  const uint32_t place = AllSpread(before);
  if (place < kKeptPerBin) kept[KeptSlot(bin, place)] = static_cast<uint16_t>(number);
}

// Spreads all candidates over bins of their bracket. What lies outside is padding, zeros that go to
// the last bin, behind the keys that are there. In: the counts are zero, ordered by a barrier.
__device__ __forceinline__ void SpreadCandidates(const Cta& cta, const Candidates& candidates,
                                                 const EvenBins& bins, uint16_t* kept) {
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    const uint4 vector = LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first));
    const uint32_t keys[4] = {vector.x, vector.y, vector.z, vector.w};
    // A vector belongs to one CTA.
    const uint32_t one = kOneSpread + (first < candidates.num_before ? 1 : 0);
    uint32_t bin[4], before[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bin[i] = bins.FromTopOrLast(keys[i]);
      before[i] = FetchAndAdd(&cta.bins[bin[i]], one);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) KeepCandidate(before[i], bin[i], first + i, kept);
  }
}

// Spreads those of the candidates that lie inside a bracket, again: few, and few rows.
__device__ __forceinline__ void SpreadInside(const Cta& cta, const Candidates& candidates,
                                             const EvenBins& bins, uint16_t* kept) {
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    const uint4 keys = LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first));
    const uint32_t one = kOneSpread + (first < candidates.num_before ? 1 : 0);
    uint32_t inside = (bins.Contains(keys.x) ? 1 : 0) | (bins.Contains(keys.y) ? 2 : 0) |
                      (bins.Contains(keys.z) ? 4 : 0) | (bins.Contains(keys.w) ? 8 : 0);
#pragma unroll 1
    for (; inside != 0; inside &= inside - 1) {
      const uint32_t number = first + __ffs(inside) - 1;
      const uint32_t bin = bins.FromTop(candidates.keys[number]);
      KeepCandidate(FetchAndAdd(&cta.bins[bin], one), bin, number, kept);
    }
  }
}

// Counts the candidates inside a bracket without keeping any: of many ties, counts that ask for no
// place are faster.
__device__ __forceinline__ void CountCandidates(const Cta& cta, const Candidates& candidates,
                                                const EvenBins& bins) {
  uint32_t* before = cta.bins + kPivotBins;  // counts of the CTAs before this one, apart
#pragma unroll 1
  for (uint32_t first = 4 * cta.thread; first < candidates.count; first += 4 * kThreads) {
    const uint4 keys = LoadShared(reinterpret_cast<const uint4*>(candidates.keys + first));
    uint32_t* counts = first < candidates.num_before ? before : cta.bins;
    const auto count = [&](uint32_t key) {
      atomicAdd(bins.Contains(key) ? &counts[bins.FromTop(key)] : &cta.bins[kBins], 1u);
    };
    count(keys.x);
    count(keys.y);
    count(keys.z);
    count(keys.w);
  }
  SyncThreads();  // counts before their sums
  if (cta.thread < kPivotBins) {
    cta.bins[cta.thread] =
        (cta.bins[cta.thread] + before[cta.thread]) * kOneSpread + before[cta.thread];
    before[cta.thread] = 0;
  }
}

// Whether many of a list's first keys, at least 32, are ties of the one before.
__device__ __forceinline__ bool HasManyTies(const uint32_t* keys, int lane) {
  constexpr int kMany = 6;
  const uint32_t key = keys[lane];
  const uint32_t before = WarpShiftUp(key, 1);
  return __popc(WarpBallot(lane > 0 && key == before)) >= kMany;
}

// The bin of a rank, and the counts of the bins above it.
struct SpreadBin {
  uint32_t bin;
  uint32_t above;
};

// Finds the bin of a rank (1-based, from the top), by one warp: all warps together would take
// longer for it, since they share the units for shuffles and shared memory. A rank behind all
// candidates means that the operand has changed meanwhile: the last bin will do.
__device__ __forceinline__ SpreadBin FindSpreadBin(const uint32_t* bins, int lane, uint32_t rank) {
  const BinCounts counts(bins, lane);
  const uint32_t before = WarpInclusiveSum(lane, counts.sum) - counts.sum;
  // The counts above a bin are at most this if its first key has the rank or comes before it.
  const uint32_t limit = rank * kOneSpread - 1;
  const uint32_t own_limit = limit - before;  // of use where that is not negative
  uint32_t above = 0, next = 0, bin = 0;
#pragma unroll
  for (int i = 0; i + 1 < kBinsPerThread; ++i) {
    next += counts.of[i];
    bin = next <= own_limit ? i + 1 : bin;
    above = next <= own_limit ? next : above;
  }
  // By one shuffle: fewer than k <= kMaxK candidates are above.
  static_assert(kMaxK <= 1 << 12 && kBinsPerThread == 1 << 3,
                "a half and 12 bits, 3 bits in between");
  const int holder = 31 - __clz(WarpBallot(before <= limit));
  const uint32_t found = WarpBroadcast((before + above) | bin << 12, holder);
  return SpreadBin{kBinsPerThread * static_cast<uint32_t>(holder) + (found >> 12 & 7),
                   found & ~(7u << 12)};
}

// How many of the keys of the first `count` lanes are greater than this one. The others have zero.
__device__ __forceinline__ uint32_t GreaterInWarp(uint32_t key, uint32_t count) {
  constexpr int kAtOnce = 8;
  uint32_t greater = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kAtOnce) {
    uint32_t others[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      others[i] = WarpBroadcast(key, static_cast<int>(first) + i);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) greater = CountCarry(greater, others[i], ~key);
  }
  return greater;
}

// What the search tells all threads, in one vector: the key of the rank, or its bin, which had no
// room for all its keys.
struct SpreadResult {
  __device__ __forceinline__ static uint4 OfPivot(const Pivot& pivot) {
    return make_uint4(pivot.key, pivot.num_ties, pivot.greater_before | pivot.equal_before << 16,
                      0);
  }
  // `greater_before`: in the bins above those of this round.
  __device__ __forceinline__ static Pivot ToPivot(const uint4& found, uint32_t greater_before) {
    return Pivot{found.x, found.y, greater_before + (found.z & 0xffffu), found.z >> 16};
  }
  __device__ __forceinline__ static uint4 OfBin(const SpreadBin& found, uint32_t inside) {
    return make_uint4(found.bin, found.above, inside, 1);
  }
};

// Finds the candidate of a rank among spread ones, by one warp. `kept`: null if none is.
// `padding_before`: as TiesBefore.
__device__ __forceinline__ uint4 SearchSpread(const Cta& cta, const Candidates& candidates,
                                              const EvenBins& bins, const uint16_t* kept,
                                              uint32_t padding_before, uint32_t rank) {
  const int lane = UseHere(cta.lane);
  const SpreadBin found = FindSpreadBin(cta.bins, lane, rank);
  const uint32_t inside = cta.bins[found.bin];
  const uint32_t count = AllSpread(inside);
  if (Unlikely(kept == nullptr || count > kKeptPerBin)) {
    if (kept == nullptr || !bins.HasKeyPerBin()) return SpreadResult::OfBin(found, inside);
    // All are ties, but for padding in the last bin. Frequent where keys have 16 bits.
    const uint32_t key = max(candidates.keys[kept[KeptSlot(found.bin, 0)]], bins.Lowest());
    return SpreadResult::OfPivot(Pivot{key, rank - AllSpread(found.above),
                                       SpreadBefore(found.above),
                                       bins.TiesBefore(inside, key, padding_before)});
  }
  // A lane without a key has zero, greater than none, and belongs to none of the CTAs before.
  uint32_t number = candidates.count, key = 0;
  if (static_cast<uint32_t>(lane) < count) {
    number = kept[KeptSlot(found.bin, static_cast<uint32_t>(lane))];
    key = candidates.keys[number];
  }
  // The lowest key that fewer than `inner_rank` others exceed.
  const uint32_t inner_rank = rank - AllSpread(found.above);
  const bool is_ahead = GreaterInWarp(key, count) < inner_rank;
  const uint32_t pivot_key = WarpMin(is_ahead && number != candidates.count ? key : ~0u);
  const uint32_t greater = WarpBallot(key > pivot_key);
  const uint32_t before = WarpBallot(number < candidates.num_before);
  const uint32_t equal = WarpBallot(key == pivot_key);
  return SpreadResult::OfPivot(Pivot{pivot_key, inner_rank - __popc(greater),
                                     SpreadBefore(found.above) + __popc(greater & before),
                                     static_cast<uint32_t>(__popc(equal & before))});
}

// The same for all threads. In: spread candidates, not yet ordered. Two barriers.
__device__ __forceinline__ uint4 FindSpread(const Cta& cta, const Candidates& candidates,
                                            const EvenBins& bins, const uint16_t* kept,
                                            uint32_t padding_before, uint32_t rank) {
  SyncThreads();  // the spread candidates before their search
  if (cta.warp == 0) {
    const uint4 result = SearchSpread(cta, candidates, bins, kept, padding_before, rank);
    if (cta.lane == 0) cta.header->found[0] = result;
  }
  SyncThreads();  // the result before its reads
  return LoadShared(&cta.header->found[0]);
}

// What is special about the first round of a search.
struct FirstRound {
  bool is_open_above;  // the bracket has no upper end
  bool has_ties;       // many, perhaps
};

// Goes on with a search, out of the way of ordinary rows, which need one round. `found`: the result
// of that round, or zero if it is still to come. Otherwise as FindPivot.
static __device__ __noinline__ Pivot FindPivotInRounds(Cta cta, Candidates candidates,
                                                       EvenBins bins, uint32_t rank, uint16_t* kept,
                                                       FirstRound first, uint4 found) {
  cta = KnownShared(cta);
  candidates.keys = KnownShared(candidates.keys);
  kept = KnownShared(kept);
  uint32_t greater_before = 0;
  bool is_first = found.w == 0, counts_only = first.has_ties;
  uint32_t padding_before = counts_only ? 0 : candidates.padding_before;
  if (first.is_open_above) bins = EvenBins(UpToGreatest(cta, candidates, bins));
#pragma unroll 1
  while (true) {
    if (found.w == 0) {
      if (counts_only) {
        CountCandidates(cta, candidates, bins);
      } else if (is_first) {
        SpreadCandidates(cta, candidates, bins, kept);
      } else {
        SpreadInside(cta, candidates, bins, kept);
      }
      found = FindSpread(cta, candidates, bins, counts_only ? nullptr : kept, padding_before, rank);
      if (found.w == 0) return SpreadResult::ToPivot(found, greater_before);
    }
    const Bracket bracket = bins.Keys(found.x);
    rank -= AllSpread(found.y);
    greater_before += SpreadBefore(found.y);
    if (bracket.IsSingleKey()) {
      return Pivot{bracket.lowest, rank, greater_before,
                   bins.TiesBefore(found.z, bracket.lowest, padding_before)};
    }
    bins = EvenBins(bracket);
    is_first = false;
    padding_before = 0;
    counts_only = first.has_ties && AllSpread(found.z) > 4 * kKeptPerBin;
    found.w = 0;
    if (cta.thread < kPivotBins) cta.bins[cta.thread] = 0;
    SyncThreads();  // the cleared counts before their use
  }
}

// Finds the key of 1-based rank `rank` among the candidates inside the bracket. In: candidates
// ordered by a barrier; the histogram and the header's pivot are zero. Ends after a barrier behind
// which candidates and histogram are no longer needed. `bins`: of the bracket. `kept`: room for
// kKeptBytes.
__device__ __forceinline__ Pivot FindPivot(const Cta& cta, const Candidates& candidates,
                                           const EvenBins& bins, uint32_t rank, uint16_t* kept,
                                           FirstRound first) {
  uint4 found = make_uint4(0, 0, 0, 0);
  if (!Unlikely(first.is_open_above || first.has_ties)) {
    SpreadCandidates(cta, candidates, bins, kept);
    found = FindSpread(cta, candidates, bins, kept, candidates.padding_before, rank);
    if (!Unlikely(found.w != 0)) return SpreadResult::ToPivot(found, 0);
  }
  return FindPivotInRounds(cta, candidates, bins, rank, kept, first, found);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FIND_PIVOT_CUH_
