"""One row over several devices: `sharded_top_k` and `merge_top_k`, on 8 simulated CPU devices."""

from __future__ import annotations

import itertools
import pathlib
import socket
import subprocess
import sys

import hlo
import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import assert_same

import jax_topk
from jax_topk import _native
from jax_topk.bench import oracle

# Mesh shape and axis names, the axes that shard the row, and those that shard the batch.
LAYOUTS = {
    "one axis": ((8,), ("s",), "s", None),
    "two axes": ((2, 4), ("a", "b"), ("a", "b"), None),
    "three axes": ((2, 2, 2), ("a", "b", "c"), ("a", "b", "c"), None),
    "with a batch axis": ((2, 4), ("r", "s"), "s", "r"),
    "list of axes": ((2, 2, 2), ("r", "a", "b"), ["a", "b"], "r"),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def mesh_of(cpu_devices):
    def make(shape, names, kind=jax.sharding.AxisType.Auto):
        num = int(np.prod(shape))
        return jax.make_mesh(
            shape, names, axis_types=(kind,) * len(names), devices=cpu_devices[:num]
        )

    return make


def specs_of(layout):
    _, _, axes, batch = layout
    return jax.P(batch, tuple(axes) if isinstance(axes, list) else axes), jax.P(batch)


def sharded(mesh, layout, k, *, windows=(True, True), check_vma=True, **keywords):
    """`sharded_top_k` over a mesh, as a function of whole rows, lengths and starts."""
    row_spec, batch_spec = specs_of(layout)

    def local(block, lengths, starts):
        return jax_topk.sharded_top_k(
            block,
            k,
            axis_name=layout[2],
            lengths=lengths if windows[0] else None,
            row_starts=starts if windows[1] else None,
            **keywords,
        )

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(row_spec, batch_spec, batch_spec),
            out_specs=batch_spec,
            check_vma=check_vma,
        )
    )


def expect(results, *arguments):
    for result, wanted in zip(results, oracle.top_k(*arguments), strict=True):
        assert_same(np.asarray(result), wanted)


def rows_and_windows(width, dtype=np.float32, seed=0):
    x = inputs.rows_of(width, dtype, seed)
    x = np.concatenate([x, x[: len(x) % 2]])  # an even number, for the batch axis
    return (x, *inputs.windows_of(len(x), width, seed))


# --- sharded_top_k --------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize(
    ("mode", "k"),  # below the block of 8, above it, and all of the row
    [("largest", 1), ("largest", 11), ("largest", 64), ("smallest", 11)],
)
def test_equals_top_k_of_the_whole_row(mesh_of, layout, mode, k):
    mesh = mesh_of(*layout[:2])
    x, starts, lengths = rows_and_windows(64)
    select = sharded(mesh, layout, k, mode=mode)
    expect(select(x, lengths, starts), x, k, starts, lengths, mode == "smallest")


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, jnp.float16, np.int32, np.uint8, np.bool_, jnp.int4, jnp.float8_e4m3fn],
)
def test_other_types(mesh_of, dtype):
    layout = LAYOUTS["two axes"]
    x, starts, lengths = rows_and_windows(64)
    if dtype in (np.int32, np.uint8, np.bool_, jnp.int4):
        x = np.random.default_rng(1).integers(0, 8, x.shape).astype(dtype)
    elif dtype == jnp.float8_e4m3fn:
        x = np.random.default_rng(1).normal(size=x.shape).astype(dtype)
    else:
        x = inputs.cast(x, dtype)
    select = sharded(mesh_of(*layout[:2]), layout, 11)
    expect(select(x, lengths, starts), x, 11, starts, lengths)


def test_types_of_eight_bytes(mesh_of):
    layout = LAYOUTS["with a batch axis"]
    with jax.enable_x64(True):
        for dtype in (np.float64, np.int64):
            x, starts, lengths = rows_and_windows(64)
            x = np.random.default_rng(1).integers(-9, 9, x.shape).astype(dtype)
            select = sharded(mesh_of(*layout[:2]), layout, 11)
            expect(select(x, lengths, starts), x, 11, starts, lengths)


