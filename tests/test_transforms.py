"""Every transformation of JAX, for every implementation."""

from __future__ import annotations

import functools
import types

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads
from runners import assert_same

import jax_topk
from jax_topk import _lowering
from jax_topk.bench import oracle


@pytest.fixture
def top_k(runner):
    """`jax_topk.top_k` with the implementation and the default device of this run."""
    with jax.default_device(runner.device):
        yield functools.partial(jax_topk.top_k, implementation=runner.implementation)


@pytest.fixture
def top_k_indices(runner):
    with jax.default_device(runner.device):
        yield functools.partial(jax_topk.top_k_indices, implementation=runner.implementation)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def counts(*shape, width, seed=1):
    return np.random.default_rng(seed).integers(-1, width + 2, size=shape).astype(np.int32)


def expect(results, x, k, starts=None, lengths=None, is_sorted=True):
    """Compares results of any batch shape with the oracle."""
    width = x.shape[-1]
    flat = [None if c is None else np.broadcast_to(c, x.shape[:-1]) for c in (starts, lengths)]
    flat = [None if c is None else c.reshape(-1) for c in flat]
    expected = oracle.top_k(x.reshape(-1, width), k, *flat, False, is_sorted)
    for result, wanted in zip(results, expected, strict=True):
        assert_same(np.asarray(result), wanted.reshape(*x.shape[:-1], k))


def primitives_of(function, *arguments):
    """The primitive equations of a function by name, with those of nested jaxprs."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found.append(eqn)
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                if hasattr(sub, "eqns"):
                    visit(sub)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


# --- jit and the jaxpr ----------------------------------------------------------------------------


def test_the_primitive_appears_by_name(top_k, top_k_indices):
    x = normal(3, 20)
    for function in (lambda x: top_k(x, 4, lengths=3), lambda x: top_k_indices(x, 4)):
        names = [eqn.primitive.name for eqn in primitives_of(function, x)]
        assert names.count("jax_topk") == 1
        assert "jax_topk" in str(jax.make_jaxpr(function)(x))


def test_absent_lengths_and_starts_are_no_operands(top_k):
    def num_operands(**keywords):
        eqns = primitives_of(lambda x: top_k(x, 4, **keywords), normal(3, 20))
        return [len(eqn.invars) for eqn in eqns if eqn.primitive.name == "jax_topk"]

    assert num_operands() == [1]
    assert num_operands(lengths=3) == [2]
    assert num_operands(row_starts=3) == [2]
    assert num_operands(lengths=3, row_starts=3) == [3]


def test_unused_values_cost_nothing(top_k, runner):
    if runner.implementation == "xla":
        pytest.skip("XLA removes what is unused from its own operations")
    x = normal(3, 20)

    def targets(function):
        text = jax.jit(function).lower(runner.put(x)).as_text()
        return {name for name in ("values_indices", "indices") if f"jax_topk_v1_{name}(" in text}

    assert targets(lambda x: top_k(x, 4)) == {"values_indices"}
    assert targets(lambda x: top_k(x, 4, sorted=False)[1]) == {"indices"}
    assert targets(lambda x: top_k(x, 4)[0] * 0) == {"values_indices"}
    dropped = jax.jit(lambda x: top_k(x, 4, sorted=False)[1])(x)
    assert_same(np.asarray(dropped), oracle.top_k_indices(x, 4))
    # The indices of sorted results are in the order of values, which somebody has to look at.
    assert targets(lambda x: top_k(x, 4)[1]) == {"values_indices"}
    assert_same(np.asarray(jax.jit(lambda x: top_k(x, 4)[1])(x)), oracle.top_k(x, 4)[1])


def test_under_jit_and_without_jit(top_k):
    x = normal(3, 20)
    lengths = counts(3, width=20)
    expect(jax.jit(lambda x, n: top_k(x, 4, lengths=n))(x, lengths), x, 4, None, lengths)
    with jax.disable_jit():
        expect(top_k(x, 4, lengths=lengths), x, 4, None, lengths)
        expect(jax.vmap(lambda row: top_k(row, 4))(x), x, 4)


@pytest.fixture
def strict_jax():
    """JAX as its own tests configure it, and stricter."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks(),
        jax.enable_checks(True),
    ):
        yield


