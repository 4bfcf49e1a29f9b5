// Many launches at once, without JAX: several streams and threads, a device that is nearly full of
// other work, and CUDA graphs whose lengths and buffers change between replays. Bit-equal, no hang.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I ffi -o stress_kernel
//       ffi/tools/stress_kernel.cu ffi/cuda/*.cu ffi/plan.cc
//   ./stress_kernel --launches 100000 --seed 1
//
// Every launch is a case (shape, dtype, mode, outputs, plan) with one of its variants (starts and
// lengths), chosen by a hash of seed, stream and number, so that one launch can be named and found
// again. Results of all variants are computed on the CPU before. A comparison kernel follows each
// launch on its stream: it compares every bit, and the memory behind the results, and fills both
// with junk for the next. It then tells the host the number of the launch, and a watchdog that sees
// no number change for --timeout seconds prints what was running and ends the process.
//
// Exits with 0 if all is right, 1 if a result is wrong or a call fails, 2 if something hangs. The
// last line of the output is the summary as JSON.

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/args.h"
#include "cuda/launch.h"
#include "plan.h"
#include "tools/reference_order.h"

namespace jax_topk {
namespace {

constexpr const char* kHelp =
    "usage: stress_kernel [options]\n"
    "  --launches N   launches over all streams, without other work on the device (100000)\n"
    "  --busy N       launches beside a kernel that fills most of the device (4000)\n"
    "  --replays N    replays of CUDA graphs (600)\n"
    "  --streams N    streams, each with a thread of its own (8)\n"
    "  --cases N      shapes, with four sets of starts and lengths each (96)\n"
    "  --devices N    at most this many GPUs, at once (2)\n"
    "  --timeout N    seconds without any progress that count as a hang (20)\n"
    "  --seed N       of everything (0)\n"
    "  --hang         hang on purpose: the watchdog must end the process with status 2\n";

struct Options {
  int64_t launches = 100'000, busy = 4'000, replays = 600;
  int streams = 8, cases = 96, devices = 2, timeout = 20;
  uint64_t seed = 0;
  bool must_hang = false;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "stress_kernel: %s\n", message.c_str());
  std::fflush(nullptr);
  _exit(1);
}

void CheckAt(cudaError_t error, int line) {
  if (error != cudaSuccess) {
    Fail("line " + std::to_string(line) + ": " + cudaGetErrorString(error));
  }
}
#define CHECK(call) CheckAt(call, __LINE__)

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::printf("%s", kHelp);
      std::exit(0);
    }
    if (name == "--hang") {
      options.must_hang = true;
      continue;
    }
    if (i + 1 >= argc) Fail("unknown option " + name + " or no value; --help lists them");
    const int64_t value = std::stoll(argv[++i]);
    if (value < 0) Fail(name + " must not be negative");
    if (name == "--launches") options.launches = value;
    else if (name == "--busy") options.busy = value;
    else if (name == "--replays") options.replays = value;
    else if (name == "--streams") options.streams = static_cast<int>(value);
    else if (name == "--cases") options.cases = static_cast<int>(value);
    else if (name == "--devices") options.devices = static_cast<int>(value);
    else if (name == "--timeout") options.timeout = static_cast<int>(value);
    else if (name == "--seed") options.seed = static_cast<uint64_t>(value);
    else Fail("unknown option " + name + "; --help lists them");
  }
  if (options.streams < 1 || options.cases < 1 || options.devices < 1 || options.timeout < 1) {
    Fail("--streams, --cases, --devices and --timeout must be at least 1");
  }
  return options;
}

// A hash of a few numbers (splitmix64): which case launch `number` of a stream is.
uint64_t Mix(uint64_t a, uint64_t b = 0, uint64_t c = 0) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu + 1;
  for (int i = 0; i < 2; ++i) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return x;
}

// ---- cases and what is right
// ---------------------------------------------------------------------

constexpr int kNumVariants = 4;
constexpr uint16_t kJunk = 0xa5a5;
constexpr int64_t kGuardBytes = 512;  // behind each result

struct Variant {
  std::vector<int32_t> starts, lengths;
  std::vector<unsigned char> values;  // empty where the case has none
  std::vector<int32_t> indices;
};

struct Case {
  Problem problem;
  bool is_smallest = false, with_values = false;
  std::string plan, dist;
  std::vector<unsigned char> operand;
  Variant variants[kNumVariants];

  int64_t NumResults() const { return problem.rows * problem.k; }
};

