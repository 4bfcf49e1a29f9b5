"""Threads, devices and loops at once: the same bits as alone, and no hang.

What JAX cannot reach (10^5 launches over several streams, graphs whose buffers move, a device that
is full) is in `ffi/tools/stress_kernel.cu`.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from runners import assert_same, gpu_devices
from watchdog import EXIT_STATUS, Watchdog

import jax_topk
from jax_topk.bench import oracle
from jax_topk.install import is_installed

NUM_THREADS = 6
HANG_SECONDS = 90
TESTS = pathlib.Path(__file__).parent

# rows, width, k, dtype, keywords: each a program of its own.
CASES = [
    (1, 40_000, 2048, np.float32, {}),
    (7, 9_001, 64, jnp.bfloat16, {"mode": "smallest"}),
    (33, 3_000, 500, np.float16, {"sorted": False}),
    (3, 140_000, 1000, np.float32, {"mode": "smallest", "sorted": False}),
]
NUM_WINDOWS = 3


@pytest.fixture
def watchdog(request):
    """A watchdog that reports past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        stderr = os.fdopen(os.dup(2), "w")
    with stderr, Watchdog(HANG_SECONDS, stderr) as dog:
        dog.note(request.node.nodeid)
        yield dog


class Program:
    """One jitted selection with several windows, and what each must return."""

    def __init__(self, case, implementation: str):
        rows, width, k, dtype, keywords = case
        rng = np.random.default_rng(width)
        generators = [inputs.GENERATORS[i] for i in rng.integers(0, len(inputs.GENERATORS), rows)]
        self.x = np.stack([inputs.cast(make(rng, width), dtype) for make in generators])
        self.windows = [inputs.windows_of(rows, width, seed) for seed in range(NUM_WINDOWS)]
        self.name = f"{rows} x {width}, k={k}, {np.dtype(dtype).name}, {keywords}, {implementation}"
        self.expected = [
            oracle.top_k(
                self.x,
                k,
                starts,
                lengths,
                keywords.get("mode") == "smallest",
                keywords.get("sorted", True),
            )
            for starts, lengths in self.windows
        ]
        self.call = jax.jit(
            lambda x, starts, lengths: jax_topk.top_k(
                x, k, row_starts=starts, lengths=lengths, implementation=implementation, **keywords
            )
        )

    def check(self, which: int, results) -> None:
        for result, wanted in zip(results, self.expected[which], strict=True):
            assert_same(np.asarray(result), wanted)


def run_threads(work) -> None:
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for future in [pool.submit(work, i) for i in range(NUM_THREADS)]:
            future.result()


def test_threads_share_programs_and_change_lengths(runner, watchdog):
    """All threads compile, call and check all programs at once, from the first call on."""
    programs = [Program(case, runner.implementation) for case in CASES]
    placed = [jax.device_put((p.x, *p.windows), runner.device) for p in programs]
    repeats = 30 if runner.implementation == "cuda" else 2

    def work(thread: int) -> None:
        for i in range(repeats * len(CASES)):
            which = (i + thread) % len(CASES)
            window = (i // len(CASES) + thread) % NUM_WINDOWS
            program, (x, *windows) = programs[which], placed[which]
            watchdog.note(f"call {i}: {program.name}, windows {window}")
            program.check(window, program.call(x, *windows[window]))

    run_threads(work)


def test_calls_pile_up_without_waiting(runner, watchdog):
    """Nobody waits for a result until all calls are queued."""
    programs = [Program(case, runner.implementation) for case in CASES[:3]]
    repeats = 40 if runner.implementation == "cuda" else 5
    pending = []
    for i in range(repeats * NUM_WINDOWS):
        program = programs[i % len(programs)]
        window = i // len(programs) % NUM_WINDOWS
        watchdog.note(f"queue {i}: {program.name}, windows {window}")
        operands = jax.device_put((program.x, *program.windows[window]), runner.device)
        pending.append((program, window, program.call(*operands)))
    for i, (program, window, results) in enumerate(pending):
        watchdog.note(f"wait for {i}: {program.name}, windows {window}")
        program.check(window, results)


def test_loops_with_changing_lengths_in_several_threads(runner, watchdog):
    """A scan, which XLA replays as a command buffer on a GPU: lengths change within and between."""
    rows, width, k, steps = 4, 12_000, 300, 12
    x = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32)

    @jax.jit
    def loop(x, lengths):
        def step(lengths, _):
            indices = jax_topk.top_k_indices(
                x, k, lengths=lengths, implementation=runner.implementation
            )
            # A real dependency of the next lengths on these indices.
            return lengths - 701 - (indices[:, 0] < -5), indices

        return lax.scan(step, lengths, None, length=steps)[1]

    starts_of = [np.random.default_rng(s).integers(0, width, rows).astype(np.int32) for s in (0, 1)]
    expected = [
        np.stack([oracle.top_k_indices(x, k, None, first - 701 * i) for i in range(steps)])
        for first in starts_of
    ]
    placed = runner.put(x)

    def work(thread: int) -> None:
        for i in range(10 if runner.implementation == "cuda" else 1):
            which = (i + thread) % 2
            watchdog.note(f"loop {i} from lengths {starts_of[which].tolist()}")
            # Another address for the operand in every other call.
            operand = placed if i % 2 == 0 else placed + 0
            result = loop(operand, runner.put(starts_of[which]))
            assert_same(np.asarray(result), expected[which])

    run_threads(work)


