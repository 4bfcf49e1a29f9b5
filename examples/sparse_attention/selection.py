# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Which candidates a row reads: the trained indexer's choice, and baselines to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

import jax_topk

Implementation = Literal["cuda", "cpu", "xla"] | None

# (scores [R, n], starts [R] or None for 0, lengths [R], k) -> indices [R, k], counted from the
# start, ascending, then -1.
Selector = Callable[[Array, Array | None, Array, int], Array]


def select_top_k(implementation: Implementation = None) -> Selector:
    """The selector of DSA: the exact k best index scores of each row's window.

    Args:
        implementation: passed to `jax_topk.top_k_indices`.
    """

    def select(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
        return jax_topk.top_k_indices(
            scores, k, lengths=lengths, row_starts=starts, implementation=implementation
        )

    return select


def select_recent(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
    """The last k candidates of each row's window, whatever their scores: the baseline to beat."""
    del scores, starts
    first = jnp.maximum(lengths - k, 0)[:, None]
    indices = first + jnp.arange(k, dtype=jnp.int32)
    return jnp.where(indices < lengths[:, None], indices, -1)


def noise_of(key: Array, shape: tuple[int, ...], ends: Array) -> Array:
    """Uniform noise `[R, n]`, a row's from the key and its window's end `ends` `[R]`."""
    row_keys = jax.vmap(lambda end: jax.random.fold_in(key, end))(ends)
    return jax.vmap(lambda row_key: jax.random.uniform(row_key, shape[1:]))(row_keys)


def select_random(key: Array) -> Selector:
    """Candidates of each row's window at random, without repetition: the k best of noise."""

    def select(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
        noise = noise_of(key, scores.shape, lengths if starts is None else starts + lengths)
        return jax_topk.top_k_indices(noise, k, lengths=lengths, row_starts=starts)

    return select


# The same three, best first: the first b of a row are what its selector finds for k = b, so that b
# can be a run-time value (see `best_of`).


def rank_top_k(implementation: Implementation = None) -> Selector:
    """`select_top_k`, but the highest score first."""

    def rank(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
        return jax_topk.top_k(
            scores, k, lengths=lengths, row_starts=starts, implementation=implementation
        )[1]

    return rank


def rank_recent(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
    """`select_recent`, but the last candidate first."""
    del scores, starts
    return jnp.maximum(lengths[:, None] - 1 - jnp.arange(k, dtype=jnp.int32), -1)


def rank_random(key: Array) -> Selector:
    """`select_random`, but the highest noise first."""

    def rank(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
        noise = noise_of(key, scores.shape, lengths if starts is None else starts + lengths)
        return rank_top_k()(noise, starts, lengths, k)

    return rank


def best_of(rank: Selector, budget: Array) -> Selector:
    """The best `budget` candidates (a run-time scalar, at most k) of a selector that ranks."""

    def select(scores: Array, starts: Array | None, lengths: Array, k: int) -> Array:
        is_within = jnp.arange(k, dtype=jnp.int32) < budget
        return jnp.where(is_within, rank(scores, starts, lengths, k), -1)

    return select


def dense_indices(lengths: Array, num_candidates: int) -> Array:
    """Every candidate of each row's window, `[R, num_candidates]`: no selection at all."""
    indices = jnp.arange(num_candidates, dtype=jnp.int32)
    return jnp.where(indices < lengths[:, None], indices, -1)
