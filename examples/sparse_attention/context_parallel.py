# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Decodes with a cache that is sharded along the sequence, and compares with one device.

    python -m examples.sparse_attention.context_parallel --devices 8

Every device of a mesh holds a block of consecutive positions of every sequence's cache, so the
longest context grows with the number of devices. One decode step is one `jax.shard_map`:

    write    the new position's entries, on the device that owns the position
    score    the indexer scores its own block: [rows, n / D], no communication
    select   `jax_topk.sharded_top_k`: exact, the same indices on every device
    attend   to the selected positions, wherever their latents are

Attention can be put together in two ways. Per row and layer, from each device:

    partial  each device attends to the selected latents that it owns; maxima, sums and weighted
             latents are reduced: heads * (kv_lora_rank + 2) float32. What one would deploy: in
             DeepSeek-V3.2 263 kB, and latents never travel. Sums are taken in another order than on
             one device, so outputs differ in their last bits.
    gather   the selected latents themselves are brought together (each has one owner, all others
             add zeros): k * latent_dim values, in DeepSeek-V3.2 2.4 MB. Attention is then the very
             computation of one device, and every output has the same bits.

The command runs both. Parameters and activations are replicated; in a model of real size heads and
feed-forward block would be sharded over further mesh axes, which changes nothing here.

Exit status: 0 if the tokens are those of one device, 1 if any differs, 2 on a usage error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jax_topk
from examples.sparse_attention import command, corpus, model, selection
from examples.sparse_attention.config import TINY, Config
from examples.sparse_attention.decode import staggered_lengths, tokens_of_steps
from examples.sparse_attention.pieces import rms_norm

AXIS = "seq"
"""Name of the mesh axis over which caches are sharded."""

Combination = Literal["partial", "gather"]
COMBINATIONS: tuple[Combination, ...] = ("partial", "gather")

# (params, caches, tokens [B, 1], lengths [B]) -> logits [B, 1, vocab], caches, indices
Step = Callable[[model.Params, list[model.Cache], Array, Array], Any]


# --- one decode step ------------------------------------------------------------------------------


def cache_spec() -> Any:
    """How a cache `[B, n, ...]` lies on the mesh, positions sharded: a `model.Cache` of specs."""
    block: Any = jax.P(None, AXIS)
    return model.Cache(latents=block, index_keys=block, index_scales=block, recent=None)  # type: ignore[arg-type]


def init_caches(
    config: Config, width: int, batch: int, mesh: jax.sharding.Mesh
) -> list[model.Cache]:
    """Empty caches of `width` positions in all, each device's block made where it will live.

    Their `recent` is None: without compression there is no ring. The model's array without elements
    would do, but XLA's compiler of jax 0.11.2 (not of 0.10 or 0.12) ends in a segmentation fault
    when an array without elements goes into and out of a `shard_map` beside another one.

    Args:
        config: sizes, without compression.
        width: positions of the whole cache, a multiple of the mesh's size.
        batch: sequences.
        mesh: one axis, `AXIS`.
    """
    if config.compression != 1:
        raise ValueError(
            f"compression={config.compression}: groups of positions may straddle two devices; this "
            "example shards a cache of single positions, compression=1"
        )
    if width % mesh.size:
        raise ValueError(
            f"width={width} does not divide into {mesh.size} blocks; pass a multiple of the devices"
        )
    places = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), [cache_spec()] * config.num_layers
    )

    def make() -> list[model.Cache]:
        caches = model.init_caches(config, width, batch)
        return [cache._replace(recent=None) for cache in caches]  # type: ignore[arg-type]

    return jax.jit(make, out_shardings=places)()


def own_slots(positions: Array, block: int) -> Array:
    """Places `[R]` of positions in this device's block; those of other devices are negative."""
    local = positions - lax.axis_index(AXIS) * block
    is_own = (positions >= 0) & (local >= 0) & (local < block)
    # Distinct, as `model.store` wants them.
    return jnp.where(is_own, local, -1 - jnp.arange(positions.shape[0], dtype=positions.dtype))


def select_ascending(scores: Array, lengths: Array, k: int) -> Array:
    """Global indices `[R, k]` of the k best scores `[R, n / D]` of whole rows: ascending, then -1.

    Attention reads them in the order in which one device would.
    """
    _, indices = jax_topk.sharded_top_k(scores, k, axis_name=AXIS, lengths=lengths)
    last = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(indices < 0, last, indices), axis=-1)
    return jnp.where(ordered == last, -1, ordered)


