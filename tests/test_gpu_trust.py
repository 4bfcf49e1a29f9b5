"""The script that runs all GPU parts calls a failure a failure."""

from __future__ import annotations

import argparse
import pathlib
import sys

import gpu_trust
import pytest
from gpu_trust import Part


@pytest.fixture
def progress():
    progress = gpu_trust.Progress()
    yield progress
    progress.stop()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.mark.parametrize(
    ("part", "is_right", "status"),
    [
        (Part("fine", python("print('12 passed')"), r"\d+ passed"), True, 0),
        (Part("fails", python("print('12 passed'); exit(3)"), r"\d+ passed"), False, 3),
        (Part("silent", python("pass"), r"\d+ passed"), False, 0),
        (Part("hang", python("print('HANG'); exit(2)"), "HANG", expected=2), True, 2),
        (Part("no_hang", python("print('HANG')"), "HANG", expected=2), False, 0),
        (Part("slow", python("import time; time.sleep(30)"), "", timeout=1), False, "not finished"),
        (Part("absent", ("no-such-program-here",), ""), False, "could not be started"),
    ],
    ids=lambda value: value.name if isinstance(value, Part) else "",
)
def test_a_part_is_right_only_if_it_says_what_it_did(tmp_path, progress, part, is_right, status):
    entry = gpu_trust.run_part(part, tmp_path, progress)
    assert entry["ok"] == is_right
    assert str(entry["status"]).startswith(str(status))
    assert ("output" in entry) != is_right
    assert entry["command"].startswith(pathlib.Path(part.command[0]).name)  # without its folder
    if is_right:
        assert entry["summary"]


def test_stages_follow_one_another(tmp_path, progress):
    first = Part("first", python(f"open({str(tmp_path / 'made')!r}, 'w'); print('made')"), "made")
    second = Part("second", python(f"open({str(tmp_path / 'made')!r}); print('read')"), "read")
    entries = gpu_trust.run_parts([[first], [second, second]], tmp_path, progress)
    assert [entry["ok"] for entry in entries] == [True, True, True]


def test_the_parts_are_commands_of_this_checkout(tmp_path):
    options = argparse.Namespace(
        seed=5,
        launches=100,
        fuzz_rows=30,
        arch="90a",
        commit="abc",
        fuzz_json=tmp_path / "fuzz.json",
        timeout=7,
    )
    stages = gpu_trust.parts_of(options, tmp_path)
    parts = {part.name: part for stage in stages for part in stage}
    assert len(parts) == sum(map(len, stages))
    for part in parts.values():
        for word in " ".join(part.command).split():
            if word.startswith(("ffi/", "tests/")):
                path, _, test = word.partition("::")
                assert list(gpu_trust.ROOT.glob(path)), word
                assert not test or f"def {test}(" in (gpu_trust.ROOT / path).read_text(), word
    assert "--seed 6" in " ".join(parts["stress_again"].command)
    assert "5,6,7" in parts["fuzz"].command
    assert "--commit abc" in " ".join(parts["fuzz"].command)
    assert {part.timeout for part in parts.values()} == {7}


def test_help_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        gpu_trust.main(["--help"])
    assert "nvcc" in capsys.readouterr().out


def test_parts_can_be_left_out(tmp_path):
    options = argparse.Namespace(
        **{"seed": 1, "launches": 1, "fuzz_rows": 1, "arch": "90a", "commit": None},
        **{"fuzz_json": None, "timeout": 5, "only": "stress,tests", "tools": None},
    )

    def names() -> list[list[str]]:
        stages = gpu_trust.select_parts(options, tmp_path)
        return [[part.name for part in stage] for stage in stages]

    assert names() == [["stress"], ["tests"]]
    options.only = None
    assert names()[0] == ["build_run_kernel", "build_stress_kernel"]
    options.tools = tmp_path / "tools"
    assert names()[0] == ["stress"]
    assert gpu_trust.select_parts(options, tmp_path)[0][0].command[0] == str(
        tmp_path / "tools" / "stress_kernel"
    )
    options.only = "stress,fuss"
    with pytest.raises(ValueError, match="--only names 'fuss'; the parts are build_run_kernel"):
        names()
