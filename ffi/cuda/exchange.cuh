// What the CTAs of a row tell each other. All of it travels as st.async into the receiver's shared
// memory and is counted by an mbarrier there, so no cluster barrier and no fence is needed after
// the launch: the exchange of counts takes 0.4 us where cluster.sync takes 0.7.
//
// Nobody writes into a CTA that may still read: a CTA announces its counts after its last read of
// its tiles (which candidates overwrite), sends sums of a histogram only after its last read of
// what they are made of, and a histogram only after reading the sums of the one before. Winners of
// a sorted row come to the first CTA over its open keys, once it has said that it has sent these.

#ifndef JAX_TOPK_CUDA_EXCHANGE_CUH_
#define JAX_TOPK_CUDA_EXCHANGE_CUH_

#include <cstdint>

#include "ptx.cuh"

#include "block.cuh"

namespace jax_topk {

// Counts of the whole row, and of the CTAs before this one.
struct RowCounts {
  uint32_t certain;
  uint32_t open;
  uint32_t certain_before;
  uint32_t open_before;
  uint32_t padded_open;  // with every CTA's share padded to whole vectors
  uint32_t padded_open_before;
  uint32_t with_open;  // a bit for each CTA that has open elements
};

// Tells every CTA of the row what this one counted. All earlier accesses to what candidates will
// overwrite must be ordered by a barrier before. `attempt`, 0 or 1, has its own barrier and
// records: nothing keeps a CTA from sending a second time before a peer has everything of the
// first.
__device__ __forceinline__ void SendCounts(const Cta& cta, const PartCounts& mine,
                                           uint32_t attempt) {
  if (cta.num_active == 1) return;
  SharedHeader* header = cta.header;
  if (cta.thread == 0) {
    BarrierExpect(&header->barriers[kCountsBarrier + attempt],
                  static_cast<uint32_t>(cta.num_active) * sizeof(PartCounts));
  }
  if (cta.thread < cta.num_active) {
    SendAsync(RemoteAddress(&header->records[attempt][cta.rank], cta.thread),
              make_uint2(mine.certain, mine.open),
              RemoteAddress(&header->barriers[kCountsBarrier + attempt], cta.thread));
  }
}

// The counts of the row, in every warp alike. `record`: what CTA `lane` counted, zeros behind the
// last.
__device__ __forceinline__ RowCounts SumRecords(const Cta& cta, const PartCounts& record) {
  const bool is_before = cta.lane < cta.rank;
  RowCounts row;
  row.certain = WarpSum(record.certain);
  row.open = WarpSum(record.open);
  row.certain_before = WarpSum(is_before ? record.certain : 0);
  row.open_before = WarpSum(is_before ? record.open : 0);
  row.padded_open = WarpSum(PadToVector(record.open));
  row.padded_open_before = WarpSum(is_before ? PadToVector(record.open) : 0);
  row.with_open = WarpBallot(record.open != 0);
  return row;
}

// What CTA `lane` counted, zeros behind the last. `mine`: this CTA's counts.
__device__ __forceinline__ PartCounts ReceiveRecord(const Cta& cta, const PartCounts& mine,
                                                    uint32_t attempt) {
  if (cta.num_active == 1) return cta.lane == 0 ? mine : PartCounts{};
  BarrierWait(&cta.header->barriers[kCountsBarrier + attempt], 0);
  return cta.lane < cta.num_active ? cta.header->records[attempt][cta.lane] : PartCounts{};
}

// What all CTAs of the row sent.
__device__ __forceinline__ RowCounts ReceiveCounts(const Cta& cta, const PartCounts& mine,
                                                   uint32_t attempt) {
  if (cta.num_active == 1) return RowCounts{mine.certain, mine.open, 0, 0, mine.open, 0, 1};
  return SumRecords(cta, ReceiveRecord(cta, mine, attempt));
}

// CTAs first .. last of a row.
struct CtaRange {
  int first;
  int last;
};

// Gives each of `ctas`, of which this is one, the open keys of all of them. In: own open keys
// complete, ordered by a barrier. `own_is_needed`: the CTAs send to cta.own of CTA 0 next, and must
// not before it has read its own keys for the last time.
__device__ __forceinline__ void SendCandidates(Cta& cta, const PartCounts& mine,
                                               const RowCounts& row, const CtaRange& ctas,
                                               bool own_is_needed) {
  if (cta.thread == 0) {
    BarrierExpect(&cta.header->barriers[kCandidatesBarrier],
                  row.padded_open * sizeof(uint32_t) + (own_is_needed ? sizeof(uint2) : 0));
  }
  const uint4* own = reinterpret_cast<const uint4*>(cta.own);
  const int num_peers = ctas.last - ctas.first + 1;
  // A warp per peer, starting with the CTA's own number, so that not all begin with the same CTA.
#pragma unroll 1
  for (int turn = cta.warp; turn < num_peers; turn += kWarps) {
    const int ahead = turn + cta.rank;
    const int peer = ahead <= ctas.last ? ahead : ahead - num_peers;
    const uint32_t to = RemoteAddress(cta.gathered + row.padded_open_before, peer);
    const uint32_t barrier = RemoteAddress(&cta.header->barriers[kCandidatesBarrier], peer);
#pragma unroll 1
    for (uint32_t first = 4 * cta.lane; first < mine.open; first += 4 * 32) {
      SendAsync(to + first * sizeof(uint32_t), own[first / 4], barrier);
    }
  }
  if (Unlikely(own_is_needed) && cta.rank == 0) {
    SyncThreads();  // the reads of own keys before the others may overwrite them
    if (cta.thread < cta.num_active) {
      SendAsync(RemoteAddress(&cta.header->own_is_free, cta.thread), make_uint2(0, 0),
                RemoteAddress(&cta.header->barriers[kCandidatesBarrier], cta.thread));
    }
  }
}

// Waits for the open keys of all of them: cta.gathered then holds them by CTA, each CTA's share as
// it collected and padded them.
__device__ __forceinline__ void AwaitCandidates(const Cta& cta) {
  BarrierWait(&cta.header->barriers[kCandidatesBarrier], 0);
}

// Replaces the histogram of every CTA by the sum over the row's CTAs: each sums one segment of the
// bins and sends the sums to all. In: counts ordered by a barrier. Ends in a barrier. Two
// exchanges.
__device__ __forceinline__ void SumBins(Cta& cta, uint32_t parity) {
  const int each = (kBinVectors + cta.num_active - 1) / cta.num_active;
  const int own_first = min(each * cta.rank, kBinVectors);
  const int own_count = min(own_first + each, kBinVectors) - own_first;
  uint4* received = reinterpret_cast<uint4*>(cta.sums);  // [num_active][each]
  uint4* totals = received + kClusterSegmentVectors;     // [kBinVectors]
  SharedHeader* header = cta.header;
  if (cta.thread == 0) {
    BarrierExpect(&header->barriers[kSegmentsBarrier], cta.num_active * own_count * kVectorBytes);
    BarrierExpect(&header->barriers[kTotalsBarrier], kBinVectors * kVectorBytes);
  }
#pragma unroll 1
  for (int i = cta.thread; i < kBinVectors; i += kThreads) {
    const int owner = i / each;
    SendAsync(RemoteAddress(&received[cta.rank * each + i % each], owner),
              reinterpret_cast<const uint4*>(cta.bins)[i],
              RemoteAddress(&header->barriers[kSegmentsBarrier], owner));
  }
  BarrierWait(&header->barriers[kSegmentsBarrier], parity);
  // To all CTAs by the thread that reads the segments: a peer that has everything goes on and may
  // overwrite them.
#pragma unroll 1
  for (int bin = cta.thread; bin < own_count; bin += kThreads) {
    uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int source = 0; source < cta.num_active; ++source) {
      const uint4 part = received[source * each + bin];
      sum = make_uint4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
#pragma unroll 1
    for (int peer = 0; peer < cta.num_active; ++peer) {
      SendAsync(RemoteAddress(&totals[own_first + bin], peer), sum,
                RemoteAddress(&header->barriers[kTotalsBarrier], peer));
    }
  }
  BarrierWait(&header->barriers[kTotalsBarrier], parity);
#pragma unroll 1
  for (int i = cta.thread; i < kBinVectors; i += kThreads) {
    reinterpret_cast<uint4*>(cta.bins)[i] = totals[i];
  }
  SyncThreads();  // the sums before their reads
}

}  // namespace jax_topk

#endif  // JAX_TOPK_CUDA_EXCHANGE_CUH_
