"""`jax.export`: round trips, several platforms, symbolic sizes, gradients, the named targets."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from runners import assert_same, gpu_devices

import jax_topk
from jax_topk import _native
from jax_topk.bench import oracle

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")

# Programs that hold the FFI calls name a target outside JAX's own list of stable ones.
CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]


@pytest.fixture(autouse=True)
def on_cpu():
    """Programs are exported for the CPU here, and run where JAX puts what is given to them."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def round_trip(exported):
    return export.deserialize(exported.serialize(vjp_order=1))


@pytest.fixture
def select(runner):
    if runner.implementation == "cuda":
        pytest.skip("test_cuda exports for the GPU")
    return lambda x, n, s: jax_topk.top_k(
        x, 5, lengths=n, row_starts=s, implementation=runner.implementation
    )


def test_round_trip(select):
    x = inputs.rows_of(50, np.float32)
    starts, lengths = inputs.windows_of(len(x), 50)
    exported = export.export(jax.jit(select), disabled_checks=CHECKS, platforms=["cpu"])(
        x, lengths, starts
    )
    results = round_trip(exported).call(x, lengths, starts)
    for result, wanted in zip(results, oracle.top_k(x, 5, starts, lengths), strict=True):
        assert_same(np.asarray(result), wanted)


@pytest.mark.parametrize("shape", ["rows, width", "2, width", "rows, 50", "a, b, width"])
@pytest.mark.parametrize("windows", ["both", "lengths", "starts", "neither"])
def test_symbolic_sizes(runner, shape, windows):
    if runner.implementation == "cuda":
        pytest.skip("test_cuda exports for the GPU")
    sizes = export.symbolic_shape(shape, constraints=["width >= 5"] if "width" in shape else [])
    has_starts, has_lengths = windows in ("both", "starts"), windows in ("both", "lengths")

    def select(x, n, s):
        return jax_topk.top_k(
            x,
            5,
            lengths=n if has_lengths else None,
            row_starts=s if has_starts else None,
            sorted=windows != "lengths",
            implementation=runner.implementation,
        )

    counts = jax.ShapeDtypeStruct(sizes[:-1], jnp.int32)
    exported = export.export(jax.jit(select), disabled_checks=CHECKS, platforms=["cpu"])(
        jax.ShapeDtypeStruct(sizes, jnp.float32), counts, counts
    )
    call = export.deserialize(exported.serialize()).call
    for width in (50,) if "50" in shape else (5, 50):
        rows = 2 if shape.startswith("2") else 6
        x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
        starts, lengths = inputs.windows_of(rows, width)
        batch = (3, 2) if shape.count(",") == 2 else (rows,)
        results = call(x.reshape(*batch, width), lengths.reshape(batch), starts.reshape(batch))
        expected = oracle.top_k(
            x,
            5,
            starts if has_starts else None,
            lengths if has_lengths else None,
            False,
            windows != "lengths",
        )
        for result, wanted in zip(results, expected, strict=True):
            assert_same(np.asarray(result), wanted.reshape(*batch, 5))


def test_symbolic_k():
    n, k = export.symbolic_shape("n, k", constraints=["n >= k"])
    exported = export.export(
        jax.jit(lambda x, y: jax_topk.top_k(x, y.shape[0])),
        disabled_checks=CHECKS,
        platforms=["cpu"],
    )(jax.ShapeDtypeStruct((3, n), jnp.float32), jax.ShapeDtypeStruct((k,), jnp.float32))
    x = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    for size in (1, 7):
        results = exported.call(x, np.zeros(size, np.float32))
        for result, wanted in zip(results, oracle.top_k(x, size), strict=True):
            assert_same(np.asarray(result), wanted)


def test_gradients_of_an_exported_program(select):
    x = np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32)
    lengths, starts = np.array([50, 3, 20], np.int32), np.array([0, 1, 40], np.int32)
    exported = round_trip(
        export.export(jax.jit(select), disabled_checks=CHECKS, platforms=["cpu"])(
            x, lengths, starts
        )
    )

    def loss(function):
        def of(x):
            values, indices = function(x, lengths, starts)
            return jnp.sum(jnp.where(indices < 0, 0, values) ** 2)

        return of

    wanted = jax.grad(loss(select))(x)
    assert_same(np.asarray(jax.grad(loss(exported.call))(x)), np.asarray(wanted))


def test_several_platforms_at_once():
    platforms = ["cpu", "cuda", "tpu"]
    x = np.random.default_rng(3).normal(size=(3, 50)).astype(np.float32)
    exported = export.export(
        jax.jit(lambda x: jax_topk.top_k(x, 5)), disabled_checks=CHECKS, platforms=platforms
    )(x)
    assert exported.platforms == tuple(platforms)
    module = exported.mlir_module()
    # The expression serves where no kernel does: the TPU at least.
    assert "top_k" in module
    if _native.CPU.is_available:
        assert _native.TARGET_VALUES_INDICES in module
    results = round_trip(exported).call(x)
    for result, wanted in zip(results, oracle.top_k(x, 5), strict=True):
        assert_same(np.asarray(result), wanted)


