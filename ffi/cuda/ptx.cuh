// The machine instructions that CUDA C++ has no name for, one function each, and nothing else.
// Cluster instructions need sm_90; below it they trap, and the planner never asks for a cluster.
// Tests replace this file by an emulation that runs the kernel on the CPU.

#ifndef JAX_TOPK_CUDA_PTX_CUH_
#define JAX_TOPK_CUDA_PTX_CUH_

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define JAX_TOPK_HAS_CLUSTERS 1
#else
#define JAX_TOPK_HAS_CLUSTERS 0
#endif

namespace jax_topk {

using MBarrier = uint64_t;

__device__ __forceinline__ int ThreadIndex() { return static_cast<int>(threadIdx.x); }
// The grid is [rows, CTAs per row], with a cluster along the second dimension.
__device__ __forceinline__ uint32_t RowIndex() { return blockIdx.x; }
// Of the CTA in its cluster; a launch without clusters has clusters of one.
__device__ __forceinline__ int ClusterRank() {
  uint32_t rank = 0;
#if JAX_TOPK_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// The CTA's dynamic shared memory. Its address is hidden from the compiler, which would compute it
// anew at every use, from a special register that answers slowly.
__device__ __forceinline__ unsigned char* SharedMemory() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
  asm volatile("" : "+r"(address));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}
// A pointer of which the compiler knows that it leads to shared memory. Of an argument of a
// function that is not inlined it does not, and every access would have to find out.
template <typename V>
__device__ __forceinline__ V* KnownShared(V* pointer) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  asm volatile("" : "+r"(address));
  return static_cast<V*>(__cvta_shared_to_generic(address));
}
__device__ __forceinline__ void SyncThreads() { __syncthreads(); }
__device__ __forceinline__ void SyncWarp() { __syncwarp(); }

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// For conditions that ordinary rows do not meet: moves their code out of the way. ncu, which starts
// with cold caches, shows waits for instructions behind jumps over unneeded code.
__device__ __forceinline__ bool Unlikely(bool condition) { return __builtin_expect(condition, 0); }

// A word that is the same for all threads, kept in an ordinary register: the compiler would wait
// for it at once to move it to a uniform one, and clamp it by a longer chain of uniform
// instructions.
__device__ __forceinline__ int32_t LoadWord(const int32_t* pointer) {
  int32_t value;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer));
  return value;
}

// 16 bytes of read-only global memory through L1. Volatile, so that a load stays where it is
// written: early, before work that hides its latency.
__device__ __forceinline__ uint4 LoadReadOnly(const uint4* pointer) {
  uint4 value;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer));
  return value;
}

// 16 bytes of shared memory by one instruction; the compiler tends to split them, and then lanes
// that read their own vectors meet in the same banks.
__device__ __forceinline__ uint4 LoadShared(const uint4* pointer) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(pointer)))
               : "memory");
  return value;
}

// An element of 4 or 2 bytes of shared memory. The compiler may have lost what kind of memory a
// pointer leads to, and would find out at every load.
template <int kBytes>
__device__ __forceinline__ uint32_t LoadSharedElement(const void* pointer) {
  static_assert(kBytes == 2 || kBytes == 4, "two sizes of elements");
  uint32_t bits;
  if constexpr (kBytes == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(SharedAddress(pointer)) : "memory");
  } else {
    uint16_t half;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(SharedAddress(pointer)) : "memory");
    bits = half;
  }
  return bits;
}

// Atomic operations on shared memory, one instruction each. Of what few lanes do the compiler would
// first make a sum over the warp, which takes longer.
__device__ __forceinline__ uint32_t FetchAndAdd(uint32_t* shared, uint32_t value) {
  uint32_t old;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "r"(SharedAddress(shared)), "r"(value)
               : "memory");
  return old;
}
__device__ __forceinline__ void RaiseTo(uint32_t* shared, uint32_t value) {
  asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(SharedAddress(shared)), "r"(value) : "memory");
}

