"""A seed and a number -> one batch: everything that is drawn, and nothing that a device has to say.

A batch is a buffer of rows of one width and dtype, cut into launches. Shapes that XLA must know are
those of the *shape class* alone (`CLASSES`), so two programs per class and element size serve every
width, k, mode and order: those are numbers that the programs read. Each launch draws its own number
of rows, k, mode, order of results and forced plan; each row its own values, window, and what lies
around it.

A share of the batches goes through the public functions under `jax.jit` instead of the native
module's raw entry. Each of their shapes must be compiled, so they are drawn from a list of
`Settings.programs` combinations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jax_topk.fuzz import generators, windows
from jax_topk.fuzz.plans import BOUNDARIES, LONG_BOUNDARIES, PLANS, THREADS

__all__ = [
    "CLASSES",
    "DTYPES",
    "GUARD",
    "HEAD",
    "OUTPUTS",
    "Batch",
    "Launch",
    "Settings",
    "ShapeClass",
    "arena_elements",
    "batch_rows",
    "draw_batch",
    "operand_elements",
]

DTYPES = ("float32", "bfloat16", "float16")
OUTPUTS = ("sorted", "unsorted", "indices")
"""`top_k`, `top_k(sorted=False)` and `top_k_indices`."""

GUARD = 64
"""Elements between the results of two launches, and before the first and after the last, that must
stay as they are."""
MAX_OFFSET = 16
HEAD = GUARD + MAX_OFFSET
"""Elements before the first row of the operand; rows begin up to 16 elements further back."""
MAX_LAUNCHES = 256
MAX_ROWS = 16384
MIN_ROWS = 8

_DTYPE_SHARES = (0.5, 0.25, 0.25)
_KS = (0, 1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 256, 500, 512, 1000, 1024)
_LARGE_KS = (1025, 2047, 2048, 2049, 3000, 4095, 4096)
_LAUNCH_ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 66, 67, 130, 133, 500)
_SHARE_OF_PATCHWORK = 0.1
_SHARE_OF_FORCED = 0.6


@dataclasses.dataclass(frozen=True)
class ShapeClass:
    """Rows of up to `width` columns, and the share of all rows that falls to them."""

    width: int
    share: float
    cpu_share: float


CLASSES = (
    ShapeClass(64, 0.25, 0.36),
    ShapeClass(512, 0.25, 0.32),
    ShapeClass(4096, 0.30, 0.26),
    ShapeClass(16384, 0.15, 0.05),
    ShapeClass(65536, 0.04, 0.008),
    ShapeClass(262144, 0.01, 0.002),
)
"""Long rows are dear on a CPU, so fewer of them are drawn there."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a batch depends on besides its seed and number; part of a replay line.

    Attributes:
        implementation: `"cuda"`, `"cpu"` or `"xla"`.
        max_width: largest width of a row.
        batch_elements: about how many elements a batch holds; fixes the rows of each shape class.
        max_k: largest k.
        programs: number of combinations that go through the public functions; each class has an
            equal part of them, and at least one.
    """

    implementation: str
    max_width: int
    batch_elements: int
    max_k: int
    programs: int

    @property
    def classes(self) -> tuple[ShapeClass, ...]:
        """The shape classes that `max_width` leaves, the last one cut to it."""
        kept = []
        for shape in CLASSES:
            kept.append(dataclasses.replace(shape, width=min(shape.width, self.max_width)))
            if shape.width >= self.max_width:
                break
        return tuple(kept)

    def max_results(self, shape: ShapeClass) -> int:
        """The largest k of a class."""
        return min(shape.width, self.max_k)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call on consecutive rows of the batch.

    Attributes:
        first_row: of the batch.
        rows: number of rows.
        k: number of results.
        smallest: the mode.
        output: one of `OUTPUTS`.
        plan: overrides of the CUDA plan, or `threads=N` for the CPU target; `""` forces nothing.
        out_begin: element of the arenas at which the results begin.
        uses_api: through `jax_topk.top_k` under `jax.jit`, not through the native module.
    """

    first_row: int
    rows: int
    k: int
    smallest: bool
    output: str
    plan: str
    out_begin: int
    uses_api: bool

    @property
    def is_sorted(self) -> bool:
        """Whether results are best first."""
        return self.output == "sorted"

    @property
    def has_values(self) -> bool:
        """Whether values are written."""
        return self.output != "indices"

    @property
    def out_end(self) -> int:
        """The element of the arenas behind the results."""
        return self.out_begin + self.rows * self.k


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows, windows and launches. Arrays are `[rows]`.

    Attributes:
        seed: of the run.
        index: the batch's number in it.
        shape: the class.
        rows: number of rows, fixed by the class.
        width: allocated columns of every row, at most that of the class.
        offset: elements by which the rows are displaced, 0 to 16: any alignment.
        dtype: of the operand.
        poison: two words that fill the arenas of values and indices.
        launches: cover all rows, in order.
        first: the generator of the first half of each window (place in `GENERATORS`).
        last: that of the second half; mostly the same.
        row_seeds: uint32.
        outside: place in `OUTSIDE`.
        starts: int32, not clamped.
        lengths: int32, not clamped.
        start_kinds: places in `windows.STARTS`.
        length_kinds: places in `windows.LENGTHS`.
    """

    seed: int
    index: int
    shape: ShapeClass
    rows: int
    width: int
    offset: int
    dtype: str
    poison: tuple[int, int]
    launches: tuple[Launch, ...]
    first: np.ndarray
    last: np.ndarray
    row_seeds: np.ndarray
    outside: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    start_kinds: np.ndarray
    length_kinds: np.ndarray

    def per_row(self, field: str, dtype: type) -> np.ndarray:
        """A property of the launches, repeated for their rows: `[rows]`."""
        values = [getattr(launch, field) for launch in self.launches]
        return np.repeat(np.array(values, dtype), [launch.rows for launch in self.launches])

    def out_offsets(self) -> np.ndarray:
        """The element of the arenas at which each row's results begin: `[rows]` int32."""
        place = np.arange(self.rows) - self.per_row("first_row", np.int64)
        return (self.per_row("out_begin", np.int64) + place * self.per_row("k", np.int64)).astype(
            np.int32
        )

    def launch_of(self, row: int) -> Launch:
        """The launch that a row belongs to."""
        return next(x for x in self.launches if x.first_row <= row < x.first_row + x.rows)


