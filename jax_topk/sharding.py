"""Top-k of rows that are spread over devices: local selection, exchange of candidates, selection.

Rows that each lie on one device need nothing from here: `top_k` partitions over them without any
communication. When one row is sharded over D devices, its k best are among the k best of each
device, so the exchange moves candidates, never the row. Per row and device, with one mesh axis:

    select     the k best of the local block, in ascending order of index
    exchange   one all-gather of k values and k indices: each device sends k * (size of a value + 4)
               bytes and ends with D times as many
    select     the k best of the D * k candidates

With several mesh axes the exchange is staged, innermost axis first: after each stage only k
candidates are left, so with axes of sizes A (outer) and B (inner) (A + B) * k candidates arrive
instead of A * B * k. Name the axis with the fastest links last.

Ties go to the lowest global index because candidates stand in ascending order of index whenever a
selection is made: equal values are then taken by position. Padding is moved behind the valid
candidates and cut off by its count, never recognised by its value, so rows that hold real -inf or
NaN are exact too.

Both functions run inside `jax.shard_map` and return results that are replicated over `axis_name`,
also in the types of `check_vma=True`. (An axis that `jax.vmap(..., axis_name=...)` names will do as
well, to try things out on one device.) They are differentiable in the values: the cotangent of a
selected value goes to the device that holds it, without communication.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_topk._reference import gather_last, positions_like, worst_value
from jax_topk.api import Implementation, Mode, _as_counts, _check_counts, _check_dtype, top_k

__all__ = ["merge_top_k", "sharded_top_k"]

AxisName = Hashable | Sequence[Hashable]

_INT32_MAX = np.iinfo(np.int32).max


def sharded_top_k(
    operand: ArrayLike,
    k: int,
    *,
    axis_name: AxisName,
    lengths: ArrayLike | None = None,
    row_starts: ArrayLike | None = None,
    mode: Mode = "largest",
    implementation: Implementation | None = None,
) -> list[jax.Array]:
    """Top-k along the last axis of rows that are sharded over `axis_name`, inside `shard_map`.

    Every device receives what `top_k(row, k, lengths=..., row_starts=..., sorted=True)` returns for
    the whole row, bit for bit: the same values, indices, ties and padding.

    Args:
        operand: `[*batch, n_local]`, this device's block of each row. The row is the concatenation
            of the blocks in the order of `jax.lax.axis_index(axis_name)`, `n = D * n_local` wide.
            For rows that do not divide evenly, pad and pass `lengths`.
        k: number of results, static, `0 <= k <= n`.
        axis_name: mesh axis or axes over which the last axis of the rows is sharded, outermost
            first, as in a `PartitionSpec` entry.
        lengths: integers broadcastable to `[*batch]`: length of each *whole* row's window.
        row_starts: integers broadcastable to `[*batch]`: start of each *whole* row's window.
        mode: `"largest"` or `"smallest"`.
        implementation: as for `top_k`; used for every selection.

    Returns:
        `[values, indices]`, each `[*batch, k]`, replicated over `axis_name`. Indices count from
        the clamped start of the whole row's window.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_topk import sharded_top_k
        >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",))
        >>> select = jax.shard_map(
        ...     lambda row: sharded_top_k(row, 2, axis_name="seq"),
        ...     mesh=mesh, in_specs=jax.P("seq"), out_specs=jax.P(),
        ... )
        >>> row = jnp.arange(16.0 * jax.device_count()) % 5
        >>> row = jax.device_put(row, jax.NamedSharding(mesh, jax.P("seq")))
        >>> values, indices = jax.jit(select)(row)
        >>> print(values, indices)
        [4. 4.] [4 9]
    """
    axes = _axis_names(axis_name)
    aval = _operand_type("operand", operand)
    if aval.ndim == 0:
        raise ValueError(
            "operand is a scalar; pass this device's block, of shape [*batch, n_local]"
        )
    local_width = aval.shape[-1]
    num_devices = math.prod(lax.axis_size(axis) for axis in axes)
    width = local_width * num_devices
    if width > _INT32_MAX:
        raise ValueError(
            f"the whole row is {width} wide ({num_devices} devices x {local_width}), which int32"
            f" indices cannot count (at most {_INT32_MAX}); split the row"
        )
    k = _check_k(k, width)
    operand = jnp.asarray(operand)
    if lengths is not None:
        checked = _check_counts("lengths", lengths, aval.shape, aval.ndim - 1)
        lengths = _as_counts("lengths", jnp.asarray(checked), operand)
    if row_starts is not None:
        checked = _check_counts("row_starts", row_starts, aval.shape, aval.ndim - 1)
        row_starts = _as_counts("row_starts", jnp.asarray(checked), operand)

    offset = lax.axis_index(axes) * local_width
    has_window = lengths is not None or row_starts is not None
    if has_window:
        start = jnp.int32(0) if row_starts is None else jnp.clip(row_starts, 0, width)
        room = width - start
        end = start + (room if lengths is None else jnp.clip(lengths, 0, room))
        local_start = jnp.clip(start - offset, 0, local_width)
        local_end = jnp.clip(end - offset, 0, local_width)
        values, indices = top_k(
            operand,
            min(k, local_width),
            lengths=local_end - local_start,
            row_starts=local_start,
            mode=mode,
            sorted=False,
            implementation=implementation,
        )
        shift = (offset + local_start - start)[..., None]
        indices = jnp.where(indices < 0, indices, indices + shift)
    else:
        values, indices = top_k(
            operand, min(k, local_width), mode=mode, sorted=False, implementation=implementation
        )
        indices = indices + offset
    return _exchange(
        values,
        indices,
        k,
        axes,
        may_hold_padding=has_window,
        mode=mode,
        implementation=implementation,
    )


def merge_top_k(
    values: ArrayLike,
    indices: ArrayLike,
    k: int,
    *,
    axis_name: AxisName,
    mode: Mode = "largest",
) -> list[jax.Array]:
    """Merges each device's candidates into the top-k of the whole row, inside `shard_map`.

    For candidates that something else than `sharded_top_k` produced: a kernel of one's own, an
    index structure, blocks that are not contiguous. Each device passes its own candidates, in any
    order; every device receives the same result, as `top_k(sorted=True)` of the whole row: ties to
    the lowest global index, fewer than `k` valid candidates in all padded with index -1 and the
    worst value of the mode. The result is that of the whole row if each device's candidates contain
    the best `k` of its part.

    Args:
        values: `[*batch, m]`, any real dtype.
        indices: `[*batch, m]` integers, the **global** index of each candidate; negative marks
            padding, whose value is ignored. No global index may occur twice.
        k: number of results, static, `k >= 0`.
        axis_name: mesh axis or axes to merge over, outermost first; the exchange is staged,
            innermost first.
        mode: `"largest"` or `"smallest"`.

    Returns:
        `[values, indices]`, each `[*batch, k]`, replicated over `axis_name`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_topk import merge_top_k, top_k
        >>> num_devices = jax.device_count()
        >>> mesh = jax.make_mesh((num_devices,), ("seq",))
        >>> def select(block):  # device d holds the elements d, d + D, d + 2 D, ...
        ...     values, indices = top_k(block, 2)
        ...     indices = indices * num_devices + jax.lax.axis_index("seq")
        ...     return merge_top_k(values, indices, 2, axis_name="seq")
        >>> merge = jax.shard_map(select, mesh=mesh, in_specs=jax.P("seq"), out_specs=jax.P())
        >>> row = jnp.arange(4.0 * num_devices)
        >>> dealt = row.reshape(4, num_devices).T.reshape(-1)
        >>> dealt = jax.device_put(dealt, jax.NamedSharding(mesh, jax.P("seq")))
        >>> values, indices = jax.jit(merge)(dealt)
        >>> print(values - row[indices], indices - row.size)
        [0. 0.] [-1 -2]
    """
    axes = _axis_names(axis_name)
    aval = _operand_type("values", values)
    index_aval = _operand_type("indices", indices)
    if not jnp.issubdtype(index_aval.dtype, jnp.integer):
        raise TypeError(f"indices has dtype {index_aval.dtype}; pass integers")
    if aval.ndim == 0 or aval.shape != index_aval.shape:
        raise ValueError(
            f"values has shape {aval.shape} and indices {index_aval.shape}; pass two arrays of one"
            " shape [*batch, m]"
        )
    values, indices = _by_ascending_index(jnp.asarray(values), jnp.asarray(indices))
    num_devices = math.prod(lax.axis_size(axis) for axis in axes)
    k = _check_k(k, None)
    width = aval.shape[-1] * num_devices
    merged = _exchange(
        values,
        indices,
        min(k, width),
        axes,
        may_hold_padding=True,
        mode=mode,
        implementation=None,
        are_blocks_ordered=False,
    )
    if k <= width:
        return merged
    worst = worst_value(aval.dtype, mode == "smallest")
    return [
        _pad_last(x, k - width, fill) for x, fill in zip(merged, (worst, np.int32(-1)), strict=True)
    ]


def _exchange(
    values: jax.Array,
    indices: jax.Array,
    k: int,
    axes: Sequence[Hashable],
    *,
    may_hold_padding: bool,
    mode: Mode,
    implementation: Implementation | None,
    are_blocks_ordered: bool = True,
) -> list[jax.Array]:
    """Gathers candidates over one axis after another and selects after each.

    Args:
        values: `[*batch, m]` candidates of this device, in ascending order of index, padding last.
        indices: `[*batch, m]` int32, global; -1 for padding.
        k: number of results, at most the number of all candidates.
        axes: mesh axes, outermost first.
        may_hold_padding: whether an index may be -1.
        mode: of the selection.
        implementation: of the selection.
        are_blocks_ordered: whether all indices of a device lie below those of the next one.

    Returns:
        `[values, indices]`, each `[*batch, k]`, best first.
    """
    if k == 0 or values.size == 0:
        return [_empty_result(x, k, axes) for x in (values, indices)]
    for stage, axis in enumerate(reversed(axes)):
        is_last = stage == len(axes) - 1
        block_width = values.shape[-1]
        values, indices = _gather_candidates(values, indices, axis)
        if not are_blocks_ordered:
            values, indices = _by_ascending_index(values, indices)
        elif may_hold_padding:
            values, indices = _compact(values, indices, block_width)
        count = jnp.sum(indices >= 0, axis=-1, dtype=np.int32) if may_hold_padding else None
        values, positions = top_k(
            values,
            min(k, values.shape[-1]),
            lengths=count,
            mode=mode,
            sorted=is_last,
            implementation=implementation,
        )
        indices = _take_indices(indices, positions)
    return [values, indices]


def _empty_result(x: jax.Array, k: int, axes: Sequence[Hashable]) -> jax.Array:
    """A `[*batch, k]` array without elements (a collective of nothing is not legal)."""
    empty = jnp.zeros((*x.shape[:-1], k), x.dtype)
    varying = jax.typeof(x).mat.varying - set(axes)
    return lax.pcast(empty, tuple(sorted(varying)), to="varying") if varying else empty


def _gather_candidates(
    values: jax.Array, indices: jax.Array, axis: Hashable
) -> tuple[jax.Array, jax.Array]:
    """Concatenates the candidates of all devices of one mesh axis, with a single all-gather.

    A collective of so few bytes costs its latency, so values and indices travel in one array. The
    values travel as integers: XLA may widen 16-bit floats for an exchange, which quiets NaNs.

    Args:
        values: `[*batch, m]` of this device.
        indices: `[*batch, m]` int32 of this device.
        axis: a mesh axis of D devices.

    Returns:
        `[*batch, D * m]` values and indices, in the order of the devices.
    """
    if not _is_packable(values.dtype):
        return _all_gather(values, axis), _all_gather(indices, axis)
    gathered = _all_gather(_pack(values, indices), axis, stacked=True)
    all_values, all_indices = map(_join_blocks, _unpack(gathered, values, indices))
    return _differentiable_as_gather(all_values, values, axis), all_indices


def _is_packable(dtype: Any) -> bool:
    """Whether values have integers of their own size to travel in; others take two collectives."""
    return dtype != np.bool_ and np.dtype(dtype).itemsize * 8 == _num_bits(dtype)


def _pack(values: jax.Array, indices: jax.Array) -> jax.Array:
    """The bits of both, `[*batch, m]` each, in one array `[*batch, units]` of unsigned integers."""
    unit = min(values.dtype.itemsize, indices.dtype.itemsize)
    return jnp.concatenate([_to_units(values, unit), _to_units(indices, unit)], axis=-1)


def _unpack(
    packed: jax.Array, values: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_pack`, with types and last axis as those of `values` and `indices`."""
    num_units = values.shape[-1] * values.dtype.itemsize // packed.dtype.itemsize
    return (
        _from_units(packed[..., :num_units], values.dtype),
        _from_units(packed[..., num_units:], indices.dtype),
    )


