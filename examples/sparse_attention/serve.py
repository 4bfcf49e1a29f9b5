# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Serving benchmark: what exact top-k costs, and gains, in a decode step at real sizes.

    python -m examples.sparse_attention.serve                        # tiny, anywhere
    python -m examples.sparse_attention.serve --config v32 \
        --input-len 128000 --output-len 32 --batch 8 --top-k-implementation cuda
    python -m examples.sparse_attention.serve --config v32 --grid    # all cells of the table

Layers of the published sizes with random weights decode a batch of requests token by token, side by
side with

    cuda, cpu   the chosen implementation of `jax_topk.top_k_indices`
    lax         `lax.top_k` of scores masked beyond the length, as one writes it without jax_topk
    xla         the XLA expression of jax_topk: the same sets, the indices in order

A last run replaces the selection by indices that cost nothing (evenly spaced over the row): the
time it saves is top-k's share of the step, and 1 / (1 - share) the most that any faster top-k could
gain. Both are taken from steps that nobody awaits, since at small batches tokens that a host awaits
tell as much about the host.

What is timed is what a server sees: one jitted step per token, the next two steps enqueued before
a token is awaited, a time stamp per token. Every request of a batch starts and ends together;
several batches (`--waves`) follow one another, the implementations taking turns, so that drifting
clocks hit both alike.

    TTFT    time to first token: start of the batch to its first token. With a synthetic cache it
            is one decode step; `--prefill computed` runs the prompts through the model before.
    TPOT    time per output token of a request after the first
    ITL     inter-token latency, every single gap
    step    time per step of as many steps that are enqueued at once, from the first one's start to
            the end of the last, the only one that is awaited

Every cell is also checked. The scores of its first step are computed once, and all
implementations must select the same set from them: if they do not, one of them is wrong. And all
tokens decoded with the chosen implementation and with xla must be the same. The steps that decode
them are different programs, which XLA may compile to different roundings; what it is asked to avoid
that is described in serve_programs.py. Of lax that is not asked: its indices come in the order of
the scores, so that attention adds up the same numbers in another order.

Exit status: 0 if everything agrees, 1 if anything differs, 2 if it cannot run as asked.

Source of the figures' definitions: `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import os
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.sparse_attention import command, model, serve_report
from examples.sparse_attention.compiling import Compiler
from examples.sparse_attention.config import CONFIGS
from examples.sparse_attention.serve_programs import (
    FREE,
    KEY,
    LAX,
    PendingPrograms,
    Programs,
    Setting,
    cache_shapes,
    new_setting,
    num_bytes,
    weight_shapes,
)

GRID_WIDTH = 131072
GRID_BATCHES = (1, 8, 32)
GRID_LENGTHS = (2048, 8192, 32768, 128000, "mixed")
STEPS_AHEAD = 2  # enqueued behind the one whose token is awaited
COMPILE_SHARE = 0.7  # of the time budget; what is not compiled by then is left out


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        batch: requests decoded together.
        input_len: tokens in the cache at the start, or "mixed": log-uniform from 1024 to the
            longest that fits, with a fixed seed.
    """

    batch: int
    input_len: int | str

    def __str__(self) -> str:
        return f"batch {self.batch}, input {self.input_len}"

    def lengths(self, longest: int) -> np.ndarray:
        """Length of every request, `[batch]`."""
        if isinstance(self.input_len, int):
            return np.full(self.batch, self.input_len, np.int32)
        low, high = np.log([min(1024, longest), longest])
        return np.exp(np.random.default_rng(0).uniform(low, high, self.batch)).astype(np.int32)


class Clock:
    """Progress lines with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def log(self, text: str) -> None:
        """Prints one line."""
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)


# ---------------------------------------------------------------------------------------- timing


