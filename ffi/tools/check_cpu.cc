// Runs the CPU target without XLA, for the sanitizers: hostile rows and windows, busy pools, many
// callers at once, memory that runs out, and offsets beyond 2^32 elements. Every result is compared
// with a sort.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -I ffi
//       -o check_cpu ffi/tools/check_cpu.cc <ffi/cpu/*.cc without binding.cc>
//   ./check_cpu --seed 1 --cases 200
//
// simd_avx2.cc needs -mavx2 -mbmi -mbmi2 -mpopcnt. tests/test_sanitizers.py does all of this.
// Exits with 1 if a result is wrong; the sanitizers end the process themselves.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/top_k.h"
#include "cpu/work_plan.h"
#include "tools/reference_order.h"

namespace {

// Allocations until one fails, counted over all threads; negative: none fails.
std::atomic<int64_t> allocations_left{-1};

void* Allocate(size_t size) {
  if (allocations_left.load(std::memory_order_relaxed) >= 0 &&
      allocations_left.fetch_sub(1, std::memory_order_relaxed) == 0) {
    throw std::bad_alloc();
  }
  void* const memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return Allocate(size); }
void* operator new[](size_t size) { return Allocate(size); }
// std::stable_sort takes its memory here and does without if there is none.
void* operator new(size_t size, const std::nothrow_t&) noexcept { return std::malloc(size); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace jax_topk::cpu {
namespace {

constexpr const char* kHelp =
    "usage: check_cpu [--seed N] [--cases N]\n"
    "Runs the CPU target of jax_topk on hostile inputs and compares every result with a sort.\n"
    "  --seed N    of the random cases (0)\n"
    "  --cases N   number of random cases (200)\n";

// ---- executors
// -----------------------------------------------------------------------------------

// A pool of threads, as XLA has one. May keep finished work until its end: then the counts of
// shared pointers in it order nothing, and the tasks must.
class Pool final : public Executor {
 public:
  explicit Pool(int num_threads, bool keeps_work = false) : keeps_work_(keeps_work) {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Pool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t num_threads() const override { return static_cast<int64_t>(threads_.size()); }

  void Schedule(std::function<void()> work) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(work));
    }
    wake_.notify_one();
  }

 private:
  void Work() {
    std::vector<std::function<void()>> finished;
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return is_closing_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
      if (keeps_work_) finished.push_back(std::move(work));
    }
  }

  const bool keeps_work_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool is_closing_ = false;
  std::vector<std::thread> threads_;
};

// A pool whose threads are all busy: helpers start only after the call has returned.
class LatePool final : public Executor {
 public:
  ~LatePool() override {
    for (const std::function<void()>& work : late_) work();
  }
  int64_t num_threads() const override { return 4; }
  void Schedule(std::function<void()> work) override { late_.push_back(std::move(work)); }

 private:
  std::vector<std::function<void()>> late_;
};

// ---- cases
// ---------------------------------------------------------------------------------------

struct Case {
  Problem problem;
  bool is_smallest = false, with_values = true;
  // Exactly as large as they must be, so that any access beside them is noticed.
  std::vector<unsigned char> operand;
  std::vector<int32_t> starts, lengths;
};

struct Results {
  std::vector<unsigned char> values;
  std::vector<int32_t> indices;
};

int64_t NumResults(const Problem& problem) { return problem.rows * problem.k; }

// Rows of one 32-bit or 16-bit pattern each that are hard for some selection.
uint32_t Pattern(int kind, int64_t i, int64_t width, std::mt19937& random) {
  const auto as_bits = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  };
  switch (kind) {
    case 0: return random();  // every pattern, NaNs too
    case 1: return as_bits(std::normal_distribution<float>()(random));
    case 2: return as_bits(1.5f);                   // one plateau
    case 3: return 0xffffffffu;                     // the lowest pattern
    case 4: return as_bits(static_cast<float>(i));  // each beats all before
    case 5: return as_bits(static_cast<float>(width - i));
    case 6: return as_bits(static_cast<float>(i % 2 == 0 ? i : -i));  // the list overflows
    case 7: return as_bits(static_cast<float>(static_cast<int>(random() % 7) - 3));
    case 8: return random() % 2 == 0 ? 0u : 0x80000000u;  // both zeros
    default: return as_bits(1.0f) + random() % 64;        // the last bits differ
  }
}
constexpr int kNumPatterns = 10;

