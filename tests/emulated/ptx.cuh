// Stands in for ffi/cuda/ptx.cuh: runs the kernel's own code on the CPU, so that its logic is
// tested where there is no GPU.
//
// Every GPU thread is a fiber. A fiber runs until it meets a barrier, a warp-wide operation or a
// wait; the scheduler then resumes another one. There are several schedules (see emulate.cc), among
// them hostile ones: one warp runs as far ahead as it can, copies and remote stores arrive as early
// or as late as they may, so that a missing barrier or wait reads garbage. Shared memory starts as
// random bytes. Vectors are checked to lie in the operand. A cluster of which no thread can go on
// is a deadlock.
//
// What it cannot see: races within the code between two such points, and memory ordering.
// compute-sanitizer on a GPU is for these.

// Included first, with the guard of the file that it replaces.
#ifndef JAX_TOPK_CUDA_PTX_CUH_
#define JAX_TOPK_CUDA_PTX_CUH_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __noinline__ inline

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct alignas(16) int4 {
  int32_t x, y, z, w;
};
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __clz(uint32_t value) { return value == 0 ? 32 : __builtin_clz(value); }

namespace jax_topk {

template <typename V>
V min(V a, V b) {
  return b < a ? b : a;
}
template <typename V>
V max(V a, V b) {
  return a < b ? b : a;
}

// Fibers switch only inside the functions below, so a plain read-modify-write is atomic.
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address += value;
  return old;
}
inline uint32_t atomicMin(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = min(old, value);
  return old;
}
inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = max(old, value);
  return old;
}

inline uint32_t FetchAndAdd(uint32_t* shared, uint32_t value) { return atomicAdd(shared, value); }
inline void RaiseTo(uint32_t* shared, uint32_t value) { atomicMax(shared, value); }

using MBarrier = uint64_t;

