"""The bench: its proof of results, its inputs, its timing, its judgements and its command line.

Everything runs on the CPU; launches in a CUDA graph are played by `FakeCuda`, which reads and
writes the very buffers that the bench hands to the native module, by address.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_topk.bench import (
    __main__ as command,
)
from jax_topk.bench import (
    cases,
    certificate,
    compare,
    goals,
    implementations,
    inputs,
    oracle,
    peers,
    plot,
    report,
    results,
    runner,
    tables,
    timing,
)
from jax_topk.bench.cases import CALL, GRAPH, JIT, OTHERS, Block, Case
from jax_topk.bench.results import Record, Results


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Arrays live on the CPU, on a machine with a GPU too."""
    monkeypatch.setattr(command, "_platform", lambda: ("cpu", "cpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        yield


# --- certificate ----------------------------------------------------------------------------------

ROWS, WIDTH, K = 4, 1024, 64
LENGTHS = np.array([1024, 300, 64, 7], np.int32)


def certify(operand, values, indices, order, rows=ROWS):
    values = None if values is None else jnp.asarray(values)
    flaws = certificate.certify(
        jnp.asarray(operand),
        jnp.asarray(LENGTHS),
        rows,
        values,
        jnp.asarray(indices),
        order=order,
    )
    return np.asarray(flaws)


@functools.cache
def float32_values(name, rows=ROWS, width=WIDTH, k=K):
    """Values of a distribution, compiled and made once."""
    return np.asarray(inputs.make_values(name, rows, width, k, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("best_first", [False, True])
def test_certificate_accepts_the_oracle_on_every_distribution(dtype, best_first):
    order = certificate.BEST_FIRST if best_first else certificate.ASCENDING
    for distribution in inputs.GENERATORS:
        operand = float32_values(distribution).astype(jnp.dtype(dtype))
        values, indices = oracle.top_k(operand, K, lengths=LENGTHS, sorted=best_first)
        assert not certify(operand, values, indices, order).any(), distribution
        assert not certify(operand, values, indices, certificate.ANY).any(), distribution


def test_certificate_accepts_exactly_the_oracle_among_all_results():
    """Every ascending pair of every row of width 5 over three values, ties included."""
    operand = np.array(list(itertools.product((-1.0, 0.0, 2.0), repeat=5)), np.float32)
    lengths = np.tile(np.arange(6, dtype=np.int32), -(-len(operand) // 6))[: len(operand)]
    pairs = [*itertools.combinations(range(5), 2), *((i, -1) for i in range(5)), (-1, -1)]
    expected = oracle.top_k_indices(operand, 2, lengths=lengths)
    num_accepted = 0
    for pair in pairs:
        indices = np.tile(np.array(pair, np.int32), (len(operand), 1))
        flaws = certificate.certify(
            jnp.asarray(operand),
            jnp.asarray(lengths),
            len(operand),
            None,
            jnp.asarray(indices),
            order=certificate.ASCENDING,
        )
        is_right = (expected == indices).all(1)
        np.testing.assert_array_equal(np.asarray(flaws) == 0, is_right)
        num_accepted += int(is_right.sum())
    assert num_accepted == len(operand)


def test_certificate_names_each_flaw():
    operand = np.round(float32_values("normal"), 1)
    values, indices = oracle.top_k(operand, K, lengths=LENGTHS, sorted=False)
    best_values, best_indices = oracle.top_k(operand, K, lengths=LENGTHS, sorted=True)
    pivot = best_values[0, -1]
    unnamed = np.setdiff1d(np.arange(WIDTH), indices[0])
    later_tie = next(i for i in unnamed if operand[0, i] == pivot)

    def flaw(change, order=certificate.ASCENDING, rows=ROWS):
        is_best = order == certificate.BEST_FIRST
        v, i = (a.copy() for a in ((best_values, best_indices) if is_best else (values, indices)))
        change(v, i)
        return certify(operand, v, i, order, rows)

    def miss_one(v, i):
        """The lowest of row 0 instead of its best."""
        worst = int(np.argmin(operand[0]))
        row = np.where(i[0] == best_indices[0, 0], worst, i[0])
        i[0] = np.sort(row)
        v[0] = operand[0, i[0]]

    def later_of_two_ties(v, i):
        row = np.where(i[0] == best_indices[0, -1], later_tie, i[0])
        i[0] = np.sort(row)
        v[0] = operand[0, i[0]]

    def swap(v, i):
        for a in (v, i):
            a[1, [3, 9]] = a[1, [9, 3]]

    def repeat(v, i):
        v[1, 5], i[1, 5] = v[1, 4], i[1, 4]

    def outside(v, i):
        """Row 2 has 64 valid entries; index 64 is the first after its window."""
        i[2, -1] = 64
        v[2, -1] = operand[2, 64]

    def pad_with_index(v, i):
        i[3, -1] = 500

    def flip_value(v, i):
        v.view(np.uint32)[1, 2] ^= 1

    def pad_with_zero(v, i):
        v[3, -1] = 0

    nothing = np.zeros(ROWS, int)
    for change, row, bits in (
        (miss_one, 0, 4),
        (later_of_two_ties, 0, 4),
        (swap, 1, 2),
        (repeat, 1, 2),
        (outside, 2, 1),
        (pad_with_index, 3, 1),
        (flip_value, 1, 8),
        (pad_with_zero, 3, 8),
    ):
        found = flaw(change)
        assert found[row] & bits, change.__name__
        assert not np.delete(found, row).any(), change.__name__
        assert certificate.FLAWS[bits] in certificate.describe(found)
    assert flaw(swap, certificate.BEST_FIRST)[1] & 2
    assert flaw(later_of_two_ties)[0] == 4
    assert not certify(operand, None, np.sort(indices, 1)[:, ::-1], certificate.ANY).any()
    np.testing.assert_array_equal(flaw(lambda v, i: None), nothing)

    # Rows after the last one must still hold the poison.
    def poison(v, i):
        v[2:], i[2:] = certificate.POISON_VALUE, certificate.POISON

    assert not flaw(poison, rows=2).any()
    np.testing.assert_array_equal(flaw(lambda v, i: None, rows=2), [0, 0, 16, 16])
    assert flaw(poison, rows=3)[2]


# --- inputs ---------------------------------------------------------------------------------------


def test_distributions_are_what_their_names_say():
    def make(name):
        return float32_values(name)

    assert (make("equal") == 1).all()
    assert (np.diff(make("sorted"), axis=1) >= 0).all()
    assert (np.diff(make("sorted_desc"), axis=1) <= 0).all()
    assert abs(make("clust").mean() - 10) < 0.05
    coarse_bins = {np.float16(x).view(np.uint16) >> 5 for x in make("clust")[0]}
    assert len(coarse_bins) < 10
    head = make("head")
    assert head[:, : 2 * K].min() > head[:, 2 * K :].max()
    periodic = make("periodic:32:5")
    assert periodic[:, 5::32].min() > np.delete(periodic, np.s_[5::32], 1).max()
    hidden = make("hidden:32")
    assert hidden[:, ::32].max() < np.delete(hidden, np.s_[::32], 1).min()
    striped = make("striped:64:4").reshape(ROWS, -1, 4, 64)
    assert striped[:, :, 0].min() > striped[:, :, 1:].max()
    for name in inputs.GENERATORS:
        assert make(name).shape == (ROWS, WIDTH)
        assert np.isfinite(make(name)).all()
    np.testing.assert_array_equal(
        np.asarray(inputs.make_values("normal", ROWS, WIDTH, K, "float32")), make("normal")
    )
    assert inputs.make_values("equal", 2, 8, 1, "bfloat16").dtype == jnp.bfloat16


def test_relu_has_a_plateau_of_zeros_across_the_threshold_at_every_length():
    values = float32_values("relu", k=256)
    assert (values >= 0).all()
    for length in (300, 512, 1024):
        num_positive = (values[:, :length] > 0).sum(1)
        assert (num_positive < 256).all()
        assert (num_positive > 0).all()
    assert not np.signbit(values).any()


def test_lengths():
    mixed = inputs.make_lengths("mixed", 256, 163840)
    assert mixed.dtype == np.int32
    assert mixed.min() >= 1024
    assert mixed.max() <= 163840
    assert mixed.min() < 1400
    assert mixed.max() > 120000
    # Log-uniform: as many below the geometric middle as above it.
    assert 90 < (mixed < np.sqrt(1024 * 163840)).sum() < 166
    np.testing.assert_array_equal(inputs.make_lengths("mixed", 8, 163840), mixed[:8])
    np.testing.assert_array_equal(inputs.make_lengths("full", 2, 512), [512, 512])
    np.testing.assert_array_equal(inputs.make_lengths(100, 2, 512), [100, 100])
    with pytest.raises(ValueError, match="'mxied' is unknown"):
        inputs.make_lengths("mxied", 2, 512)


def test_distribution_from_a_file(tmp_path):
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "s.npy", scores)
    name = f"attention={tmp_path / 's.npy'}"
    values = np.asarray(inputs.make_values(name, 5, 6, 2, "float32"))
    np.testing.assert_array_equal(values[4], np.tile(scores[1], 2)[:6])
    assert inputs.distribution_label(name) == "attention"
    np.save(tmp_path / "flat.npy", scores[0])
    with pytest.raises(ValueError, match=r"save one of \[rows, width\]"):
        inputs.make_values(f"attention={tmp_path / 'flat.npy'}", 5, 6, 2, "float32")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("norml", "choose from normal, clust"),
        ("normal:3", "does not fit the form normal"),
        ("striped:64:x", "the form striped:CHUNK:PERIOD"),
        ("periodic:0", "stride must be at least 1"),
        ("a=missing.npy", "there is no file 'missing.npy'"),
    ],
)
def test_bad_distributions_are_explained(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        inputs.check_distribution(text)


# --- cases ----------------------------------------------------------------------------------------


def test_the_default_grid_is_the_documented_one():
    grid = list(Block(distributions=("normal",)).cases())
    assert len(grid) == 9 * 10
    assert {case.rows for case in grid} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert {case.length for case in grid} == {
        *(2048, 4096, 8192, 16384, 32768, 65536, 96000, 128000, 163840),
        "mixed",
    }
    assert all(
        (case.k, case.width, case.dtype, case.output) == (2048, 163840, "float32", "indices")
        for case in grid
    )
    assert Block().distributions == ("normal", "clust", "equal", "sorted")


def test_blocks_leave_out_what_does_not_fit():
    block = Block(rows=(1,), lengths=(128, 512, "mixed"), distributions=("normal",), ks=(8, 300))
    block = dataclasses.replace(block, width=256)
    assert [(case.length, case.k) for case in block.cases()] == [(128, 8), ("mixed", 8)]
    assert block.num_skipped() == 4


def test_cpu_suite_holds_the_grid_of_the_cpu_target():
    held = {
        (case.rows, case.width, case.k)
        for block in cases.cpu_suite()
        for case in block.cases()
        if case.length == "full" and case.distribution == "normal"
    }
    widths = (128, 512, 1024, 4096, 16384, 163840)
    assert held == {
        (rows, width, k)
        for rows in (1, 4, 32, 256)
        for width in widths
        for k in (1, 8, 16, 64, 512, 2048)
        if k <= width
    }


# --- timing ---------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds

        return call


def test_interleave_takes_turns_and_repeats_short_calls():
    clock = Clock()
    calls = {"slow": clock.work("slow", 1e-3), "fast": clock.work("fast", 20e-6)}
    samples = timing.interleave(calls, budget_s=1e9, min_rounds=1, max_rounds=4, clock=clock)
    np.testing.assert_allclose(samples["slow"], [1000] * 4)
    np.testing.assert_allclose(samples["fast"], [20] * 4)
    turns = [name for name, _ in itertools.groupby(clock.log[4:])]
    # Who goes first alternates, so two turns of one call meet at the border of two rounds.
    assert turns == ["slow", "fast", "slow", "fast", "slow"]
    assert clock.log[4:].count("fast") == 4 * 5


def test_interleave_keeps_to_its_budget_but_takes_the_least_rounds():
    clock = Clock()
    samples = timing.interleave(
        {"a": clock.work("a", 1.0)}, budget_s=2.5, min_rounds=1, max_rounds=99, clock=clock
    )
    assert len(samples["a"]) == 3
    samples = timing.interleave(
        {"a": clock.work("a", 1.0)}, budget_s=0.0, min_rounds=7, max_rounds=99, clock=clock
    )
    assert len(samples["a"]) == 7


def test_slope_leaves_out_what_both_chains_share():
    per_step, overhead = 3.0, np.array([40.0, 55.0, 900.0])
    short, long = overhead + 16 * per_step, overhead + 80 * per_step
    np.testing.assert_allclose(timing.slopes(short, long, 64), per_step)
    with pytest.raises(ValueError, match="the long chain must be longer"):
        timing.slopes(short, long, 0)


def test_stats():
    stats = timing.Stats.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (stats.n, stats.min, stats.median, stats.max) == (5, 1.0, 3.0, 100.0)
    assert stats.as_dict()["q75"] == 4.0


@pytest.mark.parametrize("name", ["lax", "cpu"])
def test_no_step_of_a_chain_is_folded_away(name):
    operand = inputs.make_values("normal", 2, 512, 8, "float32")
    lengths = jnp.array([512, 100], jnp.int32)
    select = implementations.selector(name, 8, "indices")
    marks = {"lax": ("TopK", " sort("), "cpu": ("jax_topk_v1",)}[name]

    def count(steps):
        chain = implementations.chain_function(select, steps)
        text = chain.lower(operand, lengths).compile().as_text()
        return max(
            sum(mark in line and "custom_call_target" in line for line in text.splitlines())
            if mark != " sort("
            else text.count(mark)
            for mark in marks
        )

    assert count(3) == 3 * count(1) > 0
    end, (values, indices) = implementations.chain_function(select, 3)(operand, lengths)
    assert values is None
    np.testing.assert_array_equal(end, lengths)
    np.testing.assert_array_equal(
        np.sort(indices), oracle.top_k_indices(np.asarray(operand), 8, lengths=np.asarray(lengths))
    )


def has_gpu():
    return jax.default_backend() == "gpu"


@pytest.mark.gpu
@pytest.mark.skipif("not has_gpu()")
def test_steps_of_the_dependency_floor_are_kernels_of_their_own():
    device = jax.devices()[0]
    indices = jax.device_put(jnp.zeros((4, 64), jnp.int32), device)
    lengths = jax.device_put(jnp.full(4, 100, jnp.int32), device)

    def num_kernels(steps):
        chain = implementations.dependency_function(steps)
        text = chain.lower(indices, lengths).compile().as_text()
        return text.count(" fusion("), text.count(" copy(")

    short, long = num_kernels(2), num_kernels(7)
    assert (long[0] - short[0], long[1] - short[1]) == (5, 0)


@pytest.mark.gpu
@pytest.mark.skipif("not has_gpu()")
def test_kernels_on_a_gpu_are_timed_in_a_chain_behind_others_and_in_jit(tmp_path):
    path = tmp_path / "bench.json"
    metrics = f"{GRAPH},{OTHERS},{JIT}"
    done = subprocess.run(
        [sys.executable, "-m", "jax_topk.bench", "--implementation", "cuda", "--metric", metrics]
        + ["--rows", "2", "--length", "8192", "--json", str(path)],
        # This process has most of the memory already.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = results.load(path).records
    us = {record.metric: record.us for record in records if record.implementation == "cuda"}
    # Behind others, data and instructions come from memory: 4 and 9 us on an H200.
    assert 1 < us[GRAPH] < us[OTHERS] < 100
    # 5 us alone on an H200, and up to 11 where other tests share the GPU.
    assert 1 < us[JIT] < 100
    assert any(record.implementation == "dependency_floor" for record in records)


# --- the runner, with a CUDA module of its own ----------------------------------------------------


class FakeCuda:
    """Plays `jax_topk._cuda`: exact, by the oracle, on buffers given by address.

    `spoil(values, indices, is_timed)` may change what a launch writes; the arrays are views of the
    whole output buffers, rows after the last one included.
    """

    def __init__(self, buffer_rows, spoil=None):
        self.buffer_rows = buffer_rows
        self.spoil = spoil
        self.calls = []

    @staticmethod
    def view(address, shape, dtype):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def graph_chain(
        self,
        kind,
        operand,
        starts,
        lengths,
        values,
        indices,
        rows,
        width,
        k,
        dtype,
        smallest,
        is_sorted,
        plan,
        launches,
        replays,
        device,
    ):
        operands = [operand] if isinstance(operand, int) else operand
        self.calls.append((kind, operands, plan, launches, replays))
        assert (smallest, device) == (False, 0)
        if kind in ("top_k", "behind_others"):
            operand = operands[(launches - 1) % len(operands)]
            x = self.view(operand, (rows, width), jnp.dtype(dtype))
            row_starts = self.view(starts, (rows,), np.int32)
            row_lengths = self.view(lengths, (rows,), np.int32)
            right = oracle.top_k(x, k, row_starts, row_lengths, sorted=is_sorted)
            all_indices = self.view(indices, (self.buffer_rows, k), np.int32)
            all_indices[:rows] = right[1]
            all_values = None
            if values:
                all_values = self.view(values, (self.buffer_rows, k), jnp.dtype(dtype))
                all_values[:rows] = right[0]
            if self.spoil:
                self.spoil(all_values, all_indices, replays > 1)
        us = {"empty": 0.9, "read": 1.7, "top_k": 4.0, "behind_others": 5.0}[kind]
        return [us + 0.01 * i for i in range(replays)]


FAKE_BLOCK = Block(
    rows=(1, 3),
    lengths=(40, 500, "mixed"),
    distributions=("normal",),
    ks=(64,),
    width=1024,
    implementations=("cuda",),
    metrics=(GRAPH,),
)
QUICK = runner.Settings(launches=5, replays=4, budget_s=0.0, min_rounds=2, max_rounds=2)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Makes a runner for a GPU that is not there; returns (runner, fake, lines said)."""

    def start(block, spoil=None, buffer_rows=None):
        fake = FakeCuda(buffer_rows or max(block.rows), spoil)
        monkeypatch.setattr(implementations, "cuda_module", lambda: fake)
        monkeypatch.setattr(implementations, "unavailable", lambda name, platform: None)
        lines = []
        return runner.Runner("gpu", QUICK, lines.append), fake, lines

    return start


def run(bench_runner, *blocks):
    return [record for records in bench_runner.run(blocks) for record in records]


@pytest.mark.parametrize(
    ("output", "dtype"),
    [("indices", "float32"), ("values_sorted", "float32"), ("values_unsorted", "bfloat16")],
)
def test_graph_cells_are_timed_and_proven(fake_gpu, output, dtype):
    block = dataclasses.replace(FAKE_BLOCK, outputs=(output,), dtypes=(dtype,), plan="path=exact")
    bench_runner, fake, lines = fake_gpu(block)
    records = run(bench_runner, block)
    assert not lines
    assert [(r.rows, r.length) for r in records] == list(
        itertools.product((1, 3), (40, 500, "mixed"))
    )
    for record in records:
        assert record.verified == "certificate+oracle"
        assert record.us == pytest.approx(4.015)  # the median of 4.00 ... 4.03
        assert (record.metric, record.output, record.plan) == (GRAPH, output, "path=exact")
        assert record.samples["n"] == 4
    # A check before timing, and the timed launches, whose result is checked as well.
    assert [call[2:] for call in fake.calls] == [("path=exact", 1, 1), ("path=exact", 5, 4)] * 6


def test_cells_behind_other_kernels_are_timed_and_proven(fake_gpu):
    block = dataclasses.replace(FAKE_BLOCK, lengths=(500,), metrics=(OTHERS, GRAPH))
    bench_runner, fake, lines = fake_gpu(block)
    records = run(bench_runner, block)
    assert not lines
    ours = [r for r in records if r.implementation == "cuda"]
    assert [(r.rows, r.metric) for r in ours] == [(1, GRAPH), (1, OTHERS), (3, GRAPH), (3, OTHERS)]
    assert [r.us for r in ours] == pytest.approx([4.015, 5.015] * 2)
    assert {r.verified for r in ours} == {"certificate+oracle"}
    kinds = [call[0] for call in fake.calls]
    assert kinds == ["empty", "read", "top_k", "top_k", "top_k", "behind_others"] * 2
    tables.print_tables(records, lines.append)
    assert any("cuda behind others" in line for line in lines)


def test_a_wrong_result_behind_other_kernels_is_found(fake_gpu):
    def spoil(values, indices, is_timed):
        if is_timed:
            indices[0, 0] = indices[0, 1]

    block = dataclasses.replace(FAKE_BLOCK, rows=(1,), lengths=(500,), metrics=(OTHERS,))
    bench_runner, _, lines = fake_gpu(block, spoil)
    assert [r.verified for r in run(bench_runner, block)] == ["WRONG1"]
    assert "WRONG after timing: cuda" in lines[0]


def test_floors_are_timed_once_per_shape(fake_gpu):
    block = dataclasses.replace(FAKE_BLOCK, distributions=("normal", "equal"))
    bench_runner, _, _ = fake_gpu(block)
    records = run(bench_runner, block)
    for name, us in (("floor_empty", 0.915), ("floor_read", 1.715)):
        floors = [r for r in records if r.implementation == name]
        assert len(floors) == 6
        assert all(r.us == pytest.approx(us) and r.verified == "floor" for r in floors)
    assert len([r for r in records if r.implementation == "cuda"]) == 12
    lines = []
    tables.print_tables(records, lines.append)
    assert any("read floor" in line and "ours/floor" in line for line in lines)
    assert any(line.split()[-3:] == ["1.72", "2.34x", "yes"] for line in lines), lines


def refuse(values, indices, is_timed):
    raise RuntimeError("cluster=16 does not fit 40 entries; pass cluster=1")


def test_a_plan_that_is_illegal_for_a_shape_skips_it_but_a_failing_kernel_stops(fake_gpu):
    block = dataclasses.replace(FAKE_BLOCK, lengths=(40,), plan="cluster=16")
    bench_runner, _, lines = fake_gpu(block, refuse)
    assert run(bench_runner, block) == []
    assert len(lines) == 2
    assert "skipped 1 x 40" in lines[0]
    assert "pass cluster=1" in lines[0]
    with pytest.raises(RuntimeError, match="pass cluster=1"):
        run(bench_runner, dataclasses.replace(block, plan=""))


def lose_one(values, indices, is_timed):
    indices[0, :-1] = indices[0, 1:].copy()
    indices[0, -1] = 499


def lose_one_under_load(values, indices, is_timed):
    if is_timed:
        lose_one(values, indices, is_timed)


def write_too_far(values, indices, is_timed):
    indices[2, 5] = 0


def write_nothing(values, indices, is_timed):
    indices[:] = certificate.POISON


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose_one, "WRONG before timing"),
        (lose_one_under_load, "WRONG after timing"),
        (write_too_far, "memory beyond the last row was written"),
        (write_nothing, "an index is outside the window"),
    ],
)
def test_a_wrong_kernel_is_caught(fake_gpu, spoil, said):
    block = dataclasses.replace(FAKE_BLOCK, rows=(2, 3), lengths=(500,))
    bench_runner, _, lines = fake_gpu(block, spoil)
    record = next(r for r in run(bench_runner, block) if r.implementation == "cuda")
    assert record.is_wrong
    assert record.verified in ("WRONG1", "WRONG2")
    assert said in lines[0]
    assert "cuda on 2 x 500 normal" in lines[0]


def test_cold_launches_rotate_over_the_rows(fake_gpu, monkeypatch):
    monkeypatch.setattr(runner, "POOL_ROWS_COLD", 8)
    monkeypatch.setattr(runner, "COLD_BYTES", 3 * 2 * 500 * 4)
    block = dataclasses.replace(FAKE_BLOCK, rows=(2,), lengths=(40, 500), cold=True)
    bench_runner, fake, lines = fake_gpu(block, buffer_rows=8)
    records = run(bench_runner, block)
    assert len(lines) == 1
    assert "skipped 2 x 40" in lines[0]
    assert {r.implementation for r in records} == {"floor_empty", "floor_read", "cuda"}
    assert all(r.cold and not r.is_wrong for r in records)
    kind, operands, _, launches, _ = fake.calls[-1]
    assert kind == "top_k"
    assert np.diff(operands).tolist() == [2 * 1024 * 4] * 2  # three parts of two rows
    assert launches == 6  # whole turns, at least the five that were asked for


def test_cold_results_are_checked_against_the_part_of_the_last_launch(fake_gpu, monkeypatch):
    monkeypatch.setattr(runner, "POOL_ROWS_COLD", 8)
    monkeypatch.setattr(runner, "COLD_BYTES", 3 * 2 * 500 * 4)
    block = dataclasses.replace(FAKE_BLOCK, rows=(2,), lengths=(500,), cold=True)

    def one_launch_less(values, indices, is_timed):
        if is_timed:
            indices[:2] = first_part["indices"]
        else:
            first_part["indices"] = indices[:2].copy()

    first_part = {}
    bench_runner, _, lines = fake_gpu(block, one_launch_less, buffer_rows=8)
    assert any(r.is_wrong for r in run(bench_runner, block))
    assert "WRONG after timing" in lines[0]


def test_chains_in_jit_come_with_their_floor(fake_gpu, monkeypatch):
    real = implementations.selector

    def on_xla(name, *rest):
        return real({"cuda": "xla"}.get(name, name), *rest)

    monkeypatch.setattr(implementations, "selector", on_xla)
    monkeypatch.setattr(implementations, "CHAIN_STEPS", {"cuda": 2, "dependency_floor": 2})
    monkeypatch.setattr(implementations, "_OCCUPY_SIDE", 4)
    block = dataclasses.replace(
        FAKE_BLOCK, rows=(2,), lengths=(40, 500), implementations=("cuda", "lax"), metrics=(JIT,)
    )
    bench_runner, _, lines = fake_gpu(block)
    records = run(bench_runner, block)
    assert not lines
    assert [r.implementation for r in records] == ["cuda", "lax", "dependency_floor", "cuda", "lax"]
    assert {r.verified for r in records} == {"certificate+oracle", "floor"}


def test_chained_calls_run_as_many_steps_as_they_say(monkeypatch):
    monkeypatch.setattr(implementations, "_OCCUPY_SIDE", 4)
    lengths = jnp.array([7, 5, 0], jnp.int32)

    def chain(operand, lengths):
        return lengths + operand, lengths

    for count in (1, 4):
        for occupy in (False, True):
            call = implementations.chained_calls(chain, count, jnp.int32(2), lengths, occupy=occupy)
            end, before = call()
            np.testing.assert_array_equal(end, lengths + 2 * count)
            np.testing.assert_array_equal(before, end - 2)


def test_natural_metrics_put_the_kernel_next_to_lax(fake_gpu):
    block = dataclasses.replace(FAKE_BLOCK, implementations=(), metrics=())
    bench_runner, _, _ = fake_gpu(block)
    assert bench_runner.participants(block) == {
        GRAPH: ("cuda", "torch", "flashinfer"),
        JIT: ("cuda", "lax"),
    }


def test_a_library_that_fails_does_not_end_the_run(fake_gpu, monkeypatch):
    class Torch:
        class cuda:
            @staticmethod
            def empty_cache():
                pass

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(__import__("sys").modules, "torch", Torch)
    monkeypatch.setattr(runner, "TorchChain", fail)
    block = dataclasses.replace(
        FAKE_BLOCK, rows=(2,), lengths=(40,), implementations=("torch", "cuda")
    )
    bench_runner, _, lines = fake_gpu(block)
    records = run(bench_runner, block)
    assert [r.implementation for r in records] == ["floor_empty", "floor_read", "cuda"]
    assert lines == [
        "torch failed on 2 x 40 normal k=64 float32 width=1024: RuntimeError: operation not "
        "permitted when stream is capturing"
    ]


# --- records --------------------------------------------------------------------------------------


def record(us=4.0, implementation="cuda", metric=GRAPH, spread=0.0, **fields):
    case = Case(1, 4096, "normal", 2048, "float32", "indices", 163840)
    case = dataclasses.replace(case, **fields)
    samples = {"n": 50, "q25": us * (1 - spread), "q75": us * (1 + spread)}
    return Record.of_case(case, implementation, metric, us, "certificate+oracle", samples)


def test_results_survive_the_file(tmp_path):
    found = Results({"gpu": "H100"}, [record(), record(length="mixed", cold=True)])
    found.save(tmp_path / "deep" / "r.json")
    again = results.load(tmp_path / "deep" / "r.json")
    assert again == found
    again.merge([record(us=5.0), record(rows=2)])
    assert [(r.rows, r.us) for r in again.records] == [(1, 5.0), (1, 4.0), (2, 4.0)]


@pytest.mark.parametrize("text", ["", "[]", '{"header": {}, "records": [{"rows": 1}]}'])
def test_a_file_that_holds_no_results_is_explained(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a file of bench results"):
        results.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        results.load(tmp_path / "none.json")


def test_header_says_where_results_come_from():
    header = results.make_header("cpu", "cpu", {"launches": 20})
    assert {"gpu", "driver", "jax", "jaxlib", "jax_topk", "python", "commit", "dirty", "date"} <= (
        header.keys()
    )
    assert header["jax"] == jax.__version__
    assert header["settings"] == {"launches": 20}


def test_a_change_counts_beyond_the_noise_of_both_runs():
    def verdict(old, new, spread=0.0):
        return compare.Change(record(old, spread=spread), record(new, spread=spread)).verdict

    assert verdict(100, 101.9) == verdict(100, 98.1) == "same"
    assert verdict(100, 102.1) == "slower"
    assert verdict(100, 97.9) == "faster"
    assert verdict(100, 110, spread=0.05) == "same"
    assert verdict(100, 120, spread=0.05) == "slower"


def test_comparison_reports_moves_and_other_machines():
    old = Results({"gpu": "H100", "commit": "a"}, [record(4.0), record(8.0, rows=2)])
    new = Results({"gpu": "H200"}, [record(5.0), record(8.0, rows=2), record(1.0, rows=4)])
    lines = []
    assert compare.print_comparison(old, new, lines.append) == 1
    text = "\n".join(lines)
    assert "2 common records" in text
    assert "gpu differs: H100 -> H200" in text
    assert "0 faster, 1 within noise, 1 slower" in text
    assert "1.250" in text


PEERS = """\
implementation,l2,distribution,rows,length,k,chain_us,single_replay_us,verified
floor_empty,warm,normal,1,4096,2048,0.9,1.7,OK
vllm37421_persist,warm,normal,1,4096,2048,7.6,8,OK
sgl_v2_pdl,warm,normal,1,4096,2048,2.8,4,OK
sgl_v2_pdl,warm,clust,1,4096,2048,2.9,4,WRONG1
vllm33_coop,warm,normal,1,4096,2048,3.1,4,OK
vllm33_coop,warm,clust,1,4096,2048,6.2,7,OK
torch,warm,normal,1,4096,2048,,7,OK
sgl_v2_pdl,warm,normal,1,2048,2048,0.8,2,OK
sgl_v2,warm,normal,1,2048,2048,1.2,2,OK
fi,warm,normal,4,mixed,2048,10,2,OK
"""


def test_peers_count_where_they_are_exact_on_every_distribution(tmp_path):
    path = tmp_path / "peers.csv"
    path.write_text(PEERS)
    times = peers.load(path)
    ours = [
        record(4.0),
        record(3.0, distribution="clust"),
        record(1.0, length=2048),
        record(5.0, rows=4, length="mixed"),
        # Not comparable with the table:
        record(9.0, length=8192),
        record(9.0, output="values_sorted"),
        record(9.0, metric=JIT),
        record(9.0, cold=True),
        record(9.0, plan="path=exact"),
        record(9.0, implementation="lax"),
    ]
    found = peers.duels(ours, times)
    assert [(d.exact.implementation, d.ratio) for d in found] == [
        ("vllm33_coop", 3.1 / 4.0),  # sgl_v2_pdl is wrong on clust
        ("vllm33_coop", 6.2 / 3.0),
        ("sgl_v2", 1.2),  # no programmatic dependent launch where only the launch counts
        ("fi", 2.0),
    ]
    assert found[0].inexact.implementation == "sgl_v2_pdl"
    assert found[0].reference_ratio == 1.9
    lines = []
    assert peers.print_duels(ours, times, lines.append) == 1
    text = "\n".join(lines)
    assert "0.78*" in text
    assert "3 of 4 cells at least as fast, geometric mean 1.40, worst 0.78" in text
    assert "against PR 37421: 1 of 1 cells" in text
    assert "sgl_v2_pdl (inexact)" in text


def test_a_file_that_is_no_table_of_peers_is_explained(tmp_path):
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needs the columns implementation"):
        peers.load(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="there is no file"):
        peers.load(tmp_path / "none.csv")


# --- goals ----------------------------------------------------------------------------------------


def synthetic(block, us):
    """The records that a block would give, timed by `us(name, metric, case)`."""
    for case in block.cases():
        for name in block.implementations:
            for metric in block.metrics:
                if metric == GRAPH and name == "cuda" and case.output == "indices":
                    for floor in ("floor_empty", "floor_read"):
                        yield record(us(floor, GRAPH, case), floor, GRAPH, **vars(case))
                if metric == JIT and name == "cuda":
                    floor = "dependency_floor"
                    yield record(us(floor, JIT, case), floor, JIT, **vars(case))
                yield record(us(name, metric, case), name, metric, **vars(case))


def full_run(us):
    return [r for block in cases.full_suite() for r in synthetic(block, us)]


def test_the_full_suite_answers_every_target():
    judged = goals.judge(full_run(lambda name, metric, case: 1.0))
    assert len(judged) == 9
    for title, checks in judged.items():
        assert checks, title
        assert all(check.is_met for check in checks), title
    grid = 9 * 10
    sizes = {title: len(checks) for title, checks in judged.items()}
    assert sizes["2. the table of targets"] == grid - 9  # none at length 2048
    assert sizes["3. other values within 1.3 x normal"] == grid * 6
    assert sizes["3. adversarial values within 3 x normal"] == grid * 3
    assert sizes["4. sorted values within 2 us of indices"] == grid
    assert sizes["4. other k not slower than their output explains"] == grid * 5
    assert sizes["4. 16-bit values not slower than float32"] == grid * 2
    assert sizes["5. short rows of a wide buffer within 1.1 x a narrow one"] == 9 * 7
    assert sizes["5. cold rows at 80% of the read-only kernel"] == 3 * 5
    assert sizes["6. in jit within 1 us of kernel and dependency"] == grid


@pytest.mark.parametrize(
    ("target", "slow", "us"),
    [
        ("2.", lambda name, metric, case: case.rows == 32 and case.length == 16384, 4.6),
        ("3. other", lambda name, metric, case: case.distribution == "relu", 1.31),
        ("3. adv", lambda name, metric, case: case.distribution == "striped", 3.1),
        ("4. sorted", lambda name, metric, case: case.output == "values_sorted", 3.1),
        ("4. other k", lambda name, metric, case: case.k == 256, 1.1),
        ("4. other k", lambda name, metric, case: case.k == 4096 and name == "cuda", 2.1),
        ("4. 16", lambda name, metric, case: case.dtype == "float16", 1.1),
        ("5. short", lambda name, metric, case: case.length == 256 and case.width > 8192, 1.2),
        ("5. cold", lambda name, metric, case: case.cold and name == "cuda", 1.3),
        ("6.", lambda name, metric, case: metric == JIT and name == "cuda", 3.1),
    ],
)
def test_each_target_can_be_missed(target, slow, us):
    """A slowdown of one kind misses that target, by as much as it is, and is printed."""
    records = full_run(lambda *where: us if slow(*where) else 1.0)
    judged = goals.judge(records)
    missed = [t for t, checks in judged.items() if any(not c.is_met for c in checks)]
    assert any(title.startswith(target) for title in missed), missed
    lines = []
    assert goals.print_goals(records, lines.append) > 0
    assert any(line.startswith(target) and "missed in" in line for line in lines)


def test_what_was_not_measured_is_not_called_met():
    lines = []
    assert goals.print_goals([record(2.5, rows=8)], lines.append) == 0
    assert sum("not measured" in line for line in lines) == 8
    assert any("2. the table of targets: met in all 1 cells" in line for line in lines)
    assert any("2.50/2.6" in line for line in lines)


# --- tables, plot, report -------------------------------------------------------------------------


def test_ratios_compare_like_with_like():
    lines = []
    tables.print_tables(
        [
            record(4.0),
            record(5.0, metric=JIT),
            record(100.0, "lax", JIT),
            record(20.0, "torch"),
            record(6.0, rows=2),
            record(3.0, rows=2, implementation="lax", metric=JIT),
        ],
        lines.append,
    )
    heading = next(line for line in lines if "cuda graph" in line)
    assert "lax/ours jit" in heading
    assert "torch/ours graph" in heading
    one = next(line.split() for line in lines if line.split()[:1] == ["1"])
    assert one == ["1", "4096", "4.00", "5.00", "100", "20.00", "20.00x", "5.00x", "yes"]
    two = next(line.split() for line in lines if line.split()[:1] == ["2"])
    assert "0.50x" in two


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        record(4.0 + i, length=n, rows=rows)
        for rows in (1, 32)
        for i, n in enumerate((4096, 8192, 16384))
    ]
    found = Results({"target": "gpu", "gpu": "H100"}, records)
    for _ in range(2):
        assert plot.draw(found, tmp_path / "a.svg")
    first = (tmp_path / "a.svg").read_text()
    assert plot.draw(found, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == first
    assert not plot.draw(Results({"target": "gpu"}, []), tmp_path / "c.svg")


def write_results(folder):
    gpu = full_run(lambda name, metric, case: 90.0 if name == "lax" else 3.0)
    header = {"target": "gpu", "gpu": "NVIDIA H100", "commit": "c0ffee", "date": "2026-01-01"}
    Results(header, gpu).save(folder / "h100.json")
    full = {"length": "full", "output": "values_sorted", "width": 4096, "k": 64}
    cpu = [record(50.0, "cpu", CALL, **full), record(500.0, "lax", CALL, **full)]
    Results({"target": "cpu", "processor": "EPYC", "cpus": 2}, cpu).save(folder / "cpu.json")


def test_report_renders_both_targets_and_notices_drift(tmp_path, capsys):
    write_results(tmp_path)
    (tmp_path / "h100.svg").write_text("<svg/>")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert "does not say what" in capsys.readouterr().err
    assert not report.update(readme, tmp_path, check=False)
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nafter\n")
    assert "NVIDIA H100" in text
    assert "| **256** | 30× |" in text
    assert "50.0 µs (10.0×)" in text
    assert "![time over row length on NVIDIA H100](h100.svg)" in text
    assert re.search(r"^\| `clust` \| \d+ \| 1\.00 \|", text, re.MULTILINE)


def test_the_table_of_the_readme_has_no_gaps():
    def section(*shapes):
        records = [record(3.0, "cuda", GRAPH, rows=rows, length=n) for rows, n in shapes]
        return "\n".join(report.gpu_section(Results({"gpu": "H100"}, records), None))

    assert "| rows \\ length | 4096 |" in section((1, 128), (1, 4096), (2, 4096))
    assert "| rows \\ length | 128 | 4096 |" in section((1, 128), (2, 4096))


def test_the_readme_shows_times_behind_other_kernels():
    records = [record(3.0, "cuda", GRAPH, rows=1, length=4096)]
    text = "\n".join(report.gpu_section(Results({"gpu": "H100"}, records), None))
    assert "in a decode step" not in text
    records.append(record(5.0, "cuda", OTHERS, rows=1, length=4096))
    text = "\n".join(report.gpu_section(Results({"gpu": "H100"}, records), None))
    assert text.index("in a decode step") < text.index("| **1** | 5.0 |")


@pytest.mark.parametrize("text", ["none", f"{report.END}{report.BEGIN}", report.BEGIN * 2])
def test_a_readme_without_markers_is_explained(text):
    with pytest.raises(ValueError, match="once each"):
        report.replace_section(text, "x")


def test_the_readme_says_what_the_committed_results_say():
    assert report.update(report.README, report.RESULTS, check=True), (
        "run python -m jax_topk.bench.report"
    )


# --- command line ---------------------------------------------------------------------------------

SMALL = [
    *("--rows", "1,3", "--length", "full,mixed", "--width", "256", "--k", "8,300"),
    *("--implementation", "cpu,lax", "--quick"),
]


def test_a_cpu_run_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert command.main([*SMALL, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "lax/ours call" in printed.out
    assert "k or length exceeds" in printed.err
    data = json.loads(path.read_text())
    assert data["header"]["target"] == "cpu"
    assert len(data["records"]) == 2 * 2  # --quick keeps one batch size; k = 300 does not fit
    for item in data["records"]:
        assert {
            *("implementation", "rows", "length", "distribution", "k", "dtype", "metric", "us"),
            "verified",
        } <= item.keys()
        assert item["metric"] == "call_us"
        assert item["us"] > 0
        assert item["verified"] == "oracle"

    more = [*SMALL[:1], "3", *SMALL[2:-1], "--length", "full"]
    assert command.main([*more, "--json", str(path), "--append"]) == 0
    assert len(results.load(path).records) == 6
    assert command.main(["--from", str(path), "--compare", str(path), "--goals"]) == 0
    printed = capsys.readouterr()
    assert "0 faster" in printed.out
    assert "not measured" in printed.out

    other = results.load(path)
    other.header["jaxlib"] = "0.0"
    other.save(path)
    with pytest.raises(SystemExit):
        command.main([*more, "--json", str(path), "--append"])
    assert "must come from one machine" in capsys.readouterr().err


def test_a_gpu_run_from_the_command_line(tmp_path, monkeypatch, fake_gpu, capsys):
    _, fake, _ = fake_gpu(FAKE_BLOCK)
    monkeypatch.setattr(command, "_platform", lambda: ("gpu", "NVIDIA H100"))
    monkeypatch.setattr(runner.Runner, "warm_up", lambda self: None)
    path = tmp_path / "gpu.json"
    arguments = ["--rows", "1,3", "--length", "500", "--width", "1024", "--k", "64"]
    arguments += ["--distribution", "normal,equal", "--implementation", "cuda"]
    arguments += ["--metric", "graph_chain_us", "--plan", "path=exact,cluster=2"]
    arguments += ["--commit", "c0ffee", "--json", str(path), "--plot", str(tmp_path / "p.svg")]
    assert command.main(arguments) == 0
    found = results.load(path)
    assert found.header["target"] == "gpu"
    assert found.header["gpu"]
    assert len(found.records) == 4
    assert {r.plan for r in found.records} == {"path=exact,cluster=2"}
    assert {call[3:] for call in fake.calls} == {(1, 1), (20, 50)}
    assert "plan path=exact,cluster=2" in capsys.readouterr().out


def test_large_cpu_cells_are_proven_by_the_certificate(monkeypatch):
    monkeypatch.setattr(runner, "ORACLE_ENTRIES", 0)
    block = Block(
        rows=(1, 3),
        lengths=("full", "mixed"),
        distributions=("normal",),
        ks=(8,),
        outputs=("values_sorted",),
        width=256,
        implementations=("cpu", "lax"),
        metrics=(CALL, JIT),
    )
    monkeypatch.setattr(implementations, "DEFAULT_CHAIN_STEPS", 2)
    records = run(runner.Runner("cpu", QUICK), block)
    assert len(records) == 16
    assert {r.verified for r in records} == {"certificate+oracle"}


def test_a_wrong_result_makes_the_command_fail(monkeypatch, capsys):
    def zeros(operand, lengths):
        shape = (operand.shape[0], 8)
        return jnp.zeros(shape, operand.dtype), jnp.zeros(shape, jnp.int32)

    monkeypatch.setattr(implementations, "selector", lambda *_: zeros)
    monkeypatch.setattr(implementations, "unavailable", lambda name, platform: None)
    arguments = ["--rows", "3", "--length", "full", "--width", "256", "--k", "8"]
    assert command.main([*arguments, "--implementation", "lax", "--quick"]) == 1
    printed = capsys.readouterr()
    assert "WRONG3: lax 3 x 256" in printed.err


def test_a_spent_budget_keeps_what_was_measured():
    lines = []
    bench_runner = runner.Runner("cpu", QUICK, lines.append)
    block = Block(rows=(1,), lengths=("full",), width=256, ks=(8,), implementations=("lax",))
    assert list(bench_runner.run([block], stop_at=0.0)) == []
    assert "budget is spent" in lines[0]


def test_the_default_on_a_cpu_is_the_cpu_suite_and_flags_choose_cells():
    parser = command.build_parser()
    assert command.build_blocks(parser.parse_args([]), "cpu") == cases.cpu_suite()
    assert command.build_blocks(parser.parse_args([]), "gpu") == [Block()]
    (block,) = command.build_blocks(parser.parse_args(["--k", "8"]), "cpu")
    assert (block.ks, block.lengths) == ((8,), ("full",))
    blocks = command.build_blocks(parser.parse_args(["--suite", "full", "--rows", "1"]), "gpu")
    assert len(blocks) == len(cases.full_suite())
    assert {block.rows for block in blocks} == {(1,)}
    chosen = ["--plan", "path=exact", "--cold", "--width", "4096,8192", "--quick"]
    blocks = command.build_blocks(parser.parse_args(chosen), "gpu")
    assert [(b.plan, b.cold, b.width) for b in blocks] == [
        ("path=exact", True, 4096),
        ("path=exact", True, 8192),
    ]
    assert blocks[0].rows == (1, 32, 256)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "1,x"], "is not a list of whole numbers; pass for instance 1,32,256"),
        (["--rows", "0"], "--rows must be positive"),
        (["--k", "0"], "--k must be positive"),
        (["--length", "-5"], "holds a negative number"),
        (["--dtype", "int8"], "choose from float32, bfloat16, float16"),
        (["--distribution", "odd"], "is unknown; choose from normal"),
        (["--implementation", "cub"], "is unknown; choose from cuda, cpu, xla, lax"),
        (["--k", "300", "--width", "256"], "no cell is left"),
        (["--cold"], "needs a GPU"),
        (["--append"], "name it with --json FILE"),
        (["--from", "none.json"], "there is no file"),
        (["--compare", "none.json"], "there is no file"),
        (["--peers", "none.csv"], "there is no file"),
        (["--implementation", "torch", "--rows", "1", "--k", "8"], "nothing was measured"),
        (["--launches", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments_are_explained(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for action in command.build_parser()._actions:
        assert action.help, action.option_strings
        assert action.option_strings[-1] in text
