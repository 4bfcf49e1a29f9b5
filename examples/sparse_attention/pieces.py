# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Building blocks without weights of their own: norms, rotation, Hadamard transform, fp8."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from examples.sparse_attention.config import Config


def normal_arrays(key: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays of independent normal numbers, float32.

    One draw serves all of them: compiling the generator once per shape would take longer than
    most of what the examples do.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    draw = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    named = zip(shapes.items(), draw, strict=True)
    return {name: numbers.reshape(shape) for (name, shape), numbers in named}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis of `x` `[..., d]`, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Layer norm over the last axis of `x` `[..., d]`, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: Config) -> Array:
    """Rotary frequencies `[rope_dim / 2]`, slowed down by YaRN beyond the original context.

    YaRN leaves channels that turn often within the original context alone (more than 32 turns),
    divides the frequency of those that hardly turn (less than one) by the extension factor, and
    blends linearly in between.
    """
    half = config.rope_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not config.is_extended:
        return frequencies

    def channel_of(turns: float) -> float:
        wavelength = config.yarn_context / (2 * math.pi * turns)
        return config.rope_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(channel_of(32)), 0)
    high = min(math.ceil(channel_of(1)), config.rope_dim - 1)
    ramp = (jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 0.001)
    slowed = jnp.clip(ramp, 0, 1)
    return frequencies * (1 - slowed) + frequencies / config.yarn_factor * slowed


def rope(x: Array, positions: Array, frequencies: Array, *, interleaved: bool) -> Array:
    """Rotates pairs of channels of `x` `[R, ..., d]` by `positions` `[R]` times frequency `[d/2]`.

    Interleaved pairs are neighbours (0, 1), (2, 3), ...; otherwise channel i of the first half is
    paired with channel i of the second. Mixing up the two is the mistake that DeepSeek's own
    indexer shipped with at first.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    # Queries and keys of a row turn by the same angles. The barrier keeps XLA from computing the
    # cosines again in every kernel that rotates, which is slow; equal ones before it become one.
    cos, sin = lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
    cos, sin = (part.reshape(x.shape[0], *[1] * (x.ndim - 2), -1) for part in (cos, sin))
    x32 = x.astype(jnp.float32)
    if interleaved:
        a, b = x32[..., 0::2], x32[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x.dtype)


def hadamard(x: Array) -> Array:
    """Orthonormal Hadamard transform over the last axis of `x` `[..., d]`, d a power of two."""
    width = x.shape[-1]
    matrix = np.ones((1, 1))
    while matrix.shape[0] < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    transformed = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return (transformed * width**-0.5).astype(x.dtype)


def quantize_fp8(x: Array) -> tuple[Array, Array]:
    """Rounds vectors `[..., d]` to float8_e4m3fn with one power-of-two scale each.

    Returns:
        Values `[..., d]` in float8_e4m3fn and scales `[...]` in float32, `x ~ values * scale`. The
        scale is the largest magnitude over 448, the largest fp8 value, rounded up to a power of
        two so that multiplying by it is exact.
    """
    x32 = x.astype(jnp.float32)
    limit = float(jnp.finfo(jnp.float8_e4m3fn).max)
    mantissa, exponent = jnp.frexp(jnp.maximum(jnp.max(jnp.abs(x32), axis=-1), 1e-4) / limit)
    # frexp: value = mantissa * 2^exponent with mantissa in [0.5, 1); 0.5 is a power of two already.
    scale = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    return (x32 / scale[..., None]).astype(jnp.float8_e4m3fn), scale


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["axis"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight in fp8: `values * scales[..., None]`, with its contracted axis moved to the end.

    That order lets a GPU read what one output sums over in one piece, which matters where the
    product takes as long as the weight takes to be read: in decoding.

    Attributes:
        values: `[..., contracted]`, float8_e4m3fn.
        scales: `[...]`, float32 powers of two. One per output channel, as they can be applied
            after the product, and exactly. (DeepSeek's checkpoints have one per block of
            128 x 128, which takes a product that adds up block by block in a kernel of its own;
            the bytes read are the same to 0.1 %.)
        axis: where the contracted axis was, and is in the specification of a product.
    """

    values: Array
    scales: Array
    axis: int


