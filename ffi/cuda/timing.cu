#include "timing.h"

#include <algorithm>

namespace jax_topk {
namespace {

constexpr int kReadThreads = 512;

__global__ void EmptyKernel() {}

// `ctas_per_row` CTAs share a row. The sum decides what is stored in one case of 2^32, so
// that no load can be left out.
__global__ void __launch_bounds__(kReadThreads)
    ReadKernel(const uint32_t* operand, const int32_t* lengths, int32_t* indices,
               int64_t words_per_row, int32_t elements_per_word, int32_t k, int32_t ctas_per_row) {
  const int64_t row = blockIdx.x / ctas_per_row;
  const int32_t part = blockIdx.x % ctas_per_row;
  const int64_t elements = words_per_row * elements_per_word;
  const int64_t length = max(int64_t{0}, min(int64_t{lengths[row]}, elements));
  const int64_t vectors = length / elements_per_word / 4;
  const uint4* from = reinterpret_cast<const uint4*>(operand + row * words_per_row);
  uint32_t sum = 0;
#pragma unroll 4
  for (int64_t i = part * kReadThreads + threadIdx.x; i < vectors;
       i += int64_t{ctas_per_row} * kReadThreads) {
    const uint4 vector = from[i];
    sum ^= vector.x ^ vector.y ^ vector.z ^ vector.w;
  }
  const int32_t each = (k + ctas_per_row - 1) / ctas_per_row;
  for (int32_t i = part * each + threadIdx.x; i < min((part + 1) * each, k); i += kReadThreads) {
    indices[row * k + i] = sum == 0x5a5a5a5au ? -1 : i;
  }
}

// More instructions than the caches of a processor hold. In assembly, so that the compiler cannot
// leave out what it does not need, and many to a statement, which compiles faster.
#define JAX_TOPK_FOUR_TIMES(text) text text text text
#define JAX_TOPK_256_TIMES(text) \
  JAX_TOPK_FOUR_TIMES(JAX_TOPK_FOUR_TIMES(JAX_TOPK_FOUR_TIMES(JAX_TOPK_FOUR_TIMES(text))))
constexpr int kOtherInstructions = (256 << 10) / 16;
__global__ void OtherInstructions(uint4* data) {
  float x = 1;
#pragma unroll
  for (int i = 0; i < kOtherInstructions / 256; ++i) {
    asm volatile(JAX_TOPK_256_TIMES("fma.rn.f32 %0, %0, %0, %0;\n\t") : "+f"(x));
  }
  if (x == 0.5f) data->x = 1;  // never
}
#undef JAX_TOPK_FOUR_TIMES
#undef JAX_TOPK_256_TIMES

// More data than the L2 cache holds. The sum is stored in one case of 2^32.
constexpr int64_t kOtherBytes = 200 << 20;
__global__ void OtherData(uint4* data) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < kOtherBytes / 16;
       i += gridDim.x * blockDim.x) {
    const uint4 vector = data[i];
    sum ^= vector.x ^ vector.y ^ vector.z ^ vector.w;
  }
  if (sum == 0x5a5a5a5au) data->x = sum;
}

std::string Describe(const char* what, cudaError_t error) {
  return std::string(what) + " failed: " + cudaGetErrorString(error);
}

// Frees what one timing needs, whichever step failed.
struct Session {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  std::vector<cudaEvent_t> events;

