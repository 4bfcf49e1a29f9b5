"""The contract as an XLA expression: runs on every platform and for every real dtype.

It is the lowering wherever no kernel serves, and what the kernels are checked against on devices.
The steps, for operand `[*batch, width]`:

    encode   map elements to *keys*, of a dtype that `lax.top_k` orders exactly as the contract
             orders the elements: larger is better
    window   move the window to the front of the row (only if it may start elsewhere than at 0) and
             fill the rest with the lowest key, so that among equal keys the window's come first
    select   a stable sort of the row; on CPUs `lax.top_k` of the keys, which is faster there,
             unless rows may be partitioned over devices (XLA gathers the operand of `lax.top_k`,
             and partitions a sort)
    pad      results beyond the number of valid entries get index -1 and the worst value
    order    by index, if unsorted results are wanted
    decode   keys back to elements, bit for bit

Narrow floats are encoded by moving their bits to the top of a float32: the total order of floats is
sign and magnitude of the bits, whatever the split into exponent and mantissa, so the order is kept,
the fast float32 path of every platform serves, and no conversion can quiet a NaN. (`lax.top_k`
itself converts bfloat16 and the 8-bit floats, which on CPU merges NaN payloads and, for
float8_e5m2fnuz, distinct finite values.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Bound here, so that `jax.lax.top_k = jax_topk.top_k` does not make the expression call itself.
from jax.lax import top_k as _xla_top_k

__all__ = ["gather_last", "positions_like", "reference_top_k", "worst_value"]

_INT32_MAX = np.iinfo(np.int32).max


def worst_value(dtype: np.dtype | type, smallest: bool) -> np.ndarray:
    """Returns the 0-d array that pads results of `dtype`: the worst value of the mode.

    That is -inf (largest) or +inf (smallest), and the lowest or highest finite value of types
    without infinities.
    """
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.array(smallest)
    if jnp.issubdtype(dtype, jnp.floating):
        if _has_infinity(dtype):
            return np.array(math.inf if smallest else -math.inf).astype(dtype)
        float_info = jnp.finfo(dtype)
        return np.array(float_info.max if smallest else float_info.min, dtype)
    int_info = jnp.iinfo(dtype)
    return np.array(int_info.max if smallest else int_info.min).astype(dtype)


def reference_top_k(
    operand: jax.Array,
    starts: jax.Array | None = None,
    lengths: jax.Array | None = None,
    *,
    k: int,
    smallest: bool = False,
    sorted: bool = True,
    indices_only: bool = False,
    by_sort: bool = True,
) -> list[jax.Array]:
    """Exact top-k of each row's window, as a composition of XLA operations.

    Args:
        operand: `[*batch, width]`, any real dtype.
        starts: `[*batch]` int32, or None for 0. Clamped into `[0, width]`.
        lengths: `[*batch]` int32, or None for "to the end of the row". Clamped.
        k: number of results, `0 <= k <= width`.
        smallest: select the smallest instead of the largest.
        sorted: best first, ties by lowest index; otherwise by ascending index.
        indices_only: leave out the values (which are then never computed).
        by_sort: select by a stable sort, which is right on every platform and partitioned over the
            batch without communication; otherwise by `lax.top_k`, for CPUs. (On GPUs XLA serves
            `lax.top_k` of float32 with k <= 16 by a kernel that compares floats as numbers: NaNs,
            the filling among them, and zeros come out in no order. Seen with jax 0.11.2.)

    Returns:
        `[values, indices]`, or `[indices]`: each `[*batch, k]`; indices int32, counted from the
        clamped start. Entries beyond the window's length have index -1 and the worst value.
    """
    width = operand.shape[-1]
    codec = _Codec(operand.dtype, smallest)
    keys = codec.encode(operand)
    start, length = _clamp_windows(starts, lengths, width)
    if start is not None:
        keys = _move_to_front(keys, start)
    if length is not None:
        column = positions_like(keys)
        keys = jnp.where(column < length[..., None], keys, codec.lowest_key())
    best_keys, indices = _select(keys, k, by_sort)
    if length is not None:
        place = positions_like(indices)
        is_valid = place < length[..., None]
        indices = jnp.where(is_valid, indices, np.int32(-1))
        best_keys = jnp.where(is_valid, best_keys, codec.worst_key())
    if indices_only:
        return [indices if sorted else _ascending(indices)[0]]
    if not sorted:
        indices, best_keys = _ascending(indices, best_keys)
    return [codec.decode(best_keys), indices]


def positions_like(x: jax.Array) -> jax.Array:
    """int32 positions along the last axis, in the shape and (explicit) sharding of `x`."""
    sharding = jax.typeof(x).sharding
    out_sharding = None if sharding.mesh.empty else sharding
    return lax.broadcasted_iota(np.int32, x.shape, x.ndim - 1, out_sharding=out_sharding)


def _clamp_windows(
    starts: jax.Array | None, lengths: jax.Array | None, width: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns starts and lengths within the row; None where the window is the row's extent."""
    if starts is None:
        return None, lengths  # positions are compared with them, which clamps
    # A symbolic width becomes an int32 scalar here; it is below 2**31, so nothing overflows.
    limit = jnp.int32(width)
    start = jnp.clip(starts, 0, limit)
    room = limit - start
    return start, room if lengths is None else jnp.clip(lengths, 0, room)


