// Ordered keys: unsigned integers whose order is the contract's total order on bits.
//
// For a float with bits b, key = ~b if the sign is set, b with the sign set otherwise; then
// -NaN < -inf < ... < -0 < +0 < ... < +inf < +NaN. `smallest` flips the sign bit first, which
// reverses the order exactly (key(b ^ sign) = ~key(b)), so that every later step looks for the
// largest keys. Both directions are bijections: values are recovered bit for bit.
//
// Integer instructions run at half rate on these GPUs (64 lanes per SM and cycle), so the two
// passes over all elements avoid keys: KeyTest compares bits directly, and coarse bins are computed
// for two elements at a time from their upper 16 bits.

#ifndef JAX_TOPK_CUDA_ORDERED_KEY_CUH_
#define JAX_TOPK_CUDA_ORDERED_KEY_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "../smem_layout.h"

namespace jax_topk {

// What float32 and the 16-bit types share. `Word` holds one element's bits.
template <typename Word>
struct KeyOrder {
  static constexpr int kBits = 8 * sizeof(Word);
  static constexpr int kBytes = sizeof(Word);
  static constexpr int kPerVector = kVectorBytes / kBytes;
  static constexpr uint32_t kMaxKey = static_cast<Word>(~Word{0});
  static constexpr uint32_t kSign = 1u << (kBits - 1);

  __device__ __forceinline__ static uint32_t SignFlip(bool is_smallest) {
    return is_smallest ? kSign : 0;
  }
  __device__ __forceinline__ static uint32_t Key(uint32_t bits, uint32_t flip) {
    const uint32_t x = bits ^ flip;
    return x & kSign ? x ^ kMaxKey : x | kSign;
  }
  __device__ __forceinline__ static uint32_t Bits(uint32_t key, uint32_t flip) {
    return (key & kSign ? key ^ kSign : key ^ kMaxKey) ^ flip;
  }
  // ~Key(bits, flip), and back; of float32 in fewer instructions, two and one for the flip.
  __device__ __forceinline__ static uint32_t InvertedKey(uint32_t bits, uint32_t flip) {
    return kBits == 32 ? InvertMagnitude(bits ^ flip) : ~Key(bits, flip);
  }
  __device__ __forceinline__ static uint32_t BitsOfInverted(uint32_t inverted_key, uint32_t flip) {
    return kBits == 32 ? InvertMagnitude(inverted_key) ^ flip : Bits(~inverted_key, flip);
  }
  // The value whose inverted key it is where the largest are wanted; of float32.
  __device__ __forceinline__ static float ValueOfInverted(uint32_t inverted_key) {
    static_assert(kBits == 32, "the bits of a float");
    return FloatOfBits(InvertMagnitude(inverted_key));
  }
  __device__ __forceinline__ static uint32_t Element(const uint4& vector, int i) {
    if constexpr (kBits == 32) {
      return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
    } else {
      const uint32_t pair = i < 2 ? vector.x : i < 4 ? vector.y : i < 6 ? vector.z : vector.w;
      return i % 2 == 0 ? pair & 0xffffu : pair >> 16;
    }
  }
  // An element's bits at the upper end of a word; what lies below them may be anything.
  __device__ __forceinline__ static uint32_t UpperElement(const uint4& vector, int i) {
    if constexpr (kBits == 32) {
      return Element(vector, i);
    } else {
      const uint32_t pair = Halves(vector, i / 2);
      return i % 2 == 0 ? pair << 16 : pair;
    }
  }
  // The upper 16 bits of elements 2 i and 2 i + 1.
  __device__ __forceinline__ static uint32_t Halves(const uint4& vector, int i) {
    if constexpr (kBits == 32) {
      return i == 0 ? UpperHalves(vector.x, vector.y) : UpperHalves(vector.z, vector.w);
    } else {
      return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
    }
  }

 private:
  // Of a float32 whose sign bit is clear. Its own inverse.
  __device__ __forceinline__ static uint32_t InvertMagnitude(uint32_t word) {
    const auto signs = static_cast<uint32_t>(static_cast<int32_t>(word) >> 31);
    return word ^ (~signs & 0x7fffffffu);
  }
};

// Compares elements with one key without computing theirs. Elements of the sign that the order puts
// first have keys with the sign bit set, and bits ^ flip ^ sign is their key; of the others it is
// below every such key. Likewise bits ^ flip ^ ones is the key of the others, and of the first ones
// it is above every key of the others. So one exclusive or, chosen by the key's half, gives a word
// that compares with that key as the element's own key would.
template <typename T>
struct KeyTest {
  uint32_t key;
  uint32_t mask;

