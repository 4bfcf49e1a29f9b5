"""`python -m jax_topk` tells the truth, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib

import jax
import numpy as np
import pytest

from jax_topk import __main__ as command
from jax_topk import _lowering, _native

SMALL = ["--rows", "5", "--width", "300", "--k", "20"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Only the CPU is looked at, on a machine with a GPU too."""
    monkeypatch.setattr(command, "find_devices", lambda: ({"cpu": jax.devices("cpu")}, ""))


def test_says_what_was_found_and_passes(capsys):
    assert command.main(SMALL) == 0
    output = capsys.readouterr().out
    used = _lowering.choose("cpu", np.float32, 1, None)
    assert f"jax                         {jax.__version__}" in output
    assert _native.CPU.reason in output
    for dtype in command.DTYPES:
        line = next(line for line in output.splitlines() if line.startswith(f"cpu       {dtype}"))
        assert line.split()[2] == used
        assert line.endswith("equal")
    assert "FAILED" not in output


@pytest.mark.parametrize("part", ["values", "indices", "top_k_indices"])
def test_fails_where_a_result_differs(monkeypatch, capsys, part):
    right = command.top_k, command.top_k_indices

    def wrong_top_k(*arguments, implementation=None, **keywords):
        values, indices = right[0](*arguments, implementation=implementation, **keywords)
        if implementation is None and part == "values":
            values = values + values.dtype.type(1)
        if implementation is None and part == "indices":
            indices = indices[:, ::-1]
        return [values, indices]

    def wrong_indices(*arguments, implementation=None, **keywords):
        indices = right[1](*arguments, implementation=implementation, **keywords)
        return indices + 1 if implementation is None and part == "top_k_indices" else indices

    monkeypatch.setattr(command, "top_k", wrong_top_k)
    monkeypatch.setattr(command, "top_k_indices", wrong_indices)
    assert command.main(SMALL) == 1
    output = capsys.readouterr().out
    assert "differ from the XLA expression" in output
    assert "differ from the NumPy oracle" in output


def test_fails_where_both_are_wrong(monkeypatch, capsys):
    right = command.oracle.top_k

    def wrong(*arguments, **keywords):
        values, indices = right(*arguments, **keywords)
        return values, indices + 1

    monkeypatch.setattr(command.oracle, "top_k", wrong)
    assert command.main(SMALL) == 1
    output = capsys.readouterr().out
    assert "differ from the XLA expression" not in output
    assert "the indices of top_k" in output


def test_explains_absent_modules(monkeypatch, capsys):
    for name in ("CPU", "CUDA"):
        absent = _native.Native(name.lower(), None, f"the {name} module was not built; do this")
        monkeypatch.setattr(_native, name, absent)
    assert command.main(SMALL) == 0
    output = capsys.readouterr().out
    assert "the CPU module was not built; do this" in output
    assert "the CUDA module was not built; do this" in output
    assert "JAX shows no CUDA device" in output


def test_without_any_device(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_devices", lambda: ({}, "Unable to initialize backend"))
    assert command.main(SMALL) == 1
    output = capsys.readouterr().out
    assert "JAX could not start every platform: Unable to initialize backend" in output
    assert "nothing can be checked" in output


def test_a_platform_without_kernels(capsys):
    rows = command.platform_rows({"tpu": jax.devices("cpu")})
    assert rows[0][2:] == ("xla", "no kernels exist for this platform")


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--k", "9", "--width", "8"]])
def test_impossible_sizes(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "0 <= k <= width" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["api", "sharding", "debug", "_axis_check", "install"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"jax_topk.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=flags)
    num_examples = 0
    for attribute in module.__all__:
        for case in finder.find(getattr(module, attribute), attribute, module, globs={}):
            num_examples += len(case.examples)
            runner.run(case)
    assert runner.failures == 0
    if name in ("api", "sharding"):
        assert num_examples >= 4
