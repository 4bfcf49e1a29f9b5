"""Measures blocks of cells, one cell after the other, and proves every result.

One batch of values per distribution lives on the device and serves all its cells: a cell of fewer
rows takes a prefix of the rows, a shorter window a prefix of the columns. Launches in a CUDA graph
need nothing else, and therefore no compilation per cell.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_topk import _progress

from . import certificate, implementations, inputs, oracle
from .cases import CALL, GRAPH, JIT, METRICS, OTHERS, STREAM, Block, Case
from .implementations import Buffers, TorchChain, wait
from .results import Record
from .timing import Stats, interleave, slopes

ORACLE_ENTRIES = 1 << 20
"""Cells of at most this many entries are compared with the NumPy oracle in full (about 0.1 s)."""

POOL_ROWS_COLD = 1024
COLD_BYTES = 128 << 20
"""What launches must read before they return to the same rows: twice the 60 MB of an H200's L2."""
MAX_COLD_LAUNCHES = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is sampled.

    Attributes:
        launches: launches per CUDA graph.
        replays: replays of a graph; the median counts.
        budget_s: seconds per cell and metric for what is sampled in rounds.
        min_rounds: rounds taken even beyond the budget.
        max_rounds: rounds taken at most.
    """

    launches: int = 20
    replays: int = 50
    budget_s: float = 0.2
    min_rounds: int = 5
    max_rounds: int = 60


HostResult = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Batch:
    """The values of one distribution on the device, with what is derived from them."""

    operand: Array
    width: int
    _lengths: dict[Any, tuple[np.ndarray, Array]] = dataclasses.field(default_factory=dict)
    _prefix: tuple[int, Array] | None = None
    _host_rows: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    _best: dict[Any, HostResult] = dataclasses.field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return int(self.operand.shape[0])

    def lengths(self, case: Case) -> tuple[np.ndarray, Array]:
        """`[num_rows]` int32 on the host and on the device."""
        if case.length not in self._lengths:
            host = inputs.make_lengths(case.length, self.num_rows, self.width)
            self._lengths[case.length] = host, wait(jnp.asarray(host))
        return self._lengths[case.length]

    def rows(self, count: int) -> Array:
        """The first `count` rows, `[count, width]`."""
        if count == self.num_rows:
            return self.operand
        if self._prefix is None or self._prefix[0] != count:
            self._prefix = count, wait(self.operand[:count])
        return self._prefix[1]

    def host_row(self, row: int) -> np.ndarray:
        """One row on the host, `[width]`."""
        if row not in self._host_rows:
            picked = jax.lax.dynamic_index_in_dim(self.operand, jnp.int32(row), keepdims=False)
            self._host_rows[row] = np.asarray(picked)
        return self._host_rows[row]

    def best(self, row: int, length: int, k: int, best_first: bool) -> HostResult:
        """The oracle's values and indices of one row, `[k]` each; computed once."""
        key = (row, length, k, best_first)
        if key not in self._best:
            values, indices = oracle.top_k(
                self.host_row(row)[None], k, lengths=np.array([length]), sorted=best_first
            )
            self._best[key] = values[0], indices[0]
        return self._best[key]


