// Plans a launch as the CUDA target does and runs its kernel on the CPU, one cluster at a time.
// Exports one C function, which tests call through ctypes. See ptx.cuh for how it works.

#include "ptx.cuh"
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../ffi/cuda/kernel.cuh"
#include "../../ffi/plan.h"

namespace jax_topk {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

// Behind each CTA's shared memory, so that what is written there is noticed.
constexpr size_t kGuardBytes = 64 * 1024;
constexpr unsigned char kGuard = 0xa5;

// Who runs next, and when what is in flight arrives. The hardware may choose any order, so all have
// to give one result. A missing barrier often needs one warp far ahead of the others, and a missing
// wait needs data that comes late: a fair order meets neither.
enum class Schedule : int {
  kSweep = 0,  // all threads in turn, from a place and in a direction drawn for every sweep; copies
               // and remote stores arrive at a time that is drawn too
  kEager = 1,  // one warp as far as it gets, then the next; what is sent arrives at once
  kLate = 2,   // the same; what is sent arrives when it is waited for or no thread can go on
};

struct PendingCopy {
  void* to;
  const void* from;
};

struct Warp {
  uint32_t lanes[2][32];
  int deposits[2] = {0, 0};
  int64_t completed[2] = {-1, -1};
};

struct Block {
  std::vector<unsigned char> shared;  // and the guard
  int num_alive = kThreads;
  int num_arrived = 0;
  int64_t num_barriers = 0;
  Warp warps[kWarps];
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  int rank = 0;
  int thread = 0;
  bool is_done = false;
  // What the fiber waits for, on its stack; null while it can go on.
  bool (*is_met)(const void* condition) = nullptr;
  const void* condition = nullptr;
  int64_t num_exchanges = 0;
  std::vector<std::vector<PendingCopy>> groups;  // committed, oldest first
  std::vector<PendingCopy> open_group;
};

struct Message {
  int rank;
  uint32_t offset;
  std::vector<unsigned char> bytes;
  uint32_t barrier_offset;
};

using Kernel = void (*)(const TopKArgs&);

struct Emulator {
  const TopKArgs* args;
  Kernel kernel;
  Schedule schedule;
  std::mt19937 random;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<int> warps;  // of the whole cluster, the next to run first
  unsigned demotion = 0;   // one step in so many puts the first warp last
  std::vector<Message> messages;
  int64_t row = 0;
  int num_cluster_arrivals = 0;
  int num_done = 0;   // fibers
  std::string error;  // the first thing that went wrong
  ucontext_t scheduler;
  Fiber* current = nullptr;
};

Emulator* emulator = nullptr;

void Fail(const std::string& error) {
  if (emulator->error.empty()) emulator->error = error;
}

// Whether something that may arrive at any time arrives now.
bool ArrivesNow() {
  return emulator->schedule == Schedule::kEager ||
         (emulator->schedule == Schedule::kSweep && (emulator->random() & 1) != 0);
}

// The mbarrier: bytes still missing (signed), pending arrivals, and the phase.
struct BarrierState {
  int32_t missing_bytes;
  uint16_t pending;
  uint16_t phase;
};
static_assert(sizeof(BarrierState) == sizeof(MBarrier));

void UpdateBarrier(void* address, int32_t bytes, int arrivals) {
  BarrierState state;
  std::memcpy(&state, address, sizeof(state));
  state.missing_bytes += bytes;
  state.pending = static_cast<uint16_t>(state.pending - arrivals);
  if (state.missing_bytes == 0 && state.pending == 0) {
    state.phase ^= 1;
    state.pending = 1;
  }
  std::memcpy(address, &state, sizeof(state));
}

void Yield() { swapcontext(&emulator->current->context, &emulator->scheduler); }

template <typename Condition>
void WaitUntil(const Condition& condition) {
  if (condition()) return;
  Fiber* fiber = emulator->current;
  fiber->condition = &condition;
  fiber->is_met = [](const void* own) { return (*static_cast<const Condition*>(own))(); };
  Yield();
  fiber->is_met = nullptr;
}

void LeaveBarrier(Block* block) {
  if (block->num_arrived > 0 && block->num_arrived == block->num_alive) {
    block->num_arrived = 0;
    ++block->num_barriers;
  }
}

void RunFiber() {
  Fiber* fiber = emulator->current;
  emulator->kernel(*emulator->args);
  fiber->is_done = true;
  --fiber->block->num_alive;
  ++emulator->num_done;
  LeaveBarrier(fiber->block);
  Yield();
}

void Deliver(const Message& message) {
  Block& block = emulator->blocks[message.rank];
  if (block.num_alive == 0) {
    return Fail("a message reached CTA " + std::to_string(message.rank) + " after it had ended");
  }
  std::memcpy(block.shared.data() + message.offset, message.bytes.data(), message.bytes.size());
  UpdateBarrier(block.shared.data() + message.barrier_offset,
                -static_cast<int32_t>(message.bytes.size()), 0);
}

// Runs a fiber until it waits, if it can go on.
bool Resume(Fiber& fiber) {
  if (fiber.is_done || (fiber.is_met != nullptr && !fiber.is_met(fiber.condition))) return false;
  emulator->current = &fiber;
  swapcontext(&emulator->scheduler, &fiber.context);
  return true;
}

// DeliverSome, RunAllInTurn and RunFirstWarp return whether anything went on.

bool DeliverSome() {
  Emulator& e = *emulator;
  std::vector<Message> in_flight;
  in_flight.swap(e.messages);
  std::shuffle(in_flight.begin(), in_flight.end(), e.random);
  for (size_t i = 0; i < in_flight.size(); ++i) {
    if (i == 0 || (e.random() & 1) != 0) {
      Deliver(in_flight[i]);
    } else {
      e.messages.push_back(std::move(in_flight[i]));
    }
  }
  return !in_flight.empty();
}

// Puts the warps in the order in which they are to lead: in half of all runs CTA by CTA, so that
// one has sent all that it can before another one begins.
void DrawOrder() {
  Emulator& e = *emulator;
  e.warps.resize(e.fibers.size() / 32);
  std::iota(e.warps.begin(), e.warps.end(), 0);
  std::shuffle(e.warps.begin(), e.warps.end(), e.random);
  std::vector<int> places(e.blocks.size());  // of the CTAs
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), e.random);
  if ((e.random() & 1) != 0) {
    std::stable_sort(e.warps.begin(), e.warps.end(),
                     [&](int a, int b) { return places[a / kWarps] < places[b / kWarps]; });
  }
  e.demotion = (e.random() & 1) != 0 ? 16 : 1024;
}

