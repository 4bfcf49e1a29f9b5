// The Python module jax_topk._cuda: FFI handlers of the CUDA target, device facts, and timing.
//
// Imports without a GPU, a driver or a CUDA installation; a call that needs one raises.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/launch.h"
#include "cuda/timing.h"
#include "handler_checks.h"
#include "plan_binding.h"
#include "smem_layout.h"
#include "xla/ffi/api/ffi.h"

namespace jax_topk {
namespace {

namespace nb = nanobind;
// Checks what XLA passed and launches. `values` is null for the indices-only target.
ffi::Error Run(cudaStream_t stream, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
               ffi::Buffer<ffi::S32> lengths, ffi::AnyBuffer* values, ffi::Buffer<ffi::S32> indices,
               bool is_smallest, bool is_sorted, std::string_view plan) {
  Problem problem;
  ffi::Error refused = CheckBuffers(operand, starts, lengths, values, indices, &problem);
  if (refused.failure()) return refused;
  problem.is_sorted = is_sorted;
  const TopKBuffers buffers{operand.untyped_data(), starts.typed_data(), lengths.typed_data(),
                            values == nullptr ? nullptr : values->untyped_data(),
                            indices.typed_data()};
  // Behind other kernels: XLA does not launch them so that they overlap.
  const std::string error =
      LaunchTopK(problem, is_smallest, plan, buffers, /*may_overlap=*/false, stream);
  return error.empty() ? ffi::Error::Success() : Invalid(error);
}

ffi::Error ValuesAndIndices(cudaStream_t stream, ffi::AnyBuffer operand,
                            ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> lengths,
                            ffi::Result<ffi::AnyBuffer> values,
                            ffi::Result<ffi::Buffer<ffi::S32>> indices, bool smallest, bool sorted,
                            std::string_view plan) {
  return Run(stream, operand, starts, lengths, &*values, *indices, smallest, sorted, plan);
}

ffi::Error Indices(cudaStream_t stream, ffi::AnyBuffer operand, ffi::Buffer<ffi::S32> starts,
                   ffi::Buffer<ffi::S32> lengths, ffi::Result<ffi::Buffer<ffi::S32>> indices,
                   bool smallest, bool sorted, std::string_view plan) {
  return Run(stream, operand, starts, lengths, nullptr, *indices, smallest, sorted, plan);
}

// The trait puts the call inside XLA's command buffers (CUDA graphs).
XLA_FFI_DEFINE_HANDLER(kValuesAndIndices, ValuesAndIndices,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()         // operand [*batch, width]
                           .Arg<ffi::Buffer<ffi::S32>>()  // starts [*batch]
                           .Arg<ffi::Buffer<ffi::S32>>()  // lengths [*batch]
                           .Ret<ffi::AnyBuffer>()         // values [*batch, k]
                           .Ret<ffi::Buffer<ffi::S32>>()  // indices [*batch, k]
                           .Attr<bool>("smallest")
                           .Attr<bool>("sorted")
                           .Attr<std::string_view>("plan"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kIndices, Indices,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()         // operand [*batch, width]
                           .Arg<ffi::Buffer<ffi::S32>>()  // starts [*batch]
                           .Arg<ffi::Buffer<ffi::S32>>()  // lengths [*batch]
                           .Ret<ffi::Buffer<ffi::S32>>()  // indices [*batch, k]
                           .Attr<bool>("smallest")
                           .Attr<bool>("sorted")
                           .Attr<std::string_view>("plan"),
                       {ffi::Traits::kCmdBufferCompatible});

nb::capsule HandlerCapsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

template <typename Pointer>
Pointer DevicePointer(uint64_t address) {
  return reinterpret_cast<Pointer>(static_cast<uintptr_t>(address));
}

std::vector<double> GraphChain(const std::string& kind, const std::vector<uint64_t>& operands,
                               uint64_t starts, uint64_t lengths, uint64_t values, uint64_t indices,
                               int64_t rows, int64_t width, int64_t k, const std::string& dtype,
                               bool smallest, bool sorted, const std::string& plan, int launches,
                               int replays, int device) {
  if (launches < 1 || replays < 1 || operands.empty()) {
    throw nb::value_error("launches, replays and the number of operands must be at least 1");
  }
  const Problem problem{rows, width, k, ParseDTypeOrThrow(dtype), sorted};
  const auto buffers = [&](int index) {
    return TopKBuffers{DevicePointer<const void*>(operands[index % operands.size()]),
                       DevicePointer<const int32_t*>(starts),
                       DevicePointer<const int32_t*>(lengths), DevicePointer<void*>(values),
                       DevicePointer<int32_t*>(indices)};
  };
  const bool is_behind_others = kind == "behind_others";
  const Launch read = [&](int index, cudaStream_t stream) {
    return LaunchRead(problem, buffers(index), stream);
  };
  Launch launch;
  if (kind == "top_k" || is_behind_others) {
    // Behind others as JAX launches it.
    launch = [&](int index, cudaStream_t stream) {
      return LaunchTopK(problem, smallest, plan, buffers(index), /*may_overlap=*/!is_behind_others,
                        stream);
    };
  } else if (kind == "empty") {
    launch = [](int, cudaStream_t stream) { return LaunchEmpty(stream); };
  } else if (kind == "read") {
    launch = read;
  } else {
    throw nb::value_error(
        ("kind '" + kind + "' is not one of top_k, empty, read, behind_others").c_str());
  }
  std::vector<double> microseconds;
  std::string error;
  {
    nb::gil_scoped_release unlocked;
    const cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) {
      error =
          "selecting device " + std::to_string(device) + " failed: " + cudaGetErrorString(status);
    } else if (is_behind_others) {
      error = TimeBehindOthers(read, launch, launches, replays, &microseconds);
    } else {
      error = TimeGraphChain(launch, launches, replays, &microseconds);
    }
  }
  if (!error.empty()) throw std::runtime_error(error);
  return microseconds;
}

// The launch on buffers that the caller owns, so that a test can look at what lies around them.
void Select(uint64_t operand, uint64_t starts, uint64_t lengths, uint64_t values, uint64_t indices,
            int64_t rows, int64_t width, int64_t k, const std::string& dtype, bool smallest,
            bool sorted, const std::string& plan, int device) {
  const Problem problem{rows, width, k, ParseDTypeOrThrow(dtype), sorted};
  const TopKBuffers buffers{DevicePointer<const void*>(operand),
                            DevicePointer<const int32_t*>(starts),
                            DevicePointer<const int32_t*>(lengths), DevicePointer<void*>(values),
                            DevicePointer<int32_t*>(indices)};
  std::string error;
  {
    nb::gil_scoped_release unlocked;
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) {
      error =
          LaunchTopK(problem, smallest, plan, buffers, /*may_overlap=*/true, cudaStreamPerThread);
      if (error.empty()) status = cudaStreamSynchronize(cudaStreamPerThread);
    }
    if (error.empty() && status != cudaSuccess) {
      error = "running the top-k kernel on device " + std::to_string(device) +
              " failed: " + cudaGetErrorString(status);
    }
  }
  if (!error.empty()) throw std::runtime_error(error);
}

nb::dict DeviceLimitsDict(int device) {
  DeviceLimits limits;
  const std::string error = GetDeviceLimits(device, &limits);
  if (!error.empty()) throw std::runtime_error(error);
  nb::dict result;
  result["num_sms"] = limits.num_sms;
  result["smem_per_block_bytes"] = limits.smem_per_block_bytes;
  result["smem_per_sm_bytes"] = limits.smem_per_sm_bytes;
  result["max_cluster_size"] = limits.max_cluster_size;
  result["resident_clusters"] = limits.resident_clusters;
  return result;
}

int DriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// Of every visible GPU, as (major, minor). Creates no context. Empty without a driver or GPU.
nb::list ComputeCapabilities() {
  nb::list result;
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess) return result;
  for (int device = 0; device < num_devices; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
      result.append(nb::make_tuple(major, minor));
    }
  }
  return result;
}

