"""`jax_topk.install()`: invisible but for the time, and gone without a trace."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import threading
import warnings

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import mlir as mlir_internals
from jax.extend.core import primitives
from jax.interpreters import mlir
from runners import assert_same

import jax_topk
from jax_topk import _native

install = sys.modules["jax_topk.install"]
TARGET = _native.TARGET_VALUES_INDICES

pytestmark = pytest.mark.skipif(
    not _native.CPU.is_available, reason="there is nothing to install without a native module"
)


@pytest.fixture(autouse=True)
def leave_no_trace():
    """Every test starts and ends with JAX's own rules."""
    tables = mlir._platform_specific_lowerings
    before = {name: tables[name].get(primitives.top_k_p) for name in ("cpu", "cuda")}
    assert not install.is_installed()
    yield
    jax_topk.uninstall()
    assert not install.is_installed()
    after = {name: tables[name].get(primitives.top_k_p) for name in ("cpu", "cuda")}
    assert after == before
    # JAX keeps a set of operations whose lowering it does not reuse, and offers no way out of it.
    assert primitives.top_k_p not in getattr(mlir_internals, "_uncacheable_primitives", ())
    jax.clear_caches()


@pytest.fixture(autouse=True)
def on_cpu():
    """The rule for CPUs is looked at here, that for GPUs in test_cuda."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def text_of(function, *arguments):
    return jax.jit(lambda *a: function(*a)).lower(*arguments).as_text()


X = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)


def test_routes_and_gives_back():
    assert TARGET not in text_of(lambda x: lax.top_k(x, 5), X)
    jax_topk.install()
    assert TARGET in text_of(lambda x: lax.top_k(x, 5), X)
    jax_topk.uninstall()
    assert TARGET not in text_of(lambda x: lax.top_k(x, 5), X)


def test_is_idempotent():
    for _ in range(3):
        jax_topk.install()
    jax_topk.uninstall()
    assert not install.is_installed()
    jax_topk.uninstall()


def test_contexts_nest():
    with jax_topk.installed():
        with jax_topk.installed():
            assert install.is_installed()
        assert install.is_installed()
        assert TARGET in text_of(lambda x: lax.top_k(x, 5), X)
    assert not install.is_installed()
    with pytest.raises(ZeroDivisionError), jax_topk.installed():
        raise ZeroDivisionError
    assert not install.is_installed()


def test_contexts_and_calls_mix():
    jax_topk.install()
    with jax_topk.installed():
        jax_topk.uninstall()
        assert install.is_installed()  # until the context ends
    assert not install.is_installed()
    with jax_topk.installed():
        jax_topk.install()
    assert install.is_installed()
    jax_topk.uninstall()


def test_threads():
    stop = threading.Event()
    errors = []

    def enter_and_leave():
        try:
            while not stop.is_set():
                with jax_topk.installed():
                    assert install.is_installed()
                jax_topk.install()
                jax_topk.uninstall()
        except Exception as error:
            errors.append(error)

    def compile_and_run(seed):
        try:
            for width in range(20, 30):
                x = np.random.default_rng(seed).normal(size=(3, width + 10 * seed))
                x = x.astype(np.float32)
                # A thread does not inherit the default device.
                values, indices = lax.top_k(jax.device_put(x, jax.devices("cpu")[0]), 4)
                wanted = np.argsort(-x, axis=1, kind="stable")[:, :4]
                assert_same(np.asarray(indices), wanted.astype(np.int32))
                assert_same(np.asarray(values), np.take_along_axis(x, wanted, 1))
        except Exception as error:
            errors.append(error)

    switchers = [threading.Thread(target=enter_and_leave) for _ in range(3)]
    workers = [threading.Thread(target=compile_and_run, args=(seed,)) for seed in range(3)]
    for thread in (*switchers, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in switchers:
        thread.join()
    assert not errors


# --- invisible ------------------------------------------------------------------------------------


def under_both(function, *arguments):
    """Runs a function with JAX's own lowering and with ours, each compiled anew."""
    theirs = jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arguments))
    with jax_topk.installed():
        assert TARGET in text_of(function, *arguments)
        ours = jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arguments))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("k", [0, 1, 17, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=lambda d: d.__name__)
def test_bit_equal(dtype, k):
    under_both(lambda x: lax.top_k(x, k), inputs.rows_of(300, dtype))


def test_every_float16_pattern_is_bit_equal():
    patterns = np.random.default_rng(1).permutation(1 << 16).astype(np.uint16)
    under_both(lambda x: lax.top_k(x, 1 << 16), patterns.view(np.float16)[None])


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_every_axis(axis):
    x = np.random.default_rng(2).integers(-3, 4, (5, 6, 7)).astype(np.float32)
    under_both(lambda x: lax.top_k(x, 4, axis=axis), x)


def test_transformations():
    x = np.random.default_rng(3).normal(size=(5, 6, 7)).astype(np.float32)
    under_both(jax.vmap(jax.vmap(lambda x: lax.top_k(x, 3)), in_axes=2), x)
    under_both(jax.vmap(lambda x: lax.top_k(x, 3), in_axes=2, out_axes=1), x)
    under_both(jax.grad(lambda x: jnp.sum(lax.top_k(x, 3)[0] ** 2)), x)
    under_both(lambda x: lax.map(lambda y: lax.top_k(y, 3), x), x)
    under_both(jax.hessian(lambda x: jnp.sum(lax.top_k(x, 2)[0] ** 3)), x[0, 0])
    under_both(
        lambda x: lax.cond(
            x[0, 0, 0] > 0,
            lambda x: lax.top_k(x, 3),
            lambda x: ([x[..., :3], jnp.zeros((5, 6, 3), jnp.int32)]),
            x,
        ),
        x,
    )


def test_jnp_top_k_is_there_from_the_documented_version_on():
    version = tuple(int(part) for part in jax.__version__.split(".")[:3])
    assert hasattr(jnp, "top_k") == (version >= (0, 11, 1))


@pytest.mark.skipif(not hasattr(jnp, "top_k"), reason="this version of JAX has no jnp.top_k")
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_jnp_top_k_is_routed_too(mode):
    under_both(lambda x: jnp.top_k(x, 5, mode=mode), inputs.rows_of(100, np.float32))


# --- the functions of JAX that call it ------------------------------------------------------------

KEY = jax.random.key(0)

CALLERS = {
    "partition": lambda x: jnp.partition(x, 20),
    "partition_axis": lambda x: jnp.partition(x, 2, axis=0),
    "argpartition": lambda x: jnp.argpartition(x, 20),
    "argpartition_axis": lambda x: jnp.argpartition(x, -1, axis=0),
    "choice": lambda x: jax.random.choice(
        KEY, x.shape[1], (9,), replace=False, p=jax.nn.softmax(x[0])
    ),
    "choice_of_rows": lambda x: jax.random.choice(
        KEY, x, (3,), replace=False, p=jax.nn.softmax(x[:, 0]), axis=0
    ),
    "categorical": lambda x: jax.random.categorical(KEY, x, shape=(2, 3, 5), replace=False),
    "categorical_axis": lambda x: jax.random.categorical(
        KEY, x, axis=0, shape=(4, x.shape[1]), replace=False
    ),
    "gradient_of_partition": jax.grad(lambda x: jnp.sum(jnp.partition(x, 20)[:, :20] ** 2)),
    "vmap_of_partition": jax.vmap(lambda row: jnp.partition(row, 7)),
}


@pytest.mark.parametrize("name", CALLERS)
def test_functions_of_jax_that_call_it_are_bit_equal(name):
    """Every function of JAX 0.10.2 to 0.12 that calls `lax.top_k`; `jnp.top_k` is above.

    `approx_max_k` and `approx_min_k` are an operation of their own.
    """
    x = np.random.default_rng(8).integers(-9, 9, (5, 40)).astype(np.float32)  # with ties
    under_both(CALLERS[name], x)


@pytest.mark.parametrize("mode", ["eager", "x64", "no jit"])
def test_functions_of_jax_that_call_it_in_other_modes(mode):
    contexts = {
        "eager": contextlib.nullcontext,
        "x64": lambda: jax.enable_x64(True),
        "no jit": jax.disable_jit,
    }
    x = np.random.default_rng(8).integers(-9, 9, (5, 40)).astype(np.float32)
    for name in ("partition", "argpartition_axis", "choice", "categorical_axis"):
        with contexts[mode]():
            theirs = CALLERS[name](x)
            jax.clear_caches()
            with jax_topk.installed():
                ours = CALLERS[name](x)
            jax.clear_caches()
        assert ours.dtype == theirs.dtype
        assert_same(np.asarray(ours), np.asarray(theirs))


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.bool_])
def test_several_platforms_at_once(dtype):
    """One exported module for many platforms, of which some have a rule of ours and some do not."""
    from jax import export

    x = np.random.default_rng(10).integers(-9, 9, (3, 50)).astype(dtype)
    platforms = ("cpu", "cuda", "rocm", "tpu")
    with jax_topk.installed():
        exported = export.export(
            jax.jit(lambda x: (lax.top_k(x, 5), lax.top_k(x, 5))),
            platforms=platforms,
            disabled_checks=[export.DisabledSafetyCheck.custom_call(TARGET)],
        )(x)
    assert exported.platforms == platforms
    text = exported.mlir_module()
    assert "top_k" in text.replace(TARGET, "")
    is_served = dtype == np.float32 or (dtype == jnp.bfloat16 and _native.CUDA.is_available)
    assert (f"@{TARGET}(" in text) == is_served
    for ours in exported.call(x):
        for a, b in zip(ours, lax.top_k(x, 5), strict=True):
            assert_same(np.asarray(a), np.asarray(b))


