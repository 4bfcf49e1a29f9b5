// What a call asks for and what the device offers: the inputs of the launch planner.
//
// Static facts only. Row lengths are run-time values and never reach the host.

#ifndef JAX_TOPK_PROBLEM_H_
#define JAX_TOPK_PROBLEM_H_

#include <array>
#include <cstdint>

namespace jax_topk {

inline constexpr int kMaxClusterSize = 16;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One call: `rows` rows of `width` allocated columns, of which each row's window is searched.
struct Problem {
  int64_t rows = 0;
  int64_t width = 0;
  int64_t k = 0;
  DType dtype = DType::kFloat32;
  bool is_sorted = false;  // best first; otherwise ascending index
};

// The device properties that planning may use. `max_cluster_size` is 1 where thread-block
// clusters are missing.
struct DeviceLimits {
  int num_sms = 0;
  int64_t smem_per_block_bytes = 0;  // largest dynamic shared memory of one block (opt-in)
  int64_t smem_per_sm_bytes = 0;
  int max_cluster_size = 1;
  // Of each size from 1 on: clusters that run together with an SM for every CTA. The CTAs of a
  // cluster lie in one of the device's groups of SMs (GPCs), which have more or fewer of them.
  std::array<int, kMaxClusterSize> resident_clusters{};
};

// The most clusters that a device could run together, if it were one group of SMs.
inline void AssumeOneGroup(DeviceLimits* limits) {
  for (int size = 1; size <= kMaxClusterSize; ++size) {
    limits->resident_clusters[size - 1] =
        size == 1 || size <= limits->max_cluster_size ? limits->num_sms / size : 0;
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_PROBLEM_H_
