"""The mutation evidence itself: no anchor has rotted, and a few mutants from end to end.

All of them: `python -m tests.mutations` (see `tests/mutations`).
"""

from __future__ import annotations

import collections
import json
import pathlib
import subprocess
import sys

import pytest
from mutations import report, table, waits, workspace
from mutations.table import Mutant
from mutations.workspace import BrokenRun, find_anchor, last_started

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "mutations"
EVERYTHING = (*table.MUTANTS, *waits.mutants(ROOT))


@pytest.mark.parametrize("mutant", EVERYTHING, ids=lambda mutant: mutant.name)
def test_the_text_to_replace_occurs_once(mutant):
    assert mutant.old in find_anchor(mutant)
    assert mutant.old != mutant.new


@pytest.mark.parametrize("mutant", table.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_exist(mutant):
    assert mutant.tests
    if mutant.target == table.GPU:
        return
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{mutant.name} names {test}"


def test_names_are_unique():
    repeated = [
        name for name, n in collections.Counter(m.name for m in EVERYTHING).items() if n > 1
    ]
    assert not repeated


def test_every_wait_is_found():
    """The search for waits would be no evidence if it overlooked some."""
    text = "".join(
        path.read_text() for path in (ROOT / "ffi" / "cuda").glob("*.cuh") if path.name != "ptx.cuh"
    )
    num_waits = sum(
        text.count(f"{name}(") for name in ("SyncThreads", "BarrierWait", "ClusterWait")
    )
    num_mutants = sum(mutant.name.startswith("no_wait_in_") for mutant in waits.mutants(ROOT))
    assert num_mutants + waits.num_redundant(ROOT) == num_waits > 20
    assert waits.unused_reasons(ROOT) == []


def test_a_rotten_anchor_is_named(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\nb = 1\n")
    for old, count in (("c = 1", 0), ("= 1", 2)):
        mutant = Mutant("example", table.PYTHON, "file.py", old, "", "", ())
        with pytest.raises(BrokenRun, match=f"mutant example: its text occurs {count} times"):
            find_anchor(mutant, tmp_path)


def test_the_test_that_crashed_is_found_in_a_log():
    log = "tests/a.py::b PASSED [ 1%]\ntests/a.py::c[x-y,z=1] Fatal Python error: Aborted\n\nmore"
    assert last_started(log) == "tests/a.py::c[x-y,z=1]"
    assert last_started("collected 0 items") == "before the first test"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.mutations", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_three_mutants_from_end_to_end(tmp_path):
    names = ("pad_one_too_late", "length_read_as_unsigned", "largest_k_of_the_kernel")
    only = [argument for name in names for argument in ("--only", name)]
    file = tmp_path / "results.json"
    done = run(*only, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    assert (results["killed"], results["survived"]) == (3, 0)
    assert {mutant["name"] for mutant in results["mutants"]} == set(names)
    assert all(mutant["test"].startswith("tests/test_") for mutant in results["mutants"])


def test_a_survivor_is_not_called_killed(tmp_path):
    """A change that no test can see, and two that are not even programs."""
    copy = workspace.Workspace(tmp_path)
    copy.prepare({table.PYTHON})
    tests = ("tests/test_plan.py::test_empty_shapes_are_legal",)
    file, old = "jax_topk/api.py", "    del is_stable  # results are always stable\n"
    harmless = Mutant("harmless", table.PYTHON, file, old, "", "", tests)
    assert copy.judge(harmless).outcome == "survived"
    broken = Mutant("broken", table.PYTHON, file, old, "no Python", "", tests)
    with pytest.raises(BrokenRun, match="mutant broken: pytest ended with status"):
        copy.judge(broken)
    assert old in find_anchor(harmless, tmp_path)  # taken out again
    broken = Mutant("broken", table.EMULATED, "ffi/plan.cc", "LaunchPlan();", "no C++", "", tests)
    with pytest.raises(BrokenRun, match="mutant broken: compiling the emulated kernel failed"):
        copy.judge(broken)


def test_wrong_arguments_are_explained():
    done = run("--only", "nobody")
    assert done.returncode == 2
    assert "--only nobody matches none of" in done.stderr


def test_the_committed_table_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results.json").read_text())
    assert (FOLDER / "results.md").read_text() == report.markdown(results)
    assert results["survived"] == 0
