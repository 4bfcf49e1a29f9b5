// Runs a fixed number of tasks on the calling thread and on whatever threads a pool can spare.
//
// XLA may call a handler on a thread of the very pool that the handler is given, and other handlers
// may hold all the others. So the caller takes tasks like any helper, and waits only for tasks that
// a running thread has already taken. A helper that the pool starts late finds nothing left and
// leaves; nobody waits for it. That cannot deadlock however busy the pool is, and needs no thread
// but the caller.

#ifndef JAX_TOPK_CPU_PARALLEL_H_
#define JAX_TOPK_CPU_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace jax_topk::cpu {

// A pool of threads, as far as this package needs to know one.
class Executor {
 public:
  virtual ~Executor() = default;

  // Threads that may run scheduled work at once; 0 where there is no pool.
  virtual int64_t num_threads() const = 0;

  // Runs `work` some time, on some thread; it may outlive the caller of Schedule.
  virtual void Schedule(std::function<void()> work) = 0;
};

// Runs task(worker, i) once for every i in [0, num_tasks), and returns when all have returned.
//
// Tasks are handed out in ascending order. `worker` is in [0, max_workers) and no two tasks that
// run at the same time have the same, so it may index scratch memory. `task` must not throw.
void RunTasks(Executor& executor, int64_t max_workers, int64_t num_tasks,
              const std::function<void(int64_t worker, int64_t task)>& task);

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_PARALLEL_H_
