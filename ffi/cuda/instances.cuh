// The instances of the kernel for one type.

#ifndef JAX_TOPK_CUDA_INSTANCES_CUH_
#define JAX_TOPK_CUDA_INSTANCES_CUH_

#include "kernel.cuh"
#include "kernels.h"

namespace jax_topk {

// Two CTAs per SM: while one waits for memory or a barrier the other works, and a cluster of 16 or
// 8 finds room where one CTA per SM would leave it waiting.
template <typename T, bool kIsSorted, bool kHasClusters>
__global__ void __launch_bounds__(kThreads, 2) TopKKernel(const __grid_constant__ TopKArgs args) {
  if constexpr (JAX_TOPK_HAS_CLUSTERS || !kHasClusters) {
    SelectRow<T, kIsSorted, kHasClusters>(args);
  } else {
    __trap();  // never launched
  }
}

template <typename T>
constexpr KernelsOfType kInstances = {{{TopKKernel<T, false, false>, TopKKernel<T, false, true>},
                                       {TopKKernel<T, true, false>, TopKKernel<T, true, true>}}};

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_INSTANCES_CUH_