constexpr const char* kPlans[] = {"",
                                  "",
                                  "",
                                  "",
                                  "path=exact",
                                  "path=sample",
                                  "path=short",
                                  "cluster=1",
                                  "cluster=2",
                                  "cluster=3",
                                  "cluster=4",
                                  "cluster=8",
                                  "cluster=16",
                                  "candidates=4",
                                  "candidates=64",
                                  "path=exact,cluster=8",
                                  "path=exact,cluster=16,part=64",
                                  "path=sample,cluster=16,part=64",
                                  "path=sample,cluster=5,candidates=64",
                                  "path=exact,cluster=1,stages=2",
                                  "cluster=1,stages=1,candidates=64"};
constexpr const char* kDists[] = {"normal", "clustered", "equal",  "relu",
                                  "few",    "bits",      "sorted", "head"};

void FillRow(const std::string& dist, std::mt19937& random, std::vector<uint32_t>* bits) {
  std::normal_distribution<float> normal;
  std::vector<float> row(bits->size());
  const size_t width = row.size();
  for (float& x : row) x = normal(random);
  if (dist == "clustered") {
    for (float& x : row) x = 10.0f + 0.1f * x;
  } else if (dist == "equal") {
    std::fill(row.begin(), row.end(), 1.5f);
  } else if (dist == "relu") {
    for (float& x : row) x = std::max(x - 1.5f, 0.0f);
  } else if (dist == "few") {
    for (float& x : row) x = std::floor(x);
  } else if (dist == "sorted") {
    std::sort(row.begin(), row.end());
  } else if (dist == "head") {
    for (size_t i = 0; i < width / 16; ++i) row[i] += 10.0f;
  }
  if (width > 0) std::memcpy(bits->data(), row.data(), 4 * width);
  if (dist == "bits") {
    for (uint32_t& x : *bits) x = random();
  }
}

// The results of one row: larger keys first, then lower indices.
void SelectRow(const Case& data, int64_t row, Variant* variant) {
  const Problem& problem = data.problem;
  const int64_t bytes = ElementBytes(problem.dtype);
  const int64_t start = std::clamp<int64_t>(variant->starts[row], 0, problem.width);
  const int64_t length = std::clamp<int64_t>(variant->lengths[row], 0, problem.width - start);
  const unsigned char* const window = data.operand.data() + (row * problem.width + start) * bytes;
  // Key and complement of the index in one number: the largest numbers are the results.
  std::vector<uint64_t> order(length);
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t key = KeyOf(BitsAt(window, i, problem.dtype), problem.dtype, data.is_smallest);
    order[i] = key << 32 | (0xffffffffu - static_cast<uint32_t>(i));
  }
  const int64_t count = std::min(length, problem.k);
  std::nth_element(order.begin(), order.begin() + count, order.end(), std::greater<uint64_t>());
  order.resize(count);
  if (problem.is_sorted) {
    std::sort(order.begin(), order.end(), std::greater<uint64_t>());
  } else {
    std::sort(order.begin(), order.end(), [](uint64_t a, uint64_t b) {
      return static_cast<uint32_t>(a) > static_cast<uint32_t>(b);
    });
  }
  for (int64_t i = 0; i < problem.k; ++i) {
    const int64_t place = row * problem.k + i;
    uint32_t bits = PaddingBits(problem.dtype, data.is_smallest);
    variant->indices[place] = -1;
    if (i < count) {
      variant->indices[place] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(order[i]));
      bits = BitsAt(window, variant->indices[place], problem.dtype);
    }
    if (data.with_values) std::memcpy(variant->values.data() + place * bytes, &bits, bytes);
  }
}