def _move_to_front(keys: jax.Array, start: jax.Array) -> jax.Array:
    """Rotates each row left by its start, so that the window begins at position 0.

    Equal keys must be taken in the order of their position, window first: with the window at the
    front, the filling behind it can never win over a real element with the lowest key.
    """
    width = keys.shape[-1]
    position = positions_like(keys)
    room = jnp.int32(width) - start[..., None]
    # position + start may exceed int32 for rows near 2**31, hence the comparison before the sum.
    source = jnp.where(position < room, position + start[..., None], position - room)
    return gather_last(keys, source, "promise_in_bounds")


def gather_last(operand: jax.Array, positions: jax.Array, mode: str) -> jax.Array:
    """Gathers along the last axis: `out[*batch, j] = operand[*batch, positions[*batch, j]]`.

    Batch dimensions stay batch dimensions of one gather, so partitioned rows stay where they are.

    Args:
        operand: `[*batch, n]`.
        positions: `[*batch, m]` int32.
        mode: `"promise_in_bounds"`, or `"fill"` for 0 at positions outside `[0, n)`.
    """
    batch_dims = tuple(range(operand.ndim - 1))
    dimension_numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(operand.ndim - 1,),
        start_index_map=(operand.ndim - 1,),
        operand_batching_dims=batch_dims,
        start_indices_batching_dims=batch_dims,
    )
    return lax.gather(
        operand,
        lax.expand_dims(positions, (positions.ndim,)),
        dimension_numbers,
        slice_sizes=(1,) * operand.ndim,
        mode=mode,
        fill_value=0 if mode == "fill" else None,
    )


