# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek sparse attention in JAX, selecting with `jax_topk`: see docs/sparse_attention.md."""
