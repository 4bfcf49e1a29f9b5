"""Command line of the fuzzer: `python -m jax_topk.fuzz --help`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence

DESCRIPTION = """\
Runs an implementation of jax_topk on batches that are drawn from a seed, and compares values,
indices, order and padding of every row, bit for bit, with an independent reference on the same
device (a stable sort of integer ranks); a sample of the rows is also compared with NumPy. Results
are written between guard zones that must stay as they are, and inputs must not change.

Everything is drawn: shapes, k, dtype, mode, order, forced plans, windows, values, and what lies
outside the windows. A failure is shrunk to a small case, and a line is printed that replays it."""

EPILOG = """\
examples:
  python -m jax_topk.fuzz
      3,000 rows on whatever jax_topk uses here: a minute or less
  python -m jax_topk.fuzz --rows 1000000 --seed 1,2,3 --json jax_topk/fuzz/results/h100.json
      what the committed results of a GPU hold
  JAX_PLATFORMS=cpu python -m jax_topk.fuzz --rows 100000 --seed 1,2,3 --implementation cpu
      what the committed results of the CPU target hold
  python -m jax_topk.fuzz --replay 'implementation=cpu;dtype=float32;width=8;k=2;mode=largest;\\
output=sorted;plan=;entry=native;offset=0;rows=relu:7@0+8!best'
      one case again

exit status: 0 all right, 1 something was wrong, 2 a batch hung, or the arguments are wrong"""

# About how many elements a batch holds: enough to fill the device, few enough to wait for.
_BATCH_ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 19, "xla": 1 << 19}
_MAX_K = {"cuda": 4096, "cpu": 8192, "xla": 8192}


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(","))
    if min(seeds) < 0:
        raise ValueError
    return seeds


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_topk.fuzz",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rows",
        type=_positive,
        default=3000,
        metavar="N",
        help="at least so many rows, k = 0 not counted (3000)",
    )
    parser.add_argument(
        "--seed",
        type=_seeds,
        default=(0,),
        metavar="S,...",
        help="whole numbers; each seed gets an equal part of the rows (0)",
    )
    parser.add_argument(
        "--implementation",
        choices=("auto", "cuda", "cpu", "xla"),
        default="auto",
        help="what is run; auto: what jax_topk would choose on JAX's default device",
    )
    parser.add_argument(
        "--max-width",
        type=_positive,
        default=262144,
        metavar="N",
        help="largest allocated width of a row (262144)",
    )
    parser.add_argument(
        "--batch-elements",
        type=_positive,
        metavar="N",
        help="about how many elements a batch holds (2^24 for cuda, else 2^19)",
    )
    parser.add_argument(
        "--programs",
        type=_positive,
        default=18,
        metavar="N",
        help="shapes that are compiled and run through the public functions (18)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="a batch that takes longer counts as hung: the launch and a replay line are printed"
        " and the process ends with status 2 (120; compilation included)",
    )
    parser.add_argument(
        "--max-failures",
        type=_positive,
        default=5,
        metavar="N",
        help="failing batches after which the run stops (5)",
    )
    parser.add_argument("--json", metavar="FILE", help="write header and counts")
    parser.add_argument(
        "--commit",
        metavar="SHA",
        help="commit to record where the machine has a copy of the tree without git",
    )
    parser.add_argument("--replay", metavar="SPEC", help="run one case or batch again")
    parser.add_argument(
        "--list", action="store_true", help="describe the generators, windows and plans, and end"
    )
    return parser


def listing() -> str:
    """The generators of values, lengths and starts, and the forced plans."""
    from jax_topk.fuzz import generators, plans, windows

    sections = {
        "values": generators.describe(),
        "lengths": windows.LENGTHS,
        "starts": windows.STARTS,
    }
    lines = []
    for title, items in sections.items():
        lines += [title, *(f"  {name:<16} {text}" for name, text in items.items()), ""]
    lines += [f"outside the window: {', '.join(generators.OUTSIDE)}"]
    return "\n".join([*lines, f"forced plans: {'  '.join(plans.PLANS[1:])}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.timeout <= 0:
        parser.error("--timeout must be positive")
    if options.list:
        print(listing())
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jax_topk.bench.results import make_header
    from jax_topk.fuzz import campaign, tally, targets
    from jax_topk.fuzz.batch import Settings

    try:
        if options.replay:
            problems = campaign.replay(options.replay, targets.make_target, timeout=options.timeout)
            for sentence in problems:
                print(f"FAILED: {sentence}")
            print(f"{len(problems)} problems" if problems else "nothing is wrong")
            return 1 if problems else 0
        target = targets.make_target(options.implementation)
    except ValueError as error:
        parser.error(str(error))

    name = target.implementation
    settings = Settings(
        implementation=name,
        max_width=options.max_width,
        batch_elements=options.batch_elements or _BATCH_ELEMENTS[name],
        max_k=_MAX_K[name],
        programs=options.programs,
    )
    begin = time.monotonic()
    counted = campaign.run(
        settings,
        target,
        options.seed,
        options.rows,
        timeout=options.timeout,
        max_failures=options.max_failures,
    )
    seconds = time.monotonic() - begin
    header = make_header(
        "gpu" if target.device.platform == "gpu" else "cpu",
        str(target.device.device_kind),
        dataclasses.asdict(settings),
        options.commit,
    )
    header |= {"seeds": list(options.seed), "seconds": round(seconds, 1)}
    print(tally.format_tables(counted))
    print(
        f"\n{counted.rows:,} rows, {counted.rows_with_results:,} of them with k > 0, in"
        f" {counted.launches:,} calls and {counted.batches:,} batches of"
        f" {len(options.seed)} seeds on {name} ({target.device.device_kind}), {seconds:.0f} s;"
        f" {counted.oracle_rows:,} of the rows compared with NumPy as well:"
        f" {len(counted.failures)} failures"
    )
    for line in counted.failures:
        print(f"replay: {line}")
    if options.json:
        tally.save(options.json, header, counted)
        print(f"counts: {options.json}")
    return 1 if counted.failures else 0


if __name__ == "__main__":
    sys.exit(main())