def quantize_weight(weight: Array, axis: int) -> QuantizedWeight:
    """Rounds a weight `[...]` to fp8, with one scale per output channel.

    Args:
        weight: to be rounded.
        axis: that its product contracts.
    """
    return QuantizedWeight(*quantize_fp8(jnp.moveaxis(weight, axis, -1)), axis)


def project(spec: str, x: Array, weight: Array | QuantizedWeight) -> Array:
    """`jnp.einsum(spec, x, weight)` of rows `x` `[R, ...]`, in the dtype of `x`.

    A quantised weight is converted inside the product, where XLA fuses it on a GPU: what is read
    is fp8. The result has the weight's output channels, all of them, behind the rows.
    """
    if not isinstance(weight, QuantizedWeight):
        return jnp.einsum(spec, x, weight)
    rows, labels, result = spec.replace("->", ",").split(",")
    contracted = labels[weight.axis]
    stored = labels.replace(contracted, "") + contracted
    product = fp8_product(f"{rows},{stored}->{result}")(x, weight.values)
    return (product * weight.scales).astype(x.dtype)


# Longest contracted axis over which one row is multiplied and summed. An H100 reads the rows of a
# weight at 3.0 TB/s that way if they are 7168 long, at 2.7 TB/s in a matrix product; if they are
# 18432 long, at 2.0 against 2.5 TB/s.
MAX_SUMMED_LENGTH = 8192


@functools.cache
def fp8_product(spec: str) -> Callable[[Array, Array], Array]:
    """`einsum(spec, rows, values)` in float32, `values` in fp8 with the contracted axis last.

    A single row may be multiplied and summed, see `MAX_SUMMED_LENGTH`. Under `jax.vmap` the rows
    of all sequences are rows of one product, so a batch is never taken for one row.
    """
    rows, weight = spec.split("->")[0].split(",")

    def by_product(x: Array, values: Array) -> Array:
        return jnp.einsum(spec, x, values.astype(x.dtype), preferred_element_type=jnp.float32)

    def by_sum(x: Array, values: Array) -> Array:
        # What a row and a weight share comes in the same order in both.
        sizes = zip(weight, values.shape, strict=True)
        row = x.astype(jnp.float32).reshape([n if label in rows else 1 for label, n in sizes])
        return jnp.sum(values.astype(jnp.float32) * row, axis=-1)[None]

    @custom_vmap
    def product(x: Array, values: Array) -> Array:
        if x.shape[0] > 1 or values.shape[-1] > MAX_SUMMED_LENGTH:
            return by_product(x, values)
        # On a CPU one row is multiplied as several are: decoding rounds as prefill does.
        result: Array = lax.platform_dependent(x, values, cpu=by_product, default=by_sum)
        return result

    @product.def_vmap
    def product_of_all(
        batch: int, is_batched: list[bool], x: Array, values: Array
    ) -> tuple[Array, bool]:
        if is_batched[1]:
            raise NotImplementedError("weights have a batch axis; vmap over rows only")
        result = product(x.reshape(-1, *x.shape[2:]), values)
        return result.reshape(batch, -1, *result.shape[1:]), True

    return product


def map_blocks(function: Callable[[Any], Any], rows: Any, block: int | None) -> Any:
    """Applies `function` to blocks of rows one after the other, or to all at once without `block`.

    Args:
        function: from rows `[block, ...]` (any pytree) to rows `[block, ...]`.
        rows: pytree of arrays `[R, ...]`.
        block: a divisor of R, or None.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if block is None or block >= num_rows:
        return function(rows)
    if num_rows % block:
        raise ValueError(
            f"block={block} does not divide the {num_rows} rows; pad the rows or pass a divisor"
        )
    blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, block, *leaf.shape[1:]), rows)
    results = lax.map(function, blocks)
    return jax.tree.map(lambda leaf: leaf.reshape(num_rows, *leaf.shape[2:]), results)