@pytest.mark.parametrize("x64", [False, True])
def test_under_a_strict_jax(top_k, strict_jax, x64):
    with jax.enable_x64(x64):
        x = normal(3, 4, 20)
        starts, lengths = counts(3, 4, width=20), np.int8(7)

        def loss(x):
            values, indices = top_k(x, 4, lengths=lengths, row_starts=starts)
            return jnp.sum(jnp.where(indices < 0, jnp.float32(0), values))

        expect(top_k(x, 4, lengths=lengths, row_starts=starts), x, 4, starts, lengths)
        expect(top_k(x, 4, sorted=False, axis=-1), x, 4, None, None, False)
        expect(jax.vmap(lambda x, n: top_k(x, 4, lengths=n))(x, starts), x, 4, None, starts)
        assert jax.grad(loss)(x).shape == x.shape


@pytest.mark.parametrize("is_jitted", [False, True])
@pytest.mark.parametrize("search", [jax.debug_nans, jax.debug_infs])
def test_a_search_for_nans_ends_at_the_primitive(top_k, search, is_jitted):
    """JAX calls the parts of a program one by one to find where a NaN comes from."""
    function = jax.jit(lambda x: top_k(x, 2)) if is_jitted else lambda x: top_k(x, 2)
    rows = np.array([[1, 2, 3], [4, 5, np.nan if search is jax.debug_nans else np.inf]], np.float32)
    with search(True):
        for value in function(np.ones((2, 3), np.float32))[0].ravel():
            assert value == 1
        with pytest.raises(FloatingPointError, match="encountered in"):
            jax.block_until_ready(function(rows))


def test_evaluating_a_jaxpr(top_k):
    x = normal(3, 20)
    closed = jax.make_jaxpr(lambda x: top_k(x, 4))(x)
    expect(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x), x, 4)


def test_ahead_of_time(top_k):
    x, lengths = normal(3, 20), counts(3, width=20)
    lowered = jax.jit(lambda x, n: top_k(x, 4, lengths=n)).trace(x, lengths).lower()
    expect(lowered.compile()(x, lengths), x, 4, None, lengths)