bool RunAllInTurn() {
  Emulator& e = *emulator;
  const size_t num_fibers = e.fibers.size();
  const size_t start = e.random() % num_fibers;
  const bool backwards = (e.random() & 1) != 0;
  bool is_running = false;
  for (size_t i = 0; i < num_fibers; ++i) {
    const size_t place = backwards ? num_fibers - 1 - i : i;
    is_running |= Resume(e.fibers[(start + place) % num_fibers]);
  }
  return is_running;
}

// Runs the first warp that can go on as far as it gets. Now and then it becomes the last: a warp
// that leads everywhere would hide what it never waits for (S. Burckhardt et al., "A randomized
// scheduler with probabilistic guarantees of finding bugs", 2010).
bool RunFirstWarp() {
  Emulator& e = *emulator;
  for (size_t place = 0; place < e.warps.size(); ++place) {
    const int first = 32 * e.warps[place];
    bool is_running = false;
    for (bool goes_on = true; goes_on;) {
      goes_on = false;
      const int order = static_cast<int>(e.random() % 32);  // 0: forwards, 31: backwards
      for (int i = 0; i < 32; ++i) goes_on |= Resume(e.fibers[first + (i ^ order)]);
      is_running |= goes_on;
    }
    if (!is_running) continue;
    if (e.random() % e.demotion == 0)
      std::rotate(&e.warps[place], &e.warps[place + 1], &e.warps.back() + 1);
    return true;
  }
  return false;
}

