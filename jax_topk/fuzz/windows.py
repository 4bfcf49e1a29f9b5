"""Starts and lengths of windows: ordinary ones, every border, and garbage to be clamped."""

from __future__ import annotations

import numpy as np

from jax_topk.fuzz.plans import BOUNDARIES, LONG_BOUNDARIES

__all__ = ["LENGTHS", "STARTS", "clamp", "draw_lengths", "draw_starts"]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

LENGTHS = {
    "full": "the width",
    "uniform": "anything from 0 to the width",
    "logarithmic": "mostly short: uniform in the logarithm",
    "k": "k - 1, k, k + 1, or 2k - 1, 2k, 2k + 1",
    "boundary": "where the CUDA kernel changes its way, and one less or more",
    "tiny": "1, 2 or 3",
    "empty": "0, -1 or -2**31",
    "beyond": "one more than the width, or 2**31 - 1",
}
"""Kinds of lengths, as counted in the results."""

_LENGTH_SHARES = (0.2, 0.2, 0.15, 0.15, 0.15, 0.05, 0.05, 0.05)

STARTS = {
    "zero": "0",
    "inside": "such that the window keeps its length",
    "small": "1 to 16: every alignment",
    "border": "-2**31, -1, width - 1, width, width + 1 or 2**31 - 1",
    "any": "any int32",
}
"""Kinds of starts, as counted in the results."""

_START_SHARES = (0.5, 0.3, 0.1, 0.05, 0.05)


def draw_lengths(
    rng: np.random.Generator, rows: int, width: int, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the lengths of a batch.

    In a third of all batches rows of the full length and rows of other lengths alternate, since a
    kernel may leave state behind a long row that only the next long one meets.

    Args:
        rng: the source.
        rows: number of rows.
        width: allocated columns.
        k: `[rows]` number of results.

    Returns:
        `(lengths, kinds)`: `[rows]` int32, not clamped, and `[rows]` places in `LENGTHS`.
    """
    kinds = rng.choice(len(LENGTHS), size=rows, p=_LENGTH_SHARES)
    if rng.random() < 1 / 3:
        kinds[::2] = 0
    uniform = rng.random(rows)
    boundaries = [n for n in (*BOUNDARIES, *LONG_BOUNDARIES) if n <= width] or [width]
    candidates = (
        np.full(rows, width),
        np.floor(uniform * (width + 1)),
        np.floor(float(width + 1) ** uniform),
        np.where(rng.random(rows) < 0.7, k, 2 * k) + rng.integers(-1, 2, rows),
        rng.choice(boundaries, size=rows) + rng.integers(-1, 2, rows),
        rng.integers(1, 4, rows),
        rng.choice([0, -1, INT32_MIN], size=rows),
        np.where(uniform < 0.5, width + 1, INT32_MAX),
    )
    lengths = np.choose(kinds, [candidate.astype(np.int64) for candidate in candidates])
    return lengths.astype(np.int32), kinds


def draw_starts(
    rng: np.random.Generator, lengths: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the starts of a batch.

    Args:
        rng: the source.
        lengths: `[rows]` int32, not clamped.
        width: allocated columns.

    Returns:
        `(starts, kinds)`: `[rows]` int32, not clamped, and `[rows]` places in `STARTS`.
    """
    rows = len(lengths)
    kinds = rng.choice(len(STARTS), size=rows, p=_START_SHARES)
    room = width - np.clip(lengths, 0, width)
    border = [INT32_MIN, -1, width - 1, width, width + 1, INT32_MAX]
    candidates = (
        np.zeros(rows, np.int64),
        np.floor(rng.random(rows) * (room + 1)).astype(np.int64),
        rng.integers(1, 17, rows),
        rng.choice(border, size=rows),
        rng.integers(INT32_MIN, INT32_MAX, rows, endpoint=True),
    )
    return np.choose(kinds, candidates).astype(np.int32), kinds


def clamp(starts: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows as the contract clamps them: `(starts, lengths)`, `[rows]` int64."""
    start = np.clip(starts.astype(np.int64), 0, width)
    return start, np.clip(lengths.astype(np.int64), 0, width - start)
