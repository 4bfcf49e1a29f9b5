// Launch planning: a pure function of static shapes and device limits. No CUDA here, so that it is
// tested on any machine; the kernel is launched with exactly what it returns.

#ifndef JAX_TOPK_PLAN_H_
#define JAX_TOPK_PLAN_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "problem.h"

namespace jax_topk {

// How a row is treated. kAuto decides per row by its length on the device; the others force one
// treatment wherever it can serve a row (tests and the bench use them).
enum class Path : int {
  kAuto = 0,
  kShort = 1,   // one CTA holds the whole row and histograms all of it
  kSample = 2,  // one or several CTAs guess a bracket from a sample, then stream the row
  kExact = 3,   // no guess: the bracket is narrowed by exact histograms over the whole row
};

// Everything that a launch needs, decided before any length is known.
struct LaunchPlan {
  int cluster_size = 1;   // CTAs that share one row
  int64_t num_ctas = 0;   // rows * cluster_size
  int num_stages = 1;     // tiles of a warp in flight while a row is streamed
  int list_capacity = 0;  // entries at or above the lower bound that one row may keep
  int part_elements = 0;  // a row gets one CTA per this many elements, up to cluster_size
  int64_t smem_bytes = 0;
  bool uses_large_tile = false;  // for rows that one CTA takes
  Path path = Path::kAuto;
};

// Overrides of a plan, as text: comma-separated `name=value` with the names
//   path=auto|short|sample|exact   cluster=1..16   candidates=N   part=N   stages=1|2
// Empty text overrides nothing.
struct PlanOverrides {
  Path path = Path::kAuto;
  int cluster_size = 0;  // 0: not overridden
  int candidates = 0;
  int part_elements = 0;
  int num_stages = 0;
};

// Parses overrides. Returns an empty string, or a sentence that says what is wrong.
std::string ParsePlanOverrides(std::string_view text, PlanOverrides* overrides);

// Plans one launch. Returns an empty string, or a sentence that says why it cannot be planned.
std::string PlanLaunch(const Problem& problem, const DeviceLimits& limits,
                       const PlanOverrides& overrides, LaunchPlan* plan);

}  // namespace jax_topk

#endif  // JAX_TOPK_PLAN_H_
