"""Tables of the suite over several devices, and those of docs/sharding.md.

    python -m jax_topk.bench.sharded_tables            rewrite the tables of docs/sharding.md
    python -m jax_topk.bench.sharded_tables --check    exit 1 if they differ (used by the tests)

The tables stand between markers and follow from `jax_topk/bench/results/sharded_*.json` and from
`exchange_model.py`, so that the page cannot drift from either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import exchange_model, results
from .cases import CALL, JIT
from .results import Record, Results
from .tables import align

EXCHANGE_RATIO = 1.2
"""The bound: what the exchange may cost at most, relative to an all-gather of as many bytes."""

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharding.md"

METRICS = {JIT: "inside one jit", CALL: "single calls from Python"}
MODEL_DEVICES = (8, 64, 512)
MODEL_ROWS = (1, 32)
MODEL_K, MODEL_ELEMENT_BYTES, MODEL_WIDTH = 2048, 4, 1 << 23

Cell = dict[str, Record]


def _time(us: float) -> str:
    if us < 1000:
        return f"{us:.1f} µs"
    return f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def cells_of(records: Iterable[Record]) -> dict[tuple[str, int, int], Cell]:
    """(metric, rows, width) -> implementation -> record.

    Merge, exchange and floor are measured once per number of rows, and shown at every width.
    """
    cells: dict[tuple[str, int, int], Cell] = {}
    moved: dict[tuple[str, int], Cell] = {}
    for record in records:
        if record.devices > 1:
            if record.implementation in ("merge", "exchange", "all_gather"):
                where = moved.setdefault((record.metric, record.rows), {})
            else:
                where = cells.setdefault((record.metric, record.rows, record.width), {})
            where[record.implementation] = record
    if not cells:
        cells = {(metric, rows, 0): {} for metric, rows in moved}
    for (metric, rows, _), cell in cells.items():
        cell.update(moved.get((metric, rows), {}))
    return dict(sorted(cells.items()))


def exchange_ratio(cell: Cell) -> float | None:
    """The exchange over its floor; None if one of them was not measured."""
    if "exchange" not in cell or "all_gather" not in cell:
        return None
    return cell["exchange"].us / cell["all_gather"].us


HEADING = (
    *("rows", "row", "lax.top_k, gathers", "one device", "sharded_top_k", "of it: merge"),
    *("exchange", "all-gather", "ratio"),
)


def _lines(
    cells: dict[tuple[str, int, int], Cell], metric: str, is_simulated: bool
) -> list[list[str]]:
    """Heading and lines; without the ratio where devices are simulated, since it would be noise."""
    lines = [list(HEADING)]
    for (of, rows, width), cell in cells.items():
        if of != metric:
            continue
        line = [str(rows), f"{width:,}" if width else ""]
        for name in ("gathered", "one_device", "sharded", "merge", "exchange", "all_gather"):
            record = cell.get(name)
            wrong = f" {record.verified}" if record and record.is_wrong else ""
            line.append(_time(record.us) + wrong if record else "")
        ratio = exchange_ratio(cell)
        lines.append([*line, "" if ratio is None else f"{ratio:.2f}"])
    if len(lines) == 1:
        return []
    return [line[:-1] for line in lines] if is_simulated else lines


def verdict(cells: dict[tuple[str, int, int], Cell], is_simulated: bool = False) -> str:
    """One sentence: whether the exchange keeps to its bound."""
    if is_simulated:
        return "The devices are simulated, so the exchange is not judged."
    ratios = [ratio for cell in cells.values() if (ratio := exchange_ratio(cell)) is not None]
    if not ratios:
        return "The exchange and its all-gather alone were not both measured."
    kept = "within" if max(ratios) <= EXCHANGE_RATIO else "not within"
    return (
        f"The exchange costs {min(ratios):.2f} to {max(ratios):.2f} times its all-gather alone: "
        f"{kept} the bound of {EXCHANGE_RATIO}."
    )


def is_simulated(header: Mapping[str, Any]) -> bool:
    """Whether the devices of a run share one machine's processors."""
    return header.get("target") != "sharded-gpu"


