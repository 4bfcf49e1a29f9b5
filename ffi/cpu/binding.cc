// The Python module jax_topk._cpu: FFI handlers of the CPU target, and the planner for CUDA.

#include <exception>
#include <functional>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

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

nb::dict Registrations() {
  nb::dict handlers;
  handlers["jax_topk_v1_values_indices"] = nb::capsule(reinterpret_cast<void*>(kValuesIndices));
  handlers["jax_topk_v1_indices"] = nb::capsule(reinterpret_cast<void*>(kIndices));
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
}
