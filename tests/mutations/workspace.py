"""A copy of the sources in which one defect at a time is planted, built and tested.

A mutant counts as killed only by a test that fails, crashes or hangs after the same tests have
passed without it. What does not compile, cannot be imported or is not collected proves nothing, and
raises `BrokenRun`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable

from .table import CPU, EMULATED, GPU, Mutant

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("ffi", "jax_topk", "tests")
TIMEOUT_S = 100  # of one mutant's tests, which take seconds: beyond it something waits forever

# Runs pytest in the folder that it is started in. An editable install would redirect
# `import jax_topk` to the checkout, past the copy.
_PYTEST = """
import os, sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
import pytest
status = pytest.main(sys.argv[1:])
where = getattr(sys.modules.get("jax_topk"), "__file__", "nothing")
if not where.startswith(os.getcwd()):
    sys.exit(f"the tests imported {where} in place of the copy in {os.getcwd()}")
sys.exit(status)
"""


class BrokenRun(Exception):
    """The run itself failed: nothing is known about the mutant."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one mutant.

    Attributes:
        outcome: `"killed"` or `"survived"`.
        test: the first test that noticed, or `""`.
        how: what that test said, in one line.
        seconds: to build and to test.
    """

    outcome: str
    test: str
    how: str
    seconds: float

    @property
    def is_killed(self) -> bool:
        return self.outcome == "killed"


def find_anchor(mutant: Mutant, root: pathlib.Path = ROOT) -> str:
    """Returns the text of the mutant's file.

    Raises:
        BrokenRun: the text to replace does not occur exactly once.
    """
    text = (root / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise BrokenRun(
            f"mutant {mutant.name}: its text occurs {count} times in {mutant.file}, and must occur"
            f" once; repair `old` in tests/mutations/table.py:\n{mutant.old}"
        )
    return text


def _run(command: list[str], folder: pathlib.Path, what: str, **keywords) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **keywords)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-3000:]
        raise BrokenRun(f"{what} failed with status {done.returncode}:\n{output}")
    return done.stdout


class Workspace:
    """A folder with copies of the sources, and what is built from them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        ignored = shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self._intact_cpu: pathlib.Path | None = None  # `_cpu` of the sources as they are

    # ----- building -------------------------------------------------------------------------------

    def prepare(self, targets: Iterable[str]) -> None:
        """Builds what the targets need, from the sources as they are."""
        self._intact_cpu = self._build_cpu(keep=True) if CPU in targets else self._installed_cpu()
        self._use_cpu(self._intact_cpu)

    def _installed_cpu(self) -> pathlib.Path:
        for folder in (ROOT, *map(pathlib.Path, sys.path)):
            for module in (folder / "jax_topk").glob("_cpu.*.so"):
                return module
        raise BrokenRun("the CPU target is not built; run `pip install .` first")

    def _build_cpu(self, keep: bool = False) -> pathlib.Path:
        build = self.folder / "build"
        if not (build / "build.ninja").exists():
            version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
            assert version is not None
            _run(
                ["cmake", "-S", "ffi", "-B", str(build), "-G", "Ninja", "-Wno-dev"]
                + [f"-DPython_EXECUTABLE={sys.executable}"]
                + [f"-DSKBUILD_PROJECT_VERSION_FULL={version.group(1)}"],
                self.folder,
                "configuring the CPU target (it needs cmake, ninja and nanobind)",
                env={**os.environ, "JAX_TOPK_CUDA": "off"},
            )
        _run(["cmake", "--build", str(build)], self.folder, "building the CPU target")
        (module,) = build.glob("_cpu.*.so")
        if not keep:
            return module
        (self.folder / "intact").mkdir()
        return pathlib.Path(shutil.copy(module, self.folder / "intact"))

    def _use_cpu(self, module: pathlib.Path) -> None:
        for old in (self.folder / "jax_topk").glob("_cpu.*.so"):
            old.unlink()  # a process may have it mapped: never write into it
        shutil.copy(module, self.folder / "jax_topk")

    def _build_emulation(self) -> None:
        # As tests/emulation.py does, without warnings, which say nothing about the tests, and with
        # less optimisation, which takes longer than it saves.
        _run(
            ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", "emulation.so"]
            + ["tests/emulated/emulate.cc", "ffi/plan.cc"],
            self.folder,
            "compiling the emulated kernel",
        )

    # ----- testing --------------------------------------------------------------------------------

    def control(self, target: str, tests: tuple[str, ...]) -> Verdict:
        """Runs tests on the sources as they are: those of all mutants together."""
        return self._verdict(target, tests, limit_s=10 * TIMEOUT_S)

    def judge(self, mutant: Mutant) -> Verdict:
        """Plants a mutant, builds, tests, and takes it out again."""
        intact = find_anchor(mutant, self.folder)
        path = self.folder / mutant.file
        path.write_text(intact.replace(mutant.old, mutant.new))
        try:
            return self._verdict(mutant.target, mutant.tests)
        except BrokenRun as error:
            raise BrokenRun(f"mutant {mutant.name}: {error}") from None
        finally:
            path.write_text(intact)

    def _verdict(self, target: str, tests: tuple[str, ...], limit_s: float = TIMEOUT_S) -> Verdict:
        begin = time.monotonic()
        if target == GPU:
            outcome, test, how = self._run_kernel(tests)
        else:
            if target == EMULATED:
                self._build_emulation()
            if target == CPU:
                self._use_cpu(self._build_cpu())
            elif self._intact_cpu is not None:
                self._use_cpu(self._intact_cpu)
            outcome, test, how = self._run_pytest(tests, limit_s)
        return Verdict(outcome, test, how, round(time.monotonic() - begin, 1))

    def _run_pytest(self, tests: tuple[str, ...], limit_s: float) -> tuple[str, str, str]:
        dropped = ("PYTEST_", "JAX_TOPK_", "XLA_FLAGS")
        environment = {
            **{name: v for name, v in os.environ.items() if not name.startswith(dropped)},
            "JAX_PLATFORMS": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "240",  # or pytest cuts its sentences short
            "JAX_TOPK_EMULATION": str(self.folder / "emulation.so"),
        }
        options = ["-x", "-v", "-rf", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        log = self.folder / "pytest.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _PYTEST, *options, *tests],
                cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return "killed", last_started(log.read_text()), f"hung for {limit_s} s"
        text = log.read_text()
        if status == 0 and re.search(r"\b[1-9]\d* passed\b", text):
            return "survived", "", ""
        if status < 0:
            return "killed", last_started(text), f"crashed with signal {-status}"
        failed = re.search(r"^FAILED (tests/\S+?::.*?)(?: - (.*))?$", text, re.MULTILINE)
        if status != 1 or failed is None:
            raise BrokenRun(f"pytest ended with status {status}:\n{text[-3000:]}")
        return "killed", failed.group(1), failed.group(2) or "failed"

    def _run_kernel(self, cases: tuple[str, ...]) -> tuple[str, str, str]:
        architecture = os.environ.get("JAX_TOPK_MUTATIONS_ARCH", "90a")
        nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
        if nvcc is None:
            raise BrokenRun("there is no nvcc on PATH; set CUDACXX to one")
        libraries = pathlib.Path(nvcc).resolve().parents[1] / "lib"  # of an nvcc from PyPI
        _run(
            [nvcc, f"-L{libraries}", "-std=c++17", "-O3", "-I", "ffi", "-o", "run_kernel"]
            + [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
            + [
                "ffi/tools/run_kernel.cu",
                "ffi/cuda/launch.cu",
                "ffi/cuda/timing.cu",
                "ffi/plan.cc",
            ],
            self.folder,
            "compiling run_kernel (it needs nvcc)",
        )
        for case in cases:
            command = ["./run_kernel", *shlex.split(case)]
            try:
                done = subprocess.run(
                    command, cwd=self.folder, capture_output=True, text=True, timeout=30
                )
            except subprocess.TimeoutExpired:
                return "killed", f"run_kernel {case}", "hung for 30 s"
            if done.returncode != 0:
                lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
                return "killed", f"run_kernel {case}", lines[-1]
        return "survived", "", ""


def last_started(log: str) -> str:
    """The test that a log of `pytest -v` ends in."""
    started = re.findall(r"^(tests/\S+?::\w+(?:\[.*?\])?)(?=\s|$)", log, re.MULTILINE)
    return started[-1] if started else "before the first test"