def test_a_forced_implementation_is_not_replaced_on_other_platforms():
    exporter = export.export(
        jax.jit(lambda x: jax_topk.top_k(x, 5, implementation="cpu")),
        disabled_checks=CHECKS,
        platforms=["cpu", "tpu"],
    )
    with pytest.raises(RuntimeError, match=r"'cpu' was forced, .* platform 'tpu'"):
        exporter(np.ones((3, 50), np.float32))


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_exported_programs_name_their_target():
    x = np.ones((3, 50), np.float32)
    function = jax.jit(lambda x: (jax_topk.top_k(x, 5), jax_topk.top_k_indices(x, 5)))
    with pytest.raises(ValueError, match="jax_topk_v1_"):
        export.export(function, platforms=["cpu"])(x)
    exported = export.export(function, disabled_checks=CHECKS, platforms=["cpu"])(x)
    for target in _native.TARGETS:
        assert f"@{target}(" in exported.mlir_module()


def test_target_names_are_a_promise():
    """Programs exported before must load after: names and attributes do not change."""
    assert _native.TARGET_VALUES_INDICES == "jax_topk_v1_values_indices"
    assert _native.TARGET_INDICES == "jax_topk_v1_indices"


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_attributes_are_a_promise():
    text = (
        jax.jit(lambda x: jax_topk.top_k(x, 5, lengths=3, mode="smallest", implementation="cpu"))
        .lower(jax.ShapeDtypeStruct((3, 50), np.float32))
        .as_text()
    )
    call = next(line for line in text.splitlines() if _native.TARGET_VALUES_INDICES in line)
    for attribute in ('plan = ""', "smallest = true", "sorted = true", 'num_batch_dims = "1"'):
        assert attribute in call
    assert "tensor<3x50xf32>, tensor<3xi32>, tensor<3xi32>) -> (tensor<3x5xf32>" in call


# --- programs that were exported before -----------------------------------------------------------

EXPORTED = pathlib.Path(__file__).parent / "exported"
ROOT = EXPORTED.parents[1]


def check_exported_before(platform: str, device: jax.Device) -> None:
    """A file written by an earlier version loads and is right, for several shapes."""
    exported = export.deserialize((EXPORTED / f"v1_{platform}.bin").read_bytes())
    assert exported.platforms == (platform,)
    with jax.default_device(device):
        for width in (7, 300, 9_000):
            x, narrow, half = (
                inputs.rows_of(width, t, seed=width) for t in (np.float32, jnp.bfloat16, np.float16)
            )
            starts, lengths = inputs.windows_of(len(x), width)
            placed = jax.device_put((x, narrow, half, lengths, starts), device)
            results = [np.asarray(r) for r in jax.tree.leaves(exported.call(*placed))]
            expected = [
                *oracle.top_k(x, 7, starts, lengths),
                *oracle.top_k(narrow, 7, None, lengths, True, False),
                oracle.top_k_indices(half, 7, starts, None),
            ]
            for result, wanted in zip(results, expected, strict=True):
                assert_same(result, wanted)


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_a_program_exported_before_loads_and_is_right():
    check_exported_before("cpu", jax.devices("cpu")[0])


@pytest.mark.gpu
def test_a_program_exported_before_for_a_gpu_loads_and_is_right():
    """It was exported on a machine without a GPU."""
    check_exported_before("cuda", gpu_devices()[0])


def test_the_exported_programs_say_what_made_them():
    made_with = json.loads((EXPORTED / "made_with.json").read_text())
    assert made_with["jax_topk"].split(".")[0] == jax_topk.__version__.split(".")[0]
    assert tuple(map(int, made_with["jax"].split(".")[:2])) >= (0, 10)


LOAD = """
import sys
{imports}
import numpy as np
from jax import export
x = np.zeros((2, 9), np.float32)
counts = np.zeros(2, np.int32)
import ml_dtypes
arrays = x, x.astype(ml_dtypes.bfloat16), x.astype(np.float16), counts, counts
results = export.deserialize(open({path!r}, "rb").read()).call(*arrays)
print(np.asarray(results[0][1]).tolist()[0])
"""


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_a_program_needs_jax_topk_imported():
    """Without it XLA names the target that is missing; with it the same program runs."""

    def load(imports: str) -> subprocess.CompletedProcess:
        code = LOAD.format(imports=imports, path=str(EXPORTED / "v1_cpu.bin"))
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    without = load("")
    assert without.returncode != 0
    assert "jax_topk_v1_" in without.stderr
    with_it = load("import jax_topk")
    assert with_it.returncode == 0, with_it.stderr
    assert with_it.stdout == "[-1, -1, -1, -1, -1, -1, -1]\n"


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_a_program_exported_here_runs_in_another_process(tmp_path):
    """What this version writes, a fresh process of this version reads."""
    path = tmp_path / "program.bin"
    x = np.random.default_rng(8).normal(size=(4, 200)).astype(np.float32)
    lengths = np.array([200, 3, 0, 77], np.int32)
    exported = export.export(
        jax.jit(lambda x, n: jax_topk.top_k(x, 5, lengths=n)),
        disabled_checks=CHECKS,
        platforms=["cpu"],
    )(x, lengths)
    path.write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    code = (
        "import jax_topk, numpy as np; from jax import export;"
        f"x = np.load({str(tmp_path / 'x.npy')!r});"
        f"p = export.deserialize(open({str(path)!r}, 'rb').read());"
        "print(np.asarray(p.call(x, np.array([200, 3, 0, 77], np.int32))[1]).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == oracle.top_k(x, 5, None, lengths)[1].tolist()
