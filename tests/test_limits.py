"""Sizes at and beyond the limits: offsets above 2^32 elements, many rows, wide rows, none at all.

Errors that are due before anything is traced are in `test_errors`; what only a GPU has room for is
marked `gpu`.
"""

from __future__ import annotations

import mmap
import os
import pathlib
import resource
import subprocess
import sys

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from runners import Runner, assert_same, gpu_devices

import jax_topk
from jax_topk import _lowering, _native
from jax_topk.bench import oracle

MAP_NORESERVE = 0x4000  # `mmap.MAP_NORESERVE` from Python 3.13 on


def sparse(shape: tuple[int, int], dtype) -> np.ndarray:
    """Zeros in address space: pages that nobody writes cost no memory."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)


@pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)
@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_beyond_32_bits_on_the_cpu(rows):
    """`row * width` up to 2^32 + 2^31 elements; windows keep what is read small."""
    width = 2**31 - 1
    x = sparse((rows, width), np.float16)
    starts = np.array([width - 3_000, 0, width - 5], np.int32)[:rows]
    lengths = np.array([2**31 - 1, 4_000, 9], np.int32)[:rows]
    rng = np.random.default_rng(0)
    windows = []
    for row, start, length in zip(x, starts, lengths, strict=True):
        window = row[int(start) : int(start) + int(length)]
        window[:] = rng.integers(-500, 500, len(window)).astype(np.float16)
        windows.append(window)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    operand = jnp.from_dlpack(x, device=jax.devices("cpu")[0], copy=False)
    results = jax_topk.top_k(operand, 8, lengths=lengths, row_starts=starts, implementation="cpu")
    for i, window in enumerate(windows):
        row = np.zeros((1, max(8, len(window))), x.dtype)
        row[0, : len(window)] = window
        expected = oracle.top_k(row, 8, None, np.array([len(window)], np.int32))
        for result, wanted in zip(results, expected, strict=True):
            assert_same(np.asarray(result[i : i + 1]), wanted)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB: the operand was copied"


@pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)
def test_the_widest_row_on_the_cpu():
    """All of 2^31 - 1 elements, of which two are not zero."""
    width = 2**31 - 1
    x = sparse((1, width), np.float16)
    x[0, [5, width - 1]] = -1, 1
    # The first part alone, and the last with the largest index that there is.
    call = jax.jit(
        lambda x, n, s: jax_topk.top_k(x, 3, lengths=n, row_starts=s, implementation="cpu")
    )
    operand = jnp.from_dlpack(x, device=jax.devices("cpu")[0], copy=False)
    values, indices = call(operand, np.int32(2**31 - 1), np.int32(width - 2))
    assert values.tolist() == [[1.0, 0.0, -np.inf]]
    assert indices.tolist() == [[1, 0, -1]]
    values, indices = call(operand, np.int32(7), np.int32(0))
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("rows", [65_536, 65_537])
def test_many_rows(runner, rows):
    """Beyond 65 536 rows the counts that a caller leaves out are no longer a constant."""
    rng = np.random.default_rng(rows)
    x = rng.integers(0, 9, size=(rows, 5)).astype(np.float32)
    lengths = rng.integers(-1, 7, rows).astype(np.int32)
    is_inside = np.arange(5) < lengths[:, None]
    for counts, rows_seen in ((None, x), (lengths, np.where(is_inside, x, -1))):
        order = np.argsort(-rows_seen, axis=1, kind="stable")[:, :2].astype(np.int32)
        best = np.take_along_axis(rows_seen, order, 1)
        values, indices = runner.top_k(x, 2, lengths=counts)
        assert_same(indices, np.where(best < 0, np.int32(-1), order))
        assert_same(values, np.where(best < 0, np.float32(-np.inf), best))


@pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)
def test_a_row_of_eight_million_on_the_cpu():
    width = 2**23 + 1
    x = np.random.default_rng(width).normal(size=(1, width)).astype(np.float32)
    x[0, -1] = x[0, 0] = 9  # a tie at both ends
    Runner("cpu", jax.devices("cpu")[0]).check(x, 300, outputs=("sorted",))


VIEWS = {
    "offset": lambda x: x[:, 3:],
    "stride": lambda x: x[:, 1::2],
    "every_third_row": lambda x: x[::3],
    "backwards": lambda x: x[::-1, ::-1],
    "transposed": lambda x: x.T,
    "inner": lambda x: x[1:5, 7:-3],
    "repeated": lambda x: x[np.array([0, 0, 2])],
    "flattened": lambda x: x.reshape(1, -1),
    "columns_as_rows": lambda x: x.reshape(-1, x.shape[0]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_and_offset_views_through_jit(runner, name):
    view = VIEWS[name]
    for dtype in (np.float32, jnp.bfloat16):
        x = inputs.rows_of(211, dtype)
        expected = oracle.top_k(np.ascontiguousarray(view(x)), 4)
        function = jax.jit(
            lambda x: jax_topk.top_k(view(x), 4, implementation=runner.implementation)
        )
        for result, wanted in zip(function(runner.put(x)), expected, strict=True):
            assert_same(np.asarray(result), wanted)


def test_a_window_that_moves_through_a_larger_buffer(runner):
    """A traced offset: the operand begins at another address in every call."""
    x = np.random.default_rng(2).normal(size=(6, 500)).astype(np.float32)
    function = jax.jit(
        lambda x, i: jax_topk.top_k(
            lax.dynamic_slice_in_dim(x, i, 101, 1), 9, implementation=runner.implementation
        )
    )
    for offset in (0, 1, 7, 250, 399):
        expected = oracle.top_k(np.ascontiguousarray(x[:, offset : offset + 101]), 9)
        for result, wanted in zip(function(runner.put(x), offset), expected, strict=True):
            assert_same(np.asarray(result), wanted)


# --- nothing at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0), (2, 0, 9), (0,)])
@pytest.mark.parametrize("windows", [False, True])
def test_nothing_under_transformations(runner, shape, windows):
    k = min(2, shape[-1])
    counts = np.zeros(shape[:-1], np.int32)
    keywords = {"lengths": counts, "row_starts": counts} if windows else {}

    def select(x):
        return jax_topk.top_k(x, k, implementation=runner.implementation, **keywords)

    x = runner.put(np.zeros(shape, np.float32))
    results = jax.jit(select)(x)
    for result, dtype in zip(results, (np.float32, np.int32), strict=True):
        assert result.shape == (*shape[:-1], k)
        assert result.dtype == dtype
    assert jax.grad(lambda x: jnp.sum(select(x)[0]))(x).shape == shape
    batch = runner.put(np.zeros((0, *shape), np.float32))
    assert jax.vmap(select)(batch)[1].shape == (0, *shape[:-1], k)
    stacked = lax.scan(lambda carry, row: (carry, select(row)[1]), 0, batch)[1]
    assert stacked.shape == (0, *shape[:-1], k)


def test_k_of_zero_with_every_other_argument(runner):
    x = runner.put(np.ones((3, 7), np.float32))
    for keywords in ({}, {"lengths": 3, "row_starts": 2}, {"mode": "smallest", "sorted": False}):
        values, indices = jax_topk.top_k(x, 0, implementation=runner.implementation, **keywords)
        assert values.shape == indices.shape == (3, 0)
    for axis in (0, 1):
        indices = jax_topk.top_k_indices(x, 0, axis=axis, implementation=runner.implementation)
        assert indices.shape == ((0, 7), (3, 0))[axis]


def test_rows_without_any_memory(runner):
    """2^31 rows of width 0 are an empty array, and so is their result."""
    counts = jax.ShapeDtypeStruct((2**31,), np.int32)
    operand = jax.ShapeDtypeStruct((2**31, 0), np.float32)
    for arguments in ((operand,), (operand, counts)):
        values, indices = jax.eval_shape(
            lambda x, n=None: jax_topk.top_k(x, 0, lengths=n, implementation=runner.implementation),
            *arguments,
        )
        assert values.shape == indices.shape == (2**31, 0)


# --- what a GPU has room for ----------------------------------------------------------------------


@pytest.fixture
def gpu():
    with jax.default_device(gpu_devices()[0]):
        yield Runner("cuda", gpu_devices()[0])


def needs_gib_for_a_new_process(gib: float) -> None:
    """Skips unless so much is free: this process and others may hold memory of the same GPU."""
    limit = gpu_devices()[0].memory_stats()["bytes_limit"] / 2**30
    if limit < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, and JAX may take {limit:.0f}")
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    free = int(answer) / 2**10
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, and {free:.0f} are free")


MANY_ROWS = """
import jax, jax.numpy as jnp
from jax import lax
import jax_topk

