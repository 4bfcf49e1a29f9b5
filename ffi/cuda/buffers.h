// Where a call's operands and results lie: what a launch needs besides its problem and its plan.

#ifndef JAX_TOPK_CUDA_BUFFERS_H_
#define JAX_TOPK_CUDA_BUFFERS_H_

#include <cstdint>

namespace jax_topk {

// One call's buffers on the device; `values` may be null.
struct TopKBuffers {
  const void* operand;
  const int32_t* starts;
  const int32_t* lengths;
  void* values;
  int32_t* indices;
};

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_BUFFERS_H_
