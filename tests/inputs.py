"""Rows that are hard for some top-k, as NumPy bits: what each is meant to break is said beside it.

Every generator takes `(rng, width)` and returns a float32 row; `rows_of` casts and collects them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

Generator = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng, width):
    return rng.normal(size=width)


def clustered(rng, width):
    """Nearly all values share a few coarse bins: fixed candidate buffers overflow."""
    return 10 + 0.1 * rng.normal(size=width)


def equal(rng, width):
    """One value everywhere: everything is a tie, the lowest indices win."""
    return np.full(width, 1.5)


def relu(rng, width):
    """A plateau of exact zeros, larger than any candidate buffer, next to real winners."""
    return np.maximum(rng.normal(size=width) - 1.5, 0)


def ascending(rng, width):
    """Sorted: the winners are all at the end of the row."""
    return np.sort(rng.normal(size=width))


def descending(rng, width):
    """Sorted: the winners are all at the beginning, a sample elsewhere misses them."""
    return np.sort(rng.normal(size=width))[::-1]


def large_at_one_end(rng, width):
    """One part of the row holds all winners: one of several workers gets all the work."""
    x = rng.normal(size=width)
    x[: max(1, width // 7)] += 100
    return x


def striped(rng, width):
    """Large values at every 32nd place: all in one lane of a warp."""
    x = rng.normal(size=width)
    x[::32] += 50
    return x


def few_values(rng, width):
    """Long runs of ties at every level, also at the k-th value."""
    return rng.integers(-3, 4, size=width)


def signed_zeros(rng, width):
    """+0.0 is above -0.0, whatever their positions."""
    return np.where(rng.integers(0, 2, size=width), 0.0, -0.0)


def infinities(rng, width):
    """Real infinities, which padding must not be confused with."""
    x = rng.normal(size=width)
    x[rng.integers(0, 3, size=width) == 0] = -np.inf
    x[rng.integers(0, 9, size=width) == 0] = np.inf
    return x


def only_minus_infinity(rng, width):
    """As many real worst values as there are places."""
    return np.full(width, -np.inf)


def tiny(rng, width):
    """Denormals and zeros, which arithmetic may flush and comparisons may merge."""
    bits = rng.integers(0, 1 << 12, size=width, dtype=np.uint32)
    bits |= rng.integers(0, 2, size=width, dtype=np.uint32) << np.uint32(31)
    return bits.view(np.float32)


def one_bit_apart(rng, width):
    """Values that differ in their last bits only: no coarse bin separates them."""
    base = np.float32(1.0).view(np.uint32)
    return (base + rng.integers(0, 64, size=width, dtype=np.uint32)).view(np.float32)


def nans(rng, width):
    """NaNs of both signs with many payloads, quiet and signalling, among ordinary values."""
    x = rng.normal(size=width).astype(np.float32)
    bits = x.view(np.uint32)
    chosen = rng.integers(0, 4, size=width) == 0
    payload = rng.integers(1, 1 << 23, size=width, dtype=np.uint32)
    sign = rng.integers(0, 2, size=width, dtype=np.uint32) << np.uint32(31)
    bits[chosen] = (np.uint32(0x7F800000) | payload | sign)[chosen]
    return bits.view(np.float32)


def lowest_bits(rng, width):
    """The lowest pattern of the order (-NaN, all bits set), which code likes to use as filler."""
    bits = rng.normal(size=width).astype(np.float32).view(np.uint32)
    bits[rng.integers(0, 2, size=width) == 0] = 0xFFFFFFFF
    return bits.view(np.float32)


def random_bits(rng, width):
    """Every bit pattern is equally likely: all exponents, and NaNs."""
    return rng.integers(0, 1 << 32, size=width, dtype=np.uint32).view(np.float32)


GENERATORS: tuple[Generator, ...] = (
    *(normal, clustered, equal, relu, ascending, descending, large_at_one_end, striped),
    *(few_values, signed_zeros, infinities, only_minus_infinity, tiny, one_bit_apart),
    *(nans, lowest_bits, random_bits),
)


def cast(x: np.ndarray, dtype) -> np.ndarray:
    """Casts a float32 row; 16-bit types keep the top bits, so NaN payloads and signs survive."""
    dtype = np.dtype(dtype)
    x = np.ascontiguousarray(x, np.float32)
    if dtype == np.float32:
        return x
    if dtype == jnp.bfloat16:
        # Truncation keeps patterns; a NaN whose payload is all in the lower half becomes infinite.
        return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        narrow = x.astype(dtype)
    is_nan = np.isnan(x)
    bits = narrow.view(np.uint16)
    payload = ((x.view(np.uint32) >> np.uint32(13)) & np.uint32(0x3FF)).astype(np.uint16)
    sign = ((x.view(np.uint32) >> np.uint32(16)) & np.uint32(0x8000)).astype(np.uint16)
    bits[is_nan] = (np.uint16(0x7C00) | np.maximum(payload, np.uint16(1)) | sign)[is_nan]
    return bits.view(dtype)


def rows_of(
    width: int, dtype, seed: int = 0, generators: tuple[Generator, ...] = GENERATORS
) -> np.ndarray:
    """One row of each generator: `[len(generators), width]`."""
    rng = np.random.default_rng(seed)
    return np.stack([cast(make(rng, width), dtype) for make in generators])


def windows_of(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths `[rows]` int32: ordinary ones, every border, and garbage to be clamped."""
    rng = np.random.default_rng(seed)
    extremes = np.array([0, 1, -1, width - 1, width, width + 1, 2**31 - 1, -(2**31), 2**30])
    starts = rng.integers(0, max(width, 1), size=rows)
    lengths = rng.integers(0, max(width, 1) + 1, size=rows)
    for counts in (starts, lengths):
        chosen = rng.integers(0, 2, size=rows) == 0
        counts[chosen] = rng.choice(extremes, size=rows)[chosen]
    return starts.astype(np.int32), lengths.astype(np.int32)
