# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Serving benchmark: what exact top-k costs, and gains, in a decode step at real sizes.

    python -m examples.sparse_attention.serve                        # tiny, anywhere
    python -m examples.sparse_attention.serve --config v32 \
        --input-len 128000 --output-len 32 --batch 8 --top-k-implementation cuda
    python -m examples.sparse_attention.serve --config v32 --grid    # all cells of the table

Layers of the published sizes with random weights decode a batch of requests token by token, with
the chosen implementation of top-k and with the XLA expression side by side. A third run replaces
the selection by indices that cost nothing (evenly spaced over the row): the time it saves is
top-k's share of the step, and 1 / (1 - share) the most that any faster top-k could gain.

What is timed is what a server sees: one jitted step per token, the next step enqueued before the
last token is awaited, a time stamp per token. Every request of a batch starts and ends together;
several batches (`--waves`) follow one another, the implementations taking turns, so that drifting
clocks hit both alike.

    TTFT    time to first token: start of the batch to its first token. With a synthetic cache it
            is one decode step; `--prefill computed` runs the prompt through the model before.
    TPOT    time per output token of a request after the first
    ITL     inter-token latency, every single gap

Source of the figures' definitions: `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from examples.sparse_attention import command, model, selection
from examples.sparse_attention.config import CONFIGS, Config
from examples.sparse_attention.selection import Selector