@pytest.mark.parametrize("windows", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("layout", [LAYOUTS["one axis"], LAYOUTS["with a batch axis"]])
def test_absent_lengths_and_starts(mesh_of, layout, windows):
    x, starts, lengths = rows_and_windows(64)
    select = sharded(mesh_of(*layout[:2]), layout, 11, windows=windows)
    expect(
        select(x, lengths, starts),
        x,
        11,
        starts if windows[1] else None,
        lengths if windows[0] else None,
    )


def test_windows_that_cross_every_border(mesh_of):
    layout = LAYOUTS["two axes"]
    width = 32
    pairs = list(itertools.product(range(-1, width + 2, 3), range(-1, width + 2, 3)))
    starts, lengths = np.array(pairs, np.int32).T
    x = np.random.default_rng(2).integers(-2, 3, (len(pairs), width)).astype(np.float32)
    x[:, ::5] = -np.inf
    select = sharded(mesh_of(*layout[:2]), layout, 7)
    expect(select(x, lengths, starts), x, 7, starts, lengths)


@pytest.mark.parametrize("layout", [LAYOUTS["three axes"], LAYOUTS["with a batch axis"]])
def test_unchecked_types(mesh_of, layout):
    x, starts, lengths = rows_and_windows(64)
    select = sharded(mesh_of(*layout[:2]), layout, 11, check_vma=False)
    expect(select(x, lengths, starts), x, 11, starts, lengths)


def test_under_a_strict_jax(mesh_of):
    layout = LAYOUTS["two axes"]
    x, starts, lengths = rows_and_windows(64)
    mesh = mesh_of(*layout[:2])
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.enable_checks(True),
    ):
        expect(sharded(mesh, layout, 12)(x, lengths, starts), x, 12, starts, lengths)
        merged(mesh, layout, 13)(*candidates(16, 500, 48))


def test_scalar_and_python_lengths(mesh_of):
    mesh = mesh_of((8,), ("s",))
    x, *_ = rows_and_windows(64)
    select = jax.shard_map(
        lambda x: jax_topk.sharded_top_k(x, 11, axis_name="s", lengths=40, row_starts=5),
        mesh=mesh,
        in_specs=jax.P(None, "s"),
        out_specs=jax.P(),
    )
    expect(select(x), x, 11, np.full(len(x), 5), np.full(len(x), 40))


def test_one_row_without_a_batch(mesh_of):
    x = np.random.default_rng(3).normal(size=64).astype(np.float32)
    select = jax.shard_map(
        lambda x: jax_topk.sharded_top_k(x, 5, axis_name="s"),
        mesh=mesh_of((8,), ("s",)),
        in_specs=jax.P("s"),
        out_specs=jax.P(),
    )
    values, indices = select(x)
    expect((values[None], indices[None]), x[None], 5)


@pytest.mark.parametrize(("shape", "k"), [((4, 64), 0), ((0, 64), 5), ((4, 0), 0)])
def test_empty(mesh_of, shape, k):
    layout = LAYOUTS["with a batch axis"]
    x, counts = np.ones(shape, np.float32), np.ones(shape[0], np.int32)
    for windows in ((True, True), (False, False)):
        select = sharded(mesh_of(*layout[:2]), layout, k, windows=windows)
        values, indices = select(x, counts, counts)
        assert values.shape == indices.shape == (shape[0], k)


