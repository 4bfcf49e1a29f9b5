"""The public functions `top_k` and `top_k_indices`: validate, move the axis, bind the primitive.

Everything that can be wrong with an argument is found here, before anything is traced, and named in
the error: the argument, its value, the rule and the fix. What remains is one jitted function, so an
eager call costs one dispatch. Lengths and starts are run-time values of one int32 type, whatever
was passed, so that one trace and one compilation serve all of them.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_topk import _axis_check, _lowering
from jax_topk._primitive import bind, spec_of

__all__ = ["top_k", "top_k_indices"]

Mode = Literal["largest", "smallest"]
Implementation = Literal["cuda", "cpu", "xla"]

_MODES = ("largest", "smallest")
_INT32_MIN, _INT32_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def top_k(
    operand: ArrayLike,
    k: int,
    *,
    axis: int = -1,
    lengths: ArrayLike | None = None,
    row_starts: ArrayLike | None = None,
    mode: Mode = "largest",
    sorted: bool = True,
    is_stable: bool = True,
    implementation: Implementation | None = None,
    _plan: str = "",
) -> list[jax.Array]:
    """Returns the `k` best values and their indices along an axis: exact, stable, deterministic.

    Without `lengths` and `row_starts` it equals `jax.lax.top_k` bit for bit. With them, each row is
    searched only inside its window `[start, start + length)`; what lies outside has no influence on
    the result or its gradient, whatever it holds. Both are run-time values: under `jax.jit`, one
    compilation serves all lengths.

    Values follow a total order on bits: +NaN (larger payload first) > +inf > ... > +0.0 > -0.0 >
    ... > -inf > -NaN; equal bits: lowest index first. `mode="smallest"` is the reverse order of
    values with the same rule for ties. The result is the same on every device and in every run.

    Where a window holds fewer than `k` entries, the valid ones come first; the rest is index -1
    and the worst value of the mode: -inf (largest), +inf (smallest), or the lowest or highest
    value of types without infinities.

    Works under jit, vmap, scan, while_loop, cond, remat, differentiation of any order (in `values`
    with respect to `operand`), shard_map and export. Rows may be sharded over devices: no
    communication. For a sharded `axis` see `sharded_top_k`.

    Args:
        operand: `[..., n, ...]`, any real dtype; n along `axis`. float32, bfloat16 and float16 are
            served by kernels, other dtypes by an XLA expression.
        k: number of results, static, `0 <= k <= n`.
        axis: the axis to select along.
        lengths: integers broadcastable to `operand.shape` without `axis`: number of valid entries
            from the start of each row's window, clamped into the row. None: to the end of the row.
        row_starts: integers broadcastable to `operand.shape` without `axis`: where each row's
            window begins, clamped to `[0, n]`. None: 0.
        mode: `"largest"` or `"smallest"`.
        sorted: True: best first, ties by lowest index. False: by ascending index.
        is_stable: accepted as by `jax.lax.top_k`; the result is always stable.
        implementation: None picks by platform, dtype and k. `"cuda"`, `"cpu"` or `"xla"` force one,
            and raise where it cannot serve.

    Returns:
        A list `[values, indices]`, as `jax.lax.top_k` returns, each with the shape of `operand`
        except for `k` along `axis`: values in the dtype of `operand`, indices int32, counted from
        the clamped start of the window.

    Raises:
        ValueError: `k`, `axis`, `mode`, `implementation` or a shape is out of range; `operand` is
            complex; or the sharding of `axis` is visible and it is sharded.
        TypeError: an argument is of the wrong kind, such as lengths that are not integers.
        RuntimeError: a forced implementation cannot serve.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_topk import top_k
        >>> scores = jnp.array([[3.0, 9.0, 1.0, 7.0], [2.0, 8.0, 5.0, 6.0]])
        >>> values, indices = top_k(scores, 2, lengths=jnp.array([3, 1]))
        >>> print(values)
        [[  9.   3.]
         [  2. -inf]]
        >>> print(indices)
        [[ 1  0]
         [ 0 -1]]
    """
    arguments, static = _validate(
        operand, k, axis, lengths, row_starts, mode, sorted, implementation, _plan
    )
    del is_stable  # results are always stable
    values, indices = _select(*arguments, **static, indices_only=False)
    return [values, indices]


def top_k_indices(
    operand: ArrayLike,
    k: int,
    *,
    axis: int = -1,
    lengths: ArrayLike | None = None,
    row_starts: ArrayLike | None = None,
    mode: Mode = "largest",
    implementation: Implementation | None = None,
    _plan: str = "",
) -> jax.Array:
    """Returns the indices of the `k` best values along an axis, ascending.

    The set is that of `top_k` with the same arguments; the order is ascending index, with -1 for
    padding at the end, so that a gather walks memory forwards. No value is written anywhere, which
    makes this the fastest form. Arguments, window, ties and errors are those of `top_k`.

    Args:
        operand: `[..., n, ...]`, any real dtype; n along `axis`.
        k: number of results, static, `0 <= k <= n`.
        axis: the axis to select along.
        lengths: integers broadcastable to `operand.shape` without `axis`, or None.
        row_starts: integers broadcastable to `operand.shape` without `axis`, or None.
        mode: `"largest"` or `"smallest"`.
        implementation: None, `"cuda"`, `"cpu"` or `"xla"`.

    Returns:
        int32 indices with the shape of `operand` except for `k` along `axis`, counted from the
        clamped start of the window.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_topk import top_k_indices
        >>> print(top_k_indices(jnp.array([3.0, 9.0, 1.0, 7.0]), 3, lengths=2))
        [ 0  1 -1]
    """
    arguments, static = _validate(
        operand, k, axis, lengths, row_starts, mode, False, implementation, _plan
    )
    (indices,) = _select(*arguments, **static, indices_only=True)
    return indices


@functools.partial(
    jax.jit,
    static_argnames=(
        "k",
        "axis",
        "smallest",
        "sorted",
        "indices_only",
        "implementation",
        "plan",
        "check_axis",
    ),
    inline=True,
)
def _select(
    operand: jax.Array,
    starts: jax.Array | None,
    lengths: jax.Array | None,
    *,
    k: int,
    axis: int,
    smallest: bool,
    sorted: bool,
    indices_only: bool,
    implementation: str | None,
    plan: str,
    check_axis: bool,
) -> list[jax.Array]:
    """The traced part: arguments are valid, `axis` is not negative."""
    last = operand.ndim - 1
    rows = operand if axis == last else jnp.moveaxis(operand, axis, last)
    if check_axis:
        rows = _axis_check.with_partitioning_check(rows)
    results = bind(
        rows,
        None if starts is None else _as_counts("row_starts", starts, rows),
        None if lengths is None else _as_counts("lengths", lengths, rows),
        k=k,
        smallest=smallest,
        sorted=sorted,
        indices_only=indices_only,
        implementation=implementation,
        plan=plan,
    )
    return results if axis == last else [jnp.moveaxis(x, last, axis) for x in results]


def _validate(
    operand: Any,
    k: Any,
    axis: Any,
    lengths: Any,
    row_starts: Any,
    mode: Any,
    sorted: Any,
    implementation: Any,
    plan: Any,
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Checks all arguments and returns the array arguments and the static ones of `_select`."""
    try:
        aval = jax.typeof(operand)
    except TypeError as error:
        raise TypeError(
            f"operand has type {type(operand).__name__}, which is not an array; pass a jax.Array or"
            " numpy.ndarray, for example jnp.asarray(operand)"
        ) from error
    # Every rule below that depends on static values alone is checked once for each combination.
    static = _cached(_check_static, aval.shape, aval.dtype, k, axis, mode, sorted, plan)
    axis = static["axis"]
    if implementation is not None:
        _check_implementation(implementation, aval.dtype, static["k"])
    _axis_check.raise_if_sharded(operand, aval, axis)
    if lengths is not None:
        lengths = _check_counts("lengths", lengths, aval.shape, axis)
    if row_starts is not None:
        row_starts = _check_counts("row_starts", row_starts, aval.shape, axis)
    check_axis = _axis_check.is_check_enabled()
    static = {**static, "implementation": implementation, "check_axis": check_axis}
    return (operand, row_starts, lengths), static