int ThreadIndex();
uint32_t RowIndex();
int ClusterRank();
unsigned char* SharedMemory();
void SyncThreads();
void SyncWarp();
void CopyAsync16(void* shared, const void* global);
void CopyAsyncCommit();
void CopyAsyncWaitFor(int pending);
template <int kPending>
void CopyAsyncWait() {
  CopyAsyncWaitFor(kPending);
}
inline void AllowNextKernel() {}
inline void WaitForKernelsBefore(const int32_t*, const int32_t*) {}
inline bool Unlikely(bool condition) { return condition; }
inline int32_t LoadWord(const int32_t* pointer) { return *pointer; }
inline uint4 LoadShared(const uint4* pointer) { return *pointer; }
uint4 LoadReadOnly(const uint4* pointer);
inline uint32_t UpperHalves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xffff0000u);
}
inline uint32_t LowerHalves(uint32_t first, uint32_t second) {
  return (first & 0xffffu) | second << 16;
}
template <typename Operation>
uint32_t OnHalves(uint32_t a, uint32_t b, uint32_t c, Operation operation) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const int value = operation(static_cast<int16_t>(a >> shift), static_cast<int16_t>(b >> shift),
                                static_cast<int16_t>(c >> shift));
    result |= static_cast<uint32_t>(static_cast<uint16_t>(value)) << shift;
  }
  return result;
}
inline uint32_t SignsOfHalves(uint32_t halves) {
  return OnHalves(halves, 0, 0, [](int a, int, int) { return a < 0 ? -1 : 0; });
}
inline uint32_t SignsOfHalves(uint32_t first, uint32_t second) {
  return (first & 0x8000u ? 0xffu : 0) | (first & 0x80000000u ? 0xff00u : 0) |
         (second & 0x8000u ? 0xff0000u : 0) | (second & 0x80000000u ? 0xff000000u : 0);
}
inline uint32_t SubtractWeights(uint32_t sum, uint32_t bytes, uint32_t weights) {
  for (int i = 0; i < 4; ++i) {
    const int byte = static_cast<signed char>(bytes >> (8 * i) & 0xff);
    sum += static_cast<uint32_t>(byte * static_cast<int>(weights >> (8 * i) & 0xff));
  }
  return sum;
}
inline uint32_t AddMaxHalves(uint32_t a, uint32_t b, uint32_t c) {
  return OnHalves(a, b, c, [](int x, int y, int z) { return x + y > z ? x + y : z; });
}
inline uint32_t MinHalves(uint32_t a, uint32_t b) {
  return OnHalves(a, b, 0, [](int x, int y, int) { return x < y ? x : y; });
}
inline void StoreIf(uint32_t condition, uint32_t* shared, uint32_t value) {
  if (condition != 0) *shared = value;
}
struct SharedCursor {
  int32_t* place;
  explicit SharedCursor(int32_t* first) : place(first) {}
  void AppendIf(uint32_t condition, int32_t value) {
    if (condition != 0) *place++ = value;
  }
};
struct PairCursor {
  uint32_t* place;
  uint32_t distance;
  const uint32_t* limit;
  int32_t jump;
  uint32_t num_low = 0;
  PairCursor(uint32_t* first, uint32_t distance_in_words, const uint32_t* end, uint32_t words_ahead)
      : place(first),
        distance(distance_in_words),
        limit(end),
        jump(static_cast<int32_t>(words_ahead)) {}
  void AppendIf(uint32_t condition, uint32_t key, uint32_t position, uint32_t bound) {
    if (condition == 0) return;
    place[0] = key;
    place[distance] = position;
    if (key <= bound) ++num_low;
    if (++place == limit) place += jump;
  }
};
template <int kBytes>
uint32_t LoadSharedElement(const void* pointer) {
  uint32_t bits = 0;
  std::memcpy(&bits, pointer, kBytes);
  return bits;
}
template <typename V>
void ComputeHere(V*&) {}
template <typename V>
V* KnownShared(V* pointer) {
  return pointer;
}
inline void SetIfAtLeast(uint32_t* bits, uint32_t bit, int32_t word, int32_t bound) {
  if (word >= bound) *bits |= bit;
}
inline void SetIfEqual(uint32_t* bits, uint32_t bit, uint32_t word, uint32_t other) {
  if (word == other) *bits |= bit;
}
inline uint32_t AppendCarry(uint32_t bits, uint32_t a, uint32_t b) {
  return 2 * bits + (a + b < a);
}
template <typename Word>
Word UseHere(Word word) {
  return word;
}
inline bool AsItIs(bool condition) { return condition; }
inline uint32_t CountCarry(uint32_t count, uint32_t a, uint32_t b) { return count + (a + b < a); }
inline float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t MinOfSum(uint32_t a, uint32_t b, uint32_t c) { return a + b < c ? a + b : c; }
inline uint32_t UpperProduct(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t AddSixteenfold(uint32_t sum, uint32_t counts) {
  for (; counts != 0; counts >>= 4) sum += 16 * (counts & 0xfu);
  return sum;
}
inline uint32_t ShiftLeftWrapped(uint32_t word, uint32_t amount) { return word << amount % 32; }
inline uint32_t ShiftRightWrapped(uint32_t word, uint32_t amount) { return word >> amount % 32; }
inline uint32_t Rotate(uint32_t word, uint32_t amount) {
  return word << amount % 32 | word >> (0 - amount) % 32;
}
inline uint32_t RotateBack(uint32_t word, uint32_t amount) { return Rotate(word, 0 - amount); }
inline float FastDivide(float a, float b) { return a / b; }
inline float FastSquareRoot(float a) { return std::sqrt(a); }
void BarrierInit(MBarrier* barrier);
inline void BarrierInitFence() {}
void BarrierExpect(MBarrier* barrier, uint32_t bytes);
void BarrierWait(MBarrier* barrier, uint32_t parity);
void ClusterArrive();
void ClusterWait();
uint32_t RemoteAddress(const void* local, int rank);
void SendBytes(uint32_t remote, const void* bytes, uint32_t count, uint32_t remote_barrier);
inline void SendAsync(uint32_t remote, uint2 value, uint32_t remote_barrier) {
  SendBytes(remote, &value, sizeof(value), remote_barrier);
}
inline void SendAsync(uint32_t remote, uint4 value, uint32_t remote_barrier) {
  SendBytes(remote, &value, sizeof(value), remote_barrier);
}
// The values that all lanes of the calling thread's warp deposited; all 32 lanes must call.
const uint32_t* WarpExchange(uint32_t value);
inline uint32_t WarpBroadcast(uint32_t value, int lane) { return WarpExchange(value)[lane & 31]; }
inline uint32_t WarpShiftUp(uint32_t value, int delta) {
  const uint32_t* lanes = WarpExchange(value);
  const int lane = ThreadIndex() & 31;
  return lanes[lane >= delta ? lane - delta : lane];
}
inline uint32_t WarpAddShifted(int lane, uint32_t value, int delta) {
  const uint32_t other = WarpShiftUp(value, delta);
  return lane >= delta ? value + other : value;
}
inline uint32_t WarpBallot(bool predicate) {
  const uint32_t* lanes = WarpExchange(predicate);
  uint32_t ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= lanes[i] << i;
  return ballot;
}
inline uint32_t WarpSum(uint32_t value) {
  const uint32_t* lanes = WarpExchange(value);
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += lanes[i];
  return sum;
}
inline uint32_t WarpMin(uint32_t value) {
  const uint32_t* lanes = WarpExchange(value);
  uint32_t lowest = lanes[0];
  for (int i = 1; i < 32; ++i) lowest = min(lowest, lanes[i]);
  return lowest;
}
inline uint32_t WarpMax(uint32_t value) {
  const uint32_t* lanes = WarpExchange(value);
  uint32_t highest = lanes[0];
  for (int i = 1; i < 32; ++i) highest = max(highest, lanes[i]);
  return highest;
}

inline uint32_t WarpOr(uint32_t value) {
  const uint32_t* lanes = WarpExchange(value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= lanes[i];
  return bits;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_PTX_CUH_
