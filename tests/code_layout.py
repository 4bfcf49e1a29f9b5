"""Where the paths of the CUDA kernel lie among its instructions.

    python -m tests.code_layout --check

A launch brings the first 64 KB of a kernel (measured on an H200); in a decode step every jump to
what lies behind waits for memory (ffi/NOTES.md, "Behind other kernels"). The compiler decides where
code lies, so this compiles the kernel, asks nvdisasm which functions every instruction was inlined
from, and says how much of each path lies in front. No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
WINDOW = 64 << 10
"""Bytes of instructions that a launch brings."""

INSTRUCTION_BYTES = 16
PATHS = {
    "few turns": "SelectShortRow<T, kFewTurns<T>>(",
    "middle turns": "SelectShortRow<T, kMiddleTurns<T>>(",
    "most turns": "SelectShortRow<T, kMostTurns<T>>(",
    "large tile": "SelectShortRow<T, kLargeTurns<T>>(",
    "resident": "SelectResidentRow<T>(",
    "streamed": "SelectStreamedRow<T, Deal>(",
    "streamed, rare": "CompleteStreamedRow<T, Deal>(",
}
"""Paths, and what the line of `kernel.cuh` contains that calls each."""
CALLER = "kernel.cuh"
IN_FRONT = {
    "clusters": ("few turns", "resident", "streamed"),
    "one CTA per row": ("few turns", "middle turns", "streamed"),
}
"""Of each kernel, the paths that have to lie in front."""

LEAST_SHARE = {"streamed": 0.25}
"""Of such a path, if not `LEAST`: its last steps are those of rare streams too, and lie there."""
LEAST = 0.75
"""The rest is code for warps that have diverged at a shuffle, which none does and which the
compiler puts behind everything, and code that it shares between paths."""

SOURCE = """\
#include "cuda/instances.cuh"
namespace jax_topk {
template __global__ void TopKKernel<Float32, 0, true>(const __grid_constant__ TopKArgs);
template __global__ void TopKKernel<Float32, 0, false>(const __grid_constant__ TopKArgs);
}
"""
KERNELS = {"ELb1E": "clusters", "ELb0E": "one CTA per row"}
"""What marks the two in mangled names."""

Place = tuple[str, int]
"""File and line."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        kernel: mangled name.
        address: bytes from the kernel's beginning.
        places: what it was compiled from, the innermost first, then where that was inlined.
    """

    kernel: str
    address: int
    places: tuple[Place, ...]


def parse_listing(lines: Iterable[str]) -> Iterator[Instruction]:
    """The instructions of a listing of `nvdisasm -c -gi`."""
    kernel, is_complete = "", True
    places: list[Place] = []
    for line in lines:
        if found := re.match(r"\.text\.(\S+):", line):
            kernel = found[1]
        elif found := re.search(r'//## File "([^"]+)", line (\d+)(.*)', line):
            if is_complete:
                places = []
            places.append((pathlib.PurePath(found[1]).name, int(found[2])))
            is_complete = "inlined at" not in found[3]
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s", line):
            yield Instruction(kernel, int(found[1], 16), tuple(places))


def calls_by_line(source: str) -> dict[int, str]:
    """The paths that a CUDA source calls: line, from 1 on -> path. A declaration is no call."""
    calls = {}
    for number, line in enumerate(source.splitlines(), 1):
        if "__device__" in line or line.lstrip().startswith("//"):
            continue
        for path, call in PATHS.items():
            if call in line:
                calls[number] = path
    return calls


@dataclasses.dataclass
class Extent:
    """The instructions of one path: bytes, bytes within the window, and the first one's address."""

    size: int = 0
    in_window: int = 0
    begin: int | None = None

    def add(self, address: int) -> None:
        """Counts one instruction."""
        self.size += INSTRUCTION_BYTES
        self.in_window += INSTRUCTION_BYTES if address < WINDOW else 0
        self.begin = address if self.begin is None else min(self.begin, address)


def extents(listing: Iterable[str], calls: dict[int, str]) -> dict[str, dict[str, Extent]]:
    """The paths of both kernels.

    Args:
        listing: lines of `nvdisasm -c -gi`.
        calls: `calls_by_line` of `CALLER`.

    Returns:
        kernel, as in `KERNELS` -> path -> extent; `"all"` is a path too.
    """
    found = {name: {path: Extent() for path in ("all", *PATHS)} for name in KERNELS.values()}
    for instruction in parse_listing(listing):
        for mark, name in KERNELS.items():
            if mark not in instruction.kernel:
                continue
            paths = {
                calls[line] for file, line in instruction.places if file == CALLER and line in calls
            }
            for path in ("all", *paths):
                found[name][path].add(instruction.address)
    return found


def compile_listing(nvcc: str, nvdisasm: str, architecture: str) -> list[str]:
    """Compiles the kernels of float32 without sorting, and disassembles them.

    Raises:
        FileNotFoundError: if a tool is not there.
        RuntimeError: if one fails, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernels.cu"
        cubin = source.with_suffix(".cubin")
        source.write_text(SOURCE)
        flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{architecture}", "-cubin"]
        commands = (
            [nvcc, *flags, "-I", str(ROOT / "ffi"), "-o", str(cubin), str(source)],
            [nvdisasm, "-c", "-gi", str(cubin)],
        )
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
        return result.stdout.splitlines()


def table(found: dict[str, dict[str, Extent]]) -> str:
    """The extents, for people."""
    lines = [f"{'kernel':16} {'path':18} {'begins':>8} {'KB':>6} {'in front':>9}"]
    for kernel, paths in found.items():
        for path, extent in paths.items():
            share = extent.in_window / extent.size if extent.size else 0.0
            begin = "-" if extent.begin is None else f"{extent.begin:#x}"
            lines.append(f"{kernel:16} {path:18} {begin:>8} {extent.size >> 10:6} {share:9.0%}")
    return "\n".join(lines)


def misplaced(found: dict[str, dict[str, Extent]]) -> list[str]:
    """A sentence for every path that should lie in front and does not."""
    sentences = []
    for kernel, paths in IN_FRONT.items():
        for path in paths:
            extent, least = found[kernel][path], LEAST_SHARE.get(path, LEAST)
            if extent.in_window < least * extent.size or extent.size == 0:
                sentences.append(
                    f"{path} of the kernel for {kernel}: {extent.in_window} of {extent.size} bytes"
                    f" lie in the first {WINDOW >> 10} KB, and {least:.0%} should; see the top of"
                    " ffi/cuda/kernel.cuh"
                )
    return sentences


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.code_layout",
        description="Says where the paths of the CUDA kernel lie among its instructions. Needs nvcc"
        " and nvdisasm (python -m pip install nvidia-cuda-nvdisasm), and no GPU.",
    )
    parser.add_argument("--nvcc", default="nvcc", help="the compiler (nvcc)")
    parser.add_argument("--nvdisasm", default="nvdisasm", help="the disassembler (nvdisasm)")
    parser.add_argument("--arch", default="90a", help="architecture (90a)")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a path that matters lies behind 64 KB"
    )
    options = parser.parse_args(arguments)
    try:
        listing = compile_listing(options.nvcc, options.nvdisasm, options.arch)
    except FileNotFoundError as error:
        parser.error(f"{error.filename} was not found; pass its path as --nvcc or --nvdisasm")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    calls = calls_by_line((ROOT / "ffi" / "cuda" / CALLER).read_text())
    found = extents(listing, calls)
    print(table(found))
    sentences = misplaced(found)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if options.check and sentences else 0


if __name__ == "__main__":
    sys.exit(main())
