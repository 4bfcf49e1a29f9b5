"""Command line of the bench: `python -m jax_topk.bench --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

from . import cases, compare, goals, peers, plot, processes, results, sharded_tables, tables
from .cases import Block
from .results import Record, Results

T = TypeVar("T")

SECONDS_BETWEEN_SAVES = 20.0
SIMULATED_DEVICES = 8

DESCRIPTION = """\
Times exact top-k with run-time row lengths against jax.lax.top_k, torch.topk and FlashInfer (where
installed) and against floors, proving every result before and after it is timed.

On a GPU the default is the grid rows x length at static width 163840; on a CPU the CPU target is
timed against jax.lax.top_k (JAX_PLATFORMS=cpu forces this on a machine with a GPU)."""

EPILOG = """\
examples:
  python -m jax_topk.bench --quick
      a few cells, a minute or less
  python -m jax_topk.bench --suite full --json jax_topk/bench/results/h100.json
      everything the committed GPU results hold
  python -m jax_topk.bench --suite cpu --json jax_topk/bench/results/cpu.json
      everything the committed CPU results hold
  JAX_PLATFORMS=cpu python -m jax_topk.bench --suite sharded --devices 8 \\
      --json jax_topk/bench/results/sharded_cpu8.json
      rows spread over 8 simulated devices; without JAX_PLATFORMS, over all GPUs
  python -m jax_topk.bench --rows 1,32 --length 32768,mixed --distribution normal,striped:256:8 \\
      --implementation cuda --metric graph_chain_us --plan path=exact
      chosen cells of the CUDA kernel, on a forced path
  python -m jax_topk.bench --from new.json --compare old.json --peers peers.csv --goals
      judges recorded results; measures nothing

metrics:
  graph_chain_us    the kernel alone: back-to-back launches in one CUDA graph, per launch
  behind_others_us  the kernel behind others that drive it out of the caches, as in a decode step
  jit_chain_us      inside a jitted function: a step of a chain of dependent selections
  call_us           one call of a jitted function from Python
