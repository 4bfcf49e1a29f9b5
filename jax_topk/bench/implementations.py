"""This package, `jax.lax.top_k`, `torch.topk`, FlashInfer and the floors, as things to time.

Every implementation is given the same job: rows `[rows, width]`, of which the first `length[row]`
entries count, with lengths known at run time only. What has no such argument is given a masked
operand, and masks the indices of rows shorter than k; the masks are part of its time, because
whoever uses it this way pays for them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import certificate
from .cases import CALL, GRAPH, JIT, OTHERS, Case

Selector = Callable[[Array, Array | None], tuple[Array | None, Array]]
"""(operand `[rows, width]`, lengths `[rows]` or None) -> (values `[rows, k]` or None, indices)."""

IMPOSSIBLE = -5
"""No index is so low, but the compiler cannot know: a comparison with it carries a dependency."""

CHAIN_STEPS = {"cuda": 208, "dependency_floor": 208}
"""Steps of a chain; the faster a step, the longer the chain it takes."""
DEFAULT_CHAIN_STEPS = 4
CHAIN_CALLS = (1, 5)
"""Calls of a chain that are timed, each upon the results of the one before."""

_OCCUPY_PASSES = 8
_OCCUPY_SIDE = 1 << 15


# JAX's own annotations leave these two open.
wait: Callable[[Any], Any] = jax.block_until_ready
_barrier: Callable[[Any], Any] = lax.optimization_barrier


# --- selections that run inside jit ---------------------------------------------------------------


@functools.cache
def selector(name: str, k: int, output: str, plan: str = "") -> Selector:
    """Returns the selection of one implementation; equal arguments give the same object.

    Args:
        name: `"cuda"`, `"cpu"`, `"xla"` or `"lax"`.
        k: entries per row.
        output: see `cases.Case.output`.
        plan: overrides of the launch plan, for this package only.
    """
    if name == "lax":
        return functools.partial(_lax, k=k, output=output)
    return functools.partial(_package, k=k, output=output, plan=plan, implementation=name)


def _package(
    operand: Array, lengths: Array | None, *, k: int, output: str, plan: str, implementation: str
) -> tuple[Array | None, Array]:
    from jax_topk import debug

    if output == "indices":
        indices = debug.top_k_indices_with_plan(
            operand, k, plan, lengths=lengths, implementation=implementation
        )
        return None, indices
    values, indices = debug.top_k_with_plan(
        operand,
        k,
        plan,
        lengths=lengths,
        sorted=output == "values_sorted",
        implementation=implementation,
    )
    return values, indices


def _lax(
    operand: Array, lengths: Array | None, *, k: int, output: str
) -> tuple[Array | None, Array]:
    if lengths is None:
        values, indices = lax.top_k(operand, k)
    else:
        column = lax.broadcasted_iota(jnp.int32, operand.shape, 1)
        worst = jnp.array(-jnp.inf, operand.dtype)
        values, indices = lax.top_k(jnp.where(column < lengths[:, None], operand, worst), k)
        indices = jnp.where(indices < lengths[:, None], indices, -1)
    return (None if output == "indices" else values), indices


def order_of(name: str, output: str) -> str:
    """The order in which an implementation promises its results (see `certificate`)."""
    if name in ("torch", "flashinfer"):
        return certificate.ANY
    if name == "lax" or output == "values_sorted":
        return certificate.BEST_FIRST
    return certificate.ASCENDING


@functools.cache
def call_function(select: Selector) -> Callable[[Array, Array | None], Any]:
    """The selection, jitted: what `call_us` times."""
    return jax.jit(select)


@functools.cache
def chain_function(select: Selector, steps: int) -> Callable[[Array, Array], Any]:
    """`steps` selections in one jitted function, each depending on the one before.

    The lengths of a step are the lengths of the step before, less one if an index is impossibly
    low: equal at run time, unknown to the compiler, so that no step can be folded, shared or moved.
    The steps stand in a straight line, as the layers of a decode step do; on a GPU XLA replays them
    as one command buffer.
    """

    def chain(operand: Array, lengths: Array) -> tuple[Array, tuple[Array | None, Array]]:
        for _ in range(steps):
            result = select(operand, lengths)
            lengths = lengths - (result[1][:, 0] < IMPOSSIBLE).astype(jnp.int32)
        return lengths, result

    return jax.jit(chain)


@functools.cache
def dependency_function(steps: int) -> Callable[[Array, Array], Any]:
    """The chain without the selections: `steps` runs of the kernel that carries the dependency.

    Each step reads the same column of the same indices as in `chain_function`. The barriers keep
    XLA from fusing the steps into one kernel (its GPU pipeline removes them after fusion).
    """

    def chain(indices: Array, lengths: Array) -> tuple[Array]:
        for _ in range(steps):
            indices, lengths = _barrier((indices, lengths))
            lengths = lengths - (indices[:, 0] < IMPOSSIBLE).astype(jnp.int32)
        return (lengths,)

    return jax.jit(chain)


@jax.jit
def occupied(lengths: Array) -> Array:
    """The lengths, once the device has computed for milliseconds (4.6 on an H200).

    What is dispatched upon them starts that much later, so that the host is ahead of the device.
    The work touches no memory and leaves the caches as they are. Each pass depends on the one
    before, the first on the lengths, and these on the last: XLA may run programs side by side.
    """
    greatest = lengths[0] >> 31
    for _ in range(_OCCUPY_PASSES):
        row, column = (
            lax.broadcasted_iota(jnp.int32, (_OCCUPY_SIDE, _OCCUPY_SIDE), axis) for axis in (0, 1)
        )
        greatest = jnp.max(((row * _OCCUPY_SIDE + column) ^ greatest) % 3)
    return lengths + (greatest - 2)


def chained_calls(
    chain: Callable[[Array, Array], Any],
    count: int,
    operand: Array,
    lengths: Array,
    *,
    occupy: bool,
) -> Callable[[], Any]:
    """`count` calls of a chain, each with the lengths of the one before; waits for the last alone.

    Args:
        chain: (operand, lengths) -> a tuple that begins with the lengths.
        count: calls.
        operand: what every call gets.
        lengths: what the first call gets.
        occupy: dispatch behind work of the device (see `occupied`).
    """

    def call() -> Any:
        following = occupied(lengths) if occupy else lengths
        for _ in range(count - 1):
            # No other result is kept, so that XLA's allocator hands out the same addresses and a
            # recorded command buffer stays valid.
            following = chain(operand, following)[0]
        return wait(chain(operand, following))

    return call


# --- launches in a CUDA graph ---------------------------------------------------------------------


@dataclasses.dataclass
class Buffers:
    """Poisoned output buffers of one launch, written behind JAX's back by pointer.

    They must not be read through JAX before the launches are done: an array caches its host copy.
    """

    values: Array | None
    indices: Array

    @classmethod
    def poisoned(cls, rows: int, k: int, dtype: str, output: str) -> Buffers:
        """Allocates `[rows, k]` outputs full of poison."""
        indices = jnp.full((rows, k), certificate.POISON, jnp.int32)
        values = None
        if output != "indices":
            values = jnp.full((rows, k), certificate.POISON_VALUE, dtype)
        wait((values, indices))
        return cls(values, indices)


def cuda_module() -> Any:
    """The native CUDA module; raises RuntimeError with a sentence where it cannot be used."""
    from jax_topk import _native

    status = _native.status()["cuda"]
    if not status["available"]:
        raise RuntimeError(f"the CUDA target is not available: {status['reason']}")
    return importlib.import_module("jax_topk._cuda")


def graph_chain(
    kind: str,
    case: Case,
    operands: Sequence[int],
    starts: Array,
    lengths: Array,
    buffers: Buffers,
    *,
    launches: int,
    replays: int,
) -> list[float]:
    """Times launches of a kernel in one CUDA graph.

    Args:
        kind: `"top_k"`, `"empty"`, `"read"`, or `"behind_others"`, which is `"top_k"` behind other
            kernels, of which the time is subtracted.
        case: the job.
        operands: device addresses of rows; launch i reads those at i modulo their number.
        starts: `[rows]` int32 on the device.
        lengths: `[rows]` int32 on the device.
        buffers: where the kernel writes.
        launches: launches per graph.
        replays: replays of the graph.

    Returns:
        Microseconds per launch, one entry per replay.
    """
    module = cuda_module()
    addresses: int | list[int] = operands[0] if len(operands) == 1 else list(operands)
    try:
        times = module.graph_chain(
            kind,
            addresses,
            starts.unsafe_buffer_pointer(),
            lengths.unsafe_buffer_pointer(),
            0 if buffers.values is None else buffers.values.unsafe_buffer_pointer(),
            buffers.indices.unsafe_buffer_pointer(),
            case.rows,
            case.width,
            case.k,
            case.dtype,
            False,
            case.output == "values_sorted",
            case.plan,
            launches,
            replays,
            0,
        )
    except TypeError as error:
        if len(operands) == 1:
            raise
        raise RuntimeError(
            "the installed jax_topk._cuda.graph_chain takes one operand only, so --cold cannot "
            "rotate over buffers; rebuild the package from this checkout"
        ) from error
    return [float(time) for time in times]


class TorchChain:
    """`torch.topk` or FlashInfer over JAX's own buffers, as launches in one CUDA graph."""

    def __init__(self, name: str, case: Case, operand: Array, lengths: Array):
        """Captures nothing yet.

        Args:
            name: `"torch"` or `"flashinfer"`.
            case: the job.
            operand: `[>= rows, width]` on the GPU.
            lengths: `[>= rows]` int32 on the GPU.
        """
        import torch

        self._torch = torch
        self._case = case
        wait((operand, lengths))
        self._operand = torch.from_dlpack(operand)[: case.rows]
        self._lengths = torch.from_dlpack(lengths)[: case.rows]
        self._select = self._flashinfer if name == "flashinfer" else self._topk
        if name == "flashinfer":
            self._module = importlib.import_module("flashinfer")
            self._offsets = torch.zeros_like(self._lengths)
        else:
            self._column = torch.arange(case.width, device=self._operand.device)

    def _topk(self) -> tuple[Any, Any]:
        torch, case, lengths = self._torch, self._case, self._lengths[:, None]
        masked = torch.where(self._column < lengths, self._operand, -float("inf"))
        values, indices = torch.topk(masked, case.k, dim=1, sorted=case.output == "values_sorted")
        return values, torch.where(indices < lengths, indices, -1)

    def _flashinfer(self) -> tuple[Any, Any]:
        indices = self._module.top_k_ragged_transform(
            self._operand, self._offsets, self._lengths, self._case.k
        )
        return None, indices

    def once(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Runs the selection; returns values (or None) and indices as NumPy arrays."""
        result = self._select()
        self._torch.cuda.synchronize()
        return self._to_host(result)

    def _to_host(self, result: tuple[Any, Any]) -> tuple[np.ndarray | None, np.ndarray]:
        values, indices = result
        if self._case.output == "indices":
            values = None
        elif values is not None:
            # bfloat16 has no NumPy type in torch; float32 holds every value of the three dtypes.
            values = values.float().cpu().numpy().astype(jnp.dtype(self._case.dtype))
        return values, indices.to(self._torch.int32).cpu().numpy()

    def _capture(self, stream: Any, launches: int) -> tuple[Callable[[], None], Any] | None:
        """A replay of `launches` selections and their last result; None if capture fails."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(launches):
                    result = self._select()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay, result

    def time(
        self, *, launches: int, replays: int, budget_s: float
    ) -> tuple[list[float], tuple[np.ndarray | None, np.ndarray], bool]:
        """Times `launches` selections in one CUDA graph, or on the stream if capture fails.

        Returns:
            Microseconds per launch, one entry per replay (at least 3, at most `replays`, within the
            budget); the result of the last launch; whether a graph was timed.
        """
        torch = self._torch
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                result = self._select()
        torch.cuda.synchronize()
        captured = self._capture(stream, launches)
        if captured is not None:
            replay, result = captured
        samples: list[float] = []
        spent_us = 0.0
        with torch.cuda.stream(stream):
            # One more turn than is kept: the first warms up.
            while len(samples) <= replays and (len(samples) <= 3 or spent_us < budget_s * 1e6):
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                if captured is not None:
                    replay()
                else:
                    for _ in range(launches):
                        result = self._select()
                end.record()
                end.synchronize()
                replay_us = begin.elapsed_time(end) * 1e3
                spent_us += replay_us
                samples.append(replay_us / launches)
        torch.cuda.synchronize()
        return samples[1:], self._to_host(result), captured is not None


# --- what is there --------------------------------------------------------------------------------


def metrics_of(name: str, platform: str) -> tuple[str, ...]:
    """Metrics an implementation can be timed by on `"gpu"` or `"cpu"`, natural ones first."""
    if name == "cuda":
        return (GRAPH, JIT, OTHERS, CALL)
    if name in ("torch", "flashinfer"):
        return (GRAPH,)
    return (JIT, CALL) if platform == "gpu" else (CALL, JIT)


def natural_metrics(name: str, platform: str) -> tuple[str, ...]:
    """Metrics an implementation is timed by unless some are asked for.

    The CUDA kernel is timed alone, to compare with others' kernels, and inside jit, where
    `lax.top_k` lives.
    """
    return metrics_of(name, platform)[: 2 if name == "cuda" else 1]


def unavailable(name: str, platform: str) -> str | None:
    """Why an implementation cannot be measured on a platform, in one line; None if it can."""
    if name in ("lax", "xla"):
        return None
    if name in ("cuda", "cpu"):
        from jax_topk import _native

        wanted = "gpu" if name == "cuda" else "cpu"
        if platform != wanted:
            return f"{name}: JAX runs on the {platform} here"
        status = _native.status()[name]
        return None if status["available"] else f"{name}: {status['reason']}"
    if importlib.util.find_spec(name) is None:
        return f"{name}: not installed"
    if platform != "gpu":
        return f"{name}: measured on a GPU only"
    import torch

    if not torch.cuda.is_available():
        return f"{name}: torch {torch.__version__} does not see the GPU"
    return None
