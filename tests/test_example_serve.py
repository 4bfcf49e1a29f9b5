# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""The sparse attention example: its serving benchmark, at sizes that any machine serves."""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from examples.sparse_attention import selection, serve, serve_programs, serve_report
from examples.sparse_attention.config import CONFIGS


@pytest.fixture(autouse=True)
def without_autotuning(monkeypatch):
    """Tokens of different programs are compared; the command names this option where they differ.

    On a GPU XLA would time algorithms for each program, and not always choose the same.
    """
    options = {"xla_gpu_autotune_level": 0}
    monkeypatch.setattr(serve, "Compiler", functools.partial(serve.Compiler, options=options))


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
    assert written["header"]["weights"] == "float32"
    names = [record["implementation"] for record in written["records"]]
    assert names == [implementation, "lax", "xla"]
    for record in written["records"]:
        assert record["same_sets"]
        assert record["same_tokens"] is (None if record["implementation"] == "lax" else True)
        assert 0 <= record["top_k_share"] < 1
        assert record["bound"] == pytest.approx(1 / (1 - record["top_k_share"]))
        assert record["itl_ms"]["median"] <= record["itl_ms"]["p99"]
        assert 0 < record["step_ms"]["median"] < 1e3 * 12 / record["output_tokens_per_s"]
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
    output = capsys.readouterr().out
    assert "median TPOT lax" in output
    assert output.splitlines()[-1].startswith("OK: in every cell measured, xla selected the same")


