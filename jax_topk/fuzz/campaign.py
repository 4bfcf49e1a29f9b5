"""The loop over batches: make, run, check, count; and what happens where something is wrong."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_topk import _progress
from jax_topk.bench import oracle
from jax_topk.fuzz import programs
from jax_topk.fuzz.batch import Batch, Settings, draw_batch
from jax_topk.fuzz.case import Case, Row, case_of_batch, run_case
from jax_topk.fuzz.shrink import shrink
from jax_topk.fuzz.tally import Tally, call_of
from jax_topk.fuzz.targets import Target
from jax_topk.fuzz.watchdog import Watchdog

__all__ = [
    "Failure",
    "Progress",
    "Runner",
    "batch_spec",
    "command",
    "parse_batch_spec",
    "replay",
    "run",
]

_REPEATS = 3
"""Runs of a case before it counts as right: a race need not show at once."""
_MAX_ROWS_OF_CASE = 512


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is wrong with a batch.

    Attributes:
        problems: sentences.
        rows: numbers of the rows whose results are wrong; may be empty.
    """

    problems: tuple[str, ...]
    rows: tuple[int, ...]


class DeviceLostError(RuntimeError):
    """A case after which the device answers nothing any more in this process."""

    def __init__(self, case: Case):
        """Keeps the case."""
        super().__init__(f"the device answers nothing any more after {case}")
        self.case = case


class Progress(_progress.Progress):
    """Counts rows."""

    def __init__(self, total: int):
        """Starts at 0 of `total` rows."""
        super().__init__(total, "row", unit_scale=True)

    def step(self, rows: int, failures: int) -> None:
        """Shows how many rows are done."""
        self.advance(rows - self._done, "{done:,}/{total:,} rows", f"{failures} failures")


# --- replay lines ---------------------------------------------------------------------------------


def batch_spec(settings: Settings, seed: int, index: int) -> str:
    """The text that makes a batch again."""
    fields = {"batch": index, "seed": seed, **dataclasses.asdict(settings)}
    return ";".join(f"{name}={value}" for name, value in fields.items())


def parse_batch_spec(text: str) -> tuple[Settings, int, int]:
    """Reads what `batch_spec` wrote: `(settings, seed, index)`; raises ValueError."""
    fields = dict(item.partition("=")[::2] for item in text.strip().split(";"))
    names = ["batch", "seed", *(field.name for field in dataclasses.fields(Settings))]
    if sorted(fields) != sorted(names):
        raise ValueError(f"a batch has the fields {', '.join(names)}, not {', '.join(fields)}")
    numbers = {name: value for name, value in fields.items() if name != "implementation"}
    for name, value in numbers.items():
        if not value.isdigit():
            raise ValueError(f"{name}={value} is not a whole number")
    settings = Settings(
        implementation=fields["implementation"],
        **{field: int(numbers[field]) for field in numbers if field not in ("batch", "seed")},
    )
    return settings, int(numbers["seed"]), int(numbers["batch"])


def command(spec: str) -> str:
    """The line that replays a spec."""
    return f"python -m jax_topk.fuzz --replay '{spec}'"


# --- one batch ------------------------------------------------------------------------------------


