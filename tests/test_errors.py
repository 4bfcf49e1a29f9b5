"""Every wrong argument raises before anything is traced, in a sentence that names it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_topk
from jax_topk import _lowering, _native

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def call_both(operand=X, k=2, **keywords):
    """Calls both public functions, which share their rules, and expects the same error of each."""
    errors = []
    for function in (jax_topk.top_k, jax_topk.top_k_indices):
        try:
            function(operand, k, **keywords)
        except Exception as error:
            errors.append(error)
    assert len(errors) == 2
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])
    raise errors[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": -1}, ValueError, r"nonnegative, got k=-1; pass 0 <= k"),
        (
            {"k": 7},
            ValueError,
            r"k=7, .* the row width 6 .*pass k <= operand.shape\[1\]",
        ),
        ({"k": 5, "axis": 0}, ValueError, r"k=5, which exceeds the row width 4 \(axis=0\)"),
        ({"k": 2.0}, TypeError, r"k=2.0 has type float; pass a static integer"),
        ({"k": "2"}, TypeError, r"k='2' has type str"),
        ({"k": None}, TypeError, r"k=None has type NoneType"),
        ({"k": np.array([1, 2])}, TypeError, r"k=array\(\[1, 2\]\) has type ndarray"),
        ({"axis": 2}, ValueError, r"axis=2 is out of bounds for operand of dimension 2"),
        ({"axis": -3}, ValueError, r"axis=-3 is out of bounds for operand of dimension 2"),
        ({"axis": 0.0}, TypeError, r"axis=0.0 has type float; pass a static integer"),
        ({"axis": None}, TypeError, r"axis=None has type NoneType"),
        ({"mode": "max"}, ValueError, r"mode='max' is unknown; pass one of 'largest', 'smallest'"),
        ({"mode": []}, ValueError, r"mode=\[\] is unknown"),
        ({"operand": [1.0, 2.0]}, TypeError, r"operand has type list, which is not an array"),
        ({"operand": None}, TypeError, r"operand has type NoneType"),
        ({"operand": "abc"}, TypeError, r"operand has type str"),
        (
            {"operand": np.float32(3)},
            ValueError,
            r"of dimension 0; pass an operand of at",
        ),
        ({"operand": 3.0}, ValueError, r"of dimension 0"),
        ({"operand": X + 1j}, ValueError, r"complex inputs: operand has dtype complex64"),
        ({"lengths": 2.0}, TypeError, r"lengths has dtype float32; pass integers"),
        ({"lengths": np.ones(4)}, TypeError, r"lengths has dtype float32; pass integers"),
        ({"lengths": True}, TypeError, r"lengths has dtype bool; pass integers"),
        ({"lengths": np.ones(4, bool)}, TypeError, r"lengths has dtype bool; pass integers"),
        ({"lengths": [1, 2, 3, 4]}, TypeError, r"lengths has type list, which is not an array"),
        ({"lengths": "3"}, TypeError, r"lengths has type str"),
        ({"lengths": np.ones(5, int)}, ValueError, r"lengths has shape \(5,\), .* to \(4,\)"),
        ({"lengths": np.ones((4, 1), int)}, ValueError, r"lengths has shape \(4, 1\)"),
        ({"lengths": np.ones(4, int), "axis": 0}, ValueError, r"broadcast to \(6,\)"),
        ({"row_starts": 1.5}, TypeError, r"row_starts has dtype float32; pass integers"),
        ({"row_starts": False}, TypeError, r"row_starts has dtype bool"),
        ({"row_starts": np.ones((2, 2), int)}, ValueError, r"row_starts has shape \(2, 2\)"),
        ({"implementation": "gpu"}, ValueError, r"'gpu' is unknown; .*'cuda', 'cpu', 'xla'"),
        ({"implementation": 3}, ValueError, r"implementation=3 is unknown"),
        ({"_plan": 4}, TypeError, r"plan=4 has type int; pass a string"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        call_both(**arguments)
    assert type(caught.value) is error


def test_sorted_must_be_static():
    with pytest.raises(TypeError, match=r"sorted=1 has type int; it is static"):
        jax_topk.top_k(X, 2, sorted=1)


def test_errors_of_traced_arguments():
    with pytest.raises(TypeError, match=r"(?s)__index__.*depends on the value of the argument k"):
        jax.jit(lambda k: jax_topk.top_k(X, k))(2)
    with pytest.raises(ValueError, match="lengths has shape"):
        jax.jit(lambda n: jax_topk.top_k(X, 2, lengths=n))(np.ones(5, int))
    with pytest.raises(TypeError, match="lengths has dtype float32"):
        jax.jit(lambda n: jax_topk.top_k(X, 2, lengths=n))(np.ones(4))


def test_keys_are_not_numbers():
    with pytest.raises(TypeError, match=r"operand has dtype key<"):
        jax_topk.top_k(jax.random.split(jax.random.key(0), 4), 2)


def test_k_takes_anything_with_an_index():
    for k in (2, np.int8(2), np.uint64(2), jnp.int32(2), np.array(2)):
        assert jax_topk.top_k(X, k)[1].shape == (4, 2)
    assert jax_topk.top_k(X, True)[1].shape == (4, 1)
    # A cached answer for 1 must not serve 1.0, which equals it.
    jax_topk.top_k(X, 1)
    with pytest.raises(TypeError, match=r"k=1.0 has type float"):
        jax_topk.top_k(X, 1.0)


@pytest.mark.parametrize("width", [2**31, 2**31 + 1, 2**40])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_rows_that_int32_cannot_index(width, dtype):
    row = jax.ShapeDtypeStruct((width,), dtype)
    with pytest.raises(ValueError, match=f"overflow .* the row width is {width}"):
        jax.eval_shape(lambda x: jax_topk.top_k(x, 100), row)


def test_the_widest_row():
    row = jax.ShapeDtypeStruct((3, 2**31 - 1), jnp.bfloat16)
    values, indices = jax.eval_shape(lambda x: jax_topk.top_k(x, 5, lengths=3), row)
    assert values.shape == indices.shape == (3, 5)


# --- forced implementations -----------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    """Makes a native implementation absent, as on a machine where it was not built."""

    def remove(name):
        absent = _native.Native(name, None, f"jax_topk._{name} was not built; run this and that")
        monkeypatch.setattr(_native, name.upper(), absent)

    return remove


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_forced_implementation_that_is_absent(without, name):
    without(name)
    with pytest.raises(RuntimeError, match=f"'{name}' was forced .* was not built; run this"):
        call_both(implementation=name)


def test_the_default_without_native_modules_is_the_expression(without):
    without("cpu")
    without("cuda")
    text = jax.jit(lambda x: jax_topk.top_k(x, 3)).lower(np.ones((2, 37), np.float32)).as_text()
    assert "jax_topk_v1" not in text


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, jnp.float8_e4m3fn])
def test_a_forced_kernel_that_does_not_take_the_dtype(dtype):
    name = np.dtype(dtype).name
    expected = f"operand has dtype {name} and the cpu target takes float32, bfloat16, float16"
    with pytest.raises(RuntimeError, match=expected):
        call_both(np.ones((2, 4), dtype), implementation="cpu")


def test_a_forced_implementation_of_another_platform(monkeypatch):
    # As on a machine where both modules were built.
    built = _native.Native("cuda", _native.CPU.module, "loaded")
    monkeypatch.setattr(_native, "CUDA", built)
    x = jax.device_put(X, jax.devices("cpu")[0])
    with pytest.raises(RuntimeError, match=r"'cuda' was forced, .* compiled for platform 'cpu'"):
        call_both(x, implementation="cuda")
    with pytest.raises(RuntimeError, match="was forced and cannot serve: k=5000 exceeds 4096"):
        call_both(np.ones((1, 6000), np.float32), 5000, implementation="cuda")


@pytest.mark.parametrize("platform", ["tpu", "rocm", "metal"])
@pytest.mark.parametrize("implementation", ["cpu", "cuda"])
def test_no_kernel_is_forced_onto_other_platforms(platform, implementation):
    with pytest.raises(RuntimeError, match=f"compiled for platform '{platform}'"):
        _lowering.choose(platform, np.float32, 5, implementation)
    assert _lowering.choose(platform, np.float32, 5, None) == "xla"
    assert _lowering.choose(platform, np.float32, 5, "xla") == "xla"


def test_a_message_says_how_to_reach_another_platform():
    with pytest.raises(RuntimeError, match=re.escape("pip install 'jax[cuda13]'")):
        _lowering.choose("cpu", np.float32, 5, "cuda")
    with pytest.raises(RuntimeError, match=re.escape("jax.devices('cpu')")):
        _lowering.choose("cuda", np.float32, 5, "cpu")
