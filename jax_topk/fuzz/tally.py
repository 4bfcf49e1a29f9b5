"""Counts of what was checked, as tables and as JSON."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_topk.fuzz import generators, windows
from jax_topk.fuzz.batch import Batch
from jax_topk.fuzz.programs import rows_begin
from jax_topk.fuzz.targets import Call, Target

__all__ = ["TABLES", "Tally", "call_of", "format_tables", "save"]

TABLES = {
    "generator": "generator of the window's first half",
    "patchwork": "one generator for the whole window, or two for its halves",
    "path": "path of the row",
    "plan": "forced plan, or number of threads of the CPU target",
    "entry": "native: between guard zones; jit: public functions under jax.jit",
    "dtype": "dtype",
    "mode": "mode",
    "output": "form of the result",
    "width": "allocated columns",
    "k": "number of results",
    "rows": "rows of the call",
    "length": "kind of length",
    "start": "kind of start",
    "outside": "what lies outside the window",
}
"""Names of the tables of counts, and what they count rows by."""


def call_of(batch: Batch, launch: Any) -> Call:
    """What a target is asked for a launch of a batch."""
    return Call(
        rows=launch.rows,
        width=batch.width,
        k=launch.k,
        dtype=batch.dtype,
        smallest=launch.smallest,
        output=launch.output,
        plan=launch.plan,
        uses_api=launch.uses_api,
        operand_begin=rows_begin(batch) + launch.first_row * batch.width,
        first_row=launch.first_row,
        out_begin=launch.out_begin,
    )


def _range_of(value: int) -> str:
    """The range of powers of four that a number lies in, for tables that stay short."""
    if value == 0:
        return "0"
    low = 1
    while low * 4 <= value:
        low *= 4
    return f"{low} to {4 * low - 1}"


class Tally:
    """Counts rows by everything in `TABLES`, and by path and generator together."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.rows = 0
        self.rows_without_results = 0  # k = 0: there is little to get wrong
        self.batches = 0
        self.launches = 0
        self.oracle_rows = 0
        self.failures: list[str] = []
        self.tables: dict[str, collections.Counter[str]] = {
            name: collections.Counter() for name in TABLES
        }
        self.path_by_generator: dict[str, collections.Counter[str]] = {}

    @property
    def rows_with_results(self) -> int:
        """Rows of which at least one result was wanted."""
        return self.rows - self.rows_without_results

    def add(self, batch: Batch, target: Target) -> None:
        """Counts a batch that was run and checked."""
        self.batches += 1
        self.launches += len(batch.launches)
        self.rows += batch.rows
        tables = self.tables
        tables["dtype"][batch.dtype] += batch.rows
        tables["width"][_range_of(batch.width)] += batch.rows
        _count(tables["generator"], generators.GENERATORS, batch.first)
        _count(tables["outside"], generators.OUTSIDE, batch.outside)
        _count(tables["length"], tuple(windows.LENGTHS), batch.length_kinds)
        _count(tables["start"], tuple(windows.STARTS), batch.start_kinds)
        _count(tables["patchwork"], ("one", "two"), (batch.first != batch.last).astype(np.int64))
        starts, lengths = windows.clamp(batch.starts, batch.lengths, batch.width)
        for launch in batch.launches:
            self.rows_without_results += 0 if launch.k else launch.rows
            tables["mode"]["smallest" if launch.smallest else "largest"] += launch.rows
            tables["output"][launch.output] += launch.rows
            tables["k"][_range_of(launch.k)] += launch.rows
            tables["rows"][_range_of(launch.rows)] += launch.rows
            tables["entry"]["jit" if launch.uses_api else "native"] += launch.rows
            tables["plan"][launch.plan or "not forced"] += launch.rows
            part = slice(launch.first_row, launch.first_row + launch.rows)
            names, places = target.paths(call_of(batch, launch), starts[part], lengths[part])
            _count(tables["path"], names, places)
            for number, name in enumerate(names):
                is_here = places == number
                if is_here.any():
                    counter = self.path_by_generator.setdefault(name, collections.Counter())
                    _count(counter, generators.GENERATORS, batch.first[part][is_here])

    def as_json(self) -> dict[str, Any]:
        """All counts, for JSON."""
        return {
            "rows": self.rows,
            "rows_without_results": self.rows_without_results,
            "batches": self.batches,
            "launches": self.launches,
            "rows_checked_by_numpy_too": self.oracle_rows,
            "failures": len(self.failures),
            "replay": self.failures,
            "rows_by": {name: _in_order(counter) for name, counter in self.tables.items()},
            "rows_by_path_and_generator": {
                name: _in_order(self.path_by_generator[name])
                for name in sorted(self.path_by_generator)
            },
        }


def _count(counter: collections.Counter[str], names: tuple[str, ...], places: np.ndarray) -> None:
    for name, count in zip(
        names, np.bincount(places.astype(np.int64), minlength=len(names)).tolist(), strict=True
    ):
        if count:
            counter[name] += count


def _in_order(counter: Mapping[str, int]) -> dict[str, int]:
    """Counts by name; ranges of numbers by their number."""

    def key(name: str) -> tuple[int, str]:
        first = name.split(" ")[0]
        return (int(first), name) if first.isdigit() else (-1, name)

    return {name: counter[name] for name in sorted(counter, key=key)}


def format_tables(tally: Tally) -> str:
    """The tables as text."""
    lines = []
    for name, counter in tally.tables.items():
        counts = _in_order(counter)
        width = max(map(len, counts), default=0)
        lines += ["", f"rows by {name} ({TABLES[name]})"]
        lines += [f"  {key:<{width}}  {count:>9,}" for key, count in counts.items()]
    return "\n".join(lines)


def save(path: str | Path, header: Mapping[str, Any], tally: Tally) -> None:
    """Writes header and counts."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"header": dict(header), **tally.as_json()}, indent=1)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
