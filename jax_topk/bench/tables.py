"""Text tables of records: rows x length, one table per group of cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .cases import CALL, GRAPH, JIT, OTHERS, PACKAGE, STREAM, Length
from .results import Record

Group = tuple[str, int | None, str, str, int | None, str, bool]
"""What the cells of one table share; k and width are None where they vary down the table."""

Column = tuple[str, str]
"""(implementation, metric)."""
Floors = dict[tuple[str, int, Length, int, str, int, bool], float]
"""(implementation, rows, length, k, dtype, width, cold) -> microseconds."""

METRIC_NAMES = {
    GRAPH: "graph",
    OTHERS: "behind others",
    STREAM: "stream",
    JIT: "jit",
    CALL: "call",
}


def length_order(length: Length) -> tuple[int, int, str]:
    """Sorts numbers before words."""
    return (0, length, "") if isinstance(length, int) else (1, 0, length)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN for no values."""
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def align(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Right-aligned columns; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        indent + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    rule = indent + "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:]]


def grid(cells: dict[tuple[int, Length], str], corner: str = "rows", indent: str = "") -> list[str]:
    """A matrix of texts, rows down and lengths across."""
    rows = sorted({rows for rows, _ in cells})
    lengths = sorted({length for _, length in cells}, key=length_order)
    table = [[corner, *map(str, lengths)]]
    table += [[str(row), *(cells.get((row, n), "") for n in lengths)] for row in rows]
    return align(table, indent)


def microseconds(us: float) -> str:
    """Three significant digits or more, without an exponent."""
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def group_of(record: Record) -> Group:
    """The table a record belongs to."""
    is_full = record.length == "full"  # then the width stands where the length would
    return (
        record.distribution,
        None if is_full else record.k,
        record.dtype,
        record.output,
        None if is_full else record.width,
        record.plan,
        record.cold,
    )


def ratio_to(cell: dict[Column, Record], main: Column, other: Column) -> float | None:
    """How many times faster than `other` this package is in one cell.

    Args:
        cell: (implementation, metric) -> record.
        main: the column of this package to fall back on.
        other: the column of another implementation; it is compared with this package by the same
            metric if the cell has that.
    """
    ours = cell.get((main[0], other[1]), cell.get(main))
    theirs = cell.get(other)
    return theirs.us / ours.us if ours and theirs and ours.us > 0 else None


def print_tables(records: Sequence[Record], say: Callable[[str], None] = print) -> None:
    """Prints one table per group: times of every implementation, speed-ups, distance to the floor.

    Args:
        records: of one run.
        say: prints a line.
    """
    groups: dict[Group, list[Record]] = {}
    floors: Floors = {}
    for record in records:
        if record.verified == "floor":
            floors[(record.implementation, *_shape(record))] = record.us
        else:
            groups.setdefault(group_of(record), []).append(record)
    for group, members in groups.items():
        say("")
        say(_title(group))
        for line in align(_table(group, members, floors)):
            say(line)


def _shape(record: Record) -> tuple[int, Length, int, str, int, bool]:
    return (record.rows, record.length, record.k, record.dtype, record.width, record.cold)


def _title(group: Group) -> str:
    distribution, k, dtype, output, width, plan, cold = group
    parts = (
        distribution,
        f"k={k}" if k is not None else "",
        dtype,
        output,
        f"width {width}" if width is not None else "whole rows",
        f"plan {plan}" if plan else "",
        "cold L2" if cold else "",
        "microseconds",
    )
    return ", ".join(filter(None, parts))


def _table(group: Group, members: list[Record], floors: Floors) -> list[list[str]]:
    """Heading and lines of one table: a line per shape, a column per implementation and metric."""
    is_full = group[4] is None
    cells: dict[tuple[int, Length, int], dict[Column, Record]] = {}
    for record in members:
        length = record.width if is_full else record.length
        cell = cells.setdefault((record.rows, length, record.k), {})
        cell[record.implementation, record.metric] = record
    columns = list(dict.fromkeys(column for cell in cells.values() for column in cell))
    ours = [column for column in columns if column[0] in PACKAGE]
    others = [column for column in columns if column[0] not in PACKAGE] if ours else []
    has_floor = bool(ours) and any(("floor_read", *_shape(record)) in floors for record in members)

    def name_of(column: Column, suffix: str = "") -> str:
        return f"{column[0]}{suffix} {METRIC_NAMES.get(column[1], column[1])}"

    heading = ["rows", *(["width", "k"] if is_full else ["length"])]
    heading += [name_of(column) for column in columns]
    heading += [name_of(column, "/ours") for column in others]
    heading += ["read floor", "ours/floor"] if has_floor else []
    table = [[*heading, "verified"]]
    for (rows, length, k), cell in sorted(
        cells.items(), key=lambda item: (item[0][0], length_order(item[0][1]), item[0][2])
    ):
        line = [str(rows), str(length), *([str(k)] if is_full else [])]
        line += [microseconds(cell[c].us) if c in cell else "" for c in columns]
        main = next((column for column in ours if column in cell), None)
        for other in others:
            ratio = ratio_to(cell, main, other) if main else None
            line.append("" if ratio is None else f"{ratio:.2f}x")
        if has_floor:
            floor = floors.get(("floor_read", *_shape(next(iter(cell.values())))))
            line.append("" if floor is None else microseconds(floor))
            line.append(f"{cell[main].us / floor:.2f}x" if floor and main else "")
        wrong = [f"{r.implementation} {r.verified}" for r in cell.values() if r.is_wrong]
        table.append([*line, "; ".join(wrong) or "yes"])
    return table
