// The guess decides only how many candidates there will be; SelectRow checks it.

#include "cpu/estimate_threshold.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/candidates.h"
#include "cpu/simd.h"

namespace jax_topk::cpu {
namespace {

void LaneMaxima(const uint32_t* block, int64_t size, Key order_mask, Key* maxima) {
  Simd().lane_maxima32(block, size, order_mask, maxima);
}

void LaneMaxima(const uint16_t* block, int64_t size, Key order_mask, Key* maxima) {
  Simd().lane_maxima16(block, size, order_mask, maxima);
}

// The largest k that the lanes serve: of 32 lanes half may hold a selected element before the k-th
// best maximum falls far below the k-th best element.
constexpr int64_t kMaxLaneK = kNumLanes / 2;

template <typename Bits>
Key EstimateByLanes(const Bits* row, int64_t length, int64_t k, Key order_mask) {
  // Any part of the row gives a safe threshold. A longer part gives a better one, up to where a
  // pass over it costs more than the candidates that it saves.
  constexpr int64_t kNumChunks = 16;
  constexpr int64_t kChunk = 4 * kNumLanes;
  Key maxima[kNumLanes] = {};
  if (length <= kNumChunks * kChunk) {
    LaneMaxima(row, length / kNumLanes * kNumLanes, order_mask, maxima);
  } else {
    for (int64_t i = 0; i < kNumChunks; ++i) {
      LaneMaxima(row + (length - kChunk) * i / (kNumChunks - 1), kChunk, order_mask, maxima);
    }
  }
  if (k == 1) return *std::max_element(maxima, maxima + kNumLanes);
  return FindPivot(maxima, kNumLanes, k).key;
}

template <typename Bits>
Key EstimateBySample(const Bits* row, int64_t length, int64_t k, Key order_mask) {
  // Neighbours come from one cache line; more of them would be one sample if the row is smooth.
  constexpr int64_t kNeighbours = 4;
  constexpr int64_t kMaxSample = 4096;
  // A larger sample costs more itself and leaves fewer candidates, in number 4 sqrt(k * length /
  // sample) above k. The sum is flat around its least value; the factor is measured.
  const double k_length = static_cast<double>(k) * static_cast<double>(length);
  const int64_t num_places = std::min<int64_t>(
      kMaxSample / kNeighbours, static_cast<int64_t>(3.0 / kNeighbours * std::cbrt(k_length)) + 1);
  const int64_t sample_size = num_places * kNeighbours;
  const double expected =
      static_cast<double>(k) * static_cast<double>(sample_size) / static_cast<double>(length);
  const int64_t rank = static_cast<int64_t>(expected + 4.0 * std::sqrt(expected)) + 2;
  if (2 * rank > sample_size || 4 * sample_size > length) return 0;

  Key sample[kMaxSample];
  const int64_t stride = length / num_places;
  uint32_t random = 12345;
  for (int64_t i = 0; i < num_places; ++i) {
    // A place at random within each stratum, so that no period in the row can hide from the sample.
    random = random * 1664525u + 1013904223u;
    const int64_t offset = static_cast<int64_t>(
        (uint64_t{random} * static_cast<uint64_t>(stride - kNeighbours + 1)) >> 32);
    const Bits* const place = row + length * i / num_places + offset;
    for (int64_t j = 0; j < kNeighbours; ++j) {
      sample[i * kNeighbours + j] = MakeKey(place[j], order_mask);
    }
  }
  return FindPivot(sample, sample_size, rank).key;
}

}  // namespace

template <typename Bits>
Key EstimateThreshold(const Bits* row, int64_t length, int64_t k, Key order_mask) {
  if (k <= kMaxLaneK) {
    return length < 2 * kNumLanes ? 0 : EstimateByLanes(row, length, k, order_mask);
  }
  return EstimateBySample(row, length, k, order_mask);
}

template Key EstimateThreshold<uint32_t>(const uint32_t*, int64_t, int64_t, Key);
template Key EstimateThreshold<uint16_t>(const uint16_t*, int64_t, int64_t, Key);

}  // namespace jax_topk::cpu
