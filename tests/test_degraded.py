"""Machines that lack something: what serves there, what is said, and that results stay right.

No GPU is needed: modules, drivers and GPUs are stood in for, and launches are planned for devices
that are not here. `tests/test_kernel_emulated.py` runs the kernel with the smallest of these plans.
"""

from __future__ import annotations

import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from runners import assert_same

import jax_topk
from jax_topk import __main__ as command
from jax_topk import _lowering, _native
from jax_topk.bench import oracle

X = np.random.default_rng(0).normal(size=(4, 60)).astype(np.float32)


def cuda_module(driver: int, gpus: list[tuple[int, int]], runtime: int = 13000):
    """Stands in for jax_topk._cuda on a machine with such a driver and such GPUs."""
    module = types.ModuleType("jax_topk._cuda")
    module.RUNTIME_VERSION = runtime
    module.driver_version = lambda: driver
    module.compute_capabilities = lambda: gpus
    return module


OLD_DRIVER = (12080, [(9, 0)])
OLD_GPU = (13000, [(7, 5), (7, 0)])
FINE = {
    "no driver, as where programs are exported": (0, []),
    "a driver without a GPU": (13000, []),
    "the driver of the compiler": (13000, [(9, 0)]),
    "a newer driver of the same CUDA": (13020, [(8, 0), (12, 0)]),
    "a driver of a newer CUDA": (14010, [(9, 0)]),
    "an old GPU beside a new one": (13000, [(7, 5), (9, 0)]),
}


@pytest.fixture(autouse=True)
def nothing_was_reported(monkeypatch):
    monkeypatch.setattr(_lowering, "_reported", set())


@pytest.fixture
def machine(monkeypatch):
    """Sets what the CUDA module finds, or, with None, that there is no module."""

    def become(driver_and_gpus):
        if driver_and_gpus is None:
            absent = _native.Native("cuda", None, "jax_topk._cuda was not built; run this and that")
            monkeypatch.setattr(_native, "CUDA", absent)
        else:
            module = cuda_module(*driver_and_gpus)
            monkeypatch.setattr(_native, "CUDA", _native.Native("cuda", module, "loaded it"))

    return become


def lowered_for_cuda(**keywords) -> str:
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
    function = jax.jit(lambda x: jax_topk.top_k(x, 5, **keywords))
    return export.export(function, platforms=["cuda"], disabled_checks=checks)(X).mlir_module()


# --- drivers and GPUs -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", FINE)
def test_machines_on_which_the_kernels_serve(machine, which):
    machine(FINE[which])
    assert _native.machine_problem("cuda") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.TARGET_VALUES_INDICES in lowered_for_cuda()
        assert _native.TARGET_VALUES_INDICES in lowered_for_cuda(implementation="cuda")
    assert _native.status()["cuda"] == {"available": True, "reason": "loaded it"}


PROBLEMS = [
    (None, r"_cuda was not built; run this and that"),
    (
        OLD_DRIVER,
        r"driver supports CUDA 12\.8, and jax_topk\._cuda was built with CUDA 13\.0, which needs a"
        r" driver for CUDA 13\.0 or newer; update the driver, or reinstall jax_topk with an nvcc",
    ),
    (
        OLD_GPU,
        r"newest GPU has compute capability 7\.5, and the kernels are compiled for 8\.0 and newer;"
        r" use a newer GPU, or implementation='xla'",
    ),
]


@pytest.mark.parametrize(("found", "message"), PROBLEMS, ids=["module", "driver", "gpu"])
def test_machines_on_which_they_cannot(machine, found, message):
    """The default warns, once, and takes the expression; a forced implementation raises."""
    machine(found)
    with pytest.warns(RuntimeWarning, match=f"'cuda' the XLA expression serves .*{message}"):
        assert "jax_topk_v1" not in lowered_for_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered_for_cuda()
        lowered_for_cuda(implementation="xla")
    with pytest.raises(RuntimeError, match=f"'cuda' was forced .*{message}"):
        lowered_for_cuda(implementation="cuda")
    status = _native.status()["cuda"]
    assert not status["available"]
    # What `python -m jax_topk` prints.
    ((_, _, uses, reason),) = [
        row for row in command.platform_rows({"cuda": jax.devices("cpu")}) if row[0] == "cuda"
    ]
    assert (uses, reason) == ("xla", status["reason"])
    assert re.search(message, reason)