// Writes a word to shared memory if `condition` is not zero. Predicated: no branch.
__device__ __forceinline__ void StoreIf(uint32_t condition, uint32_t* shared, uint32_t value) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p st.shared.u32 [%0], %1;\n\t}" ::"r"(
          SharedAddress(shared)),
      "r"(value), "r"(condition)
      : "memory");
}

// Writes words to shared memory one after the other.
struct SharedCursor {
  uint32_t address;
  __device__ __forceinline__ explicit SharedCursor(int32_t* first)
      : address(SharedAddress(first)) {}
  // If `condition` is not zero. Predicated: no branch.
  __device__ __forceinline__ void AppendIf(uint32_t condition, int32_t value) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p st.shared.s32 [%0], %1;\n\t"
        "@p add.u32 %0, %0, 4;\n\t}"
        : "+r"(address)
        : "r"(value), "r"(condition)
        : "memory");
  }
};

// Writes keys to shared memory one after the other, and positions at a distance of words behind
// them; where it reaches `end`, it goes on elsewhere.
struct PairCursor {
  uint32_t address, distance;
  uint32_t limit, jump;
  uint32_t num_low;  // keys so far that are at most their bound

  __device__ __forceinline__ PairCursor(uint32_t* first, uint32_t distance_in_words,
                                        const uint32_t* end, uint32_t words_ahead)
      : address(SharedAddress(first)),
        distance(4 * distance_in_words),
        limit(SharedAddress(end)),
        jump(4 * words_ahead),
        num_low(0) {}
  // If `condition` is not zero. Predicated: no branch.
  __device__ __forceinline__ void AppendIf(uint32_t condition, uint32_t key, uint32_t position,
                                           uint32_t bound) {
    asm volatile(
        "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %2, 0;\n\t@p st.shared.u32 [%0], %3;\n\t"
        "@p st.shared.u32 [%4], %5;\n\tsetp.le.and.u32 q, %3, %6, p;\n\t"
        "@q add.u32 %1, %1, 1;\n\t@p add.u32 %0, %0, 4;\n\t"
        "setp.eq.and.u32 q, %0, %7, p;\n\t@q add.u32 %0, %0, %8;\n\t}"
        : "+r"(address), "+r"(num_low)
        : "r"(condition), "r"(key), "r"(address + distance), "r"(position), "r"(bound), "r"(limit),
          "r"(jump)
        : "memory");
  }
};