// Returns an empty string, or what went wrong.
std::string RunCluster() {
  Emulator& e = *emulator;
  const size_t stacks_bytes = e.fibers.size() * kStackBytes;
  void* stacks = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the fibers' stacks";
  for (size_t i = 0; i < e.fibers.size(); ++i) {
    Fiber& fiber = e.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = static_cast<char*>(stacks) + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, RunFiber, 0);
  }
  DrawOrder();
  const int num_fibers = static_cast<int>(e.fibers.size());
  while (e.num_done < num_fibers && e.error.empty()) {
    bool is_running = e.schedule == Schedule::kSweep && DeliverSome();
    is_running |= e.schedule == Schedule::kSweep ? RunAllInTurn() : RunFirstWarp();
    if (!is_running && !DeliverSome()) Fail("deadlock: no thread of the cluster can go on");
  }
  munmap(stacks, stacks_bytes);
  if (!e.messages.empty()) Fail("messages left undelivered at the end");
  return e.error;
}

template <typename T>
Kernel FindKernel(bool is_sorted, int64_t k, bool has_clusters) {
  const auto of = [&](auto turns) {
    constexpr int kPairTurns = decltype(turns)::value;
    return has_clusters ? SelectRow<T, kPairTurns, true> : SelectRow<T, kPairTurns, false>;
  };
  if (!is_sorted) return of(std::integral_constant<int, 0>());
  if (k <= kMostFewPairs) return of(std::integral_constant<int, kFewPairTurns>());
  return SelectRow<T, kMostPairTurns, true>;  // of a single CTA, too
}

std::string RunRows(const Problem& problem, const DeviceLimits& limits,
                    const std::string& overrides, const TopKBuffers& buffers, bool is_smallest,
                    Schedule schedule, unsigned seed) {
  PlanOverrides parsed;
  LaunchPlan plan;
  std::string error = ParsePlanOverrides(overrides, &parsed);
  if (error.empty()) error = PlanLaunch(problem, limits, parsed, &plan);
  if (!error.empty() || problem.rows == 0 || problem.k == 0) return error;
  const TopKArgs args = MakeArgs(problem, plan, is_smallest, buffers);
  const auto find = problem.dtype == DType::kFloat32    ? FindKernel<Float32>
                    : problem.dtype == DType::kBFloat16 ? FindKernel<BFloat16>
                                                        : FindKernel<Float16>;
  const Kernel kernel = find(problem.is_sorted, problem.k, plan.cluster_size > 1);
  for (int64_t row = 0; row < problem.rows; ++row) {
    Emulator run;
    emulator = &run;
    run.args = &args;
    run.kernel = kernel;
    run.schedule = schedule;
    run.random.seed(seed + static_cast<unsigned>(row));
    run.row = row;
    run.blocks.resize(plan.cluster_size);
    run.fibers.resize(static_cast<size_t>(plan.cluster_size) * kThreads);
    for (Block& block : run.blocks) {
      block.shared.resize(plan.smem_bytes + kGuardBytes, kGuard);
      const auto end = block.shared.begin() + plan.smem_bytes;
      std::generate(block.shared.begin(), end,
                    [&] { return static_cast<unsigned char>(run.random()); });
    }
    for (size_t i = 0; i < run.fibers.size(); ++i) {
      run.fibers[i].rank = static_cast<int>(i) / kThreads;
      run.fibers[i].thread = static_cast<int>(i) % kThreads;
      run.fibers[i].block = &run.blocks[run.fibers[i].rank];
    }
    error = RunCluster();
    for (const Block& block : run.blocks) {
      const bool is_intact = std::all_of(block.shared.begin() + plan.smem_bytes, block.shared.end(),
                                         [](unsigned char byte) { return byte == kGuard; });
      if (!is_intact && error.empty()) error = "written behind the shared memory";
    }
    if (!error.empty()) return "row " + std::to_string(row) + ": " + error;
  }
  return "";
}

void FinishCopies(std::vector<PendingCopy>& group) {
  for (const PendingCopy& copy : group) std::memcpy(copy.to, copy.from, kVectorBytes);
  group.clear();
}

// Whether a vector lies in a buffer, at an address that the hardware takes.
bool Holds(const void* buffer, int64_t buffer_bytes, const void* vector, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(vector);
  const auto first = reinterpret_cast<uintptr_t>(buffer);
  const bool is_inside = address >= first && address + kVectorBytes <= first + buffer_bytes;
  if (!is_inside) Fail(std::string("a vector was accessed outside ") + name);
  if (address % kVectorBytes != 0) Fail(std::string("a vector is misaligned in ") + name);
  return is_inside;
}

bool IsInOperand(const void* vector) {
  return Holds(emulator->args->operand, emulator->args->operand_bytes, vector, "the operand");
}

}  // namespace