def attend_to_gathered(
    params: model.Params,
    config: Config,
    queries: Array,
    latents: Array,
    is_own: Array,
    is_selected: Array,
) -> Array:
    """The attention of one device, over latents that are brought together first.

    Args:
        params: of the layer.
        config: sizes.
        queries: `[R, heads, kv_lora_rank + rope_dim]`, replicated.
        latents: `[R, k, latent_dim]`, this device's where `is_own`, else anything.
        is_own: `[R, k]`, whether this device holds the selected position.
        is_selected: `[R, k]`, whether any does; false for padding.

    Returns:
        `[R, dim]`, replicated.
    """
    gathered = lax.psum(jnp.where(is_own[..., None], latents, 0), AXIS)
    return model.attend(params, config, queries, gathered, is_selected)


def attend_in_parts(
    params: model.Params,
    config: Config,
    queries: Array,
    latents: Array,
    is_own: Array,
    is_selected: Array,
) -> Array:
    """The same attention, where latents stay and the parts of a softmax are reduced.

    Arguments and result as for `attend_to_gathered`. Shapes are static: every device computes on k
    places, of which it owns k / D on average and all of them at worst.
    """
    del is_selected
    latents = jnp.where(is_own[..., None], latents, 0)  # others' places hold anything, NaN too
    logits = jnp.einsum("rhc,rkc->rhk", queries, latents, preferred_element_type=jnp.float32)
    logits = jnp.where(is_own[:, None], logits * config.softmax_scale, -1e30)
    highest = lax.pmax(jnp.max(logits, axis=-1, keepdims=True), AXIS)
    weights = jnp.exp(logits - highest) * is_own[:, None]
    content = latents[..., : config.kv_lora_rank].astype(jnp.float32)
    mixed = jnp.einsum("rhk,rkc->rhc", weights, content)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    parts = lax.psum(jnp.concatenate([mixed, total], axis=-1), AXIS)  # one reduction for both
    mixed, total = parts[..., :-1], parts[..., -1:]
    mixed = jnp.where(total > 0, mixed / total, 0).astype(latents.dtype)
    return model.attention_output(params, mixed)


def sparse_attention(
    params: model.Params,
    config: Config,
    cache: model.Cache,
    x: Array,
    positions: Array,
    combination: Combination,
) -> tuple[Array, Array]:
    """`model.sparse_attention` over this device's block of the cache, inside `shard_map`.

    Args:
        params: of the layer.
        config: sizes.
        cache: this device's block, of `n / D` positions.
        x: `[R, dim]`, normalised input of the rows.
        positions: `[R]`, place of each row in its sequence.
        combination: how attention is put together.

    Returns:
        Output `[R, dim]` and the selected positions `[R, k]`, both replicated.
    """
    block = cache.latents.shape[0]
    qr = model.compressed_queries(params, config, x)
    queries = model.attention_queries(params, config, qr, positions)
    index_q, weights = model.index_queries(params, config, x, qr, positions)
    scores = model.index_scores(
        index_q, weights, cache.index_keys, cache.index_scales, config.index_block
    )
    # As in the model: one fusion more or less could round the scores differently.
    scores = lax.optimization_barrier(scores)
    k = min(config.top_k, block * lax.axis_size(AXIS))
    indices = select_ascending(scores, jnp.maximum(positions + 1, 0), k)
    indices = lax.optimization_barrier(indices)
    local = indices - lax.axis_index(AXIS) * block
    is_own = (indices >= 0) & (local >= 0) & (local < block)
    latents = cache.latents[jnp.where(is_own, local, 0)]
    attend = attend_in_parts if combination == "partial" else attend_to_gathered
    return attend(params, config, queries, latents, is_own, indices >= 0), indices