@dataclasses.dataclass
class Latencies:
    """Time stamps of one implementation in one cell, in seconds.

    Attributes:
        first: time to first token, one per wave.
        gaps: inter-token latencies, one array `[output_len - 1]` per wave.
        steps: time per step where none is awaited but the last, one per wave.
        tokens: the decoded tokens, one array `[output_len, batch]` per wave.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    gaps: list[np.ndarray] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)

    def summary(self, batch: int) -> dict[str, Any]:
        """The figures of the table, times in milliseconds."""
        seconds = sum(self.first) + sum(float(gaps.sum()) for gaps in self.gaps)
        requests = batch * len(self.first)
        return {
            "ttft_ms": statistics(np.array(self.first)),
            "tpot_ms": statistics(np.array([gaps.mean() for gaps in self.gaps])),
            "itl_ms": statistics(np.concatenate(self.gaps)),
            "step_ms": statistics(np.array(self.steps)),
            "requests_per_s": requests / seconds,
            "output_tokens_per_s": requests * self.tokens[0].shape[0] / seconds,
        }


def statistics(seconds: np.ndarray) -> dict[str, float]:
    """Mean, median and 99th percentile, in milliseconds."""
    return {
        "mean": 1e3 * float(seconds.mean()),
        "median": 1e3 * float(np.median(seconds)),
        "p99": 1e3 * float(np.percentile(seconds, 99)),
    }


class Server:
    """A batch of requests at fixed sizes: weights, caches, and the compiled programs.

    Lengths are run-time values, so one server measures every cell of its batch size.
    """

    def __init__(self, programs: Programs, params: model.Params) -> None:
        self.programs, self.params = programs, params
        self.batch = programs.setting.batch
        self.caches = programs.fill(jax.random.key(0))
        # The ring of the last positions wraps around while decoding; everything else that a wave
        # writes lies beyond the lengths at which the next one starts.
        self.rings = [jnp.copy(cache.recent) for cache in self.caches]
        vocab_size = programs.setting.config.vocab_size
        self.first_tokens = jnp.arange(self.batch, dtype=jnp.int32) % vocab_size

    def selected_sets(self, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """What each implementation selects in the first layer of the next step, `[B, k]`.

        All of them from the same scores, so that nothing but top-k can make them differ.
        """
        on_device = jnp.asarray(lengths)
        scores = self.programs.scores(self.params, self.caches, self.first_tokens, on_device)
        selections = self.programs.selections
        return {name: np.asarray(run(scores, on_device)) for name, run in selections.items()}

    def prefill(self, name: str, lengths: np.ndarray) -> jax.Array:
        """Runs every request's prompt through the model; returns the first tokens `[B]`."""
        setting = self.programs.setting
        prompt = jnp.arange(setting.prefill_buffer, dtype=jnp.int32) * 40503
        prompt %= setting.config.vocab_size
        tokens = []
        for request, length in enumerate(lengths):
            self.caches, token = self.programs.prefills[name](
                self.params,
                self.caches,
                jnp.roll(prompt, request),
                jnp.int32(length),
                jnp.int32(request),
            )
            tokens.append(token)
        return jnp.stack(tokens)

    def serve_wave(
        self, name: str, lengths: np.ndarray, output_len: int, latencies: Latencies | None
    ) -> None:
        """Decodes one batch; records its time stamps unless it only warms up."""
        step, params = self.programs.steps[name], self.params
        length = jnp.asarray(lengths)
        self.caches = [
            cache._replace(recent=jnp.copy(ring))
            for cache, ring in zip(self.caches, self.rings, strict=True)
        ]
        jax.block_until_ready((self.caches, length))
        stamps = [time.perf_counter()]
        if latencies is not None and name in self.programs.prefills:
            tokens, caches = self.prefill(name, lengths), self.caches
        else:
            caches, tokens, length = step(params, self.caches, self.first_tokens, length)
        decoded = [tokens]
        for i in range(output_len):
            # Enqueued before the last token is awaited: the device never waits for the host, even
            # where a step takes less than the host's longest pauses.
            while len(decoded) < min(i + 1 + STEPS_AHEAD, output_len):
                caches, tokens, length = step(params, caches, tokens, length)
                decoded.append(tokens)
            decoded[i].block_until_ready()
            stamps.append(time.perf_counter())
        self.caches = caches
        if latencies is not None:
            gaps = np.diff(stamps)
            latencies.first.append(float(gaps[0]))
            latencies.gaps.append(gaps[1:])
            latencies.tokens.append(np.stack([np.asarray(token) for token in decoded]))

    def seconds_per_step(self, name: str, lengths: np.ndarray, num_steps: int) -> float:
        """Time per step of steps that are enqueued at once; what they decode is not kept."""
        step, tokens, length = self.programs.steps[name], self.first_tokens, jnp.asarray(lengths)
        jax.block_until_ready((self.caches, length))
        start = time.perf_counter()
        for _ in range(num_steps):
            self.caches, tokens, length = step(self.params, self.caches, tokens, length)
        tokens.block_until_ready()
        return (time.perf_counter() - start) / num_steps


