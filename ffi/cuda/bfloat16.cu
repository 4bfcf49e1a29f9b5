#include "instances.cuh"

namespace jax_topk {

const KernelsOfType kBFloat16Kernels = kInstances<BFloat16>;

}  // namespace jax_topk
