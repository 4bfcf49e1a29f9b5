// Exact top-k of the rows of a matrix with a window per row: the CPU target, without XLA.

#ifndef JAX_TOPK_CPU_TOP_K_H_
#define JAX_TOPK_CPU_TOP_K_H_

#include <cstdint>

#include "cpu/parallel.h"
#include "problem.h"

namespace jax_topk::cpu {

struct TopKArgs {
  Problem problem;         // width < 2^31, 0 <= k <= width
  bool is_smallest;        // the k smallest instead of the k largest
  const void* operand;     // [rows, width]
  const int32_t* starts;   // [rows], any value: clamped
  const int32_t* lengths;  // [rows], any value: clamped
  void* values;            // [rows, k] in the type of the operand; null where not wanted
  int32_t* indices;        // [rows, k], counted from the row's clamped start
};

// Writes the top-k of every row. Time O(length of the window) per row whatever the values, memory
// O(k) per thread. The result does not depend on the number of threads.
//
// Throws std::bad_alloc where memory is short, with the results unspecified, and nothing else.
void RunTopK(const TopKArgs& args, Executor& executor);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_TOP_K_H_
