"""Runs an implementation on a device of its platform and compares its results with the oracle."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import jax_topk
from jax_topk import _native
from jax_topk.bench import oracle


def gpu_devices() -> list[jax.Device]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def why_no_cuda() -> str | None:
    """Why the CUDA target cannot run here, or None if it can."""
    if not gpu_devices():
        return "no CUDA device is visible to JAX"
    return _native.machine_problem("cuda")


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs one implementation on a device of its platform and compares with the oracle."""

    implementation: str
    device: jax.Device

    def put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, self.device)

    def top_k(self, x: np.ndarray, k: int, **keywords) -> list[np.ndarray]:
        """`jax_topk.top_k` on the device of this implementation, as NumPy arrays."""
        results = jax_topk.top_k(self.put(x), k, implementation=self.implementation, **keywords)
        return [np.asarray(result) for result in results]

    def top_k_indices(self, x: np.ndarray, k: int, **keywords) -> np.ndarray:
        return np.asarray(
            jax_topk.top_k_indices(self.put(x), k, implementation=self.implementation, **keywords)
        )

    def check(
        self,
        x: np.ndarray,
        k: int,
        *,
        starts: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        mode: str = "largest",
        outputs: tuple[str, ...] = ("sorted", "unsorted", "indices"),
        plan: str = "",
    ) -> None:
        """Compares every form of the result with the oracle, bit for bit.

        Args:
            x: `[rows, width]`.
            k: number of results.
            starts: `[rows]`, or None.
            lengths: `[rows]`, or None.
            mode: `"largest"` or `"smallest"`.
            outputs: which forms to ask for.
            plan: overrides of the CUDA kernel's plan.
        """
        keywords = {"lengths": lengths, "row_starts": starts, "mode": mode, "_plan": plan}
        for output in outputs:
            expected_values, expected_indices = oracle.top_k(
                x, k, starts, lengths, mode == "smallest", output == "sorted"
            )
            if output == "indices":
                assert_same(self.top_k_indices(x, k, **keywords), expected_indices)
                continue
            values, indices = self.top_k(x, k, sorted=output == "sorted", **keywords)
            assert_same(indices, expected_indices)
            assert_same(values, expected_values)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that two arrays have one type, one shape and the same bits (NaN payloads too)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.tobytes() != expected.tobytes():
        unsigned = np.dtype(f"u{actual.dtype.itemsize}")
        wrong = np.argwhere(
            np.ascontiguousarray(actual).view(unsigned)
            != np.ascontiguousarray(expected).view(unsigned)
        )
        place = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {actual.size} elements differ, the first at {place}:"
            f" {actual[place]!r} instead of {expected[place]!r}"
        )


def device_of(implementation: str) -> jax.Device:
    """The device on which an implementation is tested; `test_cuda` runs the expression on a GPU."""
    return gpu_devices()[0] if implementation == "cuda" else jax.devices("cpu")[0]
