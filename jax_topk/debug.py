"""Forcing each path of the kernels, and checking automatic sharding: for tests and the bench.

`plan` is a string of overrides of the CUDA kernel's launch plan, separated by commas, for example
`"path=exact,cluster=4"`. It is part of the compilation key. An override that is unknown or illegal
for the shape raises; the CPU target and the XLA expression have no plan and ignore it.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from jax_topk._axis_check import check_selection_axis
from jax_topk.api import top_k, top_k_indices

__all__ = ["check_selection_axis", "top_k_indices_with_plan", "top_k_with_plan"]


def top_k_with_plan(operand: ArrayLike, k: int, plan: str, **keywords: Any) -> list[jax.Array]:
    """`jax_topk.top_k` with overrides of the launch plan.

    Args:
        operand: `[..., n, ...]`.
        k: number of results.
        plan: overrides, such as `"path=exact,cluster=4"`; `""` forces nothing.
        **keywords: as for `top_k`.

    Returns:
        `[values, indices]`, the same bits for every legal plan.
    """
    return top_k(operand, k, _plan=plan, **keywords)


def top_k_indices_with_plan(operand: ArrayLike, k: int, plan: str, **keywords: Any) -> jax.Array:
    """`jax_topk.top_k_indices` with overrides of the launch plan.

    Args:
        operand: `[..., n, ...]`.
        k: number of results.
        plan: overrides, such as `"path=exact,cluster=4"`; `""` forces nothing.
        **keywords: as for `top_k_indices`.

    Returns:
        Ascending indices, the same for every legal plan.
    """
    return top_k_indices(operand, k, _plan=plan, **keywords)
