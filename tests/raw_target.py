"""Calls the CPU target's handlers past this package, with whatever XLA can be made to pass.

    python tests/raw_target.py --examples 300 --seed 0

Ranks, shapes, dtypes, numbers of operands and results, and types of attributes are drawn by
hypothesis, most of them nearly right. Every call must return what the oracle says or raise an
INVALID_ARGUMENT error; where the rules of `ffi/handler_checks.h` refuse it, with the sentence of
the first rule that is broken. `tests/test_raw_target.py` runs this in a process of its own: each
call is written to the file `--log` before it is made, so that a crash can be told what it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import faulthandler
import math
import pathlib
import sys
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jax_topk import _native
from jax_topk.bench import oracle

FLOATS = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))
OTHERS = tuple(
    map(np.dtype, (np.int32, np.int8, np.bool_, np.uint16, np.complex64, jnp.float8_e4m3fn))
)
INT32 = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Call:
    target: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    attributes: dict[str, Any]
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.target}({', '.join(map(str, self.operands))}) ->"
            f" {', '.join(map(str, self.results))} {self.attributes} seed {self.seed}"
        )


def mostly(usual: Any, *others: st.SearchStrategy) -> st.SearchStrategy:
    """The usual value in most of the draws."""
    return st.integers(0, 9).flatmap(lambda n: st.just(usual) if n < 9 else st.one_of(*others))


# XLA does not call what produces nothing, so zeros are rare.
sizes = mostly(2, st.integers(0, 5))
shapes = st.lists(sizes, max_size=4).map(tuple)
dtypes = st.sampled_from(FLOATS + OTHERS)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    has_values = draw(st.booleans())
    batch = draw(st.lists(mostly(3, st.integers(0, 4)), max_size=3).map(tuple))
    width = draw(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 2050])))
    k = draw(st.integers(min(1, width), width))
    k = draw(mostly(k, st.just(0), st.integers(width + 1, width + 3)))
    dtype = draw(mostly(draw(st.sampled_from(FLOATS)), dtypes))
    operand = draw(mostly((*batch, width), shapes))
    counts = [
        Array(draw(mostly(batch, shapes)), draw(mostly(INT32, dtypes)))
        for _ in ("starts", "lengths")
    ]
    indices = Array(draw(mostly((*batch, k), shapes)), draw(mostly(INT32, dtypes)))
    values = Array(draw(mostly((*batch, k), shapes)), draw(mostly(dtype, dtypes)))
    operands = [Array(operand, dtype), *counts]
    results = [values, indices] if has_values else [indices]
    # Sometimes one too few or too many.
    operands = draw(mostly(operands, st.just(operands[:2]), st.just([*operands, counts[0]])))
    results = draw(mostly(results, st.just([*results, indices])))
    attributes: dict[str, Any] = {}
    junk = st.sampled_from([None, 1, -3, 0.5, "true", "", "cluster=99"])
    for name in ("smallest", "sorted"):
        attributes[name] = draw(mostly(draw(st.booleans()), junk))
    attributes["plan"] = draw(mostly("", st.sampled_from(["path=exact", "?", "é" * 50]), junk))
    attributes["more"] = draw(mostly(None, st.sampled_from([7, "x"])))
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return Call(
        _native.TARGET_VALUES_INDICES if has_values else _native.TARGET_INDICES,
        tuple(operands),
        tuple(results),
        attributes,
        draw(st.integers(0, 1 << 30)),
    )


def what_is_wrong(call: Call) -> str | None:
    """What the error must say: `""` for XLA's own sentence, None for a call that is right."""
    has_values = call.target == _native.TARGET_VALUES_INDICES
    results = "2: values, indices" if has_values else "1: indices"
    for name, number, wanted in (
        ("operand", len(call.operands), "3: operand, starts, lengths"),
        ("result", len(call.results), results),
        ("attribute", len(call.attributes), "3: plan, smallest, sorted"),
    ):
        if number != int(wanted[0]):
            return f"the call has {number} {name}{'s' * (number != 1)}; the target takes {wanted}"
    operand, starts, lengths = call.operands
    values, indices = call.results[0], call.results[-1]
    if {starts.dtype, lengths.dtype, indices.dtype} != {INT32}:
        return ""
    if "more" in call.attributes:
        return ""
    for name, kind in (("smallest", bool), ("sorted", bool), ("plan", str)):
        if type(call.attributes.get(name)) is not kind:
            return ""
    if operand.dtype not in FLOATS:
        return "operand has element type"
    if operand.shape == ():
        return "operand is a scalar"
    *batch, width = operand.shape
    for name, counts in (("starts", starts), ("lengths", lengths)):
        if counts.shape != tuple(batch):
            return f"{name} has shape"
    if indices.shape == () or indices.shape[:-1] != tuple(batch):
        return "indices has shape"
    k = indices.shape[-1]
    if k > width:
        return f"k={k} exceeds the row width {width}"
    if has_values and values.dtype != operand.dtype:
        return "values has element type"
    if has_values and values.shape != indices.shape:
        return "values has shape"
    return None


