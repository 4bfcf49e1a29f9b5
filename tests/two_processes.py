"""One of two processes of `test_merge.test_two_processes`: `python two_processes.py RANK PORT`."""

from __future__ import annotations

import os
import pathlib
import re
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import inputs  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from runners import assert_same  # noqa: E402

import jax_topk  # noqa: E402
from jax_topk.bench import oracle  # noqa: E402


def assert_local(array: jax.Array, whole: np.ndarray) -> None:
    """Compares the parts that this process holds."""
    for shard in array.addressable_shards:
        assert_same(np.asarray(shard.data), np.ascontiguousarray(whole[shard.index]))


def main(rank: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    assert jax.device_count() == 4
    x = inputs.rows_of(64, np.float32)[:16]
    starts, lengths = inputs.windows_of(16, 64)
    expected = oracle.top_k(x, 11, starts, lengths)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(array: np.ndarray, spec: jax.P) -> jax.Array:
        return jax.make_array_from_callback(
            array.shape, jax.NamedSharding(mesh, spec), lambda index: array[index]
        )

    # Rows over both processes: no communication.
    rows = jax.P(("a", "b"))
    arguments = [place(array, rows) for array in (x, lengths, starts)]
    select = jax.jit(lambda x, n, s: jax_topk.top_k(x, 11, lengths=n, row_starts=s))
    compiled = select.lower(*arguments).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|permute", compiled.as_text())
    for result, wanted in zip(compiled(*arguments), expected, strict=True):
        assert_local(result, wanted)

    # Each row over both processes: exchange and selection.
    for axis_name in (("a", "b"), ("b", "a")):
        select = jax.jit(
            jax.shard_map(
                lambda x, n, s, axes=axis_name: jax_topk.sharded_top_k(
                    x, 11, axis_name=axes, lengths=n, row_starts=s
                ),
                mesh=mesh,
                in_specs=(jax.P(None, axis_name), jax.P(), jax.P()),
                out_specs=jax.P(),
            )
        )
        results = select(
            place(x, jax.P(None, axis_name)), place(lengths, jax.P()), place(starts, jax.P())
        )
        for result, wanted in zip(results, expected, strict=True):
            assert_local(result, wanted)
    print("all equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