def _select(keys: jax.Array, k: int, by_sort: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest keys of each row, best first, and their positions (int32)."""
    if not by_sort:
        best_keys, indices = _xla_top_k(keys, k)
        return best_keys, indices
    ranks, unrank = _descending_ranks(keys)
    position = positions_like(keys)
    ranks, indices = lax.sort((ranks, position), dimension=-1, is_stable=True, num_keys=1)
    first_k = lambda x: lax.slice_in_dim(x, 0, k, axis=x.ndim - 1)  # noqa: E731
    return unrank(first_k(ranks)), first_k(indices)


def _descending_ranks(
    keys: jax.Array,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Integers whose ascending order is the descending total order of `keys`, and the inverse.

    `lax.sort` compares floats with -0.0 equal to +0.0 and all NaNs equal, so floats must become
    integers: the bits of a negative float, without its sign, count downwards.
    """
    if not jnp.issubdtype(keys.dtype, jnp.floating):
        return ~keys, lambda ranks: ~ranks
    int_dtype = np.dtype(f"int{8 * keys.dtype.itemsize}")
    magnitude = np.array(np.iinfo(int_dtype).max, int_dtype)

    def flip(x: jax.Array) -> jax.Array:
        return jnp.where(x < 0, x ^ magnitude, x)

    ranks = ~flip(lax.bitcast_convert_type(keys, int_dtype))
    return ranks, lambda ranks: lax.bitcast_convert_type(flip(~ranks), keys.dtype)


def _ascending(indices: jax.Array, *payload: jax.Array) -> tuple[jax.Array, ...]:
    """Sorts `[*batch, k]` results by index, with the -1 of padding last."""
    order = jnp.where(indices < 0, _INT32_MAX, indices)
    # Payload travels as integers: a sort may canonicalise floats.
    bits = [_as_integers(x) for x in payload]
    order, *bits = lax.sort((order, *bits), dimension=-1, is_stable=True, num_keys=1)
    restored = [
        b if b.dtype == x.dtype else lax.bitcast_convert_type(b, x.dtype)
        for b, x in zip(bits, payload, strict=True)
    ]
    return (jnp.where(order == _INT32_MAX, -1, order), *restored)


def _as_integers(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.bitcast_convert_type(x, np.dtype(f"int{8 * x.dtype.itemsize}"))


class _Codec:
    """Elements of `dtype` <-> keys in the order of the mode, where a larger key is better."""

    def __init__(self, dtype: np.dtype, smallest: bool):
        self.dtype = np.dtype(dtype)
        self.smallest = smallest
        self.bits = _bits(self.dtype)
        self.key_dtype: np.dtype[Any]
        is_float = jnp.issubdtype(self.dtype, jnp.floating)
        if self.dtype == np.bool_:
            self.key_dtype = np.dtype(np.bool_)
        elif "e8m0" in self.dtype.name:  # no sign: the bits are their own order
            self.key_dtype = np.dtype(np.uint8)
        elif is_float:
            self.key_dtype = np.dtype(np.float64 if self.bits == 64 else np.float32)
        elif self.bits < 8:  # XLA does not sort integers of less than a byte
            signed = jnp.issubdtype(self.dtype, jnp.signedinteger)
            self.key_dtype = np.dtype(np.int8 if signed else np.uint8)
        else:
            self.key_dtype = self.dtype

    def encode(self, x: jax.Array) -> jax.Array:
        keys = self._to_key_dtype(x)
        return self._reverse(keys) if self.smallest else keys

    def decode(self, keys: jax.Array) -> jax.Array:
        return self._from_key_dtype(self._reverse(keys) if self.smallest else keys)

    def worst_key(self) -> jax.Array:
        return self.encode(jnp.asarray(worst_value(self.dtype, self.smallest)))

    def lowest_key(self) -> np.ndarray:
        """The key below which none is: fills the positions outside the window."""
        if jnp.issubdtype(self.key_dtype, jnp.floating):  # -NaN with every payload bit set
            return np.array(-1, f"int{8 * self.key_dtype.itemsize}").view(self.key_dtype)
        return worst_value(self.key_dtype, smallest=False)

    def _reverse(self, keys: jax.Array) -> jax.Array:
        """Reverses the order of keys; its own inverse."""
        if not jnp.issubdtype(self.key_dtype, jnp.floating):
            return ~keys
        # The total order of floats is symmetric in the sign bit.
        unsigned = np.dtype(f"uint{8 * self.key_dtype.itemsize}")
        sign = np.array(1 << (8 * unsigned.itemsize - 1), unsigned)
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(keys, unsigned) ^ sign, self.key_dtype
        )

    def _to_key_dtype(self, x: jax.Array) -> jax.Array:
        if self.dtype == self.key_dtype:
            return x
        if not jnp.issubdtype(self.key_dtype, jnp.floating):
            if "e8m0" in self.dtype.name:
                return lax.bitcast_convert_type(x, np.uint8)
            return x.astype(self.key_dtype)
        if (
            self.bits < 8
        ):  # finite and exact in float32; a bitcast of sub-byte types is not portable
            return x.astype(np.float32)
        word = lax.bitcast_convert_type(x, np.dtype(f"uint{self.bits}")).astype(np.uint32)
        word = word << np.uint32(32 - self.bits)
        if self._nan_is_negative_zero:  # the lowest value, as for `lax.top_k`
            word = jnp.where(word == np.uint32(1 << 31), np.uint32(0xFFFFFFFF), word)
        return lax.bitcast_convert_type(word, np.float32)

    def _from_key_dtype(self, keys: jax.Array) -> jax.Array:
        if self.dtype == self.key_dtype:
            return keys
        if not jnp.issubdtype(self.key_dtype, jnp.floating):
            if "e8m0" in self.dtype.name:
                return lax.bitcast_convert_type(keys, self.dtype)
            return keys.astype(self.dtype)
        if self.bits < 8:
            return keys.astype(self.dtype)
        word = lax.bitcast_convert_type(keys, np.uint32)
        if self._nan_is_negative_zero:
            word = jnp.where(word == np.uint32(0xFFFFFFFF), np.uint32(1 << 31), word)
        word = word >> np.uint32(32 - self.bits)
        return lax.bitcast_convert_type(word.astype(np.dtype(f"uint{self.bits}")), self.dtype)

    @property
    def _nan_is_negative_zero(self) -> bool:
        """The `fnuz` types have one NaN and no -0.0; the NaN has the bits of -0.0."""
        return "fnuz" in self.dtype.name


def _bits(dtype: np.dtype) -> int:
    if dtype == np.bool_:
        return 8
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return int(jnp.iinfo(dtype).bits)


def _has_infinity(dtype: np.dtype) -> bool:
    """Whether `dtype` has infinities (the `fn` and `fnuz` types, e8m0 and float4 have none)."""
    with np.errstate(all="ignore"):
        return bool(np.isinf(np.array(math.inf, np.float32).astype(dtype).astype(np.float64)))
