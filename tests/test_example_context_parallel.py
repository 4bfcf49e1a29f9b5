# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The example with its cache sharded along the sequence, over 8 simulated devices."""

import dataclasses
import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import assert_same

from examples.sparse_attention import context_parallel, model, selection
from examples.sparse_attention.config import TINY, V4

WIDTH, BATCH = 64, 3
CONFIG = dataclasses.replace(TINY, top_k=12, index_block=WIDTH // 8)
TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
CONFIGS = {
    "two layers": TWO_LAYERS,
    # Wide enough that rounding shows if latents or scores were computed otherwise.
    "bfloat16, fp8 keys": dataclasses.replace(CONFIG, dtype=jnp.bfloat16, index_fp8=True),
}
SMALL = ["--layers", "1", "--prompt", "30", "--tokens", "18", "--stagger", "9", "--top-k", "12"]

combinations = pytest.mark.parametrize("combination", context_parallel.COMBINATIONS)


def random_model(config):
    """NumPy's generator: compiling JAX's for every shape would take longer than the tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_model(jax.random.key(0), config))

    def fill(leaf):
        if len(leaf.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, size=leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[0] ** 0.5, leaf.dtype)

    return jax.tree.map(fill, shapes)


@pytest.fixture
def mesh(cpu_devices):
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((8,), (context_parallel.AXIS,), axis_types=kind, devices=cpu_devices)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        yield


def test_the_command_finds_identical_tokens(capsys):
    assert context_parallel.main([*SMALL, "--devices", "8"]) == 0
    printed = capsys.readouterr().out
    num_tokens = (30 + 18 + 9) * 2
    found = re.findall(r"(\w+): (\d+)/(\d+) tokens, (\d+)/(\d+) selected sets identical", printed)
    assert [name for name, *_ in found] == ["partial", "gather"]
    assert all(int(count) == num_tokens for _, *counts in found for count in counts)
    assert re.search(r"gather: .* logits bit-identical", printed)
    assert printed.strip().splitlines()[-1] == "OK: the tokens are those of one device"


@pytest.mark.parametrize(
    ("combination", "config"),
    [("gather", config) for config in CONFIGS.values()] + [("partial", CONFIG)],
    ids=[*(f"gather, {name}" for name in CONFIGS), "partial"],
)
def test_steps_of_several_tokens_equal_those_of_one_device(mesh, combination, config):
    """Ragged lengths that end in different blocks; some rows do not exist yet."""
    rng = np.random.default_rng(0)
    params = random_model(config)
    select = selection.select_top_k("cpu")
    alone = jax.jit(lambda *arguments: model.decode_step(*arguments, select), static_argnums=1)
    spread = jax.jit(context_parallel.sharded_step(config, mesh, combination))
    caches = model.init_caches(config, WIDTH, BATCH)
    blocks = context_parallel.init_caches(config, WIDTH, BATCH, mesh)
    for lengths in ([3, 1, 0], [6, 4, 3], [8, 7, 5], [11, 9, 8]):
        lengths = np.array(lengths, np.int32)
        tokens = rng.integers(0, 256, (BATCH, 3), dtype=np.int32)
        wanted, caches, wanted_indices = alone(params, config, caches, tokens, lengths)
        logits, blocks, indices = spread(params, blocks, tokens, lengths)
        exists = lengths[:, None] - 3 + np.arange(3) >= 0
        assert_same(np.asarray(indices), np.asarray(wanted_indices))
        if combination == "gather":
            assert_same(np.asarray(logits)[exists], np.asarray(wanted)[exists])
        else:
            np.testing.assert_allclose(
                np.asarray(logits)[exists], np.asarray(wanted)[exists], atol=1e-4
            )
    for block, cache in zip(blocks, caches, strict=True):
        assert block.latents.sharding.spec[1] == context_parallel.AXIS
        if combination == "gather":
            # What was never written is NaN in both.
            assert_same(np.asarray(block.index_scales), np.asarray(cache.index_scales))
            assert_same(np.asarray(block.latents), np.asarray(cache.latents))


@combinations
def test_only_candidates_and_attention_travel(mesh, combination):
    """Per layer one exchange of the selection, and the reductions of attention: never the cache."""
    caches = context_parallel.init_caches(CONFIG, WIDTH, BATCH, mesh)
    params = jax.eval_shape(lambda: model.init_model(jax.random.key(0), CONFIG))
    step = context_parallel.sharded_step(CONFIG, mesh, combination)
    tokens, lengths = np.zeros((BATCH, 1), np.int32), np.ones(BATCH, np.int32)
    text = jax.jit(step).lower(params, caches, tokens, lengths).compile().as_text()
    found = hlo.collectives(text)
    num_reductions = 2 if combination == "partial" else 1  # maxima, and sums
    assert found.count("all-gather") == CONFIG.num_layers
    assert found.count("all-reduce") == num_reductions * CONFIG.num_layers
    assert len(found) == (1 + num_reductions) * CONFIG.num_layers
    # A block holds 8 positions, fewer than k: all of them are candidates.
    assert hlo.all_gather_bytes(text) == [8 * BATCH * 8 * 8] * CONFIG.num_layers


def test_no_array_without_elements_enters_the_shard_map(mesh):
    """XLA's compiler of jax 0.11.2 crashes on one, and not every version of JAX is tested."""
    caches = context_parallel.init_caches(CONFIG, WIDTH, BATCH, mesh)
    leaves = jax.tree.leaves(caches)
    assert len(leaves) == 3 * CONFIG.num_layers
    assert all(leaf.size > 0 for leaf in leaves)


def generation(tokens=((5, 6), (7, 8)), indices=0, logits=1.0):
    shape = np.shape(tokens)
    return context_parallel.Generation(
        np.array(tokens),
        np.full((shape[0], 2, shape[1], 1, 4), indices) + np.arange(4),
        np.full((*shape, 9), logits, np.float32),
        0.5,
    )


@pytest.mark.parametrize(
    ("run", "line", "is_same"),
    [
        (generation(), "4/4 tokens, 4/4 selected sets identical, logits bit-identical", True),
        (generation(logits=1.25), "4/4 selected sets identical, logits within 2.5e-01", True),
        (generation(indices=1), "4/4 tokens, 0/4 selected sets identical", True),
        (generation(tokens=((5, 6), (7, 9))), "3/4 tokens, 4/4 selected sets", False),
    ],
)
def test_what_differs_is_said(run, line, is_same):
    text, tokens_are_same = context_parallel.describe("gather", run, generation())
    assert line in text
    assert tokens_are_same == is_same


def test_tokens_that_differ_fail_the_command(monkeypatch, capsys):
    runs = iter([generation(), generation(tokens=((5, 6), (7, 9))), generation()])
    monkeypatch.setattr(context_parallel, "generate", lambda *arguments: next(runs))
    assert context_parallel.main([*SMALL, "--devices", "8"]) == 1
    printed = capsys.readouterr().out
    assert "partial: 3/4 tokens" in printed
    assert printed.strip().endswith("DISAGREEMENT: tokens differ from those of one device")


def test_bytes_that_a_device_sends():
    """The figures of the module's docstring, for DeepSeek-V3.2."""
    from examples.sparse_attention.config import V32

    assert context_parallel.sent_bytes(V32, "partial") == (16384, 128 * 514 * 4)
    assert context_parallel.sent_bytes(V32, "gather") == (16384, 2048 * 576 * 2)
    assert f"{128 * 514 * 4 / 1000:.0f} kB" in context_parallel.__doc__
    assert f"{2048 * 576 * 2 / 1e6:.1f} MB" in context_parallel.__doc__


def test_what_cannot_be_sharded_is_explained(mesh):
    with pytest.raises(ValueError, match="compression=4: groups of positions may straddle"):
        context_parallel.init_caches(V4, WIDTH, BATCH, mesh)
    with pytest.raises(ValueError, match="width=60 does not divide into 8 blocks"):
        context_parallel.init_caches(CONFIG, 60, BATCH, mesh)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "9999"], "set XLA_FLAGS=--xla_force_host_platform_device_count=9999"),
        (["--tokens", "0"], "--tokens 0 is too small; pass 1 or more"),
        (["--top-k", "0"], "--top-k 0 is too small"),
    ],
)
def test_bad_arguments_are_explained(arguments, sentence, capsys):
    assert context_parallel.main(arguments) == 2
    assert sentence in capsys.readouterr().err
