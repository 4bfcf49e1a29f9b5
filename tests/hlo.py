"""Reads collectives off the text of a compiled program (`compiled.as_text()`)."""

from __future__ import annotations

import math
import re

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
    "send",
    "recv",
)
_SIZES = {"pred": 1, "bf16": 2, "f16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "fsu" for bits in (8, 16, 32, 64)
}


def collectives(text: str) -> list[str]:
    """Names of the collectives of a program, one for each that it runs."""
    names = "|".join(COLLECTIVES)
    return re.findall(rf" ({names})(?:-start)?\(", text)


def all_gather_bytes(text: str) -> list[int]:
    """Bytes that each all-gather of a program leaves on each device, its own part among them."""
    results = re.findall(r"= (\S+) all-gather\(", text)
    return [
        sum(
            _SIZES[name] * math.prod(map(int, filter(None, dims.split(","))))
            for name, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
        )
        for result in results
    ]


def kernel_calls(text: str) -> int:
    """How many selections a program hands to this package's kernels."""
    return len(re.findall(r'custom_call_target="jax_topk_v1_', text))


def bytes_per_candidate(dtype: object) -> int:
    """A value and its int32 index."""
    return np.dtype(dtype).itemsize + 4
