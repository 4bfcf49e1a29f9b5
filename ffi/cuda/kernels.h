// The kernels. Which one a launch takes follows from static shapes.

#ifndef JAX_TOPK_CUDA_KERNELS_H_
#define JAX_TOPK_CUDA_KERNELS_H_

#include <array>

#include "args.h"

namespace jax_topk {

using Kernel = void (*)(TopKArgs);

// Of one type: [0: not sorted, 1: sorted, of few pairs, 2: of many][are there clusters].
using KernelsOfType = std::array<std::array<Kernel, 2>, 3>;

// Each in a source file of its own, so that they compile side by side.
extern const KernelsOfType kFloat32Kernels;
extern const KernelsOfType kBFloat16Kernels;
extern const KernelsOfType kFloat16Kernels;

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_KERNELS_H_
