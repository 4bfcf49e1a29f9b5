// Sorted output: a row's selected elements, best first, by one CTA.
//
// Counts the pairs by 16384 bins of four bits, places every pair in its bin by an exclusive scan,
// and sorts the few bins that hold several, a thread each. Bins are even in key; if keys span too
// many octaves, around zero most of all, even in value, or in key without the octaves around zero.
// Where there are bins between two keys (keys of 16 bits, also as float32, or small integers), they
// divide equal ones by their numbers. If a bin overflows all the same, the pairs of the highest and
// the lowest key, which need no comparing, get bins of their own (infinities, or a plateau that k
// cuts), the others are spread anew, and if that does not help, a bitonic sort takes over, with
// log2(k)^2 / 2 steps of one barrier each.

#ifndef JAX_TOPK_CUDA_SORT_PAIRS_CUH_
#define JAX_TOPK_CUDA_SORT_PAIRS_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"
#include "ordered_key.cuh"

namespace jax_topk {

// A pair is (position, ~key): as a 64-bit number, ~key above position, ascending is best first.
__device__ __forceinline__ bool IsBetter(const uint2& a, const uint2& b) {
  return (uint64_t{a.y} << 32 | a.x) < (uint64_t{b.y} << 32 | b.x);
}

// Sorts ascending in shared memory; `size` is a power of two. In and out: ordered by a barrier.
__device__ __forceinline__ void SortBitonic(const Cta& cta, uint2* pairs, int size) {
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int i = cta.thread; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        const uint2 a = pairs[low], b = pairs[low + stride];
        const bool is_ascending = (low & run) == 0;
        if (IsBetter(b, a) == is_ascending) {
          pairs[low] = b;
          pairs[low + stride] = a;
        }
      }
      SyncThreads();  // this step's exchanges before the next step's reads
    }
  }
}

__device__ __forceinline__ void Exchange(uint2* better, uint2* worse) {
  const uint2 a = *better, b = *worse;
  const bool swaps = IsBetter(b, a);
  *better = swaps ? b : a;
  *worse = swaps ? a : b;
}

// Sorts the pairs of one bin, by one thread.
__device__ __forceinline__ void SortBin(uint2* bin, int count) {
  if (Unlikely(count > 4)) {
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const uint2 pair = bin[i];
      int place = i;
#pragma unroll 1
      for (; place > 0; --place) {
        const uint2 before = bin[place - 1];
        if (!IsBetter(pair, before)) break;
        bin[place] = before;
      }
      bin[place] = pair;
    }
    return;
  }
  uint2 of[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) of[i] = i < count ? bin[i] : make_uint2(~0u, ~0u);
  Exchange(&of[0], &of[1]);
  Exchange(&of[2], &of[3]);
  Exchange(&of[0], &of[2]);
  Exchange(&of[1], &of[3]);
  Exchange(&of[1], &of[2]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) bin[i] = of[i];
  }
}

// Threads take the pairs in turns, some of them together: a group's loads come before its stores,
// and no branch lies between its turns, whose instructions the compiler mixes.
constexpr int kPairTurns = (kMaxK + kThreads - 1) / kThreads;
template <int kFirstTurn, int kEndTurn>
struct TurnGroup {
  static constexpr int kFirst = kFirstTurn, kCount = kEndTurn - kFirstTurn;
  // Of a thread's pair in the group's turn i.
  __device__ __forceinline__ static int Number(int i, int thread) {
    return (kFirst + i) * kThreads + thread;
  }
};
// Calls visit(group) for the turns that `count` pairs need, or some more.
template <typename Visit>
__device__ __forceinline__ void VisitGroups(int count, Visit visit) {
  constexpr int kMany = 6;  // turns of k = 2048
  if (count <= kThreads) {
    visit(TurnGroup<0, 1>());
    return;
  }
  visit(TurnGroup<0, kMany>());
  if (Unlikely(count > kMany * kThreads)) visit(TurnGroup<kMany, kPairTurns>());
}

