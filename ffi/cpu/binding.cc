// The Python module jax_topk._cpu: FFI handlers of the CPU target, and the planner for CUDA.

#include <cstdint>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "nanobind/nanobind.h"
#include "xla/ffi/api/ffi.h"

#include "cpu/top_k.h"
#include "handler_checks.h"
#include "plan_binding.h"

namespace jax_topk::cpu {
namespace {

namespace nb = nanobind;
namespace ffi = xla::ffi;

class XlaExecutor final : public Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool pool) : pool_(pool), num_threads_(pool.num_threads()) {}

  int64_t num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  ffi::ThreadPool pool_;
  int64_t num_threads_;
};

// Checks what XLA passed and runs the selection. `values` is absent for the indices-only target.
ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
               ffi::Buffer<ffi::S32> lengths, const ffi::AnyBuffer* values,
               ffi::Buffer<ffi::S32> indices, bool smallest, bool sorted) {
  TopKArgs args;
  ffi::Error error = CheckBuffers(operand, starts, lengths, values, indices, &args.problem);
  if (error.failure()) return error;
  args.operand = operand.untyped_data();
  args.starts = starts.typed_data();
  args.lengths = lengths.typed_data();
  args.values = values == nullptr ? nullptr : values->untyped_data();
  args.indices = indices.typed_data();
  args.is_smallest = smallest;
  args.problem.is_sorted = sorted;

  XlaExecutor executor(pool);
  try {
    RunTopK(args, executor);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "jax_topk: no memory left for the candidates of a row");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("jax_topk: ") + error.what());
  }
  return ffi::Error::Success();
}

// `plan` forces paths of the CUDA kernel; there is nothing to force here.
ffi::Error ValuesIndices(ffi::ThreadPool pool, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
                         ffi::Buffer<ffi::S32> lengths, ffi::Result<ffi::AnyBuffer> values,
                         ffi::ResultBuffer<ffi::S32> indices, bool smallest, bool sorted,
                         std::string_view plan) {
  return Run(pool, operand, starts, lengths, &*values, *indices, smallest, sorted);
}

ffi::Error Indices(ffi::ThreadPool pool, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
                   ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::S32> indices,
                   bool smallest, bool sorted, std::string_view plan) {
  return Run(pool, operand, starts, lengths, nullptr, *indices, smallest, sorted);
}

XLA_FFI_DEFINE_HANDLER(kValuesIndices, ValuesIndices,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()         // operand [*batch, width]
                           .Arg<ffi::Buffer<ffi::S32>>()  // starts [*batch]
                           .Arg<ffi::Buffer<ffi::S32>>()  // lengths [*batch]
                           .Ret<ffi::AnyBuffer>()         // values [*batch, k]
                           .Ret<ffi::Buffer<ffi::S32>>()  // indices [*batch, k]
                           .Attr<bool>("smallest")
                           .Attr<bool>("sorted")
                           .Attr<std::string_view>("plan"));

XLA_FFI_DEFINE_HANDLER(kIndices, Indices,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()         // operand [*batch, width]
                           .Arg<ffi::Buffer<ffi::S32>>()  // starts [*batch]
                           .Arg<ffi::Buffer<ffi::S32>>()  // lengths [*batch]
                           .Ret<ffi::Buffer<ffi::S32>>()  // indices [*batch, k]
                           .Attr<bool>("smallest")
                           .Attr<bool>("sorted")
                           .Attr<std::string_view>("plan"));

// Threads of its own for each piece of work, for calls outside XLA.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int64_t num_threads) : num_threads_(num_threads) {}
  ~ThreadExecutor() override {
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> work) override { threads_.emplace_back(std::move(work)); }

 private:
  const int64_t num_threads_;
  std::vector<std::thread> threads_;
};

// The selection on buffers that the caller owns, so that a test can look at what lies around them.
void Select(uint64_t operand, uint64_t starts, uint64_t lengths, uint64_t values, uint64_t indices,
            int64_t rows, int64_t width, int64_t k, const std::string& dtype, bool smallest,
            bool sorted, int64_t threads) {
  if (rows < 0 || width < 0 || width > INT32_MAX || k < 0 || k > width || threads < 1) {
    throw nb::value_error(
        "select needs rows >= 0, 0 <= width < 2^31, 0 <= k <= width and threads >= 1");
  }
  const auto pointer = [](uint64_t address) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
  };
  TopKArgs args;
  args.problem = Problem{rows, width, k, ParseDTypeOrThrow(dtype), sorted};
  args.is_smallest = smallest;
  args.operand = pointer(operand);
  args.starts = static_cast<const int32_t*>(pointer(starts));
  args.lengths = static_cast<const int32_t*>(pointer(lengths));
  args.values = pointer(values);
  args.indices = static_cast<int32_t*>(pointer(indices));
  nb::gil_scoped_release unlocked;
  // One thread is the caller's own: a pool of none.
  ThreadExecutor executor(threads == 1 ? 0 : threads);
  RunTopK(args, executor);
}

nb::capsule HandlerCapsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Registrations() {
  nb::dict handlers;
  handlers["jax_topk_v1_values_indices"] = HandlerCapsule(&WithCountsChecked<kValuesIndices, 2>);
  handlers["jax_topk_v1_indices"] = HandlerCapsule(&WithCountsChecked<kIndices, 1>);
  return handlers;
}

}  // namespace
}  // namespace jax_topk::cpu

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  m.doc() = "FFI handlers of the CPU target of jax_topk.";
  m.attr("VERSION") = JAX_TOPK_VERSION;
  m.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("registrations", &jax_topk::cpu::Registrations,
        "Returns the FFI handler of every target name, for platform \"cpu\".");
  jax_topk::BindPlan(m);
  m.def("select", &jax_topk::cpu::Select, nb::arg("operand"), nb::arg("starts"), nb::arg("lengths"),
        nb::arg("values"), nb::arg("indices"), nb::arg("rows"), nb::arg("width"), nb::arg("k"),
        nb::arg("dtype"), nb::arg("smallest"), nb::arg("sorted"), nb::arg("threads"),
        "Runs one selection on the caller's buffers, for tests that guard their surroundings.\n\n"
        "Buffers are addresses of contiguous memory; 0 for `values` stands for indices only.");
}