nb::list Architectures() {
  nb::list result;
  std::istringstream names(JAX_TOPK_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(names, name, ',');) result.append(nb::str(name.c_str()));
  return result;
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "The CUDA target of jax_topk.";
  module.attr("VERSION") = JAX_TOPK_VERSION;
  module.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.attr("MAX_K") = kMaxK;
  module.attr("RUNTIME_VERSION") = CUDART_VERSION;
  module.attr("ARCHITECTURES") = Architectures();
  module.def(
      "registrations",
      [] {
        nb::dict result;
        result["jax_topk_v1_values_indices"] =
            HandlerCapsule(&WithCountsChecked<kValuesAndIndices, 2>);
        result["jax_topk_v1_indices"] = HandlerCapsule(&WithCountsChecked<kIndices, 1>);
        return result;
      },
      "FFI handlers by target name, for jax.ffi.register_ffi_target on platform CUDA.");
  module.def("device_limits", &DeviceLimitsDict, nb::arg("device") = 0,
             "What the planner uses of a device. Raises RuntimeError without a driver or GPU.");
  module.def("driver_version", &DriverVersion,
             "The CUDA version of the driver, 13000 for 13.0; 0 where there is none.");
  module.def("compute_capabilities", &ComputeCapabilities,
             "(major, minor) of every visible GPU; empty without a driver or GPU.");
  module.def(
      "graph_chain",
      [](const std::string& kind, nb::object operand, uint64_t starts, uint64_t lengths,
         uint64_t values, uint64_t indices, int64_t rows, int64_t width, int64_t k,
         const std::string& dtype, bool smallest, bool sorted, const std::string& plan,
         int launches, int replays, int device) {
        std::vector<uint64_t> operands;
        if (nb::isinstance<nb::int_>(operand)) {
          operands.push_back(nb::cast<uint64_t>(operand));
        } else {
          operands = nb::cast<std::vector<uint64_t>>(operand);
        }
        return GraphChain(kind, operands, starts, lengths, values, indices, rows, width, k, dtype,
                          smallest, sorted, plan, launches, replays, device);
      },
      nb::arg("kind"), nb::arg("operand"), nb::arg("starts"), nb::arg("lengths"), nb::arg("values"),
      nb::arg("indices"), nb::arg("rows"), nb::arg("width"), nb::arg("k"), nb::arg("dtype"),
      nb::arg("smallest"), nb::arg("sorted"), nb::arg("plan"), nb::arg("launches"),
      nb::arg("replays"), nb::arg("device"),
      "Microseconds per launch for each replay of one CUDA graph of `launches` launches.\n\n"
      "Buffers are device addresses; 0 stands for no values. `operand` is one address, or a list "
      "of\n"
      "them that the launches take in turn. kind: top_k, empty or read.");
  module.def("select", &Select, nb::arg("operand"), nb::arg("starts"), nb::arg("lengths"),
             nb::arg("values"), nb::arg("indices"), nb::arg("rows"), nb::arg("width"), nb::arg("k"),
             nb::arg("dtype"), nb::arg("smallest"), nb::arg("sorted"), nb::arg("plan"),
             nb::arg("device"),
             "Launches once on the caller's buffers and waits, for tests that guard their "
             "surroundings.\n\n"
             "Buffers are device addresses; 0 for `values` stands for indices only.");
}

}  // namespace jax_topk
