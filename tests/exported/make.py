"""Writes the exported programs that every later version must load: run once for each new target.

    python tests/exported/make.py tests/exported

The files are never made anew: `tests/test_export.py` loads them as they were written, by the
version of jax_topk and JAX that `made_with.json` names. A change of the FFI targets gets a new
prefix, and new files beside the old ones.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
from jax import export

import jax_topk
from jax_topk import _native

K = 7


def select(x, narrow, half, lengths, starts):
    """What a program may hold: both targets, both modes, both orders, every dtype.

    Args:
        x: `[rows, width]` float32.
        narrow: `[rows, width]` bfloat16.
        half: `[rows, width]` float16.
        lengths: `[rows]` int32.
        starts: `[rows]` int32.
    """
    return (
        jax_topk.top_k(x, K, lengths=lengths, row_starts=starts),
        jax_topk.top_k(narrow, K, lengths=lengths, mode="smallest", sorted=False),
        jax_topk.top_k_indices(half, K, row_starts=starts),
    )


def export_for(platform: str) -> bytes:
    """The serialised program for one platform, which need not be here."""
    if platform == "cuda":  # only the call is written down, so any loaded module will do
        _native.CUDA = _native.Native("cuda", _native.CPU.module, "stands in for the module")
    rows, width = export.symbolic_shape("rows, width", constraints=[f"width >= {K}"])
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    operands = [
        jax.ShapeDtypeStruct((rows, width), t) for t in (jnp.float32, jnp.bfloat16, jnp.float16)
    ]
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS]
    exported = export.export(jax.jit(select), platforms=[platform], disabled_checks=checks)(
        *operands, counts, counts
    )
    for target in _native.TARGETS:
        assert f"@{target}(" in exported.mlir_module(), f"no call of {target} for {platform}"
    return exported.serialize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the files go")
    folder = parser.parse_args().folder
    for platform in ("cpu", "cuda"):
        path = folder / f"v1_{platform}.bin"
        if path.exists():
            parser.error(f"{path} exists, and is a promise: it is not written again")
        path.write_bytes(export_for(platform))
        print(f"wrote {path}")
    versions = {"jax_topk": jax_topk.__version__, "jax": jax.__version__}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
