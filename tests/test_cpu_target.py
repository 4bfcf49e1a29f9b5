"""The paths of the CPU target: threads that share rows, guesses that fail, both vector tables."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_topk import _native, top_k, top_k_indices

pytestmark = pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)


def ordered(x: np.ndarray) -> np.ndarray:
    """Integers in the order of the contract."""
    bits = x.view(f"i{x.itemsize}").astype(np.int64)
    return np.where(bits < 0, bits ^ np.iinfo(f"i{x.itemsize}").max, bits)


def expected(x, starts, lengths, k, mode):
    """Values and indices, best first, by a stable sort of each window."""
    worst = np.array(-np.inf if mode == "largest" else np.inf, x.dtype)
    values = np.full((len(x), k), worst)
    indices = np.full((len(x), k), -1, np.int32)
    for row, start, length, out_values, out_indices in zip(
        x, starts, lengths, values, indices, strict=True
    ):
        start = min(max(int(start), 0), x.shape[1])
        window = row[start : start + min(max(int(length), 0), x.shape[1] - start)]
        keys = ordered(window)
        best = np.argsort(-keys if mode == "largest" else keys, kind="stable")[:k]
        out_values[: len(best)] = window[best]
        out_indices[: len(best)] = best
    return values, indices


def check(x, k, *, starts=None, lengths=None, mode="largest"):
    starts = np.zeros(len(x), np.int32) if starts is None else np.asarray(starts, np.int32)
    lengths = np.full(len(x), x.shape[1], np.int32) if lengths is None else np.asarray(lengths)
    operands = jax.device_put((x, starts, lengths), jax.devices("cpu")[0])

    def run(function, **options):
        return jax.jit(
            lambda x, starts, lengths: function(
                x, k, row_starts=starts, lengths=lengths, mode=mode, implementation="cpu", **options
            )
        )(*operands)

    values, indices = expected(x, starts, lengths, k, mode)
    actual_values, actual_indices = run(top_k)
    np.testing.assert_array_equal(actual_indices, indices)
    assert np.asarray(actual_values).tobytes() == values.tobytes()
    # Ascending index, padding last.
    by_index = np.sort(np.where(indices < 0, np.iinfo(np.int32).max, indices), axis=1)
    by_index[by_index == np.iinfo(np.int32).max] = -1
    np.testing.assert_array_equal(run(top_k_indices), by_index)
    np.testing.assert_array_equal(run(top_k, sorted=False)[1], by_index)


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_long_and_short_rows_share_threads(dtype, mode):
    """Long enough that the work is divided, and the longest rows are split in parts."""
    x = normal((12, 200_000), dtype)
    lengths = [200_000, 5, 0, -1, 150_001, 3000, 2**31 - 1, 64, 1999, 2000, 2001, 90_000]
    starts = [0, 0, 7, 0, 49_999, 190_000, -5, 200_001, 0, 1, 2, -(2**31)]
    check(x, 2000, starts=starts, lengths=lengths, mode=mode)


@pytest.mark.parametrize("k", [1, 16, 17, 128, 129, 5000, 250_000, 500_000])
def test_a_row_alone_is_split(k):
    x = normal((1, 1_000_000))
    x[0, 700_000:900_000] = x[0, 5]  # a plateau that several parts share
    check(x, k)


@pytest.mark.parametrize("arrangement", ["ascending", "descending", "best_last", "best_first"])
@pytest.mark.parametrize("k", [3, 700])
def test_position_of_the_best_does_not_matter(arrangement, k):
    x = normal((3, 300_000))
    if arrangement == "ascending":
        x = np.sort(x)
    elif arrangement == "descending":
        x = -np.sort(x)
    elif arrangement == "best_last":
        x[:, -k:] += 50
    else:
        x[:, :k] += 50
    check(x, k)


@pytest.mark.parametrize(
    ("rows", "width", "run", "k"),
    [
        (400, 4096, 8, 200),  # the guess fails in 4 of the rows
        (1, 200_000, 50, 4000),  # and in this one, which is split
    ],
)
def test_a_guess_that_is_too_high_is_noticed(rows, width, run, k):
    """In runs of equal values a sample says less than its size promises."""
    check(np.repeat(normal((rows, width // run)), run, axis=1), k)


def test_candidates_that_overflow_are_cut():
    """Alternating signs of growing size: nearly every other element beats all before it."""
    n = 20_000
    x = np.arange(n, dtype=np.float32) * np.where(np.arange(n) % 2, 1, -1).astype(np.float32)
    check(np.stack([x, x[::-1], np.abs(x)]), 10)
    check(np.stack([x, x[::-1], np.abs(x)]), 4000)


@pytest.mark.parametrize("late", [-1, 0, 1])
def test_the_threshold_after_a_cut_is_exact(late):
    """The list fills up once the k best are in; then comes a neighbour of the worst of them."""
    n, k = 20_000, 9000
    bits = np.full(n, 0x3F000000, np.int32)
    places = np.random.default_rng(0).permutation(15_000)[:k]
    bits[places] = 0x40000000 + 2 * np.arange(k, dtype=np.int32)
    bits[-1] = 0x40000000 + late
    check(bits.view(np.float32)[None], k)


@pytest.mark.parametrize("width", [1, 31, 63, 64, 65, 127, 128, 129, 191, 2047, 2048, 2049])
def test_widths_around_the_blocks_of_the_scan(width):
    x = normal((5, width))
    x[1:] = np.round(x[1:])  # ties, and both zeros
    for k in sorted({1, min(width, 16), min(width, 17), width}):
        check(x, k, lengths=[width, width - 1, width, k, k - 1])


@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_zeros_behind_the_end_are_no_elements(mode):
    """The last block of a scan is filled up with zeros, which here are better than all elements."""
    x = 1 + np.abs(normal((8, 3000)))
    x = -x if mode == "largest" else x
    x[:, 2900:] = 0
    lengths = [2900, 2899, 1000, 1025, 191, 193, 130, 127]
    for k in (1, 16, 100):
        check(x, k, lengths=lengths, mode=mode)


def test_poison_outside_the_window_is_not_seen():
    x = np.full((4, 5000), np.nan, np.float32)
    x[:, 1000:3000] = normal((4, 2000))
    check(x, 50, starts=[1000] * 4, lengths=[2000, 1999, 49, 1])
    check(x, 50, starts=[1000] * 4, lengths=[2000, 1999, 49, 1], mode="smallest")


def test_an_operand_of_more_than_2_31_elements():
    """The last row begins at element 2^31. Only what is written here takes memory."""
    rows, width, alignment = 33, 1 << 26, 64
    memory = np.zeros(rows * width + alignment, np.float16)
    first = -memory.ctypes.data % alignment // memory.itemsize
    x = memory[first : first + rows * width].reshape(rows, width)
    x[-1, :5000] = normal(5000, np.float16)
    operand = jax.device_put(x, jax.devices("cpu")[0])
    assert operand.unsafe_buffer_pointer() == x.ctypes.data, "a copy would take 4 GB"
    lengths = np.zeros(rows, np.int32)
    lengths[-1] = 5000
    _, indices = top_k(operand, 20, lengths=lengths, implementation="cpu")
    wanted = np.argsort(-ordered(x[-1, :5000]), kind="stable")[:20]
    np.testing.assert_array_equal(indices[-1], wanted)


def test_calls_from_many_threads_agree():
    x = jnp.asarray(normal((6, 200_000)), device=jax.devices("cpu")[0])
    call = jax.jit(lambda x: top_k(x, 1000, implementation="cpu"))
    wanted = [np.asarray(result) for result in call(x)]
    results: list[list[np.ndarray]] = []

    def work():
        for _ in range(10):
            results.append([np.asarray(result) for result in call(x)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == 80
    for values, indices in results:
        np.testing.assert_array_equal(values, wanted[0])
        np.testing.assert_array_equal(indices, wanted[1])


HASH = """
import hashlib, sys
import numpy as np
sys.path.insert(0, {folder!r})
import test_cpu_target as t
from jax_topk import top_k
digest = hashlib.sha256()
for dtype in (np.float32, t.ml_dtypes.bfloat16):
    for width, k in ((1, 1), (100, 7), (100, 90), (5000, 1), (5000, 16), (70_000, 900)):
        x = t.normal((3, width), dtype)
        for mode in ("largest", "smallest"):
            for result in top_k(x, k, mode=mode, implementation="cpu"):
                digest.update(np.asarray(result).tobytes())
            t.check(x, k, mode=mode)
print(digest.hexdigest())
"""


def test_every_vector_table_gives_the_same_result():
    """`JAX_TOPK_CPU_ISA=baseline` takes the table that every processor of the architecture has."""

    def run(isa: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", HASH.format(folder=os.path.dirname(__file__))],
            env={**os.environ, "JAX_TOPK_CPU_ISA": isa, "JAX_PLATFORMS": "cpu"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    assert run("baseline") == run("")
