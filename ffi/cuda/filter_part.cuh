// Step 2: one pass over a CTA's part of the row that separates it by the bracket.
//
// Elements above the bracket are certain winners (if the bracket is right), those inside it are
// open. Their counts are exact whatever the bracket. Here: a part that one tile holds; it stays in
// shared memory and only its open keys are collected. Longer parts: stream_part.cuh.
//
// Order without sorting: thread t owns consecutive elements of the tile, so that once the pivot is
// known a block scan gives every selected element its place, see write_row.cuh.

#ifndef JAX_TOPK_CUDA_FILTER_PART_CUH_
#define JAX_TOPK_CUDA_FILTER_PART_CUH_

#include <cstdint>

#include "block.cuh"
#include "ordered_key.cuh"
#include "row_window.cuh"

namespace jax_topk {

// A run's elements, as bits.
struct RunMasks {
  uint32_t certain;  // above the bracket
  uint32_t open;     // inside it
};

// Where elements stand against a bracket: bits are shifted in, so that the last element comes
// first.
template <typename T>
struct MaskBuilder {
  KeyTest<T> lowest, highest;
  uint32_t kept, certain;

  __device__ __forceinline__ MaskBuilder(const Bracket& bracket, uint32_t flip)
      : lowest(bracket.lowest, flip), highest(bracket.highest, flip), kept(0), certain(0) {}

  // Shifts in the elements of the vector before those so far. `kIsOneMask`: the keys of both tests
  // lie in the same half of the order, which saves an instruction per element.
  template <bool kIsOneMask>
  __device__ __forceinline__ void Prepend(const uint4& vector) {
#pragma unroll
    for (int i = T::kPerVector - 1; i >= 0; --i) {
      const uint32_t bits = T::Element(vector, i);
      const uint32_t word = bits ^ lowest.mask;
      // Sums that carry: word >= lowest.key (but for 0, see Masks), and word > highest.key.
      kept = AppendCarry(kept, word, 0u - lowest.key);
      certain = AppendCarry(certain, kIsOneMask ? word : bits ^ highest.mask, ~highest.key);
    }
  }
  __device__ __forceinline__ bool HasOneMask() const { return lowest.mask == highest.mask; }
  // Of the elements that `valid` names.
  __device__ __forceinline__ RunMasks Masks(uint32_t valid) const {
    return RunMasks{certain & valid, (lowest.key == 0 ? valid : kept & valid) & ~certain};
  }
};

// The most vectors of a thread whose elements have one bit each.
template <typename T>
constexpr int kMaxRunVectors = 32 / T::kPerVector;

// All loads come before what depends on them.
template <typename T, int kVectors>
__device__ __forceinline__ void PrependVectors(const uint4* from, MaskBuilder<T>* builder) {
  uint4 vectors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) vectors[v] = LoadShared(from + v);
#pragma unroll
  for (int v = kVectors - 1; v >= 0; --v) builder->template Prepend<true>(vectors[v]);
}

template <typename T, bool kIsOneMask>
__device__ __forceinline__ void PrependRun(const Run& run, MaskBuilder<T>* builder) {
#pragma unroll 1
  for (int32_t v = run.num_vectors - 1; v >= 0; --v) {
    builder->template Prepend<kIsOneMask>(LoadShared(run.vectors + v));
  }
}

// Of a run of at most `per_thread` vectors. A few more may be read.
template <typename T>
__device__ __forceinline__ RunMasks MakeMasks(const Run& run, int32_t per_thread,
                                              const Bracket& bracket, uint32_t flip) {
  MaskBuilder<T> builder(bracket, flip);
  if (!Unlikely(!builder.HasOneMask())) {
    if (per_thread <= 2) {
      PrependRun<T, true>(run, &builder);
    } else if (per_thread <= 3) {
      PrependVectors<T, 3>(run.vectors, &builder);
    } else if (per_thread <= 5 && kMaxRunVectors<T> > 5) {
      PrependVectors<T, 5>(run.vectors, &builder);
    } else if (per_thread <= 7 && kMaxRunVectors<T> > 7) {
      PrependVectors<T, 7>(run.vectors, &builder);
    } else {
      PrependVectors<T, kMaxRunVectors<T>>(run.vectors, &builder);
    }
  } else {
    PrependRun<T, false>(run, &builder);
  }
  return builder.Masks(run.valid);
}

// Compares elements with a key as signed words: with the sign bits inverted, words compare so, and
// those of positive floats need no other change where the largest are wanted.
template <typename T>
struct SignedTest {
  uint32_t mask;
  int32_t bound;

  __device__ __forceinline__ SignedTest(uint32_t key, uint32_t flip)
      : mask((KeyTest<T>(key, flip).mask ^ T::kSign) << kShift),
        bound(static_cast<int32_t>((key ^ T::kSign) << kShift)) {}