def _cached(check: Any, *arguments: Any) -> Any:
    """Calls a cached check, past its cache if an argument cannot be hashed."""
    try:
        hash(arguments)
    except TypeError:
        return check.__wrapped__(*arguments)
    return check(*arguments)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: 1.0 and True are not 1
def _check_static(
    shape: tuple[Any, ...], dtype: Any, k: Any, axis: Any, mode: Any, sorted: Any, plan: Any
) -> dict[str, Any]:
    """Checks the arguments that depend on static values alone; returns them for `_select`."""
    _check_dtype(dtype)
    axis = _check_axis(axis, len(shape))
    k = _check_k(k, shape[axis], axis)
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} is unknown; pass one of {', '.join(map(repr, _MODES))}")
    if not isinstance(sorted, bool | np.bool_):
        raise TypeError(
            f"sorted={sorted!r} has type {type(sorted).__name__}; it is static: pass True or False"
        )
    if not isinstance(plan, str):
        raise TypeError(f"plan={plan!r} has type {type(plan).__name__}; pass a string")
    return {
        "k": k,
        "axis": axis,
        "smallest": mode == "smallest",
        "sorted": bool(sorted),
        "plan": plan,
    }


def _check_dtype(dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"top_k is not compatible with complex inputs: operand has dtype {dtype}, which has no"
            " order; pass a real array, for example jnp.abs(operand)"
        )
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_):
        raise TypeError(f"operand has dtype {dtype}; pass an array of real numbers or bool")


