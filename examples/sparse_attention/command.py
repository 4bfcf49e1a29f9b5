# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""What the example's commands share: choosing the implementation of top-k, and where it runs."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import jax

from examples.sparse_attention.selection import Implementation

CHOICES = ("auto", "cuda", "cpu", "xla")


def new_parser(module: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose description is the first paragraph of the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=(docstring or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_implementation(parser: argparse.ArgumentParser, flag: str = "--implementation") -> None:
    """Adds the choice of implementation."""
    parser.add_argument(
        flag,
        choices=CHOICES,
        default="auto",
        help="implementation of top-k that is compared with the XLA expression",
    )


def implementation_of(choice: str) -> Implementation:
    """The argument of `jax_topk` that a choice on the command line stands for."""
    names: dict[str, Implementation] = {"auto": None, "cuda": "cuda", "cpu": "cpu", "xla": "xla"}
    return names[choice]


@contextlib.contextmanager
def device_of(choice: str) -> Any:
    """Runs what follows on the CPU if that was chosen, else on JAX's default device."""
    with contextlib.ExitStack() as stack:
        if choice == "cpu":
            stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
        yield
