// Sorted output: a row's selected elements, best first, by one CTA.
//
// Threads hold the pairs in registers, count them by 16384 bins of four bits, place every pair in
// its bin by an exclusive scan, and sort the few bins that hold several, a thread each. Bins are
// even in key, or even in value where keys span many octaves, around zero most of all. What few
// rows need is apart, in a function of its own: code that lies in the way costs all others 0.5 us.
// Where bins lie between two keys (keys of 16 bits, also as float32, or small integers), they
// divide equal ones by their numbers. If a bin overflows all the same, the pairs of the
// highest and the lowest key, which need no comparing, get bins of their own (infinities, or a
// plateau that k cuts), the others are spread anew, and if that does not help, a bitonic sort takes
// over, with log2(k)^2 / 2 steps of one barrier each.

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

// Sorts the pairs of one bin, at most four, by one thread.
__device__ __forceinline__ void SortFew(uint2* bin, uint32_t count) {
  uint2 of[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) of[i] = i < count ? bin[i] : make_uint2(~0u, ~0u);
  Exchange(&of[0], &of[1]);
  Exchange(&of[2], &of[3]);
  Exchange(&of[0], &of[2]);
  Exchange(&of[1], &of[3]);
  Exchange(&of[1], &of[2]);
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (i < count) bin[i] = of[i];
  }
}

// Sorts the pairs of one bin, at most one for each lane, by one warp.
__device__ __forceinline__ void SortMany(uint2* bin, uint32_t count, int lane) {
  constexpr uint32_t kAtOnce = 4;
  const uint2 own = bin[min(static_cast<uint32_t>(lane), count - 1)];
  uint32_t num_better = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kAtOnce) {
    uint2 others[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) others[i] = bin[min(first + i, count - 1)];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      num_better += first + i < count && IsBetter(others[i], own);
    }
  }
  SyncWarp();  // the bin's reads before pairs move
  if (static_cast<uint32_t>(lane) < count) bin[num_better] = own;
}

// Threads take the pairs in turns, some of them together: a group's loads come before its stores,
// and no branch lies between its turns, whose instructions the compiler mixes.
template <int kFirstTurn, int kEndTurn>
struct TurnGroup {
  static constexpr int kFirst = kFirstTurn, kCount = kEndTurn - kFirstTurn;
  // Of a thread's pair in the group's turn i.
  __device__ __forceinline__ static int Number(int i, int thread) {
    return (kFirst + i) * kThreads + thread;
  }
  // Whether there is such a pair. `left`: pairs from the thread's first on.
  __device__ __forceinline__ static bool IsValid(int i, int left) {
    return left > (kFirst + i) * kThreads;
  }
};
// Calls visit(group) for the turns that `count` pairs need, or some more. kTurns: of the most that
// there may be.
template <int kTurns, typename Visit>
__device__ __forceinline__ void VisitGroups(int count, Visit visit) {
  if (Unlikely(count <= kThreads)) {
    visit(TurnGroup<0, 1>());
    return;
  }
  visit(TurnGroup<0, kFewPairTurns>());
  if constexpr (kTurns > kFewPairTurns) {
    if (count > kMostFewPairs) visit(TurnGroup<kFewPairTurns, kTurns>());
  }
}

// Bins of pairs: eight to a word of the histogram.
constexpr int kLogPairBins = 14;
constexpr uint32_t kPairBins = 1u << kLogPairBins;
static_assert(kPairBins == 8 * kBins, "eight to a word");
constexpr uint32_t kMaxPerBin = 15;
constexpr int kTagShift = 32 - kLogPairBins;

// A thread's pairs, by turn.
template <int kTurns>
struct OwnPairs {
  uint2 of[kTurns];
  uint32_t tags[kTurns];  // the bin << kTagShift | how many came to it before << 4
  uint32_t num_second;    // that came to theirs second

  // A group's pairs of `count`; behind the last one, copies of it.
  template <typename Group>
  __device__ __forceinline__ void Load(Group, const uint2* pairs, int thread, int count) {
#pragma unroll
    for (int i = 0; i < Group::kCount; ++i) {
      of[Group::kFirst + i] = pairs[min(Group::Number(i, thread), count - 1)];
    }
  }
};

