"""Runs the CUDA kernel's own code on the CPU, one fiber per GPU thread (see `emulated/ptx.cuh`)."""

import ctypes
import os
import pathlib
import subprocess

import numpy as np

_FOLDER = pathlib.Path(__file__).parent / "emulated"
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
SCHEDULES = ("sweep", "eager", "late")  # as `Schedule` in emulated/emulate.cc
_GUARD = 64  # elements before and after each output that must stay untouched

H100 = {
    "num_sms": 132,
    "smem_per_block_bytes": 232448,
    "smem_per_sm_bytes": 233472,
    "max_cluster_size": 16,
}


def build(folder: pathlib.Path, *flags: str) -> ctypes.CDLL:
    """Compiles the emulation into `folder` and loads it; needs a C++17 compiler.

    Loads `JAX_TOPK_EMULATION` instead, where that names a library: `tests/mutations` compiles its
    own, so that a mutant that does not compile is not taken for one that a test has caught.
    """
    built = os.environ.get("JAX_TOPK_EMULATION")
    if built:
        return ctypes.CDLL(built)
    library = folder / "libjax_topk_emulation.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        + ["-fPIC", "-shared", *flags, "-o", str(library)]
        + [str(_FOLDER / "emulate.cc"), str(_FOLDER.parents[1] / "ffi" / "plan.cc")],
        check=True,
    )
    return ctypes.CDLL(str(library))


def _guarded(shape: tuple[int, int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns (whole, view): a poisoned buffer and the guarded `shape` inside it."""
    size = shape[0] * shape[1]
    whole = np.frombuffer(b"\xa5" * ((size + 2 * _GUARD) * dtype.itemsize), dtype).copy()
    return whole, whole[_GUARD : _GUARD + size].reshape(shape)


def top_k(
    library: ctypes.CDLL,
    x: np.ndarray,
    k: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    smallest: bool = False,
    sorted: bool = False,
    with_values: bool = True,
    plan: str = "",
    limits: dict[str, int] = H100,
    schedule: str = "sweep",
    seed: int = 0,
) -> tuple[np.ndarray | None, np.ndarray]:
    """One emulated launch on `x` `[rows, width]`; returns (values or None, indices), `[rows, k]`.

    `schedule` orders the threads and says when copies and messages arrive: `"sweep"` is fair, in
    `"eager"` and `"late"` one warp runs ahead of all others. `seed` draws what it leaves open.

    Raises:
      RuntimeError: the launch cannot be planned, the kernel deadlocked, or it read outside the
        operand.
      AssertionError: something outside the outputs was written.
    """
    rows, width = x.shape
    # Byte views: NumPy's buffers of ml_dtypes are not writable through ctypes otherwise.
    values_all, values = _guarded((rows, k), x.dtype)
    indices_all, indices = _guarded((rows, k), np.dtype(np.int32))
    starts = np.ascontiguousarray(starts, np.int32)
    lengths = np.ascontiguousarray(lengths, np.int32)
    error = ctypes.create_string_buffer(1000)

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    names = ("num_sms", "smem_per_block_bytes", "smem_per_sm_bytes", "max_cluster_size")
    status = library.jax_topk_emulate(
    pointer(x), pointer(starts), pointer(lengths),
    pointer(values) if with_values else None, pointer(indices),
    ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_int64(k),
    _DTYPES[x.dtype.name], int(smallest), int(sorted), plan.encode(),
    (ctypes.c_int64 * 4)(*(limits[name] for name in names)),
    SCHEDULES.index(schedule), ctypes.c_uint(seed),
    error, ctypes.c_size_t(len(error)),
  )  # fmt: skip
    if status != 0:
        raise RuntimeError(error.value.decode())
    for whole in (values_all, indices_all):
        for guard in (whole[:_GUARD], whole[-_GUARD:]):
            assert guard.tobytes() == b"\xa5" * guard.nbytes, "written outside the output"
    return (values if with_values else None), indices


def even_bins(
    library: ctypes.CDLL, lowest: int, highest: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the bins of `keys` [count] of a bracket, their lowest and their highest keys."""
    keys = np.ascontiguousarray(keys, np.uint32)
    results = tuple(np.empty_like(keys) for _ in range(3))
    library.jax_topk_even_bins(
        ctypes.c_uint32(lowest), ctypes.c_uint32(highest), ctypes.c_void_p(keys.ctypes.data),
        len(keys), *(ctypes.c_void_p(result.ctypes.data) for result in results),
    )  # fmt: skip
    return results


def sample_ranks(
    library: ctypes.CDLL, k: int, population: int, sample_size: int
) -> tuple[int, int]:
    """Returns the ranks (high, low) in a sample between which the k-th key of a row is guessed."""
    ranks = (ctypes.c_uint32 * 2)()
    library.jax_topk_sample_ranks(
        ctypes.c_uint32(k), ctypes.c_uint32(population), ctypes.c_uint32(sample_size), ranks
    )
    return ranks[0], ranks[1]


def pair_bins(
    library: ctypes.CDLL, keys: np.ndarray, *, attempt: int, is_float32: bool
) -> np.ndarray:
    """Bins [count] of pairs with these uint32 `keys` in a sort, see `emulated/emulate.cc`."""
    keys = np.ascontiguousarray(keys, np.uint32)
    bins = np.empty_like(keys)
    library.jax_topk_pair_bins(
        int(is_float32), ctypes.c_void_p(keys.ctypes.data), len(keys), attempt,
        ctypes.c_void_p(bins.ctypes.data),
    )  # fmt: skip
    return bins
