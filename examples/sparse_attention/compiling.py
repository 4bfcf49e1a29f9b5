# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling programs ahead of time, side by side in threads.

XLA needs a second for one of these programs on a CPU and up to a minute on a GPU, more than most of
them run. Tracing and lowering hold Python's lock; compiling does not, and so uses all cores.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Future = concurrent.futures.Future[Any]
Label = TypeVar("Label", bound=Hashable)


class Compiler:
    """Compiles lowered programs in threads.

    Args:
        log: called with one sentence per compiled program.
        options: XLA's compile options, as `jax.stages.Lowered.compile` takes them.
    """

    def __init__(self, log: Callable[[str], None], options: dict[str, Any] | None = None) -> None:
        # At least two, as one may wait for another (see `submit`).
        self._pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2))
        self._is_stopped = threading.Event()
        self._log, self._options = log, options

    def submit(
        self, label: str, lowered: jax.stages.Lowered, after: Future | None = None
    ) -> Future:
        """Starts to compile a lowered program.

        Args:
            label: for the log.
            lowered: the program, `jax.jit(...).lower(...)`.
            after: an earlier submission to wait for.
        """

        def compile_lowered() -> jax.stages.Compiled:
            if after is not None:
                after.result()
            if self._is_stopped.is_set():
                raise concurrent.futures.CancelledError
            start = time.perf_counter()
            compiled = lowered.compile(self._options)
            seconds = time.perf_counter() - start
            self._log(f"compiled {label} in {seconds:.1f} s{temporary_memory(compiled)}")
            return compiled

        return self._pool.submit(compile_lowered)

    def stop(self) -> None:
        """Awaits what is being compiled; what is not yet, will not be."""
        self._is_stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def temporary_memory(compiled: jax.stages.Compiled) -> str:
    """What a program allocates besides arguments and results, for the log."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    return f" (temporary memory {analysis.temp_size_in_bytes / 1e9:.2f} GB)"


def options_without_autotuning(device: jax.Device) -> dict[str, Any] | None:
    """Compile options for small programs that run for seconds; None where there are none to set.

    By default XLA compiles and times several candidates for every matrix product and many fusions
    on a GPU. For a training step of a few hundred small kernels that takes longer than training.
    """
    return {"xla_gpu_autotune_level": 0} if device.platform == "gpu" else None


def compile_all(
    programs: Mapping[Label, Callable[[], jax.stages.Lowered]], options: dict[str, Any] | None
) -> dict[Label, jax.stages.Compiled]:
    """Lowers and compiles programs side by side, with a progress bar that names those under way.

    Args:
        programs: functions that lower them, by label; what XLA needs longest for had better come
            first.
        options: see `Compiler`.
    """
    from tqdm import tqdm  # not at the top: `serve` needs no bar, and so no tqdm

    compiler = Compiler(lambda sentence: None, options)
    try:
        with tqdm(total=len(programs), desc="compiling", unit="program", file=sys.stdout) as bar:
            futures: dict[Label, Future] = {}
            for label, lower in programs.items():
                bar.set_postfix_str(f"tracing {label}")
                futures[label] = compiler.submit(str(label), lower())
            waiting = set(futures.values())
            while waiting:
                running = [str(label) for label, f in futures.items() if f.running()]
                more = f" and {len(running) - 2} more" if len(running) > 2 else ""
                bar.set_postfix_str(", ".join(running[:2]) + more)
                # Wakes up now and then, so that the bar's clock moves.
                done, waiting = concurrent.futures.wait(
                    waiting, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()  # raises at once what XLA raised
                bar.update(len(done))
            bar.set_postfix_str("")
        return {label: future.result() for label, future in futures.items()}
    finally:
        compiler.stop()
