"""The fuzzer: what it draws, that its check can fail, and that a failure's line replays it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_topk import _native
from jax_topk.fuzz import batch as batches
from jax_topk.fuzz import campaign, case, generators, plans, programs, shrink, targets, windows
from jax_topk.fuzz.__main__ import listing, main
from jax_topk.fuzz.batch import Settings, draw_batch
from jax_topk.fuzz.tally import Tally
from jax_topk.fuzz.watchdog import Watchdog

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = sorted((ROOT / "jax_topk" / "fuzz" / "results").glob("*.json"))
SMALL = Settings("cpu", max_width=512, batch_elements=8192, max_k=4096, programs=3)
ARGUMENTS = ["--max-width", "512", "--batch-elements", "8192", "--programs", "3"]
H100 = {
    "num_sms": 132,
    "smem_per_block_bytes": 232448,
    "smem_per_sm_bytes": 233472,
    "max_cluster_size": 16,
}

needs_cpu_target = pytest.mark.skipif(not _native.CPU.is_available, reason=_native.CPU.reason)


def any_plan(*_) -> bool:
    return True


# --- what is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["cuda", "cpu", "xla"])
def test_launches_cover_the_rows_and_results_do_not_touch(implementation):
    settings = Settings(implementation, 262144, 1 << 19, 4096, 16)
    seen_classes, seen_plans = set(), set()
    for index in range(300):
        drawn = draw_batch(settings, 3, index, any_plan)
        assert drawn.rows == batches.batch_rows(settings, drawn.shape)
        assert 0 <= drawn.width <= drawn.shape.width
        row, end = 0, 0
        for launch in drawn.launches:
            assert launch.first_row == row
            assert launch.rows > 0
            assert 0 <= launch.k <= min(drawn.width, settings.max_k)
            assert launch.out_begin >= end + batches.GUARD
            row, end = row + launch.rows, launch.out_end
            seen_plans.add(launch.plan)
        assert row == drawn.rows
        assert end + batches.GUARD <= batches.arena_elements(settings, drawn.shape)
        seen_classes.add(drawn.shape)
    assert seen_classes == set(batches.CLASSES)
    wanted = {
        "cuda": set(plans.PLANS),
        "cpu": {"", *(f"threads={n}" for n in plans.THREADS)},
        "xla": {""},
    }
    assert seen_plans == wanted[implementation]


def test_a_batch_depends_on_its_seed_and_number_alone():
    first, again, other = (draw_batch(SMALL, 1, index, any_plan) for index in (5, 5, 6))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert not np.array_equal(first.row_seeds, other.row_seeds)
    assert not np.array_equal(first.row_seeds, draw_batch(SMALL, 2, 5, any_plan).row_seeds)


def test_every_kind_of_everything_is_drawn():
    tally = Tally()
    target = targets.Target("xla")
    settings = dataclasses.replace(SMALL, implementation="xla", programs=40)
    for index in range(100):
        tally.add(draw_batch(settings, 0, index, any_plan), target)
    for table, names in (
        ("generator", generators.GENERATORS),
        ("outside", generators.OUTSIDE),
        ("length", windows.LENGTHS),
        ("start", windows.STARTS),
        ("dtype", batches.DTYPES),
        ("output", batches.OUTPUTS),
    ):
        assert set(tally.tables[table]) == set(names), table
    for table, counter in tally.tables.items():
        assert sum(counter.values()) == tally.rows, table
    assert sum(sum(c.values()) for c in tally.path_by_generator.values()) == tally.rows


def test_windows_hold_every_extreme():
    rng = np.random.default_rng(0)
    k = np.full(20_000, 50)
    lengths, kinds = windows.draw_lengths(rng, 20_000, 3000, k)
    starts, _ = windows.draw_starts(rng, lengths, 3000)
    wanted = {-(2**31), -1, 0, 1, 49, 50, 51, 99, 101, 511, 513, 2049, 3000, 3001, 2**31 - 1}
    assert wanted <= set(lengths.tolist())
    assert {-(2**31), -1, 0, 1, 2999, 3000, 3001, 2**31 - 1} <= set(starts.tolist())
    start, length = windows.clamp(starts, lengths, 3000)
    assert (start >= 0).all()
    assert (length >= 0).all()
    assert (start + length <= 3000).all()
    inside = kinds == list(windows.LENGTHS).index("k")
    assert set(lengths[inside].tolist()) == {49, 50, 51, 99, 100, 101}


def test_every_generator_is_described():
    assert len(set(generators.GENERATORS)) == len(generators.GENERATORS)
    text = listing()
    for name, sentence in generators.describe().items():
        assert re.search(rf"^  {name} +{re.escape(sentence)}$", text, re.MULTILINE)
    for name in (*windows.LENGTHS, *windows.STARTS, *plans.PLANS[1:], *generators.OUTSIDE):
        assert name in text


@pytest.mark.parametrize("dtype", batches.DTYPES)
def test_generators_make_what_they_promise(dtype):
    def make(name, seed=1, n=2000, k=50):
        return generators.row_bits(
            [name], seed, "best", width=n, start=0, length=n, k=k, dtype=dtype, smallest=False
        )

    numpy_dtype = jax.numpy.dtype(dtype)
    for name in generators.GENERATORS:
        bits = make(name)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = bits.view(numpy_dtype).astype(np.float64)
        expected_nan = name in ("nans", "extreme_bits", "random_bits")
        if name != "equal":
            assert np.isnan(values).any() == expected_nan, name
        expected_inf = name in ("only_infinity", "some_infinities")
        if name not in ("equal", "random_bits"):
            assert np.isinf(values).any() == expected_inf, name
    assert len(np.unique(make("equal"))) == 1
    assert set(make("zeros").view(numpy_dtype).astype(float).tolist()) == {0.0}
    assert len(np.unique(make("zeros"))) == 2
    tiny = np.finfo(np.float32).tiny if dtype != "float16" else np.finfo(np.float16).tiny
    assert (np.abs(make("subnormals").view(numpy_dtype).astype(np.float64)) < tiny).all()
    assert (np.diff(make("ascending").view(numpy_dtype).astype(np.float64)) >= 0).all()
    assert (np.diff(make("descending").view(numpy_dtype).astype(np.float64)) <= 0).all()
    assert len(np.unique(make("few"))) <= 8
    assert len(np.unique(make("one_bin"))) == 64
    large = [(make("around_k", seed).view(numpy_dtype) > 1).sum() for seed in range(20)]
    assert set(large) == {49, 50, 51}
    outlier = np.abs(make("outlier", n=500).view(numpy_dtype).astype(np.float64))
    assert (outlier > 100).sum() == 1


def test_numpy_and_xla_make_the_same_bits():
    """A replayed case is made by NumPy, and must be what was made on the device."""
    for dtype in batches.DTYPES:
        drawn = next(
            b
            for b in (draw_batch(SMALL, 4, i, any_plan) for i in range(1000))
            if b.dtype == dtype and b.shape.width == 512 and b.width > 300
        )
        # Every generator, alone and beside another one.
        drawn = dataclasses.replace(
            drawn,
            first=(np.arange(drawn.rows) % len(generators.GENERATORS)).astype(np.uint32),
            last=(np.arange(drawn.rows) * 7 % len(generators.GENERATORS)).astype(np.uint32),
        )
        made = np.asarray(programs.make(SMALL, drawn, jax.devices("cpu")[0]).operand)
        begin = programs.rows_begin(drawn)
        for row in range(drawn.rows):
            found = made[begin + row * drawn.width :][: drawn.width]
            one = case.case_of_batch("cpu", drawn, [row])
            np.testing.assert_array_equal(one.bits()[0], found, str(one.rows[0]))


# --- paths ----------------------------------------------------------------------------------------


def test_constants_of_the_path_are_those_of_the_kernel():
    layout = (ROOT / "ffi" / "smem_layout.h").read_text()
    keys = (ROOT / "ffi" / "cuda" / "ordered_key.cuh").read_text()
    kernel = (ROOT / "ffi" / "cuda" / "kernel.cuh").read_text()
    assert f"kThreads = {plans.THREADS_PER_CTA};" in layout
    assert f"kVectorBytes = {plans.VECTOR_BYTES};" in layout
    assert f"kMaxVectors = {plans.TILE_VECTORS['float32']};" in layout
    of_types = re.findall(r"kMaxVectors = ([\w:]+);", keys)
    assert of_types == ["jax_topk::kMaxVectors", *(str(plans.TILE_VECTORS[t]) for t in
                        ("bfloat16", "float16"))]  # fmt: skip
    assert "is_resident = each <= kThreads * T::kMaxVectors ||" in kernel
    assert "(args.num_stages > 1 && each <= kThreads * kMaxRunVectors<T>)" in kernel
    filter_part = (ROOT / "ffi" / "cuda" / "filter_part.cuh").read_text()
    assert "kMaxRunVectors = 32 / T::kPerVector;" in filter_part
    short = (ROOT / "ffi" / "cuda" / "short_row.cuh").read_text()
    assert f"kMaxLargeTurns = {plans.LARGE_TILE_VECTORS['float32']};" in layout
    of_16_bits = plans.LARGE_TILE_VECTORS["bfloat16"]
    assert plans.LARGE_TILE_VECTORS["float16"] == of_16_bits
    assert f"kLargeTurns = T::kPerVector == 4 ? kMaxLargeTurns : {of_16_bits};" in short
    assert "args.uses_large_tile ? kLargeTurns<T> : kMostTurns<T>" in kernel


@needs_cpu_target
@pytest.mark.parametrize(
    ("override", "dtype", "is_sorted", "length", "start", "path"),
    [
        ("", "float32", False, 0, 0, "copy"),
        ("", "float32", False, 64, 0, "copy"),
        ("", "float32", True, 64, 0, "short"),
        ("", "float32", False, 65, 0, "short"),
        ("", "float32", True, 10752, 0, "short"),  # 384 threads of seven vectors of four
        ("", "float32", True, 10753, 0, "resident"),
        ("cluster=4", "float32", True, 16896, 0, "short"),  # eleven vectors
        ("cluster=5", "float32", True, 16896, 0, "resident"),
        ("cluster=4", "float32", True, 16897, 0, "resident"),
        ("cluster=4", "float32", True, 16896, 1, "resident"),  # one vector more, by its alignment
        ("cluster=1", "float32", True, 16896, 0, "short"),
        ("cluster=1", "float32", True, 16897, 0, "streamed"),
        ("cluster=2", "float32", True, 24576, 0, "resident"),  # eight vectors
        ("cluster=2", "float32", True, 24577, 0, "streamed"),
        ("cluster=2,stages=1", "float32", True, 21504, 0, "resident"),
        ("cluster=2,stages=1", "float32", True, 21505, 0, "streamed"),
        ("cluster=2", "bfloat16", True, 24576, 0, "resident"),  # four vectors of eight
        ("cluster=2", "bfloat16", True, 24577, 0, "streamed"),
        ("", "float16", True, 9216, 0, "short"),
        ("", "float16", True, 9217, 0, "resident"),
        ("cluster=2", "float16", True, 18432, 0, "short"),
        ("cluster=2", "float16", True, 18433, 0, "resident"),
        ("cluster=1", "float16", True, 18432, 0, "short"),
        ("cluster=1", "float16", True, 18433, 0, "streamed"),
        ("path=sample", "float32", True, 65, 0, "resident"),
        ("path=sample", "float32", True, 64, 0, "short"),
        ("path=short,cluster=4", "float32", True, 10752, 0, "short"),
        ("path=short,cluster=1", "float32", True, 16897, 0, "streamed"),
        ("path=exact,cluster=16", "float32", True, 160000, 0, "resident"),
        ("path=exact,cluster=16,part=100000", "float32", True, 160000, 0, "streamed"),
    ],
)
def test_the_path_of_a_row(override, dtype, is_sorted, length, start, path):
    plan = _native.CPU.module.plan_launch(4, 163840, 64, dtype, is_sorted, H100, override)
    places = plans.kernel_paths(
        plan,
        width=163840,
        k=64,
        dtype=dtype,
        is_sorted=is_sorted,
        starts=np.array([start, start]),
        lengths=np.array([length, length]),
        operand_address=256,
    )
    assert [plans.KERNEL_PATHS[place] for place in places] == [path, path]


# --- runs -----------------------------------------------------------------------------------------


@needs_cpu_target
def test_a_run_of_the_cpu_target(tmp_path, capsys):
    file = tmp_path / "counts.json"
    arguments = ["--rows", "2000", "--seed", "1,2", "--implementation", "cpu", "--json", str(file)]
    assert main([*arguments, *ARGUMENTS]) == 0
    assert "0 failures" in capsys.readouterr().out
    found = json.loads(file.read_text())
    check_results(found, least_rows=2000, num_seeds=2)
    assert found["rows_by"]["entry"]["native"] > 0
    assert found["rows_by"]["entry"]["jit"] > 0


def test_a_run_of_the_expression(capsys):
    arguments = ["--rows", "500", "--implementation", "xla"]
    assert main([*arguments, *ARGUMENTS]) == 0
    assert "0 failures" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_run_of_the_cuda_target(capsys):
    arguments = ["--rows", "5000", "--implementation", "cuda", "--max-width", "32768"]
    assert main([*arguments, "--batch-elements", "1000000", "--programs", "6"]) == 0
    out = capsys.readouterr().out
    assert "0 failures" in out
    assert "exact: " in out


class StandInForCuda(targets.Target):
    """The CUDA target's way through the fuzzer, with the CPU target in place of the kernel."""

    def __init__(self):
        super().__init__("cpu")
        self.implementation = "cuda"
        self._limits = H100
        self._module = self
        self.num_calls = 0

    def select(self, *, plan: str, device: int, **keywords) -> None:
        assert device == 0
        assert plan == "" or plan in plans.PLANS
        self.num_calls += 1
        _native.CPU.module.select(threads=1, **keywords)


