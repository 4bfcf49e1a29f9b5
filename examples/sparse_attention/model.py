# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek sparse attention (DSA) as a reference implementation in JAX.

A small indexer scores every cached position for the current token, the k best positions are
selected exactly by `jax_topk.top_k_indices`, and multi-head latent attention (MLA) reads only
those. For a row x at position t:

    qr    = RMSNorm(x Wqa)
    qI_h  = H rope(qr WqI)_h,  kI = H rope(LayerNorm(x WkI))    index query (per head) and key
    w_h   = (x Ww)_h heads^-1/2 dim^-1/2                        signed weight of an index head
    I_s   = sum_h w_h relu(qI_h . kI_s)                         index score, float32
    S     = the k largest of I over the row's window            jax_topk
    c     = RMSNorm(x Wkva[:r]),  kp = rope(x Wkva[r:])         cached per position, with kI
    a_hs  = softmax over s in S of (qn_h Wkb_h . c_s + qp_h . kp_s) scale
    out   = concat_h((sum_s a_hs c_s) Wvb_h) Wo

H is the orthonormal Hadamard transform: it changes no score, and spreads outliers over all
channels so that a key can be stored in fp8. "Absorbed" means that Wkb and Wvb are applied to the
query and to the result, so that all heads share one cached latent per position and the selected
latents are gathered once.

Everything is written for *rows*: a row is one query token that selects from the window
`[start, start + length)` of one buffer of cached positions. Decoding is `m` rows per sequence,
vectorised over sequences; prefill is one row per token of a packed buffer. Attention sees the
selected set in ascending order whichever implementation of top-k found it, so equal sets give
equal outputs, bit for bit.

With `compression` c > 1 (DeepSeek-V4) the candidates are not single positions: every c neighbours
are pooled into one entry by learned gates before norm and rotation, the indexer selects among the
complete groups, and a sliding window of the last positions is always attended to besides. Of V4
this takes the candidate side only; pooling without overlap and attention by MLA stay as above.

Source: DeepSeek-V3.2-Exp, `inference/model.py`, and its technical report, section 2.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from examples.sparse_attention.config import Config
from examples.sparse_attention.pieces import (
    hadamard,
    layer_norm,
    map_blocks,
    normal_arrays,
    project,
    quantize_fp8,
    quantize_weight,
    rms_norm,
    rope,
    rope_frequencies,
)
from examples.sparse_attention.selection import Selector, dense_indices

Params = dict[str, Any]


class Cache(NamedTuple):
    """What one layer remembers of one buffer of `n` candidates.

    Attributes:
        latents: `[n, latent_dim]`, the latent `c` and the rotated key `kp`.
        index_keys: `[n, index_dim]`, the indexer's keys, in the model's dtype or in fp8.
        index_scales: `[n]` float32, the scale of each index key (1 without fp8).
        recent: `[ring, 2 (latent_dim + index_dim)]` with compression, else `[0, ...]`: projections
            and gates of the last positions, position p at row p modulo the ring.
    """

    latents: Array
    index_keys: Array
    index_scales: Array
    recent: Array


# ------------------------------------------------------------------------------------ parameters


# The axis that a matrix's product sums over; the others contract axis 0.
CONTRACTED = {"wkb": 1, "wvb": 1}
FP8_MATRICES = (
    *("wqa", "wqb", "wkva", "wkb", "wvb", "wo", "index_wq", "index_wk"),
    *("ffn_gate_up", "ffn_down"),
)


def quantize_weights(params: Params) -> Params:
    """A layer's weights with its matrices in fp8; those that DeepSeek-V3.2's checkpoint has so."""
    matrices = {
        name: quantize_weight(params[name], CONTRACTED.get(name, 0)) for name in FP8_MATRICES
    }
    return params | matrices


