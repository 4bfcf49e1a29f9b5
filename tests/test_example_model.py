# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example: its model against the formulas in NumPy, and against itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from runners import device_of

from examples.sparse_attention import model, pieces, reference, selection
from examples.sparse_attention.config import CONFIGS, Config


@pytest.fixture(autouse=True)
def _full_precision():
    """A GPU multiplies float32 in a shorter format unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


# No two sizes are equal, so that a transposed axis cannot go unnoticed.
PLAIN = Config(
    dim=24,
    ffn_dim=20,
    num_layers=1,
    vocab_size=17,
    num_heads=3,
    q_lora_rank=14,
    kv_lora_rank=10,
    nope_dim=6,
    rope_dim=4,
    value_dim=5,
    index_heads=7,
    index_dim=8,
    top_k=9,
    context=64,
    index_block=16,
)
# YaRN in force: with 16 original positions only the slowest channel is slowed down.
EXTENDED = dataclasses.replace(PLAIN, yarn_factor=40.0, yarn_context=16, rope_dim=8, index_dim=16)
INTERLEAVED = dataclasses.replace(PLAIN, index_rope_interleaved=True)
FP8 = dataclasses.replace(PLAIN, index_fp8=True)
FP8_WEIGHTS = dataclasses.replace(PLAIN, weight_fp8=True)
COMPRESSED = dataclasses.replace(PLAIN, compression=4, window=6, top_k=3)
TWO_LAYERS = dataclasses.replace(PLAIN, num_layers=2)
FORMULAS = {
    "plain": PLAIN,
    "yarn": EXTENDED,
    "interleaved": INTERLEAVED,
    "fp8": FP8,
    "fp8 weights": FP8_WEIGHTS,
}
ALL = {"two layers": TWO_LAYERS, "fp8": FP8, "compressed": COMPRESSED}

formula_configs = pytest.mark.parametrize("config", FORMULAS.values(), ids=FORMULAS.keys())
deep_configs = pytest.mark.parametrize(
    "config", [TWO_LAYERS, COMPRESSED], ids=["two layers", "compressed"]
)
all_configs = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
xla = selection.select_top_k("xla")
prefill = jax.jit(model.prefill, static_argnames=("config", "select", "block"))
# Programs with different selectors are compared, on a GPU too, where XLA would time algorithms for
# each program's matrix products and not always choose the same.
decode_step = jax.jit(
    model.decode_step,
    static_argnames=("config", "select"),
    compiler_options={"xla_gpu_autotune_level": 0},
)


def random_weights(init, config, seed=0):
    """Weights of the shapes that `init` makes; norms and biases are random too.

    NumPy's generator, because compiling JAX's for every shape takes longer than the tests.
    """
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if len(leaf.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, size=leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[0] ** 0.5, leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(lambda: init(jax.random.key(0), config)))


def layer_and_input(config, length=29):
    """Random weights of a layer, and input `[length, dim]`."""
    x = np.random.default_rng(1).normal(size=(length, config.dim))
    layer = random_weights(model.init_layer, dataclasses.replace(config, weight_fp8=False))
    layer = model.quantize_weights(layer) if config.weight_fp8 else layer
    return layer, jnp.asarray(x, jnp.float32)


def random_model(config):
    return random_weights(model.init_model, config)


def random_tokens(config, *shape):
    return np.random.default_rng(2).integers(0, config.vocab_size, shape, dtype=np.int32)


@functools.partial(jax.jit, static_argnames=("config", "is_dense"))
def run_layer(layer, config, x, is_dense=False):
    """Output `[T, dim]`, indices `[T, k]` and scores `[T, n]` of a DSA block on `x` `[T, dim]`."""
    scores_seen = []

    def select(scores, starts, lengths, k):
        scores_seen.append(scores)
        return xla(scores, starts, lengths, k)

    positions = jnp.arange(x.shape[0])
    ring = x.shape[0] if config.compression > 1 else 0
    cache = model.init_cache(config, x.shape[0], ring)
    cache = model.write_cache(layer, config, cache, x, positions, positions)
    output, indices = model.sparse_attention(
        layer, config, cache, x, positions, positions, None if is_dense else select
    )
    return output, indices, scores_seen


def prefill_alone(params, config, tokens):
    """Logits and indices of one sequence, in a buffer of 48 so that one compilation serves all."""
    length = tokens.shape[0]
    positions = np.where(np.arange(48) < length, np.arange(48), -1)
    padded = np.pad(tokens, (0, 48 - length))
    logits, _, indices = prefill(params, config, padded, positions, xla)
    return logits[:length], indices[:, :length]


def decode(params, config, tokens, lengths, tokens_per_step, select, caches=None, width=None):
    """Decodes `tokens` `[steps * m]` of one sequence; logits, indices per token, and caches."""
    width = tokens.shape[0] if width is None else width
    caches = model.init_caches(config, width, batch=1) if caches is None else caches
    logits, indices = [], []
    for i in range(0, tokens.shape[0], tokens_per_step):
        new = jnp.asarray(tokens[None, i : i + tokens_per_step])
        length = jnp.array([lengths + i + tokens_per_step])
        step_logits, caches, step_indices = decode_step(params, config, caches, new, length, select)
        logits.append(step_logits[0])
        indices.append(step_indices[:, 0])
    return jnp.concatenate(logits), jnp.concatenate(indices, axis=1), caches


class TestFormulas:
    @formula_configs
    def test_index_scores(self, config):
        layer, x = layer_and_input(config)
        _, _, (actual,) = run_layer(layer, config, x)
        weights, x64 = reference.to_float64(layer), np.asarray(x, np.float64)
        # A value within rounding error of the middle of two fp8 numbers may go to either.
        tolerance = 0.05 if config.index_fp8 else 1e-5
        for t in range(x.shape[0]):
            expected = reference.index_scores(weights, config, x64, t)
            np.testing.assert_allclose(actual[t, : t + 1], expected, rtol=0, atol=tolerance)

    def test_scores_are_signed_and_tied_at_zero(self):
        """So padding has to lose against negative scores, and ties have to be resolved."""
        one_head = dataclasses.replace(PLAIN, index_heads=1)
        layer, x = layer_and_input(one_head)
        _, _, (scores,) = run_layer(layer, one_head, x)
        assert (scores < 0).any()
        assert (scores > 0).any()
        assert (scores == 0).mean() > 0.2

    @formula_configs
    def test_selection_is_the_top_of_the_scores(self, config):
        layer, x = layer_and_input(config)
        _, indices, (scores,) = run_layer(layer, config, x)
        scores = np.asarray(scores)
        for t, row in enumerate(np.asarray(indices)):
            best = np.argsort(-scores[t, : t + 1], kind="stable")[: config.top_k]
            padding = [-1] * (config.top_k - best.size)
            assert row.tolist() == sorted(best.tolist()) + padding

    @formula_configs
    def test_attention(self, config):
        layer, x = layer_and_input(config)
        output, indices, _ = run_layer(layer, config, x)
        weights, x64 = reference.to_float64(layer), np.asarray(x, np.float64)
        for t, row in enumerate(np.asarray(indices)):
            expected = reference.attention(weights, config, x64, t, row[row >= 0])
            np.testing.assert_allclose(output[t], expected, rtol=1e-4, atol=1e-5)

    def test_dense_attention(self):
        layer, x = layer_and_input(PLAIN)
        output, _, _ = run_layer(layer, PLAIN, x, is_dense=True)
        weights, x64 = reference.to_float64(layer), np.asarray(x, np.float64)
        for t in range(x.shape[0]):
            expected = reference.attention(weights, PLAIN, x64, t, range(t + 1))
            np.testing.assert_allclose(output[t], expected, rtol=1e-4, atol=1e-5)

    def test_compressed_candidates(self):
        c, config = COMPRESSED.compression, COMPRESSED
        layer, x = layer_and_input(config, length=24)
        output, indices, (scores,) = run_layer(layer, config, x)
        weights, x64 = reference.to_float64(layer), np.asarray(x, np.float64)
        pooled = [reference.pooled(weights, x64[g * c : g * c + c]) for g in range(24 // c)]
        latents, keys = zip(*(np.split(p, [config.latent_dim]) for p in pooled), strict=True)
        for t in range(24):
            # Groups are visible once complete, and stand at their first position.
            groups = range((t + 1) // c)
            expected = reference.scores_of(
                weights, config, x64[t], t, [(g * c, keys[g]) for g in groups]
            )
            np.testing.assert_allclose(scores[t, : len(groups)], expected, rtol=0, atol=1e-5)
            chosen = [int(g) for g in indices[t] if g >= 0]
            assert len(chosen) == min(len(groups), config.top_k)
            window = range(max(t - config.window + 1, 0), t + 1)
            entries = [(g * c, latents[g]) for g in chosen]
            entries += [(s, x64[s] @ weights["wkva"]) for s in window]
            expected = reference.attend_to(weights, config, x64[t], t, entries)
            np.testing.assert_allclose(output[t], expected, rtol=1e-4, atol=1e-5)


class TestPieces:
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rope_depends_on_distance_only(self, interleaved):
        q, k = jax.random.normal(jax.random.key(0), (2, 1, PLAIN.rope_dim))
        frequencies = pieces.rope_frequencies(PLAIN)

        def product(q_position, k_position):
            positions = jnp.array([q_position]), jnp.array([k_position])
            turned = [
                pieces.rope(v, p, frequencies, interleaved=interleaved)
                for v, p in zip((q, k), positions, strict=True)
            ]
            return float(jnp.sum(turned[0] * turned[1]))

        assert product(7, 3) == pytest.approx(product(59, 55), rel=1e-4)
        assert product(7, 3) != pytest.approx(product(7, 5), rel=1e-2)

    def test_rope_pairs(self):
        x = jnp.array([[1.0, 0.0, 0.0, 0.0]])
        quarter = jnp.array([np.pi / 2, 0.0])
        turned = pieces.rope(x, jnp.array([1]), quarter, interleaved=True)
        np.testing.assert_allclose(turned[0], [0, 1, 0, 0], atol=1e-6)
        turned = pieces.rope(x, jnp.array([1]), quarter, interleaved=False)
        np.testing.assert_allclose(turned[0], [0, 0, 1, 0], atol=1e-6)

    def test_yarn_slows_only_beyond_the_original_context(self):
        config = CONFIGS["v32"]
        short = dataclasses.replace(config, context=4096)
        full, plain = pieces.rope_frequencies(config), pieces.rope_frequencies(short)
        assert full[0] == plain[0]
        assert full[-1] == pytest.approx(float(plain[-1]) / 40)
        assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
        assert short.softmax_scale == pytest.approx(192**-0.5)

    def test_hadamard_keeps_products(self):
        q, k = jax.random.normal(jax.random.key(0), (2, 128))
        mixed = pieces.hadamard(q) @ pieces.hadamard(k)
        assert float(mixed) == pytest.approx(float(q @ k), rel=1e-4)
        spike = pieces.hadamard(jnp.zeros(128).at[5].set(1))
        np.testing.assert_allclose(jnp.abs(spike), 128**-0.5, rtol=1e-6)

    def test_fp8_weights(self):
        """Half the bytes of bfloat16, one scale per output channel, applied after the product."""
        rng = np.random.default_rng(0)
        weight = jnp.asarray(rng.normal(size=(3, 20, 5)) * rng.uniform(0.01, 9, (3, 1, 5)))
        quantized = pieces.quantize_weight(weight, axis=1)
        assert quantized.values.dtype == jnp.float8_e4m3fn
        assert quantized.values.shape == (3, 5, 20)
        assert quantized.scales.shape == (3, 5)
        assert np.log2(quantized.scales).tolist() == np.log2(quantized.scales).round().tolist()
        dequantized = reference.to_float64(quantized)
        # Three bits of mantissa; the smallest step is 2^-9 of a scale.
        limit = np.abs(weight) * 2.0**-4 + quantized.scales[:, None] * 2.0**-10
        assert (np.abs(dequantized - weight) <= limit).all()
        assert np.abs(dequantized - weight).max() > 0
        x = jnp.asarray(rng.normal(size=(4, 3, 20)), jnp.float32)
        actual = pieces.project("rhc,hcv->rhv", x, quantized)
        expected = np.einsum("rhc,hcv->rhv", np.asarray(x, np.float64), dequantized)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("spec", ["rd,dgf->rgf", "rhd,hdc->rhc"])
    @pytest.mark.parametrize("num_rows", [1, 3])
    @pytest.mark.parametrize("batch", [None, 1, 4])
    def test_fp8_products_as_a_gpu_takes_them(self, monkeypatch, spec, num_rows, batch):
        monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
        rng = np.random.default_rng(0)
        shapes = {"d": 32, "g": 2, "f": 5, "h": 3, "c": 7}
        rows, labels = spec.split("->")[0].split(",")
        weight = rng.normal(size=[shapes[label] for label in labels])
        quantized = pieces.quantize_weight(jnp.asarray(weight, jnp.float32), labels.index("d"))
        row_shape = [shapes[label] for label in rows[1:]]
        x = rng.normal(size=(batch or 1, num_rows, *row_shape)).astype(np.float32)
        run = functools.partial(pieces.project, spec)
        actual = jax.vmap(run, (0, None))(x, quantized) if batch else run(x[0], quantized)[None]
        exact = np.float64(reference.to_float64(quantized))
        expected = np.stack([np.einsum(spec, np.float64(part), exact) for part in x])
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("batch", "length", "is_product"), [(1, 64, 0), (2, 64, 1), (1, 8320, 1)]
    )
    def test_only_one_short_row_is_summed(self, batch, length, is_product):
        quantized = jax.eval_shape(lambda w: pieces.quantize_weight(w, 0), jnp.zeros((length, 8)))
        x = jax.ShapeDtypeStruct((batch, 1, length), jnp.float32)
        run = jax.jit(jax.vmap(functools.partial(pieces.project, "rd,df->rf"), (0, None)))
        for_gpu = run.trace(x, quantized).lower(lowering_platforms=("cuda",)).as_text()
        assert for_gpu.count("dot_general") == is_product

    @pytest.mark.parametrize("magnitude", [448.0, 448.5, 1.0, 2.0**-20, 3e4, 0.0])
    def test_fp8_scale_is_the_least_power_of_two(self, magnitude):
        x = jnp.array([0.3, -1.0, 0.01, 0.0]) * magnitude
        values, scale = pieces.quantize_fp8(x)
        exact = max(magnitude, 1e-4) / 448
        assert np.log2(float(scale)).is_integer()
        assert float(scale) / 2 < exact <= float(scale)
        expected = (np.asarray(x) / float(scale)).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(np.asarray(values), expected)

    def test_map_blocks_needs_a_divisor(self):
        with pytest.raises(ValueError, match="block=3 does not divide the 8 rows"):
            pieces.map_blocks(lambda x: x, jnp.zeros((8, 2)), 3)


class TestScores:
    def test_products_per_head_never_exist_for_the_whole_cache(self):
        rows, heads, dim, width = 2, 64, 128, 8192
        shapes = (rows, heads, dim), (rows, heads), (width, dim), (width,)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        jaxpr = jax.make_jaxpr(lambda *args: model.index_scores(*args, 1024))(*arguments)
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        assert max(sizes) <= max(rows * heads * 1024, width * dim)
        assert rows * heads * 1024 in sizes

    @pytest.mark.parametrize("block", [7, 29])
    def test_blocks_change_nothing(self, block):
        rng = np.random.default_rng(0)
        q, w, k, s = (rng.normal(size=n) for n in ((2, 3, 8), (2, 3), (29, 8), (29,)))
        products = np.maximum(np.einsum("rhd,sd->rhs", q, k), 0)
        expected = np.einsum("rhs,rh,s->rs", products, w, s)
        actual = model.index_scores(*map(jnp.float32, (q, w, k, s)), block)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("sequences", [0, 1, 2, 5, 9])
    @pytest.mark.parametrize("shared", [None, 2], ids=["own keys", "shared keys"])
    def test_sequences_at_a_time_change_nothing(self, sequences, shared):
        shapes = {0: (5, 2, 3, 8), 1: (5, 2, 3), 2: (5, 29, 8), 3: (5, 29)}
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=n), jnp.float32) for n in shapes.values()]
        expected = []
        for i in range(5):
            own = [a[0] if shared == place else a[i] for place, a in enumerate(arrays)]
            expected.append(model.index_scores(*own, 7))
        if shared is not None:
            arrays[shared] = arrays[shared][0]
        in_axes = [None if shared == place else 0 for place in range(4)]
        score = model.index_scores_by_sequence(7, sequences)
        actual = jax.vmap(score, in_axes)(*arrays)
        np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("sequences", "largest"), [(1, 1), (2, 2), (3, 3), (0, 8), (8, 8)])
    def test_products_of_few_sequences_exist_at_a_time(self, sequences, largest):
        shapes = (8, 2, 16, 4), (8, 2, 16), (8, 512, 4), (8, 512)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        score = jax.vmap(model.index_scores_by_sequence(512, sequences))
        jaxpr = jax.make_jaxpr(lambda *args: score(*args))(*arguments)
        shapes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
        products = [shape for shape in shapes if len(shape) == 4 and shape[-2:] == (16, 512)]
        assert max(shape[0] for shape in products) == largest


class TestStoreNext:
    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_is_store_for_rows_that_exist(self, num_rows):
        buffer, rows = jnp.full((9, 2), jnp.nan), jnp.arange(2.0 * num_rows).reshape(-1, 2)
        slots = 4 + jnp.arange(num_rows)
        np.testing.assert_array_equal(
            model.store_next(buffer, slots, rows), model.store(buffer, slots, rows)
        )

    def test_a_row_that_does_not_exist_goes_where_the_first_will(self):
        buffer = jnp.full((4, 2), jnp.nan)
        buffer = model.store_next(buffer, jnp.array([-1]), jnp.ones((1, 2)))
        assert jnp.isnan(buffer[1:]).all()
        buffer = model.store_next(buffer, jnp.array([0]), jnp.full((1, 2), 5))
        assert buffer[0].tolist() == [5, 5]


class TestSelectors:
    def test_recent(self):
        lengths = jnp.array([0, 2, 3, 7])
        indices = selection.select_recent(jnp.zeros((4, 8)), None, lengths, 3)
        assert indices.tolist() == [[-1, -1, -1], [0, 1, -1], [0, 1, 2], [4, 5, 6]]

    def test_random_is_a_set_inside_the_window(self):
        lengths = jnp.array([0, 2, 40, 50])
        starts = jnp.array([3, 5, 0, 14])
        select = selection.select_random(jax.random.key(0))
        indices = np.asarray(select(jnp.zeros((4, 64)), starts, lengths, 8))
        for row, length in zip(indices, lengths.tolist(), strict=True):
            chosen = row[row >= 0]
            assert len(set(chosen.tolist())) == min(8, length) == chosen.size
            assert (chosen < length).all()
        assert indices[2].tolist() != list(range(8))


class TestModel:
    @pytest.fixture(autouse=True)
    def _on_cpu(self):
        """Prefill and decoding are different programs and have to select the same sets.

        That takes the same bits of every score, and XLA rounds products of one row and of many
        differently on a GPU; with fp8 a last bit may then change a key by a whole step.
        """
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    @deep_configs
    def test_selecting_everything_is_dense_attention(self, config):
        config = dataclasses.replace(config, top_k=48)
        params, tokens = random_model(config), random_tokens(config, 48)
        positions = jnp.arange(48)
        dense, _, _ = prefill(params, config, tokens, positions, None)
        actual, _, indices = prefill(params, config, tokens, positions, xla)
        np.testing.assert_array_equal(actual, dense)
        assert (indices >= 0).sum() == config.num_layers * sum(
            (t + 1) // config.compression for t in range(48)
        )

    @all_configs
    @pytest.mark.parametrize("tokens_per_step", [1, 3])
    def test_decode_equals_prefill(self, config, tokens_per_step):
        params, tokens = random_model(config), random_tokens(config, 48)
        expected, _, sets = prefill(params, config, tokens, jnp.arange(48), xla)
        actual, indices, _ = decode(params, config, tokens, 0, tokens_per_step, xla)
        np.testing.assert_array_equal(indices, sets)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-4)

    @deep_configs
    def test_packed_sequences_do_not_see_each_other(self, config):
        """Three sequences and padding in one buffer, told apart by row windows alone."""
        params, tokens = random_model(config), random_tokens(config, 48)
        sequences = [slice(0, 20), slice(20, 25), slice(28, 39)]
        positions = np.full(48, -1)
        for rows in sequences:
            positions[rows] = np.arange(rows.stop - rows.start)
        packed, _, sets = prefill(params, config, tokens, positions, xla, block=12)
        assert (sets[:, positions < 0] == -1).all()
        for rows in sequences:
            expected, own = prefill_alone(params, config, tokens[rows])
            np.testing.assert_array_equal(sets[:, rows], own)
            np.testing.assert_allclose(packed[rows], expected, rtol=1e-3, atol=2e-4)

    @deep_configs
    def test_decode_continues_a_packed_prefill(self, config):
        params, tokens = random_model(config), random_tokens(config, 2, 48)
        positions = np.concatenate([np.arange(24), np.arange(24)])
        _, caches, _ = prefill(params, config, tokens[:, :24].reshape(-1), positions, xla)
        full = [prefill(params, config, row, np.arange(48), xla) for row in tokens]
        starts = jnp.array([0, 24])
        # The second sequence stops inside a group of four, in every way that it can.
        for shorter in (20, 21, 22, 23):
            lengths = [24, shorter]
            unpacked = [
                model.unpack_cache(config, cache, starts, jnp.array(lengths), 48)
                for cache in caches
            ]
            for b, length in enumerate(lengths):
                own = jax.tree.map(lambda leaf: leaf[b : b + 1], unpacked)  # noqa: B023
                actual, indices, _ = decode(params, config, tokens[b, length:], length, 1, xla, own)
                expected, _, sets = full[b]
                np.testing.assert_array_equal(indices, sets[:, length:])
                np.testing.assert_allclose(actual, expected[length:], rtol=1e-3, atol=2e-4)

    @deep_configs
    def test_rejected_tokens_leave_no_trace(self, config):
        """Speculate three tokens, reject two, go on: as if they had never been there."""
        params, tokens = random_model(config), random_tokens(config, 40)
        expected, _, _ = decode(params, config, tokens, 0, 1, xla, width=48)
        _, _, caches = decode(params, config, tokens[:18], 0, 3, xla, width=48)
        wrong = np.concatenate([tokens[18:19], (tokens[19:21] + 1) % config.vocab_size])
        _, _, caches = decode(params, config, wrong, 18, 3, xla, caches)
        actual, _, _ = decode(params, config, tokens[19:40], 19, 3, xla, caches)
        np.testing.assert_allclose(actual, expected[19:40], rtol=1e-3, atol=2e-4)

    @deep_configs
    def test_ragged_batch(self, config):
        """Streams that are empty, shorter than a step, and long, side by side in one batch."""
        params = random_model(config)
        tokens = random_tokens(config, 3, 24)
        caches = model.init_caches(config, 24, batch=3)
        lengths = jnp.array([0, 2, 3])  # of m = 3: none, two and all rows exist
        logits, caches, indices = decode_step(params, config, caches, tokens[:, :3], lengths, xla)
        assert [(row >= 0).sum(axis=-1).tolist() for row in np.asarray(indices[0])] == [
            [max(n - 3 + i + 1, 0) // config.compression for i in range(3)] for n in (0, 2, 3)
        ]
        for b, n in ((1, 2), (2, 3)):
            expected, _ = prefill_alone(params, config, tokens[b, 3 - n : 3])
            np.testing.assert_allclose(logits[b, 3 - n :], expected, rtol=1e-3, atol=2e-4)
        assert jnp.isnan(caches[0].latents[0].astype(jnp.float32)).all()  # nothing was stored

    @pytest.mark.parametrize("implementation", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @all_configs
    def test_implementation_of_top_k_changes_nothing(self, config, implementation):
        with jax.default_device(device_of(implementation)):
            params, tokens = random_model(config), random_tokens(config, 48)
            expected = decode(params, config, tokens, 0, 3, xla)
            actual = decode(params, config, tokens, 0, 3, selection.select_top_k(implementation))
        for one, other in zip(actual[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(one, other)

    def test_too_many_tokens_for_the_ring(self):
        params = random_model(COMPRESSED)
        caches = model.init_caches(COMPRESSED, 24, batch=1)
        with pytest.raises(ValueError, match="max_tokens_per_step=8"):
            model.decode_step(
                params,
                COMPRESSED,
                caches,
                random_tokens(COMPRESSED, 1, 9),
                jnp.array([9]),
                selection.select_recent,
            )


class TestConfigs:
    @pytest.mark.parametrize("name", ["v32", "glm5", "v4", "v4-flash"])
    def test_real_sizes_trace(self, name):
        """One decode step at the real sizes: shapes only, nothing is computed."""
        config = dataclasses.replace(CONFIGS[name], vocab_size=512)
        params = jax.eval_shape(lambda: model.init_model(jax.random.key(0), config))
        caches = jax.eval_shape(lambda: model.init_caches(config, 16384, batch=2))
        logits, _, indices = jax.eval_shape(
            lambda params, caches, tokens, lengths: model.decode_step(
                params, config, caches, tokens, lengths, xla
            ),
            params,
            caches,
            jax.ShapeDtypeStruct((2, 3), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        assert logits.shape == (2, 3, 512)
        assert indices.shape == (1, 2, 3, config.top_k)

    @pytest.mark.parametrize(("is_fp8", "expected"), [(False, 1196), (True, 600)])
    def test_weights_of_a_layer_are_those_of_the_published_model(self, is_fp8, expected):
        """At an H100's 3.35 TB/s, 357 us for bfloat16, and half of that as published."""
        assert CONFIGS["v32"].weight_fp8
        config = dataclasses.replace(CONFIGS["v32"], weight_fp8=is_fp8)
        layer = jax.eval_shape(lambda: model.init_layer(jax.random.key(0), config))
        megabytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer)) / 1e6
        assert megabytes == pytest.approx(expected, rel=0.01)

    def test_fp8_weights_are_initialised_like_others(self):
        plain, quantized = (
            jax.jit(model.init_layer, static_argnums=1)(jax.random.key(0), config)
            for config in (PLAIN, FP8_WEIGHTS)
        )
        assert {
            name for name, weight in quantized.items() if not isinstance(weight, jax.Array)
        } == (set(model.FP8_MATRICES))
        for name, weight in quantized.items():
            dequantized = reference.to_float64(weight)
            np.testing.assert_allclose(dequantized, plain[name], rtol=0.07, atol=0.02, err_msg=name)

    def test_sizes_are_checked(self):
        with pytest.raises(ValueError, match="index_dim=12 must be a power of two"):
            dataclasses.replace(PLAIN, index_dim=12)
        with pytest.raises(ValueError, match="window=2 hides the newest positions"):
            dataclasses.replace(COMPRESSED, window=2)
