"""The public contract, for every implementation, against the NumPy oracle, bit for bit."""

from __future__ import annotations

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import assert_same

import jax_topk
from jax_topk.bench import oracle

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
MODES = ["largest", "smallest"]

float_types = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.__name__)
modes = pytest.mark.parametrize("mode", MODES)


# --- values, indices, order -----------------------------------------------------------------------


def sizes_of(*sizes):
    """All sizes for float32, the last for the narrow floats, whose path is the same."""
    cases = [(jnp.float32, *size) for size in sizes]
    cases += [(dtype, *sizes[-1]) for dtype in (jnp.bfloat16, jnp.float16)]
    ids = ["-".join([dtype.__name__, *map(str, size)]) for dtype, *size in cases]
    return pytest.mark.parametrize(("dtype", "width", "k"), cases, ids=ids)


@modes
@sizes_of((1, 1), (33, 33), (1000, 17), (4099, 300))
def test_hostile_rows(runner, dtype, mode, width, k):
    runner.check(inputs.rows_of(width, dtype), k, mode=mode)


@modes
@sizes_of((33, 33), (500, 60), (4099, 300))
def test_hostile_windows(runner, dtype, mode, width, k):
    x = np.concatenate([inputs.rows_of(width, dtype, seed) for seed in range(3)])
    starts, lengths = inputs.windows_of(len(x), width)
    runner.check(x, k, starts=starts, lengths=lengths, mode=mode)


@modes
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_every_16_bit_pattern(runner, dtype, mode):
    patterns = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    # Rows of 4096, the largest k that every implementation takes.
    runner.check(patterns.view(dtype).reshape(16, 4096), 4096, mode=mode, outputs=("sorted",))


@modes
def test_total_order_of_float32(runner, mode):
    bits = [
        *(0x7FFFFFFF, 0x7FC00001, 0x7FC00000, 0x7F800001),  # +NaN, larger payload first
        *(0x7F800000, 0x7F7FFFFF, 0x3F800000, 0x00800000, 0x007FFFFF, 0x00000001),
        *(0x00000000, 0x80000000),  # +0.0, then -0.0
        *(0x80000001, 0x807FFFFF, 0xBF800000, 0xFF7FFFFF, 0xFF800000),
        *(0xFF800001, 0xFFC00000, 0xFFFFFFFF),  # -NaN
    ]
    in_order = np.array(bits, np.uint32).view(np.float32)
    shuffled = np.random.default_rng(1).permutation(len(bits))
    values, indices = runner.top_k(in_order[shuffled][None], len(bits), mode=mode)
    expected = np.argsort(shuffled)
    if mode == "smallest":
        in_order, expected = in_order[::-1], expected[::-1]
    assert_same(values, in_order[None].copy())
    assert_same(indices, expected[None].astype(np.int32))


@modes
@float_types
def test_ties_go_to_the_lowest_index(runner, dtype, mode):
    x = np.zeros((1, 1000), dtype)
    values, indices = runner.top_k(x, 10, mode=mode)
    assert indices.tolist() == [list(range(10))]
    assert_same(values, x[:, :10])


def test_unsorted_results_and_indices_ascend(runner):
    x = inputs.rows_of(1000, np.float32)
    lengths = np.full(len(x), 40, np.int32)
    _, indices = runner.top_k(x, 50, lengths=lengths, sorted=False)
    assert_same(indices, runner.top_k_indices(x, 50, lengths=lengths))
    assert (np.diff(indices[:, :40].astype(int), axis=1) > 0).all()
    assert (indices[:, 40:] == -1).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("output", ["sorted", "unsorted", "indices"])
def test_every_axis(runner, axis, output):
    x = inputs.cast(np.random.default_rng(2).normal(size=(5, 6, 7)), np.float32)
    lengths = np.random.default_rng(3).integers(0, 8, size=np.delete(x.shape, axis))
    rows = np.moveaxis(x, axis, -1)
    expected = oracle.top_k(
        rows.reshape(-1, rows.shape[-1]), 4, None, lengths.reshape(-1), False, output == "sorted"
    )
    expected = [np.moveaxis(e.reshape(*rows.shape[:-1], 4), -1, axis) for e in expected]
    if output == "indices":
        assert_same(runner.top_k_indices(x, 4, axis=axis, lengths=lengths), expected[1])
    else:
        results = runner.top_k(x, 4, axis=axis, lengths=lengths, sorted=output == "sorted")
        for result, wanted in zip(results, expected, strict=True):
            assert_same(result, wanted)


