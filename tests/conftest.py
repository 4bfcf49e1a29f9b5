"""Fixtures shared by all tests: simulated devices, and one runner per implementation.

A test that takes the fixture `runner` runs once for the XLA expression, once for the CPU target and
once for the CUDA target. The last is skipped on a machine without a GPU; with the environment
variable `JAX_TOPK_REQUIRE_GPU=1` it fails instead, so that a GPU machine cannot pass by skipping.
"""

from __future__ import annotations

import os

# Before the CPU client starts: sharding tests need several devices.
NUM_CPU_DEVICES = 8
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_CPU_DEVICES}"
)

import jax  # noqa: E402
import pytest  # noqa: E402
from runners import Runner, device_of, why_no_cuda  # noqa: E402

import jax_topk  # noqa: E402

# Set by test_install, to run the conformance tests on `jax.lax.top_k` itself.
INSTALLED = os.environ.get("JAX_TOPK_TEST_INSTALLED", "0") == "1"
REQUIRE_GPU = os.environ.get("JAX_TOPK_REQUIRE_GPU", "0") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    if INSTALLED:
        jax_topk.install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    reason = why_no_cuda()
    if reason is None:
        return
    if REQUIRE_GPU:
        pytest.fail(f"JAX_TOPK_REQUIRE_GPU is set, and the CUDA target cannot run: {reason}")
    pytest.skip(reason)


@pytest.fixture(params=["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param, device_of(request.param))


@pytest.fixture(scope="session")
def cpu_devices() -> list[jax.Device]:
    devices = jax.devices("cpu")
    assert len(devices) >= NUM_CPU_DEVICES, (
        "JAX started its CPU client before tests/conftest.py could ask for"
        f" {NUM_CPU_DEVICES} devices"
    )
    return devices[:NUM_CPU_DEVICES]