def batch_rows(settings: Settings, shape: ShapeClass) -> int:
    """Rows of every batch of a class."""
    return int(np.clip(settings.batch_elements // shape.width, MIN_ROWS, MAX_ROWS))


def operand_elements(settings: Settings, shape: ShapeClass) -> int:
    """Size of the operand's buffer, guards included."""
    return HEAD + batch_rows(settings, shape) * shape.width + GUARD


def arena_elements(settings: Settings, shape: ShapeClass) -> int:
    """Size of each buffer that results are placed in."""
    results = batch_rows(settings, shape) * settings.max_results(shape)
    return results + (MAX_LAUNCHES + 1) * 2 * GUARD


def draw_batch(
    settings: Settings, seed: int, index: int, is_legal: Callable[[int, int, int, str, str], bool]
) -> Batch:
    """Draws a batch, the same on every machine with the same legal plans.

    Args:
        settings: of the run.
        seed: of the run.
        index: the batch's number, from 0.
        is_legal: `(rows, width, k, dtype, plan)` -> whether the device can serve a plan.
    """
    rng = np.random.default_rng([seed, index])
    uses_api = settings.implementation == "xla" or rng.random() < 0.08
    if uses_api:
        return _draw_api_batch(settings, seed, index, rng, is_legal)
    shape = _draw_class(settings, rng)
    rows = batch_rows(settings, shape)
    width = _draw_width(rng, settings, shape)
    dtype = str(rng.choice(DTYPES, p=_DTYPE_SHARES))
    launches: list[Launch] = []
    begin, first_row = GUARD, 0
    while first_row < rows:
        count = rows - first_row
        if len(launches) < MAX_LAUNCHES - 1:
            count = min(count, int(rng.choice((*_LAUNCH_ROWS, max(1, rows // 4), rows))))
        k = _draw_k(rng, min(width, settings.max_k))
        plan = _draw_plan(rng, settings.implementation)
        if not is_legal(count, width, k, dtype, plan):
            plan = ""
        launch = Launch(
            first_row=first_row,
            rows=count,
            k=k,
            smallest=bool(rng.integers(2)),
            output=str(rng.choice(OUTPUTS)),
            plan=plan,
            out_begin=begin,
            uses_api=False,
        )
        launches.append(launch)
        first_row += count
        # Not a multiple of a vector: results begin at any alignment.
        begin = launch.out_end + GUARD + int(rng.integers(GUARD))
    return _fill(rng, seed, index, shape, rows, width, dtype, launches)


def _draw_api_batch(
    settings: Settings,
    seed: int,
    index: int,
    rng: np.random.Generator,
    is_legal: Callable[[int, int, int, str, str], bool],
) -> Batch:
    """A batch of one of the compiled combinations, which depend on the settings alone."""
    shape = _draw_class(settings, rng)
    place = settings.classes.index(shape)
    number = int(rng.integers(max(1, settings.programs // len(settings.classes))))
    program = np.random.default_rng([0xA91, place, number])
    rows = batch_rows(settings, shape)
    width = _draw_width(program, settings, shape)
    dtype = str(program.choice(DTYPES, p=_DTYPE_SHARES))
    # All launches have one shape: the rows of a batch divided evenly.
    parts = [n for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]
    count = rows // int(program.choice(parts))
    k = _draw_k(program, min(width, settings.max_k))
    plan = _draw_plan(program, "cuda") if settings.implementation == "cuda" else ""
    if not is_legal(count, width, k, dtype, plan):
        plan = ""
    smallest = bool(program.integers(2))
    output = str(program.choice(OUTPUTS))
    launches = [
        Launch(
            first_row=first_row,
            rows=count,
            k=k,
            smallest=smallest,
            output=output,
            plan=plan,
            out_begin=GUARD + place * (count * k + GUARD),
            uses_api=True,
        )
        for place, first_row in enumerate(range(0, rows, count))
    ]
    return _fill(rng, seed, index, shape, rows, width, dtype, launches)


def _draw_class(settings: Settings, rng: np.random.Generator) -> ShapeClass:
    """A class, such that rows fall to the classes by their shares."""
    classes = settings.classes
    is_gpu = settings.implementation == "cuda"
    weights = np.array(
        [
            (shape.share if is_gpu else shape.cpu_share) / batch_rows(settings, shape)
            for shape in classes
        ]
    )
    return classes[int(rng.choice(len(classes), p=weights / weights.sum()))]


def _draw_width(rng: np.random.Generator, settings: Settings, shape: ShapeClass) -> int:
    """Any width of the class: its largest, near a boundary, or anything; rarely 0 or 1."""
    smaller = [s.width for s in settings.classes if s.width < shape.width]
    least = max(smaller, default=0)
    near = [b + d for b in (*BOUNDARIES, *LONG_BOUNDARIES) for d in (-1, 0, 1, 3)]
    near = [w for w in near if least <= w <= shape.width] or [shape.width]
    kind = rng.random()
    if kind < 0.3:
        return shape.width
    if kind < 0.5:
        return int(rng.choice(near))
    return int(rng.integers(least, shape.width, endpoint=True))


def _draw_k(rng: np.random.Generator, limit: int) -> int:
    """Any k up to a limit, mostly one at which something changes."""
    kind = rng.random()
    if kind < 0.15:
        return int(rng.integers(0, limit, endpoint=True))
    if kind < 0.25:
        return limit
    choices = _LARGE_KS if kind > 0.75 and limit > _LARGE_KS[0] else _KS
    return min(limit, int(rng.choice(choices)))


def _draw_plan(rng: np.random.Generator, implementation: str) -> str:
    if implementation == "cpu":
        return f"threads={rng.choice(THREADS)}"
    if rng.random() > _SHARE_OF_FORCED:
        return ""
    return str(rng.choice(PLANS[1:]))


def _fill(
    rng: np.random.Generator,
    seed: int,
    index: int,
    shape: ShapeClass,
    rows: int,
    width: int,
    dtype: str,
    launches: list[Launch],
) -> Batch:
    """Draws what differs from row to row."""
    k = np.repeat([launch.k for launch in launches], [launch.rows for launch in launches])
    lengths, length_kinds = windows.draw_lengths(rng, rows, width, k)
    starts, start_kinds = windows.draw_starts(rng, lengths, width)
    number = len(generators.GENERATORS)
    first = rng.integers(number, size=rows)
    is_patchwork = rng.random(rows) < _SHARE_OF_PATCHWORK
    last = np.where(is_patchwork, rng.integers(number, size=rows), first)
    return Batch(
        seed=seed,
        index=index,
        shape=shape,
        rows=rows,
        width=width,
        offset=int(rng.integers(MAX_OFFSET, endpoint=True)),
        dtype=dtype,
        poison=(int(rng.integers(2**32)), int(rng.integers(2**32))),
        launches=tuple(launches),
        first=first.astype(np.uint32),
        last=last.astype(np.uint32),
        row_seeds=rng.integers(2**32, size=rows, dtype=np.uint32),
        outside=rng.integers(len(generators.OUTSIDE), size=rows).astype(np.uint32),
        starts=starts,
        lengths=lengths,
        start_kinds=start_kinds,
        length_kinds=length_kinds,
    )
