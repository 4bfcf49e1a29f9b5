"""The project's speed targets on one H100, judged from records: met, missed by how much, or open.

A cell is the median of `graph_chain_us` of the CUDA kernel; a comparison between two cells of the
same run allows `NOISE` for the noise of both, because a kernel cannot be told from itself more
finely than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .cases import (
    ADVERSARIAL_DISTRIBUTIONS,
    GRAPH,
    JIT,
    WIDTH,
    K,
    Length,
)
from .results import Record
from .tables import grid, microseconds

NOISE = 0.02

TARGET_LENGTHS: tuple[Length, ...] = (
    4096,
    8192,
    16384,
    32768,
    65536,
    96000,
    128000,
    WIDTH,
    "mixed",
)
TARGETS: dict[int, tuple[float, ...]] = {
    8: (2.6, 3.2, 4.0, 4.2, 4.4, 4.5, 4.6, 4.8, 5.0),
    16: (2.7, 3.3, 4.2, 4.8, 5.5, 6.0, 6.5, 7.0, 6.0),
    32: (2.8, 3.4, 4.5, 6.0, 7.5, 8.5, 9.5, 10.5, 8.0),
    64: (2.9, 3.6, 5.0, 7.5, 10.0, 13.0, 17.0, 24.0, 11.0),
    128: (3.1, 4.2, 6.5, 9.5, 17.0, 26.0, 33.0, 38.0, 18.0),
    256: (4.2, 6.0, 10.0, 18.0, 40.0, 50.0, 63.0, 73.0, 26.0),
}
"""Most rows of a band -> microseconds at `TARGET_LENGTHS`; the first band is 1 to 8 rows."""

VALUES_RATIO, ADVERSARIAL_RATIO = 1.3, 3.0
SORTED_EXTRA_US = 2.0
PLACING_US = 1.0
"""What placing 2048 more entries may cost: the measured time of 2048 scattered 4-byte stores."""
SHORT_WIDTH, SHORT_RATIO = 8192, 1.1
COLD_SHARE = 0.8
JIT_EXTRA_US = 1.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One cell against its bound.

    Attributes:
        text: what is compared.
        us: the measured figure.
        bound: what it may be at most.
    """

    text: str
    us: float
    bound: float

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps to the bound."""
        return self.us <= self.bound

    @property
    def excess(self) -> float:
        """Figure over bound; above 1 is missed."""
        return self.us / self.bound if self.bound > 0 else float("inf")


def target_us(rows: int, length: Length) -> float | None:
    """The target of a cell of the grid; None where there is none."""
    if length not in TARGET_LENGTHS:
        return None
    for most_rows, row in TARGETS.items():
        if rows <= most_rows:
            return row[TARGET_LENGTHS.index(length)]
    return None


@dataclasses.dataclass(frozen=True)
class Column:
    """What the cells of one comparison have in common; the defaults are the main grid."""

    implementation: str = "cuda"
    metric: str = GRAPH
    distribution: str = "normal"
    k: int = K
    dtype: str = "float32"
    output: str = "indices"
    width: int = WIDTH
    cold: bool = False

    @classmethod
    def of(cls, record: Record) -> Column:
        """The column a record stands in."""
        return cls(**{f.name: getattr(record, f.name) for f in dataclasses.fields(cls)})


class Cells:
    """Records by column, then by shape; those of forced plans are left out."""

    def __init__(self, records: Iterable[Record]):
        """Indexes records; of two of one cell the later counts."""
        self._columns: dict[Column, dict[tuple[int, Length], Record]] = {}
        for record in records:
            if not record.plan:
                column = self._columns.setdefault(Column.of(record), {})
                column[record.rows, record.length] = record

    def column(self, **fields: Any) -> dict[tuple[int, Length], Record]:
        """Shape -> record of one column."""
        return self._columns.get(Column(**fields), {})

    def distributions(self) -> list[str]:
        """Distributions the kernel was timed on in the main grid."""
        return [c.distribution for c in self._columns if c == Column(distribution=c.distribution)]


def _against(
    ours: dict[tuple[int, Length], Record],
    base: dict[tuple[int, Length], Record],
    bound: Callable[[Record], float],
    what: str,
) -> list[Check]:
    """Checks the shapes that both columns hold; `bound` takes the record of `base`."""
    return [
        Check(f"{rows} x {length} {what}".strip(), record.us, bound(base[rows, length]))
        for (rows, length), record in ours.items()
        if (rows, length) in base
    ]


def check_targets(cells: Cells) -> list[Check]:
    """Each cell of the grid against its target."""
    return [
        Check(f"{rows} x {length}", record.us, bound)
        for (rows, length), record in cells.column().items()
        if (bound := target_us(rows, length)) is not None
    ]


def check_distributions(cells: Cells, names: Sequence[str], ratio: float) -> list[Check]:
    """Each cell of other values against `ratio` times the same cell of normal values."""
    normal = cells.column()
    return [
        check
        for name in names
        for check in _against(
            cells.column(distribution=name), normal, lambda base: ratio * base.us, name
        )
    ]


def check_sorted_output(cells: Cells) -> list[Check]:
    """Values and indices, best first, against indices only."""
    return _against(
        cells.column(output="values_sorted"),
        cells.column(),
        lambda base: base.us + SORTED_EXTRA_US,
        "values sorted",
    )


def check_ks(cells: Cells, ks: Sequence[int]) -> list[Check]:
    """Each other k against k = 2048; a larger one may cost what putting out more explains."""
    grid_floor = cells.column(implementation="floor_read")
    checks = []
    for k in ks:
        floor = cells.column(implementation="floor_read", k=k)
        placing_us = PLACING_US * max(0, k - K) / K
        writing_us = {
            shape: max(0.0, record.us - grid_floor[shape].us)
            for shape, record in floor.items()
            if k > K and shape in grid_floor
        }
        checks += [
            Check(
                f"{rows} x {length} k={k}",
                record.us,
                base.us * (1 + NOISE) + writing_us.get((rows, length), 0.0) + placing_us,
            )
            for (rows, length), record in cells.column(k=k).items()
            if (base := cells.column().get((rows, length))) is not None
        ]
    return checks


def check_dtypes(cells: Cells) -> list[Check]:
    """Each cell of 16-bit values against the same cell of float32."""
    return [
        check
        for dtype in ("bfloat16", "float16")
        for check in _against(
            cells.column(dtype=dtype), cells.column(), lambda base: base.us * (1 + NOISE), dtype
        )
    ]


def check_short_rows(cells: Cells) -> list[Check]:
    """Short rows in the wide buffer against the same rows in a buffer of 8192 columns."""
    return _against(
        cells.column(),
        cells.column(width=SHORT_WIDTH),
        lambda base: SHORT_RATIO * base.us,
        f"of width {WIDTH}",
    )


def check_cold(cells: Cells) -> list[Check]:
    """Cold rows against the read-only kernel in the same run."""
    return _against(
        cells.column(cold=True),
        cells.column(cold=True, implementation="floor_read"),
        lambda base: base.us / COLD_SHARE,
        "cold",
    )


def check_jit(cells: Cells) -> list[Check]:
    """A step inside one jit against the kernel alone plus the dependency's own kernel."""
    floors = {
        rows: record.us
        for (rows, _), record in cells.column(implementation="dependency_floor", metric=JIT).items()
    }
    in_jit = cells.column(metric=JIT)
    return _against(
        {shape: record for shape, record in in_jit.items() if shape[0] in floors},
        cells.column(),
        lambda base: base.us + floors[base.rows] + JIT_EXTRA_US,
        "in jit",
    )


