"""Errors for a selection axis that is sharded, and the opt-in check where JAX hides the sharding.

A row of which each device holds a part has no local top-k. JAX shows the sharding of an axis in
three places, and there the check is free: in the type of the operand (explicit mode), in an eager
array, and inside `shard_map`, where the row is local by construction. Under `jit` with automatic
axes the sharding is decided after tracing, and XLA gathers the rows, as it does for `lax.top_k`.

Only a partitioning callback sees that decision. With `check_selection_axis` on, the operand passes
through an identity with such a callback, which raises instead of letting XLA gather. Its costs: a
program that holds a Python callback while it is partitioned is compiled anew by every process (the
address of the callback is part of its key in the persistent compilation cache) and cannot be
exported for several devices. Nothing of it is left in the compiled program.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.custom_batching
from jax.experimental.custom_partitioning import custom_partitioning

from jax_topk._primitive import spec_of

try:
    from jax._src.core import ShardingTypeError as _ShardingTypeError
except ImportError:  # pragma: no cover - a JAX that moved the class

    class _ShardingTypeError(Exception):  # type: ignore[no-redef]
        pass


__all__ = [
    "ENVIRONMENT_VARIABLE",
    "ShardedAxisError",
    "check_selection_axis",
    "is_check_enabled",
    "raise_if_sharded",
    "with_partitioning_check",
]

ENVIRONMENT_VARIABLE = "JAX_TOPK_CHECK_SELECTION_AXIS"

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "jax_topk_check_selection_axis",
    default=os.environ.get(ENVIRONMENT_VARIABLE, "").lower() not in ("", "0", "false", "off"),
)


class ShardedAxisError(ValueError, _ShardingTypeError):
    """The axis along which top-k is taken is sharded over several devices.

    A `ValueError` by this package's contract, and a `ShardingTypeError` as `jax.lax.top_k` raises.
    """


def _message(axis: int | None, mesh_axes: Any) -> str:
    which = "the selection axis" if axis is None else f"axis {axis}"
    names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
    over = ", ".join(map(repr, names))
    return (
        "The input should be unsharded over the axis along which to compute the top_k values:"
        f" {which} of operand is sharded over mesh axis {over}, so no device holds a whole row."
        " Inside `jax.shard_map`, select locally and merge with `jax_topk.sharded_top_k` (or with"
        " `jax_topk.merge_top_k` if you already have candidates); or gather the axis first with"
        " `jax.sharding.reshard`"
    )


def raise_if_sharded(operand: Any, aval: Any, axis: int) -> None:
    """Raises `ShardedAxisError` if JAX shows that `axis` is sharded over more than one device.

    Args:
        operand: array or tracer.
        aval: its type, `jax.typeof(operand)`.
        axis: the selection axis, not negative.
    """
    is_eager = isinstance(operand, jax.Array) and not isinstance(operand, jax.core.Tracer)
    if is_eager and len(operand.sharding.device_set) == 1:
        return
    mesh_axes = spec_of(aval)[axis]
    if mesh_axes is not None:
        raise ShardedAxisError(_message(axis, mesh_axes))
    if not is_eager:
        return
    sharding = operand.sharding
    if sharding.shard_shape(operand.shape)[axis] != operand.shape[axis]:
        if isinstance(sharding, jax.sharding.NamedSharding):
            mesh_axes = sharding.spec[axis]
        else:
            mesh_axes = f"{sharding}"
        raise ShardedAxisError(_message(axis, mesh_axes))


def is_check_enabled() -> bool:
    """Whether calls traced now check a selection axis that is sharded over automatic mesh axes."""
    return _enabled.get()


@contextlib.contextmanager
def check_selection_axis(enabled: bool = True) -> Iterator[None]:
    """Raises at partitioning, instead of gathering, where the selection axis is sharded.

    Under `jax.jit` with automatic mesh axes JAX does not show the sharding of an axis, and XLA
    gathers a row that is spread over devices, as it does for `jax.lax.top_k`. Functions traced
    inside this context raise when they are compiled in that situation; with the environment
    variable `JAX_TOPK_CHECK_SELECTION_AXIS=1` set before import, so do all. Functions that were
    traced before keep what they had: call `jax.clear_caches()` first.

    The check puts a Python callback into the program until it is partitioned. Every process
    therefore compiles it anew, since the persistent compilation cache does not recognise it (seen
    on jax 0.10.2 and 0.12.0), and it cannot be exported for several devices. At run time it adds
    nothing.

    Args:
        enabled: False switches the check off inside an outer context or against the environment.
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


@jax.custom_jvp
def with_partitioning_check(rows: jax.Array) -> jax.Array:
    """Returns `rows`, `[*batch, width]`, checked when XLA partitions the program.

    An identity for vmap and differentiation. Three public transformations stack up, since
    `custom_partitioning` has rules for neither.
    """
    return _batchable_identity(rows)


@with_partitioning_check.defjvp
def _identity_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    return with_partitioning_check(*primals), tangents[0]


@jax.custom_batching.custom_vmap
def _batchable_identity(rows: jax.Array) -> jax.Array:
    return _partitioned_identity(rows)


@_batchable_identity.def_vmap
def _identity_vmap(axis_size: int, in_batched: list[bool], rows: jax.Array) -> Any:
    # Batch dimensions come first, so the selection axis stays the last one.
    return _batchable_identity(rows), in_batched[0]


@custom_partitioning
def _partitioned_identity(rows: jax.Array) -> jax.Array:
    return rows


def _partition(mesh: Any, arg_shapes: Sequence[Any], result_shape: Any) -> Any:
    sharding = arg_shapes[0].sharding
    is_whole = sharding.shard_shape(arg_shapes[0].shape)[-1] == arg_shapes[0].shape[-1]
    if not is_whole:
        # Inside a shard_map over other axes JAX hands over a sharding without names.
        spec = getattr(sharding, "spec", None)
        raise ShardedAxisError(_message(None, spec[-1] if spec else f"{sharding}"))
    return mesh, lambda x: x, sharding, (sharding,)


_partitioned_identity.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda mesh, arg_shapes, result_shape: arg_shapes[0].sharding,
    sharding_rule="... k -> ... k",
)
