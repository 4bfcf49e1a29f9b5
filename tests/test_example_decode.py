# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example's first command: decode real text and compare implementations."""

import jax.numpy as jnp
import numpy as np
import pytest

from examples.sparse_attention import corpus, decode, selection

SMALL = ["--steps", "96", "--stagger", "20", "--streams", "3", "--top-k", "16"]


@pytest.mark.parametrize(
    "implementation", ["auto", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_agrees(implementation, capsys):
    assert decode.main(["--implementation", implementation, *SMALL]) == 0
    output = capsys.readouterr().out
    assert output.strip().splitlines()[-1].startswith(f"OK: {implementation} and xla selected")
    assert sum(int(line.split()[3]) for line in output.splitlines() if " .. " in line) == sum(
        96 - 20 * stream for stream in range(3)
    )


def test_speculative_rows_agree(capsys):
    assert decode.main(["--implementation", "cpu", "--tokens-per-step", "3", *SMALL]) == 0
    assert "all 96 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("wrong_length", "num_steps"), [(60, 2)])
def test_a_wrong_set_is_reported(wrong_length, num_steps, monkeypatch, capsys):
    """One row that misses one of its best candidates must fail the whole command."""
    honest = selection.select_top_k("xla")

    def select_top_k(implementation):
        def select(scores, starts, lengths, k):
            indices = honest(scores, starts, lengths, k)
            worse = indices.at[:, 1].set(indices[:, 0])
            return jnp.where((lengths == wrong_length)[:, None], worse, indices)

        return honest if implementation == "xla" else select

    monkeypatch.setattr(selection, "select_top_k", select_top_k)
    assert decode.main(["--implementation", "cpu", *SMALL]) == 1
    output = capsys.readouterr().out
    assert output.strip().splitlines()[-1] == (
        f"DISAGREEMENT: cpu and xla differ at {num_steps} of 96 steps, "
        f"first at step {wrong_length - 1}"
    )


def test_a_missing_implementation_is_explained(monkeypatch, capsys):
    def select_top_k(implementation):
        raise RuntimeError("there is no GPU; pass implementation='cpu'")

    monkeypatch.setattr(selection, "select_top_k", select_top_k)
    assert decode.main(["--implementation", "cuda", *SMALL]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_explained(capsys):
    assert decode.main(["--steps", "10000000"]) == 2
    assert "exceeds the" in capsys.readouterr().err


def test_lengths_and_tokens_of_staggered_streams():
    lengths = decode.staggered_lengths(steps=4, streams=2, tokens_per_step=2, stagger=1)
    assert lengths.tolist() == [[2, 0], [4, 2], [6, 4], [8, 6]]
    streams = [np.arange(10, 18), np.arange(20, 28)]
    tokens = decode.tokens_of_steps(streams, lengths, 2)
    assert tokens[0].tolist() == [[10, 11], [0, 0]]
    assert tokens[3].tolist() == [[16, 17], [24, 25]]


def test_corpus_is_sorted_real_text():
    texts = corpus.longest_files(3)
    sizes = [len(text) for text in texts.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert b"import" in next(iter(texts.values())).tobytes()
