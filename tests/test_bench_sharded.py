"""The bench over several devices, its tables, and the model of the exchange on paper."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import hlo
import jax
import jax.numpy as jnp
import pytest

import jax_topk
from jax_topk import sharding
from jax_topk.bench import __main__ as command
from jax_topk.bench import cases, exchange_model, processes, results, sharded, sharded_tables
from jax_topk.bench.exchange_model import H100, exchange, gather_of_rows
from jax_topk.bench.results import Record, Results

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Arrays live on the CPU, on a machine with a GPU too."""
    monkeypatch.setattr(command, "_platform", lambda: ("cpu", "cpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        yield


# --- the model ------------------------------------------------------------------------------------


def test_the_model_of_one_node_by_hand():
    """One row, k = 2048 of float32: LL, 7 hops of NVLink, 7 times 16 KiB at LL's bandwidth."""
    found = exchange(1, 2048, 4, 8)
    assert found.received_bytes == 7 * 2048 * 8
    (stage,) = found.stages
    assert stage.protocol == "LL"
    assert found.us == pytest.approx(6.6 + 7 * 0.6 + 7 * 2048 * 8 / 87_700)


def test_the_model_of_two_stages_by_hand():
    found = exchange(1, 2048, 4, 64)
    inside, between = found.stages
    assert inside == exchange(1, 2048, 4, 8).stages[0]
    assert between.devices == 8
    assert between.received_bytes == 7 * 2048 * 8
    # A quarter of a port of 50 GB/s.
    assert between.us == pytest.approx(6.6 + 7 * 2.7 + 7 * 2048 * 8 / 12_500)
    assert found.us == inside.us + between.us


def test_the_model_of_one_axis_over_nodes_by_hand():
    (stage,) = exchange(1, 2048, 4, 64, staged=False).stages
    assert stage.received_bytes == 63 * 2048 * 8
    # The network's ports of a node together are slower than NVLink; LL is capped besides.
    assert stage.us == pytest.approx(6.6 + 56 * 1.0 + 7 * 2.7 + 63 * 2048 * 8 / 19_000)


def test_large_messages_take_the_bandwidth_of_the_links():
    found = gather_of_rows(1024, 1 << 23, 4, 8)
    assert found.protocol == "Simple"
    assert found.us == pytest.approx(found.received_bytes / H100.nvlink, rel=0.01)
    assert found.received_bytes == 7 * 1024 * (1 << 23) // 8 * 4


def test_the_model_grows_with_its_arguments():
    for staged in (True, False):
        times = [exchange(1, 2048, 4, devices, staged=staged).us for devices in (2, 8, 64, 512)]
        assert times == sorted(times)
        assert times[0] > 0
    by_rows = [exchange(rows, 2048, 4, 64).received_bytes for rows in (1, 32)]
    assert by_rows[1] == 32 * by_rows[0]
    by_size = [exchange(1, 2048, size, 64).received_bytes for size in (2, 4)]
    assert by_size == [by_size[1] * 6 // 8, by_size[1]]
    # Two stages leave k candidates after the first, so they win in bytes and in time.
    for devices in (64, 512):
        flat, staged = (exchange(1, 2048, 4, devices, staged=s) for s in (False, True))
        assert staged.received_bytes < flat.received_bytes
        assert staged.us < flat.us


def test_one_device_exchanges_nothing():
    assert exchange(1, 2048, 4, 1).received_bytes == 0
    assert exchange(1, 2048, 4, 1).us == 0


def test_nodes_that_are_not_full_are_explained():
    for call in (lambda: exchange(1, 1, 4, 12), lambda: gather_of_rows(1, 12, 4, 12)):
        with pytest.raises(ValueError, match="devices=12 does not fill nodes of 8"):
            call()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_model_counts_the_bytes_of_the_compiled_program(cpu_devices, dtype):
    """Nodes of 4 devices: each all-gather leaves what the model lets arrive, and one's own part."""
    kind = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("node", "device"), axis_types=kind, devices=cpu_devices)
    rows, k = 3, 16
    select = jax.shard_map(
        lambda x: jax_topk.sharded_top_k(x, k, axis_name=("node", "device")),
        mesh=mesh,
        in_specs=jax.P(None, ("node", "device")),
        out_specs=jax.P(),
    )
    x = jax.ShapeDtypeStruct((rows, 1024), dtype)
    text = jax.jit(select).lower(x).compile().as_text()
    cluster = dataclasses.replace(H100, devices_per_node=4)
    model = exchange(rows, k, jnp.dtype(dtype).itemsize, 8, cluster=cluster)
    own = rows * k * hlo.bytes_per_candidate(dtype)
    assert hlo.all_gather_bytes(text) == [s.received_bytes + own for s in model.stages]


# --- measuring ------------------------------------------------------------------------------------

SMALL = ["--suite", "sharded", "--devices", "8", "--rows", "1,3", "--quick"]


def test_a_run_over_simulated_devices(tmp_path, capsys):
    path = tmp_path / "sharded.json"
    arguments = [*SMALL, "--width", "4096", "--k", "16"]
    assert command.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "rows over 8 devices, single calls from Python" in printed.out
    assert "The devices are simulated, so the exchange is not judged." in printed.out
    assert "simulated by one CPU" in printed.err
    data = json.loads(path.read_text())
    assert data["header"]["target"] == "sharded-cpu"
    assert data["header"]["devices"] == 8
    by_name = {item["implementation"]: item for item in data["records"]}
    assert set(by_name) == set(cases.SHARDED)
    for name, item in by_name.items():
        assert item["devices"] == 8
        assert item["us"] > 0
        assert item["verified"] == ("equal" if name in ("exchange", "all_gather") else "oracle")
    assert command.main(["--from", str(path), "--compare", str(path)]) == 0
    assert "0 faster" in capsys.readouterr().out


def test_chains_inside_one_jit(monkeypatch, tmp_path):
    """What a GPU is timed by: every step of a chain is executed, and the last one proven."""
    monkeypatch.setattr(sharded, "CHAIN_STEPS", dict.fromkeys(cases.SHARDED, (1, 2)))
    path = tmp_path / "sharded.json"
    arguments = [*SMALL, "--width", "2048", "--k", "8", "--metric", "jit_chain_us"]
    command.main([*arguments, "--dtype", "bfloat16", "--json", str(path)])
    found = results.load(path).records
    assert {record.implementation for record in found} == set(cases.SHARDED)
    assert not any(record.is_wrong for record in found)


def test_no_step_of_a_chain_is_folded_away(cpu_devices):
    mesh = jax.make_mesh(
        (8,), (sharded.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=cpu_devices
    )
    operand = jax.device_put(
        jnp.zeros((3, 512), jnp.float32), jax.NamedSharding(mesh, jax.P(None, sharded.AXIS))
    )
    for function, arguments in (
        (sharded.exchange_function(mesh, 3), sharded.find_candidates(mesh, operand, 4)),
        (sharded.all_gather_function(mesh, 3), [sharded.make_words(mesh, 3, 4, "float32")]),
    ):
        text = function.lower(*arguments).compile().as_text()
        assert hlo.collectives(text) == ["all-gather"] * 3
        # As many bytes in both, which is what makes one the floor of the other.
        assert hlo.all_gather_bytes(text) == [8 * 3 * 4 * 8] * 3


def test_wrong_selections_are_caught(monkeypatch, capsys):
    right = sharding.sharded_top_k

    def wrong(*arguments, **keywords):
        values, indices = right(*arguments, **keywords)
        return [values, indices.at[0, 0].set(indices[0, 1])]

    monkeypatch.setattr(sharding, "sharded_top_k", wrong)
    arguments = [*SMALL, "--width", "1024", "--k", "7", "--implementation", "sharded"]
    assert command.main(arguments) == 1
    assert "WRONG1: sharded 1 x 1024" in capsys.readouterr().err


def test_wrong_bits_are_caught(monkeypatch, capsys):
    monkeypatch.setattr(
        sharded, "exchange_function", lambda mesh, steps: jax.jit(lambda v, i: (v[::-1], i))
    )
    arguments = [*SMALL, "--width", "1024", "--k", "7", "--implementation", "exchange"]
    assert command.main(arguments) == 1
    assert "other bits arrived" in capsys.readouterr().err


def test_a_gather_that_memory_would_not_hold_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(sharded, "MAX_SIMULATED_BYTES", 1000)
    arguments = [*SMALL, "--width", "1024", "--k", "7", "--implementation", "gathered,one_device"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert "gathered is not measured on 1 x 1024" in printed.err
    assert "one device" in printed.out


def test_the_suite_is_the_documented_one():
    blocks = cases.sharded_suite(2)
    found = [(case.rows, case.width, case.devices) for block in blocks for case in block.cases()]
    assert found == [(rows, width, 2) for width in (1 << 20, 1 << 23) for rows in (1, 8, 32)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "sharded", "--devices", "1"], "--devices 1 spreads nothing"),
        (["--suite", "sharded", "--devices", "9999"], "pass --devices 8, or set JAX_PLATFORMS=cpu"),
        (["--devices", "2"], "--devices is for --suite sharded"),
        (["--suite", "sharded", "--devices", "3"], "does not divide by --devices 3"),
        ([*SMALL, "--implementation", "cuda"], "cuda is none of --suite sharded"),
        (["--suite", "cpu", "--implementation", "exchange"], "exchange is none of --suite cpu"),
        ([*SMALL, "--metric", "graph_chain_us"], "nor a metric of a kernel (graph_chain_us)"),
        ([*SMALL, "--metric", "behind_others_us"], "nor a metric of a kernel (behind_others_us)"),
        ([*SMALL, "--plan", "path=exact"], "--suite sharded takes neither"),
        ([*SMALL, "--output", "indices"], "puts out values_sorted"),
        ([*SMALL, "--rank", "0"], "--rank and --coordinator go together"),
        (["--processes", "2"], "--processes is for measuring --suite sharded"),
        ([*SMALL, "--processes", "3"], "--processes 3 does not divide --devices 8"),
        ([*SMALL, "--processes", "2", "--budget", "9"], "--budget would stop the processes"),
        ([*SMALL, "--width", "8192"], "exceeds the 1024 elements that each of 8 devices holds"),
    ],
)
def test_bad_arguments_are_explained(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_two_processes(tmp_path):
    """JAX has not started there: each simulates two of four devices, and proves every result."""
    path = tmp_path / "two.json"
    result = subprocess.run(
        [sys.executable, "-m", "jax_topk.bench", "--suite", "sharded", "--devices", "4"]
        + ["--processes", "2", "--rows", "2", "--width", "1024", "--k", "8", "--quick"]
        + ["--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rows over 4 devices") == 1  # rank 0 alone prints
    found = results.load(path)
    assert found.header["processes"] == 2
    assert {record.implementation for record in found.records} == set(cases.SHARDED)
    assert not any(record.is_wrong for record in found.records)


def test_a_process_that_fails_ends_the_others(monkeypatch, capfd):
    """Rank 1 says why, and rank 0, which would wait for it, is ended."""
    codes = ["import time; time.sleep(100)", "import sys; sys.exit('there is no memory')"]
    monkeypatch.setattr(
        processes,
        "_command",
        lambda arguments, coordinator, rank: [sys.executable, "-c", codes[rank]],
    )
    assert processes.launch(["--processes", "2"], 2) == 1
    assert "there is no memory" in capfd.readouterr().err


# --- tables ---------------------------------------------------------------------------------------


def record(implementation, us, rows=1, width=1 << 20, verified="oracle"):
    case = cases.Case(rows, "full", "normal", 2048, "float32", "values_sorted", width, devices=2)
    return Record.of_case(case, implementation, "jit_chain_us", us, verified, {})


def test_the_exchange_is_judged_at_its_worst():
    records = [record("sharded", 30), record("exchange", 11), record("all_gather", 10)]
    cells = sharded_tables.cells_of(records)
    assert sharded_tables.verdict(cells).endswith(
        "1.10 times its all-gather alone: within the bound of 1.2."
    )
    records += [record(name, us, rows=8) for name, us in (("exchange", 13), ("all_gather", 10))]
    records += [record("sharded", 30, rows=8)]
    assert "not within" in sharded_tables.verdict(sharded_tables.cells_of(records))
    assert "not both measured" in sharded_tables.verdict(sharded_tables.cells_of(records[:1]))


def test_the_exchange_stands_at_every_width():
    records = [record("sharded", 30), record("sharded", 90, width=1 << 23), record("exchange", 11)]
    cells = sharded_tables.cells_of(records)
    assert [cell["exchange"].us for cell in cells.values()] == [11, 11]


def test_the_page_reports_what_is_wrong_and_what_is_missing():
    header = {"target": "sharded-cpu", "devices": 2, "cpus": 2, "jax": "0.12", "date": "2026-01-01"}
    text = sharded_tables.render_measured([Results(header, [record("sharded", 30)])])
    assert text.startswith("On several GPUs: not measured yet.")
    assert "All 1 results proven right" in text
    wrong = record("sharded", 30, verified="WRONG1")
    text = sharded_tables.render_measured([Results(header, [wrong])])
    assert "1 of 1 results were WRONG" in text
    assert "30.0 µs WRONG1" in text
    gpu = {**header, "target": "sharded-gpu", "gpu": "NVIDIA H100"}
    text = sharded_tables.render_measured([Results(gpu, [record("sharded", 30)])])
    assert text.startswith("### 2 × NVIDIA H100")


def test_a_run_on_gpus_is_judged():
    header = {"target": "sharded-gpu", "devices": 2, "gpu": "NVIDIA H100"}
    records = [record("sharded", 30), record("exchange", 11), record("all_gather", 10)]
    lines = []
    sharded_tables.print_tables(Results(header, records), lines.append)
    assert lines[2].split()[-1] == "ratio"
    assert lines[4].split()[-1] == "1.10"
    assert "within the bound of 1.2" in lines[-1]
    assert "1.10 |" in sharded_tables.render_measured([Results(header, records)])


def test_the_page_says_what_the_results_and_the_model_say(tmp_path, capsys):
    assert sharded_tables.main(["--check"]) == 0
    page = tmp_path / "page.md"
    page.write_text(
        sharded_tables.PAGE.read_text().replace("| 1 | 512 |", "| 1 | 513 |"), encoding="utf-8"
    )
    assert sharded_tables.main(["--check", "--page", str(page)]) == 1
    assert "does not say what" in capsys.readouterr().err
    assert sharded_tables.main(["--page", str(page)]) == 0
    assert page.read_text() == sharded_tables.PAGE.read_text()
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        sharded_tables.main(["--page", str(page)])


def test_constants_of_the_model_are_on_the_page():
    """Whoever changes a constant has to say so where readers look."""
    page = sharded_tables.PAGE.read_text()
    assert f"{exchange_model.H100.nvlink / 1000:.0f} GB/s" in page
    assert f"{exchange_model.H100.network / 1000:.0f} GB/s" in page
    for protocol in exchange_model.H100.protocols:
        row = [f"{protocol.base_us:g}", f"{protocol.nvlink_hop_us:g}"]
        row += [f"{protocol.network_hop_us:g}", f"{protocol.post_us:g}"]
        assert f"| {protocol.name} | {' | '.join(row)} |" in page
        for cap in (protocol.nvlink_cap, protocol.network_cap):
            assert math.isinf(cap) or f"{cap / 1000:g} GB/s" in page