def compared_with(chosen: str) -> list[str]:
    """The implementations that are measured: the chosen one, lax, and xla."""
    return list(dict.fromkeys([chosen, LAX, "xla"]))


def measure_cell(
    server: Server, cell: Cell, chosen: str, output_len: int, waves: int
) -> list[serve_report.Record]:
    """Measures one cell; one record per implementation, the chosen one first."""
    lengths = cell.lengths(server.programs.setting.width - output_len)
    names = [*compared_with(chosen), FREE]
    sets = server.selected_sets(lengths)
    latencies = {name: Latencies() for name in names}
    gc.collect()  # now rather than while a token is awaited
    for name in names:
        server.serve_wave(name, lengths, output_len, None)
    for _ in range(waves):
        for name in names:
            server.serve_wave(name, lengths, output_len, latencies[name])
            latencies[name].steps.append(server.seconds_per_step(name, lengths, output_len))
    # The chosen implementation also lists its set in xla's order; that of lax is its own.
    is_same_set = {name: bool(np.array_equal(sets[name], sets["xla"])) for name in sets}
    is_same_set[LAX] = bool(np.array_equal(np.sort(sets[LAX]), np.sort(sets["xla"])))
    tokens_agree = all(
        np.array_equal(one, other)
        for one, other in zip(latencies[chosen].tokens, latencies["xla"].tokens, strict=True)
    )
    summaries = {name: timed.summary(cell.batch) for name, timed in latencies.items()}
    free = summaries[FREE]["step_ms"]
    records = []
    for name in names[:-1]:
        summary = summaries[name]
        share = max(1 - free["median"] / summary["step_ms"]["median"], 0.0)
        records.append(
            {
                "implementation": name,
                "batch": cell.batch,
                "input_len": cell.input_len,
                "output_len": output_len,
                **summary,
                "free_step_ms": free,
                "top_k_share": share,
                "bound": 1 / (1 - share),
                "same_sets": is_same_set[name],
                # Not asked of lax: see the top of this file.
                "same_tokens": None if name == LAX else tokens_agree,
            }
        )
    return records


# --------------------------------------------------------------------------------------- command


