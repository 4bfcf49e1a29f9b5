// The instances of the kernel for one type.

#ifndef JAX_TOPK_CUDA_INSTANCES_CUH_
#define JAX_TOPK_CUDA_INSTANCES_CUH_

#include "kernel.cuh"
#include "kernels.h"

namespace jax_topk {

// Two CTAs per SM where each has a row to itself: while one waits for memory or a barrier the other
// works. The plan gives a CTA of a cluster an SM of its own, and with it all registers.
template <typename T, int kPairTurns, bool kHasClusters>
__global__ void __launch_bounds__(kThreads, kHasClusters ? 1 : 2)
    TopKKernel(const __grid_constant__ TopKArgs args) {
  if constexpr (JAX_TOPK_HAS_CLUSTERS || !kHasClusters) {
    SelectRow<T, kPairTurns, kHasClusters>(args);
  } else {
    __trap();  // never launched
  }
}

// For rows of many pairs. A CTA has an SM to itself in any case, because of its shared memory, so
// one instance serves launches with and without clusters. It takes time to compile.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    TopKKernelOfManyPairs(const __grid_constant__ TopKArgs args) {
  SelectRow<T, kMostPairTurns, JAX_TOPK_HAS_CLUSTERS != 0>(args);
}

template <typename T>
constexpr KernelsOfType kInstances = {
    {{TopKKernel<T, 0, false>, TopKKernel<T, 0, true>},
     {TopKKernel<T, kFewPairTurns, false>, TopKKernel<T, kFewPairTurns, true>},
     {TopKKernelOfManyPairs<T>, TopKKernelOfManyPairs<T>}}};

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_INSTANCES_CUH_