def test_persistent_compilation_cache(top_k, tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    x = normal(3, 23)
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for _ in range(2):  # writes it, reads it
            expect(jax.jit(lambda x: top_k(x, 4, lengths=9))(x), x, 4, None, np.full(3, 9))
            jax.clear_caches()
            assert any(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_eval_shape(top_k):
    values, indices = jax.eval_shape(
        lambda x: top_k(x, 4, axis=0), jax.ShapeDtypeStruct((9, 2, 3), jnp.bfloat16)
    )
    assert (values.shape, values.dtype) == ((4, 2, 3), jnp.bfloat16)
    assert (indices.shape, indices.dtype) == ((4, 2, 3), jnp.int32)


# --- vmap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_axis", [0, 1, 2])
@pytest.mark.parametrize("out_axis", [0, 1, 2])
def test_vmap_over_any_axis(top_k, in_axis, out_axis):
    x, lengths = normal(4, 3, 20), counts(4, 3, width=20)
    moved = np.moveaxis(x, 0, in_axis)
    function = jax.vmap(
        lambda x, n: top_k(x, 5, lengths=n), in_axes=(in_axis, 0), out_axes=out_axis
    )
    results = [np.moveaxis(result, out_axis, 0) for result in function(moved, lengths)]
    expect(results, x, 5, None, lengths)


def test_nested_vmap_and_axes(top_k):
    x, lengths, starts = normal(2, 3, 4, 20), counts(2, 4, width=20), counts(3, width=20, seed=2)

    def select(rows, n, s):
        return jax.vmap(
            jax.vmap(lambda row, n: top_k(row, 5, lengths=n, row_starts=s)), in_axes=(0, 0)
        )(rows, n)

    results = jax.vmap(jax.vmap(select, in_axes=(0, None, 0)), in_axes=(0, 0, None))(
        x[:, :, None], lengths[:, None], starts
    )
    results = [result[:, :, 0] for result in results]
    expect(results, x, 5, starts[None, :, None], lengths[:, None, :])


@pytest.mark.parametrize("batched", ["operand", "lengths", "starts", "operand+lengths", "all"])
def test_vmap_with_unbatched_arguments(top_k, batched):
    size = 6
    x, lengths, starts = normal(size, 20), counts(size, width=20), counts(size, width=20, seed=2)
    axes = tuple(
        0 if name in batched or batched == "all" else None
        for name in ("operand", "lengths", "starts")
    )
    arguments = [
        a if axis == 0 else a[0] for a, axis in zip((x, lengths, starts), axes, strict=True)
    ]
    results = jax.vmap(lambda x, n, s: top_k(x, 5, lengths=n, row_starts=s), in_axes=axes)(
        *arguments
    )
    full = [
        np.broadcast_to(a, (size, *a.shape[axis is not None :])) if axis is None else a
        for a, axis in zip(arguments, axes, strict=True)
    ]
    expect(results, full[0], 5, full[2], full[1])


def test_vmap_of_indices_along_another_axis(top_k_indices):
    x = normal(20, 4, 3)
    result = jax.vmap(lambda x: top_k_indices(x, 5, axis=0), in_axes=2, out_axes=2)(x)
    wanted = [oracle.top_k_indices(x[:, :, i].T.copy(), 5).T for i in range(3)]
    assert_same(np.asarray(result), np.stack(wanted, axis=-1))


def test_vmap_keeps_one_primitive(top_k):
    function = jax.vmap(jax.vmap(lambda row, n: top_k(row, 5, lengths=n)))
    eqns = primitives_of(function, normal(2, 3, 20), counts(2, 3, width=20))
    (eqn,) = [eqn for eqn in eqns if eqn.primitive.name == "jax_topk"]
    assert eqn.invars[0].aval.shape == (2, 3, 20)
    assert not [e for e in eqns if e.primitive.name in ("scan", "while", "reshape")]


# --- control flow ---------------------------------------------------------------------------------


def test_scan_with_growing_lengths(top_k):
    x = normal(3, 20)

    def step(length, _):
        return length + 1, top_k(x, 4, lengths=length)

    _, (values, indices) = jax.jit(lambda n: lax.scan(step, n, length=21))(jnp.int32(0))
    for length in range(21):
        expect((values[length], indices[length]), x, 4, None, np.full(3, length))


def test_while_loop(top_k):
    x = normal(20)

    def body(state):
        length, total = state
        values, _ = top_k(x, 3, lengths=length)
        return length + 1, total + values[0]

    _, total = lax.while_loop(lambda s: s[0] < 20, body, (jnp.int32(1), jnp.float32(0)))
    np.testing.assert_allclose(total, sum(x[:n].max() for n in range(1, 20)), rtol=1e-5)


def test_fori_loop_and_map(top_k):
    x = normal(5, 20)
    results = lax.map(lambda row: top_k(row, 3), jnp.asarray(x))
    expect(results, x, 3)
    last = lax.fori_loop(0, 5, lambda i, _: top_k(x, 3, lengths=i)[1], jnp.zeros((5, 3), jnp.int32))
    assert_same(np.asarray(last), oracle.top_k(x, 3, None, np.full(5, 4))[1])


def test_cond_against_lax_top_k(top_k):
    """Both must return the same container, or the branches have different trees."""
    x = normal(3, 20)
    for choice in (True, False):
        results = lax.cond(choice, lambda x: top_k(x, 4), lambda x: lax.top_k(x, 4), x)
        assert type(results) is type(lax.top_k(x, 4))
        expect(results, x, 4)
    results = lax.switch(1, [lambda x: lax.top_k(x, 4), lambda x: top_k(x, 4)], x)
    expect(results, x, 4)


def test_weak_types_are_those_of_lax_top_k(top_k):
    weak = jnp.broadcast_to(1.0, (20,))
    for x in (weak, jnp.asarray(normal(20))):
        for ours, theirs in zip(
            jax.eval_shape(lambda x: top_k(x, 4), x),
            jax.eval_shape(lambda x: lax.top_k(x, 4), x),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            assert ours.weak_type == theirs.weak_type


# --- differentiation ------------------------------------------------------------------------------


def dense_gradient(x, cotangent, indices, starts):
    gradient = np.zeros_like(x)
    for row, (start, places) in enumerate(zip(starts, indices, strict=True)):
        for j, place in enumerate(places):
            if place >= 0:
                gradient[row, np.clip(start, 0, x.shape[1]) + place] += cotangent[row, j]
    return gradient


@pytest.mark.parametrize("is_sorted", [True, False])
def test_vjp_scatters_to_the_selected_elements(top_k, is_sorted):
    x = inputs.rows_of(60, np.float32)
    starts, lengths = inputs.windows_of(len(x), 60)
    (values, indices), pullback = jax.vjp(
        lambda x: top_k(x, 9, lengths=lengths, row_starts=starts, sorted=is_sorted), x
    )
    cotangent = normal(*values.shape, seed=3)
    (gradient,) = pullback([cotangent, np.zeros(indices.shape, jax.dtypes.float0)])
    assert_same(np.asarray(gradient), dense_gradient(x, cotangent, np.asarray(indices), starts))


def test_jvp_gathers_the_tangent(top_k):
    x, tangent = normal(4, 30), normal(4, 30, seed=4)
    starts, lengths = np.array([0, 5, 25, -3]), np.array([30, 7, 30, 2])
    tangent[1, :5] = np.nan  # outside the window
    primals, tangents = jax.jvp(
        lambda x: top_k(x, 6, lengths=lengths, row_starts=starts), (x,), (tangent,)
    )
    expect(primals, x, 6, starts, lengths)
    indices = np.asarray(primals[1])
    at = np.clip(starts, 0, 30)[:, None] + indices
    wanted = np.where(indices < 0, 0, np.take_along_axis(tangent, np.clip(at, 0, 29), 1))
    assert_same(np.asarray(tangents[0]), wanted.astype(np.float32))
    assert tangents[1].dtype == jax.dtypes.float0


def test_poison_outside_the_window_leaves_the_gradient_alone(top_k):
    x = normal(4, 30)
    x[:, 20:] = np.nan
    gradient = jax.grad(lambda x: jnp.sum(top_k(x, 6, lengths=20)[0] ** 2))(x)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[:, 20:] == 0).all()
    assert (np.count_nonzero(gradient, axis=1) == 6).all()


def test_padding_has_no_gradient(top_k):
    x = normal(2, 30)
    values = lambda x: jnp.where(  # noqa: E731
        jnp.isinf(v := top_k(x, 6, lengths=jnp.array([3, 0]))[0]), 0, v
    )
    gradient = jax.grad(lambda x: jnp.sum(values(x)))(x)
    assert np.asarray(gradient).sum() == 3
    assert (np.asarray(gradient)[1] == 0).all()
    # With a start, -1 + start is an element in front of the window.
    _, pullback = jax.vjp(lambda x: top_k(x, 6, lengths=2, row_starts=5)[0], x)
    (gradient,) = pullback(np.ones((2, 6), np.float32))
    assert np.flatnonzero(np.asarray(gradient)[0]).tolist() == [5, 6]


@pytest.mark.parametrize("axis", [0, 1])
def test_derivatives_of_first_and_second_order(top_k, axis):
    x = np.random.default_rng(5).permutation(24).reshape(4, 6).astype(np.float32) / 8
    lengths = np.array([3, 6, 2, 5]) if axis == 1 else np.array([4, 3, 2, 1, 4, 4])
    function = lambda x: jnp.sin(  # noqa: E731
        top_k(x, 1, axis=axis, lengths=lengths, row_starts=1 if axis else None)[0]
    )
    check_grads(function, (x,), order=2, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2, eps=1e-2)


def test_hessian(top_k):
    x = np.array([3.0, 1.0, 2.0, 5.0], np.float32)
    hessian = jax.hessian(lambda x: jnp.sum(top_k(x, 2, lengths=3)[0] ** 3))(x)
    np.testing.assert_allclose(hessian, np.diag([18.0, 0.0, 12.0, 0.0]), rtol=1e-6)


def test_linearize_and_linear_transpose(top_k):
    x = normal(3, 20)
    (values, indices), linear = jax.linearize(lambda x: top_k(x, 4), x)
    expect((values, indices), x, 4)
    tangent, _ = linear(x)
    assert_same(np.asarray(tangent), np.asarray(values))


def test_vmap_of_grad_and_grad_of_vmap(top_k):
    x, lengths = normal(5, 20), np.array([20, 3, 0, 7, 11], np.int32)

    def loss(row, n):
        values, indices = top_k(row, 4, lengths=n)
        return jnp.sum(jnp.where(indices < 0, 0, values) ** 2)

    one = jax.vmap(jax.grad(loss))(x, lengths)
    other = jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x, lengths)))(x)
    assert_same(np.asarray(one), np.asarray(other))
    assert np.count_nonzero(one, axis=1).tolist() == [4, 3, 0, 4, 4]