// Bins of pairs: eight to a word of the histogram.
constexpr int kLogPairBins = 14;
constexpr uint32_t kPairBins = 1u << kLogPairBins;
static_assert(kPairBins == 8 * kBins, "eight to a word");
constexpr uint32_t kMaxPerBin = 15;

// `base` and a word's eight counts, summed.
__device__ __forceinline__ uint32_t AddCounts(uint32_t base, uint32_t word) {
  return AddBytes(AddBytes(base, word & 0x0f0f0f0fu), word >> 4 & 0x0f0f0f0fu);
}

// What is known of some pairs' keys.
struct Keys {
  Bracket range;
  uint32_t differences;  // the bits in which they differ
};

// Of those keys of `count` pairs that lie in `outer`. One barrier.
template <bool kIsAll>
__device__ __forceinline__ Keys FindKeys(const Cta& cta, const uint2* pairs, int count,
                                         const Bracket& outer) {
  uint32_t lowest = 0xffffffffu, highest = 0, differences = 0;
  const uint32_t any = ~pairs[0].y;
  VisitGroups(count, [&](auto group) {
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t key = ~pairs[min(group.Number(i, cta.thread), count - 1)].y;
      const bool counts = kIsAll || outer.Contains(key);
      lowest = min(lowest, counts ? key : 0xffffffffu);
      highest = max(highest, counts ? key : 0);
      differences |= key ^ any;
    }
  });
  lowest = WarpMin(lowest);
  highest = WarpMax(highest);
  differences = WarpOr(differences);
  if (cta.lane == 0) cta.header->warp_keys[cta.warp] = make_uint4(lowest, highest, differences, 0);
  SyncThreads();  // the warps' keys before their reads
  const uint4 of_warp = LoadShared(&cta.header->warp_keys[min(cta.lane, kWarps - 1)]);
  return Keys{{WarpMin(of_warp.x), WarpMax(of_warp.y)}, WarpOr(of_warp.z)};
}

// How pairs are spread over bins: evenly by key, evenly by value, or by key with the exceptions
// that PairBins names.
enum class Spread { kByKey, kByValue, kGeneral };

// The bin of a pair, 0 being that of the best.
template <typename T>
struct PairBins {
  uint32_t best;   // ~ of the highest key
  uint32_t scale;  // bins per unit of depth, which is shifted first; 32 bits behind the point
  int shift;
  uint32_t number_scale;  // bins per pair of one key, the same way
  // Keys nearer to zero than `margin`, which take many octaves and are few, count as two keys:
  // those above zero, and those below.
  uint32_t zero;
  int32_t margin, nearest, top;
  bool has_extremes;  // pairs of these keys have bins of their own, by their numbers
  Bracket extremes;
  bool is_by_value;
  float highest, value_scale;