// What is known of some pairs' keys.
struct Keys {
  Bracket range;
  uint32_t differences;  // the lowest bit in which they differ, and perhaps higher ones
};

// The bits in which the keys of all pairs differ, by what a thread's keys have in one of them, and
// in all. Two barriers.
__device__ __forceinline__ uint32_t FindDifferences(const Cta& cta, uint32_t in_one,
                                                    uint32_t in_all) {
  uint4* of_warps = cta.header->warp_keys;
  in_one = WarpOr(in_one);
  const uint32_t not_in_all = WarpOr(~in_all);
  SyncThreads();  // the last reads of what is overwritten
  if (cta.lane == 0) of_warps[cta.warp] = make_uint4(in_one, not_in_all, 0, 0);
  SyncThreads();  // the warps' bits before their reads
  const uint4 of_warp = LoadShared(&of_warps[min(cta.lane, kWarps - 1)]);
  return WarpOr(of_warp.x) & WarpOr(of_warp.y);
}

// What is known of the keys of all `count` pairs. Barriers.
template <int kTurns>
__device__ __forceinline__ Keys FindKeys(const Cta& cta, const OwnPairs<kTurns>& own, int count) {
  // Of inverted keys: the best is the least.
  uint32_t best = 0xffffffffu, worst = 0, in_one = 0, in_all = 0xffffffffu;
  VisitGroups<kTurns>(count, [&](auto group) {
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t inverted_key = own.of[group.kFirst + i].y;
      best = min(best, inverted_key);
      worst = max(worst, inverted_key);
      in_one |= inverted_key;
      in_all &= inverted_key;
    }
  });
  best = WarpMin(best);
  worst = WarpMax(worst);
  const uint32_t has_odd = WarpBallot((in_one & 1) != 0);
  const uint32_t has_even = WarpBallot((in_all & 1) == 0);
  if (cta.lane == 0) cta.header->warp_keys[cta.warp] = make_uint4(best, worst, has_odd, has_even);
  SyncThreads();  // the warps' keys before their reads
  const uint4 of_warp = LoadShared(&cta.header->warp_keys[min(cta.lane, kWarps - 1)]);
  Keys keys{{~WarpMax(of_warp.y), ~WarpMin(of_warp.x)}, 1};
  const bool differ_in_last = WarpBallot(of_warp.z != 0) != 0 && WarpBallot(of_warp.w != 0) != 0;
  if (Unlikely(!differ_in_last) && !keys.range.IsSingleKey()) {
    keys.differences = FindDifferences(cta, in_one, in_all);
  }
  return keys;
}

// Kinds of bins: Of(inverted key, number) is that of a pair of this number in ascending position, 0
// that of the best. Every step of it is monotone: better pairs never come to later bins.

// Quotients are taken a little less than they are, because they are not exact.
constexpr float kLess = 0.999999f;
constexpr float kWord = 4294967296.0f;  // 32 bits behind the point

// Bins even in key: for many keys, of which no number need be asked.
template <typename T>
struct EvenPairBins {
  uint32_t best;   // ~ of the highest key
  uint32_t scale;  // bins per key, 32 bits behind the point

  __device__ __forceinline__ static bool Serve(const Keys& keys) {
    const uint32_t width = keys.range.highest - keys.range.lowest;
    return width >= kPairBins && width <= T::kWidestEven;
  }
  __device__ __forceinline__ explicit EvenPairBins(const Bracket& range)
      : best(~range.highest),
        scale(static_cast<uint32_t>(
            FastDivide(static_cast<float>(kPairBins) * kLess * kWord,
                       static_cast<float>(range.highest - range.lowest) + 1.0f))) {}
  __device__ __forceinline__ uint32_t Of(uint32_t inverted_key, uint32_t) const {
    return UpperProduct(inverted_key - best, scale);
  }
};

// Bins even in value, of float32: for keys over many octaves.
template <typename T>
struct ValuePairBins {
  float highest, scale;  // bins per unit
  bool are_valid;        // there are neither infinities nor NaNs, nor is the scale 0 or infinite

