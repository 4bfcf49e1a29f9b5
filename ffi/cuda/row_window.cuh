// The window of one row, and how its elements are read: as 16-byte vectors at 16-byte addresses.
//
// The first vector may begin before the window and the last may end after it; what lies outside is
// read, never used. Positions count from the window's start. Only rows at the edge of the operand
// can have a vector that leaves the operand, and those are read element by element.

#ifndef JAX_TOPK_CUDA_ROW_WINDOW_CUH_
#define JAX_TOPK_CUDA_ROW_WINDOW_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"

namespace jax_topk {

struct RowWindow {
  const unsigned char* vectors;  // address of vector 0, a multiple of 16
  const unsigned char* begin;    // the operand's bytes
  const unsigned char* end;
  int32_t length;       // valid elements, 0 .. width
  int32_t skew;         // elements of vector 0 before the window
  int32_t num_vectors;  // that cover the window
  bool leaves_operand;  // some vector reaches outside [begin, end)
};

// The window [start, start + length) of the row at `row`. `start` and `length` are clamped.
template <typename T>
__device__ __forceinline__ RowWindow MakeWindow(const TopKArgs& args, const unsigned char* row,
                                                int32_t start, int32_t length) {
  RowWindow window;
  window.length = length;
  window.begin = static_cast<const unsigned char*>(args.operand);
  window.end = window.begin + args.operand_bytes;
  const unsigned char* first = row + int64_t{start} * T::kBytes;
  const uint32_t misaligned =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first)) % kVectorBytes;
  window.vectors = first - misaligned;
  window.skew = static_cast<int32_t>(misaligned / T::kBytes);
  window.num_vectors = static_cast<int32_t>(
      (static_cast<uint32_t>(window.length) + window.skew + T::kPerVector - 1) / T::kPerVector);
  window.leaves_operand = window.vectors < window.begin ||
                          window.vectors + int64_t{window.num_vectors} * kVectorBytes > window.end;
  return window;
}

// The same for a window that begins with a row, where all rows begin at 16-byte addresses.
template <typename T>
__device__ __forceinline__ RowWindow MakeAlignedWindow(const unsigned char* row, int32_t length) {
  const uint32_t num_vectors = (static_cast<uint32_t>(length) + T::kPerVector - 1) / T::kPerVector;
  return RowWindow{row, row, row, length, 0, static_cast<int32_t>(num_vectors), false};
}