def report_header(
    args: argparse.Namespace, width: int, vocab_size: int, device: jax.Device
) -> dict[str, Any]:
    """What a result file has to say about where its records come from."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    config = CONFIGS[args.config]
    return {
        "device": device.device_kind,
        "platform_version": device.client.platform_version,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": args.config,
        "layers": args.layers,
        "vocab_size": vocab_size,
        "weights": "fp8" if config.weight_fp8 else jnp.dtype(config.dtype).name,
        "width": width,
        "output_len": args.output_len,
        "waves": args.waves,
        "prefill": args.prefill,
        "left_out": [],
    }


def memory_problem(settings: list[Setting], device: jax.Device) -> str | None:
    """Prints what weights and caches take; returns why that is too much for the device, if so."""
    weights = num_bytes(weight_shapes(settings[0].config))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    available = "" if limit is None else f"; {limit / 1e9:.1f} GB for JAX on the device"
    print(f"weights {weights / 1e9:.2f} GB{available}")
    for setting in settings:
        caches = num_bytes(cache_shapes(setting))
        print(f"caches of batch {setting.batch}: {caches / 1e9:.2f} GB")
        if limit is not None and weights + caches > limit:
            return (
                f"--batch {setting.batch} needs {(weights + caches) / 1e9:.1f} GB for weights and "
                f"caches, more than JAX may use; pass a smaller --batch, --width or --layers"
            )
    return None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command.new_parser("examples.sparse_attention.serve", __doc__)
    command.add_implementation(parser, "--top-k-implementation")
    parser.add_argument("--config", choices=CONFIGS, default="tiny", help="sizes of a layer")
    parser.add_argument("--layers", type=int, default=1, help="number of layers")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=1024,
        help="tokens; far fewer than a real model's, whose output layer all its layers share",
    )
    parser.add_argument("--batch", type=int, default=4, help="requests decoded together")
    parser.add_argument(
        "--input-len",
        type=lambda text: text if text == "mixed" else int(text),
        default=3000,
        help="tokens in the cache at the start, or 'mixed'",
    )
    parser.add_argument("--output-len", type=int, default=32, help="tokens decoded per request")
    parser.add_argument("--waves", type=int, default=5, help="batches per cell")
    parser.add_argument("--width", type=int, help="static cache; default: as long as needed")
    parser.add_argument(
        "--grid",
        action="store_true",
        help=f"batches {GRID_BATCHES} x inputs {GRID_LENGTHS} at width {GRID_WIDTH}",
    )
    parser.add_argument(
        "--prefill",
        choices=["synthetic", "computed"],
        default="synthetic",
        help="fill the cache with random numbers, or run prompts through the model (in TTFT)",
    )
    parser.add_argument("--prefill-rows", type=int, default=256, help="prompt rows per block")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds after which no further cell is begun; those left out are listed",
    )
    parser.add_argument("--json", help="file for the results, written after every cell")
    parser.add_argument("--plot", help="file for the picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures the cells, prints, writes; returns the exit status."""
    args = parse_arguments(arguments)
    with command.device_of(args.top_k_implementation):
        return measure(args)


def problem_of(args: argparse.Namespace, needed: int, width: int) -> str | None:
    """Why the arguments cannot be served, or None."""
    if args.output_len < 2:
        return f"--output-len {args.output_len} leaves no gap between tokens; pass at least 2"
    if needed > width:
        return f"--width {width} is less than input and output, {needed} tokens"
    if args.grid and args.prefill == "computed":
        return (
            "--prefill computed compiles a program per prompt length, too many for --grid; pass "
            "--batch and --input-len instead"
        )
    return None


