// Step 1: guess a bracket of keys that holds the k-th largest one.
//
// From a sample of s of the row's n elements: of the k largest ones, about q = s k / n are in it,
// with a variance of v = q (1 - k / n) (1 - s / n). The bracket runs from the key at rank
// q + c - m down to that at rank q + c + m of the sample, with m = kDeviations * sqrt(v + 1),
// widened to whole histogram bins. Small numbers are skewed, like Poisson's: by Cornish and
// Fisher's expansion its quantiles at z deviations lie (z^2 - 1) / 6 higher than those of a normal
// distribution, which is c but for the factor v / q. One row in 15000 lies outside, or fewer.
// Elements above it are certain to be selected, elements below it certain not to be, if the guess
// is right; the filter counts both sides exactly and the caller verifies. Every CTA of the row
// reads the same sample, so all arrive at the same bracket without talking.
//
// Cost: one pass over the elements, a histogram of coarse bins, three barriers. Data that crowds
// into few coarse bins (clustered, equal, few distinct values) needs refinements: a pass, a
// histogram and three barriers each. A sample stays in registers, so that only its first visit
// waits for memory.

#ifndef JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_
#define JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_

#include <cstdint>

#include "block.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

constexpr float kDeviations = 4.0f;
constexpr float kSkewness = (kDeviations * kDeviations - 1.0f) / 6.0f;
constexpr int kSampleElements = 8 * kThreads;
constexpr int kSamplePiece = 4;  // consecutive vectors
// Longer rows get a longer sample, in rounds: one vector in this many, so that q does not vanish.
constexpr int kVectorsPerSample = 64;
constexpr int kMaxSampleRounds = 16;
// Each refinement splits the bracket into up to kBins parts: three exhaust 32-bit keys.
constexpr int kMaxRefinements = 4;

struct SampleRanks {
  uint32_t high;  // the bracket's upper end is the bin of this rank; 0: no upper bound
  uint32_t low;
};

// What the bracket is for.
struct BracketGoal {
  SampleRanks ranks;
  float scale;          // elements of the row per visited element
  uint32_t open_limit;  // most elements of the row that the bracket may hold

  // Whether so many visited elements stand for more than the bracket may hold.
  __device__ __forceinline__ bool IsTooMany(uint32_t visited) const {
    return static_cast<float>(visited) * scale > static_cast<float>(open_limit);
  }
};

// The goal for a sample of `sample_size` out of `population`.
__device__ __forceinline__ BracketGoal SampleGoal(uint32_t k, uint32_t population,
                                                  uint32_t sample_size, uint32_t open_limit) {
  BracketGoal goal;
  const float visited = static_cast<float>(sample_size), all = static_cast<float>(population);
  goal.scale = FastDivide(all, visited);
  const float fraction = FastDivide(visited, all), share = FastDivide(static_cast<float>(k), all);
  const float expected = share * visited;
  const float spread = (1.0f - fraction) * (1.0f - share);
  const float middle = expected + kSkewness * spread;
  const float margin = kDeviations * FastSquareRoot(expected * spread + 1.0f);
  const float high = middle - margin;
  goal.ranks.high = high > 0.0f ? static_cast<uint32_t>(high) + 1 : 0;
  goal.ranks.low = static_cast<uint32_t>(middle + margin) + 1;
  goal.open_limit = open_limit;
  return goal;
}

// The keys of a coarse bin, counted from the top.
template <typename T>
__device__ __forceinline__ Bracket CoarseKeys(uint32_t bin) {
  const bool is_upper = bin < kHalfBins;
  const uint32_t step = (bin ^ (is_upper ? kHalfBins - 1 : 0)) % kHalfBins;
  // Magnitudes nearest to zero: of the bin, and of the bin behind it.
  const uint32_t nearest = T::StepMagnitude(step);
  const uint32_t beyond = step == kHalfBins - 1 ? T::kSign : T::StepMagnitude(step + 1);
  return is_upper ? Bracket{T::kSign + nearest, T::kSign + beyond - 1}
                  : Bracket{T::kSign - beyond, T::kSign - nearest - 1};
}