  // `keys`: of all pairs, or of those whose keys are not extremes.
  __device__ __forceinline__ PairBins(const Keys& keys, int count, bool may_have_margin,
                                      bool are_extremes_apart, const Bracket& outermost)
      : best(~keys.range.highest),
        margin(0),
        nearest(0),
        has_extremes(are_extremes_apart),
        extremes(outermost),
        is_by_value(false),
        highest(0),
        value_scale(0) {
    // All keys are alike below this bit.
    const int step = __ffs(keys.differences) - 1;
    const uint32_t below_step = (1u << step) - 1;
    zero = T::kSign | (keys.range.lowest & below_step);
    if (may_have_margin && keys.range.highest - keys.range.lowest > T::kWidestEven) {
      const int32_t above = static_cast<int32_t>(keys.range.highest - zero);
      const int32_t below = static_cast<int32_t>(zero - keys.range.lowest);
      const int32_t outside = static_cast<int32_t>(T::kWidestEven / 2);
      margin = static_cast<int32_t>(max(max(above, below) - outside, 0) & ~below_step);
      if (margin != 0) nearest = static_cast<int32_t>(1u << step);
    }
    top = BeyondMargin(keys.range.highest);
    const uint32_t range = Below(top, BeyondMargin(keys.range.lowest));
    shift = max(__clz(range) - (31 - kLogPairBins), 0);
    const float num_keys = static_cast<float>(range) + static_cast<float>(1u << step);
    // A little less than the quotients, which are not exact.
    constexpr float kLess = 0.999999f;
    const uint32_t num_bins = are_extremes_apart ? kPairBins / 2 : kPairBins;
    const float bins = static_cast<float>(num_bins) * kLess;
    constexpr float kWord = 4294967296.0f, kMostOfWord = 4294967040.0f;
    scale = static_cast<uint32_t>(
        min(FastDivide(bins * kWord, num_keys * static_cast<float>(1u << shift)), kMostOfWord));
    // Bins between two keys are room to spread equal ones by their numbers.
    const uint32_t per_key = step + shift < 32
                                 ? min(UpperProduct(scale, 1u << (step + shift)), num_bins - 1)
                                 : num_bins - 1;
    number_scale = 0;
    if (per_key >= 2) {
      const float per_number =
          FastDivide(static_cast<float>(per_key) * (kLess * kWord), static_cast<float>(count));
      number_scale = static_cast<uint32_t>(min(per_number, kMostOfWord));
    }
    if constexpr (T::kBits == 32) {
      if (margin == 0 || has_extremes || per_key >= 2) return;
      highest = T::OrderedValue(keys.range.highest);
      const float width = highest - T::OrderedValue(keys.range.lowest);
      value_scale = FastDivide(bins, width);
      // Neither infinities nor NaNs, nor a quotient that is 0 or infinite.
      constexpr float kMost = 0x1p120f;
      is_by_value = width < kMost && value_scale < kMost && value_scale > 0.0f;
    }
  }
  // The simplest way in which Of serves these pairs.
  __device__ __forceinline__ Spread BestSpread() const {
    if (margin == 0 && !has_extremes) return Spread::kByKey;
    return is_by_value ? Spread::kByValue : Spread::kGeneral;
  }

  // Of the pair of this number in ascending position. Every step is monotone: better pairs never
  // come to later bins.
  template <Spread kSpread>
  __device__ __forceinline__ uint32_t Of(uint32_t inverted_key, uint32_t number) const {
    if constexpr (kSpread == Spread::kByKey) {
      return UpperProduct((inverted_key - best) << shift, scale) +
             UpperProduct(number, number_scale);
    }
    if constexpr (kSpread == Spread::kByValue) {
      return static_cast<uint32_t>((highest - T::OrderedValue(~inverted_key)) * value_scale);
    }
    const uint32_t key = ~inverted_key;
    const int32_t beyond = BeyondMargin(key);
    // What counts as one key may be several: then their numbers say nothing.
    const bool is_one_key = margin == 0 || (beyond != nearest && beyond != -nearest);
    const uint32_t bin = UpperProduct(Below(top, beyond) << shift, scale) +
                         UpperProduct(is_one_key ? number : 0, number_scale);
    if (!has_extremes) return bin;
    static_assert(kMaxK <= kPairBins / 4, "a bin for each pair");
    if (key == extremes.highest) return number;
    return key == extremes.lowest ? kPairBins * 3 / 4 + number : kPairBins / 4 + bin;
  }

 private:
  // Unsigned, because the difference may not fit an int.
  __device__ __forceinline__ static uint32_t Below(int32_t upper, int32_t lower) {
    return static_cast<uint32_t>(upper) - static_cast<uint32_t>(lower);
  }
  // How far from zero a key lies, the margin left out.
  __device__ __forceinline__ int32_t BeyondMargin(uint32_t key) const {
    const int32_t from_zero = static_cast<int32_t>(key - zero);
    const int32_t shortened = margin - nearest;
    if (from_zero > 0) return max(from_zero - shortened, nearest);
    return from_zero < 0 ? min(from_zero + shortened, -nearest) : 0;
  }
};

