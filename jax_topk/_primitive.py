"""The one primitive of the package, `jax_topk`: abstract evaluation, batching, differentiation.

Operands are `operand [*batch, width]`, then `starts [*batch]` and `lengths [*batch]` (int32), of
which each is present only if the caller gave it: an absent one costs nothing, where an array of
constants would be one more kernel in front of the call. Results are `values [*batch, k]` (absent
for `indices_only`) and `indices [*batch, k]`.

The operand keeps its rank all the way down. Folding the batch to one dimension would make XLA
gather rows that are sharded over any but the leading dimension.

Lowering rules are in `_lowering`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from jax_topk._reference import gather_last

__all__ = ["bind", "jax_topk_p", "spec_of", "split_operands"]

jax_topk_p = Primitive("jax_topk")
jax_topk_p.multiple_results = True


def bind(
    operand: jax.Array,
    starts: jax.Array | None,
    lengths: jax.Array | None,
    *,
    k: int,
    smallest: bool,
    sorted: bool,
    indices_only: bool,
    implementation: str | None,
    plan: str,
) -> list[jax.Array]:
    """Binds the primitive, with all operands varying over the same manual mesh axes.

    Args:
        operand: `[*batch, width]`.
        starts: `[*batch]` int32, or None for 0.
        lengths: `[*batch]` int32, or None for "to the end of the row".
        k: static number of results, at most `width`.
        smallest: reverse order of values.
        sorted: best first; otherwise ascending index.
        indices_only: return `[indices]` alone.
        implementation: None, `"cuda"`, `"cpu"` or `"xla"`.
        plan: overrides of the CUDA kernel's launch plan.

    Returns:
        `[values, indices]` or `[indices]`, each `[*batch, k]`.
    """
    operands = [operand]
    operands += [] if starts is None else [starts]
    operands += [] if lengths is None else [lengths]
    return jax_topk_p.bind(
        *_match_varying_axes(operands),
        has_starts=starts is not None,
        has_lengths=lengths is not None,
        k=k,
        smallest=smallest,
        sorted=sorted,
        indices_only=indices_only,
        implementation=implementation,
        plan=plan,
    )


def split_operands(
    operands: Sequence[Any], has_starts: bool, has_lengths: bool
) -> tuple[Any, Any, Any]:
    """Returns `(operand, starts, lengths)` with None for the absent ones."""
    operand, *counts = operands
    starts = counts.pop(0) if has_starts else None
    lengths = counts.pop(0) if has_lengths else None
    return operand, starts, lengths


def _match_varying_axes(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts operands to vary over the union of their manual axes (inside `shard_map`)."""
    varying = [jax.typeof(x).mat.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        x if own == union else lax.pcast(x, tuple(sorted(union - own)), to="varying")
        for x, own in zip(operands, varying, strict=True)
    ]


def spec_of(aval: Any) -> tuple[Any, ...]:
    """The mesh axes over which each dimension of a type is sharded, as explicit mode shows them.

    Mesh axes of size 1 are left out: they shard nothing. Outside explicit mode every entry is None.
    """
    sharding = aval.sharding
    return tuple(_sharding_axes(entry, sharding.mesh.shape) for entry in sharding.spec)


def _sharding_axes(entry: Any, mesh_shape: Any) -> Any:
    """One entry of a `PartitionSpec`, reduced to the mesh axes that do shard, or None."""
    if entry is None:
        return None
    axes = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(axis for axis in axes if mesh_shape.get(axis, 1) > 1)
    return None if not kept else kept[0] if len(kept) == 1 else kept


def _abstract_eval(*avals: Any, k: int, indices_only: bool, **_: Any) -> list[Any]:
    operand = avals[0]
    shape = (*operand.shape[:-1], k)
    sharding = operand.sharding
    if len(sharding.spec) and sharding.spec[-1] is not None:
        # Reached only if the mesh axes named there have size 1; api.py raises for others.
        sharding = sharding.update(spec=jax.P(*sharding.spec[:-1], None))
    # `update` keeps varying axes, explicit sharding and, as `lax.top_k` does, the weak type.
    values = operand.update(shape=shape, sharding=sharding)
    indices = operand.update(shape=shape, dtype=np.dtype(np.int32), sharding=sharding)
    return [indices] if indices_only else [values, indices]


jax_topk_p.def_abstract_eval(_abstract_eval)


@functools.cache
def _compiled(**params: Any) -> Any:
    def jax_topk(*operands: jax.Array) -> list[jax.Array]:
        return jax_topk_p.bind(*operands, **params)

    # How JAX marks the compiled call of one primitive. Under `jax.debug_nans` it then raises
    # FloatingPointError, instead of looking for the NaN by another call of this function.
    jax_topk._apply_primitive = True  # type: ignore[attr-defined]
    return jax.jit(jax_topk)


def _impl(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    # Reached from `jax.core.eval_jaxpr` and under `jax.disable_jit`, where a compiled call is still
    # what one primitive means.
    with jax.disable_jit(False):
        return list(_compiled(**params)(*operands))


jax_topk_p.def_impl(_impl)


def _batch(
    axis_data: Any, operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int | None]]:
    """Moves every batch dimension to the front and binds again: the primitive takes any batch."""
    if all(dim is None for dim in dims):  # JAX asks here for unbatched operands too
        results = jax_topk_p.bind(*operands, **params)
        return results, [None] * len(results)
    at_front = [
        batching.bdim_at_front(x, dim, axis_data.size, axis_data.explicit_mesh_axis)
        for x, dim in zip(operands, dims, strict=True)
    ]
    results = jax_topk_p.bind(*_match_varying_axes(at_front), **params)
    return results, [0] * len(results)


batching.fancy_primitive_batchers[jax_topk_p] = _batch


def take_selected(operand: jax.Array, starts: jax.Array | None, indices: jax.Array) -> jax.Array:
    """Gathers what the indices of a result select, with 0 for padding.

    Args:
        operand: `[*batch, width]`.
        starts: `[*batch]` int32 as passed to the primitive (not yet clamped), or None.
        indices: `[*batch, k]`, counted from the clamped start, -1 for padding.

    Returns:
        `[*batch, k]`. Linear in `operand`: its transpose adds into zeros at the same positions.
    """
    if starts is not None:
        width = jnp.int32(operand.shape[-1])
        offset = jnp.clip(starts, 0, width)[..., None]
        # The branch of padding must not be computed as -1 + offset, which is inside the row.
        indices = jnp.where(indices < 0, indices, indices + offset)
    return gather_last(operand, indices, "fill")


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    results = jax_topk_p.bind(*primals, **params)
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    if params["indices_only"] or type(tangents[0]) is ad.Zero:
        return results, zeros
    _, starts, _ = split_operands(primals, params["has_starts"], params["has_lengths"])
    return results, [take_selected(tangents[0], starts, results[1]), zeros[1]]


ad.primitive_jvps[jax_topk_p] = _jvp


def _eliminate_dead_values(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Drops unused values: XLA cannot drop one result of a custom call, so it is another call.

    With `sorted=True` the indices still follow the order of the values, which have to be written.
    """
    eqn = rest[-1]  # newer versions of JAX pass which inputs are live before it
    if not any(used):
        return [False] * len(eqn.invars), None
    if list(used) == [False, True] and not eqn.params["sorted"]:
        eqn = eqn.replace(outvars=eqn.outvars[1:], params={**eqn.params, "indices_only": True})
    return [True] * len(eqn.invars), eqn


pe.dce_rules[jax_topk_p] = _eliminate_dead_values
