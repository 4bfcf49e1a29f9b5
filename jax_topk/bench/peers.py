"""This package's kernel against a table of other kernels' times.

The table is a CSV with the columns `implementation, distribution, rows, length, k, chain_us,
verified`, timed as `graph_chain_us` is. A peer counts as exact in a shape (rows x length) if it was
right on every distribution it was timed on there.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .cases import GRAPH, Length
from .results import Record
from .tables import align, geometric_mean, grid, length_order, microseconds

REFERENCE = "vllm37421_persist"
REFERENCE_NAME = "PR 37421"
FLOOR_PREFIX = "floor_"
PDL_SUFFIX = "_pdl"
LAUNCH_BOUND_LENGTH = 2048
"""At this length only the launch counts, and peers launched with programmatic dependent launch
overlap with their own predecessor in the chain; they are left out there."""


@dataclasses.dataclass(frozen=True)
class PeerTime:
    """One row of the table."""

    implementation: str
    distribution: str
    rows: int
    length: Length
    k: int
    us: float
    is_right: bool


def load(path: str | Path) -> list[PeerTime]:
    """Reads the table; raises ValueError with a sentence if it is not one."""
    times = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if not line["chain_us"] or line.get("l2", "warm") != "warm":
                    continue
                length = line["length"]
                times.append(
                    PeerTime(
                        line["implementation"],
                        line["distribution"],
                        int(line["rows"]),
                        int(length) if length.isdigit() else length,
                        int(line["k"]),
                        float(line["chain_us"]),
                        line["verified"] == "OK",
                    )
                )
    except FileNotFoundError:
        raise ValueError(f"there is no file {str(path)!r}; pass a CSV of peers' times") from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a table of peers' times ({type(error).__name__}: {error}); it "
            "needs the columns implementation, distribution, rows, length, k, chain_us, verified"
        ) from None
    return times


@dataclasses.dataclass(frozen=True)
class Duel:
    """One cell of ours and the peers that were timed in it."""

    ours: Record
    exact: PeerTime | None
    inexact: PeerTime | None
    reference: PeerTime | None

    @property
    def ratio(self) -> float | None:
        """Time of the fastest exact peer over ours; above 1 we are faster."""
        return self.exact.us / self.ours.us if self.exact else None

    @property
    def reference_ratio(self) -> float | None:
        """Time of PR 37421 over ours."""
        return self.reference.us / self.ours.us if self.reference else None


def duels(records: Iterable[Record], times: Sequence[PeerTime]) -> list[Duel]:
    """Pairs this package's cells (CUDA kernel alone, float32, indices) with the peers' times."""
    wrong_somewhere = {(t.implementation, t.rows, t.length, t.k) for t in times if not t.is_right}
    cells: dict[tuple[str, int, Length, int], list[PeerTime]] = {}
    for time in times:
        if not time.implementation.startswith(FLOOR_PREFIX):
            key = (time.distribution, time.rows, time.length, time.k)
            cells.setdefault(key, []).append(time)

    found = []
    for record in records:
        if not _is_comparable(record):
            continue
        peers = cells.get((record.distribution, record.rows, record.length, record.k))
        if not peers:
            continue
        if record.length == LAUNCH_BOUND_LENGTH:
            peers = [p for p in peers if not p.implementation.endswith(PDL_SUFFIX)]
        exact = [
            p for p in peers if (p.implementation, p.rows, p.length, p.k) not in wrong_somewhere
        ]
        inexact = [p for p in peers if p not in exact]
        reference = [p for p in peers if p.implementation == REFERENCE]
        found.append(
            Duel(
                record,
                min(exact, key=_us, default=None),
                min(inexact, key=_us, default=None),
                reference[0] if reference else None,
            )
        )
    return found


def _us(time: PeerTime) -> float:
    return time.us


def _is_comparable(record: Record) -> bool:
    return (
        record.implementation == "cuda"
        and record.metric == GRAPH
        and record.output == "indices"
        and record.dtype == "float32"
        and not record.cold
        and not record.plan
        and record.width == 163840
    )


def print_duels(
    records: Iterable[Record], times: Sequence[PeerTime], say: Callable[[str], None] = print
) -> int:
    """Prints ratios per cell, their geometric means and the cells that are missed.

    Returns:
        The number of cells slower than the fastest exact peer or than PR 37421.
    """
    found = duels(records, times)
    say("")
    if not found:
        say("No cell of this run is in the table of peers (CUDA, float32, indices, width 163840).")
        return 0
    num_missed = 0
    for distribution in dict.fromkeys(duel.ours.distribution for duel in found):
        here = [duel for duel in found if duel.ours.distribution == distribution]
        say(f"{distribution}: time of the fastest exact peer / ours (* slower than it)")
        cells = {
            (duel.ours.rows, duel.ours.length): f"{duel.ratio:.2f}" + "*" * (duel.ratio < 1)
            for duel in here
            if duel.ratio is not None
        }
        for line in grid(cells, indent="  "):
            say(line)
        say(f"{distribution}: time of {REFERENCE_NAME} / ours")
        cells = {
            (duel.ours.rows, duel.ours.length): f"{duel.reference_ratio:.2f}"
            + "*" * (duel.reference_ratio < 1)
            for duel in here
            if duel.reference_ratio is not None
        }
        for line in grid(cells, indent="  "):
            say(line)

    for name, ratios in (
        ("the fastest exact peer", [d.ratio for d in found if d.ratio is not None]),
        (REFERENCE_NAME, [d.reference_ratio for d in found if d.reference_ratio is not None]),
    ):
        missed = sum(ratio < 1 for ratio in ratios)
        say(
            f"against {name}: {len(ratios) - missed} of {len(ratios)} cells at least as fast, "
            f"geometric mean {geometric_mean(ratios):.2f}, worst {min(ratios, default=0):.2f}"
        )
        num_missed += missed

    missed_cells = [
        [
            f"{duel.ours.rows} x {duel.ours.length} {duel.ours.distribution}",
            microseconds(duel.ours.us),
            microseconds(peer.us),
            f"{peer.us / duel.ours.us:.2f}",
            f"{peer.implementation}{remark}",
        ]
        for duel in sorted(found, key=lambda d: (d.ours.rows, length_order(d.ours.length)))
        for peer, remark in ((duel.exact, ""), (duel.inexact, " (inexact)"))
        if peer is not None and peer.us < duel.ours.us
    ]
    if missed_cells:
        say("missed:")
        for line in align([["cell", "ours", "peer", "ratio", "name"], *missed_cells], "  "):
            say(line)
    return num_missed
