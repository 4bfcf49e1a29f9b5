"""The build: who may include whom, what the native modules export and link, the one switch."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jax_topk import _native

ROOT = pathlib.Path(__file__).parents[1]
FFI = ROOT / "ffi"

# Headers that only the bindings may see: a change in XLA or nanobind then reaches no other file.
BINDING_HEADERS = r"xla/|nanobind/|Python\.h|plan_binding\.h"
CUDA_HEADERS = r"cuda|.*\.cuh$|cub/|cooperative_groups"

# Pattern of files below ffi/ -> pattern of the headers that they must not include.
FORBIDDEN = {
    "cuda/*.cuh": BINDING_HEADERS,
    "cuda/*.cu": BINDING_HEADERS,
    "cuda/launch.h": BINDING_HEADERS,
    "*.h": CUDA_HEADERS,
    "plan.cc": f"{BINDING_HEADERS}|{CUDA_HEADERS}",
    "problem.h": BINDING_HEADERS,
    "plan.h": BINDING_HEADERS,
    "cpu/*.h": f"{BINDING_HEADERS}|{CUDA_HEADERS}",
    "cpu/*.cc": CUDA_HEADERS,
    "cpu/[!b]*.cc": BINDING_HEADERS,  # all but binding.cc
}


def included(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("files", "forbidden"), FORBIDDEN.items())
def test_includes_run_one_way(files, forbidden):
    paths = sorted(FFI.glob(files))
    assert paths, f"no file matches ffi/{files}"
    for path in paths:
        # A header is named relative to ffi/ or to the file that includes it.
        wrong = [name for name in included(path) if re.match(forbidden, name.removeprefix("../"))]
        assert not wrong, f"{path.relative_to(ROOT)} must not include {wrong}"


def native_module(name: str):
    native = {"_cpu": _native.CPU, "_cuda": _native.CUDA}[name]
    if native.module is None:
        pytest.skip(native.reason)
    return native.module


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_stubs_describe_the_native_modules(name):
    module = native_module(name)
    stub = ast.parse((ROOT / "jax_topk" / f"{name}.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    public = {key for key in vars(module) if not key.startswith("_")}
    assert public == functions.keys() | constants
    for function, node in functions.items():
        signature = getattr(module, function).__nb_signature__[0][0]
        signature = re.sub(r"= \\\d+", "= ...", signature)  # stands for a default value
        exported = ast.parse(f"{signature}: ...").body[0]
        assert [arg.arg for arg in exported.args.args] == [arg.arg for arg in node.args.args]
        assert len(exported.args.defaults) == len(node.args.defaults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_native_modules_need_only_the_system(name):
    """Neither a CUDA library nor a driver: the import must work on any machine."""
    module = native_module(name)
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(
        [readelf, "--dynamic", module.__file__], check=True, capture_output=True, text=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", text))
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    assert "libc" in needed
    assert not {library for library in needed - system if not library.startswith("ld-linux")}


@pytest.mark.parametrize(
    ("choice", "succeeds", "message"),
    [
        ("off", True, "the CUDA target is left out (JAX_TOPK_CUDA=off)"),
        ("maybe", False, "JAX_TOPK_CUDA=maybe is not a choice; set it to auto, on or off"),
        ("on", False, "CUDACXX=no-such-nvcc is not a program"),
        ("auto", True, "building for CPU only: CUDACXX=no-such-nvcc is not a program"),
    ],
)
def test_the_switch_says_what_it_does(tmp_path, choice, succeeds, message):
    pytest.importorskip("nanobind")
    cmake = shutil.which("cmake", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    result = subprocess.run(
        [
            cmake,
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DSKBUILD_PROJECT_VERSION_FULL=0",
            *("-S", str(FFI), "-B", str(tmp_path)),
        ],
        env={**os.environ, "JAX_TOPK_CUDA": choice, "CUDACXX": "no-such-nvcc"},
        capture_output=True,
        text=True,
    )
    output = " ".join((result.stdout + result.stderr).split())
    assert message in output
    assert (result.returncode == 0) == succeeds, output
