// The bodies of the vector loops. Included by one source file per instruction set, each compiled
// with the flags of its own; everything here has internal linkage, so that the linker cannot put
// the copy for one instruction set in the place of another.

#ifndef JAX_TOPK_CPU_SIMD_KERNELS_H_
#define JAX_TOPK_CPU_SIMD_KERNELS_H_

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/ordered_key.h"
#include "cpu/simd.h"

namespace jax_topk::cpu {
namespace {

// ---- one bit per element of a block of 64: ((x ^ flip) > bound) ------------------------------

#if defined(__AVX2__)

__m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

uint64_t Above(const uint32_t* block, const Cut<uint32_t>& cut) {
  const __m256i flip = _mm256_set1_epi32(static_cast<int32_t>(cut.flip));
  const __m256i bound = _mm256_set1_epi32(cut.bound);
  // Packing works within halves of a register; this puts groups of four back in order.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  uint64_t mask = 0;
  for (int i = 0; i < 2; ++i) {
    __m256i above[4];
    for (int j = 0; j < 4; ++j) {
      above[j] = _mm256_cmpgt_epi32(_mm256_xor_si256(Load(block + 32 * i + 8 * j), flip), bound);
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(above[0], above[1]),
                                             _mm256_packs_epi32(above[2], above[3]));
    const int bits = _mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, in_order));
    mask |= uint64_t{static_cast<uint32_t>(bits)} << (32 * i);
  }
  return mask;
}

uint64_t Above(const uint16_t* block, const Cut<uint16_t>& cut) {
  const __m256i flip = _mm256_set1_epi16(static_cast<int16_t>(cut.flip));
  const __m256i bound = _mm256_set1_epi16(cut.bound);
  uint64_t mask = 0;
  for (int i = 0; i < 2; ++i) {
    const __m256i low = Load(block + 32 * i);
    const __m256i high = Load(block + 32 * i + 16);
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_cmpgt_epi16(_mm256_xor_si256(low, flip), bound),
                           _mm256_cmpgt_epi16(_mm256_xor_si256(high, flip), bound));
    const int bits = _mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8));
    mask |= uint64_t{static_cast<uint32_t>(bits)} << (32 * i);
  }
  return mask;
}

#elif defined(__x86_64__)

__m128i Load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

uint64_t Above(const uint32_t* block, const Cut<uint32_t>& cut) {
  const __m128i flip = _mm_set1_epi32(static_cast<int32_t>(cut.flip));
  const __m128i bound = _mm_set1_epi32(cut.bound);
  uint64_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    __m128i above[4];
    for (int j = 0; j < 4; ++j) {
      above[j] = _mm_cmpgt_epi32(_mm_xor_si128(Load(block + 16 * i + 4 * j), flip), bound);
    }
    const __m128i bytes =
        _mm_packs_epi16(_mm_packs_epi32(above[0], above[1]), _mm_packs_epi32(above[2], above[3]));
    mask |= uint64_t{static_cast<uint32_t>(_mm_movemask_epi8(bytes))} << (16 * i);
  }
  return mask;
}

uint64_t Above(const uint16_t* block, const Cut<uint16_t>& cut) {
  const __m128i flip = _mm_set1_epi16(static_cast<int16_t>(cut.flip));
  const __m128i bound = _mm_set1_epi16(cut.bound);
  uint64_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m128i low = _mm_xor_si128(Load(block + 16 * i), flip);
    const __m128i high = _mm_xor_si128(Load(block + 16 * i + 8), flip);
    const __m128i bytes =
        _mm_packs_epi16(_mm_cmpgt_epi16(low, bound), _mm_cmpgt_epi16(high, bound));
    mask |= uint64_t{static_cast<uint32_t>(_mm_movemask_epi8(bytes))} << (16 * i);
  }
  return mask;
}

#elif defined(__aarch64__)

// Bit i % 8 of byte i, then three rounds of adding neighbours: eight bytes of eight bits each.
uint64_t BitsOfBytes(const uint8x16_t (&bytes)[4]) {
  const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t low = vpaddq_u8(vandq_u8(bytes[0], weights), vandq_u8(bytes[1], weights));
  const uint8x16_t high = vpaddq_u8(vandq_u8(bytes[2], weights), vandq_u8(bytes[3], weights));
  const uint8x16_t sums = vpaddq_u8(low, high);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)), 0);
}