// Whether a coarse bin is none of those at the ends of either half. The keys of an even bin, as
// many as of any other one, differ in their low bits alone.
__device__ __forceinline__ bool IsEvenBin(uint32_t bin) { return (bin + 1) % kHalfBins > 1; }

// The coarse bins of two elements, counted from the top, as byte offsets into the histogram.
template <typename T>
__device__ __forceinline__ uint32_t CoarseOffsets(uint32_t halves, uint32_t coarse_flip) {
  return (T::FourfoldSteps(halves) ^ SignsOfHalves(halves) ^ coarse_flip) &
         BothHalves(4 * kBins - 4);
}

__device__ __forceinline__ void CountAt(const Cta& cta, uint32_t offset) {
  atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<unsigned char*>(cta.bins) + offset), 1u);
}

// Counts a vector's elements by coarse bin. One instruction per count: the hardware adds the lanes
// that meet in a bin (ATOMS.POPC.INC).
template <typename T>
__device__ __forceinline__ void CountCoarse(Cta& cta, const uint4& vector, uint32_t coarse_flip) {
#pragma unroll
  for (int i = 0; i < T::kPerVector / 2; ++i) {
    const uint32_t offsets = CoarseOffsets<T>(T::Halves(vector, i), coarse_flip);
    CountAt(cta, offsets & 0xffffu);
    CountAt(cta, offsets >> 16);
  }
}

// Counts a vector's elements inside a bracket by its linear bins. What does not count goes to a
// spare bin, which is cheaper than a branch.
template <typename T>
__device__ __forceinline__ void CountLinear(Cta& cta, const uint4& vector, uint32_t valid,
                                            uint32_t flip, const Bracket& bracket,
                                            const LinearBins& bins) {
#pragma unroll
  for (int i = 0; i < T::kPerVector; ++i) {
    const uint32_t key = T::Key(T::Element(vector, i), flip);
    const bool counts = (valid >> i & 1) != 0 && bracket.Contains(key);
    atomicAdd(&cta.bins[counts ? bins.FromTop(key) : kBins], 1u);
  }
}

// One thread's share of the sample of a row: 64 consecutive bytes at a pseudo-random place in each
// of equally long stretches of the row, so that neither a trend nor a period in the data misleads.
// Smaller pieces would be better samples, but every line that a warp touches costs a cycle of the
// L1: 1024 separate vectors take 1000 cycles. Vectors that lie in the window in part are left out.
template <typename T>
struct Sample {
  static constexpr int kVectors = kSampleElements / T::kPerVector / kThreads;
  static_assert(kVectors >= 1, "a vector for each thread");

  int num_rounds;  // of kSampleElements
  int thread;
  uint32_t stretch;         // vectors of the row per piece, with kStretchBits behind the point
  uint4 vectors[kVectors];  // of the first round

  // Starts the loads; nothing waits for them here.
  __device__ __forceinline__ Sample(int thread_index, const RowWindow& window)
      : num_rounds(1), thread(thread_index) {
    const uint32_t end = (static_cast<uint32_t>(window.length) + window.skew) / T::kPerVector;
    const int32_t num_places = static_cast<int32_t>(end) - NumSkipped(window) - (kSamplePiece - 1);
    // The quotient by the number of pieces, rounded down a little, without a division.
    constexpr uint64_t kPerPiece = (uint64_t{1} << 32) / kPiecesPerRound;
    const uint64_t span = max(num_places, 0);
    uint64_t of_round = (span * kPerPiece) >> (32 - kStretchBits);
    while (num_rounds < kMaxSampleRounds &&
           window.num_vectors > kVectorsPerSample * kVectors * kThreads * num_rounds) {
      num_rounds *= 2;
      of_round /= 2;
    }
    stretch = static_cast<uint32_t>(of_round);
    if (HasElements()) Load(window, 0);
  }

