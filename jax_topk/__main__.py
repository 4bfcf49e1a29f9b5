"""`python -m jax_topk`: says what was found on this machine, and checks it.

Prints versions, the devices of each platform, which implementation `top_k` uses there and why, and
then runs a ragged batch through `top_k` inside `jax.jit` on each platform, compared bit for bit
with the XLA expression and with the NumPy oracle, with the time of both. The exit status is 1 if
any check fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np

from jax_topk import _lowering, _native, top_k, top_k_indices
from jax_topk._version import __version__
from jax_topk.bench import oracle

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one batch on one platform.

    Attributes:
        platform: `"cpu"`, `"cuda"`, ...
        dtype: of the operand.
        implementation: what `top_k` used.
        ms: median time of a call, in milliseconds.
        xla_ms: that of the XLA expression.
        problems: one sentence for each difference; empty if all is equal.
    """

    platform: str
    dtype: str
    implementation: str
    ms: float
    xla_ms: float
    problems: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m jax_topk", description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch")
    parser.add_argument("--width", type=int, default=32768, help="allocated width of a row")
    parser.add_argument("--k", type=int, default=2048, help="number of results")
    options = parser.parse_args(arguments)
    if options.rows < 1 or options.width < 1 or not 0 <= options.k <= options.width:
        parser.error("needs rows >= 1, width >= 1 and 0 <= k <= width")

    print(versions())
    print()
    devices, problem = find_devices()
    if problem:
        print(f"JAX could not start every platform: {problem}\n")
    print(table(("platform", "devices", "top_k uses", "because"), platform_rows(devices)))
    if not devices:
        print("\nJAX shows no device at all, so nothing can be checked.")
        return 1

    print(
        f"\nA ragged batch inside jax.jit: {options.rows} rows of {options.width}, k = {options.k},"
        " lengths from 0 to the full width, compared bit for bit"
    )
    checks = [
        run_check(name, found[0], dtype, options.rows, options.width, options.k)
        for name, found in devices.items()
        for dtype in DTYPES
    ]
    print(
        table(
            ("platform", "dtype", "top_k uses", "ms", "XLA expression, ms", "speed-up", "result"),
            [
                (
                    check.platform,
                    check.dtype,
                    check.implementation,
                    f"{check.ms:.3f}",
                    f"{check.xla_ms:.3f}",
                    f"{check.xla_ms / check.ms:.1f}x",
                    "differs" if check.problems else "equal",
                )
                for check in checks
            ],
        )
    )
    problems = [problem for check in checks for problem in check.problems]
    for sentence in problems:
        print(f"FAILED: {sentence}")
    return 1 if problems else 0


