# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek sparse attention in JAX, with `jax_topk` as its selection. See docs/sparse_attention.md."""