Case MakeCase(uint64_t seed, const DeviceLimits& limits) {
  std::mt19937 random(static_cast<unsigned>(seed));
  constexpr int64_t kRows[] = {1, 1, 2, 3, 5, 8, 17, 32, 66, 130};
  constexpr int64_t kWidths[] = {1, 37, 1000, 2048, 4099, 9001, 20'003, 50'000, 131'072, 163'840};
  constexpr int64_t kKs[] = {1, 2, 64, 300, 1000, 2048, 2048, 4096};
  Case data;
  Problem& problem = data.problem;
  problem.rows = kRows[random() % 10];
  problem.width = kWidths[random() % 10];
  // Long rows in large numbers would take more time on the CPU than all else.
  while (problem.rows * problem.width > 1'500'000) problem.rows = (problem.rows + 1) / 2;
  problem.k = std::min(problem.width, kKs[random() % 8]);
  problem.dtype = static_cast<DType>(random() % 3);
  problem.is_sorted = random() % 2 == 0;
  data.is_smallest = random() % 2 == 0;
  data.with_values = problem.is_sorted || random() % 2 == 0;
  data.dist = kDists[random() % 8];
  // A plan that this device or this shape has no room for is replaced by the planner's own.
  data.plan = kPlans[random() % (sizeof(kPlans) / sizeof(kPlans[0]))];
  PlanOverrides overrides;
  LaunchPlan plan;
  if (!ParsePlanOverrides(data.plan, &overrides).empty() ||
      !PlanLaunch(problem, limits, overrides, &plan).empty()) {
    data.plan.clear();
  }
  const int64_t bytes = ElementBytes(problem.dtype);
  data.operand.resize(problem.rows * problem.width * bytes);
  std::vector<uint32_t> bits(problem.width);
  for (int64_t row = 0; row < problem.rows; ++row) {
    FillRow(data.dist, random, &bits);
    for (int64_t i = 0; i < problem.width; ++i) {
      // The upper half keeps sign and order; as a float16 it is another value, which is as good.
      const uint32_t element = problem.dtype == DType::kFloat32 ? bits[i] : bits[i] >> 16;
      std::memcpy(data.operand.data() + (row * problem.width + i) * bytes, &element, bytes);
    }
  }
  const int64_t extremes[] = {0,  1,          -1,          problem.width - 1, problem.width,
                              -5, 2147483647, -2147483648, problem.k,         problem.k + 1};
  for (Variant& variant : data.variants) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      const bool is_hostile = random() % 4 == 0;
      const bool is_whole = random() % 2 == 0;
      const int64_t length = static_cast<int64_t>(random() % (problem.width + 1));
      variant.starts.push_back(static_cast<int32_t>(
          is_hostile ? extremes[random() % 10]
                     : (is_whole ? 0 : static_cast<int64_t>(random() % (problem.width + 1)))));
      variant.lengths.push_back(static_cast<int32_t>(
          is_hostile ? extremes[random() % 10] : (is_whole ? problem.width : length)));
    }
    variant.indices.resize(data.NumResults());
    if (data.with_values) variant.values.resize(data.NumResults() * bytes);
    for (int64_t row = 0; row < problem.rows; ++row) SelectRow(data, row, &variant);
  }
  return data;
}

// Runs task(i) for i in [0, num_tasks) on all processors.
template <typename Task>
void RunOnAll(int num_tasks, const Task& task) {
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      for (int i = next++; i < num_tasks; i = next++) task(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- on the device
// -------------------------------------------------------------------------------

template <typename T>
T* Upload(const std::vector<T>& host, int64_t extra_bytes = 0) {
  void* device = nullptr;
  const size_t bytes = host.size() * sizeof(T);
  CHECK(cudaMalloc(&device, bytes + std::max<int64_t>(extra_bytes, 16)));
  if (bytes > 0) CHECK(cudaMemcpy(device, host.data(), bytes, cudaMemcpyHostToDevice));
  return static_cast<T*>(device);
}

// A case's inputs and right results on one device.
struct DeviceCase {
  const void* operand;
  const void* other_operand;  // a copy elsewhere
  const int32_t* starts[kNumVariants];
  const int32_t* lengths[kNumVariants];
  const uint16_t* values[kNumVariants];
  const uint16_t* indices[kNumVariants];
};

DeviceCase UploadCase(const Case& data) {
  DeviceCase result{};
  result.operand = Upload(data.operand);
  result.other_operand = Upload(data.operand);
  for (int v = 0; v < kNumVariants; ++v) {
    result.starts[v] = Upload(data.variants[v].starts);
    result.lengths[v] = Upload(data.variants[v].lengths);
    result.values[v] = reinterpret_cast<const uint16_t*>(Upload(data.variants[v].values));
    result.indices[v] = reinterpret_cast<const uint16_t*>(Upload(data.variants[v].indices));
  }
  return result;
}

// What the comparison kernels of one stream report.
struct Report {
  unsigned long long num_wrong;     // 16-bit units
  unsigned long long first_launch;  // the first launch with a wrong unit, plus 1
  unsigned int num_blocks_done;
};

// One result and what it must be: `size` units, then junk.
struct Compared {
  uint16_t* got;
  const uint16_t* wanted;
  int64_t size;
};

constexpr int kCompareThreads = 256;
constexpr int64_t kGuardUnits = kGuardBytes / 2;

__device__ unsigned int CompareAndSpoil(const Compared& compared, int64_t begin, int64_t step) {
  unsigned int num_wrong = 0;
  for (int64_t i = begin; i < compared.size + kGuardUnits; i += step) {
    const uint16_t wanted = i < compared.size ? compared.wanted[i] : kJunk;
    num_wrong += compared.got[i] != wanted;
    compared.got[i] = kJunk;
  }
  return num_wrong;
}

__global__ void __launch_bounds__(kCompareThreads)
    CompareKernel(Compared values, Compared indices, unsigned long long launch, Report* report,
                  volatile unsigned long long* progress) {
  const int64_t begin = int64_t{blockIdx.x} * kCompareThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kCompareThreads;
  unsigned int num_wrong = CompareAndSpoil(indices, begin, step);
  if (values.got != nullptr) num_wrong += CompareAndSpoil(values, begin, step);
  if (num_wrong > 0) {
    atomicAdd(&report->num_wrong, static_cast<unsigned long long>(num_wrong));
    atomicCAS(&report->first_launch, 0ull, launch + 1);
  }
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&report->num_blocks_done, 1u) == gridDim.x - 1) {
    report->num_blocks_done = 0;
    *progress = launch + 1;  // number of launches that are compared
    __threadfence_system();
  }
}

