#include "instances.cuh"

namespace jax_topk {

const KernelsOfType kFloat16Kernels = kInstances<Float16>;

}  // namespace jax_topk