def test_explicit_mode(mesh_of):
    layout = LAYOUTS["with a batch axis"]
    mesh = mesh_of(*layout[:2], jax.sharding.AxisType.Explicit)
    x, starts, lengths = rows_and_windows(64)
    row_spec, batch_spec = specs_of(layout)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in ((x, row_spec), (lengths, batch_spec), (starts, batch_spec))
        ]
        results = sharded(mesh, layout, 11)(*placed)
        assert results[0].sharding.spec == jax.P("r", None)
        expect(results, x, 11, starts, lengths)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_batch_axis_that_is_not_manual(mesh_of, kind):
    """shard_map over the row's axis alone; the rows are spread over another one all the same."""
    layout = LAYOUTS["with a batch axis"]
    mesh = mesh_of(*layout[:2], kind)
    x, starts, lengths = rows_and_windows(64)
    row_spec, batch_spec = specs_of(layout)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in ((x, row_spec), (lengths, batch_spec), (starts, batch_spec))
        ]
        select = jax.shard_map(
            lambda block, lengths, starts: jax_topk.sharded_top_k(
                block, 11, axis_name="s", lengths=lengths, row_starts=starts
            ),
            in_specs=(jax.P(None, "s"), jax.P(), jax.P()),
            out_specs=jax.P(),
            axis_names={"s"},
        )
        results = jax.jit(select)(*placed)
        expect(results, x, 11, starts, lengths)
        assert results[0].sharding.spec[0] == "r"


def test_one_compilation_serves_all_lengths(mesh_of):
    layout = LAYOUTS["one axis"]
    select = sharded(mesh_of(*layout[:2]), layout, 11)
    for seed in range(5):
        x, starts, lengths = rows_and_windows(64, seed=seed)
        expect(select(x, lengths, starts), x, 11, starts, lengths)
    assert select._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("layout", "sizes"),  # of the axes that are exchanged over, innermost first
    [(LAYOUTS["one axis"], [8]), (LAYOUTS["two axes"], [4, 2]), (LAYOUTS["three axes"], [2, 2, 2])],
)
def test_the_volume_of_the_exchange(mesh_of, layout, sizes, dtype):
    """One all-gather per stage, of k values and k indices per device and row: never the row.

    The local selection and the one after each stage are this package's kernels.
    """
    rows, k = 3, 10
    x = jax.ShapeDtypeStruct((rows, 8000), dtype)
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    text = sharded(mesh_of(*layout[:2]), layout, k).lower(x, counts, counts).compile().as_text()
    assert hlo.collectives(text) == ["all-gather"] * len(sizes)
    per_device = rows * k * hlo.bytes_per_candidate(dtype)
    assert hlo.all_gather_bytes(text) == [size * per_device for size in sizes]
    if _native.CPU.is_available:
        assert hlo.kernel_calls(text) == 1 + len(sizes)
    assert " sort(" not in text


def test_types_without_an_integer_of_their_size_take_two_collectives(mesh_of):
    layout = LAYOUTS["one axis"]
    x = jax.ShapeDtypeStruct((3, 800), np.bool_)
    counts = jax.ShapeDtypeStruct((3,), jnp.int32)
    text = sharded(mesh_of(*layout[:2]), layout, 10).lower(x, counts, counts).compile().as_text()
    assert hlo.collectives(text) == ["all-gather"] * 2
    assert sum(hlo.all_gather_bytes(text)) == 8 * 3 * 10 * hlo.bytes_per_candidate(np.bool_)


@pytest.mark.parametrize("k", [1, 6])
def test_the_volume_of_a_merge(mesh_of, k):
    """A merge sends each device's candidates once, and at most k of them from stage to stage."""
    layout = LAYOUTS["two axes"]
    values = jax.ShapeDtypeStruct((3, 8 * 5), jnp.float32)
    indices = jax.ShapeDtypeStruct((3, 8 * 5), jnp.int32)
    text = merged(mesh_of(*layout[:2]), layout, k).lower(values, indices).compile().as_text()
    assert hlo.collectives(text) == ["all-gather"] * 2
    assert hlo.all_gather_bytes(text) == [3 * 4 * 5 * 8, 3 * 2 * k * 8]
    if _native.CPU.is_available:
        assert hlo.kernel_calls(text) == 2


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", [LAYOUTS["two axes"], LAYOUTS["with a batch axis"]])
def test_gradient(mesh_of, layout, dtype):
    x = np.random.default_rng(4).normal(size=(4, 64)).astype(dtype)
    lengths, starts = np.array([64, 5, 0, 30], np.int32), np.array([0, 6, 3, 50], np.int32)
    cotangent = np.random.default_rng(5).normal(size=(4, 11)).astype(dtype)

    def pulled_back(select):
        (_, indices), pullback = jax.vjp(lambda x: select(x, lengths, starts), x)
        return pullback([cotangent, np.zeros(indices.shape, jax.dtypes.float0)])[0]

    whole = pulled_back(lambda x, n, s: jax_topk.top_k(x, 11, lengths=n, row_starts=s))
    select = sharded(mesh_of(*layout[:2]), layout, 11)
    assert_same(np.asarray(pulled_back(select)), np.asarray(whole))
    primals, tangents = jax.jvp(lambda x: select(x, lengths, starts), (x,), (x,))
    valid = np.asarray(primals[1]) >= 0
    assert_same(np.asarray(tangents[0]), np.where(valid, primals[0], 0).astype(dtype))


