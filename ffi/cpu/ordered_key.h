// Ordered keys: unsigned integers whose order is the order of values in the contract.
//
// The contract orders floating-point values by their bits, as jax.lax.top_k does:
//   +NaN (larger payload first) > +inf > ... > +0.0 > -0.0 > ... > -inf > -NaN.
// A sign-and-magnitude number becomes such an integer by flipping its sign bit if it is positive
// and all of its bits if it is negative (M. Herf, "Radix tricks", 2001). bfloat16 and float16 need
// nothing else: the rule does not know where the exponent ends. The complement of a key reverses
// the order, which serves mode="smallest"; the tie rule (lowest index first) is not in the key.

#ifndef JAX_TOPK_CPU_ORDERED_KEY_H_
#define JAX_TOPK_CPU_ORDERED_KEY_H_

#include <cstdint>
#include <limits>
#include <type_traits>

namespace jax_topk::cpu {

// Keys of 16-bit elements are kept in 32 bits too, so that everything after the scan exists once.
using Key = uint32_t;

// What MakeKey flips on top of the order of values: nothing, or all bits of the element.
template <typename Bits>
constexpr Key OrderMask(bool is_smallest) {
  return is_smallest ? Key{std::numeric_limits<Bits>::max()} : Key{0};
}

// Key of the element whose bits are `bits`. Always inlined, since an out-of-line copy compiled for
// one instruction set must not serve another.
template <typename Bits>
[[gnu::always_inline]] constexpr Key MakeKey(Bits bits, Key order_mask) {
  static_assert(std::is_unsigned_v<Bits> && sizeof(Bits) <= sizeof(Key));
  constexpr int kSignShift = 8 * sizeof(Bits) - 1;
  constexpr Bits kSign = Bits{1} << kSignShift;
  const Bits is_negative = static_cast<Bits>(Bits{0} - static_cast<Bits>(bits >> kSignShift));
  return static_cast<Key>(static_cast<Bits>(bits ^ (is_negative | kSign))) ^ order_mask;
}

// Inverse of MakeKey.
template <typename Bits>
[[gnu::always_inline]] constexpr Bits BitsOfKey(Key key, Key order_mask) {
  constexpr int kSignShift = 8 * sizeof(Bits) - 1;
  constexpr Bits kSign = Bits{1} << kSignShift;
  const Bits ordered = static_cast<Bits>(key ^ order_mask);
  const Bits was_negative = static_cast<Bits>(static_cast<Bits>(ordered >> kSignShift) - Bits{1});
  return static_cast<Bits>(ordered ^ (was_negative | kSign));
}

// "The key of x is at least the threshold", as one signed comparison of the bits of x, so that a
// scan need not compute keys: ((x ^ flip) > bound) != is_inverted.
template <typename Bits>
struct Cut {
  Bits flip;
  std::make_signed_t<Bits> bound;
  bool is_inverted;
};

// Let u be the bits of the element whose key is the threshold. As signed integers positive floats
// are in their own order and above all negative ones, which are in reverse; as unsigned integers
// the negative ones come last. So for the largest:
//   u positive: key(x) >= key(u)  is  x > u - 1 as signed integers;
//   u negative: key(x) >= key(u)  is  not x > u as unsigned integers, or with both signs flipped,
//   signed.
// For the smallest, whose keys are complements: key(x) >= t is not plain_key(x) >= ~t + 1.
template <typename Bits>
constexpr Cut<Bits> MakeCut(Key threshold, Key order_mask) {
  using Signed = std::make_signed_t<Bits>;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  constexpr Bits kMax = std::numeric_limits<Bits>::max();
  const bool is_smallest = order_mask != 0;
  Bits plain = static_cast<Bits>(threshold);
  if (is_smallest) {
    // Every element passes a threshold of zero: no signed integer is above the largest.
    if (threshold == 0) return {0, std::numeric_limits<Signed>::max(), true};
    plain = static_cast<Bits>(static_cast<Bits>(kMax ^ plain) + Bits{1});
  }
  const Bits u = BitsOfKey<Bits>(plain, 0);
  if ((u & kSign) == 0) {
    return {0, static_cast<Signed>(static_cast<Signed>(u) - 1), is_smallest};
  }
  return {kSign, static_cast<Signed>(u ^ kSign), !is_smallest};
}

}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_ORDERED_KEY_H_