# --- windows --------------------------------------------------------------------------------------


@modes
def test_starts_alone_and_lengths_alone(runner, mode):
    x = inputs.rows_of(100, np.float32)
    starts, lengths = inputs.windows_of(len(x), 100, seed=4)
    runner.check(x, 20, starts=starts, mode=mode)
    runner.check(x, 20, lengths=lengths, mode=mode)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 3, [2, 1, 0, -1]),
        (2, 2, [1, 0, -1, -1]),
        (-5, 2, [1, 0, -1, -1]),  # a start below 0 is 0
        (6, 100, [1, 0, -1, -1]),  # an end beyond the row is the row's end
        (8, 5, [-1] * 4),
        (2**31 - 1, 2**31 - 1, [-1] * 4),  # start + length would overflow
        (1, 2**31 - 1, [6, 5, 4, 3]),
        (3, 0, [-1] * 4),
        (3, -1, [-1] * 4),
        (-(2**31), -(2**31), [-1] * 4),
    ],
)
def test_windows_are_clamped(runner, start, length, expected):
    x = np.arange(8, dtype=np.float32)[None]
    _, indices = runner.top_k(x, 4, lengths=np.int32(length), row_starts=np.int32(start))
    assert indices.tolist() == [expected]


@modes
@float_types
def test_poison_outside_the_window_changes_nothing(runner, dtype, mode):
    width, k = 700, 60
    clean = inputs.rows_of(width, dtype)
    starts, lengths = inputs.windows_of(len(clean), width, seed=5)
    position = np.arange(width)
    windows = [
        oracle.clamp_window(start, length, width)
        for start, length in zip(starts, lengths, strict=True)
    ]
    outside = np.stack([(position < s) | (position >= s + n) for s, n in windows])
    assert outside.any()
    reference = None
    itemsize = np.dtype(dtype).itemsize
    for poison in (0x00, 0xFF, 0x7F, 0x80):
        x = clean.copy()
        # Every byte the same: zeros, -NaN and +NaN with the largest payload, a denormal.
        x[outside] = np.frombuffer(bytes([poison] * itemsize), dtype)[0]
        results = runner.top_k(x, k, lengths=lengths, row_starts=starts, mode=mode)
        results.append(runner.top_k_indices(x, k, lengths=lengths, row_starts=starts, mode=mode))
        if reference is None:
            reference = results
        for result, wanted in zip(results, reference, strict=True):
            assert_same(result, wanted)


def test_a_length_equals_slicing(runner):
    x = inputs.rows_of(300, np.float32)
    for start, length in [(0, 100), (37, 100), (200, 100)]:
        windowed = runner.top_k(x, 50, row_starts=start, lengths=length)
        sliced = runner.top_k(x[:, start : start + length].copy(), 50)
        for result, wanted in zip(windowed, sliced, strict=True):
            assert_same(result, wanted)


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (1, 7), (5, 1), (5, 7)], ids=lambda shape: f"lengths{list(shape)}"
)
def test_lengths_broadcast(runner, shape):
    x = inputs.cast(np.random.default_rng(6).normal(size=(5, 7, 20)), np.float32)
    lengths = np.random.default_rng(7).integers(0, 21, size=shape)
    full = np.broadcast_to(lengths, (5, 7)).reshape(-1)
    expected = oracle.top_k(x.reshape(35, 20), 6, None, full)
    values, indices = runner.top_k(x, 6, lengths=lengths)
    assert_same(values, expected[0].reshape(5, 7, 6))
    assert_same(indices, expected[1].reshape(5, 7, 6))


INTEGERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("place", ["numpy", "jax", "x64"])
def test_every_integer_type_of_lengths(runner, name, place):
    x = np.arange(10, dtype=np.float32)[None].repeat(3, 0)
    info = np.iinfo(name)
    lengths = np.array([3, info.max, info.min], name)
    expected = oracle.top_k(x, 4, None, [3, min(info.max, 10), min(info.min, 0)])
    if place == "numpy":
        results = runner.top_k(x, 4, lengths=lengths)
    elif place == "jax":
        if info.bits == 64:
            pytest.skip("64-bit arrays exist only under x64")
        results = runner.top_k(x, 4, lengths=jnp.asarray(lengths))
    else:
        with jax.enable_x64(True):
            results = runner.top_k(x, 4, lengths=jnp.asarray(lengths, name))
    for result, wanted in zip(results, expected, strict=True):
        assert_same(result, wanted)