def _check_axis(axis: Any, ndim: int) -> int:
    try:
        index = operator.index(axis)
    except TypeError as error:
        raise TypeError(
            f"axis={axis!r} has type {type(axis).__name__}; pass a static integer"
        ) from error
    if not -ndim <= index < ndim:
        raise ValueError(
            f"axis={index} is out of bounds for operand of dimension {ndim}"
            + ("; pass an operand of at least one dimension" if ndim == 0 else "")
        )
    return index % ndim


def _check_k(k: Any, width: Any, axis: int) -> Any:
    if not _is_symbolic(k):
        try:
            k = operator.index(k)
        except TypeError as error:
            if isinstance(k, jax.core.Tracer):
                raise  # JAX's error says where the value was traced
            raise TypeError(
                f"k={k!r} has type {type(k).__name__}; pass a static integer"
            ) from error
    if _is_known(lambda: k < 0):
        raise ValueError(f"k argument to top_k must be nonnegative, got k={k}; pass 0 <= k")
    if _is_known(lambda: k > width):
        raise ValueError(
            "k argument to top_k must be no larger than size along axis; got"
            f" k={k}, which exceeds the row width {width} (axis={axis}); pass k <="
            f" operand.shape[{axis}]"
        )
    if _is_known(lambda: width > _INT32_MAX):
        raise ValueError(
            "top_k returns int32 indices, which will overflow for array dimensions larger than"
            f" the maximum int32 ({_INT32_MAX}): the row width is {width} (axis={axis}); split the"
            " rows and merge the parts"
        )
    return k


def _is_symbolic(size: Any) -> bool:
    """Whether `size` is a symbolic dimension of `jax.export`."""
    return isinstance(getattr(size, "scope", None), jax.export.SymbolicScope)


def _is_known(condition: Any) -> bool:
    """Whether a comparison holds for certain; one with symbolic dimensions may be undecided."""
    try:
        return bool(condition())
    except jax.errors.InconclusiveDimensionOperation:
        return False


def _check_implementation(implementation: Any, dtype: Any, k: Any) -> None:
    choices = _lowering.IMPLEMENTATIONS
    if implementation not in choices:
        raise ValueError(
            f"implementation={implementation!r} is unknown; pass None or one of"
            f" {', '.join(map(repr, choices))}"
        )
    if implementation == "xla":
        return
    problem = _lowering.why_not(implementation, dtype, k)
    if problem is not None:
        raise RuntimeError(
            f"implementation={implementation!r} was forced and cannot serve: {problem}"
        )