def test_the_backward_pass_communicates_nothing(mesh_of):
    layout = LAYOUTS["two axes"]
    mesh = mesh_of(*layout[:2])
    row_spec, _ = specs_of(layout)

    def backward(block, cotangent):
        _, pullback = jax.vjp(
            lambda block: jax_topk.sharded_top_k(block, 11, axis_name=("a", "b"))[0], block
        )
        return pullback(cotangent)[0]

    function = jax.jit(
        jax.shard_map(backward, mesh=mesh, in_specs=(row_spec, jax.P()), out_specs=row_spec)
    )
    text = function.lower(np.ones((4, 64), np.float32), np.ones((4, 11), np.float32)).compile()
    # The two stages of the exchange, forward, and nothing beside them.
    assert hlo.collectives(text.as_text()) == ["all-gather"] * 2


def test_an_axis_of_vmap(mesh_of):
    x, starts, lengths = rows_and_windows(64)
    select = jax.vmap(
        lambda block: jax_topk.sharded_top_k(
            block, 11, axis_name="s", lengths=lengths, row_starts=starts
        ),
        axis_name="s",
        in_axes=1,
    )
    values, indices = select(x.reshape(len(x), 8, 8))
    for device in range(8):
        expect((values[device], indices[device]), x, 11, starts, lengths)


def test_nested_in_vmap_and_scan(mesh_of):
    mesh = mesh_of((8,), ("s",))
    x = np.random.default_rng(6).normal(size=(3, 2, 64)).astype(np.float32)

    def local(block):
        select = jax.vmap(lambda rows, n: jax_topk.sharded_top_k(rows, 4, axis_name="s", lengths=n))

        def step(n, _):
            return n + 20, select(block, n)

        return jax.lax.scan(step, jnp.arange(3, dtype=jnp.int32), length=3)[1]

    values, indices = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=jax.P(None, None, "s"), out_specs=jax.P())
    )(x)
    for i in range(3):
        lengths = np.repeat(np.arange(3) + 20 * i, 2)
        expect(
            (values[i].reshape(6, 4), indices[i].reshape(6, 4)),
            x.reshape(6, 64),
            4,
            None,
            lengths,
        )


# --- merge_top_k ----------------------------------------------------------------------------------


def merged(mesh, layout, k, **keywords):
    row_spec, batch_spec = specs_of(layout)
    return jax.jit(
        jax.shard_map(
            lambda v, i: jax_topk.merge_top_k(v, i, k, axis_name=layout[2], **keywords),
            mesh=mesh,
            in_specs=(row_spec, row_spec),
            out_specs=batch_spec,
        )
    )


def candidates(rows, width, num, dtype=np.float32, seed=7):
    """Rows of which some elements are candidates, dealt in any order: values, global indices."""
    rng = np.random.default_rng(seed)
    x = inputs.rows_of(width, dtype, seed)[:rows]
    indices = np.stack([rng.permutation(width)[:num] for _ in range(len(x))]).astype(np.int32)
    values = np.take_along_axis(x, indices, 1)
    is_padding = rng.integers(0, 4, indices.shape) == 0
    is_padding[0] = True  # a row without candidates
    is_padding[1] = False
    # Padding carries values that would win, of either mode, and any negative index.
    values[is_padding] = np.where(rng.integers(0, 2, is_padding.sum()), np.nan, -np.nan)
    indices[is_padding] = rng.choice([-1, -7, -(2**31)], is_padding.sum())
    return values, indices


