#include "launch.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "../plan.h"
#include "args.h"
#include "kernels.h"

namespace jax_topk {
namespace {

// The kernel of a launch.
Kernel FindKernel(const Problem& problem, const LaunchPlan& plan) {
  const KernelsOfType& kernels = problem.dtype == DType::kFloat32    ? kFloat32Kernels
                                 : problem.dtype == DType::kBFloat16 ? kBFloat16Kernels
                                                                     : kFloat16Kernels;
  const int order = !problem.is_sorted ? 0 : problem.k <= kMostFewPairs ? 1 : 2;
  return kernels[order][plan.cluster_size > 1];
}

constexpr int kMaxDevices = 64;

// Rows of one launch: a grid has fewer than 2^31 CTAs. More rows take several launches.
constexpr int64_t kMaxRowsPerLaunch = int64_t{1} << 30;

// The oldest compute capability that the kernels are compiled for.
constexpr int kOldestMajor = 8;

std::string Describe(const char* what, cudaError_t error) {
  std::string text = std::string(what) + " failed: " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    // What CUDA says of a machine without any driver, too.
    text += "; there is no NVIDIA driver, or it is older than CUDA " +
            std::to_string(CUDART_VERSION / 1000) + "." +
            std::to_string(CUDART_VERSION % 1000 / 10) +
            ", which jax_topk was built with: update it, or use implementation='xla'";
  }
  return text;
}

using LaunchAttributes = std::array<cudaLaunchAttribute, 2>;

// `may_overlap`: the kernel may start before those before it in the stream are complete; it waits
// for them before it touches memory.
cudaLaunchConfig_t MakeConfig(const LaunchPlan& plan, bool may_overlap, cudaStream_t stream,
                              LaunchAttributes* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.num_ctas / plan.cluster_size),
                        static_cast<unsigned>(plan.cluster_size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = attributes->data();
  if (plan.cluster_size > 1) {
    cudaLaunchAttribute& attribute = (*attributes)[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, static_cast<unsigned>(plan.cluster_size), 1};
  }
  if (may_overlap) {
    cudaLaunchAttribute& attribute = (*attributes)[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

std::string QueryDevice(int device, DeviceLimits* limits) {
  int major = 0, minor = 0, smem_per_block = 0, smem_per_sm = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error == cudaSuccess && major < kOldestMajor) {
    return "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) +
           "." + std::to_string(minor) + ", and the kernels are compiled for " +
           std::to_string(kOldestMajor) + ".0 and newer; use implementation='xla'";
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error != cudaSuccess) return Describe("reading the device attributes", error);
  limits->smem_per_block_bytes = smem_per_block;
  limits->smem_per_sm_bytes = smem_per_sm;
  limits->max_cluster_size = 1;
  AssumeOneGroup(limits);
  for (const KernelsOfType* type : {&kFloat32Kernels, &kBFloat16Kernels, &kFloat16Kernels}) {
    for (const auto& [of_one_cta, of_clusters] : *type) {
      for (Kernel kernel : {of_one_cta, of_clusters}) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     smem_per_block);
        if (error != cudaSuccess) {
          return Describe("raising the kernel's shared memory limit", error);
        }
      }
      if (major < 9) continue;
      error = cudaFuncSetAttribute(of_clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return Describe("allowing clusters of 16", error);
    }
  }
  if (major < 9) return "";
  // The largest cluster that fits beside one full CTA's worth of shared memory; MIG slices and
  // partly disabled processors have less than the architecture's 16.
  LaunchPlan plan;
  plan.num_ctas = kMaxClusterSize;
  plan.smem_bytes = smem_per_block;
  LaunchAttributes attributes;
  const cudaLaunchConfig_t config = MakeConfig(plan, false, nullptr, &attributes);
  const Kernel kernel = kFloat32Kernels[0][true];
  int cluster_size = 1;
  error = cudaOccupancyMaxPotentialClusterSize(&cluster_size, kernel, &config);
  if (error != cudaSuccess) return Describe("asking for the largest cluster", error);
  limits->max_cluster_size = cluster_size < 1 ? 1 : cluster_size;
  for (int size = 2; size <= limits->max_cluster_size; ++size) {
    plan.cluster_size = size;
    plan.num_ctas = size;
    const cudaLaunchConfig_t of_size = MakeConfig(plan, false, nullptr, &attributes);
    error = cudaOccupancyMaxActiveClusters(&limits->resident_clusters[size - 1], kernel, &of_size);
    if (error == cudaErrorInvalidClusterSize) {  // no clusters of this size
      (void)cudaGetLastError();
      limits->resident_clusters[size - 1] = 0;
      continue;
    }
    if (error != cudaSuccess) return Describe("asking how many clusters run together", error);
  }
  return "";
}

// The buffers of the rows from `row` on.
TopKBuffers RowsFrom(const Problem& problem, const TopKBuffers& buffers, int64_t row) {
  const int64_t bytes = ElementBytes(problem.dtype);
  TopKBuffers rest = buffers;
  rest.operand = static_cast<const char*>(buffers.operand) + row * problem.width * bytes;
  rest.starts += row;
  rest.lengths += row;
  if (rest.values != nullptr) {
    rest.values = static_cast<char*>(buffers.values) + row * problem.k * bytes;
  }
  rest.indices += row * problem.k;
  return rest;
}

}  // namespace

std::string GetDeviceLimits(int device, DeviceLimits* limits) {
  struct Entry {
    std::once_flag once;
    DeviceLimits limits;
    std::string error;
  };
  static std::array<Entry, kMaxDevices> entries;
  if (device < 0 || device >= kMaxDevices) {
    return "device " + std::to_string(device) + " is not between 0 and " +
           std::to_string(kMaxDevices - 1);
  }
  Entry& entry = entries[device];
  std::call_once(entry.once, [&] { entry.error = QueryDevice(device, &entry.limits); });
  *limits = entry.limits;
  return entry.error;
}

std::string LaunchTopK(const Problem& problem, bool is_smallest, std::string_view overrides,
                       const TopKBuffers& buffers, bool may_overlap, cudaStream_t stream) {
  if (problem.rows > kMaxRowsPerLaunch && problem.k > 0) {
    for (int64_t row = 0; row < problem.rows; row += kMaxRowsPerLaunch) {
      Problem part = problem;
      part.rows = std::min(kMaxRowsPerLaunch, problem.rows - row);
      const std::string error = LaunchTopK(part, is_smallest, overrides,
                                           RowsFrom(problem, buffers, row), may_overlap, stream);
      if (!error.empty()) return error;
    }
    return "";
  }
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Describe("asking for the current device", error);
  DeviceLimits limits;
  std::string problem_text = GetDeviceLimits(device, &limits);
  if (!problem_text.empty()) return problem_text;
  PlanOverrides parsed;
  problem_text = ParsePlanOverrides(overrides, &parsed);
  if (!problem_text.empty()) return problem_text;
  if (problem.rows == 0 || problem.k == 0) return "";
  LaunchPlan plan;
  problem_text = PlanLaunch(problem, limits, parsed, &plan);
  if (!problem_text.empty()) return problem_text;

  const TopKArgs args = MakeArgs(problem, plan, is_smallest, buffers);

  LaunchAttributes attributes;
  // Launches that overlap came with clusters.
  const cudaLaunchConfig_t config =
      MakeConfig(plan, may_overlap && limits.max_cluster_size > 1, stream, &attributes);
  error = cudaLaunchKernelEx(&config, FindKernel(problem, plan), args);
  if (error != cudaSuccess) return Describe("launching the top-k kernel", error);
  return "";
}

}  // namespace jax_topk