uint64_t Above(const uint32_t* block, const Cut<uint32_t>& cut) {
  const uint32x4_t flip = vdupq_n_u32(cut.flip);
  const int32x4_t bound = vdupq_n_s32(cut.bound);
  uint8x16_t bytes[4];
  for (int i = 0; i < 4; ++i) {
    uint16x4_t above[4];
    for (int j = 0; j < 4; ++j) {
      const uint32x4_t x = veorq_u32(vld1q_u32(block + 16 * i + 4 * j), flip);
      above[j] = vmovn_u32(vcgtq_s32(vreinterpretq_s32_u32(x), bound));
    }
    bytes[i] = vcombine_u8(vmovn_u16(vcombine_u16(above[0], above[1])),
                           vmovn_u16(vcombine_u16(above[2], above[3])));
  }
  return BitsOfBytes(bytes);
}

uint64_t Above(const uint16_t* block, const Cut<uint16_t>& cut) {
  const uint16x8_t flip = vdupq_n_u16(cut.flip);
  const int16x8_t bound = vdupq_n_s16(cut.bound);
  uint8x16_t bytes[4];
  for (int i = 0; i < 4; ++i) {
    uint8x8_t above[2];
    for (int j = 0; j < 2; ++j) {
      const uint16x8_t x = veorq_u16(vld1q_u16(block + 16 * i + 8 * j), flip);
      above[j] = vmovn_u16(vcgtq_s16(vreinterpretq_s16_u16(x), bound));
    }
    bytes[i] = vcombine_u8(above[0], above[1]);
  }
  return BitsOfBytes(bytes);
}

#else

template <typename Bits>
uint64_t Above(const Bits* block, const Cut<Bits>& cut) {
  uint64_t mask = 0;
  for (int i = 0; i < kScanBlock; ++i) {
    const auto x = static_cast<std::make_signed_t<Bits> >(block[i] ^ cut.flip);
    mask |= uint64_t{x > cut.bound} << i;
  }
  return mask;
}

#endif

// ---- scan --------------------------------------------------------------------------------------

// Writes base + i for every bit i of the mask, ascending, and returns how many.
inline int64_t AppendBits(uint64_t mask, int32_t base, int32_t* out) {
  // Four at a time whether or not they exist: a mispredicted branch costs more than four stores.
  constexpr uint64_t kNotZero = uint64_t{1} << 63;  // keeps the count of zeros defined
  const int64_t num_bits = __builtin_popcountll(mask);
  for (int64_t written = 0; written < num_bits; written += 4) {
    for (int i = 0; i < 4; ++i) {
      out[written + i] = base + __builtin_ctzll(mask | kNotZero);
      mask &= mask - 1;
    }
  }
  return num_bits;
}

template <typename Bits>
int64_t Scan(const Bits* row, int64_t begin, int64_t end, const Cut<Bits>& cut, int32_t* indices,
             int64_t capacity, int64_t* size) {
  const uint64_t inversion = cut.is_inverted ? ~uint64_t{0} : 0;
  int64_t num = *size;
  for (; begin + kScanBlock <= end && num + kScanBlock <= capacity; begin += kScanBlock) {
    const uint64_t mask = Above(row + begin, cut) ^ inversion;
    num += AppendBits(mask, static_cast<int32_t>(begin), indices + num);
  }
  if (begin < end && begin + kScanBlock > end && num + kScanBlock <= capacity) {
    Bits last[kScanBlock] = {};  // nothing beyond `end` may be read
    std::memcpy(last, row + begin, static_cast<size_t>(end - begin) * sizeof(Bits));
    const uint64_t is_real = (uint64_t{1} << (end - begin)) - 1;
    const uint64_t mask = (Above(last, cut) ^ inversion) & is_real;
    num += AppendBits(mask, static_cast<int32_t>(begin), indices + num);
    begin = end;
  }
  *size = num;
  return begin;
}