def data_of(array: Array, rng: np.random.Generator) -> np.ndarray:
    """Hostile bytes of a type."""
    if array.dtype == np.bool_:
        return rng.integers(0, 2, array.shape).astype(np.bool_)
    size = math.prod(array.shape) * array.dtype.itemsize
    mask = rng.choice(np.array([0xFF, 0x81, 0x01], np.uint8))
    pattern = rng.integers(0, 256, size, dtype=np.uint8) & mask
    return pattern.view(array.dtype).reshape(array.shape)


def run(call: Call) -> str:
    """Makes one call and checks it; returns how it ended."""
    rng = np.random.default_rng(call.seed)
    arguments = [data_of(array, rng) for array in call.operands]
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in call.results]
    attributes = {
        name: np.int64(value) if type(value) is int else value
        for name, value in call.attributes.items()
    }
    function = jax.ffi.ffi_call(call.target, results)
    wrong = what_is_wrong(call)
    actual, error = [], None
    try:
        actual = [np.asarray(r) for r in jax.jit(lambda *a: function(*a, **attributes))(*arguments)]
    except jax.errors.JaxRuntimeError as caught:
        error = str(caught)
    if error is not None:
        assert "INVALID_ARGUMENT" in error, error
        assert wrong is not None, f"refused, but nothing is wrong: {error}"
        assert wrong in error, f"{wrong!r} is not in: {error}"
        return wrong.split(" has ")[0].split("=")[0] if wrong else "refused by XLA"
    if wrong is not None:
        # XLA does not call what produces nothing.
        assert all(math.prod(r.shape) == 0 for r in call.results), f"accepted, but {wrong!r}"
        return "nothing to do"
    x, starts, lengths = arguments
    k = call.results[-1].shape[-1]
    rows = math.prod(x.shape[:-1])
    expected = oracle.top_k(
        x.reshape(rows, x.shape[-1]),
        k,
        starts.reshape(rows),
        lengths.reshape(rows),
        call.attributes["smallest"],
        call.attributes["sorted"],
    )
    for result, wanted in zip(actual, expected[-len(actual) :], strict=True):
        assert result.tobytes() == wanted.tobytes(), "the result differs from the oracle"
    return "right"


def main() -> int:
    parser = argparse.ArgumentParser(description="Raw calls of the CPU target's FFI handlers.")
    parser.add_argument("--examples", type=int, default=300, help="number of calls")
    parser.add_argument("--seed", type=int, default=0, help="of the calls")
    parser.add_argument("--log", type=pathlib.Path, help="file that names the call being made")
    options = parser.parse_args()
    faulthandler.enable()
    ends: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(options.seed)
    @hypothesis.settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls())
    def check(call: Call) -> None:
        if options.log is not None:
            options.log.write_text(f"{call}\n")
        hypothesis.note(str(call))
        with jax.default_device(jax.devices("cpu")[0]):
            ends[run(call)] += 1

    check()
    for end, count in ends.most_common():
        print(f"{count:6} {end}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