// Where a sort works, besides the pairs and the histogram: see SortBytes.
struct SortSpace {
  uint2* pairs;       // by bin
  uint16_t* firsts;   // [kBins]: places of the first pairs of the histogram's words
  uint16_t* crowded;  // a list for each warp of bins: the place of the first pair, number << 12

  __device__ __forceinline__ SortSpace(unsigned char* spare, int count)
      : pairs(reinterpret_cast<uint2*>(spare)),
        firsts(reinterpret_cast<uint16_t*>(spare + (count + 1) / 2 * 16)),
        crowded(firsts + kBins) {}
};
static_assert(kPairTurns * 32 * kWarps == AlignUp(kMaxK, kThreads), "the lists of SortBytes");
static_assert(kMaxK <= 1 << 12 && kMaxPerBin < 1 << 4, "a place and a number fit 16 bits");

// A thread's pairs, by turn, in their bins.
struct BinnedPairs {
  uint32_t tags[kPairTurns];  // how many came to the bin before << 16 | the bin
  uint32_t num_second;        // of the warp's, that came to theirs second
  uint32_t second_before;     // of the lanes before
};

// Counts pairs by bin. Returns whether no bin overflowed. In: the cleared histogram and header,
// ordered by a barrier. One barrier.
template <typename T, Spread kSpread>
__device__ __forceinline__ bool CountPairs(const Cta& cta, const uint2* pairs, int count,
                                           const PairBins<T>& bins, BinnedPairs* binned) {
  uint32_t most_before = 0, num_second = 0;
  VisitGroups(count, [&](auto group) {
    uint32_t bin_of[group.kCount];
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const int number = min(group.Number(i, cta.thread), count - 1);
      bin_of[i] = bins.template Of<kSpread>(pairs[number].y, static_cast<uint32_t>(number));
    }
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const bool is_valid = group.Number(i, cta.thread) < count;
      const uint32_t shift = bin_of[i] % 8 * 4;
      // Threads behind the last pair add nothing to nothing.
      uint32_t* word = is_valid ? &cta.bins[bin_of[i] / 8] : &cta.header->zeros[cta.lane];
      const uint32_t before = FetchAndAdd(word, is_valid ? 1u << shift : 0) >> shift & kMaxPerBin;
      binned->tags[group.kFirst + i] = before << 16 | bin_of[i];
      num_second += before == 1;
      most_before = max(most_before, before);
    }
  });
  if (Unlikely(most_before == kMaxPerBin)) cta.header->crowd = 1;
  const uint32_t inclusive = WarpInclusiveSum(cta.lane, num_second);
  binned->num_second = WarpBroadcast(inclusive, 31);
  binned->second_before = inclusive - num_second;
  SyncThreads();  // counts before their reads
  return cta.header->crowd == 0;
}

// Puts the places of the histogram's words into space.firsts. Two barriers.
__device__ __forceinline__ void PlaceBins(Cta& cta, const SortSpace& space) {
  static_assert(kBinsPerThread == 8, "eight words to a thread, and a vector of their places");
  uint32_t sums[kBinsPerThread] = {};
  uint32_t sum = 0;
  if (cta.thread < kBinThreads) {
    const BinCounts words(cta.bins, cta.thread);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      sums[i] = sum;
      sum = AddCounts(sum, words.of[i]);
    }
  }
  const uint32_t before = BlockScan(cta, sum).before;
  if (cta.thread < kBinThreads) {
    const uint32_t both = before | before << 16;
    reinterpret_cast<uint4*>(space.firsts)[cta.thread] =
        make_uint4(both + (sums[0] | sums[1] << 16), both + (sums[2] | sums[3] << 16),
                   both + (sums[4] | sums[5] << 16), both + (sums[6] | sums[7] << 16));
  }
  SyncThreads();  // the places before their reads
}