// ---- maxima and ranks: vectors of the compiler, which any target has ---------------------------

#if defined(__AVX2__)
constexpr int kVectorLanes = 8;
constexpr int32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr int kVectorLanes = 4;
constexpr int32_t kLaneNumbers[] = {0, 1, 2, 3};
#endif
typedef Key KeyVector __attribute__((vector_size(4 * kVectorLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kVectorLanes)));

// MakeKey of kVectorLanes elements. Not returned: how a wide vector is returned depends on flags.
template <typename Bits>
inline void MakeKeys(const Bits* elements, Key order_mask, KeyVector* keys) {
  typedef Bits BitsVector __attribute__((vector_size(sizeof(Bits) * kVectorLanes)));
  constexpr int kSignShift = 8 * sizeof(Bits) - 1;
  BitsVector bits;
  std::memcpy(&bits, elements, sizeof(bits));
  const KeyVector wide = __builtin_convertvector(bits, KeyVector);
  const KeyVector is_negative = (0 - (wide >> kSignShift)) & Key{std::numeric_limits<Bits>::max()};
  *keys = wide ^ (is_negative | (Key{1} << kSignShift)) ^ order_mask;
}

template <typename Bits>
void LaneMaxima(const Bits* block, int64_t size, Key order_mask, Key* maxima) {
  constexpr int kNumVectors = kNumLanes / kVectorLanes;
  KeyVector best[kNumVectors];
  std::memcpy(best, maxima, sizeof(best));
  for (int64_t i = 0; i < size; i += kNumLanes) {
    for (int v = 0; v < kNumVectors; ++v) {
      KeyVector keys;
      MakeKeys(block + i + v * kVectorLanes, order_mask, &keys);
      best[v] = keys > best[v] ? keys : best[v];
    }
  }
  std::memcpy(maxima, best, sizeof(best));
}

void Ranks(const Key* keys, int64_t size, int32_t* ranks) {
  // Signed, since that is the comparison every instruction set has; the padding ranks last.
  alignas(sizeof(IntVector)) int32_t ordered[kMaxRanked];
  IntVector lane;
  std::memcpy(&lane, kLaneNumbers, sizeof(lane));
  const int64_t padded = (size + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
  for (int64_t i = 0; i < size; ++i) ordered[i] = static_cast<int32_t>(keys[i] ^ 0x80000000u);
  for (int64_t i = size; i < padded; ++i) ordered[i] = INT32_MIN;
  for (int64_t base = 0; base < padded; base += kVectorLanes) {
    IntVector mine;
    std::memcpy(&mine, ordered + base, sizeof(mine));
    // Two sums, since each waits for its last comparison. A comparison is -1 where it holds. Equal
    // keys come first if they are before this vector: of those before, all but the lower ones do.
    IntVector rank = IntVector{} + static_cast<int32_t>(base);
    IntVector rest = {};
    for (int64_t j = 0; j < base; j += 2) {
      rank += (ordered[j] < mine);
      rest += (ordered[j + 1] < mine);
    }
    for (int32_t j = 0; j < kVectorLanes; ++j) {
      const int32_t other = ordered[base + j];
      rank -= (other > mine) | ((other == mine) & (j < lane));
    }
    for (int64_t j = base + kVectorLanes; j < padded; j += 2) {
      rank -= (ordered[j] > mine);
      rest -= (ordered[j + 1] > mine);
    }
    rank += rest;
    std::memcpy(ranks + base, &rank, sizeof(rank));
  }
}

void MinMax(const Key* keys, int64_t size, Key* smallest, Key* largest) {
  Key low = keys[0];
  Key high = keys[0];
  for (int64_t i = 1; i < size; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *smallest = low;
  *largest = high;
}

constexpr SimdKernels MakeKernels(const char* name) {
  return {name,  Scan<uint32_t>, Scan<uint16_t>, LaneMaxima<uint32_t>, LaneMaxima<uint16_t>,
          Ranks, MinMax};
}

}  // namespace
}  // namespace jax_topk::cpu

#endif  // JAX_TOPK_CPU_SIMD_KERNELS_H_