int ThreadIndex() { return emulator->current->thread; }
uint32_t RowIndex() { return static_cast<uint32_t>(emulator->row); }
int ClusterRank() { return emulator->current->rank; }
unsigned char* SharedMemory() { return emulator->current->block->shared.data(); }

void SyncThreads() {
  Block* block = emulator->current->block;
  const int64_t barrier = block->num_barriers;
  ++block->num_arrived;
  LeaveBarrier(block);
  WaitUntil([&] { return block->num_barriers != barrier; });
}

void SyncWarp() { WarpExchange(0); }

const uint32_t* WarpExchange(uint32_t value) {
  Fiber* fiber = emulator->current;
  Warp& warp = fiber->block->warps[fiber->thread / 32];
  const int64_t exchange = fiber->num_exchanges++;
  const int slot = exchange & 1;
  warp.lanes[slot][fiber->thread % 32] = value;
  if (++warp.deposits[slot] == 32) {
    warp.deposits[slot] = 0;
    warp.completed[slot] = exchange;
  }
  WaitUntil([&] { return warp.completed[slot] == exchange; });
  return warp.lanes[slot];
}

uint4 LoadReadOnly(const uint4* pointer) {
  return IsInOperand(pointer) ? *pointer : make_uint4(0, 0, 0, 0);
}

void CopyAsync16(void* shared, const void* global) {
  const int64_t shared_bytes = emulator->args->layout.total_bytes;
  if (!Holds(SharedMemory(), shared_bytes, shared, "shared memory")) return;
  if (!IsInOperand(global)) return;
  if (ArrivesNow()) {
    std::memcpy(shared, global, kVectorBytes);
  } else {
    emulator->current->open_group.push_back({shared, global});
  }
}
void CopyAsyncCommit() {
  Fiber* fiber = emulator->current;
  fiber->groups.push_back(std::move(fiber->open_group));
  fiber->open_group.clear();
}
void CopyAsyncWaitFor(int pending) {
  auto& groups = emulator->current->groups;
  while (static_cast<int>(groups.size()) > pending) {
    FinishCopies(groups.front());
    groups.erase(groups.begin());
  }
}

void BarrierInit(MBarrier* barrier) {
  const BarrierState state{0, 1, 0};
  std::memcpy(barrier, &state, sizeof(state));
}
void BarrierExpect(MBarrier* barrier, uint32_t bytes) {
  UpdateBarrier(barrier, static_cast<int32_t>(bytes), 1);
}
void BarrierWait(MBarrier* barrier, uint32_t parity) {
  WaitUntil([&] {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    return state.phase != parity;
  });
}

void ClusterArrive() { ++emulator->num_cluster_arrivals; }
void ClusterWait() {
  WaitUntil([] {  // threads that have ended count as arrived
    return emulator->num_cluster_arrivals + emulator->num_done >=
           static_cast<int>(emulator->fibers.size());
  });
}

uint32_t RemoteAddress(const void* local, int rank) {
  const auto offset = static_cast<const unsigned char*>(local) - SharedMemory();
  return static_cast<uint32_t>(rank) << 24 | static_cast<uint32_t>(offset);
}

void SendBytes(uint32_t remote, const void* bytes, uint32_t count, uint32_t remote_barrier) {
  Message message;
  message.rank = static_cast<int>(remote >> 24);
  message.offset = remote & 0xffffff;
  const auto* first = static_cast<const unsigned char*>(bytes);
  message.bytes.assign(first, first + count);
  message.barrier_offset = remote_barrier & 0xffffff;
  if (message.offset % count != 0 || remote_barrier >> 24 != remote >> 24) {
    return Fail("a remote store is misaligned, or its barrier is in another CTA");
  }
  const int64_t shared_bytes = emulator->args->layout.total_bytes;
  if (message.rank >= static_cast<int>(emulator->blocks.size()) ||
      message.offset + int64_t{count} > shared_bytes) {
    return Fail("a remote store goes outside the cluster's shared memory");
  }
  if (emulator->schedule == Schedule::kEager) return Deliver(message);
  emulator->messages.push_back(std::move(message));
}

}  // namespace jax_topk

