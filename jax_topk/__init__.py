"""Exact top-k with run-time row lengths for JAX, on CPU and GPU.

`top_k` and `top_k_indices` select along an axis that every device holds whole; `sharded_top_k` and
`merge_top_k` select along an axis that is sharded over devices. `install` makes `jax.lax.top_k`
itself use the kernels, in code that is not ours.
"""

from jax_topk._version import __version__
from jax_topk.api import top_k, top_k_indices
from jax_topk.install import install, installed, uninstall
from jax_topk.sharding import merge_top_k, sharded_top_k

__all__ = [
    "__version__",
    "install",
    "installed",
    "merge_top_k",
    "sharded_top_k",
    "top_k",
    "top_k_indices",
    "uninstall",
]