@pytest.mark.parametrize("length", [0, 3, 10, 11, -1, 2**31, 2**40, 2**70, -(2**70)])
def test_python_integers_are_clamped(runner, length):
    x = np.arange(10, dtype=np.float32)[None]
    expected = oracle.top_k(x, 4, None, [length])
    for result, wanted in zip(runner.top_k(x, 4, lengths=length), expected, strict=True):
        assert_same(result, wanted)


def test_int64_lengths_are_clamped_and_not_wrapped(runner):
    # Without x64 JAX turns 2**32 + 1 into 1.
    x = np.arange(10, dtype=np.float32)[None]
    _, indices = runner.top_k(x, 3, lengths=np.array([2**32 + 1]))
    assert indices.tolist() == [[9, 8, 7]]


# --- fewer than k ---------------------------------------------------------------------------------


@modes
@float_types
def test_padding_and_real_infinities(runner, dtype, mode):
    worst = -np.inf if mode == "largest" else np.inf
    x = np.array([[1.0, worst, 2.0, worst, 3.0]], dtype)
    values, indices = runner.top_k(x, 5, lengths=np.array([4]), mode=mode)
    best_two = [2, 0] if mode == "largest" else [0, 2]
    assert indices.tolist() == [[*best_two, 1, 3, -1]]
    assert_same(values, np.array([[*x[0, best_two], worst, worst, worst]], dtype))


@modes
@float_types
def test_the_lowest_element_of_the_order_beats_padding(runner, dtype, mode):
    # -NaN with all bits set (or +NaN, for smallest) is below -inf, which pads.
    lowest = np.full((1, 6), -1, f"i{np.dtype(dtype).itemsize}")
    if mode == "smallest":
        lowest &= np.iinfo(lowest.dtype).max
    x = lowest.view(dtype)
    for start in (0, 2):
        values, indices = runner.top_k(x, 5, row_starts=start, lengths=3, mode=mode)
        assert indices.tolist() == [[0, 1, 2, -1, -1]]
        assert_same(values[:, :3], x[:, :3])
        assert_same(
            values[:, 3:], np.full((1, 2), np.inf if mode == "smallest" else -np.inf, dtype)
        )


# --- sizes at the edge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "k"),
    [((3, 10), 0), ((0, 10), 4), ((3, 0), 0), ((0, 0), 0), ((2, 0, 5), 3), ((10,), 0), ((0,), 0)],
)
def test_empty_arrays(runner, shape, k):
    x = np.ones(shape, np.float32)
    for keywords in ({}, {"lengths": 3}, {"lengths": 3, "row_starts": 1}):
        for ordered in (True, False):
            values, indices = runner.top_k(x, k, sorted=ordered, **keywords)
            assert values.shape == indices.shape == (*shape[:-1], k)
            assert (values.dtype, indices.dtype) == (np.float32, np.int32)
        assert runner.top_k_indices(x, k, **keywords).shape == (*shape[:-1], k)


def test_one_row_without_a_batch(runner):
    x = inputs.cast(np.random.default_rng(8).normal(size=100), np.float32)
    expected = oracle.top_k(x[None], 7, [3], [50])
    values, indices = runner.top_k(x, 7, row_starts=3, lengths=50)
    assert_same(values, expected[0][0])
    assert_same(indices, expected[1][0])


def test_many_short_rows(runner):
    x = np.random.default_rng(9).normal(size=(3000, 9)).astype(np.float32)
    starts, lengths = inputs.windows_of(3000, 9)
    runner.check(x, 4, starts=starts, lengths=lengths)


def test_many_batch_dimensions(runner):
    shape = (2, 1, 3, 1, 2, 1, 2, 40)
    x = np.random.default_rng(10).normal(size=shape).astype(np.float32)
    expected = oracle.top_k(x.reshape(-1, 40), 5)
    values, indices = runner.top_k(x, 5)
    assert_same(values, expected[0].reshape(*shape[:-1], 5))
    assert_same(indices, expected[1].reshape(*shape[:-1], 5))


