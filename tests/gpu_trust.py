"""Runs all that needs a GPU, and writes one summary: `python -m tests.gpu_trust --help`.

    python -m tests.gpu_trust --json docs/trust_h100.json

The parts: the tools are built; the stress tool runs alone, twice, and once more to see that its
watchdog ends a hang; then the tests of the GPU, compute-sanitizer and the fuzzer run at the same
time; last, one by one, what needs most of the memory. The summary holds the GPU, the driver,
versions, commit, seeds, counts, times and failures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
HEARTBEAT_SECONDS = 20
LARGE = {
    "many_rows": "tests/test_limits.py::test_more_rows_than_a_grid_has_ctas",
    "large": "tests/test_limits.py",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the part, in the summary.
        command: arguments, run in the root of the checkout.
        summary: a pattern; the last line of the output that it is found in is what is reported.
        expected: the exit status that is right.
        environment: variables on top of those that are there.
        timeout: seconds after which the part has failed.
    """

    name: str
    command: tuple[str, ...]
    summary: str
    expected: int = 0
    environment: tuple[tuple[str, str], ...] = ()
    timeout: int = 450


class Progress:
    """Says what starts, what ends, and now and then what still runs."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self._is_over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{self.seconds():4.0f} s] {text}", flush=True)

    def begin(self, name: str) -> None:
        self._running.add(name)
        self.say(f"{name}: begins")

    def end(self, name: str, text: str) -> None:
        self._running.discard(name)
        self.say(f"{name}: {text}")

    def stop(self) -> None:
        self._is_over.set()

    def _beat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_SECONDS):
            self.say(f"running: {', '.join(sorted(self._running)) or 'nothing'}")


def run_part(part: Part, logs: pathlib.Path, progress: Progress) -> dict[str, Any]:
    """Runs one part; returns its entry of the summary. The output goes to a file of its own."""
    progress.begin(part.name)
    log = logs / f"{part.name}.log"
    begin = time.monotonic()
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env={**os.environ, **dict(part.environment)},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status: int | str = process.wait(part.timeout)
        except subprocess.TimeoutExpired:
            status = f"not finished after {part.timeout} s"
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
        except OSError as error:
            status = f"could not be started: {error}"
    text = log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if re.search(part.summary, line)]
    # A part that says nothing of what it did has not shown anything.
    is_right = status == part.expected and bool(lines)
    entry = {
        "name": part.name,
        # Without what is of this machine alone.
        "command": " ".join(
            pathlib.Path(word).name if pathlib.Path(word).is_absolute() else word
            for word in part.command
        ),
        "ok": is_right,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "summary": lines[-1].strip("= ") if lines else "",
    }
    if not is_right:
        entry["output"] = text[-6000:]
    progress.end(part.name, f"{'ok' if is_right else 'FAILED'}, {entry['summary'] or status}")
    return entry


def run_parts(
    stages: Sequence[Sequence[Part]], logs: pathlib.Path, progress: Progress
) -> list[dict[str, Any]]:
    """Runs stages one after another, the parts of a stage at once."""
    entries = []
    for stage in stages:
        with concurrent.futures.ThreadPoolExecutor(len(stage)) as pool:
            entries += pool.map(lambda part: run_part(part, logs, progress), stage)
    return entries


def parts_of(options: argparse.Namespace, build: pathlib.Path) -> list[list[Part]]:
    """The stages of a run."""
    python, seed = sys.executable, options.seed
    stress = str(build / "stress_kernel")
    quiet = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)
    gencode = f"arch=compute_{options.arch},code=sm_{options.arch}"
    sources = ["ffi/cuda/*.cu", "ffi/plan.cc"]
    builds = [
        Part(
            f"build_{tool}",
            (
                *("bash", "-c"),
                f"nvcc -std=c++17 -O3 -lineinfo --threads=4 -gencode {gencode} -I ffi"
                f" -o {build / tool} ffi/tools/{tool}.cu {' '.join(sources)} && echo built {tool}",
            ),
            f"built {tool}",
        )
        for tool in ("run_kernel", "stress_kernel")
    ]
    size = ("--launches", str(options.launches))
    stages = [
        builds,
        [Part("stress", (stress, *size, "--seed", str(seed)), r'^\{"gpu"')],
        [Part("stress_again", (stress, *size, "--seed", str(seed + 1)), r'^\{"gpu"')],
        [Part("watchdog", (stress, "--hang", "--timeout", "3", "--cases", "4"), "HANG", 2)],
        [
            Part(
                "tests",
                (python, "-m", "pytest", "-m", "gpu", "-n", "8", "--dist", "worksteal", "-q"),
                r"\d+ passed",
                environment=(*quiet, ("JAX_TOPK_REQUIRE_GPU", "1")),
            ),
            Part(
                "sanitizers",
                ("bash", "ffi/tools/sanitize.sh", str(build)),
                "^compute-sanitizer: ",
                environment=(("JAX_TOPK_SANITIZE_JOBS", "8"),),
            ),
            Part(
                "fuzz",
                (
                    *(python, "-m", "jax_topk.fuzz", "--implementation", "cuda"),
                    *("--rows", str(options.fuzz_rows)),
                    *("--seed", ",".join(str(seed + i) for i in range(3))),
                    *(("--commit", options.commit) if options.commit else ()),
                    *(("--json", str(options.fuzz_json)) if options.fuzz_json else ()),
                ),
                r"\d",
                environment=quiet,
            ),
        ],
        # Rows and elements beyond 2^31 and 2^32 need most of the GPU's memory, so one by one, each
        # in a process that holds none yet.
        *(
            [
                Part(
                    name,
                    (*(python, "-m", "pytest", "-m", "gpu", "-q", "-rs"), test),
                    r"\d+ passed",
                    environment=(*quiet, ("JAX_TOPK_REQUIRE_GPU", "1")),
                )
            ]
            for name, test in LARGE.items()
        ),
    ]
    return [
        [dataclasses.replace(part, timeout=options.timeout) for part in stage] for stage in stages
    ]


def select_parts(options: argparse.Namespace, build: pathlib.Path) -> list[list[Part]]:
    """The stages of a run, without the parts that the options leave out.

    Raises:
        ValueError: if `--only` names something else, or nothing.
    """
    tools = options.tools.resolve() if options.tools else build
    stages = parts_of(options, tools)
    names = [part.name for stage in stages for part in stage]
    wanted = set(names) if options.only is None else set(options.only.split(","))
    if not wanted <= set(names):
        unknown = ", ".join(sorted(wanted - set(names)))
        raise ValueError(f"--only names {unknown!r}; the parts are {', '.join(names)}")
    if options.tools:
        wanted -= {name for name in names if name.startswith("build_")}
    kept = [[part for part in stage if part.name in wanted] for stage in stages]
    return [stage for stage in kept if stage]


def output_of(*command: str) -> str:
    """The output of a command that describes the machine, or why there is none."""
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        return f"unknown: {error}"
    return result.stdout.strip() or f"unknown: {result.stderr.strip()[:200]}"


def describe_machine(commit: str | None) -> dict[str, str]:
    """What the results depend on. `commit` is asked of git if it is not given."""
    gpu = output_of(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit or output_of("git", "rev-parse", "--short", "HEAD"),
        "gpu, driver, memory": gpu,
        "nvcc": nvcc[1] if nvcc else "unknown",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax_topk", "jax", "jaxlib")},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_trust",
        description="Runs everything that needs a GPU and writes one summary. Needs nvcc,"
        " compute-sanitizer and an installed jax_topk with its CUDA target. Exits with 1 if"
        " anything failed.",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the summary to this file")
    parser.add_argument("--seed", type=int, default=1, help="of the stress tool and the fuzzer (1)")
    parser.add_argument("--launches", type=int, default=100_000, help="of each stress run (100000)")
    parser.add_argument("--fuzz-rows", type=int, default=1_000_000, help="of the fuzzer (1000000)")
    parser.add_argument("--fuzz-json", type=pathlib.Path, help="write the fuzzer's counts here")
    parser.add_argument("--commit", help="commit of the sources, where git cannot tell")
    parser.add_argument("--timeout", type=int, default=450, help="seconds for each part (450)")
    parser.add_argument("--arch", default="90a", help="architecture of the tools (90a)")
    parser.add_argument("--only", help="parts to run, by name, a,b,...; all by default")
    parser.add_argument(
        "--tools",
        type=pathlib.Path,
        help="folder with run_kernel and stress_kernel, built before from the same sources",
    )
    parser.add_argument("--logs", type=pathlib.Path, help="keep the output of all parts here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        build = pathlib.Path(folder) / "build"
        build.mkdir()
        try:
            stages = select_parts(options, build)
        except ValueError as error:
            parser.error(str(error))
        progress = Progress()
        logs = options.logs or pathlib.Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        summary = {
            "machine": describe_machine(options.commit),
            "seed": options.seed,
            "parts": run_parts(stages, logs, progress),
        }
    progress.stop()
    summary["seconds"] = round(progress.seconds(), 1)
    summary["failures"] = [entry["name"] for entry in summary["parts"] if not entry["ok"]]
    text = json.dumps(summary, indent=2)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