@needs_cpu_target
def test_the_way_of_the_cuda_target_without_a_gpu():
    target = StandInForCuda()
    settings = dataclasses.replace(SMALL, implementation="cuda")
    runner = campaign.Runner(settings, target, Watchdog(100))
    tally = Tally()
    for index in range(80):
        drawn = runner.draw(0, index)
        if any(launch.uses_api for launch in drawn.launches):
            continue  # needs the kernel itself
        assert runner.run_batch(drawn) is None
        tally.add(drawn, target)
    assert target.num_calls > 30
    paths = tally.tables["path"]
    assert {name.split(":")[0] for name in paths} == {"auto", "short", "sample", "exact"}
    assert {re.split("[:,] ?", name)[1] for name in paths} >= {"copy", "short", "resident"}


# --- the check can fail ---------------------------------------------------------------------------


def words(array: jax.Array) -> np.ndarray:
    """The memory of a CPU array, to be written."""
    ctype = {1: ctypes.c_int8, 2: ctypes.c_uint16, 4: ctypes.c_int32}[array.dtype.itemsize]
    address = array.unsafe_buffer_pointer()
    return np.ctypeslib.as_array((ctype * array.size).from_address(address))


class Planted(targets.Target):
    """The CPU target, with a fault in the results of some calls."""

    def __init__(self, fault):
        super().__init__("cpu")
        self.fault = fault

    def run(self, call, operand, starts, lengths, values, indices):
        values, indices = super().run(call, operand, starts, lengths, values, indices)
        self.fault(call, operand, starts, lengths, words(values), words(indices))
        return values, indices


