// The kernel's arguments: what the caller passed and what the plan fixed. Passed by value.

#ifndef JAX_TOPK_CUDA_ARGS_H_
#define JAX_TOPK_CUDA_ARGS_H_

#include <cstdint>

#include "../plan.h"
#include "../problem.h"
#include "../smem_layout.h"
#include "buffers.h"

namespace jax_topk {

struct TopKArgs {
  // What is wanted before the length comes first, in one line of the constant cache.
  const int32_t* lengths;  // [rows], any value: clamped on the device
  const int32_t* starts;   // [rows], any value: clamped on the device
  const void* operand;     // [rows, width], row-major
  int32_t* indices;        // [rows, k]
  void* values;            // [rows, k] or null
  int32_t width;
  int32_t k;              // >= 1
  int64_t operand_bytes;  // rows * width elements: loads stay inside
  bool are_rows_aligned;  // every row begins at a 16-byte address
  bool is_smallest;
  int32_t path;  // Path
  int32_t cluster_size;
  uint64_t cluster_reciprocal;  // 2^32 / cluster_size, rounded up
  int32_t num_stages;
  int32_t part_vectors;  // fewest vectors per CTA of a row that several share
  bool uses_large_tile;  // for rows that it holds
  int32_t list_capacity;
  SmemLayout layout;
};

// The arguments of a planned launch.
inline TopKArgs MakeArgs(const Problem& problem, const LaunchPlan& plan, bool is_smallest,
                         const TopKBuffers& buffers) {
  TopKArgs args{};
  args.operand = buffers.operand;
  args.starts = buffers.starts;
  args.lengths = buffers.lengths;
  args.values = buffers.values;
  args.indices = buffers.indices;
  args.operand_bytes = problem.rows * problem.width * ElementBytes(problem.dtype);
  args.width = static_cast<int32_t>(problem.width);
  args.are_rows_aligned = reinterpret_cast<uintptr_t>(buffers.operand) % kVectorBytes == 0 &&
                          problem.width * ElementBytes(problem.dtype) % kVectorBytes == 0;
  args.k = static_cast<int32_t>(problem.k);
  args.is_smallest = is_smallest;
  args.path = static_cast<int32_t>(plan.path);
  args.cluster_size = plan.cluster_size;
  args.cluster_reciprocal =
      ((uint64_t{1} << 32) + static_cast<uint64_t>(plan.cluster_size) - 1) / plan.cluster_size;
  args.num_stages = plan.num_stages;
  args.part_vectors = static_cast<int32_t>(
      AlignUp(plan.part_elements * ElementBytes(problem.dtype), kVectorBytes) / kVectorBytes);
  args.list_capacity = plan.list_capacity;
  args.layout = MakeSmemLayout(plan.cluster_size, plan.num_stages, plan.list_capacity, problem.k);
  args.uses_large_tile = plan.uses_large_tile;
  return args;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_ARGS_H_