__global__ void SpoilKernel(uint16_t* to, int64_t size) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = kJunk;
  }
}

__device__ unsigned long long Nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Holds an SM (with enough shared memory, all of it) for a while.
__global__ void SpinKernel(unsigned long long nanoseconds) {
  const unsigned long long begin = Nanoseconds();
  while (Nanoseconds() - begin < nanoseconds) __nanosleep(500);
}

// ---- streams
// -------------------------------------------------------------------------------------

// What the host sees of one stream: the watchdog reads it while the stream's thread works.
struct StreamState {
  std::string name;
  int device = 0;
  int index = 0;
  volatile unsigned long long* progress = nullptr;  // host memory that the device writes
  std::atomic<unsigned long long> num_issued{0};
  std::atomic<unsigned long long> salt{0};  // names the phase in the choice of cases
  std::vector<std::string> graph;           // its launches, while the stream replays one
};

struct World {
  Options options;
  std::vector<Case> cases;
  std::vector<std::unique_ptr<StreamState>> streams;
  std::mutex streams_mutex;
  std::atomic<bool> is_done{false};
  std::atomic<unsigned long long> num_wrong{0};
};

struct Pick {
  int which;
  int variant;
};

Pick PickLaunch(const World& world, const StreamState& stream, unsigned long long salt,
                unsigned long long number) {
  const uint64_t hash = Mix(world.options.seed, Mix(stream.device, stream.index, salt), number);
  return {static_cast<int>(hash % world.cases.size()), static_cast<int>(hash >> 40) % kNumVariants};
}

std::string Describe(const Case& data, int variant) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  const Problem& problem = data.problem;
  std::string text =
      "rows " + std::to_string(problem.rows) + " width " + std::to_string(problem.width) + " k " +
      std::to_string(problem.k) + " " + kNames[static_cast<int>(problem.dtype)] + " " + data.dist +
      (data.is_smallest ? " smallest" : " largest") + (problem.is_sorted ? " sorted" : "") +
      (data.with_values ? " values" : " indices only") + " plan '" + data.plan + "' variant " +
      std::to_string(variant) + " windows";
  const Variant& chosen = data.variants[variant];
  for (size_t row = 0; row < chosen.starts.size() && row < 8; ++row) {
    text += " " + std::to_string(chosen.starts[row]) + "+" + std::to_string(chosen.lengths[row]);
  }
  if (chosen.starts.size() > 8) text += " ...";
  return text;
}

std::string DescribeLaunch(const World& world, const StreamState& stream,
                           unsigned long long number) {
  if (!stream.graph.empty()) {
    return stream.name + ", graph launch " + std::to_string(number) + ": " +
           stream.graph[number % stream.graph.size()];
  }
  const Pick pick = PickLaunch(world, stream, stream.salt, number);
  return stream.name + ", launch " + std::to_string(number) + ": case " +
         std::to_string(pick.which) + ", " + Describe(world.cases[pick.which], pick.variant);
}