def test_jacobians_agree(top_k):
    x = normal(12)
    function = lambda x: top_k(x, 5, lengths=8)[0]  # noqa: E731
    forward, backward = jax.jacfwd(function)(x), jax.jacrev(function)(x)
    assert_same(np.asarray(forward), np.asarray(backward))
    assert (np.asarray(forward).sum(1) == 1).all()


@pytest.mark.parametrize("policy", [None, "nothing_saveable", "everything_saveable"])
def test_remat(top_k, policy):
    x = normal(3, 20)
    policy = policy and getattr(jax.checkpoint_policies, policy)
    loss = lambda x: jnp.sum(jnp.sin(top_k(jnp.sin(x), 4, lengths=9)[0]))  # noqa: E731
    plain = jax.grad(loss)(x)
    again = jax.grad(jax.checkpoint(loss, policy=policy))(x)
    np.testing.assert_allclose(plain, again, rtol=1e-6)


def test_scan_differentiates(top_k):
    x = normal(3, 20)

    def loss(x):
        _, sums = lax.scan(
            lambda n, _: (n + 5, jnp.sum(top_k(x, 2, lengths=n)[0])), jnp.int32(5), length=3
        )
        return jnp.sum(sums)

    wanted = sum(
        dense_gradient(x, np.ones((3, 2)), oracle.top_k(x, 2, None, [n] * 3)[1], [0] * 3)
        for n in (5, 10, 15)
    )
    np.testing.assert_allclose(jax.grad(loss)(x), wanted)


