// The exact path: narrows a bracket that is known to hold the k-th largest key until its elements
// fit into the list, whatever the data. Each round splits the bracket into up to kBins equal
// ranges of keys, counts all elements of the row into them, and keeps the range that holds the
// k-th: three rounds exhaust 32-bit keys. Cost of a round: one pass over the part from global
// memory, a histogram, and between several CTAs two exchanges.

#ifndef JAX_TOPK_CUDA_NARROW_BRACKET_CUH_
#define JAX_TOPK_CUDA_NARROW_BRACKET_CUH_

#include <cstdint>

#include "block.cuh"
#include "estimate_bracket.cuh"
#include "exchange.cuh"
#include "row_window.cuh"

namespace jax_topk {

// A bracket with exact counts: above < k <= above + inside.
struct KnownBracket {
  Bracket keys;
  uint32_t above;
  uint32_t inside;
};

// Loads in flight per thread.
constexpr int kVectorsAtOnce = 4;

// What the exact counts of a bracket that failed still say.
template <typename T>
__device__ __forceinline__ KnownBracket LearnFromFailure(const Bracket& guess, const RowCounts& row,
                                                         uint32_t k, uint32_t length) {
  if (row.certain >= k) return {{guess.highest + 1, T::kMaxKey}, 0, row.certain};
  const uint32_t reached = row.certain + row.open;
  if (reached < k) return {{0, guess.lowest - 1}, reached, length - reached};
  return {guess, row.certain, row.open};
}

// The same of streamed parts, which know less where something did not fit, see CountStretch.
template <typename T>
__device__ __forceinline__ KnownBracket LearnFromStream(const Bracket& guess, const RowCounts& row,
                                                        uint32_t k, uint32_t capacity,
                                                        uint32_t length) {
  const uint32_t reached = row.certain + row.open;
  if (!guess.IsSingleKey() && reached > capacity) return {{guess.lowest, T::kMaxKey}, 0, reached};
  return LearnFromFailure<T>(guess, row, k, length);
}

// Not inlined, see kernel.cuh.
template <typename T>
__device__ __noinline__ Bracket NarrowBracket(Cta cta, RowWindow window, Part part, uint32_t flip,
                                              uint32_t k, uint32_t open_limit, KnownBracket known) {
  cta = KnownShared(cta);
  for (uint32_t round = 0; known.inside > open_limit && !known.keys.IsSingleKey(); ++round) {
    const LinearBins bins(known.keys);
    const auto visit_part = [&](auto visit) {
#pragma unroll 1
      for (int32_t first = part.first + cta.thread; first < part.last;
           first += kVectorsAtOnce * kThreads) {
        VisitVectors<T, kVectorsAtOnce>(
            window,
            [&](int v) {
              const int64_t index = int64_t{first} + v * kThreads;
              return index < part.last ? static_cast<int32_t>(index) : -1;
            },
            visit);
      }
    };
    visit_part([&](const uint4& vector, uint32_t valid) {
      CountLinear<T>(cta, vector, valid, flip, known.keys, bins);
    });
    SyncThreads();  // counts before the sum and the search
    if (cta.num_active > 1) SumBins(cta, round & 1);
    const Bracket outer = known.keys;
    const Estimate found = FindRank<true>(cta, k - known.above,
                                          [&](uint32_t bin) { return bins.Keys(bin, bin, outer); });
    known.keys = found.bracket;
    known.above += found.above;
    known.inside = found.inside;
  }
  return known.keys;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_NARROW_BRACKET_CUH_
