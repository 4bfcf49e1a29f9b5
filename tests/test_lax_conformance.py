"""`top_k` without windows is `jax.lax.top_k`, bit for bit.

Covers every case of JAX's own tests of top-k (`lax_test.py`: testTopK, testTopKOverflow;
`lax_vmap_test.py`: testTopK; `lax_autodiff_test.py`: testTopKGrad; `pjit_test.py`: test_topk), for
more dtypes and values, written anew. `test_install` runs this file once more with `jax.lax.top_k`
taken over by `jax_topk.install()`.
"""

from __future__ import annotations

import functools
import os

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads
from runners import assert_same

import jax_topk
from jax_topk.bench import oracle
from jax_topk.install import is_installed

INSTALLED = os.environ.get("JAX_TOPK_TEST_INSTALLED", "0") == "1"
SHAPES = [(20,), (5, 20), (2000,), (3, 4, 5), (1, 1)]
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
INTEGERS = [np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32]


def name_of(value) -> str:
    return getattr(value, "__name__", None) or "x".join(map(str, value))


def array(shape, dtype, distinct: bool, seed: int = 0) -> np.ndarray:
    """Values of a type: a random choice of a few (ties), or a shuffled range (no ties)."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    values = rng.permutation(size) if distinct else rng.integers(-3, 4, size=size)
    if jnp.issubdtype(dtype, jnp.unsignedinteger) or dtype == np.bool_:
        values = np.abs(values)
    return values.reshape(shape).astype(dtype)


def check_equal(top_k, x, k, axis=-1) -> None:
    """`top_k` returns what the oracle says, as `jax.lax.top_k` would return it."""
    rows = np.moveaxis(x, axis, -1)
    expected = oracle.top_k(rows.reshape(-1, rows.shape[-1]), k)
    expected = [np.moveaxis(e.reshape(*rows.shape[:-1], k), -1, axis) for e in expected]
    results = top_k(x, k, axis=axis)
    assert isinstance(results, list)
    assert len(results) == 2
    for result, wanted in zip(results, expected, strict=True):
        assert_same(np.asarray(result), wanted)


@pytest.fixture
def top_k(runner):
    """The function under test: ours, or that of JAX while ours is installed under it."""
    with jax.default_device(runner.device):
        if not INSTALLED:
            yield functools.partial(jax_topk.top_k, implementation=runner.implementation)
        elif runner.implementation == "xla":
            pytest.skip("the installed lowering is that of the kernels")
        else:
            assert is_installed()
            yield lax.top_k


def served(runner, dtype) -> None:
    if runner.implementation != "xla" and dtype not in FLOATS:
        pytest.skip("the kernels take floats; other types are forced to the XLA expression")


# --- lax_test.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_values_and_indices(top_k, shape, dtype):
    for axis in {0, len(shape) - 1}:
        check_equal(top_k, array(shape, dtype, True), min(3, shape[axis]), axis)
        for k in {0, 1, min(12, shape[axis])}:
            check_equal(top_k, array(shape, dtype, False), k, axis)


@pytest.mark.parametrize("dtype", [*INTEGERS, np.bool_], ids=name_of)
def test_integers_and_bool(dtype):
    for axis, k in ((0, 2), (-1, 12)):
        check_equal(jax_topk.top_k, array((5, 20), dtype, dtype != np.bool_), k, axis)
        check_equal(jax_topk.top_k, array((5, 20), dtype, False), k, axis)


def test_under_jit(top_k):
    for axis in (0, 1):
        jitted = jax.jit(top_k, static_argnums=1, static_argnames="axis")
        check_equal(jitted, array((5, 20), np.float32, False), 4, axis)


def check_lax_agrees(top_k, dtype) -> None:
    """The same arguments to both functions, on values where `lax.top_k` is exact too."""
    generators = tuple(g for g in inputs.GENERATORS if g.__name__ not in ("nans", "random_bits"))
    x = inputs.rows_of(200, dtype, generators=generators)
    if dtype != jnp.float32:  # on CPU, lax.top_k quiets the NaNs of bfloat16
        x = x[[g.__name__ != "lowest_bits" for g in generators]]
    for k in (1, 17, 200):
        for ours, theirs in zip(top_k(x, k), lax.top_k(x, k), strict=True):
            assert_same(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_lax_top_k_agrees(top_k, dtype):
    check_lax_agrees(top_k, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_nan_infinities_zeros_and_ties(top_k, dtype):
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 0.0, np.nan, 1.0, -0.0]
    x = inputs.cast(np.array(special, np.float32), dtype)
    rng = np.random.default_rng(1)
    for k in (1, 5, 12):
        check_equal(top_k, np.stack([rng.permutation(x) for _ in range(8)]), k)


def test_nan_payloads_of_float32_agree_with_lax(top_k):
    x = inputs.rows_of(300, np.float32, generators=(inputs.nans, inputs.random_bits))
    for ours, theirs in zip(top_k(x, 300), lax.top_k(x, 300), strict=True):
        assert_same(np.asarray(ours), np.asarray(theirs))


def test_float64_and_int64_under_x64():
    with jax.enable_x64(True):
        for dtype in (np.float64, np.int64, np.uint64):
            check_equal(jax_topk.top_k, array((3, 50), dtype, True), 7)
            check_equal(jax_topk.top_k, array((3, 50), dtype, False), 7, axis=1)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0), (2, 0, 3)], ids=name_of)
def test_empty(top_k, shape):
    x = np.zeros(shape, np.float32)
    for axis in range(len(shape)):
        k = min(2, shape[axis])
        for ours, theirs in zip(top_k(x, k, axis=axis), lax.top_k(x, k, axis=axis), strict=True):
            assert_same(np.asarray(ours), np.asarray(theirs))


def test_overflow(top_k):
    x = jax.ShapeDtypeStruct((2**31 + 1,), np.dtype("bfloat16"))
    with pytest.raises(ValueError, match="top_k returns int32 indices, which will overflow"):
        jax.eval_shape(lambda x: top_k(x, 100), x)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((np.ones(3, np.float32), -1), ValueError),
        ((np.ones(3, np.float32), 4), ValueError),
        ((np.float32(1), 1), ValueError),
        ((np.ones(3, np.complex64), 1), ValueError),
        (([1.0, 2.0], 1), TypeError),
        ((np.ones(3, np.float32), 1.5), TypeError),
    ],
)
def test_errors_have_the_types_of_lax(top_k, arguments, error):
    for function in (top_k, lax.top_k):
        with pytest.raises(error):
            function(*arguments)


def test_bad_axes_have_the_types_of_lax(top_k):
    for axis in (1, -2):
        for function in (top_k, lax.top_k):
            with pytest.raises(ValueError, match="out of bounds"):
                function(np.ones(3, np.float32), 1, axis=axis)


def test_keyword_names_are_those_of_lax(top_k):
    x = np.arange(6, dtype=np.float32)
    for function in (top_k, lax.top_k):
        _, indices = function(operand=x, k=2, axis=0)
        assert indices.tolist() == [5, 4]
    if not INSTALLED:
        check_equal(functools.partial(top_k, is_stable=False), np.zeros((2, 5), np.float32), 2)


def test_in_place_of_lax_top_k(monkeypatch):
    """Put into JAX's module, it still finds the operation that it stands for."""
    monkeypatch.setattr(lax, "top_k", jax_topk.top_k)
    for dtype in (np.float32, np.int32, np.bool_):
        check_equal(lax.top_k, array((3, 41), dtype, False), 4)