def merge_in_numpy(values, indices, k, smallest=False):
    """The oracle over the valid candidates in the order of their indices."""
    out_values, out_indices = [], []
    for v, i in zip(values, indices, strict=True):
        order = np.argsort(i, kind="stable")
        order = order[i[order] >= 0]
        row = np.concatenate([v[order], np.zeros(max(0, k - len(order)), v.dtype)])
        best, places = oracle.top_k(row[None], k, None, [len(order)], smallest)
        found = np.append(i[order], np.zeros(k, np.int32))[np.maximum(places[0], 0)]
        out_values.append(best[0])
        out_indices.append(np.where(places[0] < 0, -1, found).astype(np.int32))
    return np.stack(out_values), np.stack(out_indices)


@layouts
@pytest.mark.parametrize(
    ("mode", "k"),  # the last: more than there are candidates
    [("largest", 6), ("smallest", 6), ("largest", 60)],
)
def test_merges_interleaved_candidates(mesh_of, layout, mode, k):
    values, indices = candidates(16, 500, 48)
    results = merged(mesh_of(*layout[:2]), layout, k, mode=mode)(values, indices)
    for result, wanted in zip(
        results, merge_in_numpy(values, indices, k, mode == "smallest"), strict=True
    ):
        assert_same(np.asarray(result), wanted)


def test_ties_go_to_the_lowest_global_index(mesh_of):
    layout = LAYOUTS["two axes"]
    indices = np.random.default_rng(8).permutation(1000)[None, :48].astype(np.int32)
    values = np.zeros((1, 48), np.float32)
    _, found = merged(mesh_of(*layout[:2]), layout, 10)(values, indices)
    assert found.tolist() == [np.sort(indices[0])[:10].tolist()]


def test_a_real_minus_infinity_behind_padding(mesh_of):
    """A short block's padding comes before a later block's real -inf, and must lose to it."""
    layout = LAYOUTS["one axis"]
    values = np.full((1, 16), -np.inf, np.float32)
    indices = np.full((1, 16), -1, np.int32)
    indices[0, [9, 15]] = [40, 70]
    lowest = values.copy()
    lowest.view(np.uint32)[0, 15] = 0xFFFFFFFF  # below -inf, and below any filler
    for row in (values, lowest):
        best, found = merged(mesh_of(*layout[:2]), layout, 4)(row, indices)
        assert found.tolist() == [[40, 70, -1, -1]]
        assert_same(np.asarray(best)[:, :2], row[:, [9, 15]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int32])
def test_merges_other_types(mesh_of, dtype):
    layout = LAYOUTS["two axes"]
    values, indices = candidates(16, 500, 48)
    values = inputs.cast(values, dtype) if dtype is jnp.bfloat16 else indices % 7
    results = merged(mesh_of(*layout[:2]), layout, 6)(values, indices)
    for result, wanted in zip(results, merge_in_numpy(values, indices, 6), strict=True):
        assert_same(np.asarray(result), wanted)


def test_the_gradient_of_a_merge(mesh_of):
    layout = LAYOUTS["two axes"]
    values, indices = candidates(16, 500, 48)
    merge = merged(mesh_of(*layout[:2]), layout, 6)
    found, pullback = jax.vjp(lambda v: merge(v, indices)[1], values)
    del pullback
    best, pullback = jax.vjp(lambda v: merge(v, indices)[0], values)
    cotangent = np.random.default_rng(9).normal(size=best.shape).astype(np.float32)
    (gradient,) = pullback(cotangent)
    wanted = np.zeros_like(values)
    for row, (places, c) in enumerate(zip(np.asarray(found), cotangent, strict=True)):
        for place, amount in zip(places, c, strict=True):
            if place >= 0:
                wanted[row, np.flatnonzero(indices[row] == place)] += amount
    assert_same(np.asarray(gradient), wanted)


