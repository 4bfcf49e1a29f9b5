// The instances of the kernel for one type.

#ifndef JAX_TOPK_CUDA_INSTANCES_CUH_
#define JAX_TOPK_CUDA_INSTANCES_CUH_

#include "kernel.cuh"
#include "kernels.h"

namespace jax_topk {

// Two CTAs per SM where each has a row to itself: while one waits for memory or a barrier the other
// works. The plan gives a CTA of a cluster an SM of its own, and with it all registers.
template <typename T, bool kIsSorted, bool kHasClusters>
__global__ void __launch_bounds__(kThreads, kHasClusters ? 1 : 2)
    TopKKernel(const __grid_constant__ TopKArgs args) {
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
