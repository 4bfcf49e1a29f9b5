# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Sparse attention on real text: where selecting by content helps, and where recency does as well.

    python -m examples.sparse_attention.text

A byte-level language model of two DSA layers is trained on the sources of Python's standard
library: first with dense attention, then its indexers to imitate that attention. The loss on
modules it has never seen is then measured with the same weights for every way of choosing what a
token reads: everything (dense), the indexer's best k (DSA), the last k (recency), k at random, and
the k with the most dense attention (oracle), which no indexer that imitates attention can beat by
much. Recency is a strong baseline on text, because most of what predicts the next byte is near.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

from examples.sparse_attention import command, corpus, model, selection, training
from examples.sparse_attention.config import TINY, Config
from examples.sparse_attention.pieces import rms_norm

LENGTH = 512  # tokens per training and evaluation sequence
BUDGETS = (8, 32, 128)
CONFIG = dataclasses.replace(
    TINY, dim=96, ffn_dim=256, num_layers=2, q_lora_rank=64, kv_lora_rank=48
)


def split_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and bytes held out: every eighth module of the standard library."""
    texts = list(corpus.standard_library().values())
    held_out = texts[::8]
    training_texts = [text for i, text in enumerate(texts) if i % 8]
    return np.concatenate(training_texts), np.concatenate(held_out)


def windows(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sequences `[len(offsets), LENGTH + 1]` of the text: inputs, and targets one to the right."""
    return text[offsets[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


def sequence_losses(
    params: model.Params, config: Config, tokens: Array, read: training.Mask
) -> tuple[Array, Array]:
    """Loss and divergence of the indexers per position of one sequence.

    Args:
        params: of the model.
        config: sizes.
        tokens: `[n + 1]`.
        read: what each token may read, in every layer.

    Returns:
        `[n]` each: cross entropy in nats, and the divergence summed over layers.
    """
    x = params["embed"][tokens[:-1]]
    positions = jnp.arange(x.shape[0])
    divergence = jnp.zeros(x.shape[0])
    for layer in params["layers"]:
        h = rms_norm(x, layer["attention_norm"], config.norm_eps)
        result = training.attention_block(layer, config, h, h, positions, read)
        x = x + result.output
        x = x + model.swiglu(layer, rms_norm(x, layer["ffn_norm"], config.norm_eps))
        divergence += result.divergence
    logits = rms_norm(x, params["norm"], config.norm_eps) @ params["unembed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]), divergence


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(
    params: model.Params,
    state: optax.OptState,
    tokens: Array,
    optimizer: optax.GradientTransformation,
) -> tuple[model.Params, optax.OptState, Array, Array]:
    """One step on `tokens` `[batch, LENGTH + 1]`; also returns mean loss and divergence.

    The indexers learn beside the model: their inputs and targets are detached, so the model is
    the one that training without them would give.
    """

    def objective(params: model.Params) -> tuple[Array, tuple[Array, Array]]:
        losses, divergences = jax.vmap(
            lambda sequence: sequence_losses(params, CONFIG, sequence, training.read_all)
        )(tokens)
        loss, divergence = losses.mean(), divergences.mean()
        return loss + divergence, (loss, divergence)

    (_, (loss, divergence)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss, divergence


def train(steps: int, batch: int, seed: int) -> model.Params:
    """Trains model and indexers, with a progress bar."""
    text, _ = split_corpus()
    rng = np.random.default_rng(seed)
    params = jax.jit(model.init_model, static_argnames="config")(jax.random.key(seed), CONFIG)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, min(50, steps // 4), steps, 4e-5)
    optimizer = optax.adam(schedule)
    state = optimizer.init(params)
    losses: list[Array] = []
    with tqdm(total=steps, desc="training", file=sys.stdout) as bar:
        for step in range(1, steps + 1):
            offsets = rng.integers(len(text) - LENGTH, size=batch)
            tokens = jnp.asarray(windows(text, offsets))
            params, state, loss, divergence = train_step(params, state, tokens, optimizer)
            losses.append(loss)
            if step % 20 == 0 or step == steps:
                mean = float(jnp.stack(losses[-20:]).mean())
                bar.set_postfix(loss=f"{mean:.3f}", divergence=f"{float(divergence):.3f}")
                bar.update(step - bar.n)
    return params


def reading_ways(implementation: selection.Implementation, seed: int) -> dict[str, training.Mask]:
    """The ways of choosing what a token reads, by name."""
    select = selection.select_top_k(implementation)
    return {
        "DSA": training.read_selected(select),
        "recency": training.read_selected(selection.select_recent),
        "random": training.read_selected(selection.select_random(jax.random.key(seed))),
        "oracle": training.read_oracle(select),
    }


@functools.partial(jax.jit, static_argnames=("config", "read"))
def late_losses(params: model.Params, config: Config, tokens: Array, read: training.Mask) -> Array:
    """Losses `[sequences, LENGTH - max(BUDGETS)]` where even the largest budget has to choose."""
    losses = lax.map(
        lambda sequence: sequence_losses(params, config, sequence, read)[0], tokens, batch_size=8
    )
    return losses[:, max(BUDGETS) :]


def held_out_losses(
    params: model.Params, sequences: int, ways: dict[str, training.Mask], seed: int
) -> tuple[float, dict[str, list[float]]]:
    """Mean held-out loss of dense attention, and of every way of reading by budget."""
    _, text = split_corpus()
    offsets = np.random.default_rng(seed).integers(len(text) - LENGTH, size=sequences)
    tokens = jnp.asarray(windows(text, offsets))
    dense = float(late_losses(params, CONFIG, tokens, training.read_all).mean())
    table: dict[str, list[float]] = {name: [] for name in ways}
    cells = [(name, read, k) for name, read in ways.items() for k in BUDGETS]
    for name, read, k in tqdm(cells, desc="held-out loss", file=sys.stdout):
        config = dataclasses.replace(CONFIG, top_k=k)
        table[name].append(float(late_losses(params, config, tokens, read).mean()))
    return dense, table


def format_table(dense: float, table: dict[str, list[float]]) -> str:
    """Held-out loss by way of reading and budget."""
    rows = [f"{'':<10}" + "".join(f"{f'k = {k}':>10}" for k in BUDGETS)]
    rows.append(f"{'dense':<10}" + f"{dense:>10.3f}" * len(BUDGETS))
    for name, losses in table.items():
        rows.append(f"{name:<10}" + "".join(f"{loss:>10.3f}" for loss in losses))
    return "\n".join(rows)


def conclusions(dense: float, table: dict[str, list[float]]) -> list[str]:
    """What the table says about DSA against recency, one sentence per budget."""
    sentences = []
    for k, dsa, recency in zip(BUDGETS, table["DSA"], table["recency"], strict=True):
        if round(dsa, 3) == round(recency, 3):
            verdict = "DSA and recency are level"
        elif dsa < recency:
            verdict = f"DSA beats recency by {recency - dsa:.3f} nats per byte"
        else:
            verdict = f"recency beats DSA by {dsa - recency:.3f} nats per byte"
        sentences.append(f"k = {k}: {verdict}; DSA is {dsa - dense:+.3f} from dense.")
    return sentences


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command.new_parser("examples.sparse_attention.text", __doc__)
    command.add_implementation(parser)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument(
        "--batch", type=int, default=8, help=f"sequences of {LENGTH} bytes per step"
    )
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and evaluation")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures, prints the table; returns the exit status."""
    args = parse_arguments(arguments)
    # Full float32 precision, so that a GPU shows what a CPU does.
    with command.device_of(args.implementation), jax.default_matmul_precision("highest"):
        return demonstrate(args)


def demonstrate(args: argparse.Namespace) -> int:
    """`main` on the device that the arguments chose."""
    start = time.perf_counter()
    text, held_out = split_corpus()
    print(
        f"{len(text):,} bytes of Python {sys.version.split()[0]}'s standard library to train on, "
        f"{len(held_out):,} held out"
    )
    params = train(args.steps, args.batch, args.seed)
    ways = reading_ways(command.implementation_of(args.implementation), args.seed)
    dense, table = held_out_losses(params, args.sequences, ways, args.seed)
    print(
        f"\nheld-out loss in nats per byte, over positions {max(BUDGETS)} to {LENGTH}, one set of "
        "weights for all"
    )
    print(format_table(dense, table))
    print("\n" + "\n".join(conclusions(dense, table)))
    device = next(iter(params["norm"].devices()))
    print(
        f"in all {time.perf_counter() - start:.0f} s, with jax {jax.__version__} on "
        f"{device.device_kind}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
