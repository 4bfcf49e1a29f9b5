// Exports the planner to Python, so that tests plan launches for devices that are not there.

#ifndef JAX_TOPK_PLAN_BINDING_H_
#define JAX_TOPK_PLAN_BINDING_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace jax_topk {

inline bool ParseDType(const std::string& name, DType* dtype) {
  if (name == "float32") *dtype = DType::kFloat32;
  else if (name == "bfloat16") *dtype = DType::kBFloat16;
  else if (name == "float16") *dtype = DType::kFloat16;
  else return false;
  return true;
}

inline DType ParseDTypeOrThrow(const std::string& name) {
  DType dtype;
  if (!ParseDType(name, &dtype)) {
    throw nanobind::value_error(
        ("dtype '" + name + "' is not one of float32, bfloat16, float16").c_str());
  }
  return dtype;
}

inline nanobind::dict PlanToDict(const LaunchPlan& plan) {
  constexpr const char* kPathNames[] = {"auto", "short", "sample", "exact"};
  nanobind::dict result;
  result["cluster_size"] = plan.cluster_size;
  result["num_ctas"] = plan.num_ctas;
  result["num_stages"] = plan.num_stages;
  result["list_capacity"] = plan.list_capacity;
  result["part_elements"] = plan.part_elements;
  result["smem_bytes"] = plan.smem_bytes;
  result["uses_large_tile"] = plan.uses_large_tile;
  result["path"] = kPathNames[static_cast<int>(plan.path)];
  return result;
}

inline void BindPlan(nanobind::module_& module) {
  namespace nb = nanobind;
  module.def(
      "plan_launch",
      [](int64_t rows, int64_t width, int64_t k, const std::string& dtype, bool is_sorted,
         nb::dict limits, const std::string& overrides) {
        const Problem problem{rows, width, k, ParseDTypeOrThrow(dtype), is_sorted};
        DeviceLimits device{nb::cast<int>(limits["num_sms"]),
                            nb::cast<int64_t>(limits["smem_per_block_bytes"]),
                            nb::cast<int64_t>(limits["smem_per_sm_bytes"]),
                            nb::cast<int>(limits["max_cluster_size"])};
        if (limits.contains("resident_clusters")) {
          device.resident_clusters =
              nb::cast<std::array<int, kMaxClusterSize>>(limits["resident_clusters"]);
        } else {
          AssumeOneGroup(&device);
        }
        PlanOverrides parsed;
        LaunchPlan plan;
        std::string error = ParsePlanOverrides(overrides, &parsed);
        if (error.empty()) error = PlanLaunch(problem, device, parsed, &plan);
        if (!error.empty()) throw nb::value_error(error.c_str());
        return PlanToDict(plan);
      },
      nb::arg("rows"), nb::arg("width"), nb::arg("k"), nb::arg("dtype"), nb::arg("sorted"),
      nb::arg("limits"), nb::arg("overrides") = "",
      "Plans the CUDA launch for static shapes and device limits (a dict with num_sms, "
      "smem_per_block_bytes, smem_per_sm_bytes, max_cluster_size, and, if the device's groups of "
      "SMs are to be respected, resident_clusters: 16 counts by cluster size). Raises ValueError "
      "with a sentence where no launch can be planned.");
}

}  // namespace jax_topk

#endif  // JAX_TOPK_PLAN_BINDING_H_