def local_step(
    params: model.Params,
    config: Config,
    caches: list[model.Cache],
    tokens: Array,
    lengths: Array,
    combination: Combination,
) -> tuple[Array, list[model.Cache], Array]:
    """`model.decode_step` on one device's blocks of the caches, inside `shard_map`."""

    def sequence(caches: list[model.Cache], tokens: Array, positions: Array) -> Any:
        x = params["embed"][tokens]
        new_caches, selected = [], []
        for layer, cache in zip(params["layers"], caches, strict=True):
            h = rms_norm(x, layer["attention_norm"], config.norm_eps)
            slots = own_slots(positions, cache.latents.shape[0])
            cache = model.write_cache(layer, config, cache, h, positions, slots)
            attended, indices = sparse_attention(layer, config, cache, h, positions, combination)
            x = x + attended
            x = x + model.swiglu(layer, rms_norm(x, layer["ffn_norm"], config.norm_eps))
            new_caches.append(cache)
            selected.append(indices)
        x = rms_norm(x, params["norm"], config.norm_eps)
        logits = jnp.einsum("rd,vd->rv", x, params["unembed"], preferred_element_type=jnp.float32)
        return logits, new_caches, jnp.stack(selected)

    num_tokens = tokens.shape[1]
    positions = lengths[:, None] - num_tokens + jnp.arange(num_tokens, dtype=lengths.dtype)
    return jax.vmap(sequence, out_axes=(0, 0, 1))(caches, tokens, positions)


def sharded_step(config: Config, mesh: jax.sharding.Mesh, combination: Combination) -> Step:
    """One decode step as one `shard_map` over the mesh; arguments as for `model.decode_step`."""
    caches = [cache_spec()] * config.num_layers
    return jax.shard_map(
        lambda params, caches, tokens, lengths: local_step(
            params, config, caches, tokens, lengths, combination
        ),
        mesh=mesh,
        in_specs=(jax.P(), caches, jax.P(), jax.P()),
        out_specs=(jax.P(), caches, jax.P()),
    )


# --- a whole run ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generation:
    """Everything one run produced, on the host.

    Attributes:
        tokens: `[steps, streams]`, the likeliest next token after each step.
        indices: `[steps, layers, streams, 1, k]`, the selected positions.
        logits: `[steps, streams, vocab]` float32.
        seconds: of the run, without compilation.
    """

    tokens: np.ndarray
    indices: np.ndarray
    logits: np.ndarray
    seconds: float


def generate(
    step: Step,
    params: model.Params,
    caches: list[model.Cache],
    texts: np.ndarray,
    lengths: np.ndarray,
    prompt: int,
) -> Generation:
    """Reads `prompt` tokens of every stream, then feeds each prediction back, in one scan.

    Args:
        step: one decode step.
        params: of the model.
        caches: empty.
        texts: `[steps, streams, 1]`, the token of each stream's text at each step.
        lengths: `[steps, streams]`, length of each stream after each step.
        prompt: tokens of each stream that are read from its text.
    """

    @jax.jit
    def run(params: model.Params, caches: list[model.Cache], texts: Array, lengths: Array) -> Any:
        def one(carry: Any, inputs: tuple[Array, Array]) -> Any:
            caches, last = carry
            text, length = inputs
            tokens = jnp.where((length <= prompt)[:, None], text, last)
            logits, caches, indices = step(params, caches, tokens, length)
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (caches, likeliest), (likeliest[:, 0], indices, logits[:, 0])

        first = jnp.zeros((texts.shape[1], 1), jnp.int32)
        return lax.scan(one, (caches, first), (texts, lengths))[1]

    arguments = (params, caches, jnp.asarray(texts), jnp.asarray(lengths))
    compiled = run.lower(*arguments).compile()
    begin = time.perf_counter()
    tokens, indices, logits = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - begin
    return Generation(np.asarray(tokens), np.asarray(indices), np.asarray(logits), seconds)


def sent_bytes(config: Config, combination: Combination) -> tuple[int, int]:
    """What one device sends per row and layer: for the selection, and for attention."""
    itemsize = jnp.dtype(config.dtype).itemsize
    if combination == "gather":
        attention = config.top_k * config.latent_dim * itemsize
    else:
        attention = config.num_heads * (config.kv_lora_rank + 2) * 4
    return config.top_k * (4 + 4), attention


def describe(name: str, run: Generation, alone: Generation) -> tuple[str, bool]:
    """One line that compares a run with that of one device, and whether all tokens are equal."""
    same = run.tokens == alone.tokens
    same_sets = (run.indices == alone.indices).all(axis=(1, 3, 4))
    if run.logits.tobytes() == alone.logits.tobytes():
        outputs = "logits bit-identical"
    else:
        outputs = f"logits within {np.abs(run.logits - alone.logits).max():.1e}"
    return (
        f"{name:>10}: {same.sum()}/{same.size} tokens, {same_sets.sum()}/{same_sets.size} selected "
        f"sets identical, {outputs}; {run.seconds:.1f} s",
        bool(same.all()),
    )


