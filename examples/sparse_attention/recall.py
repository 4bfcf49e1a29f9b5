# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Associative recall: a task that only exact, content-based selection over a long cache can solve.

    python -m examples.sparse_attention.recall

Every step appends a pair (key, value) to the cache and asks for the value of one earlier key,
chosen uniformly: the needle. A window of recent positions almost never holds it; language, where a
window does well, shows little of what selection is good for.

One DSA layer learns the task in three phases, as DeepSeek trained V3.2:

    dense       attention over everything, on episodes of 8, then 32, then 128 pairs. (Without this
                curriculum the layer stays at chance.)
    warm-up     only the indexer is trained, to imitate the dense attention
    sparse      everything is trained, attention reading only what the indexer selects

It is then decoded far beyond the lengths it was trained on, 8192 steps with a growing cache inside
one `lax.scan`, once per way of selecting, and once per implementation of top-k: those must select
the same sets and produce the same values at every step, or the command fails.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

import jax_topk
from examples.sparse_attention import command, model, selection, training
from examples.sparse_attention.compiling import compile_all, options_without_autotuning
from examples.sparse_attention.config import Config
from examples.sparse_attention.pieces import normal_arrays, rms_norm
from examples.sparse_attention.selection import Selector

BASE = 96  # a key is two digits of this base: 9216 keys, more than any episode holds pairs
NUM_VALUES = 64
DIGITS = 12  # values of a digit that one training buffer uses
ROWS = 128  # rows per training buffer: one episode of 128 pairs, or 16 of 8, packed
LENGTH_GROUPS = (128, 512, 2048, 4096, 8192)

CONFIG = Config(
    dim=96,
    ffn_dim=128,
    num_layers=1,
    vocab_size=NUM_VALUES,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    nope_dim=32,
    rope_dim=4,
    value_dim=32,
    index_heads=4,
    index_dim=64,
    top_k=16,
    context=4096,
    # One block for the whole cache: four heads make few products, and on a CPU one large product
    # takes a third of the time of four smaller ones.
    index_block=8192,
)


class Episode(NamedTuple):
    """Pairs and questions; step i appends pair i and asks for pair `needles[i]` <= i.

    Attributes:
        keys: `[n]`, below BASE squared.
        values: `[n]`, below NUM_VALUES.
        needles: `[n]`, index of the pair asked for, counted from the start of its episode.
    """

    keys: Array
    values: Array
    needles: Array


def init_params(key: Array) -> model.Params:
    """Random weights: embeddings of digits and values, one DSA layer, the readout."""
    tables_key, layer_key = jax.random.split(key)
    digits = (2, BASE, CONFIG.dim)
    tables = normal_arrays(
        tables_key,
        {
            "key_digits": digits,
            "query_digits": digits,
            "values": (NUM_VALUES, CONFIG.dim),
            "readout": (CONFIG.dim, NUM_VALUES),
        },
    )
    tables["readout"] *= CONFIG.dim**-0.5
    return {**tables, "layer": model.init_layer(layer_key, CONFIG), "norm": jnp.ones(CONFIG.dim)}