def result_swapped(call, operand, starts, lengths, values, indices):
    begin = call.out_begin
    if call.k > 3:
        indices[begin + 1], indices[begin + 2] = indices[begin + 2], indices[begin + 1]


def payload_lost(call, operand, starts, lengths, values, indices):
    if call.k and call.output != "indices":
        values[call.out_begin] ^= 1


def padding_lost(call, operand, starts, lengths, values, indices):
    results = indices[call.out_begin : call.out_begin + call.rows * call.k]
    results[results == -1] = 0


def value_padding_lost(call, operand, starts, lengths, values, indices):
    if call.output != "indices":
        results = slice(call.out_begin, call.out_begin + call.rows * call.k)
        values[results][indices[results] == -1] = 0


def written_before(call, operand, starts, lengths, values, indices):
    indices[call.out_begin - 1] ^= 5


def written_behind(call, operand, starts, lengths, values, indices):
    values[call.out_begin + call.rows * call.k] ^= 5


def values_unasked(call, operand, starts, lengths, values, indices):
    if call.output == "indices" and call.k:
        values[call.out_begin] ^= 5


def operand_changed(call, operand, starts, lengths, values, indices):
    words(operand)[call.operand_begin - 1] ^= 1


def length_changed(call, operand, starts, lengths, values, indices):
    words(lengths)[call.first_row] ^= 1


