"""Loads the native modules, registers their FFI targets with XLA, and explains what is absent.

Each of `_cpu` and `_cuda` is optional at run time. Whatever is wrong with one of them (not built,
linked against something missing, built for a newer XLA FFI, left over from another version of this
package) becomes a sentence in `status()`; nothing here raises on import, and nothing is registered
that the running jaxlib would refuse. The last point matters: XLA accepts the registration of a
handler with a newer FFI version and fails when the first backend starts, which breaks every use of
JAX in the process.

Running from a checkout after a plain `pip install .` imports the package from the source folder,
which holds no native modules. They are then looked up in the installed distribution, and used if
they were built from the same version.

The names of the targets and their attributes (`smallest`, `sorted`, `plan`) are a promise to
programs that `jax.export` wrote to disk: what `jax_topk_v1_...` means does not change, and a call
with another meaning will get another prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib
import re
import sys
import types
from typing import Any

import jax
import jaxlib.version

from jax_topk._version import __version__

__all__ = [
    "CPU",
    "CUDA",
    "MAX_K",
    "TARGETS",
    "TARGET_INDICES",
    "TARGET_VALUES_INDICES",
    "Native",
    "jaxlib_ffi_version",
    "machine_problem",
    "status",
]

TARGET_VALUES_INDICES = "jax_topk_v1_values_indices"
TARGET_INDICES = "jax_topk_v1_indices"
TARGETS = (TARGET_VALUES_INDICES, TARGET_INDICES)

# The oldest GPUs that ffi/CMakeLists.txt compiles the kernels for.
OLDEST_COMPUTE_CAPABILITY = (8, 0)

_DISTRIBUTION = "jax_topk"
_HOW_TO_BUILD = {
    "_cpu": "run `pip install .` in a checkout of jax_topk (it needs a C++17 compiler)",
    "_cuda": (
        "run `pip install .` in a checkout of jax_topk with JAX_TOPK_CUDA=on, which fails and says"
        " why if the CUDA compiler cannot be found"
    ),
}


@dataclasses.dataclass(frozen=True)
class Native:
    """What was found for one platform.

    Attributes:
        name: `"cpu"` or `"cuda"`, as in the argument `implementation`.
        module: the native module, or None where it cannot be used.
        reason: a sentence: what was loaded, or why the module cannot be used and how to get it.
    """

    name: str
    module: types.ModuleType | None
    reason: str

    @property
    def is_available(self) -> bool:
        """Whether the FFI targets of this platform are registered."""
        return self.module is not None


def jaxlib_ffi_version() -> tuple[int, int] | None:
    """Returns the XLA FFI version `(major, minor)` of the running jaxlib, or None if unknown.

    Read from the header that every jaxlib carries, since jaxlib has no function that tells it.
    """
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    numbers = [
        re.search(rf"^#define XLA_FFI_API_{part}\s+(\d+)", text, re.MULTILINE)
        for part in ("MAJOR", "MINOR")
    ]
    if not all(numbers):
        return None
    major, minor = (int(match.group(1)) for match in numbers if match)
    return major, minor


def incompatibility(
    module_name: str,
    compiled: tuple[int, int],
    running: tuple[int, int] | None,
    module_version: str,
) -> str | None:
    """Returns a sentence saying why a native module must not be registered, or None if it may.

    Args:
        module_name: `"_cpu"` or `"_cuda"`.
        compiled: the XLA FFI version that the module was compiled with.
        running: the version of the running jaxlib; None if it could not be read.
        module_version: the version of jax_topk that the module was built from.
    """
    if module_version != __version__:
        return (
            f"jax_topk.{module_name} was built from jax_topk {module_version}, but the Python code"
            f" is version {__version__}; reinstall so that both match: `pip install .`"
        )
    as_text = ".".join(map(str, compiled))
    if running is None:
        return (
            f"jax_topk.{module_name} was compiled for XLA FFI {as_text}, and the FFI version of"
            f" jaxlib {jaxlib.version.__version__} could not be read from its header"
            " xla/ffi/api/c_api.h; reinstall jaxlib"
        )
    if compiled[0] != running[0] or compiled[1] > running[1]:
        return (
            f"jax_topk.{module_name} was compiled for XLA FFI {as_text}, which jaxlib"
            f" {jaxlib.version.__version__} (XLA FFI {'.'.join(map(str, running))}) does not"
            " accept; upgrade jax and jaxlib, or rebuild jax_topk against this jaxlib:"
            " `pip install --no-build-isolation .`"
        )
    return None


def _find_installed(module_name: str) -> pathlib.Path | None:
    """Returns the file of a native module of the installed distribution, or None."""
    try:
        files = importlib.metadata.distribution(_DISTRIBUTION).files or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.parts[:1] != ("jax_topk",) or len(file.parts) != 2:
            continue
        stem, _, suffix = file.name.partition(".")
        if stem == module_name and f".{suffix}" in importlib.machinery.EXTENSION_SUFFIXES:
            path = pathlib.Path(str(file.locate()))
            return path if path.exists() else None
    return None


def _import(module_name: str) -> types.ModuleType:
    """Imports `jax_topk.<module_name>`, also where the source folder shadows the installed one."""
    full_name = f"jax_topk.{module_name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        # A module that exists and lacks one of its own imports is broken, not absent.
        if error.name != full_name:
            raise
        path = _find_installed(module_name)
        if path is None:
            raise
    spec = importlib.util.spec_from_file_location(full_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full_name] = module
    return module


def _load(name: str, module_name: str, platform: str) -> Native:
    """Imports one native module, checks it, and registers its targets for `platform`."""
    try:
        module: Any = _import(module_name)
    except ModuleNotFoundError as error:
        if error.name != f"jax_topk.{module_name}":
            return Native(name, None, f"jax_topk.{module_name} cannot be imported: {error}")
        here = pathlib.Path(__file__).parent
        return Native(
            name,
            None,
            f"jax_topk.{module_name} was not built: there is none in {here}, nor in an installed"
            f" distribution of jax_topk; {_HOW_TO_BUILD[module_name]}",
        )
    except Exception as error:  # whatever a broken shared object raises, JAX must go on working
        return Native(
            name,
            None,
            f"jax_topk.{module_name} was found but cannot be loaded"
            f" ({type(error).__name__}: {error}); reinstall jax_topk on this machine",
        )
    problem = incompatibility(
        module_name,
        getattr(module, "FFI_API_VERSION", (0, 0)),
        jaxlib_ffi_version(),
        getattr(module, "VERSION", "of unknown version"),
    )
    if problem is not None:
        return Native(name, None, problem)
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    ffi_version = ".".join(map(str, module.FFI_API_VERSION))
    return Native(name, module, f"loaded {module.__file__} (XLA FFI {ffi_version})")


CPU = _load("cpu", "_cpu", "cpu")
CUDA = _load("cuda", "_cuda", "CUDA")

# Declared for every process, with or without native modules: a program exported elsewhere may name
# the targets, and the partitioner must keep their rows where they are.
for _target in TARGETS:
    jax.ffi.register_ffi_target_as_batch_partitionable(_target)

MAX_K: int = getattr(CUDA.module, "MAX_K", 4096)
"""Largest k that the CUDA kernels serve; the CPU target and the XLA expression take any k."""


def machine_problem(name: str) -> str | None:
    """Returns a sentence saying why a native implementation cannot run here, or None if it can.

    That is the reason of a module that cannot be used, or, for `"cuda"`, a driver or a GPU that is
    too old for the kernels. A machine without any GPU is no problem: it may export programs for
    another. The driver is asked when this is called first, never on import.

    Args:
        name: `"cpu"` or `"cuda"`.
    """
    native = CUDA if name == "cuda" else CPU
    if native.module is None:
        return native.reason
    return _gpu_problem(native.module) if name == "cuda" else None


@functools.lru_cache(maxsize=1)
def _gpu_problem(module: Any) -> str | None:
    """Why the kernels of a CUDA module cannot run on the GPUs of this machine, or None."""
    if not hasattr(module, "compute_capabilities"):
        return None
    driver, runtime = module.driver_version(), module.RUNTIME_VERSION
    if driver == 0:
        return None  # no driver: no GPU
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver supports CUDA {_cuda_version(driver)}, and jax_topk._cuda was built"
            f" with CUDA {_cuda_version(runtime)}, which needs a driver for CUDA"
            f" {runtime // 1000}.0 or newer; update the driver, or reinstall jax_topk with an"
            " nvcc of the driver's CUDA version (CUDACXX=PATH_TO_NVCC pip install .)"
        )
    found = module.compute_capabilities()
    if found and max(found) < OLDEST_COMPUTE_CAPABILITY:
        newest, oldest = (".".join(map(str, c)) for c in (max(found), OLDEST_COMPUTE_CAPABILITY))
        return (
            f"the newest GPU has compute capability {newest}, and the kernels are compiled for"
            f" {oldest} and newer; use a newer GPU, or implementation='xla'"
        )
    return None


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def status() -> dict[str, dict[str, Any]]:
    """Says which native implementations can be used.

    Returns:
        For each of `"cpu"` and `"cuda"`: `{"available": bool, "reason": str}`. The reason is a
        sentence that says what was loaded, or what is missing and how to get it.
    """
    return {
        native.name: {
            "available": machine_problem(native.name) is None,
            "reason": machine_problem(native.name) or native.reason,
        }
        for native in (CPU, CUDA)
    }