README tables and plots: python -m jax_topk.bench.report"""


def _list_of(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Turns ValueError sentences into argparse's."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _distributions(text: str) -> tuple[str, ...]:
    from . import inputs

    items = tuple(text.split(","))
    for item in items:
        inputs.check_distribution(item)
    return items


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_topk.bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure (each overrides the suite's value)")
    what.add_argument(
        "--suite",
        choices=cases.SUITES,
        help="grid: rows x length (default on a GPU); cpu: the CPU grid (default on a CPU unless a "
        "flag of this group is given); full: everything of the committed GPU results; sharded: "
        "rows of 1 M and 8 M elements, each spread over several devices",
    )
    what.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices of --suite sharded (default: all GPUs; 8 on a CPU, which simulates them: "
        "they share its processors, so the figures show correctness and volume, not speed)",
    )
    what.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that the simulated devices of --suite sharded are dealt to (1); they are "
        "joined by jax.distributed on this machine",
    )
    what.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="which of the processes this is; --processes sets it for those that it starts",
    )
    what.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where rank 0 listens; --processes sets it too",
    )
    what.add_argument(
        "--rows",
        type=_list_of(lambda text: cases.parse_numbers(text, "--rows")),
        metavar="N,...",
        help="batch sizes, e.g. 1,32,256",
    )
    what.add_argument(
        "--length",
        type=_list_of(cases.parse_lengths),
        metavar="N,...",
        help="valid entries per row, e.g. 4096,mixed; mixed: log-uniform from 1024 to the width; "
        "full: whole rows, without a lengths argument where the metric allows",
    )
    what.add_argument(
        "--distribution",
        type=_list_of(_distributions),
        metavar="NAME,...",
        help="values: normal, clust, equal, sorted, sorted_desc, head, relu; made against guessing "
        "kernels: periodic[:STRIDE[:OFFSET]], hidden[:STRIDE[:OFFSET]], striped[:CHUNK[:PERIOD]]; "
        "NAME=FILE.npy reads scores [rows, width] from a file",
    )
    what.add_argument(
        "--k",
        type=_list_of(lambda text: cases.parse_numbers(text, "--k")),
        metavar="N,...",
        help="entries selected per row, e.g. 64,2048",
    )
    what.add_argument(
        "--dtype",
        type=_list_of(lambda text: cases.parse_choices(text, cases.DTYPES, "--dtype")),
        metavar="NAME,...",
        help=", ".join(cases.DTYPES),
    )
    what.add_argument(
        "--output",
        type=_list_of(lambda text: cases.parse_choices(text, cases.OUTPUTS, "--output")),
        metavar="NAME,...",
        help="indices (ascending; default on a GPU), values_sorted (both, best first; default on a "
        "CPU) or values_unsorted (both, ascending index)",
    )
    what.add_argument(
        "--width",
        type=_list_of(lambda text: cases.parse_numbers(text, "--width")),
        metavar="N,...",
        help=f"allocated columns per row, e.g. 8192,163840 (default {cases.WIDTH})",
    )
    what.add_argument(
        "--implementation",
        type=_list_of(
            lambda text: cases.parse_choices(
                text, (*cases.IMPLEMENTATIONS, *cases.SHARDED), "--implementation"
            )
        ),
        metavar="NAME,...",
        help="this package's cuda, cpu, xla; lax; torch; flashinfer (default: all but xla that are "
        f"there). With --suite sharded: {', '.join(cases.SHARDED)} (default: all)",
    )
    what.add_argument(
        "--metric",
        type=_list_of(lambda text: cases.parse_choices(text, cases.METRICS, "--metric")),
        metavar="NAME,...",
        help="see below; default: the natural ones of each implementation",
    )
    what.add_argument(
        "--plan",
        default=None,
        metavar="TEXT",
        help="overrides of the CUDA kernel's launch plan, e.g. path=exact,cluster=4",
    )
    what.add_argument(
        "--cold",
        action="store_true",
        help="rotate over enough rows that the L2 cache never holds the next ones (CUDA kernel and "
        "read-only floor; cells too small for it are skipped)",
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument("--quick", action="store_true", help="few cells of each block, few samples")
    how.add_argument(
        "--launches", type=int, default=20, metavar="N", help="launches per CUDA graph (20)"
    )
    how.add_argument("--replays", type=int, default=50, metavar="N", help="replays of a graph (50)")
    how.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no cell after this time; what was measured is kept",
    )
    how.add_argument(
        "--commit",
        metavar="SHA",
        help="commit to record where the measuring machine has a copy of the tree without git",
    )
    then = parser.add_argument_group("what to do with the results")
    then.add_argument("--json", metavar="FILE", help="write header and records")
    then.add_argument(
        "--append",
        action="store_true",
        help="keep the records that --json FILE already holds; same machine and commit only",
    )
    then.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="take results from this JSON instead of measuring",
    )
    then.add_argument(
        "--plot", metavar="FILE", help="draw time over length, e.g. h100.svg (needs matplotlib)"
    )
    then.add_argument(
        "--compare",
        metavar="OLD.json",
        help="what is faster or slower than recorded results, beyond noise",
    )
    then.add_argument(
        "--peers",
        metavar="FILE.csv",
        help="ratios to a table of other kernels' times, cell by cell",
    )
    then.add_argument(
        "--goals", action="store_true", help="the project's speed targets: met or missed"
    )
    return parser


OVERRIDES = {
    # flag -> field of Block
    "rows": "rows",
    "length": "lengths",
    "distribution": "distributions",
    "k": "ks",
    "dtype": "dtypes",
    "output": "outputs",
    "implementation": "implementations",
    "metric": "metrics",
    "plan": "plan",
}


def build_blocks(options: argparse.Namespace, platform: str) -> list[Block]:
    """The blocks that the options ask for; raises ValueError with a sentence if none is legal."""
    given = {
        field: value
        for flag, field in OVERRIDES.items()
        if (value := getattr(options, flag)) is not None
    }
    suite = options.suite
    if suite is None:
        is_chosen = bool(given) or options.width is not None or options.cold
        suite = "grid" if platform == "gpu" or is_chosen else "cpu"
    if suite == "full":
        blocks = cases.full_suite()
    elif suite == "cpu":
        blocks = cases.cpu_suite()
    elif suite == "sharded":
        blocks = cases.sharded_suite(options.devices)
    elif platform == "gpu":
        blocks = [Block()]
    else:
        blocks = [
            Block(
                rows=cases.CPU_ROWS,
                lengths=("full",),
                distributions=("normal",),
                outputs=("values_sorted",),
            )
        ]
    if options.cold:
        given["cold"] = True
    blocks = [replace(block, **given) for block in blocks]
    if options.width is not None:
        blocks = [replace(block, width=width) for block in blocks for width in options.width]
    if options.quick:
        # Of the sharded suite the shorter rows, since the others take most of its time.
        blocks = [cases.quick(block) for block in blocks[: 1 if suite == "sharded" else None]]
    blocks = list(dict.fromkeys(blocks))
    _check_suite(suite, blocks)

    for flag, least in (("rows", 1), ("ks", 1), ("width", 1)):
        for block in blocks:
            value = getattr(block, flag)
            if min(value if isinstance(value, tuple) else (value,)) < least:
                raise ValueError(f"--{flag.rstrip('s') if flag == 'ks' else flag} must be positive")
    if any(block.cold for block in blocks) and platform != "gpu":
        raise ValueError("--cold rotates buffers of a CUDA kernel; it needs a GPU")
    if all(next(block.cases(), None) is None for block in blocks):
        raise ValueError(
            f"no cell is left: k and length must not exceed the width "
            f"({', '.join(str(block.width) for block in blocks)})"
        )
    return blocks


def _check_suite(suite: str, blocks: Sequence[Block]) -> None:
    """Raises ValueError with a sentence where a flag does not fit the suite."""
    legal = cases.SHARDED if suite == "sharded" else cases.IMPLEMENTATIONS
    for block in blocks:
        if unknown := [name for name in block.implementations if name not in legal]:
            raise ValueError(
                f"--implementation {unknown[0]} is none of --suite {suite}, which has "
                f"{', '.join(legal)}"
            )
        if suite != "sharded":
            continue
        of_kernel = [m for m in block.metrics if m in (cases.GRAPH, cases.OTHERS)]
        if block.cold or block.plan or of_kernel:
            raise ValueError(
                "--suite sharded takes neither --cold nor --plan nor a metric of a kernel"
                f"{f' ({of_kernel[0]})' if of_kernel else ''}: it times whole programs"
            )
        if block.outputs != ("values_sorted",):
            raise ValueError("--suite sharded puts out values_sorted; leave out --output")
        if block.width % block.devices:
            raise ValueError(
                f"--width {block.width} does not divide by --devices {block.devices}; pass a "
                "multiple"
            )
        if max(block.ks) > block.width // block.devices:
            raise ValueError(
                f"--k {max(block.ks)} exceeds the {block.width // block.devices} elements that each"
                f" of {block.devices} devices holds of a row; pass a smaller one"
            )


def _check_processes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command with a sentence where the work cannot be dealt to processes."""
    devices = options.devices or SIMULATED_DEVICES
    if options.suite != "sharded" or options.source:
        parser.error("--processes is for measuring --suite sharded")
    if (options.rank is None) != (options.coordinator is None):
        parser.error("--rank and --coordinator go together; leave both to --processes")
    if options.processes < 2 or devices % options.processes:
        parser.error(
            f"--processes {options.processes} does not divide --devices {devices}; pass a divisor"
        )
    if options.budget is not None:
        parser.error("--budget would stop the processes at different cells; leave it out")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        parser.error("--processes deals out simulated devices; set JAX_PLATFORMS=cpu")


