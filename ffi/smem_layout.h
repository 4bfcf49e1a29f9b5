// Where everything lies in one CTA's shared memory: byte offsets used by the planner (sizes) and
// by the kernel (addresses), so that both always agree.
//
//   header | bins | area A | area B
//
// A row whose share per CTA fits one tile keeps that tile in A until its output is written, and
// the candidates lie in B. A longer share is streamed through rings of tiles in A, one per warp,
// into lists of (key, position) in B; once the rings are dead, the candidates lie in A. They are
//
//   gathered candidate keys of the whole row | own candidate keys, later the staged output |
//   numbers of candidates by the bins that they are spread over
//
// The reuse is safe across the CTAs of a cluster: a CTA sends candidates only after every peer has
// announced its counts, and a peer announces them after its last read of its ring.

#ifndef JAX_TOPK_SMEM_LAYOUT_H_
#define JAX_TOPK_SMEM_LAYOUT_H_

#include <cstdint>

#include "problem.h"

namespace jax_topk {

// Threads of one CTA. What all threads execute alike costs an SM half a cycle per warp and integer
// instruction; fewer threads no longer hide the latencies. 384 measured best between 256 and 512.
inline constexpr int kThreads = 384;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kVectorBytes = 16;  // one cp.async, one LDS.128

// Bins of a histogram, eight for each of the threads that search it.
inline constexpr int kBins = 2048;
inline constexpr int kBinsPerThread = 8;
inline constexpr int kBinThreads = kBins / kBinsPerThread;

// The largest k that the kernel serves. Bounded by the shared memory of the list.
inline constexpr int kMaxK = 4096;

// Vectors that one thread owns in a streamed tile. Odd, so that eight neighbouring threads that
// read their own vectors touch all 32 banks once; at most 32 elements, one bit each.
inline constexpr int kMaxVectors = 7;
inline constexpr int64_t kMaxTileBytes = int64_t{kThreads} * kMaxVectors * kVectorBytes;

// A row of one CTA may have a larger tile, over the room of areas A and B.
inline constexpr int kMaxLargeTurns = 11;  // vectors per thread
inline constexpr int64_t kLargeTileBytes = int64_t{kThreads} * kMaxLargeTurns * kVectorBytes;

// Room for the segments of a histogram that a CTA sums for its cluster: kBins / 4 vectors, rounded
// up by at most one vector per CTA. Area B also carries these segments and their totals.
inline constexpr int kBinVectors = kBins / 4;
inline constexpr int kClusterSegmentVectors = kBinVectors + kMaxClusterSize;
inline constexpr int64_t kSumBytes = (kClusterSegmentVectors + kBinVectors) * int64_t{kVectorBytes};

// The list of a streamed part lies in chunks, which a warp takes two at a time or more: as many as
// each warp may leave one unfilled and one empty.
inline constexpr int kChunkEntries = 32;
inline constexpr int kLeastChunks = 2;
constexpr int64_t NumChunks(int64_t list_capacity) {
  return (list_capacity + kChunkEntries - 1) / kChunkEntries + kLeastChunks * kWarps;
}
// The fewest entries that are dealt to a thread together, see Entries. An entry is a key and a
// position; a chunk has a label, and each of its groups a place in their order, see ListPool.
inline constexpr int kFewestEntries = 4;
constexpr int64_t ListBytes(int64_t list_capacity) {
  return NumChunks(list_capacity) * (kChunkEntries * 8 + 4 + kChunkEntries / kFewestEntries * 2);
}

inline constexpr int64_t kHeaderBytes = 2048;
// One spare bin, in a vector of its own, takes what does not count.
inline constexpr int64_t kBinsBytes = int64_t{kBins} * 4 + kVectorBytes;

constexpr int64_t AlignUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

constexpr int64_t NextPowerOfTwo(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// The rings of tiles while a row is streamed.
constexpr int64_t TileRingBytes(int num_stages) { return num_stages * kMaxTileBytes; }

// Open keys that are ranked by comparing each with all: by four threads each, or, of fewer still,
// by the thread that has the element, which needs their positions too.
inline constexpr int kThreadsPerCandidate = 4;
inline constexpr int kMaxDirect = kThreads / kThreadsPerCandidate;
inline constexpr int kMaxByOwner = 8;
inline constexpr int64_t kRankedBytes = kMaxDirect * 4;
static_assert(kMaxByOwner * 8 <= kRankedBytes, "keys and positions");

// Bins over which candidates are spread, and how many each keeps: the first of all bins lie
// together, then the second. With the stride as it is, those of one bin lie in different banks.
inline constexpr int kPivotBins = 256;
inline constexpr uint32_t kKeptPerBin = 32;  // one for each lane of a warp
inline constexpr uint32_t kKeptStride = kPivotBins + 2;
inline constexpr int64_t kKeptBytes = kKeptPerBin * kKeptStride * 2;

// Pairs of a sorted row that one thread has. A row of k = 2048 does not wait for the code of more.
inline constexpr int kFewPairTurns = 6;
inline constexpr int kMostPairTurns = (kMaxK + kThreads - 1) / kThreads;
inline constexpr int kMostFewPairs = kFewPairTurns * kThreads;

// What sorting `count` pairs takes: room for them in bins, a place for each word of the histogram,
// and a list of bins that hold several.
constexpr int64_t SortBytes(int64_t count) {
  return AlignUp(count * 8, 16) + int64_t{kBins} * 2 + kMaxK / 2 * 2;
}

// Where the bins and area A begin, in every layout.
inline constexpr int64_t kBinsOffset = kHeaderBytes;
inline constexpr int64_t kAreaAOffset = AlignUp(kBinsOffset + kBinsBytes, 128);

struct SmemLayout {
  int32_t b;            // where area B begins
  int32_t own;          // from the start of the candidates: uint32[list_capacity], or the output
  int32_t kept;         // from there: uint16[kKeptPerBin][kKeptStride]
  int32_t num_chunks;   // of the list
  bool has_large_tile;  // there is room for one, and for the output behind it
  int64_t total_bytes;
};

// `list_capacity`: entries, a multiple of 4.
constexpr SmemLayout MakeSmemLayout(int cluster_size, int num_stages, int64_t list_capacity,
                                    int64_t k) {
  const auto larger = [](int64_t x, int64_t y) { return x > y ? x : y; };
  // Every CTA's segment of the gathered keys is padded to whole vectors; a CTA alone gathers
  // nothing. The output is k positions and k keys; sorting needs a power of two of pairs.
  const int64_t gathered_bytes = cluster_size == 1 ? 0 : (list_capacity + 4 * cluster_size) * 4;
  const int64_t own_bytes = larger(larger(list_capacity * 4, NextPowerOfTwo(k) * 8), kRankedBytes);
  const int64_t own_offset = cluster_size == 1 ? 0 : larger(gathered_bytes, kSumBytes);
  // Behind the output if others of the cluster may send theirs meanwhile.
  const int64_t kept = cluster_size == 1 ? list_capacity * 4 : own_bytes;
  const int64_t candidates_bytes = own_offset + larger(own_bytes, kept + kKeptBytes);
  SmemLayout layout{};
  layout.num_chunks = static_cast<int32_t>(NumChunks(list_capacity));
  // Areas A and B each: where one holds a row's pairs, the other one serves to sort them.
  const int64_t either_bytes = larger(candidates_bytes, SortBytes(k));
  const int64_t b = kAreaAOffset + AlignUp(larger(TileRingBytes(num_stages), either_bytes), 128);
  layout.b = static_cast<int32_t>(b);
  // Behind the histograms of the cluster too: a CTA may still collect keys for a bracket that a
  // peer has found wrong.
  layout.own = static_cast<int32_t>(own_offset);
  layout.kept = static_cast<int32_t>(kept);
  layout.total_bytes =
      b + AlignUp(larger(larger(ListBytes(list_capacity), cluster_size == 1 ? 0 : kSumBytes),
                         either_bytes),
                  128);
  layout.has_large_tile =
      kAreaAOffset + kLargeTileBytes + larger(NextPowerOfTwo(k) * 8, kRankedBytes) <=
      layout.total_bytes;
  return layout;
}

}  // namespace jax_topk

#endif  // JAX_TOPK_SMEM_LAYOUT_H_
