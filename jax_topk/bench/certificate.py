"""A proof, in one pass over the row, that a result is the exact top-k of its window.

Let the result name m = min(k, length) entries of the window. Take the pivot, the lowest ordered key
among them, and t, the highest index among those of them that equal the pivot. The result is the
exact top-k set under the tie rule (lowest index first) if and only if

  1. the m indices are distinct and inside the window, and
  2. exactly m entries of the window have a key above the pivot, or equal to it at an index <= t.

Every named entry satisfies the predicate of 2 by the choice of the pivot and of t, so a count of m
leaves room for no other; and if some entry that was not named came before a named one, it would
satisfy the predicate too, and the count would exceed m. Distinctness follows from the order of the
result, which is checked as well: ascending index, or best first with ties by lowest index. Padding
and values are compared bit by bit. Nothing is sorted and no other top-k is consulted.

Cost: one read of the operand and a gather of k entries per row; one compilation per shape, dtype
and order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ASCENDING, BEST_FIRST, ANY = "ascending", "best_first", "any"
"""Orders of a result. `ANY` also leaves open which of the entries that tie are named."""

POISON = -0x5EEDBEEF
"""What index buffers hold before a kernel runs: no index, and no padding."""
POISON_VALUE = -12345.0
"""What value buffers hold before a kernel runs (rounded to their dtype): no value of the inputs."""

FLAWS = {
    1: "an index is outside the window, or padding is not -1",
    2: "the indices are not distinct and in the promised order",
    4: "an entry that belongs to the top k is missing",
    8: "a value differs from the operand at its index, or padding is not -inf",
    16: "memory beyond the last row was written",
}


def _ordered_keys(x: Array) -> Array:
    """Unsigned keys `[...]` uint32 whose order is the total order of the bits of `x`."""
    bits_dtype = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
    bits = lax.bitcast_convert_type(x, bits_dtype)
    sign = np.array(1 << (8 * x.dtype.itemsize - 1), bits_dtype)
    return jnp.where((bits & sign) != 0, ~bits, bits | sign).astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames=("order",))
def certify(
    operand: Array,
    lengths: Array,
    rows: Array | int,
    values: Array | None,
    indices: Array,
    *,
    order: str,
) -> Array:
    """Checks the first `rows` rows of a result, and that the rows after them are untouched.

    Args:
        operand: `[max_rows, width]` float32, bfloat16 or float16.
        lengths: `[max_rows]` int32, the windows `[0, length)`.
        rows: how many rows the result has; the others must hold the poison. Not static, so that one
            compilation serves every batch size.
        values: `[max_rows, k]` in the operand's dtype, or None if the job was indices only.
        indices: `[max_rows, k]` int32.
        order: `ASCENDING`, `BEST_FIRST` or `ANY`.

    Returns:
        `[max_rows]` int32: 0 where the row is right, else a sum of the keys of `FLAWS`.
    """
    max_rows, width = operand.shape
    k = indices.shape[1]
    length = jnp.clip(lengths, 0, width)[:, None]
    num_named = jnp.minimum(length, k)
    slot = lax.broadcasted_iota(jnp.int32, indices.shape, 1)
    named = slot < num_named
    listed = indices
    if order == ANY:  # -1 goes last: it is the largest unsigned number
        listed = lax.bitcast_convert_type(
            jnp.sort(lax.bitcast_convert_type(indices, jnp.uint32), axis=1), jnp.int32
        )

    inside = jnp.where(named, (listed >= 0) & (listed < length), listed == -1).all(1)

    entry = jnp.clip(listed, 0, width - 1)
    chosen = _ordered_keys(jnp.take_along_axis(operand, entry, axis=1))
    ascending = listed[:, 1:] > listed[:, :-1]
    if order == BEST_FIRST:
        falling = chosen[:, 1:] < chosen[:, :-1]
        in_order = falling | ((chosen[:, 1:] == chosen[:, :-1]) & ascending)
    else:
        in_order = ascending
    in_order = (in_order | ~named[:, 1:]).all(1)

    top = np.uint32(0xFFFFFFFF)
    pivot = jnp.min(jnp.where(named, chosen, top), axis=1, keepdims=True)
    last_tie = jnp.max(jnp.where(named & (chosen == pivot), listed, -1), axis=1, keepdims=True)
    keys = _ordered_keys(operand)
    column = lax.broadcasted_iota(jnp.int32, operand.shape, 1)
    if order == ANY:
        ahead = keys > pivot
        expected = jnp.sum(named & (chosen > pivot), axis=1)
    else:
        ahead = (keys > pivot) | ((keys == pivot) & (column <= last_tie))
        expected = num_named[:, 0]
    complete = jnp.sum(ahead & (column < length), axis=1) == expected

    faithful = jnp.ones(max_rows, bool)
    untouched = (indices == POISON).all(1)
    if values is not None:
        worst = jnp.array(-jnp.inf, operand.dtype)
        source = jnp.take_along_axis(operand, jnp.clip(indices, 0, width - 1), axis=1)
        right = jnp.where(indices >= 0, source, worst)
        bits_dtype = jnp.uint32 if operand.dtype.itemsize == 4 else jnp.uint16
        faithful = (
            lax.bitcast_convert_type(values, bits_dtype)
            == lax.bitcast_convert_type(right, bits_dtype)
        ).all(1)
        untouched &= (values == jnp.array(POISON_VALUE, values.dtype)).all(1)

    flaws = (
        jnp.where(inside, 0, 1)
        + jnp.where(in_order, 0, 2)
        + jnp.where(complete, 0, 4)
        + jnp.where(faithful, 0, 8)
    )
    return jnp.where(jnp.arange(max_rows) < rows, flaws, jnp.where(untouched, 0, 16))


def describe(flaws: np.ndarray) -> str:
    """One sentence per kind of flaw, with the first row that has it; empty if there is none."""
    lines = []
    for bit, sentence in FLAWS.items():
        wrong = np.flatnonzero(flaws & bit)
        if wrong.size:
            lines.append(f"{wrong.size} rows, first row {wrong[0]}: {sentence}")
    return "; ".join(lines)