def versions() -> str:
    """One line for each version that decides what can run."""
    ffi = _native.jaxlib_ffi_version()
    driver = "unknown: jax_topk._cuda is not loaded"
    if _native.CUDA.module is not None:
        number = _native.CUDA.module.driver_version()
        driver = f"{number // 1000}.{number % 1000 // 10}" if number else "none found"
    lines = [
        ("jax_topk", __version__),
        ("jax", jax.__version__),
        ("jaxlib", jaxlib.version.__version__),
        ("XLA FFI of jaxlib", ".".join(map(str, ffi)) if ffi else "unknown"),
        ("CUDA version of the driver", driver),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    return "\n".join(f"{name:<27} {value}" for name, value in lines)


def find_devices() -> tuple[dict[str, list[jax.Device]], str]:
    """Returns the devices of each platform that JAX can start, and what went wrong."""
    devices: dict[str, list[jax.Device]] = {}
    problem = ""
    try:
        for device in jax.devices():
            devices.setdefault(_platform_name(device), []).append(device)
        devices.setdefault("cpu", jax.devices("cpu"))
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    return devices, problem


def _platform_name(device: jax.Device) -> str:
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def platform_rows(devices: dict[str, list[jax.Device]]) -> list[tuple[str, str, str, str]]:
    """One row for each platform: its devices, the implementation, and the reason."""
    rows = []
    for name in dict.fromkeys([*devices, "cuda"]):
        found = devices.get(name, [])
        kind = f"{len(found)} x {found[0].device_kind}" if found else "none"
        if not found:
            uses = "-"
            reason = (
                "JAX shows no CUDA device; on a machine with an NVIDIA GPU:"
                " pip install '.[cuda13]' in a checkout"
            )
        else:
            uses = _lowering.choose(name, np.float32, 1, None)
            status = _native.status().get(name)
            reason = "no kernels exist for this platform" if status is None else status["reason"]
        rows.append((name, kind, uses, reason))
        if not found and name == "cuda" and not _native.CUDA.is_available:
            rows.append(("", "", "", _native.CUDA.reason))
    return rows


def run_check(
    platform_name: str, device: jax.Device, dtype: str, rows: int, width: int, k: int
) -> Check:
    """Selects from a ragged batch on one device, in three ways, and compares all results."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)).astype(np.float32).astype(jax.numpy.dtype(dtype))
    lengths = np.linspace(0, width, rows).round().astype(np.int32)
    # Whatever lies outside the windows must not matter.
    x[np.arange(width) >= lengths[:, None]] = np.nan
    expected = oracle.top_k(x, k, None, lengths)
    expected_indices = oracle.top_k_indices(x, k, None, lengths)
    placed = [jax.device_put(array, device) for array in (x, lengths)]

    def select(implementation: Any) -> Callable[..., Any]:
        def function(x: jax.Array, lengths: jax.Array) -> Any:
            values, indices = top_k(x, k, lengths=lengths, implementation=implementation)
            only_indices = top_k_indices(x, k, lengths=lengths, implementation=implementation)
            return values, indices, only_indices

        return jax.jit(function)

    default, expression = select(None), select("xla")
    implementation = _lowering.choose(platform_name, dtype, k, None)
    problems = []
    results = [np.asarray(result) for result in default(*placed)]
    reference = [np.asarray(result) for result in expression(*placed)]
    names = ("values of top_k", "indices of top_k", "indices of top_k_indices")
    for name, result, by_xla, by_oracle in zip(
        names, results, reference, (*expected, expected_indices), strict=True
    ):
        for other, wanted in (("XLA expression", by_xla), ("NumPy oracle", by_oracle)):
            if result.dtype != wanted.dtype or result.tobytes() != wanted.tobytes():
                problems.append(
                    f"on {platform_name}, {dtype}: the {name} ({implementation}) differ from the"
                    f" {other}"
                )
    # On a GPU a call's dispatch takes many times as long as the selection.
    steps = 50 if platform_name == "cuda" else 3
    return Check(
        platform_name,
        dtype,
        implementation,
        selection_ms(placed, k, None, steps),
        selection_ms(placed, k, "xla", steps),
        tuple(problems),
    )


def selection_ms(placed: Sequence[jax.Array], k: int, implementation: Any, steps: int) -> float:
    """The median wall time of one `top_k` in a chain of `steps` in one jit, in milliseconds."""

    @jax.jit
    def chain(x: jax.Array, lengths: jax.Array) -> jax.Array:
        def step(_: Any, lengths: jax.Array) -> jax.Array:
            _, indices = top_k(x, k, lengths=lengths, implementation=implementation)
            return lengths - (indices[:, 0] < -5)  # never true, but XLA cannot know

        return jax.lax.fori_loop(0, steps, step, lengths)

    samples = []
    for _ in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(chain(*placed))
        samples.append(1e3 * (time.perf_counter() - begin) / steps)
    return statistics.median(samples[1:])  # the first one compiles


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, drawn by `rich` where it is installed and the output is a terminal."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*header)
        for row in rows:
            drawn.add_row(*row)
        console = Console()
        with console.capture() as captured:
            console.print(drawn)
        return captured.get().rstrip("\n")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


if __name__ == "__main__":
    sys.exit(main())
