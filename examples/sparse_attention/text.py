# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Sparse attention on real text: where selecting by content helps, and where recency does as well.

    python -m examples.sparse_attention.text

A byte-level language model of two DSA layers is trained on the sources of Python's standard
library with dense attention, its indexers beside it to imitate that attention. The loss on modules
it has never seen is then measured for every way of choosing what a token reads:

    dense       everything
    DSA         the indexer's best k
    recency     the last k
    random      k at random
    oracle      the k with the most dense attention: what a perfect indexer would choose

first with the same weights for all, then after a few steps of training with each way of reading, as
DeepSeek adapts a densely trained model to its sparse attention. Recency is a strong baseline on
text, because most of what predicts the next byte is near; recall.py is about the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

from examples.sparse_attention import command, corpus, model, selection, training
from examples.sparse_attention.compiling import compile_all, options_without_autotuning
from examples.sparse_attention.config import TINY, Config
from examples.sparse_attention.pieces import rms_norm

LENGTH = 512  # tokens per training and evaluation sequence
BUDGETS = (8, 32, 128)
# `top_k` is the largest budget; how many of these are read is a run-time value.
CONFIG = dataclasses.replace(
    TINY,
    dim=96,
    ffn_dim=256,
    num_layers=2,
    q_lora_rank=64,
    kv_lora_rank=48,
    top_k=max(BUDGETS),
)

Programs = dict[str, jax.stages.Compiled]  # see `programs_to_compile`

# From a budget, a run-time scalar, to what each token may read.
Way = Callable[[Array], training.Mask]


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


