# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models: a tiny one, and one layer of each published model that selects this way."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one model; every layer is alike.

    Attributes:
        dim: width of the residual stream.
        ffn_dim: width of the SwiGLU feed-forward block.
        num_layers: number of layers.
        vocab_size: number of token values.
        num_heads: attention heads.
        q_lora_rank: width of the compressed query `qr`, shared by attention and indexer.
        kv_lora_rank: width of the cached latent `c`.
        nope_dim: query/key channels per head without position.
        rope_dim: query/key channels per head with position, and rotated channels of the indexer.
        value_dim: value channels per head.
        index_heads: heads of the indexer.
        index_dim: channels of an index head; a power of two, for the Hadamard transform.
        top_k: candidates selected per row.
        context: longest sequence the model is meant for; fixes YaRN's scaling.
        rope_theta: base of the rotary frequencies.
        yarn_factor: context extension factor of YaRN; 1 switches it off.
        yarn_context: context before the extension.
        index_rope_interleaved: whether the indexer rotates neighbouring channels (GLM-5) or the
            first half against the second (DeepSeek). Attention always rotates neighbours.
        index_fp8: whether index queries and keys are rounded to float8_e4m3fn.
        weight_fp8: whether matrices are stored as float8_e4m3fn with scales (see
            `model.quantize_weights`), half the bytes of bfloat16. Norms, biases, embeddings, the
            indexer's head weights and the compressor's gates are not.
        compression: neighbouring positions pooled into one candidate; 1 for none.
        window: last positions that are attended to besides the selection; with compression at
            least `compression - 1`, since an incomplete group is no candidate yet.
        index_block: candidates scored at a time; bounds the memory for products per index head.
        index_sequences: sequences of a batch scored at a time, which bounds it too; 0 for all.
        max_tokens_per_step: most rows one decode step may append (matters with compression, where
            the last `window + max_tokens_per_step` positions are kept in a ring).
        norm_eps: epsilon of the RMS norms.
        dtype: of weights (but see `weight_fp8`), activations and the cache. Scores and softmax are
            float32.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    vocab_size: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    index_heads: int
    index_dim: int
    top_k: int
    context: int
    rope_theta: float = 10000.0
    yarn_factor: float = 1.0
    yarn_context: int = 4096
    index_rope_interleaved: bool = False
    index_fp8: bool = False
    weight_fp8: bool = False
    compression: int = 1
    window: int = 0
    index_block: int = 2048
    index_sequences: int = 0
    max_tokens_per_step: int = 8
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.index_dim & (self.index_dim - 1) or self.rope_dim > self.index_dim:
            raise ValueError(
                f"index_dim={self.index_dim} must be a power of two (Hadamard transform) of at "
                f"least rope_dim={self.rope_dim}; change index_dim or rope_dim"
            )
        if self.window < self.compression - 1:
            raise ValueError(
                f"window={self.window} hides the newest positions from every row; pass at least "
                f"compression - 1 = {self.compression - 1}"
            )

    @property
    def latent_dim(self) -> int:
        """Channels cached per candidate for attention: the latent and the rotated key."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def ring(self) -> int:
        """Positions kept uncompressed per sequence while decoding; 0 without compression."""
        return self.window + self.max_tokens_per_step if self.compression > 1 else 0

    @property
    def is_extended(self) -> bool:
        """Whether YaRN is in force: only beyond the context the model was first trained on."""
        return self.yarn_factor > 1 and self.context > self.yarn_context

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention logits; YaRN sharpens it by mscale squared."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        mscale = 0.1 * math.log(self.yarn_factor) + 1.0 if self.is_extended else 1.0
        return scale * mscale**2


# Small enough to decode thousands of tokens per second on two CPU cores.
TINY = Config(
    dim=64,
    ffn_dim=128,
    num_layers=1,
    vocab_size=256,
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    nope_dim=16,
    rope_dim=8,
    value_dim=16,
    index_heads=4,
    index_dim=16,
    top_k=64,
    context=4096,
)

# DeepSeek-V3.2, one of its first three layers (those with a dense feed-forward block). The
# checkpoint is published in fp8.
V32 = Config(
    dim=7168,
    ffn_dim=18432,
    num_layers=1,
    vocab_size=129280,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    index_heads=64,
    index_dim=128,
    top_k=2048,
    context=163840,
    yarn_factor=40.0,
    index_fp8=True,
    weight_fp8=True,
    dtype=jnp.bfloat16,
)

# GLM-5, a layer with a dense feed-forward block, in bfloat16.
GLM5 = Config(
    dim=6144,
    ffn_dim=12288,
    num_layers=1,
    vocab_size=154880,
    num_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    nope_dim=192,
    rope_dim=64,
    value_dim=256,
    index_heads=32,
    index_dim=128,
    top_k=2048,
    context=202752,
    rope_theta=1e6,
    index_rope_interleaved=True,
    norm_eps=1e-5,
    dtype=jnp.bfloat16,
)

# The selection of DeepSeek-V4-Pro (1024 of the 4:1 compressed candidates, and a sliding window) in
# a layer of V3.2; V4-Flash selects 512.
V4 = dataclasses.replace(V32, top_k=1024, compression=4, window=128)
V4_FLASH = dataclasses.replace(V4, top_k=512)

CONFIGS = {"tiny": TINY, "v32": V32, "glm5": GLM5, "v4": V4, "v4-flash": V4_FLASH}