FAULTS = {
    result_swapped: "wrong indices",
    payload_lost: "wrong values",
    padding_lost: "wrong indices",
    value_padding_lost: "wrong values",
    written_before: "around the indices were written",
    written_behind: "around the values were written",
    values_unasked: "around the values were written",
    operand_changed: "an input was changed",
    length_changed: "an input was changed",
}


@needs_cpu_target
@pytest.mark.parametrize(("fault", "problem"), FAULTS.items(), ids=[f.__name__ for f in FAULTS])
def test_a_fault_is_found(fault, problem):
    right = campaign.Runner(SMALL, targets.Target("cpu"), Watchdog(100))
    wrong = campaign.Runner(SMALL, Planted(fault), Watchdog(100))
    num_found = 0
    for index in range(12):
        drawn = right.draw(11, index)
        if any(launch.uses_api for launch in drawn.launches):
            continue
        assert right.run_batch(drawn) is None
        failure = wrong.run_batch(drawn)
        if failure is not None:
            num_found += 1
            assert problem in "; ".join(failure.problems)
    assert num_found >= 3


@needs_cpu_target
def test_numpy_checks_the_reference():
    """A reference that is wrong in the same way as what it checks is found by the oracle."""
    runner = campaign.Runner(SMALL, targets.Target("cpu"), Watchdog(100))
    drawn = runner.draw(11, 0)
    buffers = programs.make(SMALL, drawn, runner.target.device)
    sample = np.arange(programs.NUM_SAMPLES)
    verdict = programs.check(SMALL, drawn, buffers, sample, runner.target.device)
    assert not runner._ask_oracle(drawn, sample, verdict)
    wrong = verdict._replace(sample_indices=verdict.sample_indices + 1)
    assert len(runner._ask_oracle(drawn, sample, wrong)) == programs.NUM_SAMPLES