def init_layer(key: Array, config: Config) -> Params:
    """Random weights of one layer, scaled so that activations keep unit size."""
    c = config
    shapes = {
        "wqa": (c.dim, c.q_lora_rank),
        "wqb": (c.q_lora_rank, c.num_heads, c.nope_dim + c.rope_dim),
        "wkva": (c.dim, c.latent_dim),
        "wkb": (c.num_heads, c.nope_dim, c.kv_lora_rank),
        "wvb": (c.num_heads, c.kv_lora_rank, c.value_dim),
        "wo": (c.num_heads * c.value_dim, c.dim),
        "index_wq": (c.q_lora_rank, c.index_heads, c.index_dim),
        "index_wk": (c.dim, c.index_dim),
        "index_ww": (c.dim, c.index_heads),
        "ffn_gate": (c.dim, c.ffn_dim),
        "ffn_up": (c.dim, c.ffn_dim),
        "ffn_down": (c.ffn_dim, c.dim),
    }
    if c.compression > 1:
        shapes["gates"] = (c.dim, c.latent_dim + c.index_dim)
    params = {}
    for name, numbers in normal_arrays(key, shapes).items():
        scale = numbers.shape[CONTRACTED.get(name, 0)] ** -0.5
        # The indexer's head weights stay float32: DeepSeek computes them in full precision.
        params[name] = (scale * numbers).astype(jnp.float32 if name == "index_ww" else c.dtype)
    # One product of the same rows; and contracted last, like a quantised weight.
    halves = [params.pop(name) for name in ("ffn_gate", "ffn_up")]
    params["ffn_gate_up"] = jnp.stack(halves, axis=1)
    params["index_ww"] = params["index_ww"].T
    for name, width in {
        "attention_norm": c.dim,
        "ffn_norm": c.dim,
        "q_norm": c.q_lora_rank,
        "kv_norm": c.kv_lora_rank,
        "index_k_norm": c.index_dim,
    }.items():
        params[name] = jnp.ones(width, c.dtype)
    params["index_k_bias"] = jnp.zeros(c.index_dim, c.dtype)
    if c.compression > 1:
        params["gate_bias"] = jnp.zeros((c.compression, c.latent_dim + c.index_dim), c.dtype)
    return quantize_weights(params) if c.weight_fp8 else params


def init_model(key: Array, config: Config) -> Params:
    """Random weights of a whole model: embedding, layers, final norm, unembedding."""
    tables_key, *layer_keys = jax.random.split(key, 1 + config.num_layers)
    table = (config.vocab_size, config.dim)
    tables = normal_arrays(tables_key, {"embed": table, "unembed": table})
    return {
        "embed": tables["embed"].astype(config.dtype),
        "layers": [init_layer(layer_key, config) for layer_key in layer_keys],
        "norm": jnp.ones(config.dim, config.dtype),
        "unembed": (config.dim**-0.5 * tables["unembed"]).astype(config.dtype),
    }


def init_cache(config: Config, width: int, ring: int | None = None) -> Cache:
    """An empty cache of `width` positions for one layer and one buffer.

    It is filled with NaN where a production engine has uninitialised memory: nothing outside a
    row's window may reach its result.

    Args:
        config: sizes.
        width: positions; `width // compression` candidates.
        ring: positions kept uncompressed; `config.ring` if not given.
    """
    num_candidates = width // config.compression
    ring = config.ring if ring is None else ring
    key_dtype = jnp.float8_e4m3fn if config.index_fp8 else config.dtype
    return Cache(
        latents=jnp.full((num_candidates, config.latent_dim), jnp.nan, config.dtype),
        index_keys=jnp.full((num_candidates, config.index_dim), jnp.nan, key_dtype),
        index_scales=jnp.full(num_candidates, jnp.nan, jnp.float32),
        recent=jnp.full((ring, 2 * (config.latent_dim + config.index_dim)), jnp.nan, config.dtype),
    )


