// The vector loops for x86-64 processors with AVX2, BMI1, BMI2 and POPCNT (from 2013 on).

#if defined(__x86_64__)

#include "cpu/simd_kernels.h"

namespace jax_topk::cpu {

extern const SimdKernels kAvx2Kernels;
const SimdKernels kAvx2Kernels = MakeKernels("avx2");

}  // namespace jax_topk::cpu

#endif