class Runner:
    """Runs batches on a target under a watchdog."""

    def __init__(self, settings: Settings, target: Target, watchdog: Watchdog):
        """Runs nothing yet."""
        self.settings = settings
        self.target = target
        self.watchdog = watchdog
        self.oracle_rows = 0
        self.is_device_lost = False

    def draw(self, seed: int, index: int) -> Batch:
        """Draws a batch."""
        return draw_batch(self.settings, seed, index, self.target.is_legal)

    def run_batch(self, batch: Batch) -> Failure | None:
        """Runs and checks a batch; returns what is wrong."""
        doing = ["making the values"]

        def describe() -> str:
            spec = batch_spec(self.settings, batch.seed, batch.index)
            return f"It was {doing[0]}.\nreplay: {command(spec)}"

        with self.watchdog.guard(describe):
            buffers = programs.make(self.settings, batch, self.target.device)
            jax.block_until_ready(dataclasses.astuple(buffers))
            for launch in batch.launches:
                call = call_of(batch, launch)
                doing[0] = f"running {call}"
                try:
                    buffers.values, buffers.indices = self.target.run(
                        call,
                        buffers.operand,
                        buffers.starts,
                        buffers.lengths,
                        buffers.values,
                        buffers.indices,
                    )
                except (RuntimeError, ValueError) as error:
                    rows = tuple(range(launch.first_row, launch.first_row + launch.rows))
                    return Failure((f"{call} raised {type(error).__name__}: {error}",), rows)
            doing[0] = "checking the results"
            rng = np.random.default_rng([batch.seed, batch.index, 1])
            sample = rng.integers(batch.rows, size=programs.NUM_SAMPLES)
            verdict = programs.check(self.settings, batch, buffers, sample, self.target.device)
        return self._judge(batch, sample, verdict)

    def _judge(self, batch: Batch, sample: np.ndarray, verdict: programs.Verdict) -> Failure | None:
        problems: list[str] = []
        wrong = np.flatnonzero(verdict.flags)
        for flag, what in ((programs.WRONG_INDICES, "indices"), (programs.WRONG_VALUES, "values")):
            rows = np.flatnonzero(verdict.flags & flag)
            if rows.size:
                problems.append(f"{rows.size} rows have wrong {what}, the first is row {rows[0]}")
        around: list[int] = []
        for what, (count, place) in (
            ("values", verdict.values_guard),
            ("indices", verdict.indices_guard),
        ):
            if count:
                problems.append(
                    f"{count} elements around the {what} were written, the first is element {place}"
                )
                nearest = min(batch.launches, key=lambda x: _distance(x, place))
                around += range(nearest.first_row, nearest.first_row + nearest.rows)
        if not verdict.is_operand_intact:
            problems.append("an input was changed")
        for number, sentence in self._ask_oracle(batch, sample, verdict):
            problems.append(sentence)
            around.append(number)
        if not problems:
            return None
        return Failure(tuple(problems), tuple(wrong.tolist()) or tuple(around))

    def _ask_oracle(
        self, batch: Batch, sample: np.ndarray, verdict: programs.Verdict
    ) -> list[tuple[int, str]]:
        """Compares the reference of the sampled rows with NumPy's."""
        found = []
        for place, number in enumerate(sample.tolist()):
            launch = batch.launch_of(number)
            row = verdict.sample_rows[place][None, : batch.width]
            wanted_values, wanted_indices = oracle.top_k(
                row.view(jnp.dtype(batch.dtype)),
                launch.k,
                batch.starts[number : number + 1],
                batch.lengths[number : number + 1],
                launch.smallest,
                launch.is_sorted,
            )
            is_equal = np.array_equal(
                verdict.sample_indices[place, : launch.k], wanted_indices[0]
            ) and np.array_equal(
                verdict.sample_values[place, : launch.k], wanted_values.view(row.dtype)[0]
            )
            self.oracle_rows += 1
            if not is_equal:
                found.append(
                    (number, f"row {number}: the reference on the device differs from NumPy's")
                )
        return found

    # --- failures ---------------------------------------------------------------------------------

    def fails(self, case: Case) -> bool:
        """Whether a case fails in one of a few runs.

        Raises:
            DeviceLostError: it fails, and after it so does everything else.
        """

        def describe() -> str:
            return f"It was running a case.\nreplay: {command(str(case))}"

        for _ in range(_REPEATS):
            with self.watchdog.guard(describe):
                try:
                    if run_case(case, self.target):
                        return True
                except ValueError:
                    return False  # the target refuses it: not what went wrong
                except RuntimeError:
                    if not self._is_device_alive():
                        raise DeviceLostError(case) from None
                    return True
        return False

    def _is_device_alive(self) -> bool:
        """Whether the simplest of all cases runs."""
        rows = (Row("equal:0", 0, 4, "noise"),)
        name = self.target.implementation
        entry = "jit" if name == "xla" else "native"
        try:
            run_case(
                Case(name, "float32", 4, 1, "largest", "indices", "", entry, 0, rows), self.target
            )
        except RuntimeError:
            return False
        return True

    def explain(self, batch: Batch, failure: Failure, seconds: float) -> str:
        """Finds a small reproducer and returns its replay line.

        Where no row fails alone and no launch fails again, the line replays the whole batch.
        """
        whole = command(batch_spec(self.settings, batch.seed, batch.index))
        self.is_device_lost = not self._is_device_alive()
        if self.is_device_lost:
            print("the device answers nothing any more: nothing can be shrunk", file=sys.stderr)
            return whole
        try:
            for rows in self._suspects(batch, failure):
                case = case_of_batch(self.settings.implementation, batch, rows)
                if self.fails(case):
                    smallest, attempts = shrink(case, self.fails, seconds=seconds)
                    print(f"shrunk in {attempts} attempts", file=sys.stderr)
                    return command(str(smallest))
        except DeviceLostError as error:
            self.is_device_lost = True
            print("the device answers nothing any more: no smaller case", file=sys.stderr)
            return command(str(error.case))
        print("no row and no launch of the batch fails again by itself", file=sys.stderr)
        return whole

    def _suspects(self, batch: Batch, failure: Failure) -> list[list[int]]:
        """Rows to try alone, then launches: as many of their rows as a case takes."""
        alone = [[row] for row in failure.rows[:4]]
        together = []
        for launch in dict.fromkeys(batch.launch_of(row) for row in failure.rows[:64]):
            first = next(row for row in failure.rows if batch.launch_of(row) == launch)
            begin = max(launch.first_row, first - _MAX_ROWS_OF_CASE // 2)
            end = min(launch.first_row + launch.rows, begin + _MAX_ROWS_OF_CASE)
            together.append(list(range(begin, end)))
        return alone + together


def _distance(launch: Any, place: int) -> int:
    return max(launch.out_begin - place, place - launch.out_end, 0)


# --- commands -------------------------------------------------------------------------------------


def run(
    settings: Settings,
    target: Target,
    seeds: Sequence[int],
    rows: int,
    *,
    timeout: float,
    shrink_seconds: float = 60.0,
    max_failures: int = 5,
) -> Tally:
    """Runs batches of every seed until each has had its share of the rows.

    Args:
        settings: of the run.
        target: what is run.
        seeds: each gets an equal part of the rows, in whole batches.
        rows: at least so many rows in all, not counting those with k = 0.
        timeout: seconds that a batch may take.
        shrink_seconds: that are spent on one failure.
        max_failures: failing batches after which the run stops.

    Returns:
        What was counted.
    """
    tally, progress, watchdog = Tally(), Progress(rows), Watchdog(timeout)
    runner = Runner(settings, target, watchdog)
    try:
        for number, seed in enumerate(seeds):
            goal = rows * (number + 1) // len(seeds)
            index = 0
            while tally.rows_with_results < goal and len(tally.failures) < max_failures:
                batch = runner.draw(seed, index)
                failure = runner.run_batch(batch)
                tally.add(batch, target)
                if failure is not None:
                    print(
                        f"\nFAILED: seed {seed}, batch {index}, {batch.dtype}, width"
                        f" {batch.width}: {'; '.join(failure.problems)}",
                        file=sys.stderr,
                        flush=True,
                    )
                    line = runner.explain(batch, failure, shrink_seconds)
                    print(f"replay: {line}", flush=True)
                    tally.failures.append(line)
                if runner.is_device_lost:
                    return tally
                progress.step(tally.rows_with_results, len(tally.failures))
                index += 1
    finally:
        tally.oracle_rows = runner.oracle_rows
        progress.close()
        watchdog.close()
    return tally


def replay(spec: str, make_target: Any, *, timeout: float) -> list[str]:
    """Runs a case or a batch again; returns what is wrong.

    Args:
        spec: a case (`case.Case`) or a batch (`batch_spec`).
        make_target: makes the target from the name of an implementation.
        timeout: seconds that it may take.

    Raises:
        ValueError: the spec cannot be read; the message says why.
    """
    watchdog = Watchdog(timeout)
    try:
        if spec.strip().startswith("batch="):
            settings, seed, index = parse_batch_spec(spec)
            runner = Runner(settings, make_target(settings.implementation), watchdog)
            failure = runner.run_batch(runner.draw(seed, index))
            return [] if failure is None else list(failure.problems)
        case = Case.parse(spec)
        target = make_target(case.implementation)
        for _ in range(_REPEATS):
            with watchdog.guard(lambda: f"It was running a case.\nreplay: {command(spec)}"):
                try:
                    problems = run_case(case, target)
                except RuntimeError as error:
                    problems = [f"it raised {error}"]
            if problems:
                return problems
        return []
    finally:
        watchdog.close()
