// Runs the kernel without JAX: one case, checked against a sort on the CPU, for ncu and the
// sanitizers, or a grid of cases, timed in CUDA graphs, for quick comparisons while tuning.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I ffi -o run_kernel
//       ffi/tools/run_kernel.cu ffi/cuda/*.cu ffi/plan.cc
//   ./run_kernel --rows 8 --width 65536 --k 2048 --dist clust --plan path=exact
//   ./run_kernel --grid --dist normal
//
// Exits with 1 if a result is wrong. `--help` lists the options.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/timing.h"
#include "plan.h"

namespace jax_topk {
namespace {

constexpr const char* kHelp =
    "usage: run_kernel [options]\n"
    "  --rows N --width N --k N    shape of the case (8, 163840, 2048)\n"
    "  --length N                  valid elements of every row; -1: mixed, log-uniform from 1024\n"
    "  --dist NAME                 normal clust equal sorted sorted_desc head relu few period "
    "bits\n"
    "  --dtype NAME                float32 bfloat16 float16\n"
    "  --smallest --sorted --values\n"
    "  --plan TEXT                 forced plan, for instance path=exact,cluster=4\n"
    "  --seed N                    of the data\n"
    "  --time                      also print microseconds per launch in a graph of 20\n"
    "  --others                    as --time or --grid, behind kernels that drive instructions\n"
    "                              and data out of the caches, as in a decode step; the operand\n"
    "                              is read again, and an empty kernel's time is subtracted; as\n"
    "                              JAX launches it, not overlapping the kernel before\n"
    "  --grid                      time rows 1..256 by length 2048..163840 and mixed\n";

struct Options {
  Problem problem{8, 163840, 2048, DType::kFloat32, false};
  int64_t length = -2;  // -2: the width
  std::string dist = "normal";
  std::string plan;
  bool is_smallest = false, with_values = false, is_timed = false, is_grid = false;
  bool has_others = false;
  unsigned seed = 0;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "run_kernel: %s\n", message.c_str());
  std::exit(1);
}

void Check(cudaError_t error) {
  if (error != cudaSuccess) Fail(cudaGetErrorString(error));
}

void Check(const std::string& error) {
  if (!error.empty()) Fail(error);
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto next = [&]() -> std::string {
      if (i + 1 >= argc) Fail(name + " needs a value");
      return argv[++i];
    };
    if (name == "--help") {
      std::printf("%s", kHelp);
      std::exit(0);
    } else if (name == "--rows") options.problem.rows = std::stoll(next());
    else if (name == "--width") options.problem.width = std::stoll(next());
    else if (name == "--k") options.problem.k = std::stoll(next());
    else if (name == "--length") options.length = std::stoll(next());
    else if (name == "--dist") options.dist = next();
    else if (name == "--plan") options.plan = next();
    else if (name == "--seed") options.seed = static_cast<unsigned>(std::stoul(next()));
    else if (name == "--smallest") options.is_smallest = true;
    else if (name == "--sorted") options.problem.is_sorted = true;
    else if (name == "--values") options.with_values = true;
    else if (name == "--time") options.is_timed = true;
    else if (name == "--grid") options.is_grid = true;
    else if (name == "--others") options.has_others = options.is_timed = true;
    else if (name == "--dtype") {
      const std::string dtype = next();
      if (dtype == "float32") options.problem.dtype = DType::kFloat32;
      else if (dtype == "bfloat16") options.problem.dtype = DType::kBFloat16;
      else if (dtype == "float16") options.problem.dtype = DType::kFloat16;
      else Fail("--dtype " + dtype + " is not one of float32, bfloat16, float16");
    } else {
      Fail("unknown option " + name + "; --help lists them");
    }
  }
  return options;
}

// One row of float32 data of a named distribution.
void FillRow(const std::string& dist, std::mt19937& random, float* row, int64_t width) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < width; ++i) row[i] = normal(random);
  if (dist == "clust") {
    for (int64_t i = 0; i < width; ++i) row[i] = 10.0f + 0.1f * row[i];
  } else if (dist == "equal") {
    std::fill(row, row + width, 1.5f);
  } else if (dist == "sorted") {
    std::sort(row, row + width);
  } else if (dist == "sorted_desc") {
    std::sort(row, row + width, std::greater<float>());
  } else if (dist == "head") {
    for (int64_t i = 0; i < width / 16; ++i) row[i] += 10.0f;
  } else if (dist == "relu") {
    for (int64_t i = 0; i < width; ++i) row[i] = std::max(row[i] - 3.0f, 0.0f);
  } else if (dist == "few") {
    for (int64_t i = 0; i < width; ++i) row[i] = std::floor(row[i]);
  } else if (dist == "period") {
    for (int64_t i = 0; i < width; i += 40) row[i] += 8.0f;
  } else if (dist == "bits") {
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = random();
      std::memcpy(&row[i], &bits, 4);
    }
  } else if (dist != "normal") {
    Fail("--dist " + dist + " is unknown; --help lists them");
  }
}

