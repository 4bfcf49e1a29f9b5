// Runs the steps of a row, estimate -> scan -> cut -> write, on one thread for a row or on several.
//
// Row of many parts: every part is scanned on its own with the threshold of the whole row, and
// whoever finishes the last part goes on with the candidates of all. Nothing waits for it.

#include "cpu/top_k.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/estimate_threshold.h"
#include "cpu/ordered_key.h"
#include "cpu/select_row.h"
#include "cpu/work_plan.h"
#include "cpu/write_row.h"

namespace jax_topk::cpu {
namespace {

// Bits of the worst value of the mode.
template <typename Bits>
constexpr Bits PaddingBits(DType dtype, bool is_smallest) {
  constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  const uint32_t infinity = dtype == DType::kFloat32    ? 0x7f800000u
                            : dtype == DType::kBFloat16 ? 0x7f80u
                                                        : 0x7c00u;
  return static_cast<Bits>(is_smallest ? infinity : infinity | kSign);
}

// Memory of one thread, made when the thread takes its first unit.
struct Scratch {
  Scratch(int64_t length, int64_t k, bool is_sorted)
      : candidates(SelectCapacity(length, k)), sort(is_sorted ? SortCapacity(length, k) : 0) {}

  CandidateBuffer candidates;
  SortBuffer sort;
};

// A split row while threads work on it.
struct SplitRow {
  SplitRow(const SplitPlan& plan, int64_t k)
      : plan(plan),
        part_capacity(SelectCapacity(plan.window.length / plan.num_parts + 1, k)),
        memory(plan.num_parts * (part_capacity + kScanBlock)),
        sizes(static_cast<size_t>(plan.num_parts)),
        num_unfinished(plan.num_parts) {}

  int64_t PartBegin(int64_t part) const { return plan.window.length * part / plan.num_parts; }

  // The memory of a part. Between parts lies room for what a scan writes beyond its end.
  Candidates PartCandidates(int64_t part) {
    const Candidates all = memory.Empty();
    const int64_t offset = part * (part_capacity + kScanBlock);
    return {all.keys + offset, all.indices + offset, 0, part_capacity};
  }

  const SplitPlan plan;
  const int64_t part_capacity;
  CandidateBuffer memory;
  std::vector<int64_t> sizes;  // number of candidates of each part
  std::once_flag is_estimated;
  Key threshold = 0;
  std::atomic<int64_t> num_unfinished;  // parts
};

// The steps of a row. Every thread works with the one instance.
template <typename Bits>
class Selection {
 public:
  explicit Selection(const TopKArgs& args)
      : args_(args),
        k_(args.problem.k),
        order_mask_(OrderMask<Bits>(args.is_smallest)),
        padding_(PaddingBits<Bits>(args.problem.dtype, args.is_smallest)) {}

  void RunRow(int64_t row, Scratch& scratch) const {
    const Window window = ClampWindow(args_.starts[row], args_.lengths[row], args_.problem.width);
    Candidates candidates = scratch.candidates.Empty();
    SelectRow(Elements(row, window), window.length, k_, order_mask_, candidates);
    Write(row, candidates, scratch);
  }

  void RunPart(SplitRow& split, int64_t part, Scratch& scratch) const {
    const Window window = split.plan.window;
    const Bits* const elements = Elements(split.plan.row, window);
    // Waits at most for a thread that is at it already.
    std::call_once(split.is_estimated, [&] {
      split.threshold =
          k_ < window.length ? EstimateThreshold(elements, window.length, k_, order_mask_) : 0;
    });
    Candidates candidates = split.PartCandidates(part);
    SelectPart(elements, split.PartBegin(part), split.PartBegin(part + 1), k_, order_mask_,
               split.threshold, candidates);
    split.sizes[static_cast<size_t>(part)] = candidates.size;
    // Acquire and release: the last one sees what all others wrote.
    if (split.num_unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      FinishSplitRow(split, scratch);
    }
  }

 private:
  const Bits* Elements(int64_t row, Window window) const {
    return static_cast<const Bits*>(args_.operand) + row * args_.problem.width + window.start;
  }

  // Parts are in order of index, so their candidates are too once the gaps between them are closed.
  void FinishSplitRow(SplitRow& split, Scratch& scratch) const {
    Candidates all = split.memory.Empty();
    for (int64_t part = 0; part < split.plan.num_parts; ++part) {
      const Candidates from = split.PartCandidates(part);
      const int64_t size = split.sizes[static_cast<size_t>(part)];
      std::copy_n(from.keys, size, all.keys + all.size);
      std::copy_n(from.indices, size, all.indices + all.size);
      all.size += size;
    }
    const int64_t length = split.plan.window.length;
    if (all.size < std::min(k_, length)) {
      all.size = 0;  // the threshold was too high
      SelectPart(Elements(split.plan.row, split.plan.window), 0, length, k_, order_mask_, 0, all);
    }
    Write(split.plan.row, all, scratch);
  }

  void Write(int64_t row, Candidates& candidates, Scratch& scratch) const {
    Bits* const values = static_cast<Bits*>(args_.values);
    const RowResults<Bits> results = {values == nullptr ? nullptr : values + row * k_,
                                      args_.indices + row * k_, k_, padding_};
    if (args_.problem.is_sorted) {
      WriteBestFirst(candidates, order_mask_, scratch.sort, results);
    } else {
      WriteByIndex(candidates, order_mask_, results);
    }
  }

  const TopKArgs& args_;
  const int64_t k_;
  const Key order_mask_;
  const Bits padding_;
};

template <typename Bits>
void RunTyped(const TopKArgs& args, Executor& executor) {
  const Problem& problem = args.problem;
  const Selection<Bits> selection(args);
  const WorkPlan plan = PlanWork(problem, args.starts, args.lengths, executor.num_threads());
  if (plan.num_threads == 1) {
    Scratch scratch(plan.max_length, problem.k, problem.is_sorted);
    for (int64_t row = 0; row < problem.rows; ++row) selection.RunRow(row, scratch);
    return;
  }

  std::vector<std::unique_ptr<SplitRow>> splits;
  for (const SplitPlan& split : plan.splits) {
    splits.push_back(std::make_unique<SplitRow>(split, problem.k));
  }
  std::vector<std::optional<Scratch>> scratches(static_cast<size_t>(plan.num_threads));
  std::atomic<bool> is_out_of_memory{false};
  const auto run_unit = [&](int64_t worker, int64_t task) {
    std::optional<Scratch>& scratch = scratches[static_cast<size_t>(worker)];
    try {
      if (!scratch.has_value()) scratch.emplace(plan.max_length, problem.k, problem.is_sorted);
    } catch (const std::bad_alloc&) {
      is_out_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
    const Unit& unit = plan.units[static_cast<size_t>(task)];
    if (unit.split == Unit::kWholeRows) {
      for (int64_t row = unit.begin; row < unit.end; ++row) selection.RunRow(row, *scratch);
    } else {
      selection.RunPart(*splits[static_cast<size_t>(unit.split)], unit.begin, *scratch);
    }
  };
  RunTasks(executor, plan.num_threads, static_cast<int64_t>(plan.units.size()), run_unit);
  if (is_out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

}  // namespace

void RunTopK(const TopKArgs& args, Executor& executor) {
  if (args.problem.rows == 0 || args.problem.k == 0) return;
  if (args.problem.dtype == DType::kFloat32) {
    RunTyped<uint32_t>(args, executor);
  } else {
    RunTyped<uint16_t>(args, executor);
  }
}

}  // namespace jax_topk::cpu
