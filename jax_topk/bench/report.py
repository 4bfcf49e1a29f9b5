"""Regenerates the README's tables and plots from committed results.

    python -m jax_topk.bench.report            rewrite the section and the plots
    python -m jax_topk.bench.report --check    exit 1 if the section differs (used by the tests)

The section stands between the markers `<!-- bench:begin -->` and `<!-- bench:end -->`. Everything
in it follows from `jax_topk/bench/results/*.json`, so that README and results cannot drift apart.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import plot, results
from .cases import CALL, JIT, OTHERS, WIDTH, K, Length
from .goals import Cells
from .results import Record, Results
from .tables import geometric_mean, length_order

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RESULTS = Path(__file__).resolve().parent / "results"
CPU_KS = (16, 64, 2048)
"""Values of k whose CPU tables are shown; the summary covers all."""
README = Path(__file__).resolve().parents[2] / "README.md"

Shape = tuple[int, Length]


def _markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---:|" * len(heading)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _matrix(cells: dict[Shape, str], corner: str) -> list[str]:
    rows = sorted({row for row, _ in cells})
    lengths = sorted({length for _, length in cells}, key=length_order)
    return _markdown_table(
        [corner, *map(str, lengths)],
        ([f"**{row}**", *(cells.get((row, n), "") for n in lengths)] for row in rows),
    )


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _time(us: float) -> str:
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


def _origin(header: dict[str, object]) -> str:
    commit = str(header.get("commit") or "unknown")[:12]
    date = str(header.get("date"))[:10]
    return f"jax {header.get('jax')}, commit `{commit}`, {date}"


def gpu_section(found: Results, image: str | None) -> list[str]:
    """Markdown lines for the results of one GPU.

    Args:
        found: results with the main grid (float32, k = 2048, indices).
        image: path of the plot relative to the README, or None.
    """
    header, cells = found.header, Cells(found.records)
    alone, in_jit = cells.column(), cells.column(metric=JIT)
    lax = cells.column(implementation="lax", metric=JIT)
    # Lengths that were timed for a few numbers of rows only would leave gaps.
    lengths = {n for _, n in alone}
    whole = {n for n in lengths if all((rows, n) in alone for rows, _ in alone)} or lengths
    lines = [
        f"### {header.get('gpu')}",
        "",
        f"k = {K} of float32 rows with run-time lengths in a buffer of width {WIDTH}, indices "
        f"only, values N(0, 1). {_origin(header)}, driver {header.get('driver')}; every cell "
        "verified before and after timing."
        + "".join(f" {name}: {text}." for name, text in header.get("other_runs", {}).items()),
        "",
    ]
    if alone:
        lines += [
            "Microseconds of the kernel alone (launches back to back in one CUDA graph; each may "
            "start while the one before ends, and waits for it before it reads):",
            "",
            *_matrix(
                {shape: _short(r.us) for shape, r in alone.items() if shape[1] in whole},
                "rows \\ length",
            ),
            "",
        ]
    behind = cells.column(metric=OTHERS)
    if behind:
        lines += [
            "The same where it stands in a decode step: behind kernels that have driven its "
            "instructions out of the caches, and without overlap:",
            "",
            *_matrix({shape: _short(r.us) for shape, r in behind.items()}, "rows \\ length"),
            "",
        ]
    faster = {
        shape: record.us / in_jit[shape].us for shape, record in lax.items() if shape in in_jit
    }
    if faster:
        lines += [
            "Times faster than `jax.lax.top_k` on masked input, both inside one jit:",
            "",
            *_matrix({shape: f"{x:.0f}×" for shape, x in faster.items()}, "rows \\ length"),
            "",
        ]
    lines += _library_lines(cells, alone)
    lines += _distribution_lines(cells, alone)
    if image:
        lines += [f"![time over row length on {header.get('gpu')}]({image})", ""]
    return lines


def _library_lines(cells: Cells, alone: dict[Shape, Record]) -> list[str]:
    """A sentence per library that was timed next to the kernel alone."""
    lines = []
    for name, title in (
        ("torch", "`torch.topk` on masked input"),
        ("flashinfer", "FlashInfer's `top_k_ragged_transform`"),
    ):
        other = cells.column(implementation=name)
        ratios = [other[shape].us / alone[shape].us for shape in other if shape in alone]
        if ratios:
            lines.append(
                f"- {title}, in a CUDA graph too, takes {geometric_mean(ratios):.1f} times as long "
                f"in the geometric mean of {len(ratios)} cells ({min(ratios):.1f} to "
                f"{max(ratios):.1f})."
            )
    return [*lines, ""] if lines else []


def _distribution_lines(cells: Cells, normal: dict[Shape, Record]) -> list[str]:
    rows = []
    for name in cells.distributions():
        other = cells.column(distribution=name)
        ratios = {
            shape: record.us / normal[shape].us
            for shape, record in other.items()
            if shape in normal
        }
        if name == "normal" or not ratios:
            continue
        worst = max(ratios, key=lambda shape: ratios[shape])
        rows.append(
            (
                f"`{name}`",
                str(len(ratios)),
                f"{geometric_mean(ratios.values()):.2f}",
                f"{ratios[worst]:.2f} ({worst[0]} × {worst[1]})",
            )
        )
    if not rows:
        return []
    return [
        "Other values, relative to the same cell of N(0, 1):",
        "",
        *_markdown_table(("values", "cells", "geometric mean", "worst cell"), rows),
        "",
    ]


def cpu_section(found: Results, image: str | None) -> list[str]:
    """Markdown lines for the results of one CPU.

    Args:
        found: results of the CPU suite.
        image: path of the plot relative to the README, or None.
    """
    header = found.header
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for record in found.records:
        if (
            record.metric == CALL
            and record.length == "full"
            and record.distribution == "normal"
            and record.dtype == "float32"
            and record.output == "values_sorted"
        ):
            cell = times.setdefault((record.rows, record.width, record.k), {})
            cell[record.implementation] = record.us
    pairs = {key: cell for key, cell in times.items() if {"cpu", "lax"} <= cell.keys()}
    lines = [
        f"### CPU: {header.get('processor')}, {header.get('cpus')} processors",
        "",
        f"Values and indices of float32 rows, best first, against `jax.lax.top_k`, taking turns in "
        f"one process. {_origin(header)}.",
        "",
    ]
    ks = {k for _, _, k in pairs}
    for k in sorted(ks & set(CPU_KS) or ks):
        here = {(rows, width): cell for (rows, width, k_), cell in pairs.items() if k_ == k}
        texts: dict[Shape, str] = {
            shape: f"{_time(cell['cpu'])} ({cell['lax'] / cell['cpu']:.1f}×)"
            for shape, cell in here.items()
        }
        lines += [
            f"k = {k}: time (times faster than `lax.top_k`)",
            "",
            *_matrix(texts, "rows \\ width"),
            "",
        ]
    if pairs:
        ratios = {key: cell["lax"] / cell["cpu"] for key, cell in pairs.items()}
        rows, width, k = min(ratios, key=lambda key: ratios[key])
        lines += [
            f"Over all {len(ratios)} shapes with k of {', '.join(map(str, sorted(ks)))}: "
            f"{geometric_mean(ratios.values()):.1f}× in the geometric mean, at worst "
            f"{ratios[rows, width, k]:.2f}× ({rows} × {width}, k = {k}).",
            "",
        ]
    if image:
        lines += [f"![time over row width on {header.get('processor')}]({image})", ""]
    return lines


def render(results_dir: Path, readme_dir: Path) -> str:
    """The section for all results of a folder: GPUs first, then CPUs.

    Args:
        results_dir: folder of `*.json`; a plot of the same name with the suffix `.svg` is shown if
            it is there.
        readme_dir: folder of the README, which image paths are relative to.
    """
    lines: list[str] = []
    found = [(path, results.load(path)) for path in sorted(results_dir.glob("*.json"))]
    sections: tuple[tuple[str, Callable[[Results, str | None], list[str]]], ...] = (
        ("gpu", gpu_section),
        ("cpu", cpu_section),
    )
    for target, section in sections:
        for path, result in found:
            if result.header.get("target") == target:
                picture = path.with_suffix(".svg")
                image = None
                if picture.exists():
                    image = Path(os.path.relpath(picture, readme_dir)).as_posix()
                lines += section(result, image)
    if not lines:
        lines = ["No results are committed yet; `python -m jax_topk.bench` measures this machine."]
    return "\n".join(lines).rstrip("\n")


def replace_section(text: str, body: str) -> str:
    """Puts `body` between the markers of `text`; raises ValueError if they are not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must hold {BEGIN} and, after it, {END}, once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def update(readme: Path, results_dir: Path, *, check: bool) -> bool:
    """Rewrites the README's section, or only checks it.

    Args:
        readme: file with the markers.
        results_dir: folder of results.
        check: write nothing.

    Returns:
        Whether the section already was what the results say.
    """
    text = readme.read_text(encoding="utf-8")
    wanted = replace_section(text, render(results_dir, readme.parent))
    if not check and wanted != text:
        readme.write_text(wanted, encoding="utf-8")
    return wanted == text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if `--check` finds a difference, 2 on a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_topk.bench.report",
        description="Rewrites the README's bench section and the plots from committed results.",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON results")
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            if reason := plot.why_not():
                print(reason, file=sys.stderr)
            else:
                for path in sorted(options.results.glob("*.json")):
                    picture = path.with_suffix(".svg")
                    if plot.draw(results.load(path), picture):
                        print(f"plot: {picture}")
        is_same = update(options.readme, options.results, check=options.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check and not is_same:
        print(
            f"{options.readme} does not say what {options.results} holds; run "
            "python -m jax_topk.bench.report and commit the result",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