uint16_t ToHalf(float value, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>((bits + 0x8000u) >> 16);
  // Truncating; the exact rounding of the data does not matter here.
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
  if (exponent <= 0) return sign;
  if (exponent >= 31) return sign | 0x7c00u;
  return static_cast<uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ff));
}

struct Case {
  std::vector<unsigned char> operand;
  std::vector<int32_t> starts, lengths;
};

int64_t LengthOf(int64_t length, int64_t row, int64_t width, unsigned seed) {
  if (length == -2) return width;
  if (length >= 0) return length;
  std::mt19937 random(seed * 7919 + static_cast<unsigned>(row));
  std::uniform_real_distribution<double> uniform(std::log(1024.0), std::log(163840.0));
  return std::min<int64_t>(width, static_cast<int64_t>(std::exp(uniform(random))));
}

Case MakeCase(const Options& options) {
  const Problem& problem = options.problem;
  Case result;
  result.operand.resize(problem.rows * problem.width * ElementBytes(problem.dtype));
  std::vector<float> row(problem.width);
  std::mt19937 random(options.seed);
  for (int64_t r = 0; r < problem.rows; ++r) {
    result.starts.push_back(0);
    const int64_t length = LengthOf(options.length, r, problem.width, options.seed);
    result.lengths.push_back(static_cast<int32_t>(length));
    FillRow(options.dist, random, row.data(), std::min(length, problem.width));
    for (int64_t i = std::max<int64_t>(length, 0); i < problem.width; ++i) row[i] = NAN;
    unsigned char* to = result.operand.data() + r * problem.width * ElementBytes(problem.dtype);
    for (int64_t i = 0; i < problem.width; ++i) {
      if (problem.dtype == DType::kFloat32) {
        std::memcpy(to + 4 * i, &row[i], 4);
      } else {
        const uint16_t half = ToHalf(row[i], problem.dtype);
        std::memcpy(to + 2 * i, &half, 2);
      }
    }
  }
  return result;
}

// The key of element `i` of a row: larger is better.
uint32_t KeyAt(const unsigned char* row, int64_t i, DType dtype, bool is_smallest) {
  if (dtype == DType::kFloat32) {
    uint32_t bits;
    std::memcpy(&bits, row + 4 * i, 4);
    const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
    return is_smallest ? ~key : key;
  }
  uint16_t bits;
  std::memcpy(&bits, row + 2 * i, 2);
  const uint16_t key = bits >> 15 ? ~bits : bits | 0x8000u;
  return is_smallest ? static_cast<uint16_t>(~key) : key;
}

// The rows whose indices or values differ from a stable sort's.
int CountWrongRows(const Options& options, const Case& data, const std::vector<int32_t>& indices,
                   const std::vector<unsigned char>& values) {
  const Problem& problem = options.problem;
  const int64_t bytes = ElementBytes(problem.dtype);
  int num_wrong = 0;
  for (int64_t r = 0; r < problem.rows; ++r) {
    const unsigned char* row = data.operand.data() + r * problem.width * bytes;
    const int64_t length = std::clamp<int64_t>(data.lengths[r], 0, problem.width);
    std::vector<int32_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    const int64_t count = std::min(length, problem.k);
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
      const uint32_t key_a = KeyAt(row, a, problem.dtype, options.is_smallest);
      const uint32_t key_b = KeyAt(row, b, problem.dtype, options.is_smallest);
      return key_a != key_b ? key_a > key_b : a < b;
    });
    order.resize(count);
    if (!problem.is_sorted) std::sort(order.begin(), order.end());
    bool is_right = true;
    for (int64_t i = 0; i < problem.k; ++i) {
      const int32_t expected = i < count ? order[i] : -1;
      if (indices[r * problem.k + i] != expected) is_right = false;
      if (options.with_values && i < count &&
          std::memcmp(values.data() + (r * problem.k + i) * bytes, row + expected * bytes, bytes) !=
              0) {
        is_right = false;
      }
    }
    if (!is_right) ++num_wrong;
  }
  return num_wrong;
}