  __device__ __forceinline__ explicit ValuePairBins(const Bracket& range)
      : highest(T::ValueOfInverted(~range.highest)) {
    const float width = highest - T::ValueOfInverted(~range.lowest);
    scale = FastDivide(static_cast<float>(kPairBins) * kLess, width);
    constexpr float kMost = 0x1p120f;
    are_valid = width < kMost && scale < kMost && scale > 0.0f;
  }
  __device__ __forceinline__ static bool Serve(const Keys& keys) {
    return T::kBits == 32 && keys.range.highest - keys.range.lowest > T::kWidestEven;
  }
  __device__ __forceinline__ uint32_t Of(uint32_t inverted_key, uint32_t) const {
    return static_cast<uint32_t>((highest - T::ValueOfInverted(inverted_key)) * scale);
  }
};

// `num_bins` bins for depths up to `range`, multiples of 1 << step; where several are for one
// depth, they are for numbers below `count`.
struct DepthBins {
  int shift;              // before the scale
  uint32_t scale;         // bins per shifted depth, 32 bits behind the point
  uint32_t number_scale;  // bins per number, the same way
  uint32_t per_depth;     // bins for one depth

  __device__ __forceinline__ DepthBins() {}
  __device__ __forceinline__ DepthBins(uint32_t range, int step, uint32_t num_bins, int count)
      : number_scale(0) {
    constexpr float kMostOfWord = 4294967040.0f;
    shift = max(__clz(range) - (31 - kLogPairBins), 0);
    const float num_depths = static_cast<float>(range) + static_cast<float>(1u << step);
    const float bins = static_cast<float>(num_bins) * kLess;
    scale = static_cast<uint32_t>(
        min(FastDivide(bins * kWord, num_depths * static_cast<float>(1u << shift)), kMostOfWord));
    per_depth = step + shift < 32 ? min(UpperProduct(scale, 1u << (step + shift)), num_bins - 1)
                                  : num_bins - 1;
    if (per_depth < 2) return;
    const float per_number =
        FastDivide(static_cast<float>(per_depth) * (kLess * kWord), static_cast<float>(count));
    number_scale = static_cast<uint32_t>(min(per_number, kMostOfWord));
  }
  __device__ __forceinline__ uint32_t Of(uint32_t depth, uint32_t number) const {
    return UpperProduct(depth << shift, scale) + UpperProduct(number, number_scale);
  }
};

// The lowest bit in which keys differ.
__device__ __forceinline__ int StepOf(const Keys& keys) { return __ffs(keys.differences) - 1; }

// Bins even in key, and equal keys in the order of their numbers.
template <typename T>
struct NumberedPairBins {
  uint32_t best;  // ~ of the highest key
  DepthBins bins;

  __device__ __forceinline__ NumberedPairBins(const Keys& keys, int count)
      : best(~keys.range.highest),
        bins(keys.range.highest - keys.range.lowest, StepOf(keys), kPairBins, count) {}
  __device__ __forceinline__ static bool Serve(const Keys& keys) {
    return keys.range.highest - keys.range.lowest <= T::kWidestEven;
  }
  __device__ __forceinline__ uint32_t Of(uint32_t inverted_key, uint32_t number) const {
    return bins.Of(inverted_key - best, number);
  }
};

// The same, with exceptions.
template <typename T>
struct GeneralPairBins {
  DepthBins bins;
  // Keys nearer to zero than `margin`, which take many octaves and are few, count as two keys:
  // those above zero, and those below.
  uint32_t zero;
  int32_t margin, nearest, top;
  bool has_extremes;  // pairs of these keys have bins of their own, by their numbers
  Bracket extremes;