def init_caches(config: Config, width: int, batch: int) -> list[Cache]:
    """Empty caches of `width` positions for every layer, with a leading axis of `batch`."""

    def batched() -> Cache:
        cache = init_cache(config, width)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), cache)

    return [batched() for _ in range(config.num_layers)]


# --------------------------------------------------------------------------------------- indexer


def index_projection(config: Config, x: Array, positions: Array) -> tuple[Array, Array]:
    """Rotates, mixes and quantises index queries or keys `[R, ..., index_dim]`.

    Returns:
        Vectors `[R, ..., index_dim]` in fp8 or the model's dtype, and float32 scales `[R, ...]`.
    """
    rotated = rope(
        x[..., : config.rope_dim],  # the indexer puts the rotated channels first, attention last
        positions,
        rope_frequencies(config),
        interleaved=config.index_rope_interleaved,
    )
    whole = jnp.concatenate([rotated, x[..., config.rope_dim :]], axis=-1)
    # Every sum of the transform reads all channels; XLA shall not rotate them for each anew.
    mixed = hadamard(lax.optimization_barrier(whole))
    if config.index_fp8:
        return quantize_fp8(mixed)
    return mixed, jnp.ones(mixed.shape[:-1], jnp.float32)


def index_queries(
    params: Params, config: Config, x: Array, qr: Array, positions: Array
) -> tuple[Array, Array]:
    """Index queries `[R, heads, index_dim]` and signed head weights `[R, heads]` (float32)."""
    queries = project("rq,qhd->rhd", qr, params["index_wq"])
    queries, scales = index_projection(config, queries, positions)
    weights = jnp.einsum("rd,hd->rh", x.astype(jnp.float32), params["index_ww"])
    return queries, weights * scales * (config.index_heads * config.index_dim) ** -0.5


def compressed_queries(params: Params, config: Config, x: Array) -> Array:
    """`qr` `[R, q_lora_rank]` of rows `x` `[R, dim]`, from which all queries are projected."""
    return rms_norm(project("rd,dq->rq", x, params["wqa"]), params["q_norm"], config.norm_eps)


def candidate_scores(
    params: Params, config: Config, cache: Cache, x: Array, qr: Array, positions: Array
) -> Array:
    """Index scores `[R, n]` (float32) of rows `x` `[R, dim]` against every candidate in the cache.

    Args:
        params: of the layer.
        config: sizes.
        cache: of `n` candidates.
        x: `[R, dim]`, normalised input of the rows.
        qr: `[R, q_lora_rank]`, their compressed queries.
        positions: `[R]`, place of each row in its sequence.
    """
    queries, weights = index_queries(params, config, x, qr, positions)
    score = index_scores_by_sequence(config.index_block, config.index_sequences)
    return score(queries, weights, cache.index_keys, cache.index_scales)