def embed_pairs(params: model.Params, keys: Array, values: Array) -> Array:
    """What pairs put into the cache, before its projections: `[n, dim]`."""
    first, second = params["key_digits"]
    return first[keys // BASE] + second[keys % BASE] + params["values"][values]


def embed_questions(params: model.Params, keys: Array) -> Array:
    """The residual stream of questions: `[n, dim]`."""
    first, second = params["query_digits"]
    return first[keys // BASE] + second[keys % BASE]


def answer(params: model.Params, x: Array, attended: Array) -> Array:
    """Logits `[n, NUM_VALUES]` from questions and what attention found."""
    x = x + attended
    x = x + model.swiglu(params["layer"], norm(params["layer"]["ffn_norm"], x))
    return norm(params["norm"], x) @ params["readout"]


def norm(weight: Array, x: Array) -> Array:
    """The layer's RMS norm."""
    return rms_norm(x, weight, CONFIG.norm_eps)


# -------------------------------------------------------------------------------------- training


def random_choice(key: Array, population: int, count: int) -> Array:
    """Numbers below `population`, `[count]`, without repetition: the best of noise, best first."""
    return jax_topk.top_k(jax.random.uniform(key, (population,)), count)[1]


def sample_episodes(key: Array, positions: Array) -> Episode:
    """Random episodes packed into one buffer; row i is step `positions[i]` of its episode.

    A buffer uses only DIGITS values of either digit, so that most pairs of keys in it differ in one
    digit alone, as each key does from many others in a long cache. No key repeats.
    """
    first_key, second_key, key_key, value_key, needle_key = jax.random.split(key, 5)
    first = random_choice(first_key, BASE, DIGITS)
    second = random_choice(second_key, BASE, DIGITS)
    both = random_choice(key_key, DIGITS**2, positions.shape[0])
    share = jax.random.uniform(needle_key, positions.shape)
    return Episode(
        keys=first[both // DIGITS] * BASE + second[both % DIGITS],
        values=jax.random.randint(value_key, positions.shape, 0, NUM_VALUES),
        needles=(share * (positions + 1)).astype(positions.dtype),
    )


def episode_losses(
    params: model.Params, episode: Episode, positions: Array, read: training.Mask
) -> dict[str, Array]:
    """Means over one packed buffer: task loss, the indexer's divergence, accuracy, hit rate."""
    layer = params["layer"]
    needle_rows = jnp.arange(positions.shape[0]) - positions + episode.needles
    questions = embed_questions(params, episode.keys[needle_rows])
    result = training.attention_block(
        layer,
        CONFIG,
        norm(layer["attention_norm"], questions),
        norm(layer["attention_norm"], embed_pairs(params, episode.keys, episode.values)),
        positions,
        read,
    )
    logits = answer(params, questions, result.output)
    targets = episode.values[needle_rows]
    is_hit = jnp.take_along_axis(result.is_read, needle_rows[:, None], axis=1)
    return {
        "task": optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(),
        "divergence": result.divergence.mean(),
        "accuracy": (logits.argmax(axis=-1) == targets).mean(),
        "hit rate": is_hit.mean(),
    }


class Phase(NamedTuple):
    """One phase of training; hashable, since it is compiled into the step.

    Attributes:
        name: for the progress bar.
        losses: which of the losses of `episode_losses` are minimised.
        is_indexer_only: whether all other weights are frozen.
        is_sparse: whether attention reads the indexer's selection, or everything.
        learning_rate: of Adam.
        buffers: packed buffers per step.
    """

    name: str
    losses: tuple[str, ...]
    is_indexer_only: bool
    is_sparse: bool
    learning_rate: float
    buffers: int = 20


DENSE = Phase("dense", ("task",), False, False, 5e-3)
WARM_UP = Phase("indexer warm-up", ("divergence",), True, False, 1e-2)
SPARSE = Phase("sparse", ("task", "divergence"), False, True, 3e-3)
CHUNK = 10  # steps per call
SCHEDULE = (
    (DENSE, 8, 100),
    (DENSE, 32, 100),
    (DENSE, 128, 150),
    (WARM_UP, 128, 100),
    (SPARSE, 128, 60),
)


def split_params(params: model.Params, phase: Phase) -> tuple[model.Params, model.Params]:
    """Weights that a phase trains, and those that it does not."""
    if not phase.is_indexer_only:
        return params, {}
    layer = params["layer"]
    indexer = {name: weight for name, weight in layer.items() if name.startswith("index_")}
    rest = {name: weight for name, weight in layer.items() if name not in indexer}
    return {"layer": indexer}, params | {"layer": rest}


def join_params(trained: model.Params, frozen: model.Params) -> model.Params:
    """Undoes `split_params`."""
    return frozen | trained | {"layer": frozen.get("layer", {}) | trained["layer"]}


@functools.partial(jax.jit, static_argnames="phase")
def train_steps(
    params: model.Params, state: optax.OptState, keys: Array, positions: Array, phase: Phase
) -> tuple[model.Params, optax.OptState, dict[str, Array]]:
    """One optimiser step per key in `keys`; also returns means of the phase's losses and rates."""
    read = (
        training.read_selected(selection.select_top_k()) if phase.is_sparse else training.read_all
    )
    optimizer = optax.adam(phase.learning_rate)
    trained, frozen = split_params(params, phase)

    def loss(trained: model.Params, key: Array) -> tuple[Array, dict[str, Array]]:
        params = join_params(trained, frozen)
        episodes = jax.vmap(sample_episodes, (0, None))(
            jax.random.split(key, phase.buffers), positions
        )
        rates = jax.vmap(episode_losses, (None, 0, None, None))(params, episodes, positions, read)
        # A loss that is not minimised is not returned either, so that XLA leaves it out.
        means = {name: rates[name].mean() for name in (*phase.losses, "accuracy", "hit rate")}
        return sum((means[name] for name in phase.losses), jnp.float32(0)), means

    def step(carry, key):  # type: ignore[no-untyped-def]
        trained, state = carry
        (_, means), gradient = jax.value_and_grad(loss, has_aux=True)(trained, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(trained, updates), state), means

    (trained, state), means = lax.scan(step, (trained, state), keys)
    return join_params(trained, frozen), state, jax.tree.map(jnp.mean, means)


@functools.partial(jax.jit, static_argnames="phase")
def initial_state(params: model.Params, phase: Phase) -> optax.OptState:
    """The optimiser's state at the beginning of a phase."""
    return optax.adam(phase.learning_rate).init(split_params(params, phase)[0])


def train(programs: dict[str, jax.stages.Compiled], seed: int) -> model.Params:
    """Trains a layer from scratch, with a progress bar per phase.

    Args:
        programs: see `programs_to_compile`.
        seed: of weights and episodes.
    """
    key, init_key = jax.random.split(jax.random.key(seed))
    params = programs["weights"](init_key)
    for phase, pairs, steps in SCHEDULE:
        positions = jnp.arange(ROWS, dtype=jnp.int32) % pairs
        state = programs[f"{phase.name}, state"](params)
        with tqdm(total=steps, desc=f"{phase.name}, {pairs} pairs", file=sys.stdout) as bar:
            for _ in range(0, steps, CHUNK):
                key, chunk_key = jax.random.split(key)
                keys = jax.random.split(chunk_key, CHUNK)
                params, state, means = programs[phase.name](params, state, keys, positions)
                bar.set_postfix({name: f"{float(mean):.3f}" for name, mean in means.items()})
                bar.update(CHUNK)
    return params


# ------------------------------------------------------------------------------------ evaluation


def evaluation_episodes(streams: int, steps: int, seed: int) -> Episode:
    """Episodes `[streams, steps]` without a repeated key."""
    rng = np.random.default_rng(seed)
    return Episode(
        keys=jnp.asarray(np.stack([rng.permutation(BASE**2)[:steps] for _ in range(streams)])),
        values=jnp.asarray(rng.integers(NUM_VALUES, size=(streams, steps))),
        needles=jnp.asarray(rng.integers(np.arange(1, steps + 1), size=(streams, steps))),
    )


@functools.partial(jax.jit, static_argnames="select")
def decode(
    params: model.Params, episodes: Episode, select: Selector | None
) -> tuple[Array, Array, Array]:
    """Decodes episodes `[streams, steps]` step by step, with a growing cache, in one scan.

    Returns:
        Answers `[streams, steps]`; whether the needle was read, likewise; and the positions read,
        `[streams, steps, top_k]` (of dense attention, the first of them).
    """
    layer, steps = params["layer"], episodes.keys.shape[1]

    def decode_stream(episode: Episode) -> tuple[Array, Array, Array]:
        questions = embed_questions(params, episode.keys[episode.needles])
        pairs = norm(layer["attention_norm"], embed_pairs(params, episode.keys, episode.values))

        def step(cache: model.Cache, inputs: tuple[Array, ...]):  # type: ignore[no-untyped-def]
            position, pair, question, needle = (value[None] for value in inputs)
            cache = model.write_cache(layer, CONFIG, cache, pair, position, None)
            x = norm(layer["attention_norm"], question)
            attended, indices = model.sparse_attention(
                layer, CONFIG, cache, x, position, None, select
            )
            value = answer(params, question, attended)[0].argmax()
            is_hit = (indices[0] == needle).any()
            return cache, (value, is_hit, indices[0, : CONFIG.top_k])

        inputs = (jnp.arange(steps), pairs, questions, episode.needles)
        return lax.scan(step, model.init_cache(CONFIG, steps), inputs)[1]

    return jax.vmap(decode_stream)(episodes)


class Outcome(NamedTuple):
    """What one way of selecting achieved.

    Attributes:
        is_right: `[streams, steps]`, whether the answer was.
        is_hit: `[streams, steps]`, whether the needle was read.
        indices: `[streams, steps, top_k]`.
        answers: `[streams, steps]`.
        seconds: of the decode, compilation excluded.
    """

    is_right: np.ndarray
    is_hit: np.ndarray
    indices: np.ndarray
    answers: np.ndarray
    seconds: float


def evaluate(compiled: jax.stages.Compiled, params: model.Params, episodes: Episode) -> Outcome:
    """Decodes the episodes by `decode`, compiled for them, and scores the answers."""
    start = time.perf_counter()
    results = jax.block_until_ready(compiled(params, episodes))
    seconds = time.perf_counter() - start
    answers, is_hit, indices = map(np.asarray, results)
    targets = np.take_along_axis(np.asarray(episodes.values), np.asarray(episodes.needles), axis=1)
    return Outcome(answers == targets, is_hit, indices, answers, seconds)


def programs_to_compile(
    ways: dict[str, Selector | None], episodes: Episode
) -> Mapping[str, Callable[[], jax.stages.Lowered]]:
    """Everything that the command runs, lowered for its shapes on demand, by name.

    These are `weights`; of every phase of training, its steps by its name, and its `, state`; and
    the decodes of the episodes by the names of the ways to select.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda key: jax.random.split(key, CHUNK), key)
    params = jax.eval_shape(init_params, key)
    positions = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def lower_steps(phase: Phase) -> jax.stages.Lowered:
        state = jax.eval_shape(functools.partial(initial_state, phase=phase), params)
        return train_steps.lower(params, state, keys, positions, phase=phase)

    phases = dict.fromkeys(phase for phase, _, _ in SCHEDULE)
    steps = {phase.name: functools.partial(lower_steps, phase) for phase in phases}
    states = {
        f"{phase.name}, state": functools.partial(initial_state.lower, params, phase=phase)
        for phase in phases
    }
    decodes = {
        name: functools.partial(decode.lower, params, episodes, select)
        for name, select in ways.items()
    }
    weights = {"weights": functools.partial(jax.jit(init_params).lower, key)}
    return steps | decodes | weights | states


def length_groups(steps: int) -> list[tuple[int, int]]:
    """Ranges `(low, high]` of cache lengths that are reported together."""
    edges = [edge for edge in LENGTH_GROUPS if edge < steps] + [steps]
    return list(zip([0, *edges[:-1]], edges, strict=True))


def accuracy_table(outcomes: dict[str, Outcome], steps: int) -> str:
    """Accuracy, and in brackets the share of needles read, by the number of pairs in the cache."""
    groups = length_groups(steps)
    header = "".join(f"{f'{low + 1} - {high}':>16}" for low, high in groups)
    rows = [f"{'pairs in the cache':<22}{header}"]
    for name, outcome in outcomes.items():
        cells = [
            f"{outcome.is_right[:, low:high].mean():.3f} ({outcome.is_hit[:, low:high].mean():.3f})"
            for low, high in groups
        ]
        rows.append(f"{name:<22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(rows)


def plot(outcomes: dict[str, Outcome], steps: int, path: str) -> None:
    """Draws accuracy over the number of pairs in the cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = np.unique(np.geomspace(8, steps, 24).astype(int))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, outcome in outcomes.items():
        groups = list(itertools.pairwise(edges))
        accuracy = [outcome.is_right[:, low:high].mean() for low, high in groups]
        axes.plot([high for _, high in groups], accuracy, marker=".", label=name)
    axes.axvline(ROWS, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate("longest episode\nin training", (ROWS, 0.5), color="grey", fontsize=8)
    axes.axhline(1 / NUM_VALUES, color="grey", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pairs in the cache")
    axes.set_ylabel("share of right answers")
    axes.set_title(f"Associative recall with {CONFIG.top_k} cached pairs read per step")
    axes.legend()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command.new_parser("examples.sparse_attention.recall", __doc__)
    command.add_implementation(parser)
    parser.add_argument("--steps", type=int, default=8192, help="decode steps, at most 9216")
    parser.add_argument("--streams", type=int, default=2, help="episodes decoded side by side")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training and evaluation")
    parser.add_argument("--plot", default="build/recall.svg", help="picture; '' for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains, decodes, prints the table; returns the exit status."""
    args = parse_arguments(arguments)
    # Full float32 precision, so that a GPU shows what a CPU does.
    with command.device_of(args.implementation), jax.default_matmul_precision("highest"):
        return demonstrate(args)


def demonstrate(args: argparse.Namespace) -> int:
    """`main` on the device that the arguments chose."""
    start = time.perf_counter()
    implementation = command.implementation_of(args.implementation)
    ways: dict[str, Selector | None] = {
        f"DSA, k = {CONFIG.top_k}": selection.select_top_k(implementation),
        "the same with xla": selection.select_top_k("xla"),
        f"last {CONFIG.top_k}": selection.select_recent,
        f"random {CONFIG.top_k}": selection.select_random(jax.random.key(args.seed)),
        "dense, same weights": None,
    }
    reported = [name for name in ways if name != "the same with xla"]
    episodes = evaluation_episodes(args.streams, args.steps, args.seed)
    device = next(iter(episodes.keys.devices()))
    programs = compile_all(programs_to_compile(ways, episodes), options_without_autotuning(device))
    compiled = time.perf_counter()
    params = train(programs, args.seed)
    trained = time.perf_counter()
    outcomes = {}
    with tqdm(ways, file=sys.stdout) as bar:
        for name in bar:
            bar.set_description(f"decoding {args.steps} steps, {name}")
            outcomes[name] = evaluate(programs[name], params, episodes)
    dsa, xla = outcomes[f"DSA, k = {CONFIG.top_k}"], outcomes["the same with xla"]

    print("\nshare of right answers (share of steps that read the needle)")
    print(accuracy_table({name: outcomes[name] for name in reported}, args.steps))
    seconds = [f"{name}: {outcome.seconds:.1f} s" for name, outcome in outcomes.items()]
    print(f"\ndecode of {args.streams} x {args.steps} steps:\n    " + "\n    ".join(seconds))
    print(
        f"compiling {compiled - start:.0f} s, training {trained - compiled:.0f} s, in all "
        f"{time.perf_counter() - start:.0f} s, with jax {jax.__version__} on {device.device_kind}"
    )
    if args.plot:
        plot({name: outcomes[name] for name in reported}, args.steps, args.plot)
        print(f"picture: {args.plot}")
    same_sets = (dsa.indices == xla.indices).all(axis=(0, 2))
    same_answers = (dsa.answers == xla.answers).all(axis=0)
    agreeing = int((same_sets & same_answers).sum())
    verdict = "OK" if agreeing == args.steps else "DISAGREEMENT"
    print(
        f"{verdict}: {args.implementation} and xla selected the same sets and gave the same "
        f"answers at {agreeing} of {args.steps} steps"
    )
    return 0 if agreeing == args.steps else 1


if __name__ == "__main__":
    sys.exit(main())
