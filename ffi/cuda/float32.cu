#include "instances.cuh"

namespace jax_topk {

const KernelsOfType kFloat32Kernels = kInstances<Float32>;

}  // namespace jax_topk
