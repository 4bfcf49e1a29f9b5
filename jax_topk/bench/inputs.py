"""Generators of values and of window lengths.

Values are made on the device, `[rows, width]` at a time, so that a batch of 256 x 163840 costs no
transfer. Every generator is independent of the length of the window: a window is a prefix of its
row, and must meet the property the generator is named for, at any length.

The hostile generators aim at what fast kernels guess from: the spread of the values over coarse
bins (`clust`, `equal`, `relu`), the position of the large values (`sorted`, `sorted_desc`, `head`),
and samples taken on a regular stride (`periodic`, `striped`, `hidden`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .cases import Length

SEED = 20240924
MIXED_SHORTEST = 1024


def _normal(key: Array, rows: int, width: int, k: int) -> Array:
    """N(0, 1)."""
    del k
    return jax.random.normal(key, (rows, width), jnp.float32)


def _clust(key: Array, rows: int, width: int, k: int) -> Array:
    """10 + 0.1 N(0, 1): nearly all values share a few coarse float16 bins."""
    return 10.0 + 0.1 * _normal(key, rows, width, k)


def _equal(key: Array, rows: int, width: int, k: int) -> Array:
    """One value everywhere: the tie rule alone decides."""
    del key, k
    return jnp.ones((rows, width), jnp.float32)


def _sorted(key: Array, rows: int, width: int, k: int) -> Array:
    """N(0, 1) in ascending order: every window has its largest values at its end."""
    return jnp.sort(_normal(key, rows, width, k), axis=-1)


def _sorted_desc(key: Array, rows: int, width: int, k: int) -> Array:
    """N(0, 1) in descending order."""
    return _sorted(key, rows, width, k)[:, ::-1]


def _head(key: Array, rows: int, width: int, k: int) -> Array:
    """N(0, 1), raised by 8 in the first 2 k entries: all that is selected lies at one end."""
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    return _normal(key, rows, width, k) + jnp.where(column < 2 * k, 8.0, 0.0)


def _relu(key: Array, rows: int, width: int, k: int) -> Array:
    """ReLU scores: so few are positive that a plateau of exact zeros crosses the threshold.

    A share of k / (2 width) is positive: about k / 2 entries of a window as wide as the row, and
    fewer of a shorter one.
    """
    uniform = jax.random.uniform(key, (rows, width), jnp.float32)
    share = min(1.0, k / (2 * max(1, width)))
    return jnp.maximum(uniform - (1.0 - share), 0.0) / share if share else jnp.zeros_like(uniform)


def _on_stride(rows: int, width: int, stride: int, offset: int) -> Array:
    """8 on every `stride`-th column, else 0: `[rows, width]`."""
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    return jnp.where(column % stride == offset % stride, 8.0, 0.0)


def _periodic(
    key: Array, rows: int, width: int, k: int, *, stride: int = 16, offset: int = 0
) -> Array:
    """N(0, 1), raised by 8 on every `stride`-th entry: a sample there sees large values only."""
    return _normal(key, rows, width, k) + _on_stride(rows, width, stride, offset)


def _hidden(
    key: Array, rows: int, width: int, k: int, *, stride: int = 16, offset: int = 0
) -> Array:
    """N(0, 1), lowered by 8 on every `stride`-th entry: a sample there sees nothing selected."""
    return _normal(key, rows, width, k) - _on_stride(rows, width, stride, offset)


def _striped(
    key: Array, rows: int, width: int, k: int, *, chunk: int = 128, period: int = 16
) -> Array:
    """N(0, 1), raised by 8 in one of every `period` chunks: one part of a dealt row holds all."""
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    large = column // chunk % period == 0
    return _normal(key, rows, width, k) + jnp.where(large, 8.0, 0.0)


GENERATORS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "normal": (_normal, ()),
    "clust": (_clust, ()),
    "equal": (_equal, ()),
    "sorted": (_sorted, ()),
    "sorted_desc": (_sorted_desc, ()),
    "head": (_head, ()),
    "relu": (_relu, ()),
    "periodic": (_periodic, ("stride", "offset")),
    "striped": (_striped, ("chunk", "period")),
    "hidden": (_hidden, ("stride", "offset")),
}
"""Name -> (generator, names of the whole numbers that may follow the name, as in `hidden:32:1`)."""

_DEPENDS_ON_K = ("head", "relu")


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5, 6))
def _generate(
    name: str, key: Array, rows: int, width: int, k: int, options: tuple[int, ...], dtype: str
) -> Array:
    generator, names = GENERATORS[name]
    keywords = dict(zip(names, options, strict=False))
    return generator(key, rows, width, k, **keywords).astype(dtype)


def check_distribution(text: str) -> None:
    """Raises ValueError with a sentence unless `text` names a generator or a readable file."""
    name, _, path = text.partition("=")
    if path:
        if not Path(path).is_file():
            raise ValueError(
                f"distribution={text!r}: there is no file {path!r}; pass NAME=FILE.npy with an "
                "array [rows, width] of scores"
            )
        return
    name, *options = text.split(":")
    if name not in GENERATORS:
        raise ValueError(
            f"distribution={text!r} is unknown; choose from {', '.join(GENERATORS)}, or pass "
            "NAME=FILE.npy to read scores from a file"
        )
    names = GENERATORS[name][1]
    if len(options) > len(names) or not all(option.isdigit() for option in options):
        form = ":".join((name, *(n.upper() for n in names)))
        raise ValueError(f"distribution={text!r} does not fit the form {form} with whole numbers")
    for option_name, option in zip(names, options, strict=False):
        if option_name != "offset" and int(option) < 1:
            raise ValueError(f"distribution={text!r}: {option_name} must be at least 1")


def distribution_label(text: str) -> str:
    """The name under which records of this distribution are kept (`NAME` of `NAME=FILE.npy`)."""
    return text.partition("=")[0]


def values_key(distribution: str, k: int) -> tuple[str, int]:
    """Cells with equal keys (and shapes and dtypes) may share one batch of values."""
    return distribution, k if distribution.split(":")[0] in _DEPENDS_ON_K else -1


def make_values(distribution: str, rows: int, width: int, k: int, dtype: str) -> Array:
    """Makes one batch of values.

    Args:
        distribution: name of a generator with options (`"normal"`, `"striped:256:8"`), or
            `NAME=FILE.npy` for scores `[rows', width']` that are repeated to fill the batch.
        rows: rows of the batch.
        width: columns of a row.
        k: entries that will be selected; `head` and `relu` place their threshold by it.
        dtype: dtype of the result.

    Returns:
        `[rows, width]` on the default device, the same on every call.
    """
    check_distribution(distribution)
    _, _, path = distribution.partition("=")
    if path:
        scores = np.load(path)
        if scores.ndim != 2 or scores.size == 0:
            raise ValueError(
                f"{path} holds an array of shape {scores.shape}; save one of [rows, width]"
            )
        repeats = (-(-rows // scores.shape[0]), -(-width // scores.shape[1]))
        return jnp.asarray(np.tile(scores, repeats)[:rows, :width]).astype(dtype)
    name, *options = distribution.split(":")
    key = jax.random.key(SEED)
    values: Array = _generate(name, key, rows, width, k, tuple(map(int, options)), dtype)
    return values


def make_lengths(length: Length, rows: int, width: int) -> np.ndarray:
    """Makes the window lengths of a batch.

    Args:
        length: a number, `"full"` (the width) or `"mixed"`: log-uniform between 1024 and the width.
            The lengths of a batch of fewer rows are a prefix of those of more rows.
        rows: rows of the batch.
        width: columns of a row.

    Returns:
        `[rows]` int32, the same on every call.
    """
    if length == "full":
        return np.full(rows, width, np.int32)
    if length == "mixed":
        shortest = min(MIXED_SHORTEST, max(1, width // 4))
        uniform = np.random.default_rng(SEED).uniform(size=rows)
        return np.round(shortest * (width / shortest) ** uniform).astype(np.int32)
    if isinstance(length, str):
        raise ValueError(f"length={length!r} is unknown; pass a number, 'mixed' or 'full'")
    return np.full(rows, min(length, width), np.int32)