  // Whether the row is long enough for a piece.
  __device__ __forceinline__ bool HasElements() const { return stretch != 0; }
  __device__ __forceinline__ uint32_t num_elements() const { return num_rounds * kSampleElements; }

  // Calls visit(vector) for this thread's vectors of all rounds. There are some.
  template <typename Visit>
  __device__ __forceinline__ void VisitAll(const RowWindow& window, Visit visit) {
#pragma unroll 1
    for (int round = 0;;) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) visit(vectors[v]);
      if (num_rounds == 1) break;
      round = round + 1 == num_rounds ? 0 : round + 1;
      Load(window, round);
      if (round == 0) break;
    }
  }

 private:
  static constexpr int kPiecesPerRound = kVectors * kThreads / kSamplePiece;
  static constexpr int kStretchBits = 14;
  static_assert((uint64_t{1} << (31 + kStretchBits)) / T::kPerVector /
                        (kPiecesPerRound * kMaxSampleRounds) <
                    uint64_t{1} << 32,
                "a stretch of the longest row fits a word");
  static_assert(kPiecesPerRound * kMaxSampleRounds <= 1 << kStretchBits, "a place fits a word");

  // Vectors before the first one that lies in the window.
  __device__ __forceinline__ static int32_t NumSkipped(const RowWindow& window) {
    return window.skew != 0 ? 1 : 0;
  }

  __device__ __forceinline__ void Load(const RowWindow& window, int round) {
    const uint4* first = reinterpret_cast<const uint4*>(window.vectors) + NumSkipped(window);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t i = (round * kVectors + v) * kThreads + thread;
      const uint32_t piece = i / kSamplePiece;
      // A golden ratio hash; of the piece behind, because that of zero is zero.
      const uint32_t jitter = ((piece + 1) * 0x9E3779B1u) >> kStretchBits;
      const uint32_t place = (piece << (32 - kStretchBits)) + jitter;
      vectors[v] = LoadReadOnly(first + UpperProduct(place, stretch) + i % kSamplePiece);
    }
  }
};

// Counts the sample's elements inside `outer` by its linear bins, and finds the range of keys that
// those inside `inner` have. `slot`: alternates between calls, zero first; the header's ranges of
// that slot are empty on entry, and the other slot's on exit. One barrier.
template <typename T>
__device__ __forceinline__ Bracket CountAndSeeRange(Cta& cta, const RowWindow& window,
                                                    Sample<T>& sample, const Bracket& outer,
                                                    const Bracket& inner, const LinearBins& bins,
                                                    uint32_t flip, int slot) {
  if (cta.thread == 0) cta.header->ranges[slot ^ 1] = make_uint2(T::kMaxKey, 0);
  uint32_t lowest = T::kMaxKey, highest = 0;
  sample.VisitAll(window, [&](const uint4& vector) {
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      const uint32_t key = T::Key(T::Element(vector, i), flip);
      atomicAdd(&cta.bins[outer.Contains(key) ? bins.FromTop(key) : kBins], 1u);
      const bool is_inside = inner.Contains(key);
      lowest = min(lowest, is_inside ? key : T::kMaxKey);
      highest = max(highest, is_inside ? key : 0);
    }
  });
  lowest = WarpMin(lowest);
  highest = WarpMax(highest);
  if (cta.lane == 0 && lowest <= highest) {
    atomicMin(&cta.header->ranges[slot].x, lowest);
    atomicMax(&cta.header->ranges[slot].y, highest);
  }
  SyncThreads();  // counts, minima and maxima before their reads
  return Bracket{cta.header->ranges[slot].x, cta.header->ranges[slot].y};
}

// Whether the bracket holds more elements than there is room for.
__device__ __forceinline__ bool IsCrowded(const Estimate& estimate, const BracketGoal& goal) {
  return !estimate.bracket.IsSingleKey() && goal.IsTooMany(estimate.inside);
}

