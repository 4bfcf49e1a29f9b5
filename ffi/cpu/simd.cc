// Asks the processor what it has, once.

#include "cpu/simd.h"

#include <cstdlib>
#include <string_view>

namespace jax_topk::cpu {

extern const SimdKernels kBaselineKernels;
#if defined(__x86_64__)
extern const SimdKernels kAvx2Kernels;
#endif

namespace {

const SimdKernels& Choose() {
#if defined(__x86_64__)
  const char* const variable = std::getenv("JAX_TOPK_CPU_ISA");
  const std::string_view limit = variable == nullptr ? "" : variable;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (has_avx2 && limit != "baseline") return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const SimdKernels& Simd() {
  static const SimdKernels& kernels = Choose();
  return kernels;
}

}  // namespace jax_topk::cpu
