# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Results of the serving benchmark: files, tables, the picture, and the section of the docs.

    python -m examples.sparse_attention.serve_report \
        examples/sparse_attention/results/serve_h200.json \
        examples/sparse_attention/results/serve_h100.json --docs docs/sparse_attention.md

rewrites the figures in the documentation from committed results, and the picture beside it from the
first of them. A test holds them together. Without `--docs` the full tables are printed.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from examples.sparse_attention import command

Record = dict[str, Any]  # one implementation in one cell
Result = dict[str, Any]  # {"header": {...}, "records": [...]}

BEGIN = "<!-- begin: written by examples.sparse_attention.serve_report -->"
END = "<!-- end -->"
PICTURE = "serve.svg"


def write_result(result: Result, path: str) -> None:
    """Writes a result file; whoever reads it meanwhile, or after a crash, finds a whole one."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, target)


BASELINES = ("lax", "xla")  # what the chosen implementation is compared with, the first measured
LABELS = {"lax": "`lax.top_k`", "xla": "xla"}


def cells_of(records: list[Record]) -> list[dict[str, Record]]:
    """Per cell, its records by implementation, the chosen one first."""
    cells: dict[tuple[int, str], dict[str, Record]] = {}
    for record in records:
        cell = cells.setdefault((record["batch"], str(record["input_len"])), {})
        cell[record["implementation"]] = record
    return list(cells.values())


def pairs(records: list[Record]) -> list[tuple[Record, Record]]:
    """Per cell, the chosen implementation's record and the baseline's, if both were measured."""
    found = []
    for cell in cells_of(records):
        chosen = next(iter(cell.values()))
        others = [cell[name] for name in BASELINES if name in cell and cell[name] is not chosen]
        found += [(chosen, other) for other in others[:1]]
    return found


def ratio(ours: Record, baseline: Record, figure: str) -> float:
    """How many times shorter the chosen implementation's median is: of `tpot_ms` or `step_ms`."""
    return float(baseline[figure]["median"] / ours[figure]["median"])


def has_steps(records: list[Record]) -> bool:
    """Whether a result has steps that nobody awaits; older ones have not."""
    return all("step_ms" in record for record in records)


def agreement(is_same: bool | None) -> str:
    """For the tables; None where nothing was to agree."""
    return {True: "yes", False: "NO", None: "-"}[is_same]


def format_table(records: list[Record]) -> str:
    """One line per cell and implementation."""
    header = (
        f"{'batch':>5} {'input':>7} {'top-k':<5} {'TTFT ms':>22} {'TPOT ms':>22} {'ITL ms':>22} "
        f"{'step ms':>7} {'tokens/s':>9} {'req/s':>7} {'share':>6} {'bound':>6}  same sets, tokens"
    )
    units = f"{'':>19} " + f"{'mean / median / P99':>22} " * 3
    rows = [header, units.rstrip()]
    for r in records:
        times = " ".join(
            f"{' / '.join(f'{r[key][s]:.3g}' for s in ('mean', 'median', 'p99')):>22}"
            for key in ("ttft_ms", "tpot_ms", "itl_ms")
        )
        rows.append(
            f"{r['batch']:>5} {r['input_len']:>7} {r['implementation']:<5} {times} "
            f"{format(r['step_ms']['median'], '.3g') if 'step_ms' in r else '-':>7} "
            f"{r['output_tokens_per_s']:>9,.0f} {r['requests_per_s']:>7.1f} "
            f"{r['top_k_share']:>6.1%} {r['bound']:>5.2f}x  "
            f"{agreement(r['same_sets'])}, {agreement(r['same_tokens'])}"
        )
    return "\n".join(rows)


def gains(records: list[Record]) -> list[str]:
    """One sentence per cell: the chosen implementation against the baseline."""
    sentences = []
    for ours, baseline in pairs(records):
        sentence = (
            f"batch {ours['batch']}, input {ours['input_len']}: median TPOT "
            f"{baseline['implementation']} {baseline['tpot_ms']['median']:.3f} -> "
            f"{ours['implementation']} {ours['tpot_ms']['median']:.3f} ms, "
            f"{ratio(ours, baseline, 'tpot_ms'):.2f}x"
        )
        if has_steps(records):
            sentence += f"; step {ratio(ours, baseline, 'step_ms'):.2f}x"
        sentences.append(sentence)
    return sentences


def device_line(header: dict[str, Any]) -> str:
    """Where and when a result was measured, as the docs say it."""
    weights = f", {header['weights']} weights" if "weights" in header else ""
    return (
        f"{header['layers']} layer(s) of `{header['config']}`{weights}, "
        f"cache width {header['width']:,}, "
        f"{header['output_len']} tokens per request, {header['waves']} batches per cell and "
        f"implementation; {header['device']}, jax {header['jax']}, {header['date'][:10]}"
    )


