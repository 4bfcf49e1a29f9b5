// The vector loops for what every processor of the architecture has.

#include "cpu/simd_kernels.h"

namespace jax_topk::cpu {

extern const SimdKernels kBaselineKernels;
const SimdKernels kBaselineKernels = MakeKernels("baseline");

}  // namespace jax_topk::cpu
