"""The two XLA programs of a shape class: one makes the rows, one checks all results.

Everything but the shapes of the buffers is read at run time, so one compilation per class and
element size serves every width, k, mode, order and mixture.

The check is independent of what it checks. It reads the operand as the target did, clamps the
windows itself, maps bits to unsigned ranks that ascend from best to worst, and takes XLA's stable
sort (`lax.sort`) of (rank, position); no top-k and no other code of this package is involved. A few
rows of every batch are handed out with their expected results, for the NumPy oracle to check the
check.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_topk.fuzz import generators
from jax_topk.fuzz.batch import (
    HEAD,
    MAX_LAUNCHES,
    MAX_OFFSET,
    Batch,
    Settings,
    arena_elements,
    operand_elements,
)
from jax_topk.fuzz.windows import clamp

__all__ = ["NUM_SAMPLES", "Buffers", "Verdict", "check", "make"]

NUM_SAMPLES = 2
"""Rows of a batch that the NumPy oracle checks as well."""

WRONG_INDICES, WRONG_VALUES = 1, 2
_INT32_MAX = np.iinfo(np.int32).max


@dataclasses.dataclass
class Buffers:
    """What a target reads and writes, on its device.

    Attributes:
        operand: `[HEAD + rows * class width + GUARD]` uint32 or uint16; the rows, of the batch's
            width, begin at `HEAD - 16 + offset` and follow each other without a gap.
        digest: scalar, of the operand as it was made.
        starts: `[rows]` int32.
        lengths: `[rows]` int32.
        values: `[arena]`, unsigned integers of the operand's size: poison.
        indices: `[arena]` int32: poison.
    """

    operand: Array
    digest: Array
    starts: Array
    lengths: Array
    values: Array
    indices: Array


class Verdict(NamedTuple):
    """What the check of a batch found.

    Attributes:
        flags: `[rows]`: 0, or `WRONG_INDICES` and `WRONG_VALUES` added.
        values_guard: `(count, first place)` of elements of the arena that must not be written.
        indices_guard: the same.
        is_operand_intact: whether the operand still holds what was made.
        sample_rows: `[NUM_SAMPLES, class width]` bits of whole rows.
        sample_values: `[NUM_SAMPLES, class k]` expected bits.
        sample_indices: `[NUM_SAMPLES, class k]` expected indices.
    """

    flags: np.ndarray
    values_guard: tuple[int, int]
    indices_guard: tuple[int, int]
    is_operand_intact: bool
    sample_rows: np.ndarray
    sample_values: np.ndarray
    sample_indices: np.ndarray


def rows_begin(batch: Batch) -> int:
    """The element of the operand's buffer at which the first row begins."""
    return HEAD - MAX_OFFSET + batch.offset


def num_bits(dtype: str) -> int:
    """Bits of an element."""
    return 32 if dtype == "float32" else 16


def make(settings: Settings, batch: Batch, device: Any) -> Buffers:
    """Makes the buffers of a batch on a device; the targets' results go into the arenas."""
    start, length = clamp(batch.starts, batch.lengths, batch.width)
    columns = {
        "first": batch.first,
        "last": batch.last,
        "seed": batch.row_seeds,
        "outside": batch.outside,
        "start": start.astype(np.int32),
        "length": length.astype(np.int32),
        "k": batch.per_row("k", np.uint32),
        "smallest": batch.per_row("smallest", np.bool_),
    }
    scalars = {
        "width": np.int32(batch.width),
        "begin": np.int32(rows_begin(batch)),
        "infinity": np.uint32(generators.INFINITY_BITS[batch.dtype]),
        "is_float16": np.bool_(batch.dtype == "float16"),
        "poison": np.array(batch.poison, np.uint32),
    }
    columns, scalars = jax.device_put((columns, scalars), device)
    operand, digest, values, indices = _make(
        columns,
        scalars,
        class_width=batch.shape.width,
        bits=num_bits(batch.dtype),
        operand_size=operand_elements(settings, batch.shape),
        arena_size=arena_elements(settings, batch.shape),
    )
    # Copies: a target must not be able to change what it is compared with.
    starts, lengths = jax.device_put((batch.starts.copy(), batch.lengths.copy()), device)
    return Buffers(operand, digest, starts, lengths, values, indices)