// Ends the process where no stream makes progress.
void Watch(World* world) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point changed = Clock::now();
  unsigned long long last = 0;
  while (!world->is_done) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::lock_guard<std::mutex> lock(world->streams_mutex);
    unsigned long long sum = world->streams.size();
    for (const auto& stream : world->streams) {
      sum += *stream->progress + stream->num_issued + 1'000'003 * stream->salt;
    }
    if (sum != last) {
      last = sum;
      changed = Clock::now();
      continue;
    }
    if (Clock::now() - changed < std::chrono::seconds(world->options.timeout)) continue;
    std::fprintf(stderr, "stress_kernel: HANG: no progress for %d s, seed %llu; running:\n",
                 world->options.timeout, static_cast<unsigned long long>(world->options.seed));
    for (const auto& stream : world->streams) {
      const unsigned long long done = *stream->progress, issued = stream->num_issued;
      if (done >= issued) continue;
      std::fprintf(stderr, "  %s (%llu issued)\n", DescribeLaunch(*world, *stream, done).c_str(),
                   issued);
    }
    std::fflush(nullptr);
    _exit(2);
  }
}

// Results that launches of any case fit into, with what is needed to compare them.
class Stream {
 public:
  Stream(World* world, int device, int index, const std::vector<DeviceCase>& cases)
      : world_(world), cases_(cases) {
    CHECK(cudaSetDevice(device));
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    int64_t num_results = 0;
    for (const Case& data : world->cases) num_results = std::max(num_results, data.NumResults());
    capacity_ = num_results * 4 + kGuardBytes;
    CHECK(cudaMalloc(&values_, capacity_));
    CHECK(cudaMalloc(&indices_, capacity_));
    CHECK(cudaMalloc(&report_, sizeof(Report)));
    CHECK(cudaMemset(report_, 0, sizeof(Report)));
    auto state = std::make_unique<StreamState>();
    state->name = "device " + std::to_string(device) + " stream " + std::to_string(index);
    state->device = device;
    state->index = index;
    void* progress = nullptr;
    CHECK(cudaHostAlloc(&progress, sizeof(unsigned long long),
                        cudaHostAllocMapped | cudaHostAllocPortable));
    *static_cast<unsigned long long*>(progress) = 0;
    state->progress = static_cast<volatile unsigned long long*>(progress);
    state_ = state.get();
    Spoil();
    std::lock_guard<std::mutex> lock(world->streams_mutex);
    world->streams.push_back(std::move(state));
  }

  cudaStream_t stream() const { return stream_; }

  // Begins another phase: counts from 0 again.
  void Begin(unsigned long long salt) {
    Finish();
    *state_->progress = 0;
    state_->num_issued = 0;
    state_->salt = salt;
  }

  void Launch(unsigned long long number) {
    const Pick pick = PickLaunch(*world_, *state_, state_->salt, number);
    const Case& data = world_->cases[pick.which];
    const DeviceCase& device_case = cases_[pick.which];
    state_->num_issued = number + 1;
    const TopKBuffers buffers{
        device_case.operand, device_case.starts[pick.variant], device_case.lengths[pick.variant],
        data.with_values ? values_ : nullptr, reinterpret_cast<int32_t*>(indices_)};
    const std::string error = LaunchTopK(data.problem, data.is_smallest, data.plan, buffers,
                                         /*may_overlap=*/true, stream_);
    if (!error.empty()) Fail(error + "; " + DescribeLaunch(*world_, *state_, number));
    Compare(data, device_case, pick.variant, values_, indices_, number);
  }

  // Compares results that are in `values` and `indices` and counts launch `number` as done.
  void Compare(const Case& data, const DeviceCase& device_case, int variant, uint16_t* values,
               uint16_t* indices, unsigned long long number) {
    const int64_t size = data.NumResults();
    const Compared v{data.with_values ? values : nullptr, device_case.values[variant],
                     size * ElementBytes(data.problem.dtype) / 2};
    const Compared i{indices, device_case.indices[variant], size * 2};
    const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(size / 2048, 1, 32));
    CompareKernel<<<blocks, kCompareThreads, 0, stream_>>>(v, i, number, report_, state_->progress);
    CHECK(cudaGetLastError());
    state_->num_issued = number + 1;
  }

  // Names the launches of the graph that is replayed from now on; empty: none is.
  void SetGraph(std::vector<std::string> graph) {
    std::lock_guard<std::mutex> lock(world_->streams_mutex);
    state_->graph = std::move(graph);
  }

  // Waits, reports what was wrong, and forgets it.
  void Finish() {
    CHECK(cudaStreamSynchronize(stream_));
    Report report;
    CHECK(cudaMemcpy(&report, report_, sizeof(Report), cudaMemcpyDeviceToHost));
    if (report.num_wrong == 0) return;
    world_->num_wrong += report.num_wrong;
    std::fprintf(stderr, "stress_kernel: WRONG: %llu 16-bit units, first in %s\n", report.num_wrong,
                 DescribeLaunch(*world_, *state_, report.first_launch - 1).c_str());
    CHECK(cudaMemset(report_, 0, sizeof(Report)));
    Spoil();
  }

 private:
  void Spoil() {
    for (uint16_t* buffer : {values_, indices_}) {
      SpoilKernel<<<64, 256, 0, stream_>>>(buffer, capacity_ / 2);
      CHECK(cudaGetLastError());
    }
    CHECK(cudaStreamSynchronize(stream_));
  }

  World* world_;
  const std::vector<DeviceCase>& cases_;
  StreamState* state_ = nullptr;
  cudaStream_t stream_ = nullptr;
  uint16_t* values_ = nullptr;
  uint16_t* indices_ = nullptr;
  Report* report_ = nullptr;
  int64_t capacity_ = 0;
};

