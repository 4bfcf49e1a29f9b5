// Step 1: guess a bracket of keys that holds the k-th largest one.
//
// From a sample of s of the row's n elements: the k-th largest of the row has sample rank about
// q = s k / n, with a standard deviation of at most sqrt(q). The bracket runs from the key at rank
// q + m down to rank q - m with m = kDeviations * sqrt(q) + 1, widened to whole histogram bins.
// Elements above it are certain to be selected, elements below it certain not to be, if the guess
// is right; the filter counts both sides exactly and the caller verifies. Every CTA of the row
// reads the same sample, so all arrive at the same bracket without talking.
//
// A row that one tile holds is its own sample: then m = 0 and the bracket is exact.
//
// Cost: one pass over the elements, a histogram of coarse bins, three barriers. Data that crowds
// into few coarse bins (clustered, equal, few distinct values) needs refinements: two passes, a
// histogram and six barriers each.

#ifndef JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_
#define JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_

#include <cstdint>

#include "block.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

constexpr float kDeviations = 4.0f;
constexpr int kSampleElements = 4096;
constexpr int kSamplePiece = 4;  // consecutive vectors
constexpr int kMaxSampleVectors = 16384;
// Longer rows get a longer sample: one vector in this many, so that q does not vanish.
constexpr int kVectorsPerSample = 64;
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
};

// The goal for a row of which all elements are visited: the bracket must hold rank k.
__device__ __forceinline__ BracketGoal ExactGoal(uint32_t k, uint32_t open_limit) {
  return BracketGoal{{k, k}, 1.0f, open_limit};
}

// The goal for a sample of `sample_size` out of `population`.
__device__ __forceinline__ BracketGoal SampleGoal(uint32_t k, uint32_t population,
                                                  uint32_t sample_size, uint32_t open_limit) {
  BracketGoal goal;
  goal.scale = FastDivide(static_cast<float>(population), static_cast<float>(sample_size));
  const float expected = FastDivide(static_cast<float>(k), goal.scale);
  const float margin = kDeviations * FastSquareRoot(expected) + 1.0f;
  goal.ranks.high = expected > margin ? static_cast<uint32_t>(expected - margin) + 1 : 0;
  goal.ranks.low = static_cast<uint32_t>(expected + margin) + 1;
  goal.open_limit = open_limit;
  return goal;
}

// Counts a vector's elements by coarse bin. One instruction per count: the hardware adds the lanes
// that meet in a bin (ATOMS.POPC.INC). What does not count goes to a spare bin, which is cheaper
// than a branch.
template <typename T>
__device__ __forceinline__ void CountCoarse(Cta& cta, const uint4& vector, uint32_t valid) {
#pragma unroll
  for (int i = 0; i < T::kPerVector / 2; ++i) {
    const uint32_t halves = T::Halves(vector, i);
    const uint32_t steps = T::FourfoldSteps(halves) ^ SignsOfHalves(halves);
    constexpr uint32_t kMask = 4 * kBins - 4;  // also the byte offset of a bin
    unsigned char* bins = reinterpret_cast<unsigned char*>(cta.bins);
    const uint32_t first = valid >> (2 * i) & 1 ? steps & kMask : 4 * kBins;
    const uint32_t second = valid >> (2 * i + 1) & 1 ? steps >> 16 & kMask : 4 * kBins;
    atomicAdd(reinterpret_cast<uint32_t*>(bins + first), 1u);
    atomicAdd(reinterpret_cast<uint32_t*>(bins + second), 1u);
  }
}

// Counts a vector's elements inside a bracket by its linear bins.
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

// The smallest range that holds all visited keys inside `bracket`; at least one must be. Three
// barriers.
template <typename T, typename VisitAll>
__device__ __forceinline__ Bracket OccupiedRange(Cta& cta, const Bracket& bracket, uint32_t flip,
                                                 VisitAll visit_all) {
  if (cta.thread == 0) {
    cta.header->lowest_key = T::kMaxKey;
    cta.header->highest_key = 0;
  }
  SyncThreads();  // the reset before the minima
  uint32_t lowest = T::kMaxKey, highest = 0;
  visit_all([&](const uint4& vector, uint32_t valid) {
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      const uint32_t key = T::Key(T::Element(vector, i), flip);
      const bool counts = (valid >> i & 1) != 0 && bracket.Contains(key);
      lowest = min(lowest, counts ? key : T::kMaxKey);
      highest = max(highest, counts ? key : 0);
    }
  });
  lowest = WarpMin(lowest);
  highest = WarpMax(highest);
  if (cta.lane == 0) {
    atomicMin(&cta.header->lowest_key, lowest);
    atomicMax(&cta.header->highest_key, highest);
  }
  SyncThreads();  // minima and maxima before their reads
  const Bracket range{cta.header->lowest_key, cta.header->highest_key};
  SyncThreads();  // the reads before the next reset
  return range;
}

struct Estimate {
  Bracket bracket;
  uint32_t above;   // visited elements above the bracket
  uint32_t inside;  // visited elements inside it
};

// Whether the bracket holds more elements than there is room for.
__device__ __forceinline__ bool IsCrowded(const Estimate& estimate, const BracketGoal& goal) {
  return !estimate.bracket.IsSingleKey() &&
         static_cast<float>(estimate.inside) * goal.scale > static_cast<float>(goal.open_limit);
}