class Runner:
    """Measures cells; keeps the batch and the floors between them."""

    def __init__(
        self,
        platform: str,
        settings: Settings,
        say: Callable[[str], None] = print,
    ):
        """Measures nothing yet.

        Args:
            platform: `"gpu"` or `"cpu"`, where JAX runs.
            settings: how much is sampled.
            say: prints a line; used for wrong results, failures and skipped cells.
        """
        self.platform = platform
        self.settings = settings
        self._say = say
        self._batch: tuple[Any, Batch] | None = None
        self._floors: set[Any] = set()
        self._available: dict[str, bool] = {}

    # --- what to measure --------------------------------------------------------------------------

    def participants(self, block: Block) -> dict[str, tuple[str, ...]]:
        """Metric -> implementations of a block that are there and can be timed by it."""
        names = block.implementations or self.default_implementations()
        chosen: dict[str, list[str]] = {}
        for name in names:
            if not self.is_available(name):
                continue
            possible = implementations.metrics_of(name, self.platform)
            for metric in block.metrics or implementations.natural_metrics(name, self.platform):
                if metric in possible:
                    chosen.setdefault(metric, []).append(name)
        return {metric: tuple(chosen[metric]) for metric in METRICS if metric in chosen}

    def default_implementations(self) -> tuple[str, ...]:
        """Everything but the XLA expression, which is a sort like lax and as slow."""
        return ("cuda" if self.platform == "gpu" else "cpu", "lax", "torch", "flashinfer")

    def is_available(self, name: str) -> bool:
        """Whether an implementation can be measured here; says once why not."""
        if name not in self._available:
            reason = implementations.unavailable(name, self.platform)
            self._available[name] = reason is None
            if reason is not None:
                self._say(f"not measured: {reason}")
        return self._available[name]

    def warm_up(self, seconds: float = 1.0) -> None:
        """Works a GPU until its clocks have left their idle state; does nothing on a CPU."""
        if self.platform != "gpu":
            return
        multiply = jax.jit(lambda x: x @ x / 2048)
        matrix = jnp.ones((2048, 2048), jnp.float32)
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            matrix = wait(multiply(matrix))

    # --- measuring --------------------------------------------------------------------------------

    def run(self, blocks: Sequence[Block], stop_at: float | None = None) -> Iterator[list[Record]]:
        """Measures blocks; yields the records of one cell after the other.

        Args:
            blocks: what to measure.
            stop_at: `time.monotonic()` after which no cell is started.
        """
        for block in blocks:
            participants = self.participants(block)
            pool_rows = POOL_ROWS_COLD if block.cold else max(block.rows)
            for case in block.cases():
                if stop_at is not None and time.monotonic() > stop_at:
                    self._say(f"the time budget is spent; stopped before {case}")
                    return
                try:
                    records = self.measure(case, participants, pool_rows)
                except (RuntimeError, ValueError) as error:
                    # A forced plan may be illegal for some shapes; without one, ours must work.
                    if not case.plan:
                        raise
                    self._say(f"skipped {case}: {str(error)[:300]}")
                    records = []
                yield records

    def num_cells(self, blocks: Sequence[Block]) -> int:
        """How many cells `run` walks through."""
        return sum(sum(1 for _ in block.cases()) for block in blocks)

    def measure(
        self, case: Case, participants: dict[str, tuple[str, ...]], pool_rows: int
    ) -> list[Record]:
        """Measures one cell with every metric and implementation."""
        records: list[Record] = []
        batch = self._batch_for(case, pool_rows)
        for metric, names in participants.items():
            if metric == GRAPH:
                for name in names:
                    if name == "cuda":
                        records += self._graph(case, batch)
                    elif not case.cold and not (name == "flashinfer" and case.output != "indices"):
                        records += self._torch(case, batch, name)
            elif metric == OTHERS and not case.cold:
                records += self._graph(case, batch, OTHERS)
            elif not case.cold:
                records += self._in_jit(case, batch, metric, names)
        return records

    def _batch_for(self, case: Case, pool_rows: int) -> Batch:
        key = (
            *inputs.values_key(case.distribution, case.k),
            case.dtype,
            case.width,
            pool_rows,
        )
        if self._batch is None or self._batch[0] != key:
            self._batch = None  # free the old values first
            operand = inputs.make_values(
                case.distribution, pool_rows, case.width, case.k, case.dtype
            )
            self._batch = key, Batch(wait(operand), case.width)
        return self._batch[1]

    # --- graph_chain_us and behind_others_us ------------------------------------------------------

    def _graph(self, case: Case, batch: Batch, metric: str = GRAPH) -> list[Record]:
        _, lengths = batch.lengths(case)
        starts = wait(jnp.zeros(batch.num_rows, jnp.int32))
        plan = self._rotation(case, batch) if case.cold else ([0], self.settings.launches)
        if plan is None:
            return []
        first_rows, launches = plan
        base = batch.operand.unsafe_buffer_pointer()
        row_bytes = case.width * batch.operand.dtype.itemsize
        operands = [base + row * row_bytes for row in first_rows]
        out_rows = min(batch.num_rows, 256) if case.cold else batch.num_rows

        def launch(kind: str, launches: int, replays: int) -> tuple[list[float], Buffers]:
            buffers = Buffers.poisoned(out_rows, case.k, case.dtype, case.output)
            times = implementations.graph_chain(
                kind,
                case,
                operands,
                starts,
                lengths,
                buffers,
                launches=launches,
                replays=replays,
            )
            return times, buffers

        records = []
        # The floors do not depend on the values or on what is put out: once per shape.
        shape = (case.rows, case.length, case.k, case.dtype, case.width, case.cold)
        has_floors = metric == GRAPH and case.output == "indices" and not case.plan
        if has_floors and shape not in self._floors:
            self._floors.add(shape)
            for kind in ("empty", "read"):
                try:
                    times, _ = launch(kind, launches, self.settings.replays)
                except RuntimeError as error:  # the read-only kernel takes no odd widths
                    self._say(f"no {kind} floor for {case}: {error}")
                    continue
                records.append(self._record(case, f"floor_{kind}", GRAPH, Stats.of(times), "floor"))

        _, before = launch("top_k", 1, 1)
        kind = "top_k" if metric == GRAPH else "behind_others"
        times, after = launch(kind, launches, self.settings.replays)
        last = first_rows[(launches - 1) % len(first_rows)]
        verified = self._verify_all(
            case,
            batch,
            "cuda",
            [(before.values, before.indices, 0), (after.values, after.indices, last)],
        )
        records.append(self._record(case, "cuda", metric, Stats.of(times), verified))
        return records

    def _rotation(self, case: Case, batch: Batch) -> tuple[list[int], int] | None:
        """First rows of the parts that launches rotate over, and the launches per graph."""
        host_lengths, _ = batch.lengths(case)
        num_parts = batch.num_rows // case.rows
        part_bytes = int(host_lengths[: case.rows].sum()) * batch.operand.dtype.itemsize
        if min(num_parts, MAX_COLD_LAUNCHES) * part_bytes < COLD_BYTES:
            self._say(f"skipped {case}: it is too small to be kept out of the L2 cache")
            return None
        # Whole turns, so that a replay follows its predecessor as a launch follows another.
        used_parts = min(num_parts, MAX_COLD_LAUNCHES, max(2, -(-COLD_BYTES // part_bytes)))
        launches = used_parts * -(-self.settings.launches // used_parts)
        return [part * case.rows for part in range(used_parts)], launches

    def _torch(self, case: Case, batch: Batch, name: str) -> list[Record]:
        import torch

        _, lengths = batch.lengths(case)
        try:
            chain = TorchChain(name, case, batch.operand, lengths)
            before = chain.once()
            times, after, is_graph = chain.time(
                launches=self.settings.launches,
                replays=self.settings.replays,
                budget_s=self.settings.budget_s,
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            # What others' libraries do not support must not end the run.
            self._say(f"{name} failed on {case}: {type(error).__name__}: {str(error)[:200]}")
            return []
        finally:
            torch.cuda.empty_cache()
        verified = self._verify_all(case, batch, name, [(*before, 0), (*after, 0)])
        metric = GRAPH if is_graph else STREAM
        return [self._record(case, name, metric, Stats.of(times), verified)]

    # --- jit_chain_us and call_us -----------------------------------------------------------------

    def _in_jit(
        self, case: Case, batch: Batch, metric: str, names: tuple[str, ...]
    ) -> list[Record]:
        operand = batch.rows(case.rows)
        lengths = wait(batch.lengths(case)[1][: case.rows])
        given = None if case.length == "full" and metric == CALL else lengths
        calls: dict[str, Callable[[], Any]] = {}
        steps: dict[str, int] = {}
        for name in names:
            plan = case.plan if name == "cuda" else ""
            select = implementations.selector(name, case.k, case.output, plan)
            if metric == CALL:
                calls[name] = _waiting(implementations.call_function(select), 1, operand, given)
            else:
                steps[name] = implementations.CHAIN_STEPS.get(
                    name, implementations.DEFAULT_CHAIN_STEPS
                )
                chain = implementations.chain_function(select, steps[name])
                calls |= self._chained(name, chain, operand, lengths)
        floor = (case.rows, case.k, case.dtype, case.width)
        if (
            metric == JIT
            and self.platform == "gpu"
            and "cuda" in names
            and (floor not in self._floors)
        ):
            self._floors.add(floor)
            name = "dependency_floor"
            steps[name] = implementations.CHAIN_STEPS[name]
            indices = jnp.zeros((case.rows, case.k), jnp.int32)
            chain = implementations.dependency_function(steps[name])
            calls |= self._chained(name, chain, indices, lengths)

        checked = {name: name if metric == CALL else f"{name}/1" for name in names}
        before = {name: _result(calls[call]()) for name, call in checked.items()}
        samples = interleave(
            calls,
            budget_s=self.settings.budget_s * len(calls),
            min_rounds=self.settings.min_rounds,
            max_rounds=self.settings.max_rounds,
        )
        records = []
        for name in (*names, *(name for name in steps if name not in names)):
            if metric == CALL:
                stats = Stats.of(samples[name])
            else:
                few, many = implementations.CHAIN_CALLS
                more = (many - few) * steps[name]
                stats = Stats.of(slopes(samples[f"{name}/0"], samples[f"{name}/1"], more))
            verified = "floor"
            if name in names:
                after = _result(calls[checked[name]]())
                verified = self._verify_all(case, batch, name, [(*before[name], 0), (*after, 0)])
            records.append(self._record(case, name, metric, stats, verified))
        return records

    def _chained(
        self, name: str, chain: Callable[..., Any], operand: Any, lengths: Any
    ) -> dict[str, Callable[[], Any]]:
        """The calls whose slope is the time of a step."""
        return {
            f"{name}/{index}": implementations.chained_calls(
                chain, count, operand, lengths, occupy=self.platform == "gpu"
            )
            for index, count in enumerate(implementations.CHAIN_CALLS)
        }

    # --- proof ------------------------------------------------------------------------------------

    def _verify_all(
        self,
        case: Case,
        batch: Batch,
        name: str,
        results: Sequence[tuple[Any, Any, int]],
    ) -> str:
        """Checks (values, indices, first row of the batch) each; returns the `verified` field."""
        verdict = ""
        for moment, (values, indices, first_row) in zip(("before", "after"), results, strict=True):
            num_wrong, verdict, flaw = self._verify(case, batch, name, values, indices, first_row)
            if num_wrong:
                self._say(f"WRONG {moment} timing: {name} on {case}: {flaw}")
                return f"WRONG{num_wrong}"
        return verdict

    def _verify(
        self, case: Case, batch: Batch, name: str, values: Any, indices: Any, first_row: int
    ) -> tuple[int, str, str]:
        """Returns the number of wrong rows, what was checked, and what is wrong."""
        order = implementations.order_of(name, case.output)
        _, lengths = batch.lengths(case)
        if self.platform == "cpu" and case.rows * case.width <= ORACLE_ENTRIES:
            wrong = self._against_oracle(case, batch, order, values, indices, range(case.rows), 0)
            return len(wrong), "oracle", f"rows {wrong[:8]} differ from the oracle"

        max_rows = batch.num_rows
        operand = batch.operand
        if case.cold:
            max_rows = int(indices.shape[0])
            turn = (first_row + np.arange(max_rows)) % batch.num_rows
            operand = jnp.take(operand, jnp.asarray(turn), axis=0)
            lengths = lengths[:max_rows]
        if indices.shape[0] != max_rows:
            values, indices = _padded(values, indices, max_rows)
        flaws = np.asarray(
            certificate.certify(operand, lengths, case.rows, values, indices, order=order)
        )
        if flaws.any():
            return int(np.count_nonzero(flaws)), "certificate", certificate.describe(flaws)
        if order == certificate.ANY:
            return 0, "certificate", ""
        sample = sorted({0, case.rows - 1})
        wrong = self._against_oracle(case, batch, order, values, indices, sample, first_row)
        flaw = f"rows {wrong} differ from the oracle, though the certificate holds"
        return len(wrong), "certificate+oracle", flaw

    def _against_oracle(
        self,
        case: Case,
        batch: Batch,
        order: str,
        values: Any,
        indices: Any,
        rows: Sequence[int],
        first_row: int,
    ) -> list[int]:
        """The rows of a sample whose result is not, bit for bit, the oracle's."""
        host_lengths, _ = batch.lengths(case)
        host_indices = np.asarray(indices)
        host_values = None if values is None else np.asarray(values)
        wrong = []
        for row in rows:
            best_values, best_indices = batch.best(
                first_row + row, int(host_lengths[row]), case.k, order == certificate.BEST_FIRST
            )
            same = np.array_equal(host_indices[row], best_indices)
            if host_values is not None:
                same = same and host_values[row].tobytes() == best_values.tobytes()
            if not same:
                wrong.append(int(row))
        return wrong

    def _record(self, case: Case, name: str, metric: str, stats: Stats, verified: str) -> Record:
        label = inputs.distribution_label(case.distribution)
        plan = case.plan if name == "cuda" else ""
        case = dataclasses.replace(case, distribution=label, plan=plan)
        return Record.of_case(case, name, metric, stats.median, verified, stats.as_dict())


def _waiting(function: Callable[..., Any], awaited: int, *arguments: Any) -> Callable[[], Any]:
    """A call that returns its results when the one at index `awaited`, and so all, are ready.

    Results are dropped before the next call, so that XLA's allocator hands out the same addresses
    and a recorded command buffer stays valid.
    """

    def call() -> Any:
        results = function(*arguments)
        results[awaited].block_until_ready()
        return results

    return call


def _result(returned: Any) -> tuple[Any, Any]:
    """(values or None, indices) of a selection or of a chain."""
    first, second = returned
    return second if isinstance(second, tuple) else (first, second)


def _padded(values: Any, indices: Any, rows: int) -> tuple[Any, Any]:
    """Fills results up to `rows` rows with poison, so that one compiled certificate serves all."""

    def pad(array: Any, poison: float) -> Array:
        host = np.asarray(array)
        full = np.full((rows, *host.shape[1:]), poison, host.dtype)
        full[: host.shape[0]] = host
        return jnp.asarray(full)

    padded_values = None if values is None else pad(values, certificate.POISON_VALUE)
    return padded_values, pad(indices, certificate.POISON)


# --- progress -------------------------------------------------------------------------------------


class Progress(_progress.Progress):
    """Counts cells."""

    def __init__(self, total: int):
        """Starts at 0 of `total` cells."""
        super().__init__(total, "cell")

    def step(self, records: Sequence[Record]) -> None:
        """Counts a cell."""
        latest = ""
        if records:
            record = records[-1]
            latest = f"{record.implementation} {record.case}: {record.us:.2f} us"
        is_last = self._done + 1 == self._total
        self.advance(1, "{done}/{total} cells", latest, is_last=is_last)