// Keeps the compiler from computing a pointer later than here.
template <typename V>
__device__ __forceinline__ void ComputeHere(V*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// A word, of which nothing that depends on it is computed earlier than here. What depends on
// indices the compiler would compute at the kernel's start and keep, for want of registers in local
// memory.
template <typename Word>
__device__ __forceinline__ Word UseHere(Word word) {
  asm volatile("" : "+r"(word));
  return word;
}

// A condition that the compiler takes as it is, and the code behind it in the order of the source.
// Otherwise it combines it with others, and code lies where it may.
__device__ __forceinline__ bool AsItIs(bool condition) {
  return UseHere(static_cast<uint32_t>(condition)) != 0;
}

// count + (a + b does not fit a word): two instructions.
__device__ __forceinline__ uint32_t CountCarry(uint32_t count, uint32_t a, uint32_t b) {
  asm("{\n\t.reg .u32 sum;\n\tadd.cc.u32 sum, %1, %2;\n\taddc.u32 %0, %0, 0;\n\t}"
      : "+r"(count)
      : "r"(a), "r"(b));
  return count;
}

// 2 * bits + (a + b does not fit a word): two instructions, the carry of a sum shifted in.
__device__ __forceinline__ uint32_t AppendCarry(uint32_t bits, uint32_t a, uint32_t b) {
  asm("{\n\t.reg .u32 sum;\n\tadd.cc.u32 sum, %1, %2;\n\taddc.u32 %0, %0, %0;\n\t}"
      : "+r"(bits)
      : "r"(a), "r"(b));
  return bits;
}

// bits |= bit if word >= bound: two instructions.
__device__ __forceinline__ void SetIfAtLeast(uint32_t* bits, uint32_t bit, int32_t word,
                                             int32_t bound) {
  asm("{\n\t.reg .pred p;\n\tsetp.ge.s32 p, %1, %2;\n\t@p or.b32 %0, %0, %3;\n\t}"
      : "+r"(*bits)
      : "r"(word), "r"(bound), "r"(bit));
}

// bits |= bit if word == other: two instructions.
__device__ __forceinline__ void SetIfEqual(uint32_t* bits, uint32_t bit, uint32_t word,
                                           uint32_t other) {
  asm("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %1, %2;\n\t@p or.b32 %0, %0, %3;\n\t}"
      : "+r"(*bits)
      : "r"(word), "r"(other), "r"(bit));
}

__device__ __forceinline__ float FloatOfBits(uint32_t bits) { return __uint_as_float(bits); }

// The upper word of a product.
__device__ __forceinline__ uint32_t UpperProduct(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// min(a + b, c): one instruction on sm_90.
__device__ __forceinline__ uint32_t MinOfSum(uint32_t a, uint32_t b, uint32_t c) {
  return __viaddmin_u32(a, b, c);
}

// sum + 16 times the sum of the eight counts of four bits in a word: three instructions. Sixteen
// times a byte is too much by 15 times its upper count's 16.
__device__ __forceinline__ uint32_t AddSixteenfold(uint32_t sum, uint32_t counts) {
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(counts), "r"(0x10101010u));
  asm("dp4a.u32.s32 %0, %1, %2, %0;"
      : "+r"(sum)
      : "r"(counts & 0xf0f0f0f0u), "r"(0xf1f1f1f1u));  // -15 each
  return sum;
}

// Shifts by amount % 32; a rotation is to the left.
__device__ __forceinline__ uint32_t ShiftLeftWrapped(uint32_t word, uint32_t amount) {
  return __funnelshift_l(0, word, amount);
}
__device__ __forceinline__ uint32_t ShiftRightWrapped(uint32_t word, uint32_t amount) {
  return __funnelshift_r(word, 0, amount);
}
__device__ __forceinline__ uint32_t Rotate(uint32_t word, uint32_t amount) {
  return __funnelshift_l(word, word, amount);
}
__device__ __forceinline__ uint32_t RotateBack(uint32_t word, uint32_t amount) {
  return __funnelshift_r(word, word, amount);
}

// Approximate, a few units in the last place: for guesses that are verified.
__device__ __forceinline__ float FastDivide(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
}
__device__ __forceinline__ float FastSquareRoot(float a) { return a * rsqrtf(a); }

// --- Pairs of 16-bit values in one register (single instructions on sm_90) -----------------------

// The upper halves of two words, the first one's in the lower half.
__device__ __forceinline__ uint32_t UpperHalves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}
// The lower halves of two words, the first one's in the lower half.
__device__ __forceinline__ uint32_t LowerHalves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
// 0xffff in each half whose sign bit is set, else 0.
__device__ __forceinline__ uint32_t SignsOfHalves(uint32_t halves) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(halves));
  return signs;
}
// 0xff in each byte that belongs to a negative half of two words, else 0.
__device__ __forceinline__ uint32_t SignsOfHalves(uint32_t first, uint32_t second) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(signs) : "r"(first), "r"(second));
  return signs;
}
// sum - the weights, a byte each, of the bytes that are 0xff.
__device__ __forceinline__ uint32_t SubtractWeights(uint32_t sum, uint32_t bytes,
                                                    uint32_t weights) {
  asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(weights));
  return sum;
}
// max(a + b, c) and min(a, b) of signed halves.
__device__ __forceinline__ uint32_t AddMaxHalves(uint32_t a, uint32_t b, uint32_t c) {
  return __viaddmax_s16x2(a, b, c);
}
__device__ __forceinline__ uint32_t MinHalves(uint32_t a, uint32_t b) {
  return __viaddmin_s16x2(a, 0, b);
}