def _num_bits(dtype: Any) -> int:
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return int(info(dtype).bits)


def _to_units(x: jax.Array, unit: int) -> jax.Array:
    """The bits of `[*batch, m]` as unsigned integers of `unit` bytes: `[*batch, m * units]`."""
    bits = lax.bitcast_convert_type(x, np.dtype(f"uint{8 * unit}"))
    return bits.reshape(*x.shape[:-1], -1)


def _from_units(bits: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_to_units`."""
    units = np.dtype(dtype).itemsize // bits.dtype.itemsize
    if units > 1:
        bits = bits.reshape(*bits.shape[:-1], -1, units)
    return lax.bitcast_convert_type(bits, dtype)


def _join_blocks(x: jax.Array) -> jax.Array:
    """`[D, *batch, m]` to `[*batch, D * m]`."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _differentiable_as_gather(gathered: jax.Array, x: jax.Array, axis: Hashable) -> jax.Array:
    """Returns `gathered`, with the derivative of an all-gather of `x` over `axis`."""
    del x, axis
    return gathered


@_differentiable_as_gather.defjvp
def _differentiable_as_gather_jvp(
    axis: Hashable, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    return _differentiable_as_gather(*primals, axis), _all_gather(tangents[1], axis)


def _all_gather(x: jax.Array, axis: Hashable, *, stacked: bool = False) -> jax.Array:
    """Gathers `[*batch, m]` over the devices of one mesh axis: to `[*batch, D * m]`, or stacked.

    Stacked, `[D, *batch, m]`, is what a collective writes without a transposition.
    """
    is_manual = axis in jax.sharding.get_abstract_mesh().manual_axes  # else an axis of vmap
    if is_manual and axis not in jax.typeof(x).mat.varying:
        # Nothing changes under check_vma=False, where no type varies.
        x = lax.pcast(x, (axis,), to="varying")
    is_typed = axis in jax.typeof(x).mat.varying
    # An axis made here, not by tiled=False: that one loses the sharding of an explicit batch axis.
    gathered: jax.Array = lax.all_gather(
        x[None] if stacked else x,
        axis,
        axis=0 if stacked else x.ndim - 1,
        tiled=True,
        to="invarying" if is_typed else "varying",
    )
    return gathered


def _compact(
    values: jax.Array, indices: jax.Array, block_width: int
) -> tuple[jax.Array, jax.Array]:
    """Moves the valid entries of all blocks to the front; each block has its own at its front.

    One gather. Its indices cost a comparison per place and block, which XLA fuses into it.

    Args:
        values: `[*batch, num_blocks * block_width]`.
        indices: the same shape, -1 for padding.
        block_width: entries per block.
    """
    batch = indices.shape[:-1]
    is_present = (indices >= 0).reshape(*batch, -1, block_width)
    counts = jnp.sum(is_present, axis=-1, dtype=np.int32)  # [*batch, num_blocks]
    ends = jnp.cumsum(counts, axis=-1, dtype=np.int32)
    place = positions_like(indices)
    # An entry moves by the gaps at the ends of the blocks in front of its own.
    is_behind = place[..., :, None] >= ends[..., None, :]  # [*batch, place, block]
    gaps = block_width - counts
    shift = jnp.sum(jnp.where(is_behind, gaps[..., None, :], 0), axis=-1, dtype=np.int32)
    is_valid = place < ends[..., -1:]
    source = jnp.where(is_valid, place + shift, 0)
    return (
        gather_last(values, source, "promise_in_bounds"),
        jnp.where(is_valid, gather_last(indices, source, "promise_in_bounds"), -1),
    )


def _by_ascending_index(values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts candidates by index, padding last, with -1 as its index."""
    indices = indices.astype(np.int32)
    order = jnp.where(indices < 0, _INT32_MAX, indices)
    operands = (order, positions_like(order))
    order, permutation = lax.sort(operands, dimension=-1, is_stable=True, num_keys=1)
    return (
        gather_last(values, permutation, "promise_in_bounds"),
        jnp.where(order == _INT32_MAX, -1, order),
    )


def _take_indices(indices: jax.Array, positions: jax.Array) -> jax.Array:
    """Looks up the indices of selected positions; -1 stays -1."""
    found = gather_last(indices, jnp.maximum(positions, 0), "promise_in_bounds")
    return jnp.where(positions < 0, -1, found)


def _pad_last(x: jax.Array, num_more: int, fill: Any) -> jax.Array:
    config = [(0, 0, 0)] * (x.ndim - 1) + [(0, num_more, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), config)


def _axis_names(axis_name: AxisName) -> tuple[Hashable, ...]:
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not axes:
        raise ValueError("axis_name is empty; pass the mesh axes over which the rows are sharded")
    for axis in axes:
        try:
            lax.axis_size(axis)
        except NameError as error:
            raise NameError(
                f"axis_name={axis!r} is not bound; call this function inside jax.shard_map over a"
                f" mesh that has an axis {axis!r}"
            ) from error
    return axes


def _operand_type(name: str, x: Any) -> Any:
    try:
        aval = jax.typeof(x)
    except TypeError as error:
        raise TypeError(
            f"{name} has type {type(x).__name__}, which is not an array; pass a jax.Array"
        ) from error
    _check_dtype(aval.dtype)
    return aval


def _check_k(k: Any, width: int | None) -> int:
    try:
        k = operator.index(k)
    except TypeError as error:
        raise TypeError(f"k={k!r} has type {type(k).__name__}; pass a static integer") from error
    if k < 0:
        raise ValueError(f"k={k} is negative; pass 0 <= k")
    if width is not None and k > width:
        raise ValueError(f"k={k} exceeds the width {width} of the whole row; pass k <= {width}")
    return k
