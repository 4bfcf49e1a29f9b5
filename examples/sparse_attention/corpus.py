# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Real text that every Python has: the sources of its own standard library, as bytes."""

from __future__ import annotations

import functools
import pathlib
import sysconfig

import numpy as np


@functools.cache
def standard_library() -> dict[str, np.ndarray]:
    """Top-level modules of the standard library as uint8 arrays, by file name, sorted.

    The text, and so every figure computed from it, depends on the version of Python alone.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(
            f"no *.py files in {folder}: this Python keeps its standard library elsewhere "
            "(a zip file?); run the example with an ordinary installation of Python"
        )
    return {file.name: np.frombuffer(file.read_bytes(), np.uint8) for file in files}


def longest_files(count: int) -> dict[str, np.ndarray]:
    """The `count` longest modules, longest first: material for long sequences."""
    files = standard_library()
    names = sorted(files, key=lambda name: (-len(files[name]), name))[:count]
    return {name: files[name] for name in names}