  // `keys`: of all pairs, or of those whose keys are not extremes.
  __device__ __forceinline__ GeneralPairBins(const Keys& keys, int count, bool may_have_margin,
                                             bool are_extremes_apart, const Bracket& outermost)
      : margin(0), nearest(0), has_extremes(are_extremes_apart), extremes(outermost) {
    const int step = StepOf(keys);
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
    bins = DepthBins(Below(top, BeyondMargin(keys.range.lowest)), step,
                     are_extremes_apart ? kPairBins / 2 : kPairBins, count);
  }
  __device__ __forceinline__ uint32_t Of(uint32_t inverted_key, uint32_t number) const {
    const uint32_t key = ~inverted_key;
    const int32_t beyond = BeyondMargin(key);
    // What counts as one key may be several: then their numbers say nothing.
    const bool is_one_key = margin == 0 || (beyond != nearest && beyond != -nearest);
    const uint32_t bin = bins.Of(Below(top, beyond), is_one_key ? number : 0);
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

// Where a sort works, besides the histogram: see SortBytes.
struct SortSpace {
  uint2* pairs;       // by bin
  uint16_t* firsts;   // [kBins]: 16 times the places of the first pairs of the histogram's words
  uint16_t* crowded;  // bins that hold several: 16 times the place of the first pair + the number

  __device__ __forceinline__ SortSpace(unsigned char* spare, int count)
      : pairs(reinterpret_cast<uint2*>(spare)),
        firsts(reinterpret_cast<uint16_t*>(spare + (count + 1) / 2 * 16)),
        crowded(firsts + kBins) {}
};
static_assert(kMaxK <= 1 << 12 && kMaxPerBin < 16, "a place and a number fit 16 bits");

// For functions that are not inlined. See KnownShared of a pointer.
__device__ __forceinline__ SortSpace KnownShared(SortSpace space) {
  space.pairs = KnownShared(space.pairs);
  space.firsts = KnownShared(space.firsts);
  space.crowded = KnownShared(space.crowded);
  return space;
}

// Counts pairs by bin. In: the cleared histogram, ordered by a barrier.
template <int kTurns, typename Bins>
__device__ __forceinline__ void CountPairs(const Cta& cta, int count, const Bins& bins_of,
                                           OwnPairs<kTurns>* own) {
  own->num_second = 0;
  VisitGroups<kTurns>(count, [&](auto group) {
    uint32_t bins[group.kCount];
    const int thread = UseHere(cta.thread), left = count - thread;
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const int number = min(group.Number(i, thread), count - 1);
      // The compiler would compute what all kinds of bins need before it knows which it is.
      bins[i] = bins_of.Of(UseHere(own->of[group.kFirst + i].y), static_cast<uint32_t>(number));
    }
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      // By which a count moves to bits 4 .. 7. Threads behind the last pair add nothing, each to
      // another word.
      const uint32_t amount = 4 * bins[i] - 4;
      const uint32_t one = Rotate(1u << 4, amount);
      const bool is_valid = group.IsValid(i, left);
      const uint32_t number = is_valid ? bins[i] / 8 : static_cast<uint32_t>(thread);
      const uint32_t word = FetchAndAdd(&cta.bins[number], is_valid ? one : 0);
      const uint32_t before = RotateBack(word, amount) & kMaxPerBin << 4;
      own->tags[group.kFirst + i] = bins[i] << kTagShift | before;
      own->num_second += before == 1u << 4 && is_valid;
    }
  });
}

// What a scan of the counts tells.
struct BinPlaces {
  bool fit;                 // no bin overflowed
  uint32_t crowded_before;  // bins that hold several, listed by the threads before
  uint32_t num_crowded;
};

// Puts the places of the histogram's words into space.firsts. Three barriers.
__device__ __forceinline__ BinPlaces PlaceBins(Cta& cta, int count, uint32_t num_second,
                                               const SortSpace& space) {
  static_assert(kBinsPerThread == 8, "eight words to a thread, and a vector of their places");
  SyncThreads();  // counts of pairs before their sums
  uint32_t sums[kBinsPerThread] = {};
  uint32_t sum = 0;
  if (cta.thread < kBinThreads) {
    const BinCounts words(cta.bins, cta.thread);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      sums[i] = sum;
      sum = AddSixteenfold(sum, words.of[i]);
    }
  }
  constexpr int kSumBits = 20;
  static_assert(16 * kMaxK < 1 << kSumBits && kMaxK / 2 < 1 << (32 - kSumBits), "two numbers");
  const Scan scan = BlockScan(cta, sum | num_second << kSumBits);
  if (cta.thread < kBinThreads) {
    const uint32_t before = scan.before % (1 << kSumBits);
    const uint32_t both = before | before << 16;
    reinterpret_cast<uint4*>(space.firsts)[cta.thread] =
        make_uint4(both + (sums[0] | sums[1] << 16), both + (sums[2] | sums[3] << 16),
                   both + (sums[4] | sums[5] << 16), both + (sums[6] | sums[7] << 16));
  }
  SyncThreads();  // the places before their reads
  // A count that overflows becomes zero, and adds one at most to the next.
  return BinPlaces{scan.total % (1 << kSumBits) == 16 * static_cast<uint32_t>(count),
                   scan.before >> kSumBits, scan.total >> kSumBits};
}