  // The elements of a run that are at least the key, as bits. All vectors that a run can have are
  // read. `kHasMask` may be false where the mask is zero, which saves an instruction per element.
  template <bool kHasMask>
  __device__ __forceinline__ uint32_t AtLeast(const Run& run) const {
    uint32_t even = 0, odd = 0;  // two chains of instructions that depend on each other
#pragma unroll
    for (int v = 0; v < T::kMaxVectors; ++v) {
      const uint4 vector = LoadShared(run.vectors + v);
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) {
        const uint32_t word = T::UpperElement(vector, i);
        SetIfAtLeast(i % 2 == 0 ? &even : &odd, 1u << (v * T::kPerVector + i),
                     static_cast<int32_t>(kHasMask ? word ^ mask : word), bound);
      }
    }
    return (even | odd) & run.valid;
  }
  // The same of a run of at most `per_thread` vectors. Rolled: few runs are not whole.
  template <bool kHasMask>
  __device__ __forceinline__ uint32_t AtLeast(const Run& run, int32_t per_thread) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (int32_t v = per_thread - 1; v >= 0; --v) {
      const uint4 vector = LoadShared(run.vectors + v);
      bits <<= T::kPerVector;
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) {
        const uint32_t word = T::UpperElement(vector, i);
        SetIfAtLeast(&bits, 1u << i, static_cast<int32_t>(kHasMask ? word ^ mask : word), bound);
      }
    }
    return bits & run.valid;
  }

 private:
  static constexpr int kShift = 32 - T::kBits;
};

// The elements of a run that have these bits, as bits. All vectors that a run can have are read:
// at once, or by a loop where few rows need it.
template <typename T, bool kAtOnce>
__device__ __forceinline__ uint32_t EqualTo(const Run& run, uint32_t bits) {
  uint32_t even = 0, odd = 0;  // as in SignedTest
#pragma unroll(kAtOnce ? T::kMaxVectors : 1)
  for (int v = 0; v < T::kMaxVectors; ++v) {
    const uint4 vector = LoadShared(run.vectors + v);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      SetIfEqual(i % 2 == 0 ? &even : &odd, 1u << i << (v * T::kPerVector), T::Element(vector, i),
                 bits);
    }
  }
  return (even | odd) & run.valid;
}

// Counts the elements of a tile that holds its CTA's whole part. One barrier.
__device__ __forceinline__ PartCounts CountMasks(Cta& cta, const RunMasks& masks) {
  // Both counts in one sum: a tile holds fewer than 2^16 elements.
  const uint32_t total = BlockSum(cta, __popc(masks.certain) | __popc(masks.open) << 16);
  return PartCounts{total & 0xffffu, total >> 16};
}

// Whether a CTA has so many open elements in its tile that a thread takes its own by vectors, not
// one by one. Of sorted values one CTA has all of the row's, and few threads have them.
__device__ __forceinline__ bool IsDense(uint32_t num_open) { return num_open > 2 * kThreads; }

// The lowest two bits of a word that is not zero, so that what they stand for is waited for
// together.
struct BitPair {
  uint32_t bits[2];  // the second may be zero, and stands for element 0 then
  __device__ __forceinline__ int First() const { return __ffs(bits[0]) - 1; }
  __device__ __forceinline__ int Second() const { return max(__ffs(bits[1]), 1) - 1; }
};
__device__ __forceinline__ BitPair TakeBits(uint32_t* left) {
  BitPair pair;
#pragma unroll
  for (uint32_t& bit : pair.bits) {
    bit = *left & (0 - *left);
    *left ^= bit;
  }
  return pair;
}

// Writes the thread's open keys to cta.own, which holds those of the CTA in no order, and pads
// them. The ties of a bracket that is a single key are not needed. In: header->num_own is zero,
// ordered by a barrier. Ends without one.
template <typename T>
__device__ __forceinline__ void CollectOpenKeys(const Cta& cta, const Run& run, uint32_t open,
                                                uint32_t num_open, uint32_t flip) {
  PadOpenKeys(cta, num_open, PadToVector(num_open));
  if (open == 0) return;
  uint32_t* place = reinterpret_cast<uint32_t*>(cta.own) +
                    FetchAndAdd(&cta.header->num_own, static_cast<uint32_t>(__popc(open)));
  if (Unlikely(IsDense(num_open))) {
    SharedCursor cursor(reinterpret_cast<int32_t*>(place));
#pragma unroll 1
    for (const uint4* from = run.vectors; open != 0; ++from, open >>= T::kPerVector) {
      const uint4 vector = LoadShared(from);
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) {
        cursor.AppendIf(open & 1u << i, static_cast<int32_t>(T::Key(T::Element(vector, i), flip)));
      }
    }
  }
#pragma unroll 1
  while (open != 0) {
    const BitPair pair = TakeBits(&open);
    const uint32_t first = KeyInRun<T>(run, pair.First(), flip);
    const uint32_t second = KeyInRun<T>(run, pair.Second(), flip);
    place[0] = first;
    if (pair.bits[1] != 0) place[1] = second;
    place += 2;
  }
}

// `bits` without its `count` highest set bits.
__device__ __forceinline__ uint32_t DropLastBits(uint32_t bits, uint32_t count) {
#pragma unroll 1
  for (; bits != 0 && count > 0; --count) bits &= ~(0x80000000u >> __clz(bits));
  return bits;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_FILTER_PART_CUH_