def _platform() -> tuple[str, str]:
    """(`"gpu"` or `"cpu"`, name of the device)."""
    import jax

    backend = jax.default_backend()
    if backend not in ("gpu", "cpu"):
        raise ValueError(
            f"the bench measures NVIDIA GPUs and CPUs, and JAX runs on {backend!r} here; set "
            "JAX_PLATFORMS=cpu to measure the CPU target"
        )
    return backend, str(jax.devices()[0].device_kind)


def _default_devices(platform: str) -> int:
    """All GPUs, or as many simulated devices as the committed results have."""
    import jax

    return jax.device_count() if platform == "gpu" else SIMULATED_DEVICES


SAME_RUN_FIELDS = (
    "target",
    "devices",
    "processes",
    "gpu",
    "driver",
    "jax",
    "jaxlib",
    "commit",
    "dirty",
)


def _older(options: argparse.Namespace, header: dict[str, object]) -> list[Record]:
    """Records to keep under `--append`; raises ValueError if they are of another machine."""
    if not (options.append and options.json and os.path.exists(options.json)):
        return []
    old = results.load(options.json)
    for field in SAME_RUN_FIELDS:
        if old.header.get(field) != header.get(field):
            raise ValueError(
                f"--append: {options.json} has {field} {old.header.get(field)!r} and this run has "
                f"{header.get(field)!r}; results of one file must come from one machine and "
                "commit. Leave out --append, or write to another file"
            )
    return old.records