# --- command --------------------------------------------------------------------------------------


def find_devices(count: int) -> list[jax.Device]:
    """`count` devices: of the default platform if it has them, else simulated by the CPU.

    Raises:
        ValueError: there are fewer, and JAX has started too early to simulate more.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started; there may be enough
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--devices {count}: JAX sees {len(devices)} CPU device(s) and cannot simulate more "
            f"once it has started; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command.new_parser("examples.sparse_attention.context_parallel", __doc__)
    parser.add_argument("--devices", type=int, default=8, help="blocks of the cache")
    parser.add_argument("--streams", type=int, default=2, help="texts decoded side by side")
    parser.add_argument("--prompt", type=int, default=512, help="tokens read from each text")
    parser.add_argument("--tokens", type=int, default=256, help="tokens generated after that")
    parser.add_argument("--stagger", type=int, default=100, help="steps between two arrivals")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument("--top-k", type=int, default=64, help="positions attended to per token")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Decodes on one device and over the mesh, prints the comparison; returns the exit status."""
    args = parse_arguments(arguments)
    least = {"devices": 1, "streams": 1, "prompt": 1, "tokens": 1, "stagger": 0, "layers": 1}
    for name, at_least in (least | {"top_k": 1}).items():
        if getattr(args, name) < at_least:
            flag = name.replace("_", "-")
            print(
                f"--{flag} {getattr(args, name)} is too small; pass {at_least} or more",
                file=sys.stderr,
            )
            return 2
    try:
        devices = find_devices(args.devices)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # Full float32 precision, so that a GPU shows what a CPU does.
    with jax.default_device(devices[0]), jax.default_matmul_precision("highest"):
        return compare(args, devices)


def compare(args: argparse.Namespace, devices: list[jax.Device]) -> int:
    """`main` on the devices that were found."""
    steps = args.prompt + args.tokens + args.stagger * (args.streams - 1)
    width = -(-steps // len(devices)) * len(devices)
    # Scores are computed in blocks of the same shape on one device as on many.
    config = dataclasses.replace(
        TINY, num_layers=args.layers, top_k=args.top_k, index_block=width // len(devices)
    )
    texts = corpus.longest_files(args.streams)
    lengths = staggered_lengths(steps, args.streams, tokens_per_step=1, stagger=args.stagger)
    tokens = tokens_of_steps(list(texts.values()), lengths, 1)
    mesh = jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    params = jax.jit(model.init_model, static_argnames="config")(jax.random.key(args.seed), config)
    print(
        f"DSA decode of {', '.join(texts)} with a cache over {len(devices)} devices\n"
        f"{config.num_layers} layers, k = {config.top_k}, {width} positions in blocks of "
        f"{width // len(devices)}, prompts of {args.prompt}, {args.tokens} tokens or more "
        f"generated, jax {jax.__version__} on {devices[0].device_kind}\n"
    )
    select = selection.select_top_k()

    def alone_step(
        params: model.Params, caches: list[model.Cache], tokens: Array, lengths: Array
    ) -> Any:
        return model.decode_step(params, config, caches, tokens, lengths, select)

    caches = model.init_caches(config, width, args.streams)
    alone = generate(alone_step, params, caches, tokens, lengths, args.prompt)
    print(f"{'one device':>10}: {alone.seconds:.1f} s", flush=True)

    everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    is_identical = True
    for combination in COMBINATIONS:
        caches = init_caches(config, width, args.streams, mesh)
        step = sharded_step(config, mesh, combination)
        run = generate(step, everywhere, caches, tokens, lengths, args.prompt)
        line, same = describe(combination, run, alone)
        selected, attended = sent_bytes(config, combination)
        print(
            f"{line}\n{'':>12}a device sends {selected} bytes for the selection and {attended} for "
            "attention, per row and layer",
            flush=True,
        )
        is_identical &= same
    print(
        "\nOK: the tokens are those of one device"
        if is_identical
        else "\nDISAGREEMENT: tokens differ from those of one device"
    )
    return 0 if is_identical else 1


if __name__ == "__main__":
    sys.exit(main())
