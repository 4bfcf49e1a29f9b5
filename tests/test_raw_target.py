"""The CPU target's handlers, called past this package: right or a clear error, never a crash."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from runners import device_of

from jax_topk import _native

pytestmark = pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)

TESTS = pathlib.Path(__file__).parent


def test_arbitrary_shapes_types_and_attributes(tmp_path):
    """In a process of its own, which a crash would end: the log then names the call."""
    log = tmp_path / "call.txt"
    result = subprocess.run(
        [sys.executable, str(TESTS / "raw_target.py"), "--examples", "200", "--log", str(log)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = log.read_text() if log.exists() else "none"
    assert result.returncode == 0, f"last call: {last}\n{result.stderr[-6000:]}"
    ends = {end: int(count) for count, end in re.findall(r"(\d+) (.+)", result.stdout)}
    assert sum(ends.values()) >= 200
    # Most rules were broken by some call (the test below breaks all), and many calls were right.
    assert ends["right"] > 40
    assert ends["refused by XLA"] > 20
    rules = {"operand", "operand is a scalar", "starts", "lengths", "indices", "values", "k"}
    assert len(rules & ends.keys()) >= 5, ends


def call(device, operand, starts, lengths, k, *, values=None, indices=None, times=1, **attributes):
    """One call of a target on a device, with values or, if `values` is None, without.

    `lengths` or an attribute that is None is left out; `times` is how often indices are asked for.
    """
    target = _native.TARGET_INDICES if values is None else _native.TARGET_VALUES_INDICES
    results = [] if values is None else [jax.ShapeDtypeStruct(*values)]
    results += [jax.ShapeDtypeStruct(*(indices or ((*operand.shape[:-1], k), np.int32)))] * times
    attributes = {"smallest": False, "sorted": False, "plan": "", **attributes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    operands = (operand, starts) if lengths is None else (operand, starts, lengths)
    with jax.default_device(device):
        function = jax.ffi.ffi_call(target, results)
        return jax.jit(lambda *a: function(*a, **attributes))(*operands)


X, COUNTS = np.ones((3, 10), np.float32), np.zeros(3, np.int32)


ERRORS = [
    (
        {"operand": np.float32(1), "starts": np.int32(0), "lengths": np.int32(0)},
        r"operand is a scalar; pass an array of shape \[\*batch, width\]",
    ),
    ({"operand": X.astype(np.int8)}, r"operand has element type S8; .* F32, BF16 and F16"),
    ({"starts": COUNTS[:2]}, r"starts has shape \[2\]; it must be \[3\], the shape of operand"),
    ({"lengths": X.astype(np.int32)}, r"lengths has shape \[3, 10\]; it must be \[3\]"),
    ({"indices": ((4, 2), np.int32)}, r"indices has shape \[4, 2\]; it must be \[3\] followed"),
    ({"indices": ((3,), np.int32)}, r"indices has shape \[3\]; it must be \[3\] followed by k"),
    ({"k": 11}, r"k=11 exceeds the row width 10; pass k <= operand.shape\[-1\]"),
    (
        {"values": ((3, 2), np.float16)},
        r"values has element type F16; it must be F32, as operand",
    ),
    ({"values": ((3, 3), np.float32)}, r"values has shape \[3, 3\]; it must be \[3, 2\], as"),
    ({"smallest": np.int32(1)}, "Wrong scalar data type: expected PRED but got S32"),
    ({"plan": True}, "Wrong attribute type"),
    ({"lengths": None}, "the call has 2 operands; the target takes 3: operand, starts, lengths"),
    ({"times": 2}, "the call has 2 results; the target takes 1: indices"),
    (
        {"values": ((3, 2), np.float32), "times": 2},
        "the call has 3 results; the target takes 2: values, indices",
    ),
    (
        {"values": ((3, 2), np.float32), "times": 0},
        "the call has 1 result; the target takes 2: values, indices",
    ),
    (
        {"more": True},
        "the call has 4 attributes; the target takes 3: plan, smallest, sorted;"
        " it has more, plan, smallest, sorted",
    ),
    ({"plan": None}, "the call has 2 attributes; .*; it has smallest, sorted"),
    ({"plan": None, "more": True}, "Attribute name mismatch"),
]


def check_error(platform: str, arguments: dict[str, Any], message: str) -> None:
    arguments = {"operand": X, "starts": COUNTS, "lengths": COUNTS, "k": 2, **arguments}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT(?s:.*){message}"):
        jax.block_until_ready(call(device_of(platform), **arguments))


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_every_error_of_the_handlers_says_what_is_wrong(arguments, message):
    check_error("cpu", arguments, message)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(ERRORS)), ids=[text for _, text in ERRORS])
def test_every_error_of_the_cuda_handlers_says_what_is_wrong(number):
    """In processes of their own, so that a crash is one failure."""
    code = f"import test_raw_target as t; t.check_error('cuda', *t.ERRORS[{number}])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