// Narrows a crowded bracket: first both of its ends, then the lower one alone. Above the bin of the
// lower rank lie no more elements than the goal has room for, unless that is small. `low`: the keys
// of that bin; `inside_low`: how many visited elements it holds.
//
// Where all that is seen in the bin is one value, a plateau, the bracket becomes that value, even
// if the upper rank lies above it: then all that is above the plateau is kept, and its ties need no
// room. See FilterWarpTile.
//
// Not inlined, see kernel.cuh.
template <typename T>
__device__ __noinline__ Bracket RefineEstimate(Cta cta, RowWindow window, Sample<T> sample,
                                               BracketGoal goal, uint32_t flip, bool is_open_above,
                                               bool is_open_below, Estimate result, Bracket low,
                                               uint32_t inside_low) {
  cta = KnownShared(cta);
  Bracket outer = result.bracket;
  uint32_t above = result.above;   // visited elements above `outer`
  bool has_high = !is_open_above;  // `outer` holds the upper rank
#pragma unroll 1
  for (int i = 0; i < kMaxRefinements && IsCrowded(result, goal) &&
                  !goal.IsTooMany(result.inside - inside_low);
       ++i) {
    const LinearBins bins(outer);
    const Bracket seen = CountAndSeeRange<T>(cta, window, sample, outer, low, bins, flip, i & 1);
    Estimate found[2];
    FindRanks<true>(
        cta, {has_high ? goal.ranks.high - above : 1, goal.ranks.low - above},
        [&](uint32_t bin) { return bins.Keys(bin, bin, outer); }, found);
    const Estimate &high_bin = found[0], &low_bin = found[1];
    if (seen.IsSingleKey()) return seen;
    low = low_bin.bracket;
    inside_low = low_bin.inside;
    if (has_high) {
      result.bracket.highest = high_bin.bracket.highest;
      result.above = above + high_bin.above;
      has_high = high_bin.bracket.lowest == low.lowest;  // the same bin
    }
    above += low_bin.above;
    low.lowest = max(low.lowest, seen.lowest);
    if (!is_open_below) result.bracket.lowest = low.lowest;
    result.inside = above + inside_low - result.above;
    outer = low;
  }
  return result.bracket;
}

// In: the sample has elements. The histogram is zero on entry and on exit. All threads return the
// same.
template <typename T>
__device__ __forceinline__ Bracket EstimateBracket(Cta& cta, const RowWindow& window,
                                                   Sample<T>& sample, const BracketGoal& goal,
                                                   uint32_t flip) {
  const uint32_t coarse_flip = CoarseFlip(flip);
  sample.VisitAll(window, [&](const uint4& vector) { CountCoarse<T>(cta, vector, coarse_flip); });
  SyncThreads();  // counts before the search
  Estimate found[2];
  FindRanks<false>(
      cta, {max(goal.ranks.high, 1u), min(goal.ranks.low, sample.num_elements())},
      [](uint32_t bin) { return CoarseKeys<T>(bin); }, found);
  const Estimate &high = found[0], &low = found[1];
  // A side that no rank of the sample limits stays open: the row may hold keys beyond its sample.
  const bool is_open_above = goal.ranks.high == 0;
  const bool is_open_below = goal.ranks.low > sample.num_elements();
  Estimate result;
  result.bracket = Bracket{0, T::kMaxKey};
  if (!is_open_below) result.bracket.lowest = low.bracket.lowest;
  if (!is_open_above) result.bracket.highest = high.bracket.highest;
  result.above = is_open_above ? 0 : high.above;
  result.inside = low.above + low.inside - result.above;

  if (Unlikely(IsCrowded(result, goal))) {
    return RefineEstimate<T>(cta, window, sample, goal, flip, is_open_above, is_open_below, result,
                             low.bracket, low.inside);
  }
  return result.bracket;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_