@functools.partial(jax.jit, static_argnames=("class_width", "bits", "operand_size", "arena_size"))
def _make(
    columns: dict[str, Array],
    scalars: dict[str, Array],
    *,
    class_width: int,
    bits: int,
    operand_size: int,
    arena_size: int,
) -> tuple[Array, Array, Array, Array]:
    column = {name: value[:, None] for name, value in columns.items()}
    rows = len(columns["seed"])
    place = lax.broadcasted_iota(jnp.int32, (rows, class_width), 1) - column["start"]
    elements = generators.Elements(
        jnp,
        place.astype(jnp.uint32),
        jnp.maximum(column["length"], 1).astype(jnp.uint32),
        column["k"],
        column["seed"],
        bits,
        scalars["infinity"].reshape(1, 1),
    )
    length = column["length"]
    which = jnp.where(place < length // 2, column["first"], column["last"])

    def to_bits(value: Array) -> Array:
        if bits == 32:
            return lax.bitcast_convert_type(value, jnp.uint32)
        as_bfloat16, as_float16 = (
            lax.bitcast_convert_type(value.astype(dtype), jnp.uint16)
            for dtype in (jnp.bfloat16, jnp.float16)
        )
        return jnp.where(scalars["is_float16"], as_float16, as_bfloat16).astype(jnp.uint32)

    inside = generators.make_bits(elements, which, to_bits)
    outside = generators.outside_bits(elements, column["outside"], column["smallest"])
    rectangle = jnp.where((place >= 0) & (place < length), inside, outside)
    word = jnp.uint32 if bits == 32 else jnp.uint16
    rectangle = rectangle.astype(word)

    # Rows of the batch's own width, without gaps.
    width = jnp.maximum(scalars["width"], 1)
    flat = jnp.arange(operand_size, dtype=jnp.int32) - scalars["begin"]
    is_row = (flat >= 0) & (flat < rows * scalars["width"])
    source = jnp.where(is_row, flat // width * class_width + flat % width, 0)
    # Around the rows: the pattern that wins, for one mode before them and for the other behind.
    full = np.array((1 << bits) - 1, word)
    around = jnp.where(flat < 0, full >> 1, full)
    operand = jnp.where(is_row, rectangle.reshape(-1)[source], around)
    values_poison, indices_poison = scalars["poison"]
    return (
        operand,
        _digest(operand),
        jnp.full(arena_size, values_poison.astype(word)),
        jnp.full(arena_size, lax.bitcast_convert_type(indices_poison, jnp.int32)),
    )


def _digest(operand: Array) -> Array:
    """A number that changes with every change of one element."""
    place = jnp.arange(operand.size, dtype=jnp.uint32)
    return jnp.sum(operand.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def check(
    settings: Settings, batch: Batch, buffers: Buffers, sample: np.ndarray, device: Any
) -> Verdict:
    """Compares the results in the arenas with the reference, and looks at all that is around them.

    Args:
        settings: of the run.
        batch: that was run.
        buffers: with the results.
        sample: `[NUM_SAMPLES]` numbers of rows to hand out.
        device: where the buffers are.
    """
    launches = batch.launches
    size = arena_elements(settings, batch.shape)
    begins = np.full(MAX_LAUNCHES, size, np.int32)
    ends = np.full(MAX_LAUNCHES, size, np.int32)
    value_ends = ends.copy()
    count = len(launches)
    begins[:count] = [launch.out_begin for launch in launches]
    ends[:count] = [launch.out_end for launch in launches]
    value_ends[:count] = [x.out_end if x.has_values else x.out_begin for x in launches]
    columns = {
        "start": batch.starts,
        "length": batch.lengths,
        "out_offset": batch.out_offsets(),
        "k": batch.per_row("k", np.int32),
        "has_values": batch.per_row("has_values", np.bool_),
        "smallest": batch.per_row("smallest", np.bool_),
        "is_sorted": batch.per_row("is_sorted", np.bool_),
    }
    scalars = {
        "width": np.int32(batch.width),
        "begin": np.int32(rows_begin(batch)),
        "infinity": np.uint32(generators.INFINITY_BITS[batch.dtype]),
        "poison": np.array(batch.poison, np.uint32),
        "sample": sample.astype(np.int32),
        "begins": begins,
        "ends": ends,
        "value_ends": value_ends,
    }
    columns, scalars = jax.device_put((columns, scalars), device)
    found = _check(
        columns,
        scalars,
        buffers.operand,
        buffers.digest,
        buffers.values,
        buffers.indices,
        class_width=batch.shape.width,
        class_k=settings.max_results(batch.shape),
        bits=num_bits(batch.dtype),
    )
    flags, values_guard, indices_guard, is_intact, *samples = jax.device_get(found)
    is_intact = (
        bool(is_intact)
        and np.array_equal(np.asarray(buffers.starts), batch.starts)
        and np.array_equal(np.asarray(buffers.lengths), batch.lengths)
    )
    return Verdict(
        flags,
        (int(values_guard[0]), int(values_guard[1])),
        (int(indices_guard[0]), int(indices_guard[1])),
        is_intact,
        *samples,
    )


@functools.partial(jax.jit, static_argnames=("class_width", "class_k", "bits"))
def _check(
    columns: dict[str, Array],
    scalars: dict[str, Array],
    operand: Array,
    digest: Array,
    values: Array,
    indices: Array,
    *,
    class_width: int,
    class_k: int,
    bits: int,
) -> tuple[Any, ...]:
    column = {name: value[:, None] for name, value in columns.items()}
    rows = len(columns["k"])
    width, begin = scalars["width"], scalars["begin"]
    full, sign = np.uint32((1 << bits) - 1), np.uint32(1 << (bits - 1))

    # The window, moved to the front.
    start = jnp.clip(column["start"], 0, width)
    length = jnp.clip(column["length"], 0, width - start)
    place = lax.broadcasted_iota(jnp.int32, (rows, class_width), 1)
    row_begin = begin + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) * width
    is_inside = place < length
    window = operand[jnp.where(is_inside, row_begin + start + place, 0)].astype(jnp.uint32)

    # Ranks ascend from best to worst; what is not in the window comes last, also behind a real
    # element of the worst rank, which precedes it.
    keys = jnp.where((window & sign) != 0, ~window & full, window | sign)
    ranks = jnp.where(column["smallest"], keys, full - keys)
    ranks = jnp.where(is_inside, ranks, np.uint32(0xFFFFFFFF))
    _, order = lax.sort((ranks, place), dimension=1, num_keys=1, is_stable=True)

    slot = lax.broadcasted_iota(jnp.int32, (rows, class_k), 1)
    is_named = slot < jnp.minimum(length, column["k"])
    best_first = jnp.where(is_named, order[:, :class_k], -1)
    ascending = lax.sort(jnp.where(is_named, best_first, _INT32_MAX), dimension=1)
    ascending = jnp.where(ascending == _INT32_MAX, -1, ascending)
    wanted_indices = jnp.where(column["is_sorted"], best_first, ascending)
    worst = jnp.where(column["smallest"], scalars["infinity"], scalars["infinity"] | sign)
    chosen = jnp.take_along_axis(window, jnp.maximum(wanted_indices, 0), axis=1)
    wanted_values = jnp.where(is_named, chosen, worst)

    is_wanted = slot < column["k"]
    source = jnp.where(is_wanted, column["out_offset"] + slot, 0)
    wrong_indices = (is_wanted & (indices[source] != wanted_indices)).any(1)
    wrong_values = is_wanted & (values[source].astype(jnp.uint32) != wanted_values)
    wrong_values = (wrong_values & column["has_values"]).any(1)
    flags = jnp.where(wrong_indices, WRONG_INDICES, 0) + jnp.where(wrong_values, WRONG_VALUES, 0)

    values_poison, indices_poison = scalars["poison"]
    values_guard = _guard(
        values != values_poison.astype(values.dtype), scalars["begins"], scalars["value_ends"]
    )
    indices_guard = _guard(
        indices != lax.bitcast_convert_type(indices_poison, jnp.int32),
        scalars["begins"],
        scalars["ends"],
    )

    # Whole rows, for an oracle that clamps for itself.
    sample = scalars["sample"]
    column_of_row = jnp.arange(class_width, dtype=jnp.int32)[None]
    row_place = jnp.where(column_of_row < width, row_begin[sample] + column_of_row, 0)
    return (
        flags,
        values_guard,
        indices_guard,
        _digest(operand) == digest,
        operand[row_place],
        wanted_values[sample],
        wanted_indices[sample],
    )


def _guard(is_written: Array, begins: Array, ends: Array) -> Array:
    """How many elements outside the launches' results were written, and the first: `[2]` int32."""
    place = jnp.arange(is_written.size, dtype=jnp.int32)
    launch = jnp.searchsorted(begins, place, side="right", method="scan_unrolled") - 1
    is_result = (launch >= 0) & (place < ends[jnp.maximum(launch, 0)])
    is_bad = is_written & ~is_result
    return jnp.stack([is_bad.sum(dtype=jnp.int32), jnp.argmax(is_bad).astype(jnp.int32)])
