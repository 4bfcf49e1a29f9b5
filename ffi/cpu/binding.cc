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

using Dimensions = ffi::AnyBuffer::Dimensions;

std::string ToString(Dimensions dimensions) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dimensions.size(); ++i) text << (i == 0 ? "" : ", ") << dimensions[i];
  text << "]";
  return text.str();
}

// An InvalidArgument error from the parts of a sentence.
template <typename... Parts>
ffi::Error Invalid(const Parts&... parts) {
  std::ostringstream text;
  text << "jax_topk: ";
  (text << ... << parts);
  return ffi::Error::InvalidArgument(text.str());
}

// Whether `dimensions` is `batch` followed by `last`, if there is a last.
bool IsBatchAnd(Dimensions dimensions, Dimensions batch, const int64_t* last) {
  const size_t rank = batch.size() + (last != nullptr);
  if (dimensions.size() != rank) return false;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (dimensions[i] != batch[i]) return false;
  }
  return last == nullptr || dimensions[rank - 1] == *last;
}

// Checks what XLA passed and runs the selection. `values` is absent for the indices-only target.
ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
               ffi::Buffer<ffi::S32> lengths, const ffi::AnyBuffer* values,
               ffi::Buffer<ffi::S32> indices, bool smallest, bool sorted) {
  TopKArgs args;
  Problem& problem = args.problem;
  switch (operand.element_type()) {
    case ffi::F32: problem.dtype = DType::kFloat32; break;
    case ffi::BF16: problem.dtype = DType::kBFloat16; break;
    case ffi::F16: problem.dtype = DType::kFloat16; break;
    default:
      return Invalid("operand has element type ", operand.element_type(),
                     "; the CPU target takes F32, BF16 and F16");
  }
  const Dimensions shape = operand.dimensions();
  if (shape.size() == 0) {
    return Invalid("operand is a scalar; pass an array of shape [*batch, width]");
  }
  const Dimensions batch(shape.begin(), shape.size() - 1);
  if (!IsBatchAnd(starts.dimensions(), batch, nullptr)) {
    return Invalid("starts has shape ", ToString(starts.dimensions()), "; it must be ",
                   ToString(batch), ", the shape of operand without its last axis");
  }
  if (!IsBatchAnd(lengths.dimensions(), batch, nullptr)) {
    return Invalid("lengths has shape ", ToString(lengths.dimensions()), "; it must be ",
                   ToString(batch), ", the shape of operand without its last axis");
  }
  const Dimensions results = indices.dimensions();
  if (results.size() == 0 || !IsBatchAnd(results, batch, &results[results.size() - 1])) {
    return Invalid("indices has shape ", ToString(results), "; it must be ", ToString(batch),
                   " followed by k");
  }
  problem.width = shape[shape.size() - 1];
  problem.k = results[results.size() - 1];
  if (problem.k > problem.width) {
    return Invalid("k=", problem.k, " exceeds the row width ", problem.width,
                   "; pass k <= operand.shape[-1]");
  }
  if (problem.width > int64_t{std::numeric_limits<int32_t>::max()}) {
    return Invalid("the row width ", problem.width, " does not fit an int32 index; split the row");
  }
  args.values = nullptr;
  if (values != nullptr) {
    if (values->element_type() != operand.element_type()) {
      return Invalid("values has element type ", values->element_type(), "; it must be ",
                     operand.element_type(), ", as operand");
    }
    if (!IsBatchAnd(values->dimensions(), batch, &problem.k)) {
      return Invalid("values has shape ", ToString(values->dimensions()), "; it must be ",
                     ToString(results), ", as indices");
    }
    args.values = values->untyped_data();
  }
  args.operand = operand.untyped_data();
  args.starts = starts.typed_data();
  args.lengths = lengths.typed_data();
  args.indices = indices.typed_data();
  problem.rows = 1;
  for (const int64_t size : batch) problem.rows *= size;
  args.is_smallest = smallest;
  problem.is_sorted = sorted;

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