// --- cp.async: global to shared memory without registers (sm_80) ---------------------------------

__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Barriers in shared memory that count arrivals and bytes (sm_90) -----------------------------

__device__ __forceinline__ void BarrierInit(MBarrier* barrier) {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
#else
  __trap();
#endif
}
// Makes the initialisations above visible to the cluster; precedes ClusterArrive.
__device__ __forceinline__ void BarrierInitFence() {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// The single arrival of a phase: the phase ends once `bytes` more have been written.
__device__ __forceinline__ void BarrierExpect(MBarrier* barrier, uint32_t bytes) {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Waits for the end of the phase of this parity, and for what its writers wrote.
__device__ __forceinline__ void BarrierWait(MBarrier* barrier, uint32_t parity) {
#if JAX_TOPK_HAS_CLUSTERS
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// --- Launches that overlap (sm_90) ---------------------------------------------------------------

// Lets the stream's next kernel start its CTAs where there is room, if it was launched to do so.
__device__ __forceinline__ void AllowNextKernel() {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernels before this one in the stream are complete, and sees what they wrote.
// Precedes every access to global memory. The two addresses are computed before: the assembler
// would move that behind the wait, if the wait did not depend on them. It always takes place, since
// addresses of words are multiples of four.
__device__ __forceinline__ void WaitForKernelsBefore(const int32_t* first, const int32_t* second) {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0xffffffff;\n\t@p griddepcontrol.wait;\n\t}" ::"r"(
          static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first) |
                                reinterpret_cast<uintptr_t>(second)))
      : "memory");
#endif
}

// --- The cluster (sm_90) -------------------------------------------------------------------------

// Relaxed: orders nothing but the barrier initialisations that BarrierInitFence released.
__device__ __forceinline__ void ClusterArrive() {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void ClusterWait() {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address, in the cluster's shared window, of a local shared object in CTA `rank`.
__device__ __forceinline__ uint32_t RemoteAddress(const void* local, int rank) {
  uint32_t remote = 0;
#if JAX_TOPK_HAS_CLUSTERS
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(SharedAddress(local)), "r"(rank));
#endif
  return remote;
}

// Remote stores that announce their bytes to a barrier of the receiving CTA. No fence is needed:
// the receiver's BarrierWait orders them before its reads.
__device__ __forceinline__ void SendAsync(uint32_t remote, uint2 value, uint32_t remote_barrier) {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
          "r"(remote),
      "r"(value.x), "r"(value.y), "r"(remote_barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void SendAsync(uint32_t remote, uint4 value, uint32_t remote_barrier) {
#if JAX_TOPK_HAS_CLUSTERS
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(remote),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(remote_barrier)
      : "memory");
#endif
}

// --- Warp-wide operations; all 32 lanes take part
// -------------------------------------------------

__device__ __forceinline__ uint32_t WarpShiftUp(uint32_t value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
// Adds the value of lane - delta where there is such a lane: a shuffle says whether by a predicate.
__device__ __forceinline__ uint32_t WarpAddShifted(int, uint32_t value, int delta) {
  asm volatile(
      "{\n\t.reg .u32 other;\n\t.reg .pred exists;\n\t"
      "shfl.sync.up.b32 other|exists, %0, %1, 0, 0xffffffff;\n\t"
      "@exists add.u32 %0, %0, other;\n\t}"
      : "+r"(value)
      : "r"(delta));
  return value;
}
__device__ __forceinline__ uint32_t WarpBroadcast(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ uint32_t WarpBallot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
__device__ __forceinline__ uint32_t WarpSum(uint32_t value) {
  return __reduce_add_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t WarpMin(uint32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t WarpMax(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t WarpOr(uint32_t value) {
  return __reduce_or_sync(0xffffffffu, value);
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_PTX_CUH_