// Puts pairs into their bins, and sorts those that share one. Two barriers.
template <int kTurns>
__device__ __forceinline__ void PlacePairs(const Cta& cta, int count, const OwnPairs<kTurns>& own,
                                           const BinPlaces& places, const SortSpace& space) {
  uint16_t* next_crowded = space.crowded + places.crowded_before;
  VisitGroups<kTurns>(count, [&](auto group) {
    const int left = count - cta.thread;
    uint32_t first[group.kCount], in_bin[group.kCount];
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t tag = own.tags[group.kFirst + i];
      const uint32_t number = tag >> (kTagShift + 3);
      const uint32_t word = cta.bins[number];
      // Of the bin in its word, % 32.
      static_assert(kTagShift > 2 + 8, "zeros between");
      const uint32_t shift = tag >> (kTagShift - 2);
      first[i] = AddSixteenfold(space.firsts[number], word & ~ShiftLeftWrapped(~0u, shift));
      in_bin[i] = ShiftRightWrapped(word, shift) & kMaxPerBin;
    }
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const bool is_valid = group.IsValid(i, left);
      const uint32_t before = own.tags[group.kFirst + i] & kMaxPerBin << 4;
      if (is_valid) {
        const uint32_t offset = (first[i] + before) / (16 / sizeof(uint2));
        *reinterpret_cast<uint2*>(reinterpret_cast<unsigned char*>(space.pairs) + offset) =
            own.of[group.kFirst + i];
      }
      if (before == 1u << 4 && is_valid) {
        *next_crowded++ = static_cast<uint16_t>(first[i] | in_bin[i]);
      }
    }
  });
  SyncThreads();  // pairs in their bins, and the list of crowded ones, before their reads
#pragma unroll 1
  for (uint32_t i = cta.thread; i - cta.lane < places.num_crowded; i += kThreads) {
    const uint32_t bin = i < places.num_crowded ? space.crowded[i] : 0;
    const uint32_t in_bin = bin % 16;
    SortFew(space.pairs + bin / 16, in_bin <= 4 ? in_bin : 0);
#pragma unroll 1
    for (uint32_t many = WarpBallot(in_bin > 4); Unlikely(many != 0); many &= many - 1) {
      const uint32_t of_lane = WarpBroadcast(bin, __ffs(many) - 1);
      SortMany(space.pairs + of_lane / 16, of_lane % 16, cta.lane);
    }
  }
  SyncThreads();  // sorted bins before their reads
}

// The range of the keys of those pairs that lie in `outer`. One barrier.
template <int kTurns>
__device__ __forceinline__ Bracket FindRange(const Cta& cta, const OwnPairs<kTurns>& own, int count,
                                             const Bracket& outer) {
  Bracket range{0xffffffffu, 0};
  VisitGroups<kTurns>(count, [&](auto group) {
#pragma unroll
    for (int i = 0; i < group.kCount; ++i) {
      const uint32_t key = ~own.of[group.kFirst + i].y;
      if (!outer.Contains(key)) continue;
      range = Bracket{min(range.lowest, key), max(range.highest, key)};
    }
  });
  range = Bracket{WarpMin(range.lowest), WarpMax(range.highest)};
  uint4* of_warps = cta.header->warp_keys;
  if (cta.lane == 0) of_warps[cta.warp] = make_uint4(range.lowest, range.highest, 0, 0);
  SyncThreads();  // the warps' keys before their reads
  const uint4 of_warp = LoadShared(&of_warps[min(cta.lane, kWarps - 1)]);
  return Bracket{WarpMin(of_warp.x), WarpMax(of_warp.y)};
}

