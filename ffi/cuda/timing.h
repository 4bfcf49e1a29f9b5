// Times launches inside one CUDA graph: the bench's metrics graph_chain_us and behind_others_us,
// and their floors.

#ifndef JAX_TOPK_CUDA_TIMING_H_
#define JAX_TOPK_CUDA_TIMING_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "launch.h"

namespace jax_topk {

// Enqueues launch `index` of a chain on a stream; returns an empty string or a sentence.
using Launch = std::function<std::string(int index, cudaStream_t stream)>;

// An empty kernel: what a graph node costs.
std::string LaunchEmpty(cudaStream_t stream);

// Reads every row's window once and writes k indices per row: what moving the data costs.
std::string LaunchRead(const Problem& problem, const TopKBuffers& buffers, cudaStream_t stream);

// The middle one of the samples in order, or the later of two; there are some.
double Median(std::vector<double> samples);

// Captures `num_launches` calls of `launch` into one graph and replays it. `microseconds` receives,
// for each of `num_replays` replays, the time of the replay divided by `num_launches`.
std::string TimeGraphChain(const Launch& launch, int num_launches, int num_replays,
                           std::vector<double>* microseconds);

// The same for launches behind kernels that drive instructions and data out of the caches, as in a
// decode step: before each, one kernel executes 256 KB of instructions, one reads 200 MB, and
// `read` brings back to the L2 cache what the launch reads. What these take with an empty kernel in
// the launch's place, in the median, is subtracted, so single replays may come out negative.
std::string TimeBehindOthers(const Launch& read, const Launch& launch, int num_launches,
                             int num_replays, std::vector<double>* microseconds);

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_TIMING_H_
