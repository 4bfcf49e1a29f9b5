"""`python -m tests.mutations`: plants every defect of the table and shows which test catches it."""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import pathlib
import queue
import sys
import tempfile
import time

from . import report, waits
from .table import CPU, EMULATED, GPU, MUTANTS, PYTHON, Mutant
from .workspace import ROOT, BrokenRun, Verdict, Workspace, find_anchor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description=__doc__,
        epilog="Exits with 1 if a mutant survives, with 2 if the run itself failed (an anchor that"
        " no longer matches, code that does not compile, tests that fail without a mutant).",
    )
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="mutants whose name or target matches a shell pattern; may be given several times",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="the mutants of target gpu instead of all others; needs nvcc and a GPU",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="mutants at a time (default: 1)"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE", help="write them as a table"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} is less than 1")
    return options


def choose(patterns: list[str], is_gpu: bool) -> list[Mutant]:
    """The mutants that a run is about."""
    everything = (*MUTANTS, *waits.mutants(ROOT))
    chosen = [mutant for mutant in everything if (mutant.target == GPU) == is_gpu]
    for pattern in patterns:
        if not any(_matches(mutant, pattern) for mutant in chosen):
            raise BrokenRun(
                f"--only {pattern} matches none of {len(chosen)} mutants; --list shows them"
            )
    if patterns:
        chosen = [m for m in chosen if any(_matches(m, pattern) for pattern in patterns)]
    return chosen


def _matches(mutant: Mutant, pattern: str) -> bool:
    return fnmatch.fnmatch(mutant.name, pattern) or mutant.target == pattern


def check_control(workspace: Workspace, chosen: list[Mutant]) -> None:
    """Raises unless all tests pass without a mutant: otherwise their failing says nothing."""
    for target in (EMULATED, CPU, PYTHON, GPU):
        lists = [mutant.tests for mutant in chosen if mutant.target == target]
        tests = tuple(dict.fromkeys(test for tests in lists for test in tests))
        if not tests:
            continue
        verdict = workspace.control(target, tests)
        if verdict.is_killed:
            raise BrokenRun(f"without any mutant, {verdict.test} does not pass: {verdict.how}")
        print(
            f"control: {len(tests)} tests of target {target} pass on the sources as they are"
            f" ({verdict.seconds} s)",
            flush=True,
        )


def judge_all(chosen: list[Mutant], num_jobs: int, folder: pathlib.Path) -> report.Judged:
    """Judges every mutant, `num_jobs` at a time, each in a workspace of its own."""
    workspaces: queue.Queue[Workspace] = queue.Queue()
    targets = {mutant.target for mutant in chosen}
    for job in range(min(num_jobs, len(chosen))):
        workspace = Workspace(folder / f"copy{job}")
        if targets != {GPU}:
            workspace.prepare(targets)
        if job == 0:
            check_control(workspace, chosen)
        workspaces.put(workspace)

    def judge(mutant: Mutant) -> Verdict:
        workspace = workspaces.get()
        try:
            return workspace.judge(mutant)
        finally:
            workspaces.put(workspace)

    judged: report.Judged = []
    with concurrent.futures.ThreadPoolExecutor(num_jobs) as pool:
        futures = {pool.submit(judge, mutant): mutant for mutant in chosen}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                mutant, verdict = futures[future], future.result()
                judged.append((mutant, verdict))
                by = f"by {verdict.test}: {verdict.how}" if verdict.is_killed else ""
                print(
                    f"[{done}/{len(chosen)}] {verdict.outcome:8} {mutant.name}"
                    f" ({verdict.seconds} s) {by}"[:240],
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return sorted(judged, key=lambda pair: chosen.index(pair[0]))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        chosen = choose(options.only, options.gpu)
        for mutant in chosen:
            find_anchor(mutant)
        if options.list:
            for mutant in chosen:
                print(f"{mutant.target:9} {mutant.name:45} {mutant.file}\n{'':10}{mutant.why}")
            return 0
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="jax_topk_mutations_") as folder:
            judged = judge_all(chosen, options.jobs, pathlib.Path(folder))
    except BrokenRun as error:
        print(f"the run failed: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.summary(judged)}\n\nfirst test that notices:")
    for test, count in report.by_catcher(judged).most_common():
        print(f"{count:6d}  {test}")
    print(f"\n{len(judged)} mutants in {time.monotonic() - begin:.0f} s")
    results = report.content(judged)
    if options.json is not None:
        options.json.write_text(report.as_json(results))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(results))
    survivors = [mutant.name for mutant, verdict in judged if not verdict.is_killed]
    if survivors:
        print(f"SURVIVED: {', '.join(survivors)}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