  __device__ __forceinline__ KeyTest(uint32_t compared_key, uint32_t flip)
      : key(compared_key), mask(flip ^ (compared_key & T::kSign ? T::kSign : T::kMaxKey)) {}
};

// Coarse bins split the whole key range into kBins monotone bins: 32 per octave, for float32 and
// bfloat16 between 2^-15 and 2^17 of either sign. Counted from the top of the order, a positive
// number's bin is kHalfBins - 1 - step and a negative one's kHalfBins + step if the largest are
// wanted, the other way round if the smallest are. Either is the step, inverted by the sign and by
// CoarseFlip: one operation of three inputs for two elements.
constexpr uint32_t kHalfBins = kBins / 2;

__device__ __forceinline__ uint32_t BothHalves(uint32_t half) { return half | half << 16; }

// For fourfold steps that SignsOfHalves has inverted where negative.
__device__ __forceinline__ uint32_t CoarseFlip(uint32_t flip) {
  return flip == 0 ? BothHalves(4 * (kHalfBins - 1)) : BothHalves(4 * kHalfBins);
}

struct FloatSteps {
  static constexpr uint32_t kFirst = (127 - 15) << 7;  // upper half of 2^-15; below it, step 0
  static constexpr uint32_t kScale = 4;                // halves per step: 128 / 32

  // Four times the step of each half, plus a rest below 4.
  __device__ __forceinline__ static uint32_t Fourfold(uint32_t halves) {
    const uint32_t above =
        AddMaxHalves(halves & BothHalves(0x7fff), BothHalves(0x10000 - kFirst), 0);
    return MinHalves(above, BothHalves(4 * kHalfBins - 1));
  }
  // The smallest magnitude (upper half) of a step.
  __device__ __forceinline__ static uint32_t Magnitude(uint32_t step) {
    return step == 0 ? 0 : kFirst + step * kScale;
  }
};
static_assert(FloatSteps::kScale == 4, "Fourfold needs no shift");

// kWidestEven: the widest range of keys whose pairs SortPairs spreads evenly by key. kKeysPerStep:
// the keys of an even bin, see IsEvenBin.
struct Float32 : KeyOrder<uint32_t> {
  static constexpr int kMaxVectors = jax_topk::kMaxVectors;
  static constexpr uint32_t kWidestEven = 24u << 23;
  static constexpr uint32_t kKeysPerStep = FloatSteps::kScale << 16;
  static constexpr uint32_t kInfinity = 0x7f800000u;
  __device__ __forceinline__ static uint32_t FourfoldSteps(uint32_t halves) {
    return FloatSteps::Fourfold(halves);
  }
  __device__ __forceinline__ static uint32_t StepMagnitude(uint32_t step) {
    return FloatSteps::Magnitude(step) << 16;
  }
};

struct BFloat16 : KeyOrder<uint16_t> {
  static constexpr int kMaxVectors = 3;
  static constexpr uint32_t kWidestEven = 24u << 7;
  static constexpr uint32_t kKeysPerStep = FloatSteps::kScale;
  static constexpr uint32_t kInfinity = 0x7f80u;
  __device__ __forceinline__ static uint32_t FourfoldSteps(uint32_t halves) {
    return FloatSteps::Fourfold(halves);
  }
  __device__ __forceinline__ static uint32_t StepMagnitude(uint32_t step) {
    return FloatSteps::Magnitude(step);
  }
};

struct Float16 : KeyOrder<uint16_t> {
  static constexpr int kMaxVectors = 3;
  static constexpr uint32_t kWidestEven = kMaxKey;
  static constexpr uint32_t kKeysPerStep = 32;
  static constexpr uint32_t kInfinity = 0x7c00u;
  // 2^15 magnitudes over kHalfBins steps.
  __device__ __forceinline__ static uint32_t FourfoldSteps(uint32_t halves) {
    return halves >> 3 & BothHalves(4 * kHalfBins - 4);
  }
  __device__ __forceinline__ static uint32_t StepMagnitude(uint32_t step) {
    return step * kKeysPerStep;
  }
};

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_ORDERED_KEY_CUH_
