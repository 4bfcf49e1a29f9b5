# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""One DSA block on whole sequences, differentiable: what recall.py and text.py train.

The block of model.py gathers what a row selected, which is right for inference. Here every row
attends to the whole sequence under a mask of what it selected, which gives the same result, and
whose gradient needs no scatter.

The indexer gets no gradient from the task: selection has none. It learns to imitate the attention
that it selects for, by the Kullback-Leibler divergence from the attention weights, summed over
heads and normalised, to the softmax of its scores. Both are detached from the rest of the model.
Source: DeepSeek-V3.2 technical report, section 2.1.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from examples.sparse_attention import model
from examples.sparse_attention.config import Config
from examples.sparse_attention.selection import Selector

# What a row may read: (index scores [n, n], attention weights [n, n], starts [n], lengths [n], k)
# -> mask [n, n].
Mask = Callable[[Array, Array, Array, Array, int], Array]


class BlockResult(NamedTuple):
    """Result of `attention_block`.

    Attributes:
        output: `[n, dim]`.
        divergence: `[n]`, how badly the indexer imitates the attention weights over what it read.
        is_read: `[n, n]`, what each row attended to.
    """

    output: Array
    divergence: Array
    is_read: Array


def read_all(scores: Array, weights: Array, starts: Array, lengths: Array, k: int) -> Array:
    """Dense attention: everything that the row sees."""
    del weights, k
    column = jnp.arange(scores.shape[1])
    return (column >= starts[:, None]) & (column < (starts + lengths)[:, None])


def read_selected(select: Selector) -> Mask:
    """What a selector picks by the indexer's scores."""

    def mask(scores: Array, weights: Array, starts: Array, lengths: Array, k: int) -> Array:
        del weights
        return indices_to_mask(select(scores, starts, lengths, k), starts, scores.shape[1])

    return mask


def read_oracle(select: Selector) -> Mask:
    """What a selector picks by the dense attention weights: the set the indexer tries to find."""

    def mask(scores: Array, weights: Array, starts: Array, lengths: Array, k: int) -> Array:
        del scores
        return indices_to_mask(select(weights, starts, lengths, k), starts, weights.shape[1])

    return mask


def indices_to_mask(indices: Array, starts: Array, width: int) -> Array:
    """Indices `[R, k]`, counted from `starts` `[R]`, -1 for none, to a mask `[R, width]`."""
    rows = jnp.arange(indices.shape[0])[:, None]
    columns = jnp.where(indices < 0, width, indices + starts[:, None])
    return jnp.zeros((indices.shape[0], width), bool).at[rows, columns].set(True, mode="drop")


def attention_block(
    params: model.Params,
    config: Config,
    x: Array,
    memory: Array,
    positions: Array,
    read: Mask,
) -> BlockResult:
    """The attention of one DSA layer on whole sequences, packed into one buffer as in prefill.

    Args:
        params: of the layer.
        config: sizes; without compression.
        x: `[n, dim]`, normalised inputs that attend.
        memory: `[n, dim]`, normalised inputs that are attended to: `x` itself in a language model.
        positions: `[n]`, place of each row in its sequence, counting up from 0.
        read: what each row may read.
    """
    starts, lengths = jnp.arange(x.shape[0]) - positions, positions + 1
    qr = model.compressed_queries(params, config, x)

    index_q, index_w = model.index_queries(
        params, config, lax.stop_gradient(x), lax.stop_gradient(qr), positions
    )
    index_keys, index_scales = model.finish_index_key(
        params, config, lax.stop_gradient(memory) @ params["index_wk"], positions
    )
    scores = model.index_scores(index_q, index_w, index_keys, index_scales, config.index_block)

    queries = model.attention_queries(params, config, qr, positions)
    latents = model.finish_latent(params, config, memory @ params["wkva"], positions)
    logits = jnp.einsum("rhc,nc->rhn", queries, latents) * config.softmax_scale

    is_visible = read_all(scores, scores, starts, lengths, config.top_k)
    dense_weights = jnp.mean(masked_softmax(logits, is_visible[:, None]), axis=1)
    is_read = read(
        lax.stop_gradient(scores), lax.stop_gradient(dense_weights), starts, lengths, config.top_k
    )
    weights = masked_softmax(logits, is_read[:, None])
    mixed = jnp.einsum("rhn,nc->rhc", weights, latents[:, : config.kv_lora_rank])
    output = model.attention_output(params, mixed)
    divergence = indexer_divergence(scores, lax.stop_gradient(weights.mean(axis=1)), is_read)
    return BlockResult(output, divergence, is_read)


def masked_softmax(logits: Array, mask: Array) -> Array:
    """Softmax over the last axis among the entries of the mask; exactly 0 elsewhere."""
    return jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1) * mask


def indexer_divergence(scores: Array, target: Array, mask: Array) -> Array:
    """Divergence `[R]` from `target` `[R, n]` to the softmax of `scores` `[R, n]` in the mask."""
    log_p = jnp.log(jnp.maximum(target, 1e-20))
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.sum(jnp.where(mask, target * (log_p - log_q), 0), axis=-1)
