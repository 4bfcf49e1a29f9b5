"""The CUDA target on a GPU: every path, every boundary, repeated, interleaved and concurrent.

The contract, the transformations and the conformance with `lax.top_k` are tested for CUDA by the
files that test them for all implementations; here is what only a GPU can get wrong.
"""

from __future__ import annotations

import concurrent.futures
import functools

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from plans import BOUNDARIES, ILLEGAL, PLANS
from runners import Runner, assert_same, gpu_devices

import jax_topk
from jax_topk import _native
from jax_topk.bench import oracle
from jax_topk.debug import top_k_indices_with_plan, top_k_with_plan

pytestmark = pytest.mark.gpu

WIDTH = 36_000
FLOATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.fixture
def gpu():
    with jax.default_device(gpu_devices()[0]):
        yield Runner("cuda", gpu_devices()[0])


# --- every path at every boundary -----------------------------------------------------------------


def boundary_lengths(k: int) -> np.ndarray:
    """Every length at which a path may begin or end, its neighbours, and the extremes."""
    around = {b + d for b in (*BOUNDARIES, k, 2 * k) for d in (-1, 0, 1)}
    return np.array(sorted({n for n in around if n <= WIDTH} | {0, -1, WIDTH, WIDTH + 1}), np.int32)


@functools.lru_cache(maxsize=2)
def rows_at_boundaries(dtype: str, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, starts and lengths: each boundary with several generators, NaN outside the windows."""
    lengths = np.repeat(boundary_lengths(k), 4)
    rng = np.random.default_rng(k)
    makers = rng.permutation(np.resize(np.arange(len(inputs.GENERATORS)), len(lengths)))
    starts = np.where(
        rng.integers(0, 2, len(lengths)) == 0,
        0,
        rng.integers(0, 1 + np.maximum(WIDTH - lengths, 0)),
    ).astype(np.int32)
    x = np.stack([inputs.cast(inputs.GENERATORS[i](rng, WIDTH), FLOATS[dtype]) for i in makers])
    place = np.arange(WIDTH)
    ends = starts.astype(np.int64) + lengths
    x[(place < starts[:, None]) | (place >= ends[:, None])] = np.nan
    return x, starts, lengths


@functools.lru_cache(maxsize=4)
def placed_and_expected(dtype: str, k: int, mode: str):
    x, starts, lengths = rows_at_boundaries(dtype, k)
    wanted = oracle.top_k(x, k, starts, lengths, mode == "smallest")
    by_index = oracle.top_k(x, k, starts, lengths, mode == "smallest", sorted=False)
    return jax.device_put(x, gpu_devices()[0]), starts, lengths, wanted, by_index


def check_plan(dtype: str, k: int, mode: str, plan: str) -> None:
    x, starts, lengths, wanted, by_index = placed_and_expected(dtype, k, mode)
    keywords = {
        "lengths": lengths,
        "row_starts": starts,
        "mode": mode,
        "implementation": "cuda",
    }
    for is_sorted, expected in ((True, wanted), (False, by_index)):
        results = top_k_with_plan(x, k, plan, sorted=is_sorted, **keywords)
        for result, want in zip(results, expected, strict=True):
            assert_same(np.asarray(result), want)
    assert_same(np.asarray(top_k_indices_with_plan(x, k, plan, **keywords)), by_index[1])


def legal_here(plan: str) -> None:
    """Skips a plan that this device has no clusters for."""
    largest = _native.CUDA.module.device_limits(0)["max_cluster_size"]
    wanted = max([int(p.split("=")[1]) for p in plan.split(",") if p.startswith("cluster")] + [1])
    if wanted > largest:
        pytest.skip(f"the largest cluster of this device is {largest}")


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 64, 2048])
def test_every_boundary(gpu, dtype, k, mode):
    check_plan(dtype, k, mode, "")


@pytest.mark.parametrize(
    ("dtype", "k", "mode"),
    [("float32", 2048, "largest"), ("float32", 64, "smallest"), ("bfloat16", 512, "largest")],
)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_every_plan(gpu, plan, dtype, k, mode):
    legal_here(plan)
    check_plan(dtype, k, mode, plan)


@pytest.mark.parametrize(
    "k", [2, 3, 31, 33, 127, 511, 513, 1023, 1025, 2047, 2049, 3000, 4095, 4096]
)
def test_every_size_of_k(gpu, k):
    x = inputs.rows_of(9_000, np.float32)
    starts, lengths = inputs.windows_of(len(x), 9_000, seed=k)
    gpu.check(x, k, starts=starts, lengths=lengths)


def test_the_limit_of_k(gpu):
    limit = _native.MAX_K
    assert limit >= 4096
    x = inputs.rows_of(limit + 1, np.float32, generators=(inputs.normal, inputs.relu))
    gpu.check(x, limit)
    text = jax.jit(lambda x: jax_topk.top_k(x, limit + 1)).lower(gpu.put(x)).as_text()
    assert "jax_topk_v1" not in text


@pytest.mark.parametrize(("plan", "message"), ILLEGAL.items(), ids=ILLEGAL)
def test_illegal_plans_raise(gpu, plan, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            top_k_with_plan(gpu.put(np.ones((2, 100), np.float32)), 5, plan, implementation="cuda")
        )


# --- the values decide nothing but the result -----------------------------------------------------


def test_repeated_and_interleaved_calls_are_bit_equal(gpu):
    """Set or order changing between runs because of atomics: flashinfer 2584, aiter 4415."""
    generators = (inputs.few_values, inputs.equal, inputs.relu, inputs.clustered, inputs.normal)
    x = gpu.put(inputs.rows_of(WIDTH, np.float32, generators=generators))
    other = gpu.put(inputs.rows_of(5_000, np.float32))
    calls = [
        jax.jit(functools.partial(jax_topk.top_k, k=2048, implementation="cuda", _plan=plan))
        for plan in ("", "path=exact", "cluster=1")
    ]
    disturb = jax.jit(functools.partial(jax_topk.top_k_indices, k=900, implementation="cuda"))
    first = [np.asarray(result) for result in calls[0](x)]
    for repeat in range(60):
        disturb(other, lengths=np.int32(80 * repeat))
        for result, wanted in zip(calls[repeat % 3](x), first, strict=True):
            assert_same(np.asarray(result), wanted)


def test_outputs_are_written_everywhere(gpu):
    """Dirty memory: whatever the buffers of results held before, every element is written."""
    x = inputs.rows_of(5_000, np.float32)
    lengths = np.resize(np.array([0, 1, 7, 599, 600, 601, 5_000], np.int32), len(x))
    for seed in range(5):
        # Freed memory of just this size is what the results are allocated from.
        junk = [jnp.full((len(x), 600), seed - 3, dtype) for dtype in (np.float32, np.int32)]
        jax.block_until_ready(junk)
        del junk
        gpu.check(x, 600, lengths=lengths)


def test_threads_and_streams(gpu):
    """Several threads call several executables at once."""
    cases = []
    for seed, (rows, width, k) in enumerate([(1, 36_000, 2048), (7, 9_000, 64), (40, 3_000, 500)]):
        x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
        function = jax.jit(functools.partial(jax_topk.top_k, k=k, implementation="cuda"))
        cases.append((function, gpu.put(x), oracle.top_k(x, k)))

    def work(index):
        function, x, expected = cases[index % len(cases)]
        for _ in range(40):
            for result, wanted in zip(function(x), expected, strict=True):
                assert_same(np.asarray(result), wanted)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_beside_a_kernel_that_fills_the_device(gpu):
    """Clusters and groups of CTAs must not wait for each other on a device that is busy."""
    x = np.random.default_rng(3).normal(size=(200, WIDTH)).astype(np.float32)
    matrix = gpu.put(np.ones((4096, 4096), np.float32))
    expected = oracle.top_k_indices(x[:5], 2048)

    @jax.jit
    def both(x, matrix):
        product = matrix @ matrix
        return jax_topk.top_k_indices(x, 2048, implementation="cuda"), product @ matrix

    for _ in range(10):
        indices, product = both(gpu.put(x), matrix)
        assert_same(np.asarray(indices[:5]), expected)
        assert float(product[0, 0]) == 4096.0**2


# --- sizes ----------------------------------------------------------------------------------------


def test_a_row_of_eight_million(gpu):
    width = 8_388_607
    rng = np.random.default_rng(4)
    x = np.stack([rng.normal(size=width), np.round(rng.normal(size=width))]).astype(np.float32)
    gpu.check(x, 2048, lengths=np.array([width, width - 1]), outputs=("sorted", "indices"))


def test_seventy_thousand_rows(gpu):
    rng = np.random.default_rng(5)
    x = rng.integers(0, 50, size=(70_001, 60)).astype(np.float32)
    lengths = rng.integers(0, 61, 70_001)
    gpu.check(x, 16, lengths=lengths, outputs=("sorted",))


@pytest.mark.slow
@pytest.mark.parametrize("elements", [2**31, 2**32])
def test_operands_beyond_32_bit_offsets(gpu, elements):
    """`row * stride` in 32 bits reads the wrong row."""
    width = 1 << 20
    rows = elements // width + 3

    @jax.jit
    def select():
        # Each row: its own number at its own place, all else lower.
        row = lax.broadcasted_iota(jnp.int32, (rows, width), 0)
        column = lax.broadcasted_iota(jnp.int32, (rows, width), 1)
        x = jnp.where(column == (row * 37) % width, jnp.bfloat16(1), jnp.bfloat16(-1))
        return jax_topk.top_k(x, 2, implementation="cuda")

    values, indices = (np.asarray(result) for result in select())
    wanted = (np.arange(rows) * 37) % width
    assert (indices[:, 0] == wanted).all()
    assert (indices[:, 1] == (wanted == 0)).all()  # the tie of all others: the lowest index
    assert (values == np.array([1, -1], values.dtype)).all()


@pytest.mark.parametrize("offset", range(1, 9))
def test_rows_at_every_alignment(gpu, offset):
    """Views of a larger array: rows that begin at no multiple of a vector."""
    for dtype in FLOATS.values():
        base = inputs.rows_of(1_009, dtype)
        view = np.ascontiguousarray(base[:, offset:])
        function = jax.jit(lambda x: jax_topk.top_k(x[:, offset:], 40, implementation="cuda"))
        for result, wanted in zip(function(gpu.put(base)), oracle.top_k(view, 40), strict=True):
            assert_same(np.asarray(result), wanted)


# --- the XLA expression on this platform, and what lax.top_k does here ----------------------------


# For k <= 16 and widths divisible by 1024, XLA serves `lax.top_k` by a kernel that compares floats
# as numbers. The expression once used it, and got every masked row wrong.
@pytest.mark.parametrize(("width", "k"), [(700, 50), (1024, 1), (4096, 16), (8192, 17)])
@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_xla_expression_on_the_gpu(gpu, dtype, mode, width, k):
    x = inputs.rows_of(width, FLOATS[dtype])
    starts, lengths = inputs.windows_of(len(x), width)
    runner = Runner("xla", gpu.device)
    runner.check(x, k, starts=starts, lengths=lengths, mode=mode)
    runner.check(x, k, mode=mode)


@pytest.mark.parametrize("name", ["int32", "int8", "uint16", "bool", "float8_e4m3fn", "int4"])
def test_other_types_on_the_gpu(gpu, name):
    dtype = np.dtype(bool if name == "bool" else getattr(jnp, name))
    x = np.random.default_rng(6).integers(0, 7, size=(4, 300)).astype(np.float32).astype(dtype)
    lengths = np.array([300, 5, 0, 100])
    for result, wanted in zip(
        jax_topk.top_k(gpu.put(x), 20, lengths=lengths),
        oracle.top_k(x, 20, None, lengths),
        strict=True,
    ):
        assert_same(np.asarray(result), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_install_may_replace_lax_top_k_of_narrow_floats(gpu, dtype):
    """`jax_topk.install` relies on it: the same bits for every pattern that is not a NaN."""
    assert dtype in jax_topk_install().EQUAL_DTYPES["cuda"]
    patterns = np.random.default_rng(7).permutation(1 << 16).astype(np.uint16)
    values = patterns.view(FLOATS[dtype])
    values = values[~np.isnan(values.astype(np.float32))][: 15 * 4096]
    x = gpu.put(values.reshape(15, 4096))
    for ours, theirs in zip(
        jax_topk.top_k(x, 4096, implementation="cuda"), lax.top_k(x, 4096), strict=True
    ):
        assert_same(np.asarray(ours), np.asarray(theirs))


def test_install_may_replace_lax_top_k_of_float32(gpu):
    generators = tuple(
        make
        for make in inputs.GENERATORS
        if make not in (inputs.nans, inputs.lowest_bits, inputs.random_bits)
    )
    x = gpu.put(inputs.rows_of(20_000, np.float32, generators=generators))
    for k in (1, 500, 4096):
        for ours, theirs in zip(
            jax_topk.top_k(x, k, implementation="cuda"), lax.top_k(x, k), strict=True
        ):
            assert_same(np.asarray(ours), np.asarray(theirs))


def test_install_on_the_gpu(gpu):
    x = gpu.put(inputs.rows_of(3_000, np.float32, generators=(inputs.normal, inputs.relu)))
    wanted = [np.asarray(result) for result in jax.jit(lambda x: lax.top_k(x, 100))(x)]
    with jax_topk.installed():
        function = jax.jit(lambda x: lax.top_k(x, 100))
        assert _native.TARGET_VALUES_INDICES in function.lower(x).as_text()
        results = function(x)
    for result, want in zip(results, wanted, strict=True):
        assert_same(np.asarray(result), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 16, 17])
def test_install_changes_no_zero(gpu, k, dtype):
    """XLA's kernel for small k takes -0.0 for +0.0: there, install leaves it in place."""
    x = inputs.rows_of(4096, FLOATS[dtype], generators=(inputs.signed_zeros, inputs.few_values))
    x = gpu.put(x)
    wanted = [np.asarray(result) for result in jax.jit(lambda x: lax.top_k(x, k))(x)]
    with jax_topk.installed():
        results = jax.jit(lambda x: lax.top_k(x, k))(x)
    for result, want in zip(results, wanted, strict=True):
        assert_same(np.asarray(result), want)


def jax_topk_install():
    import importlib

    return importlib.import_module("jax_topk.install")


# --- the device, the module, export ---------------------------------------------------------------


def test_the_module_describes_the_device():
    module = _native.CUDA.module
    limits = module.device_limits(0)
    assert limits["num_sms"] >= 1
    assert limits["smem_per_block_bytes"] >= 48 * 1024
    assert limits["max_cluster_size"] >= 1
    assert module.driver_version() >= 12_000
    assert module.ARCHITECTURES
    with pytest.raises(RuntimeError):
        module.device_limits(999)


def test_export(gpu):
    from jax import export

    checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
    rows, width = export.symbolic_shape("rows, width", constraints=["width >= 50"])
    exported = export.export(
        jax.jit(lambda x, n: jax_topk.top_k(x, 50, lengths=n)),
        platforms=["cuda", "cpu"],
        disabled_checks=checks,
    )(jax.ShapeDtypeStruct((rows, width), np.float32), jax.ShapeDtypeStruct((rows,), np.int32))
    assert _native.TARGET_VALUES_INDICES in exported.mlir_module()
    call = export.deserialize(exported.serialize()).call
    for width in (50, 5_000):
        x = inputs.rows_of(width, np.float32)
        _, lengths = inputs.windows_of(len(x), width)
        results = call(gpu.put(x), gpu.put(lengths))
        for result, wanted in zip(results, oracle.top_k(x, 50, None, lengths), strict=True):
            assert_same(np.asarray(result), wanted)


@pytest.mark.skipif(len(gpu_devices()) < 2, reason="needs two GPUs")
def test_two_devices(gpu):
    """Rows over two GPUs without a collective, each row over two GPUs exactly, and both at once."""
    devices = gpu_devices()[:2]
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    x = inputs.rows_of(20_000, np.float32)[:16]
    starts, lengths = inputs.windows_of(16, 20_000)
    expected = oracle.top_k(x, 900, starts, lengths)
    rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
    compiled = (
        jax.jit(lambda x, n, s: jax_topk.top_k(x, 900, lengths=n, row_starts=s))
        .lower(rows, lengths, starts)
        .compile()
    )
    text = compiled.as_text()
    assert _native.TARGET_VALUES_INDICES in text
    assert "all-gather" not in text
    merge = jax.jit(
        jax.shard_map(
            lambda x, n, s: jax_topk.sharded_top_k(x, 900, axis_name="d", lengths=n, row_starts=s),
            mesh=mesh,
            in_specs=(jax.P(None, "d"), jax.P(), jax.P()),
            out_specs=jax.P(),
        )
    )
    for results in (compiled(rows, lengths, starts), merge(x, lengths, starts)):
        for result, wanted in zip(results, expected, strict=True):
            assert_same(np.asarray(result), wanted)
    for _ in range(20):  # both devices at once, without waiting
        pending = [
            jax_topk.top_k(jax.device_put(x, device), 900, lengths=lengths, row_starts=starts)
            for device in devices
        ]
        for results in pending:
            for result, wanted in zip(results, expected, strict=True):
                assert_same(np.asarray(result), wanted)