rows = 2**31 + 77

@jax.jit
def count_wrong():
    # 2039 is prime: no period of 2^31 hides a row that is taken for another.
    row = lax.broadcasted_iota(jnp.uint32, (rows, 1), 0) % 2039
    x = row.astype(jnp.float16)
    values, indices = jax_topk.top_k(x, 1, implementation="cuda")
    wrong = (values != x) | (indices != 0)
    # A static slice: an index would be an int32.
    return jnp.sum(wrong.astype(jnp.float32)), lax.slice(values, (rows - 1, 0), (rows, 1))

num_wrong, last = count_wrong()
assert float(num_wrong) == 0, num_wrong
assert last.tolist() == [[(rows - 1) % 2039]], last
print("all equal")
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_more_rows_than_a_grid_has_ctas(gpu):
    """2^31 rows and some: more than one launch. Each row is one element, and its own top-1.

    In a process of its own, without a pool: XLA asks for 32 GiB in one piece. Tests that ran before
    in this process may hold more than is left, and a pool that grows is never in one piece.
    """
    needs_gib_for_a_new_process(45)
    result = subprocess.run(
        [sys.executable, "-c", MANY_ROWS],
        env={
            **os.environ,
            "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "all equal", result.stderr[-3000:]


@pytest.mark.gpu
def test_out_of_memory_is_an_error_and_no_end(gpu):
    """XLA refuses before any kernel runs, and the next call is right."""
    width = 2**30
    rows = int(gpu.device.memory_stats()["bytes_limit"] // (4 * width)) + 2

    @jax.jit
    def too_much(seed):
        x = lax.broadcasted_iota(jnp.float32, (rows, width), 1) + seed
        return jax_topk.top_k_indices(x, 5, implementation="cuda")

    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(too_much(jnp.float32(1)))
    gpu.check(inputs.rows_of(2_000, np.float32), 50)


@pytest.mark.gpu
def test_k_at_and_beyond_the_limit_through_every_form(gpu):
    limit = _native.MAX_K
    x = inputs.rows_of(limit + 200, jnp.bfloat16, generators=(inputs.normal, inputs.few_values))
    gpu.check(x, limit)
    with pytest.raises(RuntimeError, match=f"k={limit + 1} exceeds {limit}"):
        gpu.top_k(x, limit + 1)
    results = jax_topk.top_k(gpu.put(x), limit + 1)  # the expression serves
    assert _lowering.choose("cuda", x.dtype, limit + 1, None) == "xla"
    for result, wanted in zip(results, oracle.top_k(x, limit + 1), strict=True):
        assert_same(np.asarray(result), wanted)
