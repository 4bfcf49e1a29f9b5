#include "plan.h"

#include <algorithm>
#include <charconv>

#include "smem_layout.h"

namespace jax_topk {
namespace {

// Entries beyond k that the list may hold. A row of 160 K keeps about 3500 entries for k = 2048,
// with a standard deviation of 430, and 6200 for k = 4096, with one of 570, so overflow needs an
// error of six or seven deviations. With fewer, more rows take the exact path.
constexpr int64_t SpareEntries(int64_t k) { return std::max<int64_t>(4096, k + k / 2); }
constexpr int64_t kFewSpareEntries = 1024;
constexpr int64_t kMinSpareEntries = 256;

// Below this many elements per CTA the exchange between CTAs costs more than it saves.
constexpr int kPartElements = 2048;

// Where a row has more CTAs than this, all of them are faster than one with a large tile: 16384
// elements take 5.2 us with 8 CTAs and 5.7 with one, but 6.1 with 4 and 5.8 with one.
constexpr int kMostForLargeTile = 4;

constexpr int64_t kSmemReservedPerBlock = 1024;  // by the CUDA runtime

// More candidates than any shared memory holds; keeps list_capacity within an int.
constexpr int kMaxCandidates = 1 << 20;

bool ParseInt(std::string_view text, int* value) {
  const char* end = text.data() + text.size();
  auto [stop, error] = std::from_chars(text.data(), end, *value);
  return error == std::errc() && stop == end;
}

std::string BadOverride(std::string_view item, const char* rule) {
  return "plan override '" + std::string(item) + "' is not valid: " + rule;
}

std::string ParseOne(std::string_view item, PlanOverrides* overrides) {
  const size_t equals = item.find('=');
  if (equals == std::string_view::npos) {
    return BadOverride(item, "write name=value, for instance path=exact");
  }
  const std::string_view name = item.substr(0, equals);
  const std::string_view value = item.substr(equals + 1);
  if (name == "path") {
    if (value == "auto") overrides->path = Path::kAuto;
    else if (value == "short") overrides->path = Path::kShort;
    else if (value == "sample") overrides->path = Path::kSample;
    else if (value == "exact") overrides->path = Path::kExact;
    else return BadOverride(item, "path is one of auto, short, sample, exact");
    return "";
  }
  int number = 0;
  if (!ParseInt(value, &number)) return BadOverride(item, "the value must be an integer");
  if (name == "cluster") {
    if (number < 1 || number > kMaxClusterSize) {
      return BadOverride(item, "cluster is between 1 and 16");
    }
    overrides->cluster_size = number;
  } else if (name == "candidates") {
    if (number < 4) return BadOverride(item, "candidates is at least 4");
    if (number > kMaxCandidates) return BadOverride(item, "candidates is at most 1048576");
    overrides->candidates = number;
  } else if (name == "part") {
    if (number < 1) return BadOverride(item, "part is at least 1");
    overrides->part_elements = number;
  } else if (name == "stages") {
    if (number != 1 && number != 2) return BadOverride(item, "stages is 1 or 2");
    overrides->num_stages = number;
  } else {
    return BadOverride(item, "the names are path, cluster, candidates, part, stages");
  }
  return "";
}

std::string TooManyRows(const Problem& problem, int cluster) {
  return "the operand has " + std::to_string(problem.rows) +
         " rows; one launch of the CUDA kernel takes fewer than 2^31 divided by its cluster size "
         "of " +
         std::to_string(cluster);
}

}  // namespace

std::string ParsePlanOverrides(std::string_view text, PlanOverrides* overrides) {
  *overrides = PlanOverrides();
  while (!text.empty()) {
    const size_t comma = text.find(',');
    std::string error = ParseOne(text.substr(0, comma), overrides);
    if (!error.empty()) return error;
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
    if (text.empty()) return "plan override list ends in a comma; remove it";
  }
  return "";
}

std::string PlanLaunch(const Problem& problem, const DeviceLimits& limits,
                       const PlanOverrides& overrides, LaunchPlan* plan) {
  if (problem.k < 0 || problem.k > problem.width) {
    return "k=" + std::to_string(problem.k) + " must lie between 0 and the row width " +
           std::to_string(problem.width);
  }
  if (problem.k > kMaxK) {
    return "k=" + std::to_string(problem.k) + " exceeds " + std::to_string(kMaxK) +
           ", the largest k of the CUDA kernel; use implementation='xla'";
  }
  if (problem.rows < 0 || problem.width < 0 || problem.width >= (int64_t{1} << 31)) {
    return "the operand has " + std::to_string(problem.rows) + " rows of width " +
           std::to_string(problem.width) + "; the width must stay below 2^31";
  }
  // Before any product with it can overflow.
  if (problem.rows >= (int64_t{1} << 31)) return TooManyRows(problem, 1);
  *plan = LaunchPlan();
  plan->path = overrides.path;
  plan->part_elements = overrides.part_elements > 0 ? overrides.part_elements : kPartElements;

  // The most CTAs per row that leave every CTA an SM to itself, but no more than the widest
  // possible row can use. Where two CTAs share an SM the slowest row takes longer than with fewer
  // CTAs.
  int cluster = 1;
  for (int size = 2; size <= kMaxClusterSize; ++size) {
    const bool fits = std::max(problem.rows, int64_t{1}) <= limits.resident_clusters[size - 1];
    if (fits && int64_t{size - 1} * plan->part_elements < problem.width) cluster = size;
  }
  if (overrides.cluster_size > 0) {
    if (overrides.cluster_size > limits.max_cluster_size) {
      return "plan override cluster=" + std::to_string(overrides.cluster_size) +
             " exceeds the device's largest cluster of " + std::to_string(limits.max_cluster_size);
    }
    cluster = overrides.cluster_size;
  }
  if (problem.rows * cluster >= (int64_t{1} << 31)) {
    return TooManyRows(problem, cluster);
  }
  int64_t spare = overrides.candidates > 0 ? overrides.candidates : SpareEntries(problem.k);
  const int64_t smem_limit =
      std::min(limits.smem_per_block_bytes, limits.smem_per_sm_bytes - kSmemReservedPerBlock);
  // Where every CTA has an SM to itself, its shared memory is better spent on loads in flight.
  int num_stages = overrides.num_stages;
  if (num_stages == 0) num_stages = problem.rows * cluster <= limits.num_sms ? 2 : 1;
  while (true) {
    plan->cluster_size = cluster;
    plan->num_ctas = problem.rows * cluster;
    plan->num_stages = num_stages;
    plan->list_capacity = static_cast<int>(AlignUp(problem.k + spare, 4));
    const SmemLayout layout = MakeSmemLayout(cluster, num_stages, plan->list_capacity, problem.k);
    plan->smem_bytes = layout.total_bytes;
    plan->uses_large_tile = layout.has_large_tile && cluster <= kMostForLargeTile;
    if (plan->smem_bytes <= smem_limit) return "";
    // Too large: give up what costs least first.
    if (num_stages > 1 && overrides.num_stages == 0) {
      num_stages = 1;
    } else if (spare > kFewSpareEntries && overrides.candidates == 0) {
      spare /= 2;
    } else if (cluster > 1 && overrides.cluster_size == 0) {
      cluster = 1;
    } else if (spare > kMinSpareEntries && overrides.candidates == 0) {
      spare /= 2;
    } else {
      return "k=" + std::to_string(problem.k) + " needs " + std::to_string(plan->smem_bytes) +
             " bytes of shared memory per block, but the device offers " +
             std::to_string(smem_limit) + "; pass a smaller k, or use implementation='xla'";
    }
  }
}

}  // namespace jax_topk