def devices_of(runner) -> list[jax.Device]:
    devices = gpu_devices() if runner.implementation == "cuda" else jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip(f"needs two devices, and there is {len(devices)}")
    return devices[:2]


def test_two_devices_at_once(runner, watchdog):
    """Each device has threads of its own, with the same and with other programs."""
    devices = devices_of(runner)
    programs = [Program(case, runner.implementation) for case in CASES[:3]]
    placed = {
        device: [jax.device_put((p.x, *p.windows), device) for p in programs] for device in devices
    }
    repeats = 40 if runner.implementation == "cuda" else 2

    def work(thread: int) -> None:
        device = devices[thread % 2]
        for i in range(repeats * len(programs)):
            which, window = (i + thread) % len(programs), (i // 2) % NUM_WINDOWS
            program, (x, *windows) = programs[which], placed[device][which]
            watchdog.note(f"call {i} on {device}: {program.name}, windows {window}")
            results = program.call(x, *windows[window])
            assert results[0].devices() == {device}
            program.check(window, results)

    run_threads(work)


def test_threads_take_over_lax_top_k_and_give_it_back(runner, watchdog):
    """`installed()` in some threads never changes the bits of `lax.top_k` in others."""
    if runner.implementation == "xla":
        pytest.skip("there is no kernel to take over with")
    x = np.random.default_rng(3).normal(size=(5, 400)).astype(np.float32)
    placed = runner.put(x)

    def work(thread: int) -> None:
        for k in range(1, 9):
            watchdog.note(f"k={k}, {'installed' if thread % 2 else 'as it is'}")
            expected = oracle.top_k(x, k + thread)
            if thread % 2:
                with jax_topk.installed():
                    results = jax.jit(lambda x, k=k: lax.top_k(x, k + thread))(placed)
            else:
                results = jax.jit(lambda x, k=k: lax.top_k(x, k + thread))(placed)
            for result, wanted in zip(results, expected, strict=True):
                assert_same(np.asarray(result), wanted)

    run_threads(work)
    assert not is_installed()


# --- the watchdog itself --------------------------------------------------------------------------


def watched(code: str) -> subprocess.CompletedProcess:
    """Runs code in a process that a watchdog may end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hang_becomes_a_failure_that_names_what_ran():
    result = watched(
        """
        import sys, threading
        from watchdog import Watchdog
        with Watchdog(0.5, sys.stderr) as dog:
            for i in range(3):
                dog.note(f"call {i}: rows 7, width 9001")
            threading.Event().wait()  # nothing sets it
        """
    )
    assert result.returncode == EXIT_STATUS
    assert "HANG: no progress for 0.5 s" in result.stderr
    assert "MainThread: call 2: rows 7, width 9001" in result.stderr
    assert re.search(r'File "<string>", line \d+ in <module>', result.stderr)


def test_progress_keeps_the_watchdog_quiet():
    result = watched(
        """
        import sys, time
        from watchdog import Watchdog
        with Watchdog(1.0, sys.stderr) as dog:
            for i in range(15):
                dog.note(i)
                time.sleep(0.1)
        """
    )
    assert (result.returncode, result.stderr) == (0, "")