// Sorts pairs that the bins of SortPairs do not serve, or that made one overflow. Returns whether
// they lie in space.pairs then, or else in `room`, where they are in order of their numbers. In:
// the histogram, cleared unless a bin overflowed. Out: ordered by a barrier. By value: what a
// pointer leads to lies in local memory, everywhere.
template <typename T, int kTurns>
__device__ __noinline__ bool SortSpecialPairs(Cta cta, Keys keys, int count, bool has_overflowed,
                                              uint2* room, SortSpace space) {
  cta = KnownShared(cta);
  room = KnownShared(room);
  space = KnownShared(space);
  if (has_overflowed) ClearBins(cta);
  SyncThreads();  // the pairs before their reads, and the cleared histogram before its use
  const Bracket all = keys.range;
  OwnPairs<kTurns> own;
  VisitGroups<kTurns>(count, [&](auto group) { own.Load(group, room, cta.thread, count); });
  bool may_help = true;
#pragma unroll 1
  for (int attempt = has_overflowed ? 1 : 0; may_help; ++attempt) {
    if (attempt > 0) {
      if (all.highest - all.lowest < 2) break;
      keys.range = FindRange(cta, own, count, Bracket{all.lowest + 1, all.highest - 1});
    }
    const GeneralPairBins<T> bins(keys, count, /*may_have_margin=*/attempt < 2,
                                  /*are_extremes_apart=*/attempt > 0, all);
    may_help = attempt == 0 || bins.margin != 0;
    bool is_by_value = false;
    if constexpr (T::kBits == 32) {
      const ValuePairBins<T> by_value(all);
      is_by_value =
          attempt == 0 && bins.margin != 0 && bins.bins.per_depth < 2 && by_value.are_valid;
      if (is_by_value) CountPairs(cta, count, by_value, &own);
    }
    if (!is_by_value) CountPairs(cta, count, bins, &own);
    const BinPlaces places = PlaceBins(cta, count, own.num_second, space);
    if (places.fit) {
      PlacePairs(cta, count, own, places, space);
      return true;
    }
    ClearBins(cta);
  }
  const int size = 1 << (32 - __clz(count - 1));
#pragma unroll 1
  for (int i = count + cta.thread; i < size; i += kThreads) room[i] = make_uint2(~0u, ~0u);
  SyncThreads();  // the padding before the sort
  SortBitonic(cta, room, size);
  return false;
}

// Sorts `count` pairs, whose numbers are in ascending position. Returns where they lie then: in
// `room`, which has some for a power of two of pairs, and may hold them in order already, or in
// `spare`, see SortSpace. In: the last use of both places comes before the first barrier here, and
// so does the clearing of the histogram. Out: ordered by a barrier.
template <typename T, int kTurns>
__device__ __forceinline__ const uint2* SortPairs(Cta& cta, OwnPairs<kTurns>& own, int count,
                                                  uint2* room, bool are_in_room,
                                                  unsigned char* spare) {
  const SortSpace space(spare, count);
  const Keys keys = FindKeys(cta, own, count);
  const bool are_ties = keys.range.IsSingleKey();
  bool is_counted = true;
  if constexpr (T::kBits == 32) {
    if (are_ties || (keys.differences & 1) == 0) {
      is_counted = false;
    } else if (EvenPairBins<T>::Serve(keys)) {
      CountPairs(cta, count, EvenPairBins<T>(keys.range), &own);
    } else {
      const ValuePairBins<T> by_value(keys.range);
      is_counted = ValuePairBins<T>::Serve(keys) && by_value.are_valid;
      if (is_counted) CountPairs(cta, count, by_value, &own);
    }
  } else {
    is_counted = !are_ties && NumberedPairBins<T>::Serve(keys);
    if (is_counted) CountPairs(cta, count, NumberedPairBins<T>(keys, count), &own);
  }
  BinPlaces places{};
  if (!Unlikely(!is_counted)) places = PlaceBins(cta, count, own.num_second, space);
  if (!Unlikely(!places.fit)) {
    PlacePairs(cta, count, own, places, space);
    return space.pairs;
  }
  if (!are_in_room) {
    VisitGroups<kTurns>(count, [&](auto group) {
#pragma unroll
      for (int i = 0; i < group.kCount; ++i) {
        if (group.IsValid(i, count - cta.thread)) {
          room[group.Number(i, cta.thread)] = own.of[group.kFirst + i];
        }
      }
    });
  }
  if (are_ties) {
    SyncThreads();  // the pairs before their reads
    return room;
  }
  return SortSpecialPairs<T, kTurns>(cta, keys, count, is_counted, room, space) ? space.pairs
                                                                                : room;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_SORT_PAIRS_CUH_