def test_indices_have_no_gradient(top_k, top_k_indices):
    x = normal(3, 20)
    for function in (lambda x: top_k(x, 4)[1], lambda x: top_k_indices(x, 4)):
        gradient = jax.grad(lambda x, f=function: jnp.sum(f(x).astype(jnp.float32)))(x)
        assert not np.asarray(gradient).any()
        _, tangent = jax.jvp(function, (x,), (x,))
        assert tangent.dtype == jax.dtypes.float0


def test_integer_operands_have_no_gradient():
    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    _, (tangent, _) = jax.jvp(
        lambda x: jax_topk.top_k(x, 2), (x,), (np.zeros(x.shape, jax.dtypes.float0),)
    )
    assert tangent.dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_narrow_floats(top_k, dtype):
    x = jnp.asarray(normal(3, 20), dtype)
    gradient = jax.grad(lambda x: jnp.sum(top_k(x, 4)[0].astype(jnp.float32)))(x)
    assert gradient.dtype == dtype
    assert np.asarray(gradient, np.float32).sum() == 12


# --- lowering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k", [1, 4096, 4097])
@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_choice_by_platform_dtype_and_k(monkeypatch, dtype, k, has_cuda):
    native = jax_topk._native
    # The choice needs no GPU: whether the target was built is all that it asks.
    module = types.ModuleType("_cuda") if has_cuda else None
    monkeypatch.setattr(native, "CUDA", native.Native("cuda", module, "for this test"))
    cpu = "cpu" if native.CPU.is_available else "xla"
    cuda = "cuda" if has_cuda and k <= native.MAX_K else "xla"
    assert _lowering.choose("cpu", dtype, k, None) == cpu
    assert _lowering.choose("cuda", dtype, k, None) == cuda
    assert _lowering.choose("tpu", dtype, k, None) == "xla"
    assert _lowering.choose("cpu", "int32", k, None) == "xla"


@pytest.mark.parametrize("num_batch_dims", [0, 1, 2, 17, 20])
def test_the_sharding_rule_parses(num_batch_dims):
    from jax.interpreters import mlir

    batch = tuple(range(2, 2 + num_batch_dims))
    text = _lowering.sharding_rule([(*batch, 50), batch, batch], [(*batch, 5), (*batch, 5)])
    with mlir.make_ir_context():
        assert str(mlir.ir.Attribute.parse(text)) == text


def test_many_rows_without_lengths(top_k):
    # Above the limit for which absent lengths are a constant in the program.
    x = np.random.default_rng(6).normal(size=(_lowering._MAX_CONSTANT_ROWS + 1, 3))
    x = x.astype(np.float32)
    values, indices = top_k(x, 1)
    assert_same(np.asarray(indices)[:, 0], x.argmax(1).astype(np.int32))
    assert_same(np.asarray(values)[:, 0], x.max(1))
