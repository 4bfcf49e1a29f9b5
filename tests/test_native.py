"""Loading the native modules: what is absent or broken becomes a sentence, and JAX goes on."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest

import jax_topk
from jax_topk import _native

ROOT = pathlib.Path(__file__).parents[1]


def test_status_is_a_sentence_for_each_target():
    status = _native.status()
    assert set(status) == {"cpu", "cuda"}
    for name, entry in status.items():
        assert entry["available"] == getattr(_native, name.upper()).is_available
        assert len(entry["reason"].split()) > 3


def test_the_ffi_version_of_jaxlib_is_read_from_its_header():
    major, minor = _native.jaxlib_ffi_version()
    assert major == 0
    assert minor >= 3  # jaxlib 0.10.2


def test_an_unreadable_header_is_no_version(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert _native.jaxlib_ffi_version() is None
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("// nothing\n")
    assert _native.jaxlib_ffi_version() is None
    header.write_text("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 42\n")
    assert _native.jaxlib_ffi_version() == (1, 42)


@pytest.mark.parametrize(
    ("compiled", "running", "version", "expected"),
    [
        ((0, 3), (0, 3), None, None),
        ((0, 3), (0, 5), None, None),
        ((0, 5), (0, 3), None, "compiled for XLA FFI 0.5, .* does not accept; upgrade jax"),
        ((1, 0), (0, 5), None, "compiled for XLA FFI 1.0"),
        ((0, 3), (1, 0), None, "XLA FFI 1.0. does not accept"),
        ((0, 3), None, None, "could not be read from its header"),
        ((0, 3), (0, 3), "9.9.9", "built from jax_topk 9.9.9, but the Python code is version"),
    ],
)
def test_incompatible_modules_are_explained(compiled, running, version, expected):
    version = version or jax_topk.__version__
    reason = _native.incompatibility("_cpu", compiled, running, version)
    if expected is None:
        assert reason is None
    else:
        assert re.search(expected, reason)


class Fake(types.ModuleType):
    """A native module that notes whether its handlers were asked for."""

    def __init__(self, ffi_version=(0, 3), version=None):
        super().__init__("jax_topk._fake")
        self.__file__ = "_fake.so"
        self.FFI_API_VERSION = ffi_version
        self.VERSION = version or jax_topk.__version__
        self.was_asked = False

    def registrations(self):
        self.was_asked = True
        return {}


def load_fake(monkeypatch, found):
    def find(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(_native, "_import", find)
    return _native._load("cpu", "_cpu", "cpu")


def test_a_module_that_was_not_built(monkeypatch):
    error = ModuleNotFoundError("No module named 'jax_topk._cpu'", name="jax_topk._cpu")
    native = load_fake(monkeypatch, error)
    assert not native.is_available
    assert re.search(r"was not built: .* run `pip install .`", native.reason)


def test_a_module_that_is_broken(monkeypatch):
    native = load_fake(monkeypatch, ImportError("libfoo.so.1: cannot open shared object file"))
    assert not native.is_available
    assert "cannot be loaded (ImportError: libfoo.so.1: cannot open" in native.reason
    assert "reinstall" in native.reason


def test_a_module_whose_own_import_fails_is_not_called_absent(monkeypatch):
    native = load_fake(monkeypatch, ModuleNotFoundError("No module named 'numpyx'", name="numpyx"))
    assert not native.is_available
    assert "cannot be imported: No module named 'numpyx'" in native.reason


@pytest.mark.parametrize("fake", [Fake(ffi_version=(0, 99)), Fake(version="0.0.1")])
def test_nothing_is_registered_from_an_incompatible_module(monkeypatch, fake):
    native = load_fake(monkeypatch, fake)
    assert not native.is_available
    assert not fake.was_asked


def test_a_compatible_module_is_registered(monkeypatch):
    fake = Fake()
    native = load_fake(monkeypatch, fake)
    assert native.is_available
    assert fake.was_asked
    assert "XLA FFI 0.3" in native.reason


def run(code: str, cwd: pathlib.Path, **environment: str) -> str:
    """Runs Python code in a fresh process and returns what it printed."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_native_modules_everything_works(tmp_path):
    """The package alone, in an interpreter that finds neither module nor distribution."""
    (tmp_path / "jax_topk").symlink_to(ROOT / "jax_topk")
    output = run(
        """
        import importlib.metadata, sys
        def absent(name): raise importlib.metadata.PackageNotFoundError(name)
        importlib.metadata.distribution = absent
        sys.modules["jax_topk._cpu"] = sys.modules["jax_topk._cuda"] = None
        import jax, jax_topk
        from jax_topk import _native
        assert not _native.CPU.is_available and not _native.CUDA.is_available
        values, indices = jax_topk.top_k(jax.numpy.arange(9.0), 3, lengths=5)
        print(indices.tolist(), _native.CPU.reason)
        """,
        tmp_path,
    )
    assert output.startswith("[4, 3, 2] jax_topk._cpu")


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_jax_survives_a_module_for_a_newer_ffi(tmp_path):
    """Registering it would leave every use of JAX in the process dead."""
    output = run(
        """
        import jax_topk._native as native
        newer = type("Newer", (), dict(
            FFI_API_VERSION=(0, 99), VERSION=native.__version__, __file__="x",
            registrations=staticmethod(native.CPU.module.registrations)))
        native._import = lambda name: newer
        loaded = native._load("cpu", "_cpu", "cpu")
        import jax
        print(loaded.is_available, jax.numpy.arange(3).sum(), loaded.reason)
        """,
        ROOT,
    )
    assert output.startswith("False 3 jax_topk._cpu was compiled for XLA FFI 0.99")


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_the_source_folder_finds_the_installed_modules():
    """`python -m jax_topk` in a checkout imports the package without its native modules."""
    output = run(
        """
        import pathlib, jax_topk
        from jax_topk import _native
        print(pathlib.Path(jax_topk.__file__).parent)
        print(_native.CPU.is_available)
        """,
        ROOT,
    )
    folder, available = output.split()
    assert pathlib.Path(folder) == ROOT / "jax_topk"
    assert available == "True"


