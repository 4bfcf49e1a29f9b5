// Costs are estimates in units of about 1/8 ns, measured on a 2.6 GHz Zen 4 core; only their ratios
// and their order of magnitude matter.

#include "cpu/work_plan.h"

#include <algorithm>

namespace jax_topk::cpu {
namespace {

constexpr int64_t kCostPerRow = 500;
constexpr int64_t kCostPerElement = 1;
constexpr int64_t kCostPerSorted = 128;   // result, best first: keep and sort
constexpr int64_t kCostPerUnsorted = 96;  // result, by index: keep and cut

// A thread takes 10 to 50 us to wake up, and the caller has to be woken up too if it has gone to
// sleep. Below twice this cost two threads were slower than one.
constexpr int64_t kCostOfThread = 300'000;

constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kMinSplitLength = 32768;

}  // namespace

Window ClampWindow(int32_t start, int32_t length, int64_t width) {
  const int64_t clamped_start = std::clamp<int64_t>(start, 0, width);
  return {clamped_start, std::clamp<int64_t>(length, 0, width - clamped_start)};
}

WorkPlan PlanWork(const Problem& problem, const int32_t* starts, const int32_t* lengths,
                  int64_t max_threads) {
  const auto window_of = [&](int64_t row) {
    return ClampWindow(starts[row], lengths[row], problem.width);
  };
  const auto cost_of = [&](int64_t length) {
    const int64_t num_results = std::min(problem.k, length);
    return kCostPerRow + kCostPerElement * length +
           (problem.is_sorted ? kCostPerSorted : kCostPerUnsorted) * num_results;
  };

  WorkPlan plan;
  int64_t total_cost = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t length = window_of(row).length;
    plan.max_length = std::max(plan.max_length, length);
    total_cost += cost_of(length);
  }
  plan.num_threads = std::max<int64_t>(1, std::min(max_threads, total_cost / kCostOfThread));
  if (plan.num_threads == 1) return plan;

  const int64_t unit_cost = total_cost / (kUnitsPerThread * plan.num_threads) + 1;
  std::vector<Unit> whole;
  Unit rows = {Unit::kWholeRows, 0, 0};
  int64_t rows_cost = 0;
  const auto end_rows = [&](int64_t next_row) {
    if (rows.begin < rows.end) whole.push_back(rows);
    rows = {Unit::kWholeRows, next_row, next_row};
    rows_cost = 0;
  };
  for (int64_t row = 0; row < problem.rows; ++row) {
    const Window window = window_of(row);
    const int64_t num_parts = kCostPerElement * window.length / unit_cost;
    if (num_parts >= 2 && window.length >= kMinSplitLength) {
      const auto split = static_cast<int64_t>(plan.splits.size());
      plan.splits.push_back({row, window, num_parts});
      for (int64_t part = 0; part < num_parts; ++part) plan.units.push_back({split, part, part});
      end_rows(row + 1);
      continue;
    }
    rows.end = row + 1;
    rows_cost += cost_of(window.length);
    if (rows_cost >= unit_cost) end_rows(row + 1);
  }
  end_rows(problem.rows);
  plan.units.insert(plan.units.end(), whole.begin(), whole.end());
  return plan;
}

}  // namespace jax_topk::cpu
