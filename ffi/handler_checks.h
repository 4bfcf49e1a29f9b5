// What the FFI handlers of all platforms check before they touch a buffer.

#ifndef JAX_TOPK_HANDLER_CHECKS_H_
#define JAX_TOPK_HANDLER_CHECKS_H_

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_topk {

namespace ffi = xla::ffi;

using Dimensions = ffi::AnyBuffer::Dimensions;

// The parts of a sentence as text. Numbers do not go through a stream: on a machine whose g++ links
// libstdc++ statically, with JAX's CUDA plugin, every message that wrote a number to one ended in a
// segmentation fault, and none that did not. See the link options in CMakeLists.txt.
inline std::string ToText(const char* text) { return text; }
inline std::string ToText(const std::string& text) { return text; }
inline std::string ToText(int64_t number) { return std::to_string(number); }
inline std::string ToText(ffi::DataType type) {
  std::ostringstream text;
  text << type;
  return text.str();
}
inline std::string ToText(Dimensions dimensions) {
  std::string text = "[";
  for (size_t i = 0; i < dimensions.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dimensions[i]);
  }
  return text + "]";
}

// An InvalidArgument error from the parts of a sentence.
template <typename... Parts>
ffi::Error Invalid(const Parts&... parts) {
  return ffi::Error::InvalidArgument((std::string("jax_topk: ") + ... + ToText(parts)));
}

// What is wrong with the numbers of operands, results and attributes of a call, or "".
inline std::string CountProblem(const XLA_FFI_CallFrame& frame, int64_t num_results) {
  constexpr int64_t kNumOperands = 3, kNumAttributes = 3;
  const auto sentence = [](int64_t number, const char* what, int64_t wanted, const char* names) {
    return "the call has " + std::to_string(number) + " " + what + (number == 1 ? "" : "s") +
           "; the target takes " + std::to_string(wanted) + ": " + names;
  };
  if (frame.args.size != kNumOperands) {
    return sentence(frame.args.size, "operand", kNumOperands, "operand, starts, lengths");
  }
  if (frame.rets.size != num_results) {
    return sentence(frame.rets.size, "result", num_results,
                    num_results == 1 ? "indices" : "values, indices");
  }
  if (frame.attrs.size != kNumAttributes) {
    std::string text =
        sentence(frame.attrs.size, "attribute", kNumAttributes, "plan, smallest, sorted");
    for (int64_t i = 0; i < frame.attrs.size; ++i) {
      const XLA_FFI_ByteSpan& name = *frame.attrs.names[i];
      text += (i == 0 ? "; it has " : ", ") + std::string(name.ptr, name.len);
    }
    return text;
  }
  return "";
}

// The entry point of `handler`. XLA's header checks the counts too, but it would write them to a
// stream. Costs three comparisons.
template <XLA_FFI_Handler* handler, int64_t num_results>
XLA_FFI_Error* WithCountsChecked(XLA_FFI_CallFrame* frame) {
  // When a target is registered, XLA asks for its traits by a frame without operands.
  const bool is_call = frame->extension_start == nullptr ||
                       frame->extension_start->type != XLA_FFI_Extension_Metadata;
  if (is_call) {
    const std::string problem = CountProblem(*frame, num_results);
    if (!problem.empty()) {
      const std::string message = "jax_topk: " + problem;
      XLA_FFI_Error_Create_Args error{};
      error.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
      error.message = message.c_str();
      error.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
      return frame->api->XLA_FFI_Error_Create(&error);
    }
  }
  return handler(frame);
}

// Whether `dimensions` is `batch` followed by `last`, if there is a last.
inline bool IsBatchAnd(Dimensions dimensions, Dimensions batch, const int64_t* last) {
  const size_t rank = batch.size() + (last != nullptr);
  if (dimensions.size() != rank) return false;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (dimensions[i] != batch[i]) return false;
  }
  return last == nullptr || dimensions[rank - 1] == *last;
}

// Checks element types and shapes, and describes the call. `values` is null for the indices-only
// target. Leaves `is_sorted` alone.
inline ffi::Error CheckBuffers(const ffi::AnyBuffer& operand, const ffi::Buffer<ffi::S32>& starts,
                               const ffi::Buffer<ffi::S32>& lengths, const ffi::AnyBuffer* values,
                               const ffi::Buffer<ffi::S32>& indices, Problem* problem) {
  switch (operand.element_type()) {
    case ffi::F32: problem->dtype = DType::kFloat32; break;
    case ffi::BF16: problem->dtype = DType::kBFloat16; break;
    case ffi::F16: problem->dtype = DType::kFloat16; break;
    default:
      return Invalid("operand has element type ", operand.element_type(),
                     "; the kernels take F32, BF16 and F16");
  }
  const Dimensions shape = operand.dimensions();
  if (shape.size() == 0) {
    return Invalid("operand is a scalar; pass an array of shape [*batch, width]");
  }
  const Dimensions batch(shape.begin(), shape.size() - 1);
  if (!IsBatchAnd(starts.dimensions(), batch, nullptr)) {
    return Invalid("starts has shape ", starts.dimensions(), "; it must be ", batch,
                   ", the shape of operand without its last axis");
  }
  if (!IsBatchAnd(lengths.dimensions(), batch, nullptr)) {
    return Invalid("lengths has shape ", lengths.dimensions(), "; it must be ", batch,
                   ", the shape of operand without its last axis");
  }
  const Dimensions results = indices.dimensions();
  if (results.size() == 0 || !IsBatchAnd(results, batch, &results[results.size() - 1])) {
    return Invalid("indices has shape ", results, "; it must be ", batch, " followed by k");
  }
  problem->width = shape[shape.size() - 1];
  problem->k = results[results.size() - 1];
  if (problem->k > problem->width) {
    return Invalid("k=", problem->k, " exceeds the row width ", problem->width,
                   "; pass k <= operand.shape[-1]");
  }
  if (problem->width > int64_t{std::numeric_limits<int32_t>::max()}) {
    return Invalid("the row width ", problem->width, " does not fit an int32 index; split the row");
  }
  if (values != nullptr) {
    if (values->element_type() != operand.element_type()) {
      return Invalid("values has element type ", values->element_type(), "; it must be ",
                     operand.element_type(), ", as operand");
    }
    if (!IsBatchAnd(values->dimensions(), batch, &problem->k)) {
      return Invalid("values has shape ", values->dimensions(), "; it must be ", results,
                     ", as indices");
    }
  }
  problem->rows = 1;
  // Wraps around where no memory could hold the counts, which is a shape with a zero elsewhere.
  for (const int64_t size : batch) {
    problem->rows =
        static_cast<int64_t>(static_cast<uint64_t>(problem->rows) * static_cast<uint64_t>(size));
  }
  return ffi::Error::Success();
}

}  // namespace jax_topk

#endif  // JAX_TOPK_HANDLER_CHECKS_H_
