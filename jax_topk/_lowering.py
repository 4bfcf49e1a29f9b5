"""From the primitive to what runs: an FFI target of `cpu` or `cuda`, or the XLA expression.

The choice is made inside the lowering rule, by platform, dtype and k: a handler that meets a dtype
it does not know could only fail at run time. A forced implementation that cannot serve raises
`RuntimeError` and is never replaced.

Three attributes let XLA keep sharded rows where they are, with no communication (the set that JAX's
own linear algebra uses): the target is registered as batch-partitionable (`_native`), the frontend
attribute `num_batch_dims` tells GSPMD how many leading dimensions are independent, and
`sdy.sharding_rule` tells Shardy. The XLA expression is written so that it needs none.
"""

from __future__ import annotations

import contextvars
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import mlir

from jax_topk import _native
from jax_topk._primitive import jax_topk_p, split_operands
from jax_topk._reference import reference_top_k

__all__ = ["IMPLEMENTATIONS", "KERNEL_DTYPES", "choose", "is_lowering_expression", "why_not"]

IMPLEMENTATIONS = ("cuda", "cpu", "xla")
KERNEL_DTYPES = ("float32", "bfloat16", "float16")

_INT32_MAX = np.iinfo(np.int32).max
_MAX_CONSTANT_ROWS = 1 << 16


_is_lowering_expression = contextvars.ContextVar("jax_topk_is_lowering_expression", default=False)


def is_lowering_expression() -> bool:
    """Whether the XLA expression is being lowered: what it is made of must stay XLA's."""
    return _is_lowering_expression.get()


def why_not(implementation: str, dtype: Any, k: Any) -> str | None:
    """Returns a sentence saying why a native implementation cannot serve, or None if it can.

    Args:
        implementation: `"cuda"` or `"cpu"`.
        dtype: dtype of the operand.
        k: number of results; may be symbolic.
    """
    problem = _native.machine_problem(implementation)
    if problem is not None:
        return problem
    return _why_not_served(implementation, dtype, k)


def _why_not_served(implementation: str, dtype: Any, k: Any) -> str | None:
    """Returns a sentence saying why the arguments are beyond a kernel, or None if they are not."""
    if np.dtype(dtype).name not in KERNEL_DTYPES:
        return (
            f"operand has dtype {np.dtype(dtype).name} and the {implementation} target takes"
            f" {', '.join(KERNEL_DTYPES)}; convert the operand, or use implementation='xla'"
        )
    if implementation == "cuda" and not (isinstance(k, int) and k <= _native.MAX_K):
        return (
            f"k={k} exceeds {_native.MAX_K}, the largest k of the cuda target; pass a smaller k,"
            " or use implementation='xla'"
        )
    return None


def choose(platform: str, dtype: Any, k: Any, implementation: str | None) -> str:
    """Returns the implementation that serves: `"cuda"`, `"cpu"` or `"xla"`.

    Args:
        platform: the platform that is lowered for, as JAX names it: `"cpu"`, `"cuda"`, `"tpu"`, ...
        dtype: dtype of the operand.
        k: number of results; may be symbolic.
        implementation: the forced one, or None.

    Raises:
        RuntimeError: the forced implementation cannot serve.
    """
    if implementation is None:
        is_native = platform in ("cpu", "cuda") and why_not(platform, dtype, k) is None
        return platform if is_native else "xla"
    if implementation == "xla":
        return "xla"
    if implementation != platform:
        raise RuntimeError(
            f"implementation={implementation!r} was forced, but this computation is compiled for"
            f" platform {platform!r}; {_how_to_reach(implementation)}, or leave implementation=None"
        )
    problem = why_not(implementation, dtype, k)
    if problem is not None:
        raise RuntimeError(
            f"implementation={implementation!r} was forced and cannot serve: {problem}"
        )
    return implementation


def _how_to_reach(implementation: str) -> str:
    if implementation == "cpu":
        return "place the operand on a CPU device (`jax.device_put(x, jax.devices('cpu')[0])`)"
    return (
        "place the operand on an NVIDIA GPU (which needs a jaxlib with CUDA: `pip install"
        " 'jax[cuda13]'`)"
    )