def index_scores_by_sequence(block: int, sequences: int) -> Callable[..., Array]:
    """`index_scores` that under `jax.vmap` scores so many sequences of the batch at a time.

    What one product reads is then one piece of the caches. Blocks of candidates of all sequences
    are not, and XLA would convert such keys from fp8 in a kernel of its own.

    Args:
        block: candidates scored at a time.
        sequences: scored at a time; 0 for all.
    """
    score = functools.partial(index_scores, block=block)
    by_sequence = custom_vmap(score)

    @by_sequence.def_vmap
    def score_batch(batch: int, is_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        arrays = tuple(
            array if has_batch else jnp.broadcast_to(array, (batch, *array.shape))
            for array, has_batch in zip(arrays, is_batched, strict=True)
        )
        score_group = jax.vmap(score)
        if not 0 < sequences < batch:
            return score_group(*arrays), True
        groups = [[a[i : i + sequences] for a in arrays] for i in range(0, batch, sequences)]
        # The barrier: a copy of fp8 keys costs less than converting them on the way.
        scores = [score_group(*lax.optimization_barrier(group)) for group in groups]
        return jnp.concatenate(scores), True

    return by_sequence


def index_scores(queries: Array, weights: Array, keys: Array, scales: Array, block: int) -> Array:
    """Index scores of every row against every candidate, summed over heads.

    `I[r, s] = scale_s sum_h weights[r, h] relu(queries[r, h] . keys[s])`

    A key whose products are all negative scores exactly 0, so ties are common; and since weights
    are signed, so are scores.

    Args:
        queries: `[R, heads, d]`.
        weights: `[R, heads]` float32.
        keys: `[n, d]`.
        scales: `[n]` float32.
        block: candidates scored at a time. The `[R, heads, block]` products of one block are
            reduced over heads before the next is computed; `[R, heads, n]` never exists, which
            with 64 heads would be 64 times the scores, and more traffic than the keys.

    Returns:
        `[R, n]` float32.
    """
    # fp8 is exact in bfloat16, which every platform multiplies. Keys are converted block by block,
    # so that no bfloat16 copy of the whole cache is made.
    dtype = jnp.bfloat16 if keys.dtype == jnp.float8_e4m3fn else keys.dtype
    queries = queries.astype(dtype)

    def score(keys: Array, scales: Array) -> Array:
        products = jnp.einsum(
            "rhd,sd->rhs", queries, keys.astype(dtype), preferred_element_type=jnp.float32
        )
        return weighted_sum_over_heads(jax.nn.relu(products), weights, scales)

    blocks = [slice(i, i + block) for i in range(0, keys.shape[0], block)]
    return jnp.concatenate([score(keys[i], scales[i]) for i in blocks], axis=1)


def weighted_sum_over_heads(products: Array, weights: Array, scales: Array) -> Array:
    """`sum_h products[r, h, s] weights[r, h] scales[s]`, `[R, s]`, as each platform does it best.

    Scales are powers of two, so that nothing depends on when they are multiplied.

    A GPU fuses whatever precedes a sum into it, and reads the products once. XLA on CPU (jaxlib
    0.10) fuses the matrix product before it as well, and loses its fast form by that.
    """

    def by_sum(products: Array, weights: Array, scales: Array) -> Array:
        return jnp.sum(products * weights[..., None] * scales, axis=1)

    def by_product(products: Array, weights: Array, scales: Array) -> Array:
        sums = jnp.einsum("rhs,rh->rs", products, weights, precision=lax.Precision.HIGHEST)
        return sums * scales

    return lax.platform_dependent(products, weights, scales, cpu=by_product, default=by_sum)


# ------------------------------------------------------------------------------------- attention


def attention_queries(params: Params, config: Config, qr: Array, positions: Array) -> Array:
    """Absorbed queries `[R, heads, kv_lora_rank + rope_dim]`, to be multiplied with latents."""
    q = project("rq,qhd->rhd", qr, params["wqb"])
    q_nope, q_rope = q[..., : config.nope_dim], q[..., config.nope_dim :]
    q_rope = rope(q_rope, positions, rope_frequencies(config), interleaved=True)
    q_content = project("rhd,hdc->rhc", q_nope, params["wkb"])
    return jnp.concatenate([q_content, q_rope], axis=-1)


def attend(
    params: Params, config: Config, queries: Array, latents: Array, is_selected: Array
) -> Array:
    """Attention of each row over its own selected latents.

    Args:
        params: of the layer.
        config: sizes.
        queries: `[R, heads, kv_lora_rank + rope_dim]`.
        latents: `[R, k, kv_lora_rank + rope_dim]`.
        is_selected: `[R, k]`, false for padding. A row without any yields zeros.

    Returns:
        `[R, dim]`.
    """
    latents = jnp.where(is_selected[..., None], latents, 0)  # padding may hold NaN
    logits = jnp.einsum("rhc,rkc->rhk", queries, latents, preferred_element_type=jnp.float32)
    logits = jnp.where(is_selected[:, None], logits * config.softmax_scale, -1e30)
    weights = jax.nn.softmax(logits, axis=-1) * is_selected[:, None]
    # Rotated keys are no content; leaving them out here would copy all other channels.
    mixed = jnp.einsum("rhk,rkc->rhc", weights.astype(latents.dtype), latents)
    mixed = mixed[..., : config.kv_lora_rank]
    return attention_output(params, mixed)


def attention_output(params: Params, mixed: Array) -> Array:
    """Output `[R, dim]` of attention from every head's mixture of latents `[R, heads, rank]`."""
    heads = project("rhc,hcv->rhv", mixed, params["wvb"])
    return project("rv,vd->rd", heads.reshape(heads.shape[0], -1), params["wo"])


def finish_latent(params: Params, config: Config, latent: Array, positions: Array) -> Array:
    """Norm and rotation of projected latents `[R, latent_dim]`: what attention reads."""
    content = rms_norm(latent[:, : config.kv_lora_rank], params["kv_norm"], config.norm_eps)
    position_key = rope(
        latent[:, config.kv_lora_rank :], positions, rope_frequencies(config), interleaved=True
    )
    return jnp.concatenate([content, position_key], axis=-1)


def finish_index_key(
    params: Params, config: Config, key: Array, positions: Array
) -> tuple[Array, Array]:
    """Norm, rotation and quantisation of projected index keys `[R, index_dim]`."""
    key = layer_norm(key, params["index_k_norm"], params["index_k_bias"])
    return index_projection(config, key, positions)


def store(buffer: Array, slots: Array, rows: Array) -> Array:
    """Writes `rows` `[R, ...]` at `slots` `[R]` of `buffer`; a slot outside of it is dropped.

    Slots are distinct, so the write needs no atomics.
    """
    # jnp would count -1 from the end; beyond the end, -1, -2, ... stay distinct and are dropped.
    slots = jnp.where(slots < 0, buffer.shape[0] - 1 - slots, slots)
    return buffer.at[slots].set(rows.astype(buffer.dtype), mode="drop", unique_indices=True)


def store_next(buffer: Array, slots: Array, rows: Array) -> Array:
    """`store` into a sequence's own buffer, whose slots are its positions.

    One row is written without a look at what was there. A row that does not exist, at slot -1 of a
    sequence that has not begun, then lands in slot 0, where nothing is yet and the first row goes.
    """
    if rows.shape[0] > 1:
        return store(buffer, slots, rows)
    slot = jnp.clip(slots[0], 0, buffer.shape[0] - 1)
    return lax.dynamic_update_index_in_dim(buffer, rows[0].astype(buffer.dtype), slot, axis=0)


def compress(params: Params, config: Config, recent: Array) -> Array:
    """Pools groups of neighbours `[G, c, 2 d]` (projections and gates) into `[G, d]`."""
    projections, gates = jnp.split(recent.astype(jnp.float32), 2, axis=-1)
    weights = jax.nn.softmax(gates + params["gate_bias"].astype(jnp.float32), axis=1)
    return jnp.sum(weights * projections, axis=1).astype(recent.dtype)


def write_cache(
    params: Params,
    config: Config,
    cache: Cache,
    x: Array,
    positions: Array,
    slots: Array | None,
) -> Cache:
    """Stores what rows leave behind for later ones.

    Args:
        params: of the layer.
        config: sizes.
        cache: of the buffer.
        x: `[R, dim]`, normalised input of the rows.
        positions: `[R]`, place of each row in its sequence.
        slots: `[R]`, place of each row in the buffer, one after the other; a negative one belongs
            to a row that does not exist. With compression a sequence starts at a multiple of it.
            None if the buffer holds one sequence, so that slots are positions.
    """
    write = store_next if slots is None else store
    slots = positions if slots is None else slots
    both = [project("rd,dc->rc", x, params[name]) for name in ("wkva", "index_wk")]
    projection = jnp.concatenate(both, axis=-1)
    recent = cache.recent
    if config.compression > 1:
        c, ring = config.compression, recent.shape[0]
        rows = jnp.concatenate([projection, x @ params["gates"]], axis=-1)
        recent = write(recent, jnp.where(slots < 0, slots, slots % ring), rows)
        # Pool every group that the rows belong to. The last may be incomplete, and then holds
        # garbage until it is: it lies beyond the length of every row that exists.
        num_groups = (slots.shape[0] + c - 2) // c + 1
        groups = slots[0] // c + jnp.arange(num_groups, dtype=slots.dtype)
        members = groups[:, None] * c + jnp.arange(c, dtype=slots.dtype)
        projection = compress(params, config, recent[members % ring])
        # A group takes the position of its first member.
        start_of_row = slots - positions
        row = jnp.clip(members[:, 0] - slots[0], 0, slots.shape[0] - 1)
        positions, slots = members[:, 0] - start_of_row[row], groups
    latent, index_key = projection[:, : config.latent_dim], projection[:, config.latent_dim :]
    index_key, index_scale = finish_index_key(params, config, index_key, positions)
    return Cache(
        latents=write(cache.latents, slots, finish_latent(params, config, latent, positions)),
        index_keys=write(cache.index_keys, slots, index_key),
        index_scales=write(cache.index_scales, slots, index_scale),
        recent=recent,
    )


def gather_window(
    params: Params, config: Config, cache: Cache, positions: Array, slots: Array
) -> tuple[Array, Array]:
    """Latents of the last `window` positions of each row, from the uncompressed ring.

    Returns:
        `[R, window, latent_dim]`, and `[R, window]`, whether there is such a position.
    """
    ring = cache.recent.shape[0]
    back = jnp.arange(config.window, dtype=slots.dtype)
    rows = (slots[:, None] - back) % ring
    exists = back <= positions[:, None]
    # Finishing a latent costs less than reading another cache of finished ones.
    raw = cache.recent[rows, : config.latent_dim].reshape(-1, config.latent_dim)
    latents = finish_latent(params, config, raw, (positions[:, None] - back).reshape(-1))
    return latents.reshape(*rows.shape, config.latent_dim), exists


def sparse_attention(
    params: Params,
    config: Config,
    cache: Cache,
    x: Array,
    positions: Array,
    slots: Array | None,
    select: Selector | None,
) -> tuple[Array, Array]:
    """One DSA block: score the candidates of every row, select k of them, attend to those.

    A row at `position` sees the positions 0 .. position of its own sequence, which is the window
    `[slot - position, slot + 1)` of the buffer; a negative position sees nothing.

    Args:
        params: of the layer.
        config: sizes.
        cache: of `n` candidates, the rows' own among them.
        x: `[R, dim]`, normalised input of the rows.
        positions: `[R]`, place of each row in its sequence.
        slots: `[R]`, place of each row in the buffer, or None if it holds one sequence.
        select: which candidates to read; None reads all that the row sees (dense attention).

    Returns:
        Output `[R, dim]` and the selected indices `[R, k]`, relative to the row's window.
    """
    qr = compressed_queries(params, config, x)
    queries = attention_queries(params, config, qr, positions)
    starts = None if slots is None else jnp.maximum(slots - positions, 0) // config.compression
    lengths = jnp.maximum(positions + 1, 0) // config.compression
    num_candidates = cache.latents.shape[0]
    if select is None:
        indices = dense_indices(lengths, num_candidates)
        # The cache in place, under a mask: as indices are relative to the row's window, reading
        # by them would copy all of it for every row.
        latents = jnp.broadcast_to(cache.latents, (x.shape[0], *cache.latents.shape))
        column = jnp.arange(num_candidates, dtype=lengths.dtype)
        first = 0 if starts is None else starts[:, None]
        is_selected = (column >= first) & (column < first + lengths[:, None])
    else:
        scores = candidate_scores(params, config, cache, x, qr, positions)
        # The barriers ask XLA not to fuse the indexer into one implementation of top-k but not
        # into another, which could round the scores differently.
        scores = lax.optimization_barrier(scores)
        indices = select(scores, starts, lengths, min(config.top_k, num_candidates))
        indices = lax.optimization_barrier(indices)
        is_selected = indices >= 0
        chosen = indices if starts is None else starts[:, None] + indices
        latents = cache.latents[jnp.where(is_selected, chosen, 0)]
    if config.window:
        own_slots = positions if slots is None else slots
        window, exists = gather_window(params, config, cache, positions, own_slots)
        latents = jnp.concatenate([latents, window], axis=1)
        is_selected = jnp.concatenate([is_selected, exists], axis=1)
    return attend(params, config, queries, latents, is_selected), indices


# ----------------------------------------------------------------------------------------- model


def swiglu(params: Params, x: Array) -> Array:
    """The feed-forward block, `[R, dim]` to `[R, dim]`."""
    gate, up = jnp.moveaxis(project("rd,dgf->rgf", x, params["ffn_gate_up"]), 1, 0)
    return project("rf,fd->rd", jax.nn.silu(gate) * up, params["ffn_down"])


def finish_rows(
    params: Params,
    config: Config,
    cache: Cache,
    select: Selector | None,
    rows: tuple[Array, Array, Array, Array | None],
) -> tuple[Array, Array]:
    """What a layer does with rows once all of them have written to its cache.

    Args:
        params: of the layer.
        config: sizes.
        cache: of the layer, the rows' own entries in it.
        select: which candidates to read.
        rows: residual stream `[R, dim]`, the same normalised, positions and slots.

    Returns:
        The new residual stream, and the selected indices `[R, k]`.
    """
    x, h, positions, slots = rows
    attended, indices = sparse_attention(params, config, cache, h, positions, slots, select)
    x = x + attended
    return x + swiglu(params, rms_norm(x, params["ffn_norm"], config.norm_eps)), indices


def run_rows(
    params: Params,
    config: Config,
    caches: list[Cache],
    tokens: Array,
    positions: Array,
    slots: Array | None,
    select: Selector | None,
    block: int | None = None,
) -> tuple[Array, list[Cache], Array]:
    """Runs rows of one buffer through all layers.

    Args:
        params: of the model.
        config: sizes.
        caches: one per layer.
        tokens: `[R]`.
        positions: `[R]`, place of each row in its sequence.
        slots: `[R]`, place of each row in the buffer, or None if it holds one sequence.
        select: which candidates to read.
        block: rows that run through a layer at a time, once all have written to its cache; a
            divisor of R, all by default. It bounds the memory that scores, gathered latents and
            the feed-forward block take.

    Returns:
        Logits `[R, vocab]` in float32, the new caches, and indices `[layers, R, k]`.
    """
    x = params["embed"][tokens]
    new_caches, selected = [], []
    for layer, cache in zip(params["layers"], caches, strict=True):
        h = rms_norm(x, layer["attention_norm"], config.norm_eps)
        cache = write_cache(layer, config, cache, h, positions, slots)
        finish = functools.partial(finish_rows, layer, config, cache, select)
        x, indices = map_blocks(finish, (x, h, positions, slots), block)
        new_caches.append(cache)
        selected.append(indices)
    x = rms_norm(x, params["norm"], config.norm_eps)
    logits = jnp.einsum("rd,vd->rv", x, params["unembed"], preferred_element_type=jnp.float32)
    return logits, new_caches, jnp.stack(selected)


def decode_step(
    params: Params,
    config: Config,
    caches: list[Cache],
    tokens: Array,
    lengths: Array,
    select: Selector | None,
) -> tuple[Array, list[Cache], Array]:
    """Appends the last `m` tokens of every sequence and predicts the next of each.

    Row i of a sequence of n tokens sees `max(n - m + i + 1, 0)` positions. With m = 1 this is
    plain decoding; with more it is the check of m - 1 speculated tokens. A sequence with fewer
    than m tokens has rows that do not exist: they store nothing, select nothing and their logits
    mean nothing. Rejected tokens need no undoing: the next step passes a shorter length and
    overwrites them.

    Args:
        params: of the model.
        config: sizes.
        caches: one per layer, each with a leading axis B.
        tokens: `[B, m]`.
        lengths: `[B]`, length of each sequence with its m new tokens; at most the cache's width.
        select: which candidates to read.

    Returns:
        Logits `[B, m, vocab]`, the new caches, and indices `[layers, B, m, k]`.
    """
    num_tokens = tokens.shape[1]
    if config.compression > 1 and num_tokens > config.max_tokens_per_step:
        raise ValueError(
            f"tokens has {num_tokens} per step, more than max_tokens_per_step="
            f"{config.max_tokens_per_step} that the ring was sized for; raise it in the config"
        )
    positions = lengths[:, None] - num_tokens + jnp.arange(num_tokens, dtype=lengths.dtype)

    def sequence(caches: list[Cache], tokens: Array, positions: Array) -> Any:
        return run_rows(params, config, caches, tokens, positions, None, select)

    return jax.vmap(sequence, out_axes=(0, 0, 1))(caches, tokens, positions)


def prefill(
    params: Params,
    config: Config,
    tokens: Array,
    positions: Array,
    select: Selector | None,
    block: int | None = None,
) -> tuple[Array, list[Cache], Array]:
    """Runs whole sequences, packed one after the other into one buffer.

    Every token is a row; it selects from the window of the buffer that holds its own sequence up
    to itself. Nothing separates the sequences but the windows.

    Args:
        params: of the model.
        config: sizes.
        tokens: `[T]`.
        positions: `[T]`, place of each token in its sequence, counting up from 0 at the start of
            every sequence; negative for padding. With compression, sequences start at multiples
            of it and T is one.
        select: which candidates to read.
        block: rows that run through a layer at a time, a divisor of T.

    Returns:
        Logits `[T, vocab]`, packed caches (see `unpack_cache`), and indices `[layers, T, k]`.
    """
    num_tokens = tokens.shape[0]
    # The ring holds the whole buffer here, so that every row finds its sliding window.
    ring = num_tokens if config.compression > 1 else 0
    caches = [init_cache(config, num_tokens, ring) for _ in range(config.num_layers)]
    slots = jnp.arange(num_tokens, dtype=positions.dtype)
    return run_rows(params, config, caches, tokens, positions, slots, select, block)


def unpack_cache(config: Config, cache: Cache, starts: Array, lengths: Array, width: int) -> Cache:
    """Copies sequences of a packed buffer to caches of their own, ready for `decode_step`.

    Args:
        config: sizes.
        cache: packed, of one layer.
        starts: `[B]`, slot of each sequence's first token.
        lengths: `[B]`.
        width: positions of the new caches.

    Returns:
        A cache with a leading axis B. Candidates beyond a sequence's length hold garbage.
    """
    candidates = starts[:, None] // config.compression + jnp.arange(width // config.compression)
    # Position p of a sequence lives at p modulo the ring; the newest of each residue survives.
    last = lengths[:, None] - 1
    ring = jnp.arange(config.ring)
    recent = starts[:, None] + last - (last - ring) % max(config.ring, 1)

    def take(buffer: Array, slots: Array) -> Array:
        return buffer.at[slots].get(mode="clip")

    return Cache(
        latents=take(cache.latents, candidates),
        index_keys=take(cache.index_keys, candidates),
        index_scales=take(cache.index_scales, candidates),
        recent=take(cache.recent, recent),
    )
