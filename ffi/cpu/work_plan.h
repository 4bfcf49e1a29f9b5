// Divides the rows of a call among threads: pure, by the lengths of the windows.

#ifndef JAX_TOPK_CPU_WORK_PLAN_H_
#define JAX_TOPK_CPU_WORK_PLAN_H_

#include <cstdint>
#include <vector>

#include "problem.h"

namespace jax_topk::cpu {

// The window of a row: elements [start, start + length).
struct Window {
  int64_t start;
  int64_t length;
};

// Clamps `start` to [0, width] and then `length` to what is left. Any two int32 are fine.
Window ClampWindow(int32_t start, int32_t length, int64_t width);

// A row long enough that several threads share it, each selecting from some of its parts.
struct SplitPlan {
  int64_t row;
  Window window;
  int64_t num_parts;
};

// What a thread takes at once: part `begin` of split row `split`, or, where `split` is kWholeRows,
// the rows [begin, end).
struct Unit {
  static constexpr int64_t kWholeRows = -1;

  int64_t split;
  int64_t begin;
  int64_t end;
};

struct WorkPlan {
  int64_t num_threads = 1;  // where 1, there are no units: one thread takes the rows in order
  int64_t max_length = 0;   // of a window
  std::vector<SplitPlan> splits;
  std::vector<Unit> units;  // cover every row once, those of split rows first
};

// Plans for up to `max_threads` threads. Threads are used where the work is worth waking them,
// units are small enough that threads end at nearly the same time whatever the mix of long and
// short rows, and a row that alone would keep a thread busy for longer than the others is split.
WorkPlan PlanWork(const Problem& problem, const int32_t* starts, const int32_t* lengths,
                  int64_t max_threads);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_WORK_PLAN_H_
