// A shared counter hands out the tasks; another counts those that are finished.

#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

namespace jax_topk::cpu {
namespace {

// Tells the processor that this thread is spinning.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` does nothing on most cores
#endif
}

// Outlives RunTasks in the hands of helpers that start late. `task` does not: a helper may only use
// it after it has taken a task, since RunTasks cannot return before that task is finished.
struct SharedTasks {
  SharedTasks(int64_t num_tasks, const std::function<void(int64_t, int64_t)>& task)
      : num_tasks(num_tasks), task(&task) {}

  void Work(int64_t worker) {
    int64_t num_done_here = 0;
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= num_tasks) break;
      (*task)(worker, i);
      ++num_done_here;
    }
    if (num_done_here == 0) return;
    // Release: what the tasks wrote is visible to the caller once it has seen the last count.
    if (num_done.fetch_add(num_done_here, std::memory_order_acq_rel) + num_done_here == num_tasks) {
      std::lock_guard<std::mutex> lock(mutex);  // else the caller could miss the notification
      all_done.notify_all();
    }
  }

  void Wait() {
    // The others are finishing the task they hold: usually sooner than a thread can sleep and wake
    // up, which takes about 50 us.
    constexpr int kNumSpins = 2000;  // 20 to 100 us
    for (int i = 0; i < kNumSpins; ++i) {
      if (num_done.load(std::memory_order_acquire) == num_tasks) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [&] { return num_done.load(std::memory_order_acquire) == num_tasks; });
  }

  const int64_t num_tasks;
  const std::function<void(int64_t, int64_t)>* const task;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> num_done{0};
  std::mutex mutex;
  std::condition_variable all_done;
};

}  // namespace

void RunTasks(Executor& executor, int64_t max_workers, int64_t num_tasks,
              const std::function<void(int64_t worker, int64_t task)>& task) {
  const int64_t num_workers = std::min(max_workers, num_tasks);
  if (num_workers <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(0, i);
    return;
  }
  auto tasks = std::make_shared<SharedTasks>(num_tasks, task);
  for (int64_t worker = 1; worker < num_workers; ++worker) {
    try {
      executor.Schedule([tasks, worker] { tasks->Work(worker); });
    } catch (const std::bad_alloc&) {
      break;  // helpers may be at work already: leave only through Wait
    }
  }
  tasks->Work(0);
  tasks->Wait();
}

}  // namespace jax_topk::cpu
