# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The formulas of DSA, transcribed to NumPy in float64, one token and one head at a time.

Nothing is shared with model.py, absorbed, batched or cached: keys and values are expanded per
head, as the formulas are usually written. Slow, and meant to be compared with by eye; the tests
compare model.py with it.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from examples.sparse_attention.config import Config
from examples.sparse_attention.pieces import QuantizedWeight

Array64 = NDArray[np.float64]
Weights = dict[str, Any]  # of one layer, float64


def to_float64(params: Any) -> Any:
    """Parameters of model.py, as float64 NumPy arrays in the same lists and dictionaries.

    A quantised weight is the number that it stands for, value times scale.
    """
    if isinstance(params, QuantizedWeight):
        numbers = to_float64(params.values) * to_float64(params.scales)[..., None]
        return np.moveaxis(numbers, -1, params.axis)
    if isinstance(params, dict):
        return {name: to_float64(value) for name, value in params.items()}
    if isinstance(params, list):
        return [to_float64(value) for value in params]
    return np.asarray(params).astype(np.float64)


def rms_norm(x: Array64, weight: Array64, eps: float) -> Array64:
    """`x / sqrt(mean(x^2) + eps) * weight` of one vector."""
    return x / math.sqrt(float(np.mean(x**2)) + eps) * weight


def layer_norm(x: Array64, weight: Array64, bias: Array64, eps: float = 1e-6) -> Array64:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` of one vector."""
    return (x - x.mean()) / math.sqrt(float(x.var()) + eps) * weight + bias


def frequency(config: Config, channel: int) -> float:
    """Rotary frequency of one pair of channels, with YaRN beyond the original context."""
    plain = config.rope_theta ** (-2 * channel / config.rope_dim)
    if config.yarn_factor == 1 or config.context <= config.yarn_context:
        return plain

    def channel_that_turns(times: float) -> float:
        turns = math.log(config.yarn_context / (2 * math.pi * times))
        return config.rope_dim * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(channel_that_turns(32)), 0)
    high = min(math.ceil(channel_that_turns(1)), config.rope_dim - 1)
    ramp = min(max((channel - low) / max(high - low, 0.001), 0.0), 1.0)
    return plain * (1 - ramp) + plain / config.yarn_factor * ramp


def rope(config: Config, x: Array64, position: int, *, interleaved: bool) -> Array64:
    """Rotates the pairs of channels of one vector, as complex numbers."""
    half = len(x) // 2
    rotated = np.empty_like(x)
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        turned = complex(x[first], x[second]) * np.exp(1j * position * frequency(config, i))
        rotated[first], rotated[second] = turned.real, turned.imag
    return rotated


def hadamard(x: Array64) -> Array64:
    """Walsh-Hadamard transform of one vector, entry (i, j) being (-1)^popcount(i & j) / sqrt(d)."""
    d = len(x)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return np.array(signs) @ x / math.sqrt(d)


def round_to_fp8(x: Array64) -> Array64:
    """Rounds one vector to fp8 and back, with one power-of-two scale."""
    scale = 2.0 ** math.ceil(math.log2(max(float(np.abs(x).max()), 1e-4) / 448))
    rounded: Array64 = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return rounded


def index_vector(config: Config, x: Array64, position: int) -> Array64:
    """Rotation of the first channels, Hadamard transform and rounding of a query or key."""
    r = config.rope_dim
    turned = rope(config, x[:r], position, interleaved=config.index_rope_interleaved)
    mixed = hadamard(np.concatenate([turned, x[r:]]))
    return round_to_fp8(mixed) if config.index_fp8 else mixed


def scores_of(
    weights: Weights, config: Config, x: Array64, t: int, entries: list[tuple[int, Array64]]
) -> Array64:
    """Index scores of one token against some entries.

    Args:
        weights: of the layer.
        config: sizes.
        x: `[dim]`, normalised input of the token.
        t: its position.
        entries: position and projection `x_s WkI` `[index_dim]` of each.
    """
    qr = rms_norm(x @ weights["wqa"], weights["q_norm"], config.norm_eps)
    w = weights["index_ww"] @ x * config.index_heads**-0.5 * config.index_dim**-0.5
    scores = np.zeros(len(entries))
    for i, (s, projection) in enumerate(entries):
        key = layer_norm(projection, weights["index_k_norm"], weights["index_k_bias"])
        key = index_vector(config, key, s)
        for h in range(config.index_heads):
            query = index_vector(config, qr @ weights["index_wq"][:, h], t)
            scores[i] += w[h] * max(float(query @ key), 0.0)
    return scores


def index_scores(weights: Weights, config: Config, x: Array64, t: int) -> Array64:
    """`I[t, s]` for every s <= t, of the normalised inputs `x` `[T, dim]`."""
    return scores_of(
        weights, config, x[t], t, [(s, x[s] @ weights["index_wk"]) for s in range(t + 1)]
    )


def attend_to(
    weights: Weights, config: Config, x: Array64, t: int, entries: list[tuple[int, Array64]]
) -> Array64:
    """Output of one token over some entries.

    Args:
        weights: of the layer.
        config: sizes.
        x: `[dim]`, normalised input of the token.
        t: its position.
        entries: position and projection `x_s Wkva` `[kv_lora_rank + rope_dim]` of each.
    """
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    if config.yarn_factor > 1 and config.context > config.yarn_context:
        scale *= (0.1 * math.log(config.yarn_factor) + 1) ** 2
    qr = rms_norm(x @ weights["wqa"], weights["q_norm"], config.norm_eps)
    split = config.kv_lora_rank
    contents = [rms_norm(kv[:split], weights["kv_norm"], config.norm_eps) for _, kv in entries]
    turned_keys = [rope(config, kv[split:], s, interleaved=True) for s, kv in entries]
    heads = []
    for h in range(config.num_heads):
        query = qr @ weights["wqb"][:, h]
        q_nope = query[: config.nope_dim]
        q_rope = rope(config, query[config.nope_dim :], t, interleaved=True)
        keys = [weights["wkb"][h] @ c for c in contents]
        values = [c @ weights["wvb"][h] for c in contents]
        logits = np.array(
            [q_nope @ key + q_rope @ kp for key, kp in zip(keys, turned_keys, strict=True)]
        )
        probabilities = np.exp(scale * (logits - logits.max()))
        heads.append(probabilities @ np.array(values) / probabilities.sum())
    output: Array64 = np.concatenate(heads) @ weights["wo"]
    return output


def attention(weights: Weights, config: Config, x: Array64, t: int, selected: Any) -> Array64:
    """Output of token t over the positions `selected`, of the normalised inputs `x` `[T, dim]`."""
    return attend_to(weights, config, x[t], t, [(int(s), x[s] @ weights["wkva"]) for s in selected])


def pooled(weights: Weights, x: Array64) -> Array64:
    """Projections (`Wkva`, then `WkI`) of one group of neighbours `x` `[c, dim]`, pooled by gates.

    Per channel, a softmax over the neighbours of `x Wg + bias` weighs their projections.
    """
    projections = np.concatenate([x @ weights["wkva"], x @ weights["index_wk"]], axis=1)
    gates = np.exp(x @ weights["gates"] + weights["gate_bias"])
    result: Array64 = (gates * projections).sum(axis=0) / gates.sum(axis=0)
    return result