void FillRow(int kind, DType dtype, int64_t width, std::mt19937& random, unsigned char* row) {
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t bits = Pattern(kind, i, width, random);
    if (dtype == DType::kFloat32) {
      std::memcpy(row + 4 * i, &bits, 4);
    } else {
      // The top half keeps signs and order; for float16 the values differ, and nothing else does.
      const auto half = static_cast<uint16_t>(kind == 0 || kind == 9 ? bits & 0xffffu : bits >> 16);
      std::memcpy(row + 2 * i, &half, 2);
    }
  }
}

int32_t HostileCount(int64_t width, std::mt19937& random) {
  const int64_t extremes[] = {0,         1,          -1,          width - 1, width,
                              width + 1, 2147483647, -2147483648, 1 << 30};
  if (random() % 2 == 0) return static_cast<int32_t>(extremes[random() % 9]);
  return static_cast<int32_t>(random() % static_cast<uint64_t>(width + 1));
}

Case MakeCase(const Problem& problem, std::mt19937& random) {
  Case result;
  result.problem = problem;
  result.is_smallest = random() % 2 == 0;
  result.with_values = random() % 3 != 0;
  const int64_t row_bytes = problem.width * ElementBytes(problem.dtype);
  result.operand.resize(static_cast<size_t>(problem.rows * row_bytes));
  for (int64_t row = 0; row < problem.rows; ++row) {
    FillRow(static_cast<int>(random() % kNumPatterns), problem.dtype, problem.width, random,
            result.operand.data() + row * row_bytes);
    result.starts.push_back(random() % 2 == 0 ? 0 : HostileCount(problem.width, random));
    result.lengths.push_back(random() % 2 == 0 ? 2147483647 : HostileCount(problem.width, random));
  }
  return result;
}

Case MakeRandomCase(std::mt19937& random) {
  constexpr int64_t kWidths[] = {0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 1000, 2047, 2049, 5000};
  Problem problem;
  problem.dtype = static_cast<DType>(random() % 3);
  problem.width = kWidths[random() % 14];
  problem.rows = static_cast<int64_t>(random() % 6);
  const int64_t ks[] = {0, 1, 16, 17, 128, 129, problem.width / 2, problem.width};
  problem.k = std::min(problem.width, ks[random() % 8]);
  problem.is_sorted = random() % 2 == 0;
  return MakeCase(problem, random);
}

// ---- what is right
// -------------------------------------------------------------------------------

// The number of rows that differ from a sort of their windows.
int64_t CountWrongRows(const Problem& problem, bool is_smallest, const unsigned char* operand,
                       const int32_t* starts, const int32_t* lengths, const Results& results,
                       bool with_values) {
  int64_t num_wrong = 0;
  const int64_t bytes = ElementBytes(problem.dtype);
  for (int64_t row = 0; row < problem.rows; ++row) {
    // Clamped anew, not by the code under test.
    const int64_t start = std::clamp<int64_t>(starts[row], 0, problem.width);
    const int64_t length = std::clamp<int64_t>(lengths[row], 0, problem.width - start);
    const unsigned char* const window = operand + (row * problem.width + start) * bytes;
    std::vector<int32_t> order(static_cast<size_t>(length));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return KeyOf(BitsAt(window, a, problem.dtype), problem.dtype, is_smallest) >
             KeyOf(BitsAt(window, b, problem.dtype), problem.dtype, is_smallest);
    });
    order.resize(static_cast<size_t>(std::min(length, problem.k)));
    if (!problem.is_sorted) std::sort(order.begin(), order.end());
    bool is_right = true;
    for (int64_t i = 0; i < problem.k; ++i) {
      const bool is_valid = i < static_cast<int64_t>(order.size());
      const int32_t index = is_valid ? order[static_cast<size_t>(i)] : -1;
      const uint32_t bits =
          is_valid ? BitsAt(window, index, problem.dtype) : PaddingBits(problem.dtype, is_smallest);
      const int64_t place = row * problem.k + i;
      is_right &= results.indices[static_cast<size_t>(place)] == index;
      is_right &= !with_values || BitsAt(results.values.data(), place, problem.dtype) == bits;
    }
    num_wrong += !is_right;
  }
  return num_wrong;
}