def _lower_for(platform: str | None) -> Callable[..., Sequence[Any]]:
    """Returns the lowering rule for one platform; None is the rule for all others."""

    def rule(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Sequence[Any]:
        name = platform or ",".join(ctx.platforms or ctx.module_context.platforms)
        dtype, k = ctx.avals_in[0].dtype, params["k"]
        chosen = choose(name, dtype, k, implementation)
        if chosen == "xla":
            if implementation is None and platform is not None:
                _warn_of_missing_kernels(platform, dtype, k)
            return _lower_to_xla(ctx, operands, params, platform)
        return _lower_to_target(ctx, operands, params)

    return rule


# Platforms whose missing kernels were reported: once for the process.
_reported: set[str] = set()


def _warn_of_missing_kernels(platform: str, dtype: Any, k: Any) -> None:
    """Warns where a kernel would serve, if this machine could use it: the expression is slower."""
    problem = _native.machine_problem(platform)
    if problem is None or platform in _reported or _why_not_served(platform, dtype, k) is not None:
        return
    _reported.add(platform)
    warnings.warn(
        f"jax_topk: on platform {platform!r} the XLA expression serves top_k, with the same results"
        f" but slower, since {problem}. To silence this, pass implementation='xla'",
        RuntimeWarning,
        stacklevel=2,
    )


def _lower_to_xla(
    ctx: Any, operands: Sequence[Any], params: dict[str, Any], platform: str | None
) -> Sequence[Any]:
    def expression(*args: jax.Array) -> list[jax.Array]:
        operand, starts, lengths = split_operands(args, params["has_starts"], params["has_lengths"])
        return reference_top_k(
            operand,
            starts,
            lengths,
            k=params["k"],
            smallest=params["smallest"],
            sorted=params["sorted"],
            indices_only=params["indices_only"],
            by_sort=platform != "cpu" or _may_be_partitioned(ctx),
        )

    from jax_topk.install import is_installed  # which imports this module

    if is_installed():
        # Without what JAX has lowered already and reuses: the same operation becomes a kernel
        # outside of the expression and must not become one inside, nor the other way round.
        own_caches = ctx.module_context.replace(lowering_cache={}, cached_primitive_lowerings={})
        ctx = ctx.replace(module_context=own_caches)
    token = _is_lowering_expression.set(True)
    try:
        return mlir.lower_fun(expression, multiple_results=True)(ctx, *operands)
    finally:
        _is_lowering_expression.reset(token)


def _may_be_partitioned(ctx: Any) -> bool:
    """Whether XLA may split this computation's rows over several devices."""
    axis_context = ctx.module_context.axis_context
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    if isinstance(axis_context, mlir.SPMDAxisContext):  # inside shard_map
        mesh = axis_context.mesh
        return any(
            size > 1 for axis, size in mesh.shape.items() if axis not in axis_context.manual_axes
        )
    return False


def _lower_to_target(ctx: Any, operands: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """Emits the custom call: operand, starts and lengths, to values (if wanted) and indices."""
    operand, starts, lengths = split_operands(operands, params["has_starts"], params["has_lengths"])
    operand_aval = ctx.avals_in[0]
    counts_aval = operand_aval.update(
        shape=operand_aval.shape[:-1],
        dtype=np.dtype(np.int32),
        sharding=operand_aval.sharding.update(spec=jax.P(*operand_aval.sharding.spec[:-1])),
    )
    # Any start below 0 means 0, and any length beyond the row means its end.
    starts = _absent_counts(ctx, counts_aval, (-1, -2)) if starts is None else starts
    lengths = (
        _absent_counts(ctx, counts_aval, (_INT32_MAX, _INT32_MAX - 1))
        if lengths is None
        else lengths
    )
    indices_only = params["indices_only"]
    target = _native.TARGET_INDICES if indices_only else _native.TARGET_VALUES_INDICES
    ctx = ctx.replace(avals_in=[operand_aval, counts_aval, counts_aval])
    rule = jax.ffi.ffi_lowering(target, extra_attributes=_partitioning_attributes(ctx))
    results = rule(
        ctx,
        operand,
        starts,
        lengths,
        smallest=params["smallest"],
        sorted=params["sorted"] and not indices_only,
        plan=params["plan"],
    )
    return _pin_explicit_shardings(ctx, results)


def _pin_explicit_shardings(ctx: Any, results: Sequence[Any]) -> Sequence[Any]:
    """Constrains results to the shardings in their types, as JAX's own rules do in explicit mode.

    Where no mesh axis is explicit, the partitioner decides, and the program stays as it is.
    """
    avals = ctx.avals_out
    if jax.sharding.AxisType.Explicit not in avals[0].sharding.mesh.axis_types:
        return results

    def pin(*values: jax.Array) -> list[jax.Array]:
        return [
            jax.sharding.reshard(x, aval.sharding) for x, aval in zip(values, avals, strict=True)
        ]

    return mlir.lower_fun(pin, multiple_results=True)(ctx.replace(avals_in=avals), *results)


def _absent_counts(ctx: Any, aval: Any, two_values: tuple[int, int]) -> Any:
    """An int32 `[*batch]` operand for an argument that the caller left out.

    The values alternate between two that the target clamps to the same window. XLA turns a uniform
    constant into a broadcast, which on a GPU is a kernel in front of every call; a constant that is
    not uniform stays in memory and costs nothing.
    """
    num_rows = math.prod(aval.shape) if all(isinstance(d, int) for d in aval.shape) else None
    if num_rows is not None and num_rows <= _MAX_CONSTANT_ROWS:
        values = np.resize(np.array(two_values, np.int32), num_rows).reshape(aval.shape)
        return mlir.ir_constant(values)
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    value = np.int32(two_values[0])
    broadcast = mlir.lower_fun(
        lambda: lax.broadcast_in_dim(value, aval.shape, (), out_sharding=sharding),
        multiple_results=False,
    )
    (result,) = broadcast(ctx.replace(avals_in=[]))
    return result


def _partitioning_attributes(ctx: Any) -> dict[str, Any] | None:
    """Attributes under which the batch dimensions are partitioned without communication."""
    shapes_in = [aval.shape for aval in ctx.avals_in]
    shapes_out = [aval.shape for aval in ctx.avals_out]
    if not all(isinstance(size, int) for shape in (*shapes_in, *shapes_out) for size in shape):
        return None  # symbolic shapes cannot be written into the rule
    attributes = {
        "mhlo.frontend_attributes": mlir.ir_attribute(
            {"num_batch_dims": str(len(shapes_in[0]) - 1)}
        )
    }
    if getattr(jax.config, "jax_use_shardy_partitioner", True):
        attributes["sdy.sharding_rule"] = mlir.ir.Attribute.parse(
            sharding_rule(shapes_in, shapes_out)
        )
    return attributes


def sharding_rule(
    shapes_in: Sequence[tuple[int, ...]], shapes_out: Sequence[tuple[int, ...]]
) -> str:
    """The text of `sdy.sharding_rule`: batch dimensions are shared, width and k stand alone.

    For a batch of two dimensions `([i, j, k], [i, j], [i, j])->([i, j, l], [i, j, l])`. Shardy
    names factors i, j, ..., z, z_1, z_2, ... in the order of their first use.

    Args:
        shapes_in: of operand `[*batch, width]`, starts and lengths `[*batch]`.
        shapes_out: of the results `[*batch, k]`.
    """
    batch = shapes_in[0][:-1]
    sizes = (*batch, shapes_in[0][-1], shapes_out[0][-1])
    names = [_factor_name(i) for i in range(len(sizes))]
    batch_names, width_name, k_name = names[: len(batch)], names[-2], names[-1]

    def dims(*own: str) -> str:
        return f"[{', '.join([*batch_names, *own])}]"

    operands = ", ".join([dims(width_name), *[dims() for _ in shapes_in[1:]]])
    results = ", ".join(dims(k_name) for _ in shapes_out)
    factors = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    return f"#sdy.op_sharding_rule<({operands})->({results}) {{{factors}}}, custom>"


def _factor_name(index: int) -> str:
    num_letters = ord("z") - ord("i") + 1
    if index < num_letters:
        return chr(ord("i") + index)
    return f"z_{index - num_letters + 1}"


mlir.register_lowering(jax_topk_p, _lower_for(None))
mlir.register_lowering(jax_topk_p, _lower_for("cpu"), platform="cpu")
mlir.register_lowering(jax_topk_p, _lower_for("cuda"), platform="cuda")