// ---- phases
// --------------------------------------------------------------------------------------

// `total` launches, dealt to the streams; each stream has a thread. Bounded queues, so that a hang
// is noticed where it is.
void RunStreams(std::vector<std::unique_ptr<Stream>>& streams, int device, int64_t total,
                unsigned long long salt) {
  constexpr int64_t kQueued = 256;
  std::vector<std::thread> threads;
  for (size_t s = 0; s < streams.size(); ++s) {
    threads.emplace_back([&, s] {
      CHECK(cudaSetDevice(device));
      const int64_t count =
          total / static_cast<int64_t>(streams.size()) +
          (static_cast<int64_t>(s) < total % static_cast<int64_t>(streams.size()));
      streams[s]->Begin(salt);
      for (int64_t i = 0; i < count; ++i) {
        streams[s]->Launch(static_cast<unsigned long long>(i));
        if ((i + 1) % kQueued == 0) streams[s]->Finish();
      }
      streams[s]->Finish();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Keeps most SMs of a device from everyone else, again and again, until `is_done`.
void Occupy(int device, uint64_t seed, const std::atomic<bool>* is_done) {
  CHECK(cudaSetDevice(device));
  int num_sms = 0, smem = 0;
  CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  CHECK(cudaFuncSetAttribute(SpinKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::mt19937 random(static_cast<unsigned>(seed));
  while (!*is_done) {
    // All but a few SMs, all, or half of them; entirely, or so that one more CTA fits each.
    const int left[] = {4, 1, 0, 17, num_sms / 2};
    const unsigned blocks = static_cast<unsigned>(std::max(1, num_sms - left[random() % 5]));
    const int bytes = random() % 3 == 0 ? smem / 2 : smem;
    SpinKernel<<<blocks, 128, bytes, stream>>>(200'000ull + random() % 1'500'000);
    CHECK(cudaGetLastError());
    CHECK(cudaStreamSynchronize(stream));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
  }
  CHECK(cudaStreamDestroy(stream));
}

// Graphs of eight launches. Between replays the lengths change in place, and the operand and the
// results of every launch move: by new parameters of its node, or by an update of the whole graph
// from a new capture, as XLA does it.
class GraphChain {
 public:
  static constexpr int kNumNodes = 8;

  GraphChain(const World& world, const std::vector<DeviceCase>& cases, uint64_t seed)
      : world_(world), cases_(cases) {
    for (int node = 0; node < kNumNodes; ++node) {
      const int which = static_cast<int>(Mix(seed, node) % world.cases.size());
      const Case& data = world.cases[which];
      Node& n = nodes_[node];
      n.which = which;
      for (auto* buffer : {&n.values[0], &n.values[1], &n.indices[0], &n.indices[1]}) {
        const int64_t bytes = data.NumResults() * 4 + kGuardBytes;
        CHECK(cudaMalloc(buffer, bytes));
        SpoilKernel<<<32, 256>>>(*buffer, bytes / 2);
      }
      CHECK(cudaMalloc(&n.starts, data.problem.rows * 4 + 16));
      CHECK(cudaMalloc(&n.lengths, data.problem.rows * 4 + 16));
    }
    CHECK(cudaDeviceSynchronize());
  }

  ~GraphChain() {
    if (exec_ != nullptr) CHECK(cudaGraphExecDestroy(exec_));
    if (graph_ != nullptr) CHECK(cudaGraphDestroy(graph_));
    for (Node& n : nodes_) {
      for (uint16_t* buffer : {n.values[0], n.values[1], n.indices[0], n.indices[1]}) {
        CHECK(cudaFree(buffer));
      }
      CHECK(cudaFree(n.starts));
      CHECK(cudaFree(n.lengths));
    }
  }

  // One replay; `first` is the number of its first launch.
  void Replay(Stream* stream, uint64_t hash, unsigned long long first) {
    const int side = static_cast<int>(hash % 2);
    if (exec_ == nullptr) {
      graph_ = Capture(stream->stream(), side);
      CHECK(cudaGraphInstantiate(&exec_, graph_, 0));
    } else if (side != side_) {
      if (hash >> 8 & 1) SetNodes(side);
      else Update(stream->stream(), side);
    }
    side_ = side;
    int variants[kNumNodes];
    for (int node = 0; node < kNumNodes; ++node) {
      const Node& n = nodes_[node];
      const int64_t bytes = world_.cases[n.which].problem.rows * 4;
      variants[node] = static_cast<int>(Mix(hash, node) % kNumVariants);
      for (const auto& [to, from] :
           {std::pair{n.starts, cases_[n.which].starts[variants[node]]},
            std::pair{n.lengths, cases_[n.which].lengths[variants[node]]}}) {
        CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream->stream()));
      }
    }
    CHECK(cudaGraphLaunch(exec_, stream->stream()));
    for (int node = 0; node < kNumNodes; ++node) {
      const Node& n = nodes_[node];
      stream->Compare(world_.cases[n.which], cases_[n.which], variants[node], n.values[side],
                      n.indices[side], first + node);
    }
  }

  std::vector<std::string> DescribeNodes() const {
    std::vector<std::string> result;
    for (const Node& n : nodes_) {
      result.push_back("case " + std::to_string(n.which) + ", " +
                       Describe(world_.cases[n.which], 0));
    }
    return result;
  }

 private:
  struct Node {
    int which = 0;
    uint16_t* values[2] = {};
    uint16_t* indices[2] = {};
    int32_t* starts = nullptr;
    int32_t* lengths = nullptr;
  };

  TopKBuffers Buffers(const Node& n, int side) const {
    return {side == 0 ? cases_[n.which].operand : cases_[n.which].other_operand, n.starts,
            n.lengths, world_.cases[n.which].with_values ? n.values[side] : nullptr,
            reinterpret_cast<int32_t*>(n.indices[side])};
  }

  cudaGraph_t Capture(cudaStream_t stream, int side) const {
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (const Node& n : nodes_) {
      const Case& data = world_.cases[n.which];
      const std::string error = LaunchTopK(data.problem, data.is_smallest, data.plan,
                                           Buffers(n, side), /*may_overlap=*/true, stream);
      if (!error.empty()) Fail(error + " while capturing; " + Describe(data, 0));
    }
    cudaGraph_t graph = nullptr;
    CHECK(cudaStreamEndCapture(stream, &graph));
    return graph;
  }

  void SetNodes(int side) {
    size_t count = 0;
    CHECK(cudaGraphGetNodes(graph_, nullptr, &count));
    if (count != kNumNodes) Fail("a graph of 8 launches has " + std::to_string(count) + " nodes");
    cudaGraphNode_t graph_nodes[kNumNodes];
    CHECK(cudaGraphGetNodes(graph_, graph_nodes, &count));
    for (cudaGraphNode_t graph_node : graph_nodes) {
      cudaKernelNodeParams params{};
      CHECK(cudaGraphKernelNodeGetParams(graph_node, &params));
      TopKArgs args = *static_cast<TopKArgs*>(params.kernelParams[0]);
      // The node of the graph knows the buffers of side 0 or 1: whose they are names the launch.
      const Node* owner = nullptr;
      for (const Node& n : nodes_) {
        if (args.lengths == n.lengths) owner = &n;
      }
      if (owner == nullptr) Fail("a node of a graph has lengths that no launch has");
      const TopKBuffers buffers = Buffers(*owner, side);
      args.operand = buffers.operand;
      args.values = buffers.values;
      args.indices = buffers.indices;
      void* kernel_params[] = {&args};
      params.kernelParams = kernel_params;
      params.extra = nullptr;
      CHECK(cudaGraphExecKernelNodeSetParams(exec_, graph_node, &params));
    }
  }

  void Update(cudaStream_t stream, int side) {
    cudaGraph_t graph = Capture(stream, side);
    cudaGraphExecUpdateResultInfo info{};
    CHECK(cudaGraphExecUpdate(exec_, graph, &info));
    CHECK(cudaGraphDestroy(graph));
  }

  const World& world_;
  const std::vector<DeviceCase>& cases_;
  Node nodes_[kNumNodes];
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  int side_ = 0;
};

void ReplayGraphs(World* world, Stream* stream, const std::vector<DeviceCase>& cases,
                  int64_t num_replays) {
  constexpr int64_t kReplaysPerGraph = 40;
  stream->Begin(3);
  unsigned long long number = 0;
  for (int64_t replay = 0; replay < num_replays;) {
    const uint64_t seed = Mix(world->options.seed, 77, replay);
    GraphChain chain(*world, cases, seed);
    stream->SetGraph(chain.DescribeNodes());
    for (int64_t i = 0; i < kReplaysPerGraph && replay < num_replays; ++i, ++replay) {
      chain.Replay(stream, Mix(seed, i), number);
      number += GraphChain::kNumNodes;
    }
    stream->Finish();
  }
  stream->SetGraph({});
}

double SecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void RunDevice(World* world, int device) {
  const Options& options = world->options;
  CHECK(cudaSetDevice(device));
  std::vector<DeviceCase> cases;
  for (const Case& data : world->cases) cases.push_back(UploadCase(data));
  std::vector<std::unique_ptr<Stream>> streams;
  for (int s = 0; s < options.streams; ++s) {
    streams.push_back(std::make_unique<Stream>(world, device, s, cases));
  }
  const auto say = [&](const char* what, int64_t count, double seconds) {
    std::printf("device %d: %-48s %8lld in %5.1f s, %llu wrong units\n", device, what,
                static_cast<long long>(count), seconds, world->num_wrong.load());
    std::fflush(stdout);
  };
  auto begin = std::chrono::steady_clock::now();
  RunStreams(streams, device, options.launches, 1);
  say("launches over all streams", options.launches, SecondsSince(begin));

  begin = std::chrono::steady_clock::now();
  std::atomic<bool> is_done{false};
  std::thread occupier(Occupy, device, options.seed, &is_done);
  RunStreams(streams, device, options.busy, 2);
  is_done = true;
  occupier.join();
  say("launches beside a kernel that fills the device", options.busy, SecondsSince(begin));

  begin = std::chrono::steady_clock::now();
  ReplayGraphs(world, streams[0].get(), cases, options.replays);
  say("replays of graphs of 8 launches", options.replays, SecondsSince(begin));
}

int Run(const Options& options) {
  int num_devices = 0;
  CHECK(cudaGetDeviceCount(&num_devices));
  num_devices = std::min(num_devices, options.devices);
  if (num_devices < 1) Fail("there is no GPU");
  DeviceLimits limits;
  const std::string error = GetDeviceLimits(0, &limits);
  if (!error.empty()) Fail(error);

  World world;
  world.options = options;
  world.cases.resize(options.cases);
  auto begin = std::chrono::steady_clock::now();
  RunOnAll(options.cases,
           [&](int i) { world.cases[i] = MakeCase(Mix(options.seed, 11, i), limits); });
  int num_forced = 0;
  for (const Case& data : world.cases) num_forced += !data.plan.empty();
  std::printf("%d cases, %d with a forced plan, results computed in %.1f s on the CPU\n",
              options.cases, num_forced, SecondsSince(begin));
  std::fflush(stdout);
  if (num_forced == 0 && options.cases >= 16) Fail("no plan that the tool knows is legal here");

  std::thread watchdog(Watch, &world);
  if (options.must_hang) {
    CHECK(cudaSetDevice(0));
    std::vector<DeviceCase> cases;
    for (const Case& data : world.cases) cases.push_back(UploadCase(data));
    Stream stream(&world, 0, 0, cases);
    stream.Begin(9);
    SpinKernel<<<1, 1, 0, stream.stream()>>>((options.timeout + 30) * 1'000'000'000ull);
    stream.Launch(0);
    watchdog.join();
    return 1;
  }
  std::vector<std::thread> devices;
  for (int device = 0; device < num_devices; ++device) {
    devices.emplace_back(RunDevice, &world, device);
  }
  for (std::thread& thread : devices) thread.join();
  world.is_done = true;
  watchdog.join();

  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf(
      "{\"gpu\": \"%s\", \"gpus\": %d, \"seed\": %llu, \"streams\": %d, \"cases\": %d, "
      "\"launches\": %lld, \"busy_launches\": %lld, \"graph_replays\": %lld, \"wrong_units\": "
      "%llu, \"seconds\": %.1f}\n",
      properties.name, num_devices, static_cast<unsigned long long>(options.seed), options.streams,
      options.cases, static_cast<long long>(num_devices * options.launches),
      static_cast<long long>(num_devices * options.busy),
      static_cast<long long>(num_devices * options.replays), world.num_wrong.load(),
      SecondsSince(begin));
  return world.num_wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_topk

int main(int argc, char** argv) { return jax_topk::Run(jax_topk::ParseOptions(argc, argv)); }