def print_tables(found: Results, say: Callable[[str], None] = print) -> None:
    """Prints one table per metric; nothing if no record is of several devices.

    Args:
        found: of one run.
        say: prints a line.
    """
    cells = cells_of(found.records)
    for metric in METRICS:
        lines = _lines(cells, metric, is_simulated(found.header))
        if lines:
            devices = next(record.devices for record in found.records if record.devices > 1)
            say("")
            say(f"rows over {devices} devices, {METRICS[metric]}")
            for line in align(lines):
                say(line)
    if cells:
        say(verdict(cells, is_simulated(found.header)))


# --- docs/sharding.md -----------------------------------------------------------------------------


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---:|" * len(heading)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def render_measured(found: Sequence[Results]) -> str:
    """One section per results file: GPUs first, then simulated devices."""
    lines: list[str] = []
    gpus = [one for one in found if one.header.get("target") == "sharded-gpu"]
    cpus = [one for one in found if one.header.get("target") == "sharded-cpu"]
    if not gpus:
        lines += ["On several GPUs: not measured yet.", ""]
    for one in [*gpus, *cpus]:
        header, cells = one.header, cells_of(one.records)
        commit = str(header.get("commit") or "unknown")[:12]
        if one in gpus:
            title = f"{header.get('devices')} × {header.get('gpu')}"
        else:
            title = f"{header.get('devices')} simulated devices on {header.get('cpus')} processors"
            if header.get("processes", 1) > 1:
                title += f", in {header.get('processes')} processes"
        lines += [
            f"### {title}",
            "",
            f"k = {one.records[0].k}, {one.records[0].dtype}, jax {header.get('jax')}, commit "
            f"`{commit}`, {str(header.get('date'))[:10]}. {_proof(one.records)}",
            "",
        ]
        for metric, title in METRICS.items():
            if table := _lines(cells, metric, one in cpus):
                lines += [
                    f"{title[0].upper()}{title[1:]}:",
                    "",
                    *_markdown(table[0], table[1:]),
                    "",
                ]
        lines += [verdict(cells), ""] if one in gpus else []
    return "\n".join(lines).rstrip("\n")


def _proof(records: Sequence[Record]) -> str:
    num_wrong = sum(record.is_wrong for record in records)
    if num_wrong:
        return f"{num_wrong} of {len(records)} results were WRONG."
    return f"All {len(records)} results proven right before and after timing."


def render_model() -> str:
    """The table of the model on paper."""
    rows = []
    for num_rows in MODEL_ROWS:
        for devices in MODEL_DEVICES:
            flat, staged = (
                exchange_model.exchange(
                    num_rows, MODEL_K, MODEL_ELEMENT_BYTES, devices, staged=is_staged
                )
                for is_staged in (False, True)
            )
            whole = exchange_model.gather_of_rows(
                num_rows, MODEL_WIDTH, MODEL_ELEMENT_BYTES, devices
            )
            rows.append(
                (
                    str(num_rows),
                    str(devices),
                    f"{_size(flat.received_bytes)}, {_time(flat.us)}",
                    f"{_size(staged.received_bytes)}, {_time(staged.us)}",
                    f"{_size(whole.received_bytes)}, {_time(whole.us)}",
                )
            )
    heading = ("rows", "devices", "one mesh axis", "two mesh axes", "gather of the rows")
    return "\n".join(_markdown(heading, rows))


def replace_between(text: str, name: str, body: str) -> str:
    """Puts `body` between the markers of `name`; raises ValueError if they are not there once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must hold {begin} and, after it, {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def update(page: Path, results_dir: Path, *, check: bool) -> bool:
    """Rewrites the tables of the page, or only checks them; returns whether they were right."""
    text = page.read_text(encoding="utf-8")
    found = [results.load(path) for path in sorted(results_dir.glob("sharded_*.json"))]
    wanted = replace_between(text, "measured", render_measured(found))
    wanted = replace_between(wanted, "model", render_model())
    if not check and wanted != text:
        page.write_text(wanted, encoding="utf-8")
    return wanted == text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if `--check` finds a difference, 2 on a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_topk.bench.sharded_tables",
        description="Rewrites the tables of docs/sharding.md from committed results and the model.",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON results")
    parser.add_argument("--page", type=Path, default=PAGE, help="file with the markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    options = parser.parse_args(arguments)
    try:
        is_same = update(options.page, options.results, check=options.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check and not is_same:
        print(
            f"{options.page} does not say what {options.results} and the model hold; run "
            "python -m jax_topk.bench.sharded_tables and commit the result",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