// ---- scenarios
// -----------------------------------------------------------------------------------

std::atomic<int64_t> num_calls{0}, num_wrong{0};

Results Run(const Case& data, Executor& executor) {
  Results results;
  const int64_t size = NumResults(data.problem);
  results.indices.assign(static_cast<size_t>(size), 0x5a5a5a5a);
  if (data.with_values) {
    results.values.assign(static_cast<size_t>(size * ElementBytes(data.problem.dtype)), 0xa5);
  }
  const TopKArgs args{data.problem,          data.is_smallest,
                      data.operand.data(),   data.starts.data(),
                      data.lengths.data(),   data.with_values ? results.values.data() : nullptr,
                      results.indices.data()};
  RunTopK(args, executor);
  ++num_calls;
  return results;
}

void Check(const char* scenario, const Case& data, const Results& results) {
  const int64_t wrong =
      CountWrongRows(data.problem, data.is_smallest, data.operand.data(), data.starts.data(),
                     data.lengths.data(), results, data.with_values);
  if (wrong == 0) return;
  num_wrong += wrong;
  std::fprintf(stderr, "%s: %lld rows are wrong: rows %lld width %lld k %lld dtype %d%s%s%s\n",
               scenario, static_cast<long long>(wrong), static_cast<long long>(data.problem.rows),
               static_cast<long long>(data.problem.width), static_cast<long long>(data.problem.k),
               static_cast<int>(data.problem.dtype), data.is_smallest ? " smallest" : "",
               data.problem.is_sorted ? " sorted" : "", data.with_values ? " values" : "");
}

// Work for several threads: even seeds have rows that are split, odd seeds many whole rows.
Case MakeLargeCase(unsigned seed) {
  std::mt19937 random(seed);
  const bool is_split = seed % 2 == 0;
  Problem problem;
  problem.rows = is_split ? 2 : 7;
  problem.width = is_split ? 450'001 : 40'001;
  problem.k = is_split ? 300 : 3000;
  problem.dtype = static_cast<DType>(seed % 3);
  problem.is_sorted = seed % 4 < 2;
  Case data = MakeCase(problem, random);
  for (int64_t row = 0; row < (is_split ? 2 : 4); ++row) {
    data.starts[static_cast<size_t>(row)] = static_cast<int32_t>(seed % 5);
    data.lengths[static_cast<size_t>(row)] = 2147483647;
  }
  const WorkPlan plan = PlanWork(problem, data.starts.data(), data.lengths.data(), 3);
  if (plan.num_threads < 2 || plan.splits.empty() == is_split) {
    std::fprintf(stderr, "seed %u is planned for %lld threads with %zu split rows\n", seed,
                 static_cast<long long>(plan.num_threads), plan.splits.size());
    ++num_wrong;
  }
  return data;
}

