"""New results against old ones: a change counts only beyond the noise of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from .results import Record, Results
from .tables import align, geometric_mean, microseconds

NOISE_FLOOR = 0.02
"""Medians of the same kernel differ by about 1 % between two starts of one machine; twice that."""
SPREADS = 2.0
"""Medians that differ by more spreads than this do not belong to the same distribution."""

DEVICE_FIELDS = ("target", "gpu", "driver", "processor", "cpus", "jax", "jaxlib", "python")


@dataclasses.dataclass(frozen=True)
class Change:
    """One cell in both runs."""

    old: Record
    new: Record

    @property
    def ratio(self) -> float:
        """New time over old; above 1 is slower."""
        return self.new.us / self.old.us if self.old.us > 0 else math.nan

    @property
    def noise(self) -> float:
        """Relative change that noise alone can explain."""
        return max(NOISE_FLOOR, SPREADS * math.hypot(self.old.spread, self.new.spread))

    @property
    def verdict(self) -> str:
        """`"faster"`, `"slower"` or `"same"`."""
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else "same"


def changes(old: Results, new: Results) -> list[Change]:
    """Pairs the records that both runs hold."""
    before = {record.key: record for record in old.records}
    return [Change(before[r.key], r) for r in new.records if r.key in before]


def print_comparison(old: Results, new: Results, say: Callable[[str], None] = print) -> int:
    """Prints what changed beyond noise, largest change first.

    Args:
        old: recorded results.
        new: results of this run.
        say: prints a line.

    Returns:
        The number of slower cells of this package.
    """
    pairs = changes(old, new)
    say("")
    say(
        f"Compared with commit {old.header.get('commit')} of {old.header.get('date')}: "
        f"{len(pairs)} common records."
    )
    for field in DEVICE_FIELDS:
        if old.header.get(field) != new.header.get(field):
            say(f"  {field} differs: {old.header.get(field)} -> {new.header.get(field)}")
    num_slower = 0
    by_column: dict[tuple[str, str], list[Change]] = {}
    for pair in pairs:
        by_column.setdefault((pair.new.implementation, pair.new.metric), []).append(pair)
    for (name, metric), members in by_column.items():
        count = dict.fromkeys(("faster", "same", "slower"), 0)
        for pair in members:
            count[pair.verdict] += 1
        mean = geometric_mean(pair.ratio for pair in members)
        say(
            f"{name} {metric}: {count['faster']} faster, {count['same']} within noise, "
            f"{count['slower']} slower; geometric mean of new/old {mean:.3f}"
        )
        if name in ("cuda", "cpu", "xla"):
            num_slower += count["slower"]
    moved = [pair for pair in pairs if pair.verdict != "same"]
    moved.sort(key=lambda pair: -abs(math.log(pair.ratio)))
    if moved:
        table = [["cell", "metric", "old", "new", "new/old", "noise", ""]]
        table += [
            [
                f"{pair.new.implementation} {pair.new.case}",
                pair.new.metric,
                microseconds(pair.old.us),
                microseconds(pair.new.us),
                f"{pair.ratio:.3f}",
                f"{pair.noise:.3f}",
                pair.verdict,
            ]
            for pair in moved
        ]
        for line in align(table, "  "):
            say(line)
    return num_slower