# --- lax_vmap_test.py -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 5, 3)], ids=name_of)
@pytest.mark.parametrize("dtype", [*FLOATS, np.int32], ids=name_of)
def test_vmap(runner, top_k, shape, dtype):
    served(runner, dtype)
    size = 5
    for bdim in range(len(shape) + 1):
        x = array((*shape[:bdim], size, *shape[bdim:]), dtype, True)
        k = 1 if bdim == 1 else 3
        results = jax.vmap(lambda x, k=k: top_k(x, k=k), in_axes=bdim)(x)
        rows = np.moveaxis(x, bdim, 0)
        expected = oracle.top_k(rows.reshape(-1, shape[-1]), k)
        for result, wanted in zip(results, expected, strict=True):
            assert_same(np.asarray(result), wanted.reshape(size, *shape[:-1], k))


# --- lax_autodiff_test.py -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "k"),
    [((5,), 0, 1), ((5,), -1, 3), ((5, 10), -1, 3), ((5, 10), 0, 1), ((5, 1, 5), -1, 3)],
)
def test_gradients(top_k, shape, axis, k):
    size = int(np.prod(shape))
    x = np.random.default_rng(2).permutation(size).reshape(shape).astype(np.float32)
    check_grads(
        lambda x: top_k(x, k=k, axis=axis)[0], (x,), 2, ["fwd", "rev"], 1e-2, 1e-2, eps=1e-2
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_equal_those_of_lax(top_k, axis):
    x = np.random.default_rng(3).normal(size=(6, 7)).astype(np.float32)
    x[x < 0] = 0  # ties
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(f(x, 4, axis=axis)[0] ** 2 * 0.5))(x)
        for f in (top_k, lax.top_k)
    )
    assert_same(np.asarray(ours), np.asarray(theirs))


# --- pjit_test.py ---------------------------------------------------------------------------------


def test_explicit_sharding(cpu_devices):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=cpu_devices[:4])
    x = np.random.default_rng(4).normal(size=(8, 16, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", None, "y")))
        for function in (jax_topk.top_k, lax.top_k):
            values, indices = jax.jit(lambda x, f=function: f(x, 3, axis=1))(rows)
            assert values.sharding.spec == indices.sharding.spec == jax.P("x", None, "y")
            for axis in (0, 2):
                with pytest.raises(Exception, match="should be unsharded over the axis") as caught:
                    jax.jit(lambda x, f=function, axis=axis: f(x, 3, axis=axis))(rows)
                assert "ShardingTypeError" in {c.__name__ for c in type(caught.value).__mro__}
        ours, theirs = jax_topk.top_k(rows, 3, axis=1), lax.top_k(rows, 3, axis=1)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(np.asarray(a), np.asarray(b))


# --- jnp.top_k, where JAX has it ------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(jnp, "top_k"), reason="this version of JAX has no jnp.top_k")
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_jnp_top_k_agrees(mode):
    x = array((4, 30), np.float32, False)
    ours = jax_topk.top_k(x, 5, mode=mode)
    for a, b in zip(ours, jnp.top_k(x, 5, mode=mode), strict=True):
        assert_same(np.asarray(a), np.asarray(b))