def test_replicated_candidates_of_a_smaller_mesh_axis(mesh_of):
    """A mesh axis of size 1 exchanges nothing."""
    values, indices = candidates(4, 500, 48)
    mesh = mesh_of((1, 8), ("one", "s"))
    select = jax.shard_map(
        lambda v, i: jax_topk.merge_top_k(v, i, 6, axis_name=("one", "s")),
        mesh=mesh,
        in_specs=jax.P(None, ("one", "s")),
        out_specs=jax.P(),
    )
    for result, wanted in zip(
        jax.jit(select)(values, indices), merge_in_numpy(values, indices, 6), strict=True
    ):
        assert_same(np.asarray(result), wanted)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: jax_topk.sharded_top_k(x, 65, axis_name="s"), ValueError, "k=65 .* width 64"),
        (lambda x: jax_topk.sharded_top_k(x, -1, axis_name="s"), ValueError, "k=-1 is negative"),
        (
            lambda x: jax_topk.sharded_top_k(x, 2.0, axis_name="s"),
            TypeError,
            "k=2.0 has type float",
        ),
        (lambda x: jax_topk.sharded_top_k(x, 2, axis_name=()), ValueError, "axis_name is empty"),
        (lambda x: jax_topk.sharded_top_k(x, 2, axis_name="t"), NameError, "'t' is not bound"),
        (lambda x: jax_topk.sharded_top_k(x[0, 0], 2, axis_name="s"), ValueError, "is a scalar"),
        (lambda x: jax_topk.sharded_top_k([1.0], 2, axis_name="s"), TypeError, "has type list"),
        (lambda x: jax_topk.sharded_top_k(x + 1j, 2, axis_name="s"), ValueError, "complex"),
        (
            lambda x: jax_topk.sharded_top_k(x, 2, axis_name="s", lengths=1.0),
            TypeError,
            "lengths has dtype float32",
        ),
        (
            lambda x: jax_topk.sharded_top_k(x, 2, axis_name="s", row_starts=np.ones(9, int)),
            ValueError,
            "row_starts has shape",
        ),
        (
            lambda x: jax_topk.sharded_top_k(x, 2, axis_name="s", mode="best"),
            ValueError,
            "mode='best' is unknown",
        ),
        (lambda x: jax_topk.merge_top_k(x, x, 2, axis_name="s"), TypeError, "indices has dtype"),
        (
            lambda x: jax_topk.merge_top_k(x, x[:, :1].astype(int), 2, axis_name="s"),
            ValueError,
            "values has shape .* and indices",
        ),
        (
            lambda x: jax_topk.merge_top_k(x, x.astype(int), -3, axis_name="s"),
            ValueError,
            "k=-3 is negative",
        ),
    ],
)
def test_errors(mesh_of, call, error, message):
    function = jax.shard_map(
        lambda x: call(x), mesh=mesh_of((8,), ("s",)), in_specs=jax.P(None, "s"), out_specs=jax.P()
    )
    with pytest.raises(error, match=message):
        jax.jit(function)(np.ones((4, 64), np.float32))


def test_outside_of_shard_map():
    with pytest.raises(NameError, match=r"call this function inside jax\.shard_map"):
        jax_topk.sharded_top_k(np.ones(8, np.float32), 2, axis_name="s")


def test_rows_that_int32_cannot_index(mesh_of):
    function = jax.shard_map(
        lambda x: jax_topk.sharded_top_k(x, 2, axis_name="s"),
        mesh=mesh_of((8,), ("s",)),
        in_specs=jax.P("s"),
        out_specs=jax.P(),
    )
    with pytest.raises(ValueError, match="the whole row is 2147483648 wide"):
        jax.eval_shape(function, jax.ShapeDtypeStruct((2**31,), jnp.bfloat16))


# --- two processes --------------------------------------------------------------------------------


def test_two_processes():
    """Rows over two processes without communication, and one row over two processes, exactly."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = pathlib.Path(__file__).with_name("two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.splitlines()[-1] == "all equal"
