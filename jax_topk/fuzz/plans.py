"""Forced paths of the CUDA kernel, and which path a row takes.

`PLANS` is what tests and the fuzzer force (`ffi/plan.h` defines the overrides). Every plan must
give the same bits. Small values of `candidates` make lists overflow with a few hundred elements,
`part` sets from which length on a row is shared by several CTAs, and `stages` how many tiles of a
warp are in flight while a row is streamed.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

__all__ = [
    "BOUNDARIES",
    "CLUSTERS",
    "KERNEL_PATHS",
    "LONG_BOUNDARIES",
    "PATHS",
    "PLANS",
    "THREADS",
    "Plan",
    "kernel_paths",
]

PATHS = ("path=short", "path=sample", "path=exact")
CLUSTERS = tuple(f"cluster={size}" for size in (1, 2, 4, 8, 16))

PLANS = (
    "",
    *PATHS,
    *CLUSTERS,
    "candidates=4",
    "candidates=64",
    "part=1",
    "part=100000",
    "stages=1",
    "stages=2",
    "path=exact,cluster=8",
    "path=exact,cluster=3",
    "path=exact,cluster=1,stages=2",
    "path=sample,cluster=1",
    "path=sample,cluster=16,part=64",
    "path=sample,cluster=4,candidates=64",
)

THREADS = (1, 2, 4, 8)
"""Numbers of threads that the CPU target is given, as `threads=N` in place of a plan."""

BOUNDARIES = (
    *(1, 512, 1536, 2048, 3072, 4608, 6144, 7680, 9216, 10752),
    *(12288, 16896, 18432, 21504, 24576, 32768),
)
"""Lengths at which the kernel changes its way: the window that is copied (k, added by the tests), a
tile of 384 threads with 1 to 7 vectors of four floats, the large tile, two ordinary ones, parts of
2048, and powers of two."""

LONG_BOUNDARIES = (36864, 43008, 49152, 73728, 86016, 98304, 147456, 163840, 172032, 196608)
"""More of them: the largest parts that 2 to 16 CTAs hold, of floats and of 16-bit types, and the
width that the bench uses."""

KERNEL_PATHS = ("nothing", "copy", "short", "resident", "streamed")
"""The ways of a row through the CUDA kernel: no result is wanted (k = 0), the whole window is the
result and is copied, one CTA holds the row, each CTA holds its part, or the parts are streamed."""

# As in ffi/smem_layout.h and ffi/cuda/ordered_key.cuh; a test compares them.
THREADS_PER_CTA = 384
VECTOR_BYTES = 16
TILE_VECTORS = {"float32": 7, "bfloat16": 3, "float16": 3}
LARGE_TILE_VECTORS = {"float32": 11, "bfloat16": 6, "float16": 6}


class Plan(TypedDict):
    """What `plan_launch` of the native module returns."""

    cluster_size: int
    num_ctas: int
    num_stages: int
    list_capacity: int
    part_elements: int
    smem_bytes: int
    uses_large_tile: bool
    path: str


def kernel_paths(
    plan: Plan,
    *,
    width: int,
    k: int,
    dtype: str,
    is_sorted: bool,
    starts: np.ndarray,
    lengths: np.ndarray,
    operand_address: int,
) -> np.ndarray:
    """The path of every row of a launch: the decision of `SelectRow` in `ffi/cuda/kernel.cuh`.

    Args:
        plan: of the launch.
        width: allocated columns.
        k: number of results.
        dtype: of the operand.
        is_sorted: best first.
        starts: `[rows]` clamped.
        lengths: `[rows]` clamped.
        operand_address: of the first row; its place within 16 bytes decides.

    Returns:
        `[rows]` places in `KERNEL_PATHS`.
    """
    nothing, copy, short, resident, streamed = range(len(KERNEL_PATHS))
    if k == 0:
        return np.full(len(lengths), nothing)
    element_bytes = 4 if dtype == "float32" else 2
    per_vector = VECTOR_BYTES // element_bytes
    rows = np.arange(len(lengths), dtype=np.int64)
    address = operand_address + (rows * width + starts) * element_bytes
    skew = address % VECTOR_BYTES // element_bytes
    num_vectors = (lengths + skew + per_vector - 1) // per_vector
    cluster = plan["cluster_size"]
    tile = THREADS_PER_CTA * TILE_VECTORS[dtype]
    is_forced_short = (plan["path"] == "short") | (lengths <= k)
    large = THREADS_PER_CTA * LARGE_TILE_VECTORS[dtype]
    short_tile = large if plan["uses_large_tile"] else tile
    is_short = ((plan["path"] == "auto") | is_forced_short) & (num_vectors <= short_tile)
    part_vectors = -(-plan["part_elements"] * element_bytes // VECTOR_BYTES)
    each = np.maximum(-(-num_vectors // cluster), part_vectors)
    # Where two tiles have room, a part may have as many elements per thread as a word has bits.
    part = THREADS_PER_CTA * 32 // per_vector if plan["num_stages"] > 1 else tile
    path = np.where(each <= part, resident, streamed)
    path = np.where(is_short, short, path)
    return np.where((lengths <= k) & (not is_sorted), copy, path)