@pytest.mark.parametrize("found", [OLD_DRIVER, OLD_GPU])
def test_lax_top_k_keeps_its_own_lowering_there(machine, found):
    machine(found)

    def module() -> str:
        checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
        function = jax.jit(lambda x: lax.top_k(x, 5))
        return export.export(function, platforms=["cuda"], disabled_checks=checks)(X).mlir_module()

    with jax_topk.installed():
        assert "jax_topk_v1" not in module()
    machine(FINE["the driver of the compiler"])
    with jax_topk.installed():  # so the test above can fail
        assert "jax_topk_v1" in module()


def test_no_warning_where_no_kernel_would_serve_anyway(machine):
    machine(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
        for x, k in ((X.astype(np.int32), 5), (np.zeros((1, 5000), np.float32), 4097)):
            function = jax.jit(lambda x, k=k: jax_topk.top_k(x, k))
            export.export(function, platforms=["cuda"], disabled_checks=checks)(x)


def test_without_the_cpu_module_results_are_right_and_it_says_so(monkeypatch):
    absent = _native.Native("cpu", None, "jax_topk._cpu was found but cannot be loaded")
    monkeypatch.setattr(_native, "CPU", absent)
    lengths = np.array([60, 5, 0, 33], np.int32)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.warns(RuntimeWarning, match="same results but slower, since .* cannot be loaded"),
    ):
        results = jax.jit(lambda x, n: jax_topk.top_k(x, 7, lengths=n))(X, lengths)
    for result, wanted in zip(results, oracle.top_k(X, 7, None, lengths), strict=True):
        assert_same(np.asarray(result), wanted)


def test_without_a_gpu_the_forced_kernel_says_what_to_do(machine):
    machine(FINE["no driver, as where programs are exported"])
    x = jax.device_put(X, jax.devices("cpu")[0])
    with pytest.raises(RuntimeError, match=r"compiled for platform 'cpu'.*place .* NVIDIA GPU"):
        jax_topk.top_k(x, 5, implementation="cuda")


def test_the_real_module_describes_this_machine():
    """Built, with or without a GPU, the module answers without raising."""
    module = _native.CUDA.module
    if module is None:
        pytest.skip(_native.CUDA.reason)
    assert module.RUNTIME_VERSION >= 12_000
    capabilities = module.compute_capabilities()
    assert all(len(pair) == 2 and pair >= (5, 0) for pair in capabilities)
    if module.driver_version() == 0:
        assert capabilities == []
        with pytest.raises(RuntimeError, match=r"no NVIDIA driver, or it is older than CUDA 1\d\."):
            module.device_limits(0)


# --- plans for devices with less ------------------------------------------------------------------

KIB = 1024
SLICES = {
    # MIG slices: few SMs, clusters as large as one of their GPCs, or smaller.
    "H100 1g": {"num_sms": 16, "smem": 227, "max_cluster_size": 8},
    "H100 2g": {"num_sms": 32, "smem": 227, "max_cluster_size": 16},
    "A100 1g": {"num_sms": 14, "smem": 163, "max_cluster_size": 1},
    "one SM": {"num_sms": 1, "smem": 227, "max_cluster_size": 1},
    "odd": {"num_sms": 7, "smem": 99, "max_cluster_size": 3},
}


def limits_of(num_sms: int, smem: int, max_cluster_size: int) -> dict[str, int]:
    return {
        "num_sms": num_sms,
        "smem_per_block_bytes": smem * KIB,
        "smem_per_sm_bytes": (smem + 1) * KIB,
        "max_cluster_size": max_cluster_size,
    }