  ~Session() {
    for (cudaEvent_t event : events) cudaEventDestroy(event);
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

struct DeviceMemory {
  void* data = nullptr;
  ~DeviceMemory() { cudaFree(data); }
};

}  // namespace

double Median(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

std::string LaunchEmpty(cudaStream_t stream) {
  EmptyKernel<<<1, 32, 0, stream>>>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : Describe("launching the empty kernel", error);
}

std::string LaunchRead(const Problem& problem, const TopKBuffers& buffers, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Describe("asking for the current device", error);
  DeviceLimits limits;
  const std::string no_limits = GetDeviceLimits(device, &limits);
  if (!no_limits.empty()) return no_limits;
  const int elements_per_word = static_cast<int>(4 / ElementBytes(problem.dtype));
  if (problem.rows < 1 || problem.width % (4 * elements_per_word) != 0) {
    return "the read-only kernel needs rows and a width that is a multiple of " +
           std::to_string(4 * elements_per_word) + "; got width " + std::to_string(problem.width);
  }
  // Enough CTAs to keep every SM reading, at most 16 per row.
  const int64_t per_row = std::clamp<int64_t>(4 * limits.num_sms / problem.rows, 1, 16);
  ReadKernel<<<static_cast<unsigned>(problem.rows * per_row), kReadThreads, 0, stream>>>(
      static_cast<const uint32_t*>(buffers.operand), buffers.lengths, buffers.indices,
      problem.width / elements_per_word, elements_per_word, static_cast<int32_t>(problem.k),
      static_cast<int32_t>(per_row));
  error = cudaGetLastError();
  return error == cudaSuccess ? "" : Describe("launching the read-only kernel", error);
}

std::string TimeGraphChain(const Launch& launch, int num_launches, int num_replays,
                           std::vector<double>* microseconds) {
  constexpr int kWarmUps = 3;
  Session session;
  cudaError_t error = cudaStreamCreateWithFlags(&session.stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return Describe("creating a stream", error);
  error = cudaStreamBeginCapture(session.stream, cudaStreamCaptureModeThreadLocal);
  if (error != cudaSuccess) return Describe("starting the capture", error);
  std::string failure;
  for (int i = 0; i < num_launches && failure.empty(); ++i) failure = launch(i, session.stream);
  error = cudaStreamEndCapture(session.stream, &session.graph);
  if (!failure.empty()) return failure;
  if (error != cudaSuccess) return Describe("ending the capture", error);
  error = cudaGraphInstantiate(&session.exec, session.graph, 0);
  if (error != cudaSuccess) return Describe("instantiating the graph", error);
  for (int i = 0; i < kWarmUps; ++i) {
    error = cudaGraphLaunch(session.exec, session.stream);
    if (error != cudaSuccess) return Describe("replaying the graph", error);
  }
  session.events.resize(2 * num_replays, nullptr);
  for (cudaEvent_t& event : session.events) {
    error = cudaEventCreate(&event);
    if (error != cudaSuccess) return Describe("creating an event", error);
  }
  for (int i = 0; i < num_replays; ++i) {
    cudaEventRecord(session.events[2 * i], session.stream);
    error = cudaGraphLaunch(session.exec, session.stream);
    if (error != cudaSuccess) return Describe("replaying the graph", error);
    cudaEventRecord(session.events[2 * i + 1], session.stream);
  }
  error = cudaStreamSynchronize(session.stream);
  if (error != cudaSuccess) return Describe("running the graph", error);
  microseconds->clear();
  for (int i = 0; i < num_replays; ++i) {
    float milliseconds = 0;
    error = cudaEventElapsedTime(&milliseconds, session.events[2 * i], session.events[2 * i + 1]);
    if (error != cudaSuccess) return Describe("reading an event", error);
    microseconds->push_back(1000.0 * milliseconds / num_launches);
  }
  return "";
}

std::string TimeBehindOthers(const Launch& read, const Launch& launch, int num_launches,
                             int num_replays, std::vector<double>* microseconds) {
  DeviceMemory memory;
  cudaError_t error = cudaMalloc(&memory.data, kOtherBytes);
  if (error == cudaSuccess) error = cudaMemset(memory.data, 0, kOtherBytes);
  if (error != cudaSuccess) return Describe("allocating 200 MB to read", error);
  auto* const data = static_cast<uint4*>(memory.data);
  const auto behind_others = [&](const Launch& last) {
    return [&](int i, cudaStream_t stream) {
      OtherInstructions<<<256, 32, 0, stream>>>(data);
      OtherData<<<256, 512, 0, stream>>>(data);
      const cudaError_t status = cudaGetLastError();
      if (status != cudaSuccess) return Describe("launching other kernels", status);
      const std::string failure = read(i, stream);
      return failure.empty() ? last(i, stream) : failure;
    };
  };
  // The empty kernel first: what is checked afterwards is the launch's output.
  const Launch empty = [](int, cudaStream_t stream) { return LaunchEmpty(stream); };
  std::vector<double> others;
  std::string failure = TimeGraphChain(behind_others(empty), num_launches, num_replays, &others);
  if (!failure.empty()) return failure;
  failure = TimeGraphChain(behind_others(launch), num_launches, num_replays, microseconds);
  if (!failure.empty()) return failure;
  const double median = Median(others);
  for (double& sample : *microseconds) sample -= median;
  return "";
}

}  // namespace jax_topk
