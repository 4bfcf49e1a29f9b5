# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example: training, and the recall and text demonstrations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import device_of
from test_example_model import PLAIN, layer_and_input, random_weights

from examples.sparse_attention import compiling, model, selection, training

optax = pytest.importorskip("optax", reason="the demonstrations need the 'examples' extra")

from examples.sparse_attention import recall, text  # noqa: E402


@pytest.fixture(autouse=True)
def _full_precision():
    """A GPU multiplies float32 in a shorter format unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


xla = selection.select_top_k("xla")
select_random = selection.select_random(jax.random.key(0))


class TestBlock:
    """The differentiable block against the block that decodes."""

    @pytest.fixture(autouse=True)
    def _on_cpu(self):
        """Different programs that have to select the same sets, see test_example_model."""
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    @pytest.mark.parametrize(
        ("read", "select"),
        [
            (training.read_all, None),
            (training.read_selected(xla), xla),
            (training.read_selected(selection.select_recent), selection.select_recent),
            (training.read_selected(select_random), select_random),
        ],
        ids=["dense", "top-k", "recent", "random"],
    )
    def test_equals_inference(self, read, select):
        """On three sequences, packed one after the other."""
        layer, x = layer_and_input(PLAIN)
        positions = jnp.concatenate([jnp.arange(n) for n in (12, 1, 16)])
        slots = jnp.arange(29)
        cache = model.init_cache(PLAIN, 29)
        cache = model.write_cache(layer, PLAIN, cache, x, positions, slots)
        expected, indices = model.sparse_attention(layer, PLAIN, cache, x, positions, slots, select)
        actual = training.attention_block(layer, PLAIN, x, x, positions, read)
        np.testing.assert_allclose(actual.output, expected, rtol=1e-3, atol=1e-5)
        mask = np.zeros((29, 29), bool)
        for row, start in enumerate((slots - positions).tolist()):
            chosen = np.asarray(indices[row])
            mask[row, chosen[chosen >= 0] + start] = True
        np.testing.assert_array_equal(actual.is_read, mask)

    def test_oracle_reads_the_most_attended(self):
        layer, x = layer_and_input(PLAIN)
        seen = {}

        def read(scores, weights, starts, lengths, k):
            seen["weights"] = weights
            return training.read_oracle(xla)(scores, weights, starts, lengths, k)

        result = training.attention_block(layer, PLAIN, x, x, jnp.arange(29), read)
        weights = np.asarray(seen["weights"])
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        least_read = np.where(result.is_read, weights, np.inf).min(axis=1)
        most_missed = np.where(result.is_read, 0, weights).max(axis=1)
        assert (least_read >= most_missed).all()
        assert result.is_read.sum(axis=1).tolist() == [min(t + 1, PLAIN.top_k) for t in range(29)]

    def test_gradients_stay_apart(self):
        """The task does not reach the indexer, nor the indexer's imitation anything else."""
        layer, x = layer_and_input(PLAIN)
        w_x = jnp.eye(PLAIN.dim)

        @functools.partial(jax.jit, static_argnames="read")
        def gradients(layer, w_x, read):
            def losses(layer, w_x):
                rows = x @ w_x
                result = training.attention_block(layer, PLAIN, rows, rows, jnp.arange(29), read)
                return jnp.stack([jnp.sum(result.output**2), jnp.sum(result.divergence)])

            both = jax.jacrev(losses, (0, 1))(layer, w_x)
            return [jax.tree.map(lambda leaf: leaf[i], both) for i in range(2)]  # noqa: B023

        unused = {"attention_norm", "ffn_norm", "ffn_gate_up", "ffn_down"}
        task, imitation = gradients(layer, w_x, training.read_selected(xla))
        for name in layer.keys() - unused:
            is_indexer = name.startswith("index_")
            assert bool(jnp.any(task[0][name] != 0)) != is_indexer, name
            assert bool(jnp.any(imitation[0][name] != 0)) == is_indexer, name
        assert jnp.any(task[1] != 0)
        assert not jnp.any(imitation[1] != 0)

    def test_divergence(self):
        target = jnp.array([[0.5, 0.25, 0.25, 0.0]])
        mask = jnp.array([[True, True, True, False]])
        same = jnp.log(jnp.array([[0.5, 0.25, 0.25, 7.0]])) + 3
        assert float(training.indexer_divergence(same, target, mask)[0]) == pytest.approx(
            0, abs=1e-6
        )
        other = jnp.zeros((1, 4))
        expected = sum(p * np.log(p * 3) for p in (0.5, 0.25, 0.25))
        actual = float(training.indexer_divergence(other, target, mask)[0])
        assert actual == pytest.approx(expected, rel=1e-5)