// The hand-over of tasks alone, often: what a task wrote is there when RunTasks returns.
void CheckTasks() {
  constexpr int64_t kNumTasks = 6;
  Pool pool(3, true);
  for (int64_t repeat = 0; repeat < 600; ++repeat) {
    int64_t written[kNumTasks] = {};
    std::atomic<int> num_started{0};
    RunTasks(pool, 4, kNumTasks, [&](int64_t worker, int64_t i) {
      // The caller leaves tasks to a helper, for as long as one may take to wake up. Relaxed, so
      // that nothing but RunTasks orders the writes below.
      num_started.fetch_add(1, std::memory_order_relaxed);
      for (int n = 0; n < 2000 && worker == 0 && num_started.load(std::memory_order_relaxed) < 2;
           ++n) {
        std::this_thread::yield();
      }
      for (int64_t n = 0; n <= 50; ++n) written[i] = repeat + i + n;
    });
    for (int64_t i = 0; i < kNumTasks; ++i) {
      if (written[i] == repeat + i + 50) continue;
      std::fprintf(stderr, "task %lld is not done when RunTasks returns\n",
                   static_cast<long long>(i));
      ++num_wrong;
    }
    ++num_calls;
  }
}

void CheckHostileCases(unsigned seed, int num_cases) {
  std::mt19937 random(seed);
  Pool none(0), pool(3);
  for (int i = 0; i < num_cases; ++i) {
    const Case data = MakeRandomCase(random);
    Check("hostile case", data, Run(data, none));
    Check("hostile case with a pool", data, Run(data, pool));
  }
}

void CheckLatePool() {
  for (unsigned seed = 0; seed < 2; ++seed) {
    const Case data = MakeLargeCase(seed);
    Results results;
    {
      LatePool late;
      results = Run(data, late);
    }
    Check("pool that starts its helpers late", data, results);
  }
}

bool AreEqual(const Results& a, const Results& b) {
  return a.values == b.values && a.indices == b.indices;
}

// Callers that share one pool, some of them on threads of the pool itself, as XLA may call.
void CheckManyCallers() {
  constexpr int kNumCallers = 4, kNumRepeats = 4;
  std::vector<Case> cases;
  std::vector<Results> wanted;
  Pool none(0);
  for (unsigned seed = 0; seed < kNumCallers; ++seed) {
    cases.push_back(MakeLargeCase(seed));
    wanted.push_back(Run(cases.back(), none));
    Check("one thread", cases.back(), wanted.back());
  }
  Pool pool(3);
  std::atomic<int> num_left{2 * kNumCallers};
  const auto work = [&](int caller) {
    for (int i = 0; i < kNumRepeats; ++i) {
      const auto which = static_cast<size_t>((caller + i) % kNumCallers);
      if (AreEqual(Run(cases[which], pool), wanted[which])) continue;
      std::fprintf(stderr, "many callers: case %zu differs from one thread\n", which);
      ++num_wrong;
    }
    --num_left;
  };
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kNumCallers; ++caller) {
    callers.emplace_back(work, caller);
    pool.Schedule([&work, caller] { work(caller); });
  }
  for (std::thread& caller : callers) caller.join();
  while (num_left > 0) std::this_thread::yield();
}

// The n-th allocation fails, for every n until none does. Each call must throw or be right.
void CheckNoMemory() {
  for (const unsigned seed : {0u, 1u}) {
    Case data = MakeLargeCase(seed);
    data.with_values = true;
    Pool pool(2);
    const Results wanted = Run(data, pool);
    Check("pool", data, wanted);
    for (int64_t n = 0;; ++n) {
      Results results;
      results.indices.assign(static_cast<size_t>(NumResults(data.problem)), 0x5a5a5a5a);
      results.values.assign(
          static_cast<size_t>(NumResults(data.problem) * ElementBytes(data.problem.dtype)), 0xa5);
      const TopKArgs args{data.problem,          data.is_smallest,    data.operand.data(),
                          data.starts.data(),    data.lengths.data(), results.values.data(),
                          results.indices.data()};
      bool has_thrown = false;
      allocations_left = n;
      try {
        RunTopK(args, pool);
      } catch (const std::bad_alloc&) {
        has_thrown = true;
      }
      const bool has_failed = allocations_left.exchange(-1) < 0;
      ++num_calls;
      if (!has_thrown && !AreEqual(results, wanted)) {
        std::fprintf(stderr, "allocation %lld fails: results differ, and nothing was thrown\n",
                     static_cast<long long>(n));
        ++num_wrong;
      }
      if (!has_failed) break;
      if (n > 10'000) {
        std::fprintf(stderr, "a call makes more than 10000 allocations\n");
        ++num_wrong;
        break;
      }
    }
  }
}

