"""Sampling: interleaved calls, slopes of chains, and the statistics that are kept of them.

Four metrics, all in microseconds per selection:

- `graph_chain_us`: launches of the kernel alone, back to back in one CUDA graph; the time of a
  replay divided by the launches, median over the replays. A launch may start while the one before
  it ends (programmatic dependent launch), which launches by XLA never do.
- `behind_others_us`: the same as XLA launches it, without overlap, each behind kernels that drive
  instructions and data out of the caches as the rest of a decode step does: one executes 256 KB of
  instructions, one reads 200 MB, and one reads the operand, whose scores some kernel has just
  written. What they take with an empty kernel in the launch's place is subtracted.
- `jit_chain_us`: selections inside a jitted function, each of which depends on the result before
  it, as a decode step's layers do. One call, and five of which only the last is awaited, are timed
  in turn; their difference, divided by the steps of four calls, is a step's time: the selection and
  the small kernel that carries the dependency. On a GPU the calls are dispatched while it computes
  something else, so that no dispatch or synchronisation is in the figure, unless the host is so
  slow that the device catches up with it. The floor of that small kernel is its own record
  (`dependency_floor`). The suite over several devices takes the slope of a short and a long chain.
- `call_us`: one call of a jitted function from Python until its result is ready.

Implementations that are compared take turns within one process (a, b, a, b, ...), so that drift of
clocks and neighbours on the machine meets all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

MIN_SAMPLE_S = 100e-6
"""Calls shorter than this are repeated within a sample, to stand clear of the timer."""
MAX_REPEATS = 50


@dataclasses.dataclass(frozen=True)
class Stats:
    """Order statistics of one cell's samples, in microseconds per selection."""

    n: int
    min: float
    q25: float
    median: float
    q75: float
    max: float

    @classmethod
    def of(cls, samples_us: Sequence[float] | np.ndarray) -> Stats:
        """Summarises at least one sample."""
        samples = np.asarray(samples_us, np.float64)
        low, q25, median, q75, high = np.quantile(samples, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return cls(int(samples.size), low, q25, median, q75, high)

    def as_dict(self) -> dict[str, float | int]:
        """For JSON, rounded to a nanosecond."""
        values = dataclasses.asdict(self)
        return {name: value if name == "n" else round(value, 3) for name, value in values.items()}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    max_repeats: int = MAX_REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Times several calls in turns.

    Args:
        calls: name -> a function that returns when its work is done. Each is called once before
            timing starts.
        budget_s: stop after a full round once this much time is spent, all calls together.
        min_rounds: rounds taken even beyond the budget.
        max_rounds: rounds taken at most.
        max_repeats: calls per sample at most. Several processes that run collectives together must
            call them equally often: pass 1, and as many rounds at least as at most.
        clock: seconds, monotonic.

    Returns:
        name -> microseconds per call, one entry per round; entry i of every name is of round i.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        once = max(clock() - begin, 1e-9)
        repeats[name] = min(max_repeats, math.ceil(MIN_SAMPLE_S / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    start = clock()
    with _no_garbage_collection():
        for round_index in range(max_rounds):
            if round_index >= min_rounds and clock() - start > budget_s:
                break
            for name in order:
                call, count = calls[name], repeats[name]
                begin = clock()
                for _ in range(count):
                    call()
                samples[name].append((clock() - begin) / count * 1e6)
            # The call that goes first follows other work in the caches than the one after it.
            order.reverse()
    return {name: np.asarray(values) for name, values in samples.items()}


def slopes(short_us: np.ndarray, long_us: np.ndarray, steps: int) -> np.ndarray:
    """Per-step times from chains sampled in pairs.

    Args:
        short_us: `[rounds]` time of the short chain.
        long_us: `[rounds]` time of the long chain in the same rounds.
        steps: how many steps the long chain has more.

    Returns:
        `[rounds]` microseconds per step. The median over rounds resists outliers on both sides.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: the long chain must be longer")
    per_step: np.ndarray = (np.asarray(long_us) - np.asarray(short_us)) / steps
    return per_step
