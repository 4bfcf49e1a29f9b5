"""Rows over devices: the compiled program holds no collective. A sharded axis is an error."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import hlo
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from runners import assert_same

import jax_topk
from jax_topk import _axis_check, _native
from jax_topk.bench import oracle
from jax_topk.debug import check_selection_axis

SHAPE, K = (8, 8, 64), 5
SPECS = {"x": jax.P("x"), "x,y": jax.P("x", "y"), "None,yx": jax.P(None, ("y", "x"))}
KINDS = [AxisType.Auto, AxisType.Explicit]

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(params=["cpu", "xla"])
def implementation(request):
    return request.param


@pytest.fixture
def mesh_of(cpu_devices):
    def make(kind, shape=(4, 2), names=("x", "y")):
        num = int(np.prod(shape))
        return jax.make_mesh(
            shape, names, axis_types=(kind,) * len(names), devices=cpu_devices[:num]
        )

    return make


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=SHAPE).astype(np.float32)
    x[..., ::7] = -np.inf
    return x, rng.integers(-1, 70, SHAPE[:-1]).astype(np.int32)


def compile_local(function, *arguments):
    """Compiles a function and asserts that its program communicates nothing."""
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    found = sorted(set(hlo.collectives(text)))
    assert not found, f"the compiled program holds {found}"
    return compiled


def expect(results, x, starts, lengths, is_sorted=True):
    rows = int(np.prod(x.shape[:-1]))
    flat = [
        None if c is None else np.broadcast_to(c, x.shape[:-1]).reshape(rows)
        for c in (starts, lengths)
    ]
    expected = oracle.top_k(x.reshape(rows, -1), K, *flat, False, is_sorted)
    for result, wanted in zip(results, expected, strict=True):
        assert_same(np.asarray(result), wanted.reshape(*x.shape[:-1], K))


# --- rows over devices ----------------------------------------------------------------------------


@kinds
def test_types_bind_the_partitioner_in_explicit_mode_alone(mesh_of, implementation, kind):
    """Each result carries the sharding of its type as a constraint, as those of `lax.top_k` do."""
    mesh = mesh_of(kind)
    x, lengths = data()
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", "y")))

        def text_of(function):
            return jax.jit(function).lower(x, lengths).as_text()

        ours = text_of(
            lambda x, lengths: jax_topk.top_k(x, K, lengths=lengths, implementation=implementation)
        )
        set_alone = text_of(
            lambda x, lengths: jax_topk.top_k_indices(x, K, implementation=implementation)
        )
        theirs = text_of(lambda x, lengths: jax.lax.top_k(x, K))
    constraint = "sdy.sharding_constraint"
    if kind is AxisType.Explicit:
        assert theirs.count(constraint) == 2
        assert ours.count(constraint) >= 2
        assert set_alone.count(constraint) >= 1
    else:
        assert theirs.count(constraint) == 0
        if implementation == "cpu":
            assert ours.count(constraint) == set_alone.count(constraint) == 0


def test_explicit_axes_inside_a_shard_map_over_another(mesh_of, implementation):
    """Half of the mesh is manual and half is explicit: the constraint names the explicit half.

    JAX itself gathers the explicit half at the border of the `shard_map`, whatever is inside.
    """
    mesh = mesh_of(AxisType.Explicit)
    x, lengths = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", "y")))
        counts = jax.device_put(lengths, jax.NamedSharding(mesh, jax.P("x", "y")))

        def local(x, lengths):
            results = jax_topk.top_k(x, K, lengths=lengths, implementation=implementation)
            for result in results:
                assert jax.typeof(result).sharding.spec == jax.P(None, "y", None)
            return tuple(results)

        select = jax.shard_map(
            local, in_specs=(jax.P("x"), jax.P("x")), out_specs=jax.P("x"), axis_names={"x"}
        )
        results = jax.jit(select)(rows, counts)
    expect(results, x, None, lengths)


def test_the_search_for_collectives_finds_them(mesh_of):
    """The control: `lax.top_k` gathers the very rows that `top_k` leaves in place."""
    mesh = mesh_of(AxisType.Auto)
    x = jax.device_put(data()[0], jax.NamedSharding(mesh, jax.P("x")))
    with pytest.raises(AssertionError, match="all-gather"):
        compile_local(lambda x: jax.lax.top_k(x, K), x)


@kinds
@specs
@pytest.mark.parametrize("counts", ["sharded", "replicated", "scalar", "broadcast", "absent"])
def test_rows_stay_where_they_are(mesh_of, implementation, kind, spec, counts):
    mesh = mesh_of(kind)
    x, lengths = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, spec))
        starts = lengths[::-1, ::-1] // 3
        if counts == "absent":
            lengths = starts = None
        elif counts == "scalar":
            lengths, starts = np.int32(20), np.int32(3)
        elif counts == "broadcast":
            lengths, starts = lengths[:1], starts[:, :1]
        count_place = jax.NamedSharding(mesh, spec if counts == "sharded" else jax.P())
        placed = jax.device_put((lengths, starts), count_place)

        def select(rows, counts):
            lengths, starts = counts
            return jax_topk.top_k(
                rows, K, lengths=lengths, row_starts=starts, implementation=implementation
            )

        results = compile_local(select, rows, placed)(rows, placed)
        expect(results, x, starts, lengths)
        for result in results:
            assert result.sharding.is_equivalent_to(rows.sharding, 3)


@kinds
@specs
def test_indices_and_unsorted_results_stay_local(mesh_of, implementation, kind, spec):
    mesh = mesh_of(kind)
    x, lengths = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, spec))

        def select(rows, lengths):
            keywords = {"lengths": lengths, "implementation": implementation}
            indices = jax_topk.top_k_indices(rows, K, **keywords)
            return *jax_topk.top_k(rows, K, sorted=False, **keywords), indices

        values, indices, again = compile_local(select, rows, lengths)(rows, lengths)
        expect((values, indices), x, None, lengths, is_sorted=False)
        assert_same(np.asarray(again), np.asarray(indices))


@kinds
@specs
def test_gradients_stay_local(mesh_of, implementation, kind, spec):
    mesh = mesh_of(kind)
    x, lengths = data()
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, spec)
        rows, placed = jax.device_put(x, place), jax.device_put(lengths, place)

        def pull_back(rows, lengths):
            (values, _), pullback = jax.vjp(
                lambda rows: jax_topk.top_k(
                    rows, K, lengths=lengths, row_starts=2, implementation=implementation
                ),
                rows,
            )
            return pullback([values, np.zeros(values.shape, jax.dtypes.float0)])[0]

        gradient = compile_local(pull_back, rows, placed)(rows, placed)
        assert gradient.sharding.is_equivalent_to(place, 3)
    alone = jax.device_put(x, jax.devices("cpu")[0])
    assert_same(np.asarray(gradient), np.asarray(jax.jit(pull_back)(alone, lengths)))

    def push_forward(rows, lengths):
        return jax.jvp(
            lambda rows: jax_topk.top_k(rows, K, lengths=lengths, implementation=implementation)[0],
            (rows,),
            (rows,),
        )

    with jax.set_mesh(mesh):
        values, tangents = compile_local(push_forward, rows, placed)(rows, placed)
        valid = np.asarray(values) > -np.inf
        assert_same(np.asarray(tangents)[valid], np.asarray(values)[valid])


@specs
def test_vmap_stays_local(mesh_of, implementation, spec):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    place = jax.NamedSharding(mesh, spec)
    rows, placed = jax.device_put(x, place), jax.device_put(lengths, place)

    def select(rows, n):
        return jax_topk.top_k(rows, K, lengths=n, implementation=implementation)

    for function in (
        jax.vmap(select),
        jax.vmap(jax.vmap(select)),
        jax.vmap(select, in_axes=1, out_axes=1),
    ):
        expect(compile_local(function, rows, placed)(rows, placed), x, None, lengths)


def test_vmap_with_spmd_axis_name(mesh_of, implementation):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
    function = jax.vmap(
        lambda rows, n: jax_topk.top_k(rows, K, lengths=n, implementation=implementation),
        spmd_axis_name="x",
    )
    with jax.set_mesh(mesh):
        expect(compile_local(function, rows, lengths)(rows, lengths), x, None, lengths)


def test_vmap_in_explicit_mode(mesh_of, implementation):
    mesh = mesh_of(AxisType.Explicit)
    x, lengths = data()
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P("x", "y"))
        rows, placed = jax.device_put(x, place), jax.device_put(lengths, place)
        function = jax.vmap(
            lambda rows, n: jax_topk.top_k(rows, K, lengths=n, implementation=implementation)
        )
        results = compile_local(function, rows, placed)(rows, placed)
        expect(results, x, None, lengths)
        assert results[0].sharding.spec == jax.P("x", "y", None)
        # Unbatched lengths, and lengths alone batched.
        function = jax.vmap(
            lambda rows, n: jax_topk.top_k(rows, K, lengths=n, implementation=implementation),
            in_axes=(0, None),
        )
        expect(function(rows, np.int32(9)), x, None, np.int32(9))


@kinds
@specs
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh_of, implementation, kind, spec, check_vma):
    mesh = mesh_of(kind)
    x, _ = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, spec))
        select = jax.shard_map(
            lambda rows, n, s: jax_topk.top_k(
                rows, K, lengths=n, row_starts=s, implementation=implementation
            ),
            mesh=mesh,
            # lengths vary over fewer axes than the rows
            in_specs=(spec, jax.P(), jax.P()),
            out_specs=spec,
            check_vma=check_vma,
        )
        results = compile_local(select, rows, np.int32(20), np.int32(4))(
            rows, np.int32(20), np.int32(4)
        )
        expect(results, x, np.int32(4), np.int32(20))
        gradient = jax.grad(
            lambda rows: jnp.sum(
                select(rows, np.int32(20), np.int32(4))[1] * 0.0
                + jnp.exp(select(rows, np.int32(20), np.int32(4))[0])
            )
        )
        assert np.isfinite(jax.jit(gradient)(rows)).all()


def test_shard_map_over_some_axes(mesh_of, implementation):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    place = jax.NamedSharding(mesh, jax.P("x", "y"))
    rows, placed = jax.device_put(x, place), jax.device_put(lengths, place)
    select = jax.shard_map(
        lambda rows, n: jax_topk.top_k(rows, K, lengths=n, implementation=implementation),
        mesh=mesh,
        in_specs=jax.P("x"),
        out_specs=jax.P("x"),
        axis_names={"x"},
    )
    expect(compile_local(select, rows, placed)(rows, placed), x, None, lengths)


def test_rows_that_do_not_divide_the_mesh(mesh_of, implementation):
    """The partitioner pads rows; the padding carries garbage lengths, which are clamped."""
    mesh = mesh_of(AxisType.Auto, (8,), ("x",))
    x = np.random.default_rng(1).normal(size=(13, 64)).astype(np.float32)
    lengths = np.random.default_rng(2).integers(0, 65, 13).astype(np.int32)

    @jax.jit
    def select(x, n):
        x = jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P("x")))
        results = jax_topk.top_k(
            x * 2, K, lengths=n - 1, row_starts=n // 9, implementation=implementation
        )
        return [
            jax.lax.with_sharding_constraint(r, jax.NamedSharding(mesh, jax.P("x")))
            for r in results
        ]

    replicated = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
    values, indices = select(replicated, lengths)
    expect((values, indices), x * 2, lengths // 9, lengths - 1)


@pytest.mark.skipif(
    not hasattr(jax.config, "jax_use_shardy_partitioner"), reason="GSPMD is gone from this JAX"
)
def test_the_older_partitioner(mesh_of, implementation):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    previous = jax.config.jax_use_shardy_partitioner
    try:
        jax.config.update("jax_use_shardy_partitioner", False)
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", "y")))
        select = lambda x, n: jax_topk.top_k(  # noqa: E731
            x, K, lengths=n, implementation=implementation
        )
        try:
            compiled = compile_local(select, rows, lengths)
        except NotImplementedError:
            pytest.skip("this version of JAX cannot switch to GSPMD")
        expect(compiled(rows, lengths), x, None, lengths)
    finally:
        jax.config.update("jax_use_shardy_partitioner", previous)
        jax.clear_caches()


# --- a sharded axis -------------------------------------------------------------------------------

NAMES = r"axis 2 of operand is sharded over mesh axis 'x'.*sharded_top_k.*merge_top_k"


@kinds
@pytest.mark.parametrize("function", [jax_topk.top_k, jax_topk.top_k_indices])
def test_an_eager_array_with_a_sharded_axis(mesh_of, kind, function):
    mesh = mesh_of(kind)
    x = jax.device_put(data()[0], jax.NamedSharding(mesh, jax.P(None, "y", "x")))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=NAMES):
            function(x, K)
        with pytest.raises(ValueError, match="axis 1 of operand is sharded over mesh axis 'y'"):
            function(x, K, axis=1)
        function(x, K, axis=0)


def test_explicit_mode_raises_while_tracing(mesh_of):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(data()[0], jax.NamedSharding(mesh, jax.P(None, None, ("y", "x"))))
        with pytest.raises(
            ValueError, match="axis 2 of operand is sharded over mesh axis 'y', 'x'"
        ):
            jax.eval_shape(lambda x: jax_topk.top_k(x, K), x)
        with pytest.raises(ValueError, match="sharded_top_k"):
            jax.vmap(lambda x: jax_topk.top_k(x, K))(x)


def test_arrays_with_other_kinds_of_sharding(cpu_devices, mesh_of):
    mesh = mesh_of(AxisType.Auto, (2,), ("x",))
    x = jax.device_put(data()[0], jax.NamedSharding(mesh, jax.P(None, None, "x")))
    named = x.sharding
    plain = jax.sharding.GSPMDSharding if hasattr(jax.sharding, "GSPMDSharding") else None
    if plain is not None:
        x = jax.device_put(x, plain(tuple(cpu_devices[:2]), named._to_xla_hlo_sharding(3)))
    with pytest.raises(ValueError, match="axis 2 of operand is sharded over"):
        jax_topk.top_k(x, K)


@kinds
def test_a_mesh_axis_of_size_one_shards_nothing(mesh_of, kind):
    mesh = mesh_of(kind, (4, 1), ("x", "one"))
    x, lengths = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", None, "one")))
        expect(jax_topk.top_k(rows, K, lengths=lengths), x, None, lengths)
        compiled = compile_local(lambda x: jax_topk.top_k(x, K), rows)
        expect(compiled(rows), x, None, None)


def test_lengths_sharded_unlike_the_rows(mesh_of):
    mesh = mesh_of(AxisType.Explicit)
    x, lengths = data()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
        other = jax.device_put(lengths, jax.NamedSharding(mesh, jax.P("y")))
        with pytest.raises(ValueError, match=r"lengths is sharded as .*'y'.* replicate it"):
            jax_topk.top_k(rows, K, lengths=other)
        with pytest.raises(ValueError, match="row_starts is sharded as"):
            jax.jit(lambda x, s: jax_topk.top_k(x, K, row_starts=s))(rows, other)


# --- the opt-in check under automatic axes --------------------------------------------------------


def test_automatic_axes_gather_without_the_check(mesh_of):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, None, "x")))
    select = jax.jit(lambda x, n: jax_topk.top_k(x, K, lengths=n))
    expect(select(rows, lengths), x, None, lengths)
    assert "all-gather" in select.lower(rows, lengths).compile().as_text()


@pytest.mark.parametrize("form", ["plain", "vmap", "nested vmap", "grad", "axis"])
def test_the_check_raises_where_xla_would_gather(mesh_of, form):
    mesh = mesh_of(AxisType.Auto)
    spec = jax.P(None, "x") if form == "axis" else jax.P(None, None, "x")
    x = np.random.default_rng(3).normal(size=(8, 8, 64)).astype(np.float32)
    rows = jax.device_put(x, jax.NamedSharding(mesh, spec))
    select = {
        "plain": lambda x: jax_topk.top_k(x, K),
        "vmap": jax.vmap(lambda x: jax_topk.top_k(x, K)),
        "nested vmap": jax.vmap(jax.vmap(lambda x: jax_topk.top_k_indices(x, K)), in_axes=1),
        "grad": jax.grad(lambda x: jnp.sum(jax_topk.top_k(x, K)[0])),
        "axis": lambda x: jax_topk.top_k(x, K, axis=1),
    }[form]
    message = r"the selection axis of operand is sharded over .*'x'"
    with check_selection_axis(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(select)(rows)
    jax.jit(lambda x: select(x))(rows)  # a function that was not traced yet


def test_the_check_sees_automatic_axes_inside_shard_map(mesh_of):
    mesh = mesh_of(AxisType.Auto)
    rows = jax.device_put(data()[0], jax.NamedSharding(mesh, jax.P("x", None, "y")))
    select = jax.shard_map(
        lambda x: jax_topk.top_k(x, K),
        mesh=mesh,
        in_specs=jax.P("x"),
        out_specs=jax.P("x"),
        axis_names={"x"},
    )
    message = r"ShardedAxisError: .* selection axis of operand is sharded over"
    with check_selection_axis(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(select)(rows)


def test_the_check_cannot_be_exported_for_several_devices(mesh_of):
    """A documented cost. For one device there is nothing to partition, and nothing to pay."""
    place = jax.NamedSharding(mesh_of(AxisType.Auto), jax.P("x"))
    names = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _native.TARGETS]
    for x, error in (
        (jax.device_put(data()[0], place), pytest.raises(NotImplementedError, match="callbacks")),
        (data()[0], contextlib.nullcontext()),
    ):
        with check_selection_axis(), error:
            jax.export.export(jax.jit(lambda x: jax_topk.top_k(x, K)), disabled_checks=names)(x)


def test_the_check_lets_sharded_rows_pass(mesh_of):
    mesh = mesh_of(AxisType.Auto)
    x, lengths = data()
    with check_selection_axis():
        for spec in SPECS.values():
            rows = jax.device_put(x, jax.NamedSharding(mesh, spec))
            compiled = compile_local(lambda x, n: jax_topk.top_k(x, K, lengths=n), rows, lengths)
            expect(compiled(rows, lengths), x, None, lengths)
        compiled = compile_local(
            jax.vmap(jax.grad(lambda x, n: jnp.sum(jnp.exp(jax_topk.top_k(x, K, lengths=n)[0])))),
            rows,
            lengths,
        )
        assert compiled(rows, lengths).shape == x.shape
        select = jax.shard_map(
            lambda x: jax_topk.top_k(x, K), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")
        )
        expect(
            jax.jit(select)(jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))), x, None, None
        )
        expect(jax_topk.top_k(x, K), x, None, None)  # one device


def test_the_check_has_an_environment_variable():
    code = "from jax_topk import _axis_check; print(_axis_check.is_check_enabled())"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, _axis_check.ENVIRONMENT_VARIABLE: value}
        output = subprocess.run(
            [sys.executable, "-c", code],
            cwd=pathlib.Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert output.strip() == expected


def test_the_check_is_a_switch():
    assert not _axis_check.is_check_enabled()
    with check_selection_axis():
        assert _axis_check.is_check_enabled()
        with check_selection_axis(False):
            assert not _axis_check.is_check_enabled()
        assert _axis_check.is_check_enabled()
    assert not _axis_check.is_check_enabled()
