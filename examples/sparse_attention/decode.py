# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Decodes real text through one DSA layer and checks that top-k's implementation changes nothing.

    python -m examples.sparse_attention --implementation auto

Several streams of text (sources of Python's standard library, as bytes) are read by a small DSA
model with random weights. The streams arrive one after the other, so their cached lengths differ
and grow at every step; the cache has one static width, and the whole run is one `lax.scan` inside
one `jax.jit`. The run is made twice, with the chosen implementation of top-k and with the plain
XLA expression, and every step's selected sets and outputs are compared bit for bit.

Exit status: 0 if everything agrees, 1 if anything differs, 2 if the implementation cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from examples.sparse_attention import command, corpus, model, selection
from examples.sparse_attention.compiling import options_without_autotuning
from examples.sparse_attention.config import TINY, Config


@dataclasses.dataclass(frozen=True)
class Recording:
    """Everything one run produced.

    Attributes:
        indices: `[steps, layers, streams, m, k]`, the selected positions, ascending, then -1.
        logits: `[steps, streams, m, vocab]` float32.
        compile_seconds: tracing and compilation.
        run_seconds: the scan.
        is_native: whether top-k was compiled to a kernel of this package.
    """

    indices: np.ndarray
    logits: np.ndarray
    compile_seconds: float
    run_seconds: float
    is_native: bool


def staggered_lengths(steps: int, streams: int, tokens_per_step: int, stagger: int) -> np.ndarray:
    """Length of every stream after every step, `[steps, streams]`: stream i waits i * stagger."""
    step = np.arange(1, steps + 1)[:, None] - stagger * np.arange(streams)[None, :]
    return (np.maximum(step, 0) * tokens_per_step).astype(np.int32)


def tokens_of_steps(streams: list[np.ndarray], lengths: np.ndarray, m: int) -> np.ndarray:
    """The last `m` tokens of every stream at every step, `[steps, streams, m]`, 0 before it."""
    positions = lengths[..., None] - m + np.arange(m)
    tokens = [s[np.maximum(positions[:, i], 0)] for i, s in enumerate(streams)]
    return np.where(positions < 0, 0, np.stack(tokens, axis=1)).astype(np.int32)


def record(
    params: model.Params,
    config: Config,
    tokens: np.ndarray,
    lengths: np.ndarray,
    width: int,
    implementation: selection.Implementation,
) -> Recording:
    """Decodes `tokens` `[steps, streams, m]` in one scan.

    Args:
        params: of the model.
        config: sizes.
        tokens: `[steps, streams, m]`.
        lengths: `[steps, streams]`, length of each stream after each step.
        width: positions in the static cache.
        implementation: of top-k.
    """
    select = selection.select_top_k(implementation)

    @jax.jit
    def decode(params: model.Params, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        def step(caches: list[model.Cache], inputs: tuple[Array, Array]):  # type: ignore[no-untyped-def]
            logits, caches, indices = model.decode_step(params, config, caches, *inputs, select)
            return caches, (indices, logits)

        caches = model.init_caches(config, width, batch=tokens.shape[1])
        return lax.scan(step, caches, (tokens, lengths))[1]

    start = time.perf_counter()
    lowered = decode.lower(params, jnp.asarray(tokens), jnp.asarray(lengths))
    # Two programs are compared bit for bit. On a GPU XLA would time algorithms for each of them and
    # not always choose the same.
    (device,) = params["norm"].devices()
    compiled = lowered.compile(options_without_autotuning(device))
    compiled_at = time.perf_counter()
    indices, logits = jax.block_until_ready(
        compiled(params, jnp.asarray(tokens), jnp.asarray(lengths))
    )
    done = time.perf_counter()
    return Recording(
        indices=np.asarray(indices),
        logits=np.asarray(logits),
        compile_seconds=compiled_at - start,
        run_seconds=done - compiled_at,
        is_native="jax_topk_v1_indices" in lowered.as_text(),
    )


def agreement_table(chosen: Recording, xla: Recording, lengths: np.ndarray) -> list[str]:
    """Rows of a table: agreement of sets and outputs, grouped by the cached length.

    A step of a stream agrees if all of its indices, and all bits of its logits, are equal.
    """
    same_sets = (chosen.indices == xla.indices).all(axis=(1, 3, 4))  # [steps, streams]
    same_outputs = (chosen.logits.view(np.int32) == xla.logits.view(np.int32)).all(axis=(2, 3))
    rows = [f"{'cached length':>17}  {'steps':>7}  {'same sets':>15}  {'same outputs':>15}"]
    low, high = 1, 64
    while low <= lengths.max():
        group = (lengths >= low) & (lengths <= high)
        if count := int(group.sum()):
            cells = [f"{int(s[group].sum())}/{count}" for s in (same_sets, same_outputs)]
            rows.append(f"{low:>8} .. {high:>5}  {count:>7}  {cells[0]:>15}  {cells[1]:>15}")
        low, high = high + 1, high * 4
    return rows


def differing_steps(chosen: Recording, xla: Recording) -> np.ndarray:
    """Numbers of the steps at which anything at all differs, padding included."""
    sets = (chosen.indices != xla.indices).any(axis=(1, 2, 3, 4))
    outputs = (chosen.logits.view(np.int32) != xla.logits.view(np.int32)).any(axis=(1, 2, 3))
    return np.flatnonzero(sets | outputs)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command.new_parser("examples.sparse_attention", __doc__)
    command.add_implementation(parser)
    parser.add_argument("--streams", type=int, default=4, help="texts decoded side by side")
    parser.add_argument("--steps", type=int, default=8192, help="decode steps")
    parser.add_argument(
        "--tokens-per-step", type=int, default=1, help="2 or more: speculative rows"
    )
    parser.add_argument("--stagger", type=int, default=512, help="steps between two arrivals")
    parser.add_argument("--top-k", type=int, default=64, help="positions attended to per token")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs both implementations and prints the comparison; returns the exit status."""
    args = parse_arguments(arguments)
    # Full float32 precision, so that a GPU shows what a CPU does.
    with command.device_of(args.implementation), jax.default_matmul_precision("highest"):
        return compare(args)


def compare(args: argparse.Namespace) -> int:
    """`main` on the device that the arguments chose."""
    config = dataclasses.replace(TINY, top_k=args.top_k)
    params = jax.jit(model.init_model, static_argnames="config")(jax.random.key(args.seed), config)
    width = args.steps * args.tokens_per_step
    texts = corpus.longest_files(args.streams)
    shortest = min(map(len, texts.values()))
    if shortest < width:
        print(
            f"steps * tokens_per_step = {width} exceeds the {shortest} bytes of the shortest text; "
            "pass fewer steps or streams",
            file=sys.stderr,
        )
        return 2
    lengths = staggered_lengths(args.steps, args.streams, args.tokens_per_step, args.stagger)
    tokens = tokens_of_steps(list(texts.values()), lengths, args.tokens_per_step)

    print(f"DSA decode of {', '.join(texts)} (Python {sys.version.split()[0]})")
    print(
        f"{config.num_layers} layer, k = {config.top_k}, cache of {width} positions x "
        f"{args.streams} streams, {args.steps} steps of {args.tokens_per_step} token(s), "
        f"jax {jax.__version__} on {next(iter(params['norm'].devices())).device_kind}\n"
    )
    recordings = []
    for name in (args.implementation, "xla"):
        print(f"{name:>5}: compiling and decoding ...", end=" ", flush=True)
        try:
            run = record(params, config, tokens, lengths, width, command.implementation_of(name))
        except RuntimeError as error:
            print(f"cannot run here\n{error}", file=sys.stderr)
            return 2
        recordings.append(run)
        rate = lengths[-1].sum() / run.run_seconds
        target = "this package's kernel" if run.is_native else "the XLA expression"
        print(
            f"compiled in {run.compile_seconds:.1f} s, ran in {run.run_seconds:.1f} s: "
            f"{rate:,.0f} tokens/s, {args.steps / run.run_seconds:,.0f} steps/s ({target})"
        )

    chosen, xla = recordings
    print("\n" + "\n".join(agreement_table(chosen, xla, lengths)) + "\n")
    differing = differing_steps(chosen, xla)
    if differing.size:
        print(
            f"DISAGREEMENT: {args.implementation} and xla differ at {differing.size} of "
            f"{args.steps} steps, first at step {differing[0]}"
        )
        return 1
    print(
        f"OK: {args.implementation} and xla selected identical sets and produced identical outputs "
        f"at all {args.steps} steps"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