def test_versions_agree():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jax_topk.__version__
    if _native.CPU.is_available:
        assert jax_topk.__version__ == _native.CPU.module.VERSION
        assert importlib.metadata.version("jax_topk") == jax_topk.__version__


def test_imports_run_one_way():
    """Api -> _primitive -> _lowering -> {_native, _reference}, sharding -> api, bench -> api."""
    layers = [
        {"_version"},
        {"_native", "_reference"},
        {"_primitive"},
        {"_lowering", "_axis_check"},
        {"api"},
        {"sharding", "debug", "install"},
    ]
    rank = {name: i for i, names in enumerate(layers) for name in names}
    for name, own in rank.items():
        path = ROOT / "jax_topk" / f"{name}.py"
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            match = re.match(r"from jax_topk(?:\.(\w+))? import (.*)", line)
            if match is None:
                continue
            module, names = match.groups()
            imported = [module] if module else re.findall(r"\w+", names)
            for other in imported:
                assert rank.get(other, len(layers)) < own, f"{name}.py imports {other}"


@pytest.mark.skipif(not _native.CPU.is_available, reason="the CPU target is not built")
def test_handlers_explain_wrong_calls():
    """Reached only past this package, by a call of the FFI target itself."""
    x = np.ones((3, 10), np.float32)
    counts = np.zeros(3, np.int32)

    def call(x, starts, lengths, k=2):
        result = jax.ShapeDtypeStruct((*x.shape[:-1], k), np.int32)
        with jax.default_device(jax.devices("cpu")[0]):
            call = jax.ffi.ffi_call(_native.TARGET_INDICES, result)
            return call(x, starts, lengths, smallest=False, sorted=False, plan="")

    assert call(x, counts, counts).shape == (3, 2)
    for arguments, message in [
        ((x.astype(np.int32), counts, counts), "F32, BF16 and F16"),
        ((x, counts[:2], counts), "starts has shape .2."),
        ((x, counts, counts[:2]), "lengths has shape .2."),
        ((x, counts, counts, 11), "k=11 exceeds the row width 10"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(*arguments)

    def call_with_values(values, k=2):
        results = (values, jax.ShapeDtypeStruct((3, k), np.int32))
        with jax.default_device(jax.devices("cpu")[0]):
            call = jax.ffi.ffi_call(_native.TARGET_VALUES_INDICES, results)
            return call(x, counts, counts, smallest=False, sorted=False, plan="")

    assert call_with_values(jax.ShapeDtypeStruct((3, 2), np.float32))[0].shape == (3, 2)
    for values, message in [
        (jax.ShapeDtypeStruct((3, 2), np.float16), "values has element type F16"),
        (jax.ShapeDtypeStruct((3, 1), np.float32), "values has shape .3, 1."),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call_with_values(values)
