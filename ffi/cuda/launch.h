// Launches the kernel on a stream. Needs the CUDA runtime, knows nothing of XLA or Python.

#ifndef JAX_TOPK_CUDA_LAUNCH_H_
#define JAX_TOPK_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "../problem.h"
#include "buffers.h"

namespace jax_topk {

// The limits of a device, read once per process. Returns an empty string or a sentence.
std::string GetDeviceLimits(int device, DeviceLimits* limits);

// Plans and launches `problem` on the current device; no allocation, synchronisation or host read,
// so it may be captured into a CUDA graph. Returns an empty string or a sentence. `may_overlap`:
// the kernel may start while those before it in the stream end. Behind launches of its own that
// saves half a microsecond; behind kernels that do not make way it costs a fifth of one (on an
// H200).
std::string LaunchTopK(const Problem& problem, bool is_smallest, std::string_view overrides,
                       const TopKBuffers& buffers, bool may_overlap, cudaStream_t stream);

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_LAUNCH_H_
