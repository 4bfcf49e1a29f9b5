"""The contract in NumPy, independent of JAX and of every kernel.

The oracle maps each element to an unsigned *ordered key* whose integer order is the contract's
order of values, then takes NumPy's stable sort of the keys. It costs O(n log n) per row and is
written to be checked by reading, not to be fast: tests, the bench and the fuzzer compare against
it, and no kernel is ever compared against another kernel alone.
"""

import math

import ml_dtypes
import numpy as np

__all__ = ["ordered_keys", "top_k", "top_k_indices", "worst_value"]

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _float_bits(dtype: np.dtype) -> int:
    """Width of a floating type in bits (sub-byte types are stored in the low bits of a byte)."""
    return int(ml_dtypes.finfo(dtype).bits)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or "float" in dtype.name


def ordered_keys(x: np.ndarray, smallest: bool = False) -> np.ndarray:
    """Returns unsigned keys of `x` whose order is the contract's order; a larger key is better.

    Floats follow the total order on bits: +NaN (larger payload first) > +inf > ... > +0.0 > -0.0 >
    ... > -inf > -NaN. The `fnuz` types have a single NaN, stored where -0.0 would be; it is the
    lowest value, as in `jax.lax.top_k`. `float8_e8m0fnu` has no sign: its bits are their own order.

    Args:
      x: `[...]`, any real dtype (bool, integers, floats including `ml_dtypes`).
      smallest: whether the reverse order of values is wanted.

    Returns:
      `[...]`, unsigned integers. Equal keys mean equal bits.
    """
    x = np.ascontiguousarray(x)
    dtype = x.dtype
    if dtype.kind == "c":
        raise ValueError(f"x has dtype {dtype}, which has no order; pass a real dtype")
    if _is_float(dtype):
        raw = x.view(_UNSIGNED[dtype.itemsize])
        bits = _float_bits(dtype)
        full = raw.dtype.type((1 << bits) - 1)
        raw = raw & full
        if "e8m0" in dtype.name:
            keys = raw
        else:
            sign = raw.dtype.type(1 << (bits - 1))
            keys = np.where(raw & sign, ~raw & full, raw | sign)
            if "fnuz" in dtype.name:
                # One key more than there are other bit patterns, hence the wider type.
                keys = np.where(raw == sign, np.uint16(0), keys.astype(np.uint16) + np.uint16(1))
                full = np.uint16(full) + np.uint16(1)
    elif dtype.kind == "b":
        keys, full = x.view(np.uint8), np.uint8(1)
    elif dtype.kind == "u":
        keys, full = x, dtype.type(np.iinfo(dtype).max)
    elif dtype.kind == "i":
        unsigned = _UNSIGNED[dtype.itemsize]
        full = unsigned((1 << (8 * dtype.itemsize)) - 1)
        keys = x.view(unsigned) ^ unsigned(1 << (8 * dtype.itemsize - 1))
    else:  # int2, uint2, int4, uint4 of ml_dtypes
        keys, full = x.astype(np.int16).view(np.uint16) ^ np.uint16(1 << 15), np.uint16(0xFFFF)
    return (full - keys) if smallest else keys.copy()


def worst_value(dtype: np.dtype, smallest: bool = False) -> np.ndarray:
    """Returns the 0-d array that pads results of `dtype`: the worst value of the mode."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.array(smallest, dtype)
    if _is_float(dtype):
        float_info = ml_dtypes.finfo(dtype)
        infinity = np.array(math.inf if smallest else -math.inf, np.float32)
        with np.errstate(all="ignore"):
            cast = infinity.astype(dtype)
        if "e8m0" not in dtype.name and np.isinf(cast.astype(np.float64)):
            return cast
        return np.array(float_info.max if smallest else float_info.min, dtype)
    info = ml_dtypes.iinfo(dtype)
    return np.array(info.max if smallest else info.min, dtype)


def clamp_window(start: int, length: int, width: int) -> tuple[int, int]:
    """Returns `(start, length)` of the window, clamped into a row of `width` without overflow."""
    start = min(max(int(start), 0), width)
    return start, min(max(int(length), 0), width - start)


def top_k(
    x: np.ndarray,
    k: int,
    starts: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    smallest: bool = False,
    sorted: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top-k of the window of each row, as the public contract defines it.

    Args:
      x: `[rows, width]`.
      k: `0 <= k <= width`.
      starts: `[rows]` integers, or None for 0. Clamped.
      lengths: `[rows]` integers, or None for "to the end of the row". Clamped.
      smallest: mode `"smallest"` instead of `"largest"`.
      sorted: best first (ties: lowest index first); False: ascending index.

    Returns:
      `(values, indices)`, each `[rows, k]`; indices int32, counted from the clamped start. Where a
      window holds fewer than k entries the rest is index -1 and the worst value of the mode.
    """
    rows, width = x.shape
    if not 0 <= k <= width:
        raise ValueError(f"k={k} must lie between 0 and the row width {width}")
    values = np.full((rows, k), worst_value(x.dtype, smallest), x.dtype)
    indices = np.full((rows, k), -1, np.int32)
    for row in range(rows):
        start, length = clamp_window(
            0 if starts is None else starts[row], width if lengths is None else lengths[row], width
        )
        window = x[row, start : start + length]
        keys = ordered_keys(window, smallest)
        best = np.argsort(np.iinfo(keys.dtype).max - keys, kind="stable")[:k]
        if not sorted:
            best = np.sort(best)
        indices[row, : best.size] = best
        # A fancy index moves bits; a cast or a comparison would not keep NaN payloads.
        values[row, : best.size] = window[best]
    return values, indices


def top_k_indices(
    x: np.ndarray,
    k: int,
    starts: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    smallest: bool = False,
) -> np.ndarray:
    """The indices of `top_k(..., sorted=False)`: `[rows, k]` int32, ascending, -1 at the end."""
    return top_k(x, k, starts, lengths, smallest, sorted=False)[1]
