// What the tools that carry a reference of their own share: the contract's order of values, by
// bits.

#ifndef JAX_TOPK_TOOLS_REFERENCE_ORDER_H_
#define JAX_TOPK_TOOLS_REFERENCE_ORDER_H_

#include <cstdint>
#include <cstring>

#include "../problem.h"

namespace jax_topk {

inline uint32_t BitsAt(const unsigned char* row, int64_t i, DType dtype) {
  uint32_t bits = 0;
  const auto bytes = static_cast<size_t>(ElementBytes(dtype));
  std::memcpy(&bits, row + i * static_cast<int64_t>(bytes), bytes);
  return bits;
}

// Larger is better.
inline uint32_t KeyOf(uint32_t bits, DType dtype, bool is_smallest) {
  const uint32_t mask = dtype == DType::kFloat32 ? 0xffffffffu : 0xffffu;
  const uint32_t sign = dtype == DType::kFloat32 ? 0x80000000u : 0x8000u;
  const uint32_t key = (bits & sign) != 0 ? ~bits & mask : bits | sign;
  return is_smallest ? ~key & mask : key;
}

// The worst value of the mode.
inline uint32_t PaddingBits(DType dtype, bool is_smallest) {
  if (dtype == DType::kFloat32) return is_smallest ? 0x7f800000u : 0xff800000u;
  if (dtype == DType::kBFloat16) return is_smallest ? 0x7f80u : 0xff80u;
  return is_smallest ? 0x7c00u : 0xfc00u;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_TOOLS_REFERENCE_ORDER_H_
