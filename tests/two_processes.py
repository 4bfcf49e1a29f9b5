"""One of two processes of `test_merge.test_two_processes`: `python two_processes.py RANK PORT`."""

from __future__ import annotations

import os
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import hlo  # noqa: E402
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

    def mesh_of(kind: jax.sharding.AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2)

    def place(array: np.ndarray, mesh: jax.sharding.Mesh, spec: jax.P) -> jax.Array:
        return jax.make_array_from_callback(
            array.shape, jax.NamedSharding(mesh, spec), lambda index: array[index]
        )

    # Rows over both processes: no communication, with automatic and explicit axes and in shard_map,
    # whether lengths and starts are sharded or replicated, forward and backward.
    spec = jax.P(("a", "b"))

    def select(x: jax.Array, n: jax.Array, s: jax.Array) -> list[jax.Array]:
        return jax_topk.top_k(x, 11, lengths=n, row_starts=s)

    def gradient(x: jax.Array, n: jax.Array, s: jax.Array) -> jax.Array:
        return jax.grad(lambda x: select(x, n, s)[0].sum(where=select(x, n, s)[1] >= 0))(x)

    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(select, in_specs=(spec, spec, spec), out_specs=spec)
            for name, function in (("jit", select), ("shard_map", mapped), ("grad", gradient)):
                for counts in (spec, jax.P()) if name == "jit" else (spec,):
                    arguments = [
                        place(x, mesh, spec),
                        *(place(array, mesh, counts) for array in (lengths, starts)),
                    ]
                    compiled = jax.jit(function).lower(*arguments).compile()
                    found = hlo.collectives(compiled.as_text())
                    assert not found, f"{name} with {kind} axes, counts {counts}: {found}"
                    results = compiled(*arguments)
                    if name != "grad":
                        for result, wanted in zip(results, expected, strict=True):
                            assert_local(result, wanted)

    # Each row over both processes: exchange and selection.
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    for axis_name in (("a", "b"), ("b", "a")):
        merged = jax.jit(
            jax.shard_map(
                lambda x, n, s, axes=axis_name: jax_topk.sharded_top_k(
                    x, 11, axis_name=axes, lengths=n, row_starts=s
                ),
                mesh=mesh,
                in_specs=(jax.P(None, axis_name), jax.P(), jax.P()),
                out_specs=jax.P(),
            )
        )
        results = merged(
            place(x, mesh, jax.P(None, axis_name)),
            *(place(array, mesh, jax.P()) for array in (lengths, starts)),
        )
        for result, wanted in zip(results, expected, strict=True):
            assert_local(result, wanted)
    print("all equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
