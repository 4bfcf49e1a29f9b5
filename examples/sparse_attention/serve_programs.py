# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the serving benchmark.

Every program has static sizes, and lengths as run-time values: one per batch size and
implementation serves all lengths. They are compiled ahead of time, side by side in threads, since
compiling takes most of the benchmark's time on a GPU.

On a GPU, XLA chooses the algorithm of a matrix product by timing the candidates, so two programs
that contain the same product might round it differently. XLA remembers its choices within a
process. The step with the free selection contains every product that the other steps contain, and
is therefore compiled first; the others then find all choices made.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from examples.sparse_attention import command, model, selection
from examples.sparse_attention.compiling import Compiler, Future
from examples.sparse_attention.config import CONFIGS, Config
from examples.sparse_attention.pieces import rms_norm
from examples.sparse_attention.selection import Selector

# Products per index head that exist at a time. While decoding, enough for whole sequences of 128K:
# as soon as the keys of one are sliced, XLA converts them from fp8 in a kernel of its own, not
# inside the product, and that costs more than reducing products that do not fit the L2 cache. In
# prefill, with its many rows, so large that launching kernels does not take longer than running
# them.
DECODE_BLOCK_BYTES = 256 * 2**20
PREFILL_BLOCK_BYTES = 512 * 2**20
FREE = "free"
LAX = "lax"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Static sizes of the programs of one batch size.

    Attributes:
        config: sizes of the model, with blocks of candidates and sequences that bound memory.
        batch: requests decoded together.
        width: positions in the static cache.
        prefill_buffer: positions of the buffer in which a prompt is computed, a multiple of
            `prefill_rows`; 0 if the cache is filled with random latents and keys instead.
        prefill_rows: rows of a prompt that run through a layer at a time.
    """

    config: Config
    batch: int
    width: int
    prefill_buffer: int
    prefill_rows: int

    @property
    def num_candidates(self) -> int:
        """Columns of the scores."""
        return self.width // self.config.compression

    @property
    def k(self) -> int:
        """Candidates selected per row."""
        return min(self.config.top_k, self.num_candidates)


def block_of(config: Config, rows: int, candidates: int, num_bytes: int) -> int:
    """Candidates scored at a time: a power of two, or the whole row."""
    block = num_bytes // (4 * rows * config.index_heads)
    return min(1 << max(block, 128).bit_length() - 1, candidates)


def new_setting(
    config_name: str,
    layers: int,
    vocab_size: int,
    batch: int,
    width: int,
    prefill_buffer: int,
    prefill_rows: int,
) -> Setting:
    """The sizes of one batch size; see `Setting`."""
    config = CONFIGS[config_name]
    block = block_of(config, 1, width // config.compression, DECODE_BLOCK_BYTES)
    sequences = DECODE_BLOCK_BYTES // (4 * config.index_heads * block)
    config = dataclasses.replace(
        config,
        num_layers=layers,
        vocab_size=vocab_size,
        index_block=block,
        index_sequences=max(sequences, 1),
    )
    return Setting(config, batch, width, prefill_buffer, prefill_rows)


# ------------------------------------------------------------------------------------- selection


def select_evenly(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
    """Evenly spaced indices: gathers from all over the row as a real selection does, but for free.

    It reads the scores once, as any selection has to, so that they are really computed; what this
    costs is not counted as top-k's share.
    """
    del starts
    # Integer arithmetic in 64 bits would need x64; (length * i) / k in two parts does not overflow.
    i = jnp.arange(k, dtype=jnp.int32)
    whole, rest = lengths[:, None] // k, lengths[:, None] % k
    spread = whole * i + rest * i // k
    indices = jnp.where(lengths[:, None] >= k, spread, i)
    # No score is that low; XLA cannot know.
    never = jnp.max(scores, axis=1, keepdims=True) == -12345.0
    return jnp.where((i < lengths[:, None]) & ~never, indices, -1)


def select_by_lax(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
    """`lax.top_k` of masked scores, as one writes it without this package: the best first."""
    column = jnp.arange(scores.shape[1], dtype=jnp.int32)
    first = 0 if starts is None else starts[:, None]
    is_inside = (column >= first) & (column < first + lengths[:, None])
    indices = lax.top_k(jnp.where(is_inside, scores, -jnp.inf), k)[1] - first
    # Fewer than k in the window: the rest are masked columns, and come last.
    return jnp.where((indices >= 0) & (indices < lengths[:, None]), indices, -1)


def selector(name: str) -> Selector:
    """The selector of an implementation, by the name it has in the tables."""
    if name == FREE:
        return select_evenly
    if name == LAX:
        return select_by_lax
    return selection.select_top_k(command.implementation_of(name))


# ------------------------------------------------------------------------------------- functions


def synthetic_caches(key: Array, setting: Setting) -> list[model.Cache]:
    """Caches `[batch, width]` filled as if by a prompt: unit-size latents and index keys."""
    config = setting.config

    def fill(key: Array) -> model.Cache:
        latent_key, index_key, recent_key = jax.random.split(key, 3)
        empty = model.init_cache(config, setting.width)
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

    # Request by request, which bounds the memory that the generator takes.
    keys = jax.random.split(key, (config.num_layers, setting.batch))
    return [jax.lax.map(fill, layer_keys) for layer_keys in keys]


def decode_step(
    params: model.Params,
    caches: list[model.Cache],
    tokens: Array,
    lengths: Array,
    *,
    config: Config,
    select: Selector,
) -> tuple[list[model.Cache], Array, Array]:
    """Appends `tokens` `[B]`; returns new caches, the next tokens, and lengths after the step.

    `lengths` `[B]` are those before the step.
    """
    lengths = lengths + 1
    logits, caches, _ = model.decode_step(params, config, caches, tokens[:, None], lengths, select)
    return caches, logits[:, 0].argmax(axis=-1).astype(jnp.int32), lengths


def first_scores(
    params: model.Params,
    caches: list[model.Cache],
    tokens: Array,
    lengths: Array,
    *,
    config: Config,
) -> Array:
    """Scores `[B, n]` that the first layer selects from when `decode_step` appends `tokens`."""
    layer = params["layers"][0]

    def score(cache: model.Cache, token: Array, position: Array) -> Array:
        x = rms_norm(params["embed"][token], layer["attention_norm"], config.norm_eps)
        cache = model.write_cache(layer, config, cache, x, position, None)
        qr = model.compressed_queries(layer, config, x)
        return model.candidate_scores(layer, config, cache, x, qr, position)

    return jax.vmap(score)(caches[0], tokens[:, None], lengths[:, None])[:, 0]


def select_first(scores: Array, lengths: Array, *, setting: Setting, select: Selector) -> Array:
    """What an implementation selects, `[B, k]`, from `first_scores`; `lengths` as given there."""
    return select(scores, None, (lengths + 1) // setting.config.compression, setting.k)


def prefill(
    params: model.Params,
    caches: list[model.Cache],
    tokens: Array,
    length: Array,
    request: Array,
    *,
    setting: Setting,
    select: Selector,
) -> tuple[list[model.Cache], Array]:
    """Runs one prompt through the model, into the caches of one request.

    Args:
        params: of the model.
        caches: `[batch, width]` per layer.
        tokens: `[prefill_buffer]`.
        length: of the prompt.
        request: whose caches are written.
        setting: sizes.
        select: which candidates to read.

    Returns:
        The caches, and the token that follows the prompt.
    """
    block = block_of(
        setting.config,
        setting.prefill_rows,
        setting.prefill_buffer // setting.config.compression,
        PREFILL_BLOCK_BYTES,
    )
    config = dataclasses.replace(setting.config, index_block=block)
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = jnp.where(positions < length, positions, -1)
    logits, packed, _ = model.prefill(
        params, config, tokens, positions, select, setting.prefill_rows
    )
    starts = jnp.zeros(1, jnp.int32)
    filled = [
        model.unpack_cache(config, cache, starts, length[None], setting.width) for cache in packed
    ]
    caches = jax.tree.map(
        lambda all_requests, one: jax.lax.dynamic_update_index_in_dim(
            all_requests, one[0], request, axis=0
        ),
        caches,
        filled,
    )
    return caches, logits[length - 1].argmax().astype(jnp.int32)


# ------------------------------------------------------------------------------------- compiling


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one batch size; those by implementation under its name.

    Attributes:
        setting: sizes.
        fill: key -> caches (see `synthetic_caches`).
        scores: see `first_scores`.
        selections: see `select_first`; the chosen implementation, xla and lax.
        steps: see `decode_step`, caches donated; these three, and the free selection.
        prefills: see `prefill`, caches donated; these three, or none.
    """

    setting: Setting
    fill: Callable[..., Any]
    scores: Callable[..., Any]
    selections: dict[str, Callable[..., Any]]
    steps: dict[str, Callable[..., Any]]
    prefills: dict[str, Callable[..., Any]]