def test_k_above_the_limit_of_the_cuda_kernels(runner):
    from jax_topk import _native

    k = _native.MAX_K + 1
    x = inputs.rows_of(k + 3, np.float32, generators=(inputs.normal, inputs.relu))
    expected = oracle.top_k(x, k)
    if runner.implementation == "cuda":
        with pytest.raises(RuntimeError, match=f"k={k} exceeds {_native.MAX_K}"):
            runner.top_k(x, k)
        results = jax_topk.top_k(runner.put(x), k)  # falls to the XLA expression
    else:
        results = runner.top_k(x, k)
    for result, wanted in zip(results, expected, strict=True):
        assert_same(np.asarray(result), wanted)


# --- other dtypes ---------------------------------------------------------------------------------

OTHER_TYPES = (
    "bool int4 int8 int16 int32 uint4 uint8 uint16 uint32 float8_e3m4 float8_e4m3 float8_e4m3fn"
    " float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn"
).split()
WIDE_TYPES = ["int64", "uint64", "float64"]


def every_pattern(name: str, width: int) -> np.ndarray:
    """`[4, width]` of a type: all or random bit patterns, ties, and the lowest value."""
    rng = np.random.default_rng(11)
    if name == "bool":
        return rng.integers(0, 2, size=(4, width)).astype(bool)
    dtype = np.dtype(getattr(jnp, name))
    if name in ("int4", "uint4", "float4_e2m1fn"):  # stored in a byte, with unused bits
        low, high = (0, 16) if name == "uint4" else (-8, 8)
        return rng.integers(low, high, size=(4, width)).astype(np.float32).astype(dtype)
    x = rng.integers(0, 256, size=(4, width * dtype.itemsize), dtype=np.uint8).view(dtype)
    x[1] = rng.choice(x[1, :3], size=width)
    x[2] = oracle.worst_value(dtype)
    x[3, ::2] = oracle.worst_value(dtype)
    return x


@modes
@pytest.mark.parametrize("name", OTHER_TYPES + WIDE_TYPES)
def test_every_other_type(name, mode):
    if name != "bool" and not hasattr(jnp, name):
        pytest.skip(f"this version of JAX has no {name}")
    with jax.enable_x64(name in WIDE_TYPES):
        x = every_pattern(name, 300)
        starts, lengths = np.array([0, 5, 290, -1]), np.array([300, 20, 50, 4])
        for window, ordered in (((None, None), mode == "largest"), ((starts, lengths), False)):
            expected = oracle.top_k(x, 30, *window, mode == "smallest", ordered)
            results = jax_topk.top_k(
                x, 30, row_starts=window[0], lengths=window[1], mode=mode, sorted=ordered
            )
            for result, wanted in zip(results, expected, strict=True):
                assert_same(np.asarray(result), wanted)


# --- one trace, one compilation -------------------------------------------------------------------


def test_one_compilation_serves_all_lengths(runner):
    num_traces = 0

    @jax.jit
    def select(x, lengths, starts):
        nonlocal num_traces
        num_traces += 1
        return jax_topk.top_k(
            x, 5, lengths=lengths, row_starts=starts, implementation=runner.implementation
        )

    x = inputs.rows_of(50, np.float32)
    for seed in range(20):
        starts, lengths = inputs.windows_of(len(x), 50, seed)
        results = select(runner.put(x), lengths, starts)
        for result, wanted in zip(results, oracle.top_k(x, 5, starts, lengths), strict=True):
            assert_same(np.asarray(result), wanted)
    assert num_traces == 1
    assert select._cache_size() == 1


def test_eager_calls_share_one_compilation(runner):
    from jax_topk.api import _select

    x = runner.put(np.ones((4, 61), np.float32))
    jax_topk.top_k(x, 3, lengths=0, implementation=runner.implementation)
    before = _select._cache_size()
    for length in (5, -5, 2**40, np.int8(7), np.uint64(9), np.array(3)):
        jax_topk.top_k(x, 3, lengths=length, implementation=runner.implementation)
    assert _select._cache_size() == before


# --- the default choice ---------------------------------------------------------------------------


@float_types
def test_the_default_equals_every_implementation(runner, dtype):
    x = inputs.rows_of(200, dtype)
    forced = runner.top_k(x, 20, lengths=150)
    default = jax_topk.top_k(runner.put(x), 20, lengths=150)
    for result, wanted in zip(default, forced, strict=True):
        assert_same(np.asarray(result), wanted)