def test_other_tokens_fail_the_command(monkeypatch, capsys):
    """An implementation that selects other sets is found out, whatever its speed."""
    honest = serve_programs.selector
    monkeypatch.setattr(
        serve_programs,
        "selector",
        lambda name: selection.select_recent if name == "cpu" else honest(name),
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
    indices = np.asarray(serve_programs.select_evenly(scores, None, lengths, 64))
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


@pytest.mark.parametrize(
    ("width", "block", "sequences"),
    [
        pytest.param(131072, 131072, 8, id="whole sequences, eight at a time"),
        pytest.param(16384, 16384, 64, id="short sequences, many at a time"),
        pytest.param(2**21, 2**20, 1, id="blocks of a long sequence"),
    ],
)
def test_products_per_head_are_bounded(width, block, sequences):
    setting = serve_programs.new_setting("v32", 2, 64, 32, width, 0, 256)
    config = setting.config
    assert (config.index_block, config.index_sequences) == (block, sequences)
    products = 4 * sequences * config.index_heads * block
    assert products == serve_programs.DECODE_BLOCK_BYTES
    assert (config.num_layers, config.vocab_size) == (2, 64)
    assert config.dim == CONFIGS["v32"].dim


@pytest.mark.parametrize("starts", [None, jnp.array([0, 3, 7, 50])], ids=["rows", "windows"])
def test_the_baseline_selects_the_same_sets_best_first(starts):
    """Of whole and short windows, with ties."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(-3, 3, (4, 60)), jnp.float32)
    lengths = jnp.array([0, 5, 53, 9])
    actual = serve_programs.selector("lax")(scores, starts, lengths, 12)
    expected = selection.select_top_k("xla")(scores, starts, lengths, 12)
    np.testing.assert_array_equal(np.sort(actual), np.sort(expected))
    row = np.asarray(scores[2])[np.asarray(actual[2]) + (0 if starts is None else 7)]
    assert (np.diff(row) <= 0).all()


def test_an_exhausted_budget_leaves_cells_out(tmp_path, capsys):
    """It ends cleanly, says what is missing, and the result file says so too."""
    result = tmp_path / "serve.json"
    arguments = ["--top-k-implementation", "xla", "--budget", "0", "--json", str(result)]
    assert serve.main([*arguments, *SMALL]) == 2
    output = capsys.readouterr()
    assert "INCOMPLETE: --budget 0 left out batch 2, input 70" in output.out
    assert "pass a larger --budget" in output.err
    written = json.loads(result.read_text())
    assert written["header"]["left_out"] == ["batch 2, input 70"]
    assert written["records"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-len", "1"], "leaves no gap between tokens"),
        (["--grid", "--prefill", "computed"], "a program per prompt length"),
    ],
)
def test_what_cannot_be_measured_is_explained(arguments, message, capsys):
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


def result_of(tpots, left_out=(), names=("cuda", "lax", "xla")):
    """A result as `serve --json` writes it, with median TPOT of each implementation by batch."""
    header = {
        "layers": 1,
        "config": "v32",
        "width": 131072,
        "output_len": 32,
        "waves": 3,
        "device": "a GPU",
        "jax": "0.11.2",
        "date": "2026-11-24T00:00:00+00:00",
        "left_out": list(left_out),
    }
    records = [
        {
            "implementation": name,
            "batch": batch,
            "input_len": "mixed",
            "tpot_ms": {"median": tpot},
            "output_tokens_per_s": 1000 * batch / tpot,
            "top_k_share": 0.25,
            "bound": 4 / 3,
            "same_sets": True,
            "same_tokens": None if name == "lax" else batch == 1,
        }
        for batch, cell in tpots.items()
        for name, tpot in zip(names, cell, strict=True)
    ]
    return {"header": header, "records": records}


def rows_of(text):
    """Cells of the rows of a table in markdown, without its header."""
    rows = [row for row in text.splitlines() if row.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_figures_in_markdown():
    cells = {1: (0.5, 0.6, 0.7), 8: (2.0, 1.0, 3.0)}
    text = serve_report.markdown(result_of(cells, ["batch 32, input 5"]))
    first, second = rows_of(text)
    assert first == (
        ["1", "mixed", "0.500", "0.600", "1.20", "0.700", "2,000", "1,667"]
        + ["25.0%", "25.0%", "1.33", "yes", "yes"]
    )
    assert second[:6] == ["8", "mixed", "2.000", "1.000", "0.50", "3.000"]
    assert second[-2:] == ["yes", "NO"]
    assert "TPOT ms, cuda | TPOT ms, `lax.top_k` | ratio | TPOT ms, xla |" in text
    assert "shorter in 1 of 2 cells; the ratio to `lax.top_k` is 0.50 to 1.20" in text
    assert "Not measured within the time budget: batch 32, input 5." in text


def test_steps_that_nobody_awaits_have_columns_of_their_own():
    result = result_of({1: (0.5, 0.6, 0.7), 8: (2.0, 1.0, 3.0)})
    for record, step in zip(result["records"], (0.4, 0.5, 0.6, 1.0, 1.5, 9.0), strict=True):
        record["step_ms"] = {"median": step}
    text = serve_report.markdown(result)
    first, second = rows_of(text)
    assert first[5:10] == ["0.700", "0.400", "0.500", "1.25", "2,000"]
    assert second[6:9] == ["1.000", "1.500", "1.50"]
    assert "TPOT ms, xla | step ms, cuda | step ms, `lax.top_k` | ratio | output" in text
    assert len({row.count("|") for row in text.splitlines() if row.startswith("|")}) == 1
    assert "Of steps that nobody awaits, 2 are shorter, by 1.25 to 1.50." in text
    assert "1.20x; step 1.25x" in serve_report.gains(result["records"])[0]


def test_several_results_share_the_picture_of_the_first(tmp_path, capsys):
    paths = []
    for device in ("one GPU", "another GPU"):
        result = result_of({1: (0.5, 0.6, 0.7)})
        result["header"]["device"] = device
        for record in result["records"]:
            some = {"mean": 1.0, "median": record["tpot_ms"]["median"], "p99": 2.0}
            record |= {"ttft_ms": some, "itl_ms": some, "tpot_ms": some, "requests_per_s": 1.0}
        paths.append(str(tmp_path / f"{device}.json"))
        serve_report.write_result(result, paths[-1])
    assert serve_report.main(paths) == 0
    printed = capsys.readouterr().out
    assert printed.index("one GPU") < printed.index("another GPU")
    assert printed.count("median TPOT") == 2
    text = serve_report.section([json.loads(pathlib.Path(path).read_text()) for path in paths])
    assert text.count(serve_report.PICTURE) == 1
    places = [text.index(part) for part in ("one GPU", serve_report.PICTURE, "another GPU")]
    assert places == sorted(places)


def test_a_wrong_set_of_any_implementation_shows():
    result = result_of({1: (0.5, 0.6, 0.7)})
    result["records"][1]["same_sets"] = False
    ((*_, sets, _),) = rows_of(serve_report.markdown(result))
    assert sets == "NO"


def test_figures_without_lax_are_compared_with_xla():
    """A result whose baseline is xla says so."""
    text = serve_report.markdown(result_of({1: (0.5, 0.6)}, names=("cuda", "xla")))
    ((*first, _, _),) = rows_of(text)
    assert first[2:6] == ["0.500", "0.600", "1.20", "2,000"]
    assert "the ratio to xla is 1.20 to 1.20" in text
    assert "lax.top_k" not in text


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="two implementations"):
        serve_report.markdown(result_of({1: (0.5,)}, names=("cuda",)))


def test_a_section_of_the_document_is_replaced():
    document = f"before {serve_report.BEGIN} old {serve_report.END} after"
    new = serve_report.replace_section(document, "new")
    assert new == f"before {serve_report.BEGIN}\n\nnew\n\n{serve_report.END} after"
    with pytest.raises(ValueError, match="exactly one section"):
        serve_report.replace_section("no marks", "new")


ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "sparse_attention.md"
RESULTS = ROOT / "examples" / "sparse_attention" / "results"


def test_the_documentation_shows_the_committed_results():
    """In the order of the help of `python -m examples.sparse_attention.serve_report`."""
    document = DOCUMENT.read_text()
    results = [json.loads((RESULTS / f"serve_{gpu}.json").read_text()) for gpu in ("h200", "h100")]
    assert serve_report.replace_section(document, serve_report.section(results)) == document


def test_statistics_are_milliseconds():
    assert serve.statistics(np.array([0.001, 0.002, 0.006])) == pytest.approx(
        {"mean": 3.0, "median": 2.0, "p99": 5.92}
    )