// Narrows a crowded bracket by histograms over the range that its visited elements occupy.
template <typename T, typename VisitAll>
__device__ __forceinline__ Estimate RefineEstimate(Cta cta, const BracketGoal goal, uint32_t flip,
                                                   bool is_open_above, bool is_open_below,
                                                   Estimate result, VisitAll visit_all) {
#pragma unroll 1
  for (int i = 0; i < kMaxRefinements && IsCrowded(result, goal); ++i) {
    const Bracket outer = OccupiedRange<T>(cta, result.bracket, flip, visit_all);
    // Nothing but one value seen: a plateau. Its ties need no room, see FilterTile.
    if (outer.IsSingleKey()) {
      result.bracket = outer;
      break;
    }
    const LinearBins bins(outer);
    visit_all([&](const uint4& vector, uint32_t valid) {
      CountLinear<T>(cta, vector, valid, flip, outer, bins);
    });
    SyncThreads();  // counts before the search
    const uint32_t above = result.above;
    const uint32_t inside = result.inside;
    RankBin high, low;
    FindRankBins(cta, BinOrder::kFromTop, is_open_above ? 1 : goal.ranks.high - above,
                 goal.ranks.low - above, &high, &low);
    const Bracket split = bins.Keys(high.bin, low.bin, outer);
    if (!is_open_below) result.bracket.lowest = split.lowest;
    if (!is_open_above) result.bracket.highest = split.highest;
    if (!is_open_above) result.above = above + high.above;
    result.inside = above + low.above + low.inside - result.above;
    // Few values with many ties each, and the ranks fall on several of them: only exact counts
    // help.
    if (result.inside == inside) break;
  }
  return result;
}

// `visit_all(visit)` calls visit(vector, valid) for this thread's share of the elements, a vector
// at a time, and may be called several times; at least one element is visited by some thread. The
// histogram is zero on entry and on exit. All threads return the same.
template <typename T, typename VisitAll>
__device__ __forceinline__ Estimate EstimateBracket(Cta& cta, const BracketGoal& goal,
                                                    uint32_t flip, VisitAll visit_all) {
  visit_all([&](const uint4& vector, uint32_t valid) { CountCoarse<T>(cta, vector, valid); });
  SyncThreads();  // counts before the search
  RankBin high, low;
  const uint32_t num_visited =
      FindRankBins(cta, flip == 0 ? BinOrder::kRawLargest : BinOrder::kRawSmallest, goal.ranks.high,
                   goal.ranks.low, &high, &low);
  // A side that no rank of the sample limits stays open: the row may hold keys beyond its sample.
  const bool is_open_above = goal.ranks.high == 0;
  const bool is_open_below = goal.ranks.low > num_visited;
  Estimate result;
  result.bracket = Bracket{0, T::kMaxKey};
  if (!is_open_below) result.bracket.lowest = CoarseLowestKey<T>(low.bin);
  if (!is_open_above && high.bin != 0) {
    result.bracket.highest = CoarseLowestKey<T>(high.bin - 1) - 1;
  }
  result.above = is_open_above ? 0 : high.above;
  result.inside = low.above + low.inside - result.above;

  if (Unlikely(IsCrowded(result, goal))) {
    result = RefineEstimate<T>(cta, goal, flip, is_open_above, is_open_below, result, visit_all);
  }
  return result;
}

// Vectors in the sample of a row: a power of two.
template <typename T>
__device__ __forceinline__ int SampleVectors(const RowWindow& window) {
  int num_samples = kSampleElements / T::kPerVector;
  while (num_samples < kMaxSampleVectors && window.num_vectors / num_samples > kVectorsPerSample) {
    num_samples *= 2;
  }
  return num_samples;
}

// Visits a thread's share of the sample: 64 consecutive bytes at a pseudo-random place in each of
// equally long stretches of the row, so that neither a trend nor a period in the data misleads.
// Smaller pieces would be better samples, but every line that a warp touches costs a cycle of the
// L1: 1024 separate vectors take 1000 cycles. They stay in L1 for a second visit.
template <typename T, typename Visit>
__device__ __forceinline__ void VisitSample(int thread, const RowWindow& window, int num_samples,
                                            Visit visit) {
  constexpr int kAtOnce = kSampleElements / T::kPerVector / kThreads;
  static_assert(kAtOnce >= 1, "a sample has at least one vector per thread");
  const int shift = 16 + 31 - __clz(num_samples / kSamplePiece);
#pragma unroll 1
  for (int first = thread; first < num_samples; first += kAtOnce * kThreads) {
    VisitVectors<T, kAtOnce>(
        window,
        [&](int v) {
          const uint32_t i = first + v * kThreads;
          const uint32_t piece = i / kSamplePiece;
          const uint32_t jitter = (piece * 0x9E3779B1u) >> 16;  // golden ratio hash
          const uint64_t place = (piece << 16) + jitter;        // piece < 2^14
          const uint32_t span = max(window.num_vectors - (kSamplePiece - 1), 1);
          const int32_t index = static_cast<int32_t>((place * span) >> shift) +
                                static_cast<int32_t>(i % kSamplePiece);
          return index < window.num_vectors ? index : -1;
        },
        visit);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_ESTIMATE_BRACKET_CUH_