KEY = jax.eval_shape(lambda: jax.random.key(0))


def weight_shapes(config: Config) -> Any:
    """Shapes of the weights."""
    return jax.eval_shape(functools.partial(model.init_model, config=config), KEY)


def cache_shapes(setting: Setting) -> Any:
    """Shapes of the caches."""
    return jax.eval_shape(functools.partial(synthetic_caches, setting=setting), KEY)


def num_bytes(shapes: Any) -> int:
    """Bytes that arrays of these shapes take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


class PendingPrograms:
    """Programs of one batch size while they are compiled.

    Args:
        setting: sizes.
        names: implementations to compare.
        compiler: that compiles them.
    """

    def __init__(self, setting: Setting, names: Iterable[str], compiler: Compiler) -> None:
        self.setting, self._names, self._compiler = setting, tuple(names), compiler
        self._futures: dict[tuple[str, str], Future] = {}
        row = jax.ShapeDtypeStruct((setting.batch,), jnp.int32)
        self._state = (weight_shapes(setting.config), cache_shapes(setting), row, row)
        self._submit_step(FREE, after=None)

    def _submit(
        self,
        kind: str,
        name: str,
        function: Callable[..., Any],
        arguments: Iterable[Any],
        donate: int | None = None,
        after: Future | None = None,
    ) -> None:
        """Lowers a function for arguments of given shapes, and starts to compile it.

        Args:
            kind: of program.
            name: of the implementation of top-k, if there is one program for each.
            function: to be jitted.
            arguments: `jax.ShapeDtypeStruct`, or pytrees of them.
            donate: argument whose memory the result takes over.
            after: see `Compiler.submit`.
        """
        label = f"{kind} {name}".strip() + f", batch {self.setting.batch}"
        donated = () if donate is None else (donate,)
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        self._futures[kind, name] = self._compiler.submit(label, lowered, after)

    def _submit_step(self, name: str, after: Future | None) -> None:
        step = functools.partial(decode_step, config=self.setting.config, select=selector(name))
        self._submit("step", name, step, self._state, donate=1, after=after)

    def submit_rest(self) -> None:
        """Starts all but the step with the free selection, which was started at once."""
        setting, (params, caches, row, _) = self.setting, self._state
        leader = self._futures["step", FREE]
        self._submit("fill", "", functools.partial(synthetic_caches, setting=setting), (KEY,))
        for name in self._names:
            self._submit_step(name, after=leader)
        scoring = functools.partial(first_scores, config=setting.config)
        self._submit("scores", "", scoring, self._state, after=leader)
        scores = jax.ShapeDtypeStruct((setting.batch, setting.num_candidates), jnp.float32)
        for name in self._names:
            select = functools.partial(select_first, setting=setting, select=selector(name))
            self._submit("selection", name, select, (scores, row))
        if not setting.prefill_buffer:
            return
        prompt = jax.ShapeDtypeStruct((setting.prefill_buffer,), jnp.int32)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        first = None  # here, too, the others find the choices of the first
        for name in self._names:
            run = functools.partial(prefill, setting=setting, select=selector(name))
            arguments = (params, caches, prompt, number, number)
            self._submit("prefill", name, run, arguments, donate=1, after=first)
            first = first or self._futures["prefill", name]

    def wait(self, seconds: float | None) -> Programs | None:
        """The programs, or None if they are not all compiled within that time."""
        _, others = concurrent.futures.wait(self._futures.values(), seconds)
        if others:
            return None
        try:
            compiled = {label: future.result() for label, future in self._futures.items()}
        except concurrent.futures.CancelledError:
            return None

        def of(kind: str) -> dict[str, Callable[..., Any]]:
            return {name: program for (k, name), program in compiled.items() if k == kind}

        return Programs(
            setting=self.setting,
            fill=of("fill")[""],
            scores=of("scores")[""],
            selections=of("selection"),
            steps=of("step"),
            prefills=of("prefill"),
        )