// Puts pairs into their bins, and sorts those that share one. Two barriers.
__device__ __forceinline__ void PlacePairs(const Cta& cta, const uint2* pairs, int count,
                                           const BinnedPairs& binned, const SortSpace& space) {
  uint16_t* const crowded = space.crowded + kPairTurns * 32 * cta.warp;
  uint16_t* next_crowded = crowded + binned.second_before;
  VisitGroups(count, [&](auto group) {
    uint2 of[group.kCount];
    uint32_t first[group.kCount], in_bin[group.kCount];
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t bin = binned.tags[group.kFirst + i] & 0xffffu;
      of[i] = pairs[min(group.Number(i, cta.thread), count - 1)];
      const uint32_t word = cta.bins[bin / 8];
      const uint32_t shift = bin % 8 * 4;
      first[i] = AddCounts(space.firsts[bin / 8], word & ~(~0u << shift));
      in_bin[i] = word >> shift & kMaxPerBin;
    }
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t before = binned.tags[group.kFirst + i] >> 16;
      if (group.Number(i, cta.thread) < count) space.pairs[first[i] + before] = of[i];
      if (before == 1) *next_crowded++ = static_cast<uint16_t>(first[i] | in_bin[i] << 12);
    }
  });
  SyncThreads();  // pairs in their bins, and the lists of crowded ones, before their reads
#pragma unroll 1
  for (uint32_t i = cta.lane; i < binned.num_second; i += 32) {
    const uint32_t bin = crowded[i];
    SortBin(space.pairs + (bin & 0xfffu), static_cast<int>(bin >> 12));
  }
  SyncThreads();  // sorted bins before their reads
}

// Sorts `count` pairs, which are in ascending position. Returns where they lie then. `spare`: see
// SortSpace; `pairs` has room for a power of two. In: pairs, and the last use of the histogram and
// of `spare`, ordered by a barrier. Out: the same.
template <typename T>
__device__ __forceinline__ const uint2* SortPairs(Cta& cta, uint2* pairs, unsigned char* spare,
                                                  int count) {
  ClearBins(cta);
  if (cta.thread == 0) cta.header->crowd = 0;
  if (cta.warp == 1) cta.header->zeros[cta.lane] = 0;
  const Keys all = FindKeys</*kIsAll=*/true>(cta, pairs, count, {});
  if (all.range.IsSingleKey()) return pairs;  // ties: in ascending position already
  BinnedPairs binned;
  PairBins<T> bins(all, count, /*may_have_margin=*/true, /*are_extremes_apart=*/false, {});
  bool fit = false;
  const Spread spread = bins.BestSpread();
  if (spread == Spread::kByKey) {
    fit = CountPairs<T, Spread::kByKey>(cta, pairs, count, bins, &binned);
  } else if (spread == Spread::kGeneral) {
    fit = CountPairs<T, Spread::kGeneral>(cta, pairs, count, bins, &binned);
  } else if constexpr (T::kBits == 32) {
    fit = CountPairs<T, Spread::kByValue>(cta, pairs, count, bins, &binned);
  }
#pragma unroll 1
  for (bool may_have_margin = true; Unlikely(!fit); may_have_margin = false) {
    if (all.range.highest - all.range.lowest < 2 || (bins.has_extremes && bins.margin == 0)) {
      const int size = 1 << (32 - __clz(count - 1));
#pragma unroll 1
      for (int i = count + cta.thread; i < size; i += kThreads) pairs[i] = make_uint2(~0u, ~0u);
      SyncThreads();  // the padding before the sort
      SortBitonic(cta, pairs, size);
      return pairs;
    }
    SyncThreads();  // the read of what said so before it is reset
    ClearBins(cta);
    if (cta.thread == 0) cta.header->crowd = 0;
    const Bracket inner{all.range.lowest + 1, all.range.highest - 1};
    bins = PairBins<T>(FindKeys</*kIsAll=*/false>(cta, pairs, count, inner), count, may_have_margin,
                       /*are_extremes_apart=*/true, all.range);
    fit = CountPairs<T, Spread::kGeneral>(cta, pairs, count, bins, &binned);
  }
  const SortSpace space(spare, count);
  PlaceBins(cta, space);
  PlacePairs(cta, pairs, count, binned, space);
  return space.pairs;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SORT_PAIRS_CUH_