def decode(params, episodes, select):
    """`recall.evaluate`, its program compiled before, as the command does."""
    (device,) = episodes.keys.devices()
    compiled = recall.decode.lower(params, episodes, select).compile(
        compiling.options_without_autotuning(device)
    )
    return recall.evaluate(compiled, params, episodes)


class TestRecall:
    def test_packed_episodes(self):
        positions = jnp.arange(24) % 8
        episode = recall.sample_episodes(jax.random.key(0), positions)
        assert (episode.needles >= 0).all()
        assert (episode.needles <= positions).all()
        assert (episode.needles < positions).any()

    def test_evaluation_never_repeats_a_key(self):
        episodes = recall.evaluation_episodes(streams=2, steps=9216, seed=0)
        for keys in np.asarray(episodes.keys):
            assert np.unique(keys).size == 9216
        assert (episodes.needles <= np.arange(9216)).all()

    @pytest.mark.parametrize("phase", [recall.DENSE, recall.WARM_UP], ids=lambda p: p.name)
    def test_phases_train_what_they_say(self, phase):
        params = random_weights(lambda key, _: recall.init_params(key), None)
        trained, frozen = recall.split_params(params, phase)
        layer = params["layer"].keys()
        indexer = {name for name in layer if name.startswith("index_")}
        assert trained["layer"].keys() == (indexer if phase.is_indexer_only else layer)
        joined = recall.join_params(trained, frozen)
        assert joined.keys() == params.keys()
        assert all(joined["layer"][name] is params["layer"][name] for name in layer)

    def test_training_lowers_both_losses(self):
        params = random_weights(lambda key, _: recall.init_params(key), None)
        phase = recall.SPARSE._replace(buffers=4)
        positions = jnp.arange(32) % 8
        state = optax.adam(phase.learning_rate).init(params)
        losses = []
        for seed in range(2):
            keys = jax.random.split(jax.random.key(seed), 10)
            params, state, means = recall.train_steps(params, state, keys, positions, phase)
            losses.append({name: float(means[name]) for name in phase.losses})
        assert losses[1]["task"] < losses[0]["task"]
        assert losses[1]["divergence"] < losses[0]["divergence"]

    @pytest.mark.parametrize("implementation", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_decode(self, implementation):
        with jax.default_device(device_of(implementation)):
            params = random_weights(lambda key, _: recall.init_params(key), None)
            episodes = recall.evaluation_episodes(streams=2, steps=96, seed=0)
            outcome = decode(params, episodes, selection.select_top_k(implementation))
            expected = decode(params, episodes, xla)
        np.testing.assert_array_equal(outcome.indices, expected.indices)
        np.testing.assert_array_equal(outcome.answers, expected.answers)
        hits = (outcome.indices == np.asarray(episodes.needles)[..., None]).any(axis=-1)
        np.testing.assert_array_equal(outcome.is_hit, hits)

    def test_a_recent_window_hits_what_is_recent(self):
        params = random_weights(lambda key, _: recall.init_params(key), None)
        episodes = recall.evaluation_episodes(streams=2, steps=96, seed=0)
        outcome = decode(params, episodes, selection.select_recent)
        age = np.arange(96) - np.asarray(episodes.needles)
        np.testing.assert_array_equal(outcome.is_hit, age < recall.CONFIG.top_k)

    def test_table(self):
        right = np.zeros((1, 300), bool)
        right[:, :128] = True
        outcome = recall.Outcome(right, ~right, np.zeros(0), np.zeros(0), 1.0)
        lines = recall.accuracy_table({"DSA": outcome}, 300).splitlines()
        assert " ".join(lines[0].split()) == "pairs in the cache 1 - 128 129 - 300"
        assert lines[1].split() == ["DSA", "1.000", "(0.000)", "0.000", "(1.000)"]


class TestText:
    def test_held_out_text_is_not_trained_on(self):
        training_text, held_out = text.split_corpus()
        sample = held_out[10_000:10_200].tobytes()
        assert sample in held_out.tobytes()
        assert sample not in training_text.tobytes()
        assert 0.05 < len(held_out) / len(training_text) < 0.3

    def test_windows_are_shifted_by_one(self):
        tokens = text.windows(np.arange(2000).astype(np.uint8), np.array([0, 3]))
        assert tokens.shape == (2, text.LENGTH + 1)
        assert tokens[1, :3].tolist() == [3, 4, 5]

    def test_losses_of_a_budget_that_covers_everything_are_dense(self):
        config = dataclasses.replace(PLAIN, vocab_size=256, top_k=40)
        params = random_weights(model.init_model, config)
        tokens = jnp.asarray(text.split_corpus()[1][:41].astype(np.int32))
        losses_of = jax.jit(text.sequence_losses, static_argnames=("config", "read"))
        dense, _ = losses_of(params, config, tokens, training.read_all)
        ways = text.reading_ways("xla", seed=0)
        assert ways.keys() == {"dense", "DSA", "recency", "random", "oracle"}
        for name in ("DSA", "oracle"):
            losses, _ = losses_of(params, config, tokens, ways[name](jnp.int32(40)))
            np.testing.assert_allclose(losses, dense, rtol=1e-4, err_msg=name)
        prefill = jax.jit(model.prefill, static_argnames=("config", "select"))
        logits, _, _ = prefill(params, config, tokens[:-1], jnp.arange(40), None)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        np.testing.assert_allclose(dense, expected, rtol=1e-3)

    @pytest.mark.parametrize("budget", [0, 1, 3, 8])
    def test_a_run_time_budget_reads_what_a_static_one_does(self, budget):
        """Whatever is selected: the best of a ranking are the selection of that size."""
        rng = np.random.default_rng(0)
        # With ties, as the indexer's scores have them.
        scores = jnp.asarray(rng.integers(0, 5, (12, 20)), jnp.float32)
        weights = jnp.asarray(rng.integers(0, 5, (12, 20)), jnp.float32)
        starts, lengths = jnp.arange(12) % 5, jnp.arange(12) + 1
        key = jax.random.key(7)
        static = {
            "DSA": training.read_selected(xla),
            "recency": training.read_selected(selection.select_recent),
            "random": training.read_selected(selection.select_random(key)),
            "oracle": training.read_oracle(xla),
        }
        ways = text.reading_ways("xla", seed=7)
        for name, read in static.items():
            expected = read(scores, weights, starts, lengths, budget)
            actual = ways[name](jnp.int32(budget))(scores, weights, starts, lengths, 8)
            np.testing.assert_array_equal(actual, expected, err_msg=name)
            assert actual.sum() == sum(min(n, budget) for n in lengths.tolist())

    def test_conclusions_say_who_wins(self):
        table = {
            "dense": [1.0, 1.0, 1.0],
            "DSA": [1.5, 1.2, 1.1],
            "recency": [1.6, 1.1, 1.1001],
        }
        first, second, third = text.conclusions(table)
        assert first == (
            "k = 8: DSA beats recency by 0.100 nats per byte; DSA is +0.500 from dense."
        )
        assert "recency beats DSA by 0.100" in second
        assert "DSA and recency are level" in third
