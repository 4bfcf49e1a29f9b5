"""Takes over `jax.lax.top_k`, so that code which is not ours gets this package's kernels.

    import jax_topk
    jax_topk.install()

From then on every program that is compiled, whoever wrote it, lowers `jax.lax.top_k` (and
`jnp.top_k` of JAX 0.11.1 and newer, which calls it) to the kernels, wherever the result is the same
bit for bit:

    cpu    float32, float16 (`lax.top_k` quiets the NaNs of bfloat16 there, so it stays)
    cuda   float32, bfloat16, float16, for k up to the limit of the kernels. One difference: XLA's
           GPU code does not order NaNs of different payloads (seen on jax 0.11.2, float32 and
           bfloat16); the kernels order them as the CPU does, larger payload first. For k <= 16 in
           rows of 1024 and more XLA has a kernel that takes -0.0 for +0.0 as well, so those stay

Everything else, and `is_stable=False`, keeps JAX's own lowering. Only the lowering changes: traced
programs, shapes, types, vmap and derivatives remain JAX's. Programs that were compiled before keep
what they have; `jax.clear_caches()` makes JAX compile them again.

Programs exported with `jax.export` while this is installed hold the call of an FFI target, which
the loading machine needs; `jax.export` asks for it by name, as
`jax.export.DisabledSafetyCheck.custom_call("jax_topk_v1_values_indices")`.

The lowering tables of JAX are not a public interface. They are touched only on versions that were
tested, and only after a look at their shape.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import primitives
from jax.interpreters import mlir

from jax_topk import _lowering, _native
from jax_topk.api import top_k

__all__ = ["install", "installed", "is_installed", "uninstall"]

KNOWN_VERSIONS = ((0, 10), (0, 11), (0, 12))
"""Minor versions of JAX whose lowering tables this module knows."""

EQUAL_DTYPES = {
    "cpu": ("float32", "float16"),
    "cuda": ("float32", "bfloat16", "float16"),
}
"""Where `lax.top_k` and the kernels return the same bits; on cuda, for every input without NaNs."""

# Where XLA's GPU code has a kernel of its own (seen on jax 0.11.2, for widths divisible by 1024):
# it compares floats as numbers, and as numbers the two zeros are equal.
_SMALL_K = 16
_SMALL_K_WIDTH = 1024

_lock = threading.RLock()
_num_contexts = 0
_is_requested = False
_replaced: dict[str, Any] | None = None  # platform -> entry before, while installed


def install() -> None:
    """Routes `jax.lax.top_k` and `jnp.top_k` through this package's kernels, for the process.

    `jnp.top_k` exists from JAX 0.11.1 on. May be called any number of times, from any thread.
    Without native modules for this machine it warns and changes nothing.

    Raises:
        RuntimeError: this version of JAX is not known to this version of jax_topk.
    """
    global _is_requested
    with _lock:
        _activate()
        _is_requested = True


def uninstall() -> None:
    """Gives `jax.lax.top_k` back to JAX, for programs compiled from now on.

    Programs compiled before keep the kernels, whose results are the same; `jax.clear_caches()`
    makes JAX compile them again. Inside `installed()` it takes effect when the context ends.
    """
    global _is_requested
    with _lock:
        _is_requested = False
        _deactivate_if_unused()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """A context in which `install()` is in force; contexts nest, and threads may overlap.

    The lowering of JAX is one for the process, so other threads that compile meanwhile are served
    too.

    Raises:
        RuntimeError: this version of JAX is not known to this version of jax_topk.
    """
    global _num_contexts
    with _lock:
        _activate()
        _num_contexts += 1
    try:
        yield
    finally:
        with _lock:
            _num_contexts -= 1
            _deactivate_if_unused()


def is_installed() -> bool:
    """Whether programs compiled now get the kernels for `jax.lax.top_k`."""
    return bool(_replaced)


def _activate() -> None:
    global _replaced
    if _replaced is not None:
        return
    tables, default = _find_tables()
    served = [native.name for native in (_native.CPU, _native.CUDA) if native.is_available]
    if not served:
        warnings.warn(
            "jax_topk.install() changes nothing, since there is no native module:"
            f" {_native.CPU.reason}; {_native.CUDA.reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    replaced = {}
    for platform in served:
        before = tables.get(platform, {}).get(primitives.top_k_p)
        fallback = (before or default).rule
        # Cacheable, as JAX's own: JAX cannot lower for several platforms at once what is not.
        mlir.register_lowering(primitives.top_k_p, _rule_for(platform, fallback), platform=platform)
        replaced[platform] = before
    _replaced = replaced


def _deactivate_if_unused() -> None:
    global _replaced
    if _replaced is None or _is_requested or _num_contexts > 0:
        return
    tables, _ = _find_tables()
    for platform, before in _replaced.items():
        if before is None:
            tables[platform].pop(primitives.top_k_p, None)
        else:
            tables[platform][primitives.top_k_p] = before
    _replaced = None


def _rule_for(platform: str, fallback: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    """The lowering rule of `top_k_p` for one platform, with JAX's own where it must not serve."""

    def rule(ctx: Any, operand: Any, *, k: Any, axis: int, **others: Any) -> Sequence[Any]:
        dtype = ctx.avals_in[0].dtype
        is_served = (
            not _lowering.is_lowering_expression()
            and others.get("is_stable", True)
            and not set(others) - {"is_stable"}
            and str(dtype) in EQUAL_DTYPES[platform]  # random keys have no NumPy dtype
            and isinstance(k, int)
            and _is_ordered_by_xla(platform, k, ctx.avals_in[0].shape[axis])
            and _lowering.why_not(platform, dtype, k) is None
        )
        if not is_served:
            return fallback(ctx, operand, k=k, axis=axis, **others)

        def select(x: jax.Array) -> list[jax.Array]:
            # JAX has checked the operand already, where its sharding was visible.
            return top_k(x, k, axis=axis, implementation=platform)  # type: ignore[arg-type]

        lowered = mlir.lower_fun(select, multiple_results=True)
        return lowered(ctx, operand)

    return rule


def _is_ordered_by_xla(platform: str, k: int, width: Any) -> bool:
    """Whether `lax.top_k` tells -0.0 from +0.0; `width` may be symbolic."""
    if platform != "cuda" or k > _SMALL_K:
        return True
    return isinstance(width, int) and width < _SMALL_K_WIDTH


def _find_tables() -> tuple[dict[str, dict[Any, Any]], Any]:
    """Returns JAX's lowering rules by platform and the default rule of `top_k_p`.

    Raises:
        RuntimeError: the version of JAX is unknown, or the tables do not look as they should.
    """
    match = re.match(r"(\d+)\.(\d+)", jax.__version__)
    version = tuple(map(int, match.groups())) if match else None
    known = ", ".join(".".join(map(str, v)) for v in KNOWN_VERSIONS)
    advice = (
        "upgrade jax_topk, or call jax_topk.top_k in place of jax.lax.top_k (it takes the same"
        " arguments)"
    )
    if version not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"jax_topk.install() knows JAX {known}, and this is JAX {jax.__version__}: it would"
            f" change lowering rules that it has not been tested with; {advice}"
        )
    tables = getattr(mlir, "_platform_specific_lowerings", None)
    default = getattr(mlir, "_lowerings", {}).get(primitives.top_k_p)
    if not isinstance(tables, dict) or not callable(getattr(default, "rule", None)):
        raise RuntimeError(
            f"jax_topk.install() does not find the lowering rules of this JAX {jax.__version__}"
            f" where it expects them; {advice}"
        )
    return tables, default