template <typename T>
T* Upload(const std::vector<T>& host) {
  T* device = nullptr;
  Check(cudaMalloc(&device, std::max<size_t>(host.size(), 1) * sizeof(T)));
  Check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

template <typename T>
void Download(const T* device, std::vector<T>* host) {
  Check(cudaMemcpy(host->data(), device, host->size() * sizeof(T), cudaMemcpyDeviceToHost));
}

double TimeCase(const Options& options, const TopKBuffers& buffers) {
  constexpr int kLaunches = 20, kReplays = 50;
  const Launch launch = [&](int, cudaStream_t stream) {
    return LaunchTopK(options.problem, options.is_smallest, options.plan, buffers,
                      /*may_overlap=*/!options.has_others, stream);
  };
  const Launch read = [&](int, cudaStream_t stream) {
    return LaunchRead(options.problem, buffers, stream);
  };
  std::vector<double> samples;
  Check(options.has_others ? TimeBehindOthers(read, launch, kLaunches, kReplays, &samples)
                           : TimeGraphChain(launch, kLaunches, kReplays, &samples));
  return Median(samples);
}

int RunCase(const Options& options) {
  const Problem& problem = options.problem;
  const Case data = MakeCase(options);
  std::vector<int32_t> indices(problem.rows * problem.k, 0x5a5a5a5a);
  std::vector<unsigned char> values(problem.rows * problem.k * ElementBytes(problem.dtype), 0xa5);
  const TopKBuffers buffers{Upload(data.operand), Upload(data.starts), Upload(data.lengths),
                            options.with_values ? Upload(values) : nullptr, Upload(indices)};
  Check(LaunchTopK(problem, options.is_smallest, options.plan, buffers, /*may_overlap=*/true,
                   nullptr));
  Check(cudaDeviceSynchronize());
  Download(buffers.indices, &indices);
  if (options.with_values) Download(static_cast<const unsigned char*>(buffers.values), &values);
  const int num_wrong = CountWrongRows(options, data, indices, values);
  std::printf("rows %lld width %lld length %lld k %lld %s plan '%s'%s%s%s: %s (%d wrong rows)",
              static_cast<long long>(problem.rows), static_cast<long long>(problem.width),
              static_cast<long long>(options.length), static_cast<long long>(problem.k),
              options.dist.c_str(), options.plan.c_str(), options.is_smallest ? " smallest" : "",
              problem.is_sorted ? " sorted" : "", options.with_values ? " values" : "",
              num_wrong == 0 ? "OK" : "WRONG", num_wrong);
  if (options.is_timed) std::printf(" %.2f us", TimeCase(options, buffers));
  std::printf("\n");
  return num_wrong == 0 ? 0 : 1;
}

int RunGrid(Options options) {
  constexpr int64_t kRows[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
  constexpr int64_t kLengths[] = {2048, 4096, 8192, 16384, 32768, 65536, 96000, 128000, 163840, -1};
  options.problem.rows = 256;
  options.length = -2;
  const Case data = MakeCase(options);
  const unsigned char* operand = Upload(data.operand);
  const int32_t* starts = Upload(data.starts);
  std::vector<int32_t> indices(256 * options.problem.k);
  std::vector<unsigned char> values(256 * options.problem.k * ElementBytes(options.problem.dtype));
  int32_t* device_indices = Upload(indices);
  unsigned char* device_values = options.with_values ? Upload(values) : nullptr;
  std::printf("%-12s", options.dist.c_str());
  for (int64_t length : kLengths) std::printf("%8lld", static_cast<long long>(length));
  std::printf("\n");
  int num_wrong = 0;
  for (int64_t rows : kRows) {
    options.problem.rows = rows;
    std::printf("%-12lld", static_cast<long long>(rows));
    for (int64_t length : kLengths) {
      Case cell = data;
      cell.operand.clear();
      cell.lengths.clear();
      for (int64_t r = 0; r < rows; ++r) {
        cell.lengths.push_back(
            static_cast<int32_t>(LengthOf(length, r, options.problem.width, options.seed)));
      }
      int32_t* lengths = Upload(cell.lengths);
      const TopKBuffers buffers{operand, starts, lengths, device_values, device_indices};
      std::printf("%8.2f", TimeCase(options, buffers));
      std::fflush(stdout);
      if (rows <= 2) {
        cell.operand = data.operand;
        Download(device_indices, &indices);
        if (options.with_values) Download(device_values, &values);
        num_wrong += CountWrongRows(options, cell, indices, values);
      }
      Check(cudaFree(lengths));
    }
    std::printf("\n");
  }
  std::printf("%s: %d wrong rows among the checked\n", options.dist.c_str(), num_wrong);
  return num_wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_topk

int main(int argc, char** argv) {
  const jax_topk::Options options = jax_topk::ParseOptions(argc, argv);
  return options.is_grid ? jax_topk::RunGrid(options) : jax_topk::RunCase(options);
}