def test_is_stable_is_accepted_and_changes_nothing():
    x = np.zeros((2, 30), np.float32)
    for is_stable in (True, False):
        values, indices = jax_topk.top_k(x, 4, is_stable=is_stable)
        assert indices.tolist() == [[0, 1, 2, 3]] * 2
        assert_same(np.asarray(values), x[:, :4])


def test_repeated_and_interleaved_calls_are_bit_equal(runner):
    """Set or order changing between runs because of atomics: flashinfer 2584, aiter 4415."""
    x = inputs.rows_of(3000, np.float32, generators=(inputs.few_values, inputs.equal, inputs.relu))
    other = inputs.rows_of(800, np.float32)
    first = [*runner.top_k(x, 500), runner.top_k_indices(x, 500)]
    for _ in range(10):
        runner.top_k(other, 70, lengths=np.arange(len(other)))
        again = [*runner.top_k(x, 500), runner.top_k_indices(x, 500)]
        for result, wanted in zip(again, first, strict=True):
            assert_same(result, wanted)


# --- defects that users of other kernels met ------------------------------------------------------


def test_vllm_51782_and_52149_crowded_bins_drop_nothing(runner):
    """Fixed candidate buffers overflow when nearly all values share a few coarse bins."""
    generators = (inputs.clustered, inputs.one_bit_apart, inputs.equal, inputs.relu)
    x = inputs.rows_of(40_000, np.float32, generators=generators)
    runner.check(x, 2048, lengths=np.array([40_000, 39_999, 30_000, 40_000]), outputs=("indices",))


def test_vllm_51593_length_minus_one_is_an_empty_window(runner):
    """A length of -1, read as unsigned, covered the row and hung at a barrier."""
    x = np.random.default_rng(12).normal(size=(4, 20_000)).astype(np.float32)
    lengths = np.array([-1, 20_000, -1, 5])
    runner.check(x, 512, lengths=lengths)
    _, indices = runner.top_k(x, 512, lengths=lengths)
    assert (indices[[0, 2]] == -1).all()


def test_vllm_49139_long_short_long_rows_share_no_state(runner):
    """Rows of one group with long, short and long windows reused a stale histogram."""
    x = np.random.default_rng(13).normal(size=(12, 20_000)).astype(np.float32)
    lengths = np.array([20_000, 3, 20_000, 0, 20_000, 700, 20_000, 512, 513, 511, 1, 20_000])
    runner.check(x, 512, lengths=lengths)


def test_vllm_41605_many_rows_per_step_finish(runner):
    """Several tokens per request hung on Hopper: more rows than there are workers."""
    x = np.random.default_rng(14).normal(size=(300, 3000)).astype(np.float32)
    lengths = np.random.default_rng(15).integers(0, 3001, size=300)
    runner.check(x, 256, lengths=lengths, outputs=("indices",))


def test_garbage_beyond_the_length_is_never_read_as_data(runner):
    """What lies behind a row's length was read as data."""
    x = np.random.default_rng(16).normal(size=(6, 20_000)).astype(np.float32)
    lengths = np.array([1, 511, 512, 513, 9_999, 19_999])
    for row, length in enumerate(lengths):
        x[row, length:] = np.float32(3e38) if row % 2 else np.nan
    runner.check(x, 512, lengths=lengths)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 31, 127, 129, 1023, 1025, 4095, 4097, 5003])
def test_rows_that_no_vector_load_divides(runner, width):
    """Vector or bulk loads past the end of a row."""
    x = np.random.default_rng(width).normal(size=(3, width)).astype(np.float32)
    runner.check(x, min(width, 100), outputs=("sorted",))
    with_window = {"starts": np.array([0, 1, width // 2]), "lengths": np.full(3, width)}
    runner.check(x, min(width, 100), outputs=("indices",), **with_window)


def test_lengths_may_change_between_calls_of_one_executable(runner):
    """A launch path was frozen at capture time by a length that the host had read."""
    x = np.random.default_rng(17).normal(size=(2, 30_000)).astype(np.float32)
    for length in (30_000, 5, 0, 16_384, 600, 2, 30_000):
        runner.check(x, 300, lengths=np.array([length, 30_000 - length]), outputs=("indices",))