def judge(records: Iterable[Record]) -> dict[str, list[Check]]:
    """Judges everything that was measured: title of a target -> its cells; empty: not measured."""
    cells = Cells(records)
    adversarial = [
        name for name in cells.distributions() if name.split(":")[0] in ADVERSARIAL_DISTRIBUTIONS
    ]
    # Scores read from a file carry a name of their own and count as values that must not matter.
    others = [name for name in cells.distributions() if name not in ("normal", *adversarial)]
    return {
        "2. the table of targets": check_targets(cells),
        f"3. other values within {VALUES_RATIO} x normal": check_distributions(
            cells, others, VALUES_RATIO
        ),
        f"3. adversarial values within {ADVERSARIAL_RATIO:g} x normal": check_distributions(
            cells, adversarial, ADVERSARIAL_RATIO
        ),
        f"4. sorted values within {SORTED_EXTRA_US:g} us of indices": check_sorted_output(cells),
        "4. other k not slower than their output explains": check_ks(
            cells, (64, 256, 512, 1024, 4096)
        ),
        "4. 16-bit values not slower than float32": check_dtypes(cells),
        f"5. short rows of a wide buffer within {SHORT_RATIO} x a narrow one": check_short_rows(
            cells
        ),
        f"5. cold rows at {COLD_SHARE:.0%} of the read-only kernel": check_cold(cells),
        f"6. in jit within {JIT_EXTRA_US:g} us of kernel and dependency": check_jit(cells),
    }


def print_goals(
    records: Sequence[Record], say: Callable[[str], None] = print, worst: int = 8
) -> int:
    """Prints every target as met, missed (worst cells first) or not measured.

    Returns:
        The number of missed cells.
    """
    num_missed = 0
    say("")
    for title, checks in judge(records).items():
        missed = sorted((c for c in checks if not c.is_met), key=lambda c: -c.excess)
        num_missed += len(missed)
        if not checks:
            say(f"{title}: not measured")
        elif not missed:
            say(f"{title}: met in all {len(checks)} cells")
        else:
            say(f"{title}: missed in {len(missed)} of {len(checks)} cells")
            for check in missed[:worst]:
                say(
                    f"    {check.text}: {microseconds(check.us)} us, at most "
                    f"{microseconds(check.bound)} ({check.excess:.2f} x)"
                )
            if len(missed) > worst:
                say(f"    and {len(missed) - worst} more")
    table = {
        (rows, length): f"{microseconds(record.us)}/{bound:g}" + "*" * (record.us > bound)
        for (rows, length), record in Cells(records).column().items()
        if (bound := target_us(rows, length)) is not None
    }
    if table:
        say("measured/target (* missed):")
        for line in grid(table, indent="  "):
            say(line)
    return num_missed