def markdown(result: Result) -> str:
    """The figures of a result as the documentation shows them: one row per cell.

    Times are medians; the result file has means and 99th percentiles too.
    """
    compared = pairs(result["records"])
    if not compared:
        raise ValueError(
            "the result has no cell in which two implementations were compared; measure with serve "
            "--json"
        )
    chosen, baseline = (LABELS.get(r["implementation"], r["implementation"]) for r in compared[0])
    # xla too, unless it is one of the two.
    has_xla = baseline != "xla" and chosen != "xla"
    with_steps = has_steps(result["records"])
    rows = [
        f"| batch | tokens in the cache | TPOT ms, {chosen} | TPOT ms, {baseline} | ratio | "
        + ("TPOT ms, xla | " if has_xla else "")
        + (f"step ms, {chosen} | step ms, {baseline} | ratio | " if with_steps else "")
        + f"output tokens/s, {chosen} | {baseline} | share of top-k, {chosen} | {baseline} | "
        f"bound for {baseline} | same sets | same tokens |",
        "|" + "---|" * (12 + has_xla + 3 * with_steps),
    ]
    for cell in cells_of(result["records"]):
        for ours, theirs in pairs(list(cell.values())):
            length = ours["input_len"]
            same_sets = all(record["same_sets"] for record in cell.values())
            xla = f"{cell['xla']['tpot_ms']['median']:.3f} | " if has_xla else ""
            steps = ""
            if with_steps:
                steps = "".join(f"{r['step_ms']['median']:.3f} | " for r in (ours, theirs))
                steps += f"{ratio(ours, theirs, 'step_ms'):.2f} | "
            rows.append(
                f"| {ours['batch']} | {length if isinstance(length, str) else f'{length:,}'} | "
                f"{ours['tpot_ms']['median']:.3f} | {theirs['tpot_ms']['median']:.3f} | "
                f"{ratio(ours, theirs, 'tpot_ms'):.2f} | {xla}{steps}"
                f"{ours['output_tokens_per_s']:,.0f} | {theirs['output_tokens_per_s']:,.0f} | "
                f"{ours['top_k_share']:.1%} | {theirs['top_k_share']:.1%} | "
                f"{theirs['bound']:.2f} | "
                f"{agreement(same_sets)} | {agreement(ours['same_tokens'])} |"
            )
    ratios = [ratio(ours, theirs, "tpot_ms") for ours, theirs in compared]
    better = sum(times > 1 for times in ratios)
    summary = (
        f"TPOT with {chosen} is shorter in {better} of {len(ratios)} cells; the ratio to "
        f"{baseline} is {min(ratios):.2f} to {max(ratios):.2f}."
    )
    if with_steps:
        by_step = [ratio(ours, theirs, "step_ms") for ours, theirs in compared]
        summary += (
            f" Of steps that nobody awaits, {sum(times > 1 for times in by_step)} are shorter, by "
            f"{min(by_step):.2f} to {max(by_step):.2f}."
        )
    left_out = result["header"]["left_out"]
    missing = [f"Not measured within the time budget: {'; '.join(left_out)}."] if left_out else []
    return "\n\n".join(
        [
            f"{device_line(result['header'])}; medians.",
            "\n".join(rows),
            "\n".join([summary, *missing]),
        ]
    )


def section(results: list[Result]) -> str:
    """All that the documentation shows of results: the figures, and the picture of the first."""
    first, *others = map(markdown, results)
    return "\n\n".join([first, f"![Median time per output token]({PICTURE})", *others])


def replace_section(document: str, text: str) -> str:
    """The document with what stands between the two marks replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"the document needs exactly one section from {BEGIN!r} to {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", document)


def plot(result: Result, path: str) -> None:
    """Draws median TPOT over the input length, one panel per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, header = result["records"], result["header"]
    batches = sorted({record["batch"] for record in records})
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(1 + 3.2 * len(batches), 3.6), layout="constrained", squeeze=False
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        of_batch = [r for r in records if r["batch"] == batch]
        labels = list(dict.fromkeys(str(r["input_len"]) for r in of_batch))
        names = list(dict.fromkeys(r["implementation"] for r in of_batch))
        for place, name in enumerate(names):
            bars = [r["tpot_ms"]["median"] for r in of_batch if r["implementation"] == name]
            positions = np.arange(len(bars)) + (place - (len(names) - 1) / 2) * 0.8 / len(names)
            label = {"lax": "lax.top_k", "xla": "jax_topk (xla)"}.get(name, f"jax_topk ({name})")
            panel.bar(positions, bars, width=0.8 / len(names), label=label)
        panel.set_xticks(range(len(labels)), labels, rotation=45)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("tokens in the cache")
    panels[0][0].set_ylabel("median time per output token, ms")
    panels[0][0].legend()
    figure.suptitle(f"{header['layers']} layer(s) of {header['config']} on {header['device']}")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Prints results, or writes them into the documentation."""
    parser = command.new_parser("examples.sparse_attention.serve_report", __doc__)
    parser.add_argument("results", nargs="+", help="files that serve wrote with --json")
    parser.add_argument("--docs", help=f"document to write the figures into, {PICTURE} beside it")
    args = parser.parse_args(arguments)
    results = [json.loads(pathlib.Path(path).read_text()) for path in args.results]
    if not args.docs:
        for result in results:
            records = result["records"]
            print(f"{device_line(result['header'])}\n\n{format_table(records)}\n")
            print("\n".join(gains(records)) + "\n")
        return 0
    document = pathlib.Path(args.docs)
    try:
        document.write_text(replace_section(document.read_text(), section(results)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    plot(results[0], str(document.with_name(PICTURE)))
    print(f"wrote {document} and {document.with_name(PICTURE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