// Rows whose offsets exceed 2^32 elements. Pages that nothing writes cost no memory.
void CheckHugeOffsets() {
  Problem problem;
  problem.rows = 4;
  problem.width = 2'147'483'647;
  problem.k = 9;
  problem.dtype = DType::kFloat16;
  problem.is_sorted = true;
  const auto bytes = static_cast<size_t>(problem.rows * problem.width) * sizeof(uint16_t);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "mapping %zu bytes of address space failed\n", bytes);
    ++num_wrong;
    return;
  }
  auto* const elements = static_cast<uint16_t*>(memory);
  // From the last row to the first: 3 * 2^31 + 2^31 elements in.
  const std::vector<int32_t> starts = {2'147'480'000, 0, 1'000'000'000, 2'147'483'000};
  const std::vector<int32_t> lengths = {2147483647, 5000, 5000, 2147483647};
  std::mt19937 random(5);
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t i = 0; i < 600; ++i) {
      elements[row * problem.width + starts[static_cast<size_t>(row)] + i] =
          static_cast<uint16_t>(random() % 30'000);
    }
  }
  for (const int num_threads : {0, 2}) {
    Pool pool(num_threads);
    Results results;
    results.indices.assign(static_cast<size_t>(NumResults(problem)), 0x5a5a5a5a);
    results.values.assign(static_cast<size_t>(2 * NumResults(problem)), 0xa5);
    RunTopK({problem, false, memory, starts.data(), lengths.data(), results.values.data(),
             results.indices.data()},
            pool);
    ++num_calls;
    const int64_t wrong = CountWrongRows(problem, false, static_cast<const unsigned char*>(memory),
                                         starts.data(), lengths.data(), results, true);
    if (wrong > 0)
      std::fprintf(stderr, "offsets beyond 2^32: %lld rows are wrong\n",
                   static_cast<long long>(wrong));
    num_wrong += wrong;
  }
  munmap(memory, bytes);
}

// Nothing to select from, with no memory to point to.
void CheckNullPointers() {
  Pool pool(2);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool is_sorted : {false, true}) {
      const int32_t counts[3] = {1, -1, 2147483647};
      RunTopK({{0, 0, 0, dtype, is_sorted}, false, nullptr, nullptr, nullptr, nullptr, nullptr},
              pool);
      RunTopK({{0, 9, 4, dtype, is_sorted}, false, nullptr, nullptr, nullptr, nullptr, nullptr},
              pool);
      RunTopK({{3, 0, 0, dtype, is_sorted}, true, nullptr, counts, counts, nullptr, nullptr}, pool);
      num_calls += 3;
    }
  }
}

int Main(int argc, char** argv) {
  unsigned seed = 0;
  int num_cases = 200;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::printf("%s", kHelp);
      return 0;
    }
    if ((name != "--seed" && name != "--cases") || i + 1 >= argc) {
      std::fprintf(stderr, "check_cpu: bad option %s; --help lists them\n", name.c_str());
      return 1;
    }
    const auto value = static_cast<unsigned>(std::strtoul(argv[++i], nullptr, 10));
    if (name == "--seed") seed = value;
    else num_cases = static_cast<int>(value);
  }
  CheckHostileCases(seed, num_cases);
  CheckTasks();
  CheckLatePool();
  CheckManyCallers();
  CheckNoMemory();
  CheckHugeOffsets();
  CheckNullPointers();
  std::printf("check_cpu: seed %u, %lld calls, %lld wrong rows\n", seed,
              static_cast<long long>(num_calls.load()), static_cast<long long>(num_wrong.load()));
  return num_wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_topk::cpu

int main(int argc, char** argv) { return jax_topk::cpu::Main(argc, argv); }