# --- failures: shrinking and replay ---------------------------------------------------------------


def wrong_beyond_20(call, operand, starts, lengths, values, indices):
    """Sorted results of windows of more than 20 elements have two neighbours swapped."""
    if call.output != "sorted" or call.k < 3:
        return
    given = words(lengths)[call.first_row : call.first_row + call.rows]
    start = np.clip(words(starts)[call.first_row : call.first_row + call.rows], 0, call.width)
    for row in np.flatnonzero(np.clip(given, 0, call.width - start) > 20):
        begin = call.out_begin + row * call.k
        indices[begin + 1], indices[begin + 2] = indices[begin + 2], indices[begin + 1]


@needs_cpu_target
def test_a_failure_is_shrunk_and_its_line_replays_it(monkeypatch, capsys):
    monkeypatch.setattr(targets, "make_target", lambda _: Planted(wrong_beyond_20))
    arguments = ["--rows", "3000", "--implementation", "cpu", "--max-width", "64"]
    arguments += ["--batch-elements", "2048", "--programs", "1", "--max-failures", "1"]
    assert main(arguments) == 1
    lines = re.findall(r"^replay: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(lines)) == 1
    command = shlex.split(lines[0])
    assert command[:3] == ["python", "-m", "jax_topk.fuzz"]
    small = case.Case.parse(command[4])
    assert small.k == 3
    assert small.width == 21
    assert small.plan == ""
    assert small.offset == 0
    assert (small.mode, small.dtype) == ("largest", "float32")
    assert [str(row) for row in small.rows] == ["bits:0*21@0+21!noise"]
    assert main(command[3:]) == 1
    assert "2 indices are wrong, the first in row 0 at place 1: 2 instead of 1" in (
        capsys.readouterr().out
    )
    # Without the fault the same line says that nothing is wrong.
    monkeypatch.undo()
    assert main(command[3:]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def test_shrinking_keeps_what_a_failure_needs():
    """Two rows of different generators, a forced plan, and a value in the middle."""
    names = ["normal", "relu", "nans~few", "zeros", "normal"]
    rows = [f"{name}:{9 + n}@{n}+{3000 - n}!best" for n, name in enumerate(names)]
    start = case.Case.parse(
        "implementation=cuda;dtype=bfloat16;width=4000;k=300;mode=smallest;output=unsorted;"
        f"plan=path=exact,cluster=4;entry=native;offset=7;rows={','.join(rows)}"
    )

    def fails(candidate: case.Case) -> bool:
        assert 0 < candidate.k <= candidate.width
        candidate.bits()  # every candidate can be made
        named = {row.values.split(":")[0] for row in candidate.rows}
        lengths = candidate.windows()[1]
        return {"zeros", "relu"} <= named and "cluster=4" in candidate.plan and min(lengths) >= 70

    smallest, _ = shrink.shrink(start, fails, seconds=30)
    assert {row.values.split(":")[0] for row in smallest.rows} == {"zeros", "relu"}
    assert [row.length for row in smallest.rows] == [70, 70]
    assert smallest.plan == "cluster=4"
    assert (smallest.k, smallest.width, smallest.offset) == (1, 70, 0)


def test_explicit_values_are_shrunk_to_the_one_that_matters():
    text = "implementation=cpu;dtype=float16;width=100;k=2;mode=largest;output=indices;plan=;"
    start = case.Case.parse(text + "entry=native;offset=0;rows=random_bits:5@0+90!best")

    def fails(candidate: case.Case) -> bool:
        start, length = (int(x[0]) for x in candidate.windows())
        window = candidate.bits()[0, start : start + length]
        # A NaN with its sign set.
        return candidate.dtype == "float16" and bool((window >= 0xFC01).any())

    smallest, _ = shrink.shrink(start, fails, seconds=30)
    assert re.fullmatch(r"bits:(fc|fd|fe|ff)..@0\+1!noise", str(smallest.rows[0]))


@pytest.mark.parametrize("implementation", ["cuda", "cpu"])
def test_cases_survive_their_text(implementation):
    settings = dataclasses.replace(SMALL, implementation=implementation)
    for index in range(30):
        drawn = draw_batch(settings, 8, index, any_plan)
        launch = drawn.launches[-1]
        made = case.case_of_batch(implementation, drawn, [launch.first_row, launch.first_row])
        assert case.Case.parse(str(made)) == made
    spec = campaign.batch_spec(settings, 8, 3)
    assert campaign.parse_batch_spec(spec) == (settings, 8, 3)


GOOD = (
    "implementation=cpu;dtype=float32;width=8;k=2;mode=largest;output=sorted;plan=;entry=native;"
    "offset=0;rows=relu:7@0+8!best"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relu", "rely", "'rely:7': values are bits:..., or one generator"),
        ("dtype=float32", "dtype=int8", "dtype=int8 is not one of float32, bfloat16, float16"),
        ("k=2", "k=9", "k must not exceed the width"),
        ("k=2", "k=two", "k=two is not a whole number"),
        ("@0+8", "@0", "does not have the form VALUES@START+LENGTH!OUTSIDE"),
        ("@0+8", "@0+99999999999", "99999999999 is not an int32"),
        ("!best", "!worse", "what is outside is one of best, infinity"),
        ("relu:7", "bits:zz", "bits are hexadecimal numbers"),
        ("relu:7", "bits:1_2", "the window holds 8 elements and 'bits:1_2' has fewer"),
        ("offset=0;", "", "a case has the fields implementation"),
        ("implementation=cpu", "implementation=tpu", "'tpu' is not one of cuda, cpu, xla"),
        (GOOD, "batch=3;seed=1", "a batch has the fields batch, seed, implementation"),
    ],
)
def test_a_line_that_cannot_be_replayed_says_why(capsys, old, new, message):
    with pytest.raises(SystemExit) as caught:
        main(["--replay", GOOD.replace(old, new)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@needs_cpu_target
def test_a_batch_replays(capsys):
    assert main(["--replay", campaign.batch_spec(SMALL, 0, 0)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


# --- hangs and lost devices -----------------------------------------------------------------------

HANG = """
import sys, time
from jax_topk.fuzz import targets
from jax_topk.fuzz.__main__ import main
def run(self, call, *buffers):
    time.sleep(600)
targets.Target.run = run
sys.exit(main(sys.argv[1:]))
"""


@needs_cpu_target
def test_a_hang_ends_the_process_with_a_replay_line():
    arguments = ["--rows", "10", "--implementation", "cpu", "--timeout", "6", *ARGUMENTS]
    done = subprocess.run(
        [sys.executable, "-c", HANG, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "HANG: nothing came back in 6 s." in done.stderr
    assert re.search(r"It was running Call\(rows=\d+, width=\d+, k=\d+, ", done.stderr)
    line = re.search(r"^replay: (.*)$", done.stderr, re.MULTILINE)[1]
    assert campaign.parse_batch_spec(shlex.split(line)[-1]) == (SMALL_OF_COMMAND, 0, 0)


SMALL_OF_COMMAND = dataclasses.replace(SMALL, max_k=8192)


@needs_cpu_target
def test_a_lost_device_ends_the_run(monkeypatch, capsys):
    """After an illegal access a CUDA device fails whatever it is asked: nothing to shrink there."""

    class Lost(targets.Target):
        num_calls = 0

        def run(self, call, *buffers):
            self.num_calls += 1
            if self.num_calls > 2:
                raise RuntimeError("an illegal memory access was encountered")
            return super().run(call, *buffers)

    monkeypatch.setattr(targets, "make_target", Lost)
    assert main(["--rows", "100000", "--implementation", "cpu", *ARGUMENTS]) == 1
    captured = capsys.readouterr()
    assert "the device answers nothing any more" in captured.err
    assert "an illegal memory access was encountered" in captured.err
    assert "replay: python -m jax_topk.fuzz --replay 'batch=" in captured.out
    assert "1 failures" in captured.out


# --- committed results ----------------------------------------------------------------------------


def check_results(found: dict, least_rows: int, num_seeds: int) -> None:
    assert found["failures"] == 0
    assert found["replay"] == []
    assert found["rows"] - found["rows_without_results"] >= least_rows
    assert found["rows_checked_by_numpy_too"] > 0
    header = found["header"]
    assert len(set(header["seeds"])) >= num_seeds
    for field in ("jax", "jaxlib", "jax_topk", "python", "date", "settings", "seconds"):
        assert header[field], field
    for table, counts in found["rows_by"].items():
        assert sum(counts.values()) == found["rows"], table
    assert set(found["rows_by"]["generator"]) == set(generators.GENERATORS)
    by_both = found["rows_by_path_and_generator"]
    assert {path: sum(counts.values()) for path, counts in by_both.items()} == (
        found["rows_by"]["path"]
    )


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_committed_results(path):
    found = json.loads(path.read_text())
    is_gpu = found["header"]["target"] == "gpu"
    check_results(found, least_rows=1_000_000 if is_gpu else 100_000, num_seeds=3)
    assert found["header"]["commit"]
    assert found["header"]["dirty"] is not True
    if is_gpu:
        assert set(found["rows_by"]["plan"]) >= {"not forced", *plans.PLANS[1:]}


def test_results_of_the_cpu_target_are_committed():
    assert "cpu" in [path.stem for path in RESULTS]
