"""From a failing case to the smallest one that still fails.

Greedy: simpler variants of the case are tried, simplest first; one that fails as well takes its
place, until none does. Every variant is strictly simpler, so this ends; the time is bounded too. A
failure that comes and goes (a race) may survive in a larger form, as each variant is tried a few
times.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from jax_topk.fuzz import generators
from jax_topk.fuzz.case import Case, Row, explicit

__all__ = ["shrink", "simpler"]

_MAX_EXPLICIT = 128
_SIMPLE_GENERATORS = ("equal", "few", "normal", "random_bits")


def shrink(
    case: Case,
    fails: Callable[[Case], bool],
    *,
    seconds: float = 60.0,
    max_attempts: int = 2000,
) -> tuple[Case, int]:
    """Shrinks a failing case.

    Args:
        case: that fails.
        fails: whether a case fails.
        seconds: after which the smallest one found is returned.
        max_attempts: the same, as a number of cases.

    Returns:
        `(case, attempts)`: the smallest failing case found, and how many were tried.
    """
    deadline = time.monotonic() + seconds
    attempts = 0
    found = True
    while found:
        found = False
        for candidate in simpler(case):
            if attempts >= max_attempts or time.monotonic() > deadline:
                return case, attempts
            attempts += 1
            if fails(candidate):
                case, found = candidate, True
                break
    return case, attempts


def simpler(case: Case) -> Iterator[Case]:
    """Strictly simpler variants of a case, all of them legal, the simplest ones first."""
    change = dataclasses.replace
    yield from _fewer_rows(case)
    if case.plan:
        yield change(case, plan="")
        overrides = case.plan.split(",")
        if len(overrides) > 1:
            for left_out in range(len(overrides)):
                kept = overrides[:left_out] + overrides[left_out + 1 :]
                yield change(case, plan=",".join(kept))
    yield from _smaller_windows(case)
    starts, lengths = case.windows()
    needed = int(max((starts + lengths).max(), case.k))
    for width in dict.fromkeys((needed, (needed + case.width) // 2)):
        if width < case.width:
            yield change(case, width=width)
    if case.offset:
        yield change(case, offset=0)
    for k in dict.fromkeys((1, case.k // 2, case.k - 1)):
        if 0 < k < case.k:
            yield change(case, k=k, rows=_made_for_same(case))
    for name, simplest in (("output", "indices"), ("mode", "largest")):
        if getattr(case, name) != simplest:
            yield change(case, **{name: simplest})
    if case.dtype != "float32" and not any(row.values.startswith("bits:") for row in case.rows):
        yield change(case, dtype="float32")
    for number, row in enumerate(case.rows):
        if row.outside != "noise":
            yield _with_row(case, number, change(row, outside="noise"))
        yield from (_with_row(case, number, simple) for simple in _simpler_values(row))
    yield from _explicit_values(case)


def _with_row(case: Case, number: int, row: Row) -> Case:
    rows = (*case.rows[:number], row, *case.rows[number + 1 :])
    return dataclasses.replace(case, rows=rows)


def _fewer_rows(case: Case) -> Iterator[Case]:
    rows = case.rows
    size = len(rows) // 2
    while size >= 1:
        for begin in range(0, len(rows), size):
            kept = rows[:begin] + rows[begin + size :]
            if kept:
                yield dataclasses.replace(case, rows=kept)
        size //= 2


def _made_for(case: Case, row: Row, length: int) -> Row:
    """The row with the k and the length noted that its generator goes by."""
    if row.values.startswith("bits:") or row.values.count(":") == 3:
        return row
    return dataclasses.replace(row, values=f"{row.values}:{case.k}:{length}")


def _made_for_same(case: Case) -> tuple[Row, ...]:
    lengths = case.windows()[1]
    return tuple(_made_for(case, row, int(n)) for row, n in zip(case.rows, lengths, strict=True))


def _smaller_windows(case: Case) -> Iterator[Case]:
    for number, (row, start, length) in enumerate(zip(case.rows, *case.windows(), strict=True)):
        start, length = int(start), int(length)
        for new_start in dict.fromkeys((0, start)):
            if new_start != row.start and abs(new_start) <= abs(row.start):
                moved = dataclasses.replace(row, start=new_start, length=length)
                yield _with_row(case, number, moved)
        if row.length != length and row.start == start:
            yield _with_row(case, number, dataclasses.replace(row, length=length))
        for shorter in dict.fromkeys((0, length // 2, length * 7 // 8, length - 1)):
            if 0 <= shorter < length:
                kept = dataclasses.replace(_made_for(case, row, length), length=shorter)
                yield _with_row(case, number, kept)


def _simpler_values(row: Row) -> Iterator[Row]:
    name, *numbers = row.values.split(":")
    if name == "bits":
        return
    parts = name.split("~")
    rank = _rank(parts)
    options = [[part] for part in parts] + [[simple] for simple in _SIMPLE_GENERATORS]
    for option in options:
        if _rank(option) < rank:
            yield dataclasses.replace(row, values=":".join(("~".join(option), *numbers)))
    for seed in range(3):
        if seed < int(numbers[0]):
            yield dataclasses.replace(row, values=":".join((name, str(seed), *numbers[1:])))


def _rank(parts: list[str]) -> tuple[int, int]:
    order = [*_SIMPLE_GENERATORS, *generators.GENERATORS]
    return len(parts), sum(order.index(part) for part in parts)


def _explicit_values(case: Case) -> Iterator[Case]:
    """Single rows of few elements: the elements themselves, then fewer and simpler ones."""
    if len(case.rows) != 1:
        return
    (row,) = case.rows
    start, length = (int(x[0]) for x in case.windows())
    if not 0 < length <= _MAX_EXPLICIT:
        return
    bits = case.bits()[0, start : start + length]

    def with_bits(new: np.ndarray) -> Case:
        return _with_row(case, 0, dataclasses.replace(row, values=explicit(new), length=len(new)))

    if not row.values.startswith("bits:"):
        yield with_bits(bits)
        return
    size = length // 2
    while size >= 1:
        for begin in range(0, length, size):
            yield with_bits(np.delete(bits, slice(begin, begin + size)))
        size //= 2
    # 0, then 1.0 for what is neither: in each format all bits of the exponent but the highest.
    infinity = generators.INFINITY_BITS[case.dtype]
    zero, one = bits.dtype.type(0), bits.dtype.type((infinity >> 1) & infinity)
    if bits.any():
        yield with_bits(np.zeros_like(bits))
    for place in range(length):
        for simple in (zero, one):
            if bits[place] == simple:
                break
            changed = bits.copy()
            changed[place] = simple
            yield with_bits(changed)