def test_symbolic_k():
    """`k` may be a symbolic size for JAX; its own lowering then stays, which needs no target."""
    from jax import export

    (width,) = export.symbolic_shape("n", constraints=["n >= 2"])
    shape = jax.ShapeDtypeStruct((width,), jnp.float32)
    with jax_topk.installed():
        function = jax.jit(lambda x: lax.top_k(x, x.shape[0] - 1))
        exported = export.export(function, platforms=["cpu"])(shape)
    for a, b in zip(exported.call(X[0]), lax.top_k(X[0], X.shape[1] - 1), strict=True):
        assert_same(np.asarray(a), np.asarray(b))


def test_symbolic_sizes():
    from jax import export

    rows, width = export.symbolic_shape("rows, width", constraints=["width >= 5"])
    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    with jax_topk.installed():
        function = jax.jit(lambda x: lax.top_k(x, 5))
        with pytest.raises(ValueError, match=TARGET):  # named, so that it can be allowed
            export.export(function, platforms=["cpu"])(shape)
        exported = export.export(
            function,
            platforms=["cpu"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(TARGET)],
        )(shape)
    assert f"@{TARGET}(" in exported.mlir_module()
    for a, b in zip(exported.call(X), lax.top_k(X, 5), strict=True):
        assert_same(np.asarray(a), np.asarray(b))