// Vector `index` of a row that leaves the operand; elements outside it read as zero bits.
template <typename T>
__device__ __forceinline__ uint4 LoadVectorAtEdge(const RowWindow window, int32_t index) {
  const unsigned char* address = window.vectors + int64_t{index} * kVectorBytes;
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < T::kPerVector; ++i) {
    const unsigned char* element = address + i * T::kBytes;
    if (element < window.begin || element >= window.end) continue;
    if constexpr (T::kBytes == 4) {
      words[i] = *reinterpret_cast<const uint32_t*>(element);
    } else {
      words[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(element)} << (16 * (i % 2));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A CTA's share of the row: vectors [first, last).
struct Part {
  int32_t first;
  int32_t last;
};

// Copies vectors first, first + stride, ... < last of a row that leaves the operand to shared
// memory, at a distance of `to_stride` vectors.
template <typename T>
__device__ __noinline__ void CopyAtEdge(const RowWindow window, int32_t first, int32_t last,
                                        int32_t stride, unsigned char* to, int32_t to_stride) {
  for (int32_t i = first; i < last; i += stride, to += to_stride * kVectorBytes) {
    *reinterpret_cast<uint4*>(to) = LoadVectorAtEdge<T>(window, i);
  }
}

// Where vector `index` lies in a tile. Eight neighbouring threads that read their own vectors touch
// all banks once if they own an odd number each; if they own 4 or 8, every ninth place is left out.
__device__ __forceinline__ int32_t PlaceInTile(int32_t index, bool is_spaced) {
  return Unlikely(is_spaced) ? index + (index >> 3) : index;
}

// Starts copying the vectors [first, last) into a tile in shared memory. In the tile, each thread
// owns as many consecutive vectors as the caller makes runs of.
template <typename T>
__device__ __forceinline__ void CopyTile(const Cta& cta, const RowWindow& window, int32_t first,
                                         int32_t last, bool is_spaced, unsigned char* tile) {
  static_assert(kThreads % 8 == 0, "turns are as far apart as a turn's places");
  unsigned char* to = tile + PlaceInTile(cta.thread, is_spaced) * kVectorBytes;
  const int32_t stride = PlaceInTile(kThreads, is_spaced);
  if (Unlikely(window.leaves_operand)) {
    CopyAtEdge<T>(window, first + cta.thread, last, kThreads, to, stride);
    return;
  }
  const unsigned char* from = window.vectors + int64_t{first} * kVectorBytes;
#pragma unroll 1
  for (int32_t i = cta.thread; i < last - first; i += kThreads, to += stride * kVectorBytes) {
    CopyAsync16(to, from + int64_t{i} * kVectorBytes);
  }
}

__device__ __forceinline__ uint32_t LowBits(int32_t count) {
  return count <= 0 ? 0 : count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// The elements of vector `index`, of `per_vector`, that lie in the window, as bits.
__device__ __forceinline__ uint32_t ValidAtEdge(int32_t index, int32_t per_vector, int32_t skew,
                                                int32_t length) {
  const int64_t position = int64_t{index} * per_vector - skew;
  const int64_t available = min(length - position, int64_t{per_vector});
  return LowBits(static_cast<int32_t>(max(available, int64_t{0}))) &
         ~LowBits(static_cast<int32_t>(max(-position, int64_t{0})));
}

__device__ __forceinline__ uint32_t ValidInVector(const RowWindow& window, int32_t index,
                                                  int32_t per_vector) {
  if (Unlikely(index == 0 || index == window.num_vectors - 1)) {
    return ValidAtEdge(index, per_vector, window.skew, window.length);
  }
  return LowBits(per_vector);
}

// A thread's run of consecutive elements in a tile; at most 32.
struct Run {
  const uint4* vectors;
  int32_t num_vectors;
  int32_t position;  // of element 0, within the window; negative before its start
  uint32_t valid;    // bit i: element i lies in the window and in the part
};

// The run of the `turn`-th thread in a tile that holds the vectors [first, last), or the first of
// them.
template <typename T>
__device__ __forceinline__ Run MakeRun(int turn, const RowWindow& window, int32_t first,
                                       int32_t last, int32_t per_thread, bool is_spaced,
                                       const unsigned char* tile) {
  const int32_t slot = turn * per_thread;
  Run run;
  run.vectors = reinterpret_cast<const uint4*>(tile) + PlaceInTile(slot, is_spaced);
  run.num_vectors = min(per_thread, last - first - slot);
  // Unsigned: near a width of 2^31 a position behind the last element does not fit an int32.
  const uint32_t position = static_cast<uint32_t>(first + slot) * T::kPerVector - window.skew;
  run.position = static_cast<int32_t>(position);
  run.valid = 0;
  if (run.num_vectors > 0) {
    const int32_t elements = run.num_vectors * T::kPerVector;
    run.valid = 0xffffffffu >> (32 - elements);
    if (Unlikely(run.position < 0)) run.valid &= ~LowBits(-run.position);
    if (Unlikely(run.position > window.length - elements)) {
      run.valid &= LowBits(window.length - run.position);
    }
  }
  return run;
}

// The same of a lane, in a warp's tile of which all elements are valid.
template <typename T>
__device__ __forceinline__ Run MakeWholeRun(int lane, const RowWindow& window, int32_t first,
                                            const unsigned char* tile) {
  const int32_t slot = lane * T::kMaxVectors;
  Run run;
  run.vectors = reinterpret_cast<const uint4*>(tile) + slot;
  run.num_vectors = T::kMaxVectors;
  run.position =
      static_cast<int32_t>(static_cast<uint32_t>(first + slot) * T::kPerVector - window.skew);
  run.valid = LowBits(T::kMaxVectors * T::kPerVector);
  return run;
}

// Element `index` of a run, and its key.
template <typename T>
__device__ __forceinline__ uint32_t BitsInRun(const Run& run, int32_t index) {
  if constexpr (T::kBytes == 4) {
    return reinterpret_cast<const uint32_t*>(run.vectors)[index];
  } else {
    return reinterpret_cast<const uint16_t*>(run.vectors)[index];
  }
}
template <typename T>
__device__ __forceinline__ uint32_t KeyInRun(const Run& run, int32_t index, uint32_t flip) {
  return T::Key(BitsInRun<T>(run, index), flip);
}

// Every value takes the place of the one before it, so that a loop need not be unrolled to name its
// registers.
template <typename V, int kCount>
__device__ __forceinline__ void MoveUp(V (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i + 1 < kCount; ++i) values[i] = values[i + 1];
}
// The same, and the first one takes the place of the last.
template <typename V, int kCount>
__device__ __forceinline__ void MoveAround(V (&values)[kCount]) {
  const V first = values[0];
  MoveUp(values);
  values[kCount - 1] = first;
}

// Loads the vectors index(0) .. index(kCount - 1) of a row at once. A negative index stands for
// none.
template <typename T, int kCount, typename Index>
__device__ __forceinline__ void LoadVectors(const RowWindow& window, Index index,
                                            uint4 (&vectors)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) vectors[v] = make_uint4(0, 0, 0, 0);
  if (Unlikely(window.leaves_operand)) {
#pragma unroll 1
    for (int v = 0; v < kCount; ++v) {
      MoveAround(vectors);
      const int32_t at = index(v);
      if (at >= 0) vectors[kCount - 1] = LoadVectorAtEdge<T>(window, at);
    }
    return;
  }
  const uint4* from = reinterpret_cast<const uint4*>(window.vectors);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int32_t at = index(v);
    if (at >= 0) vectors[v] = LoadReadOnly(from + at);
  }
}

// Calls visit(vector, valid) for these vectors.
template <typename T, int kCount, typename Index, typename Visit>
__device__ __forceinline__ void VisitVectors(const RowWindow& window, Index index, Visit visit) {
  uint4 vectors[kCount];
  LoadVectors<T>(window, index, vectors);
#pragma unroll 1
  for (int v = 0; v < kCount; ++v) {
    const int32_t at = index(v);
    visit(vectors[0], at >= 0 ? ValidInVector(window, at, T::kPerVector) : 0);
    MoveUp(vectors);
  }
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_ROW_WINDOW_CUH_
