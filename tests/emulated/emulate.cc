// Plans a launch as the CUDA target does and runs its kernel on the CPU, one cluster at a time.
// Exports one C function, which tests call through ctypes. See ptx.cuh for how it works.

#include "ptx.cuh"
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../ffi/cuda/kernel.cuh"
#include "../../ffi/plan.h"

namespace jax_topk {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

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
  std::vector<unsigned char> shared;
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

struct Emulator {
  const TopKArgs* args;
  void (*kernel)(const TopKArgs&);
  std::mt19937 random;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Message> messages;
  int64_t row = 0;
  int num_cluster_arrivals = 0;
  int64_t num_events = 0;  // a sweep without one is a deadlock
  ucontext_t scheduler;
  Fiber* current = nullptr;
};

Emulator* emulator = nullptr;

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
  ++emulator->num_events;
}

void Yield() { swapcontext(&emulator->current->context, &emulator->scheduler); }

template <typename Condition>
void WaitUntil(Condition condition) {
  while (!condition()) Yield();
  ++emulator->num_events;
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
  LeaveBarrier(fiber->block);
  ++emulator->num_events;
  Yield();
}

void Deliver(const Message& message) {
  Block& block = emulator->blocks[message.rank];
  if (block.num_alive == 0) {
    std::fprintf(stderr, "emulation: a message reached CTA %d after it had ended\n", message.rank);
    std::abort();
  }
  std::memcpy(block.shared.data() + message.offset, message.bytes.data(), message.bytes.size());
  UpdateBarrier(block.shared.data() + message.barrier_offset,
                -static_cast<int32_t>(message.bytes.size()), 0);
}

// Returns an empty string, or what went wrong.
std::string RunCluster() {
  Emulator& e = *emulator;
  const size_t num_fibers = e.fibers.size();
  const size_t stacks_bytes = num_fibers * kStackBytes;
  void* stacks = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the fibers' stacks";
  for (size_t i = 0; i < num_fibers; ++i) {
    Fiber& fiber = e.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = static_cast<char*>(stacks) + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, RunFiber, 0);
  }
  std::string error;
  size_t num_done = 0;
  while (num_done < num_fibers && error.empty()) {
    const int64_t events_before = e.num_events;
    // Deliver about half of the messages in flight, in any order.
    std::vector<Message> in_flight;
    in_flight.swap(e.messages);
    const size_t num_messages = in_flight.size();
    for (Message& message : in_flight) {
      if (num_messages < 4 || (e.random() & 1) != 0) {
        Deliver(message);
      } else {
        e.messages.push_back(std::move(message));
      }
    }
    const size_t start = e.random() % num_fibers;
    const bool backwards = (e.random() & 1) != 0;
    num_done = 0;
    for (size_t i = 0; i < num_fibers; ++i) {
      const size_t place = backwards ? num_fibers - 1 - i : i;
      Fiber& fiber = e.fibers[(start + place) % num_fibers];
      if (!fiber.is_done) {
        e.current = &fiber;
        swapcontext(&e.scheduler, &fiber.context);
      }
      if (fiber.is_done) ++num_done;
    }
    if (e.num_events == events_before && e.messages.empty() && num_done < num_fibers) {
      error = "deadlock: no thread of the cluster can go on";
    }
  }
  munmap(stacks, stacks_bytes);
  if (error.empty() && !e.messages.empty()) error = "messages left undelivered at the end";
  return error;
}

template <typename T>
void Kernel(const TopKArgs& args) {
  SelectRow<T>(args);
}

std::string RunRows(const Problem& problem, const DeviceLimits& limits,
                    const std::string& overrides, const TopKBuffers& buffers, bool is_smallest,
                    unsigned seed) {
  PlanOverrides parsed;
  LaunchPlan plan;
  std::string error = ParsePlanOverrides(overrides, &parsed);
  if (error.empty()) error = PlanLaunch(problem, limits, parsed, &plan);
  if (!error.empty() || problem.rows == 0 || problem.k == 0) return error;
  const TopKArgs args = MakeArgs(problem, plan, is_smallest, buffers);
  for (int64_t row = 0; row < problem.rows; ++row) {
    Emulator run;
    emulator = &run;
    run.args = &args;
    run.kernel = problem.dtype == DType::kFloat32    ? Kernel<Float32>
                 : problem.dtype == DType::kBFloat16 ? Kernel<BFloat16>
                                                     : Kernel<Float16>;
    run.random.seed(seed + static_cast<unsigned>(row));
    run.row = row;
    run.blocks.resize(plan.cluster_size);
    run.fibers.resize(static_cast<size_t>(plan.cluster_size) * kThreads);
    for (Block& block : run.blocks) {
      block.shared.resize(plan.smem_bytes);
      for (unsigned char& byte : block.shared) byte = static_cast<unsigned char>(run.random());
    }
    for (size_t i = 0; i < run.fibers.size(); ++i) {
      run.fibers[i].rank = static_cast<int>(i) / kThreads;
      run.fibers[i].thread = static_cast<int>(i) % kThreads;
      run.fibers[i].block = &run.blocks[run.fibers[i].rank];
    }
    error = RunCluster();
    if (!error.empty()) return "row " + std::to_string(row) + ": " + error;
  }
  return "";
}

void FinishCopies(std::vector<PendingCopy>& group) {
  for (const PendingCopy& copy : group) std::memcpy(copy.to, copy.from, kVectorBytes);
  group.clear();
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

void CopyAsync16(void* shared, const void* global) {
  emulator->current->open_group.push_back({shared, global});
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

void ClusterArrive() {
  ++emulator->num_cluster_arrivals;
  ++emulator->num_events;
}
void ClusterWait() {
  WaitUntil([] {
    int num_left = 0;  // threads that have ended count as arrived
    for (const Fiber& fiber : emulator->fibers) num_left += fiber.is_done ? 1 : 0;
    return emulator->num_cluster_arrivals + num_left >= static_cast<int>(emulator->fibers.size());
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
    std::fprintf(stderr, "emulation: misaligned remote store, or its barrier is elsewhere\n");
    std::abort();
  }
  emulator->messages.push_back(std::move(message));
  ++emulator->num_events;
}

}  // namespace jax_topk

// Returns 0, or 1 with a sentence in `error`. `limits`: num_sms, smem_per_block_bytes,
// smem_per_sm_bytes, max_cluster_size.
extern "C" int jax_topk_emulate(const void* operand, const int32_t* starts, const int32_t* lengths,
                                void* values, int32_t* indices, int64_t rows, int64_t width,
                                int64_t k, int dtype, int is_smallest, int is_sorted,
                                const char* overrides, const int64_t* limits, unsigned seed,
                                char* error, size_t error_bytes) {
  using namespace jax_topk;
  const TopKBuffers buffers{operand, starts, lengths, values, indices};
  const Problem problem{rows, width, k, static_cast<DType>(dtype), is_sorted != 0};
  const DeviceLimits device{static_cast<int>(limits[0]), limits[1], limits[2],
                            static_cast<int>(limits[3])};
  const std::string message = RunRows(problem, device, overrides, buffers, is_smallest != 0, seed);
  std::snprintf(error, error_bytes, "%s", message.c_str());
  return message.empty() ? 0 : 1;
}
