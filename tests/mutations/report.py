"""What a run saw, as text, JSON and Markdown."""

from __future__ import annotations

import collections
import dataclasses
import json
import platform
from importlib import metadata

from . import waits
from .table import Mutant
from .workspace import Verdict

Judged = list[tuple[Mutant, Verdict]]


def catcher(test: str) -> str:
    """A test without its parameters, as `file::function`."""
    return test.split("[")[0].split(" --")[0].removeprefix("tests/")


def summary(judged: Judged) -> str:
    """How many of each target were killed."""
    lines = [f"{'target':10} killed  survived"]
    for target in dict.fromkeys(mutant.target for mutant, _ in judged):
        verdicts = [verdict for mutant, verdict in judged if mutant.target == target]
        num_killed = sum(verdict.is_killed for verdict in verdicts)
        lines.append(f"{target:10} {num_killed:6d}  {len(verdicts) - num_killed:8d}")
    return "\n".join(lines)


def by_catcher(judged: Judged) -> collections.Counter[str]:
    """How many mutants each test was the first to notice."""
    return collections.Counter(catcher(v.test) for _, v in judged if v.is_killed)


def content(judged: Judged) -> dict:
    """Every mutant with its verdict, and the versions it was seen with."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "pytest")}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **versions,
        "killed": sum(verdict.is_killed for _, verdict in judged),
        "survived": sum(not verdict.is_killed for _, verdict in judged),
        "mutants": [
            {
                "name": mutant.name,
                "target": mutant.target,
                "file": mutant.file,
                "why": mutant.why,
                **dataclasses.asdict(verdict),
            }
            for mutant, verdict in judged
        ],
    }


def as_json(results: dict) -> str:
    """The text of the committed JSON file."""
    return json.dumps(results, indent=1) + "\n"


def markdown(results: dict) -> str:
    """The text of the committed table."""
    mutants = results["mutants"]
    lines = [
        "# Planted defects and what catches them",
        "",
        "Written by `python -m tests.mutations --markdown`; do not edit.",
        "",
        f"{results['killed']} killed, {results['survived']} survived, with Python"
        f" {results['python']} and jax {results['jax']}. Those of target gpu (instructions, launch)"
        " are separate: `python -m tests.mutations --gpu`.",
        "",
        "| target | killed | survived |",
        "|---|---|---|",
    ]
    for target in dict.fromkeys(m["target"] for m in mutants):
        outcomes = [m["outcome"] for m in mutants if m["target"] == target]
        num_killed = outcomes.count("killed")
        lines.append(f"| {target} | {num_killed} | {len(outcomes) - num_killed} |")
    counts = collections.Counter(catcher(m["test"]) for m in mutants if m["outcome"] == "killed")
    lines += ["", "First test that notices:", "", "| test | mutants |", "|---|---|"]
    lines += [f"| `{test}` | {count} |" for test, count in counts.most_common()]
    lines += ["", "Every mutant:", "", "| mutant | file | why | caught by |", "|---|---|---|---|"]
    for m in mutants:
        how = (
            f"`{m['test'].removeprefix('tests/')}`" if m["outcome"] == "killed" else "**survived**"
        )
        why = m["why"].replace("|", "\\|")
        lines.append(f"| {m['name']} | `{m['file']}` | {why} | {how} |")
    lines += ["", "Waits of the kernel that no test can miss, and why:", ""]
    lines += [f"- *{wait}*: {reason}." for wait, reason in waits.REDUNDANT.items()]
    return "\n".join(lines) + "\n"