def measure(options: argparse.Namespace) -> Results:
    """Measures what the options ask for, saving as it goes."""
    # torch and JAX share the GPU here, so neither may take all of its memory at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from .runner import Progress, Runner, Settings

    is_sharded = options.suite == "sharded"
    if is_sharded:
        from . import sharded

        sharded.request_devices((options.devices or SIMULATED_DEVICES) // options.processes)
        if options.rank is not None:
            processes.join(options.coordinator, options.processes, options.rank)
    elif options.devices is not None:
        raise ValueError("--devices is for --suite sharded; the other suites measure one device")
    platform, device = _platform()
    if is_sharded:
        options.devices = options.devices or _default_devices(platform)
        devices = sharded.find_devices(platform, options.devices)
    blocks = build_blocks(options, platform)
    settings = Settings(launches=options.launches, replays=options.replays)
    if options.quick:
        settings = replace(settings, replays=min(20, options.replays), budget_s=0.05)
    named = {field.name: getattr(settings, field.name) for field in fields(settings)}
    header = results.make_header(platform, device, named, options.commit)
    if is_sharded:
        header |= results.sharded_fields(platform, options.devices, options.processes)
    done = Results(header, _older(options, header))
    if platform == "cpu" and is_sharded:
        print(f"The {options.devices} devices are simulated by one CPU.", file=sys.stderr)
    elif platform == "cpu":
        print("JAX has no GPU here: the CPU target is timed.", file=sys.stderr)

    progress = Progress(sum(sum(1 for _ in block.cases()) for block in blocks))
    num_skipped = sum(block.num_skipped() for block in blocks)
    if num_skipped:
        progress.say(f"{num_skipped} cells left out: their k or length exceeds their width")
    runner = Runner(platform, settings, progress.say)
    if is_sharded:
        runner = sharded.ShardedRunner(platform, devices, settings, progress.say)
    stop_at = None if options.budget is None else time.monotonic() + options.budget
    fresh: list[Record] = []
    last_save = time.monotonic()
    try:
        runner.warm_up()
        header["clocks_before"] = results.gpu_clocks() if platform == "gpu" else None
        for records in runner.run(blocks, stop_at):
            fresh += records
            progress.step(records)
            if options.json and time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                done.merge(fresh)
                done.save(options.json)
                last_save = time.monotonic()
    finally:
        progress.close()
        header["clocks_after"] = results.gpu_clocks() if platform == "gpu" else None
        done.merge(fresh)
        if options.json and fresh:
            done.save(options.json)
    if not fresh:
        raise ValueError("nothing was measured; the lines above say why")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns 1 if a result was wrong, 2 on a usage error, else 0."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.launches < 1 or options.replays < 1:
        parser.error("--launches and --replays must be at least 1")
    if options.devices is not None and options.devices < 2:
        parser.error(f"--devices {options.devices} spreads nothing; pass 2 or more")
    if options.processes != 1 or options.rank is not None or options.coordinator is not None:
        _check_processes(parser, options)
        if options.rank is None:
            given = sys.argv[1:] if arguments is None else arguments
            return processes.launch(given, options.processes)
        if options.rank > 0:
            options.json = options.plot = None  # rank 0 writes the files
    if options.append and not options.json:
        parser.error("--append adds to a file; name it with --json FILE")
    if options.source and options.json:
        parser.error("--from measures nothing, so there is nothing to write with --json")
    try:
        # Read what the results are compared with first: a typing error must not cost a run.
        old = results.load(options.compare) if options.compare else None
        times = peers.load(options.peers) if options.peers else None
        if options.plot and plot.why_not():
            print(plot.why_not(), file=sys.stderr)
        found = results.load(options.source) if options.source else measure(options)
    except ValueError as error:
        parser.error(str(error))

    header = found.header
    print(
        f"{header.get('gpu') or header.get('processor')}, jax {header.get('jax')}, jaxlib "
        f"{header.get('jaxlib')}, jax_topk {header.get('jax_topk')}, commit "
        f"{header.get('commit') or 'unknown'}{' with changes' if header.get('dirty') else ''}, "
        f"{header.get('date')}"
    )
    tables.print_tables([record for record in found.records if record.devices == 1])
    sharded_tables.print_tables(found)
    if times is not None:
        peers.print_duels(found.records, times)
    if options.goals:
        goals.print_goals(found.records)
    if old is not None:
        compare.print_comparison(old, found)
    if options.plot and not plot.why_not():
        if plot.draw(found, options.plot):
            print(f"plot: {options.plot}")
        else:
            print("no plot: no float32 cell of normal values was measured", file=sys.stderr)
    if options.json:
        print(f"results: {options.json} ({len(found.records)} records)")
    wrong = [record for record in found.records if record.is_wrong]
    for record in wrong:
        print(f"{record.verified}: {record.implementation} {record.case}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