def test_sharded_rows(cpu_devices):
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2, devices=cpu_devices)
        x = np.random.default_rng(4).normal(size=(8, 6, 40)).astype(np.float32)
        with jax.set_mesh(mesh), jax_topk.installed():
            rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", "y")))
            compiled = jax.jit(lambda x: lax.top_k(x, 5)).lower(rows).compile()
            assert "all-gather" not in compiled.as_text()
            results = compiled(rows)
        for result, wanted in zip(results, lax.top_k(x, 5), strict=True):
            assert result.sharding.is_equivalent_to(rows.sharding, 3)
            assert_same(np.asarray(result), np.asarray(wanted))


def test_a_sharded_axis_is_gathered_as_before(cpu_devices):
    mesh = jax.make_mesh(
        (8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=cpu_devices
    )
    x = np.random.default_rng(5).normal(size=(3, 64)).astype(np.float32)
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "x")))
    with jax_topk.installed():
        results = jax.jit(lambda x: lax.top_k(x, 5))(placed)
    for result, wanted in zip(results, lax.top_k(x, 5), strict=True):
        assert_same(np.asarray(result), np.asarray(wanted))


def test_shard_map(cpu_devices):
    mesh = jax.make_mesh(
        (8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=cpu_devices
    )
    x = np.random.default_rng(6).normal(size=(8, 64)).astype(np.float32)
    with jax_topk.installed():
        select = jax.jit(
            jax.shard_map(
                lambda x: lax.top_k(x, 5), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")
            )
        )
        assert TARGET in select.lower(x).as_text()
        results = select(x)
    for result, wanted in zip(results, lax.top_k(x, 5), strict=True):
        assert_same(np.asarray(result), np.asarray(wanted))


# --- what must keep JAX's own lowering ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int32, np.uint8, np.bool_])
def test_other_types_keep_their_lowering(dtype):
    x = np.random.default_rng(7).integers(0, 2, (3, 40)).astype(dtype)
    before = text_of(lambda x: lax.top_k(x, 5), x)
    with jax_topk.installed():
        assert text_of(lambda x: lax.top_k(x, 5), x) == before


def test_random_keys_fail_as_before():
    """JAX traces them and cannot lower them: whatever it says then is not ours to replace."""
    keys = jax.random.split(KEY, 3)
    messages = []
    for context in (contextlib.nullcontext, jax_topk.installed):
        with context(), pytest.raises(Exception) as caught:
            jax.jit(lambda x: lax.top_k(x, 1)).lower(keys)
        messages.append((caught.type, str(caught.value).splitlines()[0]))
    assert messages[0] == messages[1]


def test_an_unstable_top_k_keeps_its_lowering():
    if "is_stable" not in lax.top_k.__kwdefaults__:
        pytest.skip("this version of JAX has only the stable form")
    before = text_of(lambda x: lax.top_k(x, 5, is_stable=False), X)
    with jax_topk.installed():
        assert text_of(lambda x: lax.top_k(x, 5, is_stable=False), X) == before


def test_other_platforms_keep_their_lowering():
    from jax import export

    def module():
        function = jax.jit(lambda x: lax.top_k(x, 5))
        text = export.export(function, platforms=["tpu"])(X).mlir_module()
        return re.sub(r"loc\(.*", "", text)  # where in this file the export was called

    before = module()
    with jax_topk.installed():
        assert module() == before


def test_a_forced_expression_stays_xla():
    """Its own `lax.top_k` must not be taken over, whichever of the two is compiled first."""

    def expression(x):
        return jax_topk.top_k(x, 5, implementation="xla")

    def both(x):
        return lax.top_k(x, 5), expression(x)

    def other_way_round(x):
        return expression(x), lax.top_k(x, 5)

    with jax_topk.installed():
        assert TARGET not in text_of(expression, X)
        for function in (both, other_way_round):
            text = text_of(function, X)
            assert len(re.findall(rf"@{TARGET}\(", text)) == 1
            assert "chlo.top_k" in text


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.13.0", "1.0.0", "0.9.2", "unknown"])
def test_unknown_versions_of_jax_are_refused(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    for enter in (jax_topk.install, lambda: jax_topk.installed().__enter__()):
        with pytest.raises(RuntimeError, match=f"this is JAX {version}: .* call jax_topk.top_k"):
            enter()
    assert not install.is_installed()


def test_unknown_tables_are_refused(monkeypatch):
    monkeypatch.delattr(mlir, "_platform_specific_lowerings")
    with pytest.raises(RuntimeError, match="does not find the lowering rules"):
        jax_topk.install()


def test_without_native_modules_it_warns(monkeypatch):
    for name in ("CPU", "CUDA"):
        absent = _native.Native(name.lower(), None, f"{name} was not built")
        monkeypatch.setattr(_native, name, absent)
    with pytest.warns(RuntimeWarning, match="CPU was not built; CUDA was not built") as caught:
        jax_topk.install()
    assert pathlib.Path(caught[0].filename) == pathlib.Path(__file__)
    assert not install.is_installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lax.top_k(X, 5)


def test_every_known_version_is_run_in_ci():
    """The oldest and the newest run all tests, those between run the conformance tests."""
    ci = (pathlib.Path(__file__).parents[1] / ".ci" / "run").read_text()
    oldest = re.search(r"^readonly OLDEST_JAX=(\d+\.\d+)\.", ci, re.MULTILINE)[1]
    between = re.search(r"^readonly BETWEEN_JAX=\((.*)\)$", ci, re.MULTILINE)[1].split()
    known = [".".join(map(str, version)) for version in install.KNOWN_VERSIONS]
    assert known[:-1] == [oldest, *between]


@pytest.mark.slow
def test_the_conformance_tests_pass_under_it():
    """All of `test_lax_conformance`, with `jax.lax.top_k` itself taken over."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            "tests/test_lax_conformance.py",
        ],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "JAX_TOPK_TEST_INSTALLED": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\d{2,} passed", result.stdout)