GRID_WIDTH = 131072
GRID_BATCHES = (1, 8, 32)
GRID_LENGTHS = (2048, 8192, 32768, 128000, "mixed")
# Products per index head of one block of candidates: small enough for the L2 cache of an H100
# (50 MB), so that reducing them over heads does not go through memory.
SCORE_BLOCK_BYTES = 32 * 2**20
FREE = "free"


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

    def lengths(self, longest: int) -> np.ndarray:
        """Length of every request, `[batch]`."""
        if isinstance(self.input_len, int):
            return np.full(self.batch, self.input_len, np.int32)
        low, high = np.log([min(1024, longest), longest])
        return np.exp(np.random.default_rng(0).uniform(low, high, self.batch)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cells share.

    Attributes:
        config: sizes, `num_layers` of them.
        width: positions in the static cache.
        output_len: tokens decoded per request.
        waves: batches per cell and implementation.
        is_prefill_computed: whether prompts run through the model, or the cache is filled with
            random latents and keys.
        prefill_rows: rows of a prompt that attend at a time.
    """

    config: Config
    width: int
    output_len: int
    waves: int
    is_prefill_computed: bool
    prefill_rows: int


def select_evenly(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
    """A selection that costs nothing, and gathers from all over the row as a real one does."""
    del starts
    # Integer arithmetic in 64 bits would need x64; (length * i) / k in two parts does not overflow.
    i = jnp.arange(k, dtype=jnp.int32)
    whole, rest = lengths[:, None] // k, lengths[:, None] % k
    spread = whole * i + rest * i // k
    indices = jnp.where(lengths[:, None] >= k, spread, i)
    # The scores must be computed all the same, so the indices have to depend on them.
    never = jax.lax.optimization_barrier(scores)[:, :1] == -12345.0
    return jnp.where((i < lengths[:, None]) & ~never, indices, -1)


def selector(name: str) -> Selector:
    """The selector of an implementation, by the name it has in the tables."""
    if name == FREE:
        return select_evenly
    return selection.select_top_k(command.implementation_of(name))


# ------------------------------------------------------------------------------------- the model


def sized_config(name: str, layers: int, batch: int, width: int, vocab_size: int) -> Config:
    """A configuration with `layers` layers, and blocks of candidates that fit the batch."""
    config = CONFIGS[name]
    block = SCORE_BLOCK_BYTES // (4 * batch * config.index_heads)
    # A power of two, and a quarter of the row at most.
    block = min(1 << max(block, 128).bit_length() - 1, max(width // config.compression // 4, 1))
    return dataclasses.replace(config, num_layers=layers, vocab_size=vocab_size, index_block=block)


@functools.partial(jax.jit, static_argnames=("config", "width", "batch"))
def synthetic_caches(key: Array, config: Config, width: int, batch: int) -> list[model.Cache]:
    """Caches `[batch, width]` filled as if by a prompt: unit-size latents and index keys."""

    def fill(key: Array) -> model.Cache:
        latent_key, index_key, recent_key = jax.random.split(key, 3)
        empty = model.init_cache(config, width)
        keys = jax.random.normal(index_key, empty.index_keys.shape, jnp.bfloat16)
        scales = jnp.full(empty.index_scales.shape, 2.0**-6 if config.index_fp8 else 1.0)
        # One standard deviation is 64 fp8 units, well inside their range of 448.
        values = keys * 64 if config.index_fp8 else keys
        return model.Cache(
            latents=jax.random.normal(latent_key, empty.latents.shape, empty.latents.dtype),
            index_keys=values.astype(empty.index_keys.dtype),
            index_scales=scales,
            recent=jax.random.normal(recent_key, empty.recent.shape, empty.recent.dtype),
        )

    keys = jax.random.split(key, (config.num_layers, batch))
    return [jax.lax.map(fill, layer_keys) for layer_keys in keys]


def decode_function(config: Config, select: Selector) -> Callable[..., Any]:
    """The jitted step: (params, caches, tokens `[B]`, lengths `[B]`) -> the same three, advanced.

    Lengths are those before the step; the caches are updated in place.
    """

    def step(
        params: model.Params, caches: list[model.Cache], tokens: Array, lengths: Array
    ) -> tuple[list[model.Cache], Array, Array]:
        lengths = lengths + 1
        logits, caches, _ = model.decode_step(
            params, config, caches, tokens[:, None], lengths, select
        )
        return caches, logits[:, 0].argmax(axis=-1).astype(jnp.int32), lengths

    return jax.jit(step, donate_argnums=1)


def prefill_function(setting: Setting, select: Selector) -> Callable[..., Any]:
    """The jitted prefill of one prompt: (params, tokens `[T]`, length) -> caches of batch 1."""
    config = setting.config

    def prefill(params: model.Params, tokens: Array, length: Array) -> list[model.Cache]:
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        positions = jnp.where(positions < length, positions, -1)
        _, caches, _ = model.prefill(
            params, config, tokens, positions, select, setting.prefill_rows
        )
        starts = jnp.zeros(1, jnp.int32)
        return [
            model.unpack_cache(config, cache, starts, length[None], setting.width)
            for cache in caches
        ]

    return jax.jit(prefill)


# ---------------------------------------------------------------------------------------- timing


@dataclasses.dataclass
class Latencies:
    """Time stamps of one implementation in one cell, in seconds.

    Attributes:
        first: time to first token, one per wave.
        gaps: inter-token latencies, one array `[output_len - 1]` per wave.
        tokens: the decoded tokens, one array `[output_len, batch]` per wave.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    gaps: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)

    def summary(self, batch: int) -> dict[str, Any]:
        """The figures of the table, times in milliseconds."""
        seconds = sum(self.first) + sum(float(gaps.sum()) for gaps in self.gaps)
        requests = batch * len(self.first)
        return {
            "ttft_ms": statistics(np.array(self.first)),
            "tpot_ms": statistics(np.array([gaps.mean() for gaps in self.gaps])),
            "itl_ms": statistics(np.concatenate(self.gaps)),
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
    """A batch of requests at fixed sizes: weights, caches, and the compiled steps.

    Lengths are run-time values, so one server measures every cell of its batch size.
    """

    def __init__(self, setting: Setting, batch: int, implementations: Iterable[str]) -> None:
        self.setting, self.batch = setting, batch
        key = jax.random.key(0)
        initialise = jax.jit(model.init_model, static_argnames="config")
        self.params = initialise(key, setting.config)
        self.caches = synthetic_caches(key, setting.config, setting.width, batch)
        # The ring of the last positions wraps around while decoding; everything else that a wave
        # writes lies beyond the lengths at which the next one starts.
        self.rings = [jnp.copy(cache.recent) for cache in self.caches]
        self.first_tokens = jnp.arange(batch, dtype=jnp.int32) % setting.config.vocab_size
        self.steps = {
            name: decode_function(setting.config, selector(name)) for name in implementations
        }
        self.prefills = {
            name: prefill_function(setting, selector(name)) for name in implementations
        }

    def selected_sets(self, name: str, lengths: np.ndarray) -> np.ndarray:
        """Indices `[layers, B, 1, k]` that an implementation selects in the next step."""

        @jax.jit
        def select(
            params: model.Params, caches: list[model.Cache], tokens: Array, lengths: Array
        ) -> Array:
            return model.decode_step(
                params, self.setting.config, caches, tokens, lengths, selector(name)
            )[2]

        tokens = self.first_tokens[:, None]
        return np.asarray(select(self.params, self.caches, tokens, jnp.asarray(lengths) + 1))

    def prefill(self, name: str, lengths: np.ndarray) -> None:
        """Runs every request's prompt through the model, one after the other."""
        rows = self.setting.prefill_rows
        buffer = -(-int(lengths.max()) // rows) * rows
        prompt = jnp.arange(buffer, dtype=jnp.int32) * 40503 % self.setting.config.vocab_size
        caches = [
            self.prefills[name](self.params, jnp.roll(prompt, request), jnp.int32(length))
            for request, length in enumerate(lengths)
        ]
        self.caches = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)

    def serve_wave(self, name: str, lengths: np.ndarray, latencies: Latencies | None) -> None:
        """Decodes one batch; records its time stamps unless it only warms up."""
        step, params = self.steps[name], self.params
        lengths_on_device = jnp.asarray(lengths)
        self.caches = [
            cache._replace(recent=jnp.copy(ring))
            for cache, ring in zip(self.caches, self.rings, strict=True)
        ]
        jax.block_until_ready((self.caches, lengths_on_device))
        stamps = [time.perf_counter()]
        if self.setting.is_prefill_computed:
            self.prefill(name, lengths)
        caches, tokens, length = step(params, self.caches, self.first_tokens, lengths_on_device)
        decoded = []
        for i in range(self.setting.output_len):
            awaited = tokens
            if i + 1 < self.setting.output_len:
                # Enqueued before the last token is awaited: the device never waits for the host.
                caches, tokens, length = step(params, caches, tokens, length)
            awaited.block_until_ready()
            stamps.append(time.perf_counter())
            decoded.append(awaited)
        self.caches = caches
        if latencies is not None:
            gaps = np.diff(stamps)
            latencies.first.append(float(gaps[0]))
            latencies.gaps.append(gaps[1:])
            latencies.tokens.append(np.stack([np.asarray(token) for token in decoded]))


def measure_cell(server: Server, cell: Cell, chosen: str) -> list[dict[str, Any]]:
    """Measures one cell; one record per implementation, the chosen one first, xla last."""
    setting = server.setting
    lengths = cell.lengths(setting.width - setting.output_len)
    names = list(dict.fromkeys([chosen, "xla", FREE]))
    sets_agree = np.array_equal(
        server.selected_sets(chosen, lengths), server.selected_sets("xla", lengths)
    )
    latencies = {name: Latencies() for name in names}
    for name in names:
        server.serve_wave(name, lengths, None)
    for _ in range(setting.waves):
        for name in names:
            server.serve_wave(name, lengths, latencies[name])
    tokens_agree = all(
        np.array_equal(one, other)
        for one, other in zip(latencies[chosen].tokens, latencies["xla"].tokens, strict=True)
    )
    summaries = {name: timed.summary(cell.batch) for name, timed in latencies.items()}
    free_ms = summaries[FREE]["itl_ms"]["median"]
    records = []
    for name in names[:-1]:
        summary = summaries[name]
        share = max(1 - free_ms / summary["itl_ms"]["median"], 0.0)
        records.append(
            {
                "implementation": name,
                "batch": cell.batch,
                "input_len": cell.input_len,
                "output_len": setting.output_len,
                **summary,
                "top_k_share": share,
                "bound": 1 / (1 - share),
                "same_sets": sets_agree,
                "same_tokens": tokens_agree,
            }
        )
    return records


# ---------------------------------------------------------------------------------------- report


def format_table(records: list[dict[str, Any]]) -> str:
    """One line per cell and implementation."""
    header = (
        f"{'batch':>5} {'input':>7} {'top-k':<5} {'TTFT ms':>22} {'TPOT ms':>22} {'ITL ms':>22} "
        f"{'tokens/s':>9} {'req/s':>7} {'share':>6} {'bound':>6}  same sets, tokens"
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
            f"{r['output_tokens_per_s']:>9,.0f} {r['requests_per_s']:>7.1f} "
            f"{r['top_k_share']:>6.1%} {r['bound']:>5.2f}x  "
            f"{'yes' if r['same_sets'] else 'NO'}, {'yes' if r['same_tokens'] else 'NO'}"
        )
    return "\n".join(rows)


def gains(records: list[dict[str, Any]]) -> list[str]:
    """One sentence per cell: TPOT of the chosen implementation against xla."""
    sentences = []
    for ours, xla in itertools.pairwise(records):
        if ours["implementation"] == "xla":  # `xla` belongs to the next cell
            continue
        ratio = xla["tpot_ms"]["median"] / ours["tpot_ms"]["median"]
        sentences.append(
            f"batch {ours['batch']}, input {ours['input_len']}: median TPOT "
            f"{xla['tpot_ms']['median']:.3f} -> {ours['tpot_ms']['median']:.3f} ms, {ratio:.2f}x"
        )
    return sentences


def report_header(args: argparse.Namespace, setting: Setting, device: jax.Device) -> dict[str, Any]:
    """What a result file has to say about where its records come from."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": device.device_kind,
        "platform_version": device.client.platform_version,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": args.config,
        "layers": setting.config.num_layers,
        "vocab_size": setting.config.vocab_size,
        "width": setting.width,
        "waves": setting.waves,
        "prefill": args.prefill,
    }


def plot(records: list[dict[str, Any]], title: str, path: str) -> None:
    """Draws median TPOT over the input length, one panel per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({record["batch"] for record in records})
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(1 + 3.2 * len(batches), 3.6), layout="constrained", squeeze=False
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        of_batch = [r for r in records if r["batch"] == batch]
        labels = list(dict.fromkeys(str(r["input_len"]) for r in of_batch))
        for name in dict.fromkeys(r["implementation"] for r in of_batch):
            bars = [r["tpot_ms"]["median"] for r in of_batch if r["implementation"] == name]
            shift = -0.2 if name != "xla" else 0.2
            label = "lax.top_k (xla)" if name == "xla" else f"jax_topk ({name})"
            panel.bar(np.arange(len(bars)) + shift, bars, width=0.4, label=label)
        panel.set_xticks(range(len(labels)), labels, rotation=45)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("tokens in the cache")
    panels[0][0].set_ylabel("median time per output token, ms")
    panels[0][0].legend()
    figure.suptitle(title)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


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
    parser.add_argument("--prefill", choices=["synthetic", "computed"], default="synthetic")
    parser.add_argument("--prefill-rows", type=int, default=64, help="prompt rows per block")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="file for the picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures the cells, prints, writes; returns the exit status."""
    args = parse_arguments(arguments)
    with command.device_of(args.top_k_implementation):
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """`main` on the device that the arguments chose."""
    if args.grid:
        cells = [Cell(batch, length) for batch in GRID_BATCHES for length in GRID_LENGTHS]
    else:
        cells = [Cell(args.batch, args.input_len)]
    fixed = [cell.input_len for cell in cells if isinstance(cell.input_len, int)]
    needed = max(fixed, default=0) + args.output_len
    is_mixed = len(fixed) < len(cells)
    width = args.width or (GRID_WIDTH if is_mixed else -(-needed // 1024) * 1024)
    if needed > width:
        print(f"--width {width} is less than input and output, {needed} tokens", file=sys.stderr)
        return 2

    device = next(iter(jnp.zeros(()).devices()))
    print(f"{args.layers} layer(s) of {args.config}, cache width {width}, on {device.device_kind}")
    print(f"prefill: {args.prefill}" + ", not in TTFT" * (args.prefill == "synthetic"))
    records: list[dict[str, Any]] = []
    server = None
    with tqdm(total=len(cells), desc="cells", file=sys.stdout) as bar:
        for cell in cells:
            config = sized_config(args.config, args.layers, cell.batch, width, args.vocab_size)
            setting = Setting(
                config=config,
                width=width,
                output_len=args.output_len,
                waves=args.waves,
                is_prefill_computed=args.prefill == "computed",
                prefill_rows=args.prefill_rows,
            )
            if server is None or server.batch != cell.batch:
                server = None  # frees the caches of the last batch size before the next are made
                names = (args.top_k_implementation, "xla", FREE)
                server = Server(setting, cell.batch, names)
            records += measure_cell(server, cell, args.top_k_implementation)
            bar.update()

    print("\n" + format_table(records) + "\n\n" + "\n".join(gains(records)))
    title = f"{args.layers} layer(s) of {args.config} on {device.device_kind}"
    if args.json:
        result = {"header": report_header(args, setting, device), "records": records}
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(records, title, args.plot)
    if not all(record["same_sets"] and record["same_tokens"] for record in records):
        print("DISAGREEMENT: sets or tokens differ between the implementations")
        return 1
    print(
        f"OK: {args.top_k_implementation} and xla selected the same sets and decoded the same "
        "tokens in every cell"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