def _check_counts(name: str, counts: Any, operand_shape: tuple[Any, ...], axis: int) -> Any:
    """Checks lengths or row starts; host values come back as int32, clamped into its range.

    Args:
        name: `"lengths"` or `"row_starts"`.
        counts: what the caller passed.
        operand_shape: shape of the operand.
        axis: the selection axis, not negative.
    """
    if isinstance(counts, int) and not isinstance(counts, bool):
        return np.int32(min(max(counts, _INT32_MIN), _INT32_MAX))
    try:
        aval = jax.typeof(counts)
    except TypeError as error:
        raise TypeError(
            f"{name} has type {type(counts).__name__}, which is not an array; pass an integer or an"
            f" array of integers, for example jnp.asarray({name})"
        ) from error
    _check_counts_type(name, aval.shape, aval.dtype, operand_shape, axis)
    if isinstance(counts, np.ndarray | np.generic):
        # Before JAX sees it: without x64, JAX would wrap a 64-bit value around instead of clamping.
        return _clip_to_int32(np, counts)
    return counts


@functools.lru_cache(maxsize=4096)
def _check_counts_type(
    name: str, shape: tuple[Any, ...], dtype: Any, operand_shape: tuple[Any, ...], axis: int
) -> None:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name} has dtype {dtype}; pass integers, for example {name}.astype(jnp.int32)"
        )
    batch_shape = (*operand_shape[:axis], *operand_shape[axis + 1 :])
    num_missing = len(batch_shape) - len(shape)
    if num_missing < 0 or not all(
        _is_known(lambda own=own, size=size: own == 1 or own == size)
        for own, size in zip(shape, batch_shape[num_missing:], strict=True)
    ):
        raise ValueError(
            f"{name} has shape {shape}, which does not broadcast to {batch_shape}, the shape of"
            " operand without the selection axis; pass one integer per row"
        )


def _clip_to_int32(xp: Any, counts: Any) -> Any:
    """Clamps integers of any dtype into int32; `xp` is `numpy` or `jax.numpy`."""
    info = jnp.iinfo(counts.dtype)
    low, high = max(info.min, _INT32_MIN), min(info.max, _INT32_MAX)
    if (low, high) != (info.min, info.max):
        counts = xp.clip(counts, counts.dtype.type(low), counts.dtype.type(high))
    return counts.astype(np.int32)


def _as_counts(name: str, counts: jax.Array, rows: jax.Array) -> jax.Array:
    """Broadcasts lengths or starts to one int32 per row, sharded as the rows are.

    Args:
        name: argument to name in an error.
        counts: integers broadcastable to `[*batch]`.
        rows: `[*batch, width]`.
    """
    counts = _clip_to_int32(jnp, counts)
    batch_shape = rows.shape[:-1]
    first = len(batch_shape) - counts.ndim
    dims = tuple(range(first, len(batch_shape)))
    row_spec = spec_of(jax.typeof(rows))[:-1]
    own_spec = spec_of(jax.typeof(counts))
    if not any(row_spec) and not any(own_spec):  # also: everything outside explicit mode
        return (
            counts
            if counts.shape == batch_shape
            else lax.broadcast_in_dim(counts, batch_shape, dims)
        )
    wanted = tuple(
        None if size == 1 != batch_shape[dim] else row_spec[dim]
        for size, dim in zip(counts.shape, dims, strict=True)
    )
    if any(own is not None and own != want for own, want in zip(own_spec, wanted, strict=True)):
        raise ValueError(
            f"{name} is sharded as {jax.P(*own_spec)} and the rows of operand as"
            f" {jax.P(*row_spec)}; shard {name} like the rows, or replicate it:"
            f" jax.sharding.reshard({name}, jax.P())"
        )
    counts = jax.sharding.reshard(counts, jax.P(*wanted))
    if counts.shape == batch_shape:
        return counts
    return lax.broadcast_in_dim(counts, batch_shape, dims, out_sharding=jax.P(*row_spec))
