"""Runs an implementation so that its results land between guard zones.

The native modules have an entry (`select`) that takes addresses. The buffers are JAX arrays, which
the entry changes behind JAX's back: legal here, since each is used by nobody else, waited for
before, and read after. What goes through the public functions is computed under `jax.jit`, and its
results are then put into the same buffers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax

import jax_topk
from jax_topk import _native
from jax_topk.fuzz.plans import KERNEL_PATHS, kernel_paths

__all__ = ["IMPLEMENTATIONS", "Call", "Target", "make_target"]

IMPLEMENTATIONS = ("cuda", "cpu", "xla")


@dataclasses.dataclass(frozen=True)
class Call:
    """One selection on rows that lie anywhere in a buffer.

    Attributes:
        rows: number of rows.
        width: allocated columns.
        k: number of results.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        smallest: the mode.
        output: `"sorted"`, `"unsorted"` or `"indices"`.
        plan: overrides of the CUDA plan, or `threads=N` for the CPU target.
        uses_api: through the public functions.
        operand_begin: element of the operand's buffer at which the first row begins.
        first_row: element of starts and lengths at which the first row's are.
        out_begin: element of the arenas at which the results begin.
    """

    rows: int
    width: int
    k: int
    dtype: str
    smallest: bool
    output: str
    plan: str
    uses_api: bool
    operand_begin: int
    first_row: int
    out_begin: int

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2


class Target:
    """An implementation on a device of its platform."""

    def __init__(self, implementation: str):
        """Finds the device and the native module.

        Args:
            implementation: `"cuda"`, `"cpu"` or `"xla"`.

        Raises:
            ValueError: it cannot run here; the message says why.
        """
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
            )
        self.implementation = implementation
        if implementation == "xla":
            self.device = jax.devices()[0]
            return
        native = _native.CUDA if implementation == "cuda" else _native.CPU
        if native.module is None:
            raise ValueError(f"implementation={implementation!r} cannot run: {native.reason}")
        if not hasattr(native.module, "select"):
            raise ValueError(
                f"{native.module.__file__} is older than the fuzzer: it has no `select`; reinstall"
                " jax_topk: `pip install .`"
            )
        try:
            self.device = jax.devices("cuda" if implementation == "cuda" else "cpu")[0]
        except RuntimeError as error:
            raise ValueError(f"implementation={implementation!r} cannot run: {error}") from None
        self._module: Any = native.module
        self._limits = (
            self._module.device_limits(self._ordinal) if implementation == "cuda" else None
        )

    @property
    def _ordinal(self) -> int:
        """The CUDA runtime's number of the device."""
        return int(getattr(self.device, "local_hardware_id", None) or 0)

    def is_legal(self, rows: int, width: int, k: int, dtype: str, plan: str) -> bool:
        """Whether the device can serve a plan."""
        if self.implementation != "cuda" or plan == "":
            return True
        try:
            self._plan(rows, width, k, dtype, plan)
        except ValueError:
            return False
        return True

    def _plan(self, rows: int, width: int, k: int, dtype: str, plan: str) -> Any:
        planner: Any = _native.CPU.module
        if planner is None:
            raise RuntimeError(f"the launch planner is missing: {_native.CPU.reason}")
        return planner.plan_launch(rows, width, k, dtype, False, self._limits, plan)

    def run(
        self,
        call: Call,
        operand: Array,
        starts: Array,
        lengths: Array,
        values: Array,
        indices: Array,
    ) -> tuple[Array, Array]:
        """Runs one call and waits.

        Args:
            call: what to run.
            operand: `[elements]` unsigned integers of the dtype's size.
            starts: int32.
            lengths: int32.
            values: arena, as `operand`.
            indices: arena, int32.

        Returns:
            The arenas with the results in them: the same arrays, or new ones.
        """
        if call.uses_api:
            begins = np.array([call.operand_begin, call.first_row, call.out_begin], np.int32)
            static = (
                *(call.rows, call.width, call.k, call.dtype, call.smallest, call.output),
                *(call.plan if self.implementation == "cuda" else "", self.implementation),
            )
            arenas = _call_api(static, begins, operand, starts, lengths, values, indices)
            values, indices = jax.block_until_ready(arenas)
            return values, indices
        plan: Any = call.plan
        options = {"plan": plan}
        if self.implementation == "cpu":
            options = {"threads": int(plan.partition("=")[2] or 1)}
        else:
            options["device"] = self._ordinal
        self._module.select(
            operand=operand.unsafe_buffer_pointer() + call.operand_begin * call.element_bytes,
            starts=starts.unsafe_buffer_pointer() + 4 * call.first_row,
            lengths=lengths.unsafe_buffer_pointer() + 4 * call.first_row,
            values=(
                0
                if call.output == "indices"
                else values.unsafe_buffer_pointer() + call.out_begin * call.element_bytes
            ),
            indices=indices.unsafe_buffer_pointer() + 4 * call.out_begin,
            rows=call.rows,
            width=call.width,
            k=call.k,
            dtype=call.dtype,
            smallest=call.smallest,
            sorted=call.output == "sorted",
            **options,
        )
        return values, indices

    def paths(
        self, call: Call, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """The path of every row of a call.

        Args:
            call: the call.
            starts: `[rows]` clamped.
            lengths: `[rows]` clamped.

        Returns:
            `(names, places)`: `places` `[rows]` says which name each row's path has.
        """
        if self.implementation == "xla":
            return ("expression",), np.zeros(call.rows, np.int64)
        if self.implementation == "cpu":
            how = "XLA's threads" if call.uses_api else call.plan
            names = (f"scan, {how}", f"copy, {how}", "nothing wanted")
            return names, np.where(call.k == 0, 2, np.where(lengths <= call.k, 1, 0))
        plan = self._plan(call.rows, call.width, call.k, call.dtype, call.plan)
        shared = ", cluster" if plan["cluster_size"] > 1 else ""
        places = kernel_paths(
            plan,
            width=call.width,
            k=call.k,
            dtype=call.dtype,
            is_sorted=call.output == "sorted",
            starts=starts,
            lengths=lengths,
            # XLA's buffers begin at multiples of 256 bytes.
            operand_address=0 if call.uses_api else call.operand_begin * call.element_bytes,
        )
        return tuple(f"{plan['path']}: {name}{shared}" for name in KERNEL_PATHS), places


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _call_api(
    static: tuple[Any, ...],
    begins: Array,
    operand: Array,
    starts: Array,
    lengths: Array,
    values: Array,
    indices: Array,
) -> tuple[Array, Array]:
    """The public functions on part of a buffer, results written into the arenas."""
    rows, width, k, dtype, smallest, output, plan, implementation = static
    operand_begin, first_row, out_begin = begins
    bits = lax.dynamic_slice(operand, (operand_begin,), (rows * width,)).reshape(rows, width)
    keywords: dict[str, Any] = {
        "row_starts": lax.dynamic_slice(starts, (first_row,), (rows,)),
        "lengths": lax.dynamic_slice(lengths, (first_row,), (rows,)),
        "mode": "smallest" if smallest else "largest",
        "implementation": implementation,
        "_plan": plan,
    }
    x = lax.bitcast_convert_type(bits, np.dtype(jax.numpy.dtype(dtype)))
    if output == "indices":
        found_indices = jax_topk.top_k_indices(x, k, **keywords)
    else:
        found, found_indices = jax_topk.top_k(x, k, sorted=output == "sorted", **keywords)
        found = lax.bitcast_convert_type(found, values.dtype).reshape(-1)
        values = lax.dynamic_update_slice(values, found, (out_begin,))
    return values, lax.dynamic_update_slice(indices, found_indices.reshape(-1), (out_begin,))


def make_target(implementation: str) -> Target:
    """The target of an implementation; `auto` is the one that `jax_topk` would choose here.

    Raises:
        ValueError: it cannot run here; the message says why.
    """
    if implementation == "auto":
        platform = jax.devices()[0].platform
        name = "cuda" if platform == "gpu" else platform
        native = {"cuda": _native.CUDA, "cpu": _native.CPU}.get(name)
        implementation = name if native is not None and native.is_available else "xla"
    return Target(implementation)
