# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example: its serving benchmark, at sizes that any machine serves."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tqdm", reason="the serving benchmark needs the 'examples' extra")

from examples.sparse_attention import selection, serve
from examples.sparse_attention.config import CONFIGS

SMALL = ["--batch", "2", "--input-len", "70", "--output-len", "3", "--waves", "2"]


@pytest.mark.parametrize("implementation", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_serves_and_writes_results(implementation, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs the 'examples' extra")
    result, picture = tmp_path / "serve.json", tmp_path / "serve.png"
    arguments = ["--top-k-implementation", implementation, "--json", str(result)]
    assert serve.main([*arguments, "--plot", str(picture), *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK: ")
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(result.read_text())
    assert written["header"]["config"] == "tiny"
    ours, xla = written["records"]
    assert (ours["implementation"], xla["implementation"]) == (implementation, "xla")
    for record in (ours, xla):
        assert record["same_sets"]
        assert record["same_tokens"]
        assert 0 <= record["top_k_share"] < 1
        assert record["bound"] == pytest.approx(1 / (1 - record["top_k_share"]))
        assert record["itl_ms"]["median"] <= record["itl_ms"]["p99"]
        # 2 waves of 2 requests and 3 tokens.
        seconds = 4 / record["requests_per_s"]
        assert record["output_tokens_per_s"] == pytest.approx(12 / seconds)


def test_computed_prefill_of_mixed_lengths(capsys):
    arguments = ["--prefill", "computed", "--prefill-rows", "32"]
    small = ["--batch", "2", "--input-len", "mixed", "--output-len", "3", "--waves", "1"]
    assert serve.main([*arguments, "--width", "128", *small]) == 0
    output = capsys.readouterr().out
    assert "mixed" in output
    assert "not in TTFT" not in output


def test_waves_of_compressed_caches_start_alike(monkeypatch, capsys):
    """The sliding window's ring wraps around during a wave; the next must not notice."""
    compressed = dataclasses.replace(
        CONFIGS["tiny"], compression=4, window=8, max_tokens_per_step=1
    )
    monkeypatch.setitem(CONFIGS, "tiny", compressed)
    small = ["--batch", "2", "--input-len", "70", "--output-len", "12", "--waves", "2"]
    assert serve.main(["--top-k-implementation", "cpu", *small]) == 0
    assert "yes, yes" in capsys.readouterr().out


def test_xla_alone(capsys):
    assert serve.main(["--top-k-implementation", "xla", *SMALL]) == 0
    assert "median TPOT" not in capsys.readouterr().out


def test_other_tokens_fail_the_command(monkeypatch, capsys):
    """An implementation that selects other sets is found out, whatever its speed."""
    honest = serve.selector
    monkeypatch.setattr(
        serve, "selector", lambda name: selection.select_recent if name == "cpu" else honest(name)
    )
    assert serve.main(["--top-k-implementation", "cpu", *SMALL]) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("DISAGREEMENT")
    assert "NO, " in output


def test_a_cache_that_is_too_small_is_explained(capsys):
    assert serve.main(["--width", "64", *SMALL]) == 2
    assert "--width 64 is less than input and output, 73 tokens" in capsys.readouterr().err


def test_free_selection_is_a_set_from_all_over_the_row():
    lengths = jnp.array([0, 3, 100, 131000])
    scores = jnp.zeros((4, 256))
    indices = np.asarray(serve.select_evenly(scores, None, lengths, 64))
    assert (indices[0] == -1).all()
    assert indices[1].tolist() == [0, 1, 2] + [-1] * 61
    for row, length in ((indices[2], 100), (indices[3], 131000)):
        assert (np.diff(row) > 0).all()
        assert row[0] == 0
        assert length - 2 * (length / 64) < row[-1] < length


def test_mixed_lengths_are_spread_and_fit():
    lengths = serve.Cell(32, "mixed").lengths(longest=131000)
    assert lengths.min() >= 1024
    assert lengths.max() <= 131000
    assert (lengths < 8192).any()
    assert (lengths > 32768).any()
    assert serve.Cell(3, 50).lengths(longest=60).tolist() == [50, 50, 50]


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_products_per_head_stay_in_cache(batch):
    config = serve.sized_config("v32", layers=2, batch=batch, width=131072, vocab_size=64)
    products = 4 * batch * config.index_heads * config.index_block
    assert products <= serve.SCORE_BLOCK_BYTES
    assert config.index_block <= 131072 // 4
    assert 131072 % config.index_block == 0
    assert (config.num_layers, config.vocab_size) == (2, 64)
    assert config.dim == CONFIGS["v32"].dim


def test_statistics_are_milliseconds():
    assert serve.statistics(np.array([0.001, 0.002, 0.006])) == pytest.approx(
        {"mean": 3.0, "median": 2.0, "p99": 5.92}
    )