def measure(args: argparse.Namespace) -> int:
    """`main` on the device that the arguments chose."""
    clock = Clock()
    if args.grid:
        cells = [Cell(batch, length) for batch in GRID_BATCHES for length in GRID_LENGTHS]
    else:
        cells = [Cell(args.batch, args.input_len)]
    fixed = [cell.input_len for cell in cells if isinstance(cell.input_len, int)]
    needed = max(fixed, default=0) + args.output_len
    is_mixed = len(fixed) < len(cells)
    width = args.width or (GRID_WIDTH if is_mixed else -(-needed // 1024) * 1024)
    if problem := problem_of(args, needed, width):
        print(problem, file=sys.stderr)
        return 2

    buffer = 0
    if args.prefill == "computed":
        longest = int(cells[0].lengths(width - args.output_len).max())
        buffer = -(-longest // args.prefill_rows) * args.prefill_rows
    settings = [
        new_setting(
            args.config, args.layers, args.vocab_size, batch, width, buffer, args.prefill_rows
        )
        for batch in dict.fromkeys(cell.batch for cell in cells)
    ]
    device = next(iter(jnp.zeros(()).devices()))
    print(f"{args.layers} layer(s) of {args.config}, cache width {width}, on {device.device_kind}")
    print(f"prefill: {args.prefill}" + ", not in TTFT" * (args.prefill == "synthetic"))
    if problem := memory_problem(settings, device):
        print(problem, file=sys.stderr)
        return 2

    names = compared_with(args.top_k_implementation)
    compiler = Compiler(clock.log)
    try:
        params, programs = compile_programs(settings, names, compiler, clock, args.budget)
    except RuntimeError as error:
        print(f"cannot run here\n{error}", file=sys.stderr)
        return 2
    finally:
        compiler.stop()
    result = {
        "header": report_header(args, width, settings[0].config.vocab_size, device),
        "records": [],
    }
    measure_cells(cells, params, programs, args, clock, result)
    return report(result, args)


def compile_programs(
    settings: list[Setting],
    names: list[str],
    compiler: Compiler,
    clock: Clock,
    budget: float | None,
) -> tuple[model.Params, dict[int, Programs]]:
    """Makes the weights and compiles the programs by batch size; those in time for the budget."""

    def init(key: jax.Array) -> model.Params:
        return model.init_model(key, settings[0].config)

    weights = compiler.submit("weights", jax.jit(init).lower(KEY))
    pending = [PendingPrograms(setting, names, compiler) for setting in settings]
    for batch in pending:
        batch.submit_rest()
    clock.log("all programs are lowered and being compiled")
    params = jax.block_until_ready(weights.result()(jax.random.key(0)))
    programs = {}
    for batch in pending:
        seconds = None if budget is None else max(COMPILE_SHARE * budget - clock.elapsed(), 0)
        compiled = batch.wait(seconds)
        if compiled is None:
            clock.log(f"the programs of batch {batch.setting.batch} were not compiled in time")
        else:
            programs[batch.setting.batch] = compiled
    return params, programs


def measure_cells(
    cells: list[Cell],
    params: model.Params,
    programs: dict[int, Programs],
    args: argparse.Namespace,
    clock: Clock,
    result: serve_report.Result,
) -> None:
    """Measures cell by cell; adds to the result, and to its file, after each."""
    server = None
    longest = 0.0  # seconds that a cell took
    for cell in cells:
        start = clock.elapsed()
        is_late = args.budget is not None and start + longest > args.budget
        if is_late or cell.batch not in programs:
            result["header"]["left_out"].append(str(cell))
        else:
            if server is None or server.batch != cell.batch:
                server = None  # frees the caches of the last batch size before the next are made
                server = Server(programs[cell.batch], params)
            records = measure_cell(
                server, cell, args.top_k_implementation, args.output_len, args.waves
            )
            result["records"] += records
            times = ", ".join(
                f"{r['implementation']} {r['tpot_ms']['median']:.3f} ms" for r in records
            )
            clock.log(f"{cell}: median TPOT {times}")
            longest = max(longest, clock.elapsed() - start)
        if args.json:
            serve_report.write_result(result, args.json)


def report(result: serve_report.Result, args: argparse.Namespace) -> int:
    """Prints the tables and the verdict, draws the picture; returns the exit status."""
    records, left_out = result["records"], result["header"]["left_out"]
    if left_out:
        print(f"INCOMPLETE: --budget {args.budget:g} left out " + "; ".join(left_out))
    if not records:
        print("nothing was measured; pass a larger --budget", file=sys.stderr)
        return 2
    print("\n" + serve_report.format_table(records))
    print("\n" + "\n".join(serve_report.gains(records)))
    if args.plot:
        serve_report.plot(result, args.plot)
    name = args.top_k_implementation
    others = " and ".join(compared_with(name)[1:])
    wrong = dict.fromkeys(r["implementation"] for r in records if not r["same_sets"])
    if wrong:
        print(
            f"DISAGREEMENT: {' and '.join(wrong)} selected other sets than xla from the same scores"
        )
        return 1
    if any(record["same_tokens"] is False for record in records):
        print(
            f"DISAGREEMENT: {name} and xla selected the same sets from the same scores, but the "
            "decoded tokens differ. If XLA compiled the two steps to different roundings, they "
            "agree under XLA_FLAGS=--xla_gpu_autotune_level=0, where it does not time algorithms"
        )
        return 1
    print(
        f"OK: in every cell measured, {name} selected the same sets as {others}, and decoded the "
        "same tokens as xla"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