@functools.partial(
    jax.jit, static_argnames=("way", "optimizer"), donate_argnames=("params", "state")
)
def train_step(
    params: model.Params,
    state: optax.OptState,
    tokens: Array,
    budget: Array,
    *,
    way: Way,
    optimizer: optax.GradientTransformation,
) -> tuple[model.Params, optax.OptState, Array, Array]:
    """One step on `tokens` `[batch, LENGTH + 1]`; also returns mean loss and divergence.

    The indexers learn beside the model: their inputs and targets are detached, so the model is
    the one that training without them would give.
    """

    def objective(params: model.Params) -> tuple[Array, tuple[Array, Array]]:
        losses, divergences = jax.vmap(
            lambda sequence: sequence_losses(params, CONFIG, sequence, way(budget))
        )(tokens)
        loss, divergence = losses.mean(), divergences.mean()
        return loss + divergence, (loss, divergence)

    (_, (loss, divergence)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss, divergence


@functools.partial(jax.jit, static_argnames="optimizer")
def copy_and_state(
    params: model.Params, *, optimizer: optax.GradientTransformation
) -> tuple[model.Params, optax.OptState]:
    """A copy of the weights, whose memory `train_step` may take over, and the optimiser's state."""
    return jax.tree.map(jnp.copy, params), optimizer.init(params)


@functools.partial(jax.jit, static_argnames="way")
def late_loss(params: model.Params, tokens: Array, budget: Array, *, way: Way) -> Array:
    """Mean loss on `tokens` `[sequences, LENGTH + 1]` where even the largest budget must choose."""
    losses = lax.map(
        lambda sequence: sequence_losses(params, CONFIG, sequence, way(budget))[0],
        tokens,
        batch_size=8,
    )
    return losses[:, max(BUDGETS) :].mean()


def random_batches(batch: int, seed: int) -> Iterator[Array]:
    """Endless training batches `[batch, LENGTH + 1]`, the same for the same seed."""
    text, _ = split_corpus()
    rng = np.random.default_rng(seed)
    while True:
        yield jnp.asarray(windows(text, rng.integers(len(text) - LENGTH, size=batch)))


def train_dense(programs: Programs, steps: int, batch: int, seed: int) -> model.Params:
    """Trains model and indexers from scratch, with a progress bar."""
    params, state = programs["start"](programs["weights"](jax.random.key(seed)))
    budget = jnp.int32(LENGTH)
    with tqdm(total=steps, desc="training, dense", file=sys.stdout) as bar:
        for step, tokens in zip(range(1, steps + 1), random_batches(batch, seed), strict=False):
            params, state, loss, divergence = programs["training"](params, state, tokens, budget)
            if step % 20 == 0 or step == steps:
                bar.set_postfix(loss=f"{float(loss):.3f}", divergence=f"{float(divergence):.3f}")
                bar.update(step - bar.n)
    return params


def adapt(
    programs: Programs, name: str, params: model.Params, budget: Array, args: argparse.Namespace
) -> model.Params:
    """Goes on training for a few steps with one way of reading; every way sees the same text."""
    params, state = programs["restart"](params)
    batches = random_batches(args.batch, args.seed + 1)
    for _, tokens in zip(range(args.adapt), batches, strict=False):
        params, state, _, _ = programs[f"adapting, {name}"](params, state, tokens, budget)
    return params


def reading_ways(implementation: selection.Implementation, seed: int) -> dict[str, Way]:
    """The ways of choosing what a token reads, by name."""
    by_score = selection.rank_top_k(implementation)
    at_random = selection.rank_random(jax.random.key(seed))

    def selected(rank: selection.Selector) -> Way:
        return lambda budget: training.read_selected(selection.best_of(rank, budget))

    return {
        "dense": lambda budget: training.read_all,
        "DSA": selected(by_score),
        "recency": selected(selection.rank_recent),
        "random": selected(at_random),
        "oracle": lambda budget: training.read_oracle(selection.best_of(by_score, budget)),
    }


def programs_to_compile(
    ways: dict[str, Way], args: argparse.Namespace
) -> Mapping[str, Callable[[], jax.stages.Lowered]]:
    """Everything that the command runs, lowered for its shapes on demand, by name.

    Two programs per way of reading, `adapting, ...` and `held-out loss, ...`, serve all budgets.
    """
    warm_up = min(50, args.steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, warm_up, args.steps, 4e-5)
    dense, adapting = optax.adam(schedule), optax.adam(1e-3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = jax.jit(functools.partial(model.init_model, config=CONFIG))
    params = jax.eval_shape(init, key)
    budget = jax.ShapeDtypeStruct((), jnp.int32)
    batch = jax.ShapeDtypeStruct((args.batch, LENGTH + 1), jnp.int32)
    held_out = jax.ShapeDtypeStruct((args.sequences, LENGTH + 1), jnp.int32)

    def lower_step(way: Way, optimizer: optax.GradientTransformation) -> jax.stages.Lowered:
        state = jax.eval_shape(optimizer.init, params)
        return train_step.lower(params, state, batch, budget, way=way, optimizer=optimizer)

    programs = {"training": functools.partial(lower_step, ways["dense"], dense)}
    for name, way in ways.items():
        programs[f"adapting, {name}"] = functools.partial(lower_step, way, adapting)
    for name, way in ways.items():
        lower_loss = functools.partial(late_loss.lower, params, held_out, budget, way=way)
        programs[f"held-out loss, {name}"] = lower_loss
    programs["weights"] = functools.partial(init.lower, key)
    for name, optimizer in (("start", dense), ("restart", adapting)):
        programs[name] = functools.partial(copy_and_state.lower, params, optimizer=optimizer)
    return programs


Table = dict[str, list[float]]  # held-out loss by way of reading, one per budget


def held_out_losses(
    programs: Programs, params: model.Params, names: Iterable[str], args: argparse.Namespace
) -> tuple[Table, Table]:
    """Mean held-out losses with the same weights for all, and after adapting to each."""
    _, text = split_corpus()
    offsets = np.random.default_rng(args.seed).integers(len(text) - LENGTH, size=args.sequences)
    tokens = jnp.asarray(windows(text, offsets))
    same: Table = {name: [] for name in names}
    adapted: Table = {name: [] for name in names}
    with tqdm([(name, k) for name in same for k in BUDGETS], file=sys.stdout) as bar:
        for name, k in bar:
            bar.set_description(f"adapting, held-out loss: {name}, k = {k}")
            if name == "dense" and k != BUDGETS[0]:  # reads everything, whatever the budget
                same[name].append(same[name][0])
                adapted[name].append(adapted[name][0])
                continue
            loss, budget = programs[f"held-out loss, {name}"], jnp.int32(k)
            same[name].append(float(loss(params, tokens, budget)))
            own = adapt(programs, name, params, budget, args)
            adapted[name].append(float(loss(own, tokens, budget)))
    return same, adapted


def format_table(table: Table) -> str:
    """Held-out loss by way of reading and budget."""
    rows = [f"{'':<10}" + "".join(f"{f'k = {k}':>10}" for k in BUDGETS)]
    for name, losses in table.items():
        rows.append(f"{name:<10}" + "".join(f"{loss:>10.3f}" for loss in losses))
    return "\n".join(rows)


def conclusions(table: Table) -> list[str]:
    """What a table says about DSA against recency, one sentence per budget."""
    sentences = []
    rows = zip(BUDGETS, table["dense"], table["DSA"], table["recency"], strict=True)
    for k, dense, dsa, recency in rows:
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
    parser.add_argument("--steps", type=int, default=400, help="training steps, dense")
    parser.add_argument("--adapt", type=int, default=15, help="training steps per way of reading")
    parser.add_argument(
        "--batch", type=int, default=4, help=f"sequences of {LENGTH} bytes per step"
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
    ways = reading_ways(command.implementation_of(args.implementation), args.seed)
    device = next(iter(jnp.zeros(()).devices()))
    programs = compile_all(programs_to_compile(ways, args), options_without_autotuning(device))
    compiled = time.perf_counter()
    params = train_dense(programs, args.steps, args.batch, args.seed)
    same, adapted = held_out_losses(programs, params, ways, args)
    print(f"\nheld-out loss in nats per byte, over positions {max(BUDGETS)} to {LENGTH}")
    for title, table in (
        ("same weights for all", same),
        (f"after {args.adapt} more steps of training with each", adapted),
    ):
        print(f"\n{title}\n{format_table(table)}\n" + "\n".join(conclusions(table)))
    print()
    print(
        f"compiling {compiled - start:.0f} s, in all {time.perf_counter() - start:.0f} s, with jax "
        f"{jax.__version__} on {device.device_kind}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