def check_plan(rows: int, width: int, k: int, dtype: str, is_sorted: bool, limits: dict) -> bool:
    """A legal plan, or a sentence; returns which."""
    assert _native.CPU.module is not None, _native.CPU.reason
    sentence = ""
    try:
        plan = _native.CPU.module.plan_launch(rows, width, k, dtype, is_sorted, limits, "")
    except ValueError as error:
        sentence = str(error)
    if sentence:
        assert f"k={k} needs" in sentence
        assert "pass a smaller k, or use implementation='xla'" in sentence
        return False
    assert 1 <= plan["cluster_size"] <= max(1, limits["max_cluster_size"])
    assert plan["num_ctas"] == rows * plan["cluster_size"]
    # Where a row has several CTAs, none of them shares its SM.
    assert plan["cluster_size"] == 1 or plan["num_ctas"] <= limits["num_sms"]
    assert 0 < plan["smem_bytes"] <= limits["smem_per_block_bytes"]
    assert plan["smem_bytes"] <= limits["smem_per_sm_bytes"] - KIB
    assert plan["list_capacity"] >= k + 256
    return True


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("k", [1, 512, 2048, 4096])
def test_slices_and_small_devices_have_a_plan(name, k):
    limits = limits_of(**SLICES[name])
    for rows in (1, 3, 8, 200):
        assert check_plan(rows, 163_840, k, "float32", True, limits)


@settings(max_examples=150, deadline=None, database=None)
@given(
    rows=st.integers(0, 1 << 20),
    width=st.integers(1, 1 << 22),
    k=st.integers(1, 4096),
    dtype=st.sampled_from(_lowering.KERNEL_DTYPES),
    is_sorted=st.booleans(),
    num_sms=st.integers(1, 200),
    smem=st.integers(16, 227),
    max_cluster_size=st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16]),
)
def test_every_device_gets_a_plan_or_a_sentence(
    rows, width, k, dtype, is_sorted, num_sms, smem, max_cluster_size
):
    limits = limits_of(num_sms, smem, max_cluster_size)
    check_plan(rows, max(width, k), k, dtype, is_sorted, limits)


def test_a_device_with_too_little_shared_memory_says_so():
    assert not check_plan(1, 163_840, 4096, "float32", True, limits_of(132, 40, 16))
    assert check_plan(1, 163_840, 4096, "float32", True, limits_of(132, 99, 16))


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (1, "candidates=1048577", "candidates is at most 1048576"),
        (1, "candidates=2147483647", "candidates is at most 1048576"),  # was planned as negative
        (1, "candidates=1048576", "bytes of shared memory per block"),
        (2**62, "", "fewer than 2\\^31"),  # overflowed where it was multiplied by the cluster
        (2**63 - 1, "cluster=16", "fewer than 2\\^31"),
        (2**28, "cluster=8", "cluster size of 8"),
    ],
)
def test_plans_that_would_overflow_are_refused(rows, overrides, message):
    assert _native.CPU.module is not None, _native.CPU.reason
    with pytest.raises(ValueError, match=message):
        _native.CPU.module.plan_launch(
            rows, 163_840, 2048, "float32", False, limits_of(132, 227, 16), overrides
        )


# --- every platform that has no kernels -----------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_take_the_expression_silently(platform):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = export.export(
            jax.jit(lambda x: jax_topk.top_k(x, 5, lengths=3)), platforms=[platform]
        )(jnp.ones((2, 50)))
    assert "jax_topk_v1" not in exported.mlir_module()


@pytest.mark.parametrize(("platform", "is_sorted"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_the_expression_sorts_wherever_lax_top_k_is_not_known_to_order_bits(platform, is_sorted):
    """On GPUs `lax.top_k` of small k is wrong about NaN, with which the expression fills rows."""
    function = jax.jit(lambda x: jax_topk.top_k(x, 5, lengths=3, implementation="xla"))
    text = export.export(function, platforms=[platform])(jnp.ones((2, 50))).mlir_module()
    # "chlo.top_k" on one version of JAX, a custom call of that or of a similar name on another.
    calls = re.findall(r"chlo\.top_k|@\w*topk\w*|@\w*TopK\w*", re.sub(r"loc\(.*", "", text))
    assert bool(calls) != is_sorted


@pytest.mark.parametrize(
    ("k", "width", "is_taken"), [(16, 1023, True), (16, 1024, False), (17, 1024, True)]
)
def test_small_k_of_wide_rows_keeps_its_lowering_on_a_gpu(machine, k, width, is_taken):
    """There XLA has a kernel that takes -0.0 for +0.0, and `install` promises equal bits."""
    machine(FINE["the driver of the compiler"])
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
    with jax_topk.installed():
        function = jax.jit(lambda x: lax.top_k(x, k))
        exported = export.export(function, platforms=["cuda"], disabled_checks=checks)
        text = exported(jnp.ones((2, width))).mlir_module()
    assert ("jax_topk_v1" in text) == is_taken