// Returns 0, or 1 with a sentence in `error`. `limits`: num_sms, smem_per_block_bytes,
// smem_per_sm_bytes, max_cluster_size. `schedule`: as Schedule.
extern "C" int jax_topk_emulate(const void* operand, const int32_t* starts, const int32_t* lengths,
                                void* values, int32_t* indices, int64_t rows, int64_t width,
                                int64_t k, int dtype, int is_smallest, int is_sorted,
                                const char* overrides, const int64_t* limits, int schedule,
                                unsigned seed, char* error, size_t error_bytes) {
  using namespace jax_topk;
  const TopKBuffers buffers{operand, starts, lengths, values, indices};
  const Problem problem{rows, width, k, static_cast<DType>(dtype), is_sorted != 0};
  DeviceLimits device{static_cast<int>(limits[0]), limits[1], limits[2],
                      static_cast<int>(limits[3])};
  AssumeOneGroup(&device);
  const std::string message = RunRows(problem, device, overrides, buffers, is_smallest != 0,
                                      static_cast<Schedule>(schedule), seed);
  std::snprintf(error, error_bytes, "%s", message.c_str());
  return message.empty() ? 0 : 1;
}

// The bins of `count` pairs in ascending position, with these keys, as SortPairs spreads them at
// first (`attempt` 0) or once the pairs of the highest and the lowest key are apart (1, 2).
extern "C" void jax_topk_pair_bins(int is_float32, const uint32_t* keys, int count, int attempt,
                                   uint32_t* bins) {
  using namespace jax_topk;
  Bracket all{keys[0], keys[0]};
  for (int i = 0; i < count; ++i) all = {min(all.lowest, keys[i]), max(all.highest, keys[i])};
  Keys inner{{0xffffffffu, 0}, 0};
  for (int i = 0; i < count; ++i) {
    inner.differences |= keys[i] ^ keys[0];
    if (attempt > 0 && (keys[i] == all.lowest || keys[i] == all.highest)) continue;
    inner.range = {min(inner.range.lowest, keys[i]), max(inner.range.highest, keys[i])};
  }
  const auto fill = [&](auto type) {
    using T = decltype(type);
    const auto fill_by = [&](const auto& of) {
      for (int i = 0; i < count; ++i) bins[i] = of.Of(~keys[i], static_cast<uint32_t>(i));
    };
    const GeneralPairBins<T> general(inner, count, attempt < 2, attempt > 0, all);
    if constexpr (T::kBits == 32) {
      const bool differ_in_last = (inner.differences & 1) != 0;
      const ValuePairBins<T> by_value(inner.range);
      const bool is_by_value = differ_in_last ? ValuePairBins<T>::Serve(inner)
                                              : general.margin != 0 && general.bins.per_depth < 2;
      if (attempt == 0 && differ_in_last && EvenPairBins<T>::Serve(inner)) {
        return fill_by(EvenPairBins<T>(inner.range));
      }
      if (attempt == 0 && is_by_value && by_value.are_valid) return fill_by(by_value);
    } else if (attempt == 0 && NumberedPairBins<T>::Serve(inner)) {
      return fill_by(NumberedPairBins<T>(inner, count));
    }
    fill_by(general);
  };
  is_float32 ? fill(Float32()) : fill(BFloat16());
}

// The ranks of a sample between which the k-th key of its row is looked for: high, then low.
extern "C" void jax_topk_sample_ranks(uint32_t k, uint32_t population, uint32_t sample_size,
                                      uint32_t* ranks) {
  const auto goal = jax_topk::SampleGoal(k, population, sample_size, 0);
  ranks[0] = goal.ranks.high;
  ranks[1] = goal.ranks.low;
}

// The bins over which candidates with these keys of a bracket are spread, and the keys of each of
// these bins.
extern "C" void jax_topk_even_bins(uint32_t lowest, uint32_t highest, const uint32_t* keys,
                                   int count, uint32_t* bins, uint32_t* lowest_of,
                                   uint32_t* highest_of) {
  const jax_topk::EvenBins of(jax_topk::Bracket{lowest, highest});
  for (int i = 0; i < count; ++i) {
    bins[i] = of.FromTop(keys[i]);
    const jax_topk::Bracket bin = of.Keys(bins[i]);
    lowest_of[i] = bin.lowest;
    highest_of[i] = bin.highest;
  }
}
