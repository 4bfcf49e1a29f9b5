# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example: compiling programs side by side."""

import concurrent.futures
import types

import jax
import jax.numpy as jnp
import pytest

from examples.sparse_attention import compiling


def lower(function):
    return jax.jit(function).lower(jax.ShapeDtypeStruct((3,), jnp.float32))


class Lowered:
    """Stands in for a lowered program: compiles to itself, or fails."""

    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error

    def compile(self, options):
        self.log.append((self.name, options))
        if self.error is not None:
            raise self.error
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(temp_size_in_bytes=2e9)


def test_compiles_all_by_name(capsys):
    pytest.importorskip("tqdm", reason="the bar needs the 'examples' extra")
    programs = compiling.compile_all(
        {
            "double": lambda: lower(lambda x: 2 * x),
            ("a", "negative"): lambda: lower(lambda x: -x),
        },
        {"xla_gpu_autotune_level": 0},
    )
    x = jnp.array([1.0, 2.0, 3.0])
    assert programs["double"](x).tolist() == [2.0, 4.0, 6.0]
    assert programs["a", "negative"](x).tolist() == [-1.0, -2.0, -3.0]
    output = capsys.readouterr().out
    assert "2/2" in output
    assert "tracing double" in output


def test_an_error_is_raised_and_ends_the_pool(capsys):
    pytest.importorskip("tqdm", reason="the bar needs the 'examples' extra")
    log = []
    with pytest.raises(RuntimeError, match="no ptxas"):
        compiling.compile_all(
            {
                "good": lambda: Lowered(log, "good"),
                "bad": lambda: Lowered(log, "bad", RuntimeError("no ptxas")),
            },
            None,
        )
    assert sorted(log) == [("bad", None), ("good", None)]


def test_a_program_may_wait_for_another_and_is_logged():
    order, sentences = [], []
    compiler = compiling.Compiler(sentences.append)
    first = compiler.submit("first", Lowered(order, 1))
    second = compiler.submit("second", Lowered(order, 2), after=first)
    assert second.result().name == 2
    assert [name for name, _ in order] == [1, 2]
    compiler.stop()
    assert sentences[1].startswith("compiled second in ")
    assert sentences[1].endswith(" (temporary memory 2.00 GB)")


def test_what_waits_for_a_failed_program_fails_too():
    compiler = compiling.Compiler(lambda sentence: None)
    first = compiler.submit("first", Lowered([], 1, RuntimeError("no ptxas")))
    second = compiler.submit("second", Lowered([], 2), after=first)
    with pytest.raises(RuntimeError, match="no ptxas"):
        second.result()
    compiler.stop()


def test_nothing_is_compiled_after_a_stop():
    compiler, log = compiling.Compiler(lambda sentence: None), []
    compiler.stop()
    with pytest.raises((RuntimeError, concurrent.futures.CancelledError)):
        compiler.submit("late", Lowered(log, 1)).result()
    assert log == []


def test_autotuning_is_a_matter_of_gpus():
    options = compiling.options_without_autotuning
    assert options(types.SimpleNamespace(platform="cpu")) is None
    assert options(types.SimpleNamespace(platform="gpu")) == {"xla_gpu_autotune_level": 0}
