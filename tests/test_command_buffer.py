"""XLA places the call inside a command buffer (a CUDA graph), straight and inside a while body.

XLA is made to dump its thunk sequence in a process of its own. A control run in which no run of
thunks is long enough for a command buffer must show the call outside of any, so that the search is
known to tell them apart.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[1]

PROGRAM = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import jax, jax.numpy as jnp, numpy as np
import jax_topk
from jax_topk.bench import oracle

WIDTH, K, STEPS = 20_000, 512, 6
x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)

def select(x, lengths):
    return jax_topk.top_k_indices(x, K, lengths=lengths, implementation="cuda")

@jax.jit
def straight(x, lengths):
    total = jnp.zeros((4, K), jnp.int32)
    for _ in range(STEPS):
        indices = select(x, lengths)
        # A real dependency of the next lengths on these indices.
        lengths = lengths - 1 - (indices[:, 0] < -5)
        total += indices
    return total

@jax.jit
def loop(x, lengths):
    def body(_, state):
        lengths, total = state
        indices = select(x, lengths)
        return lengths - 1 - (indices[:, 0] < -5), total + indices
    return jax.lax.fori_loop(0, STEPS, body, (lengths, jnp.zeros((4, K), jnp.int32)))[1]

for function in (straight, loop):
    for seed in range(4):  # replays with other lengths, and other addresses
        lengths = np.random.default_rng(seed).integers(0, WIDTH, 4).astype(np.int32)
        keep = jnp.ones((1 + seed) * 1_000_000)
        result = np.asarray(function(jnp.array(x), jnp.array(lengths)))
        wanted = sum(oracle.top_k_indices(x, K, None, lengths - step) for step in range(STEPS))
        np.testing.assert_array_equal(result, wanted)
print("all equal")
"""


def sequences(dump: pathlib.Path) -> list[pathlib.Path]:
    """The dumped thunk sequences; of each module, the last one is the one that is executed."""
    found = dump.glob("*.thunk_sequence*.txt")
    return sorted(found, key=lambda path: ("after_thunk_passes" in path.name, path.name))


def thunks_around_the_call(dump: pathlib.Path) -> dict[str, list[list[str]]]:
    """For each dumped module: the thunks that enclose each of our custom calls, outermost first."""
    found: dict[str, list[list[str]]] = {}
    # Where no thunk pass changes the sequence, XLA dumps it only as it was before.
    paths = {path.name.split(".thunk_sequence")[0]: path for path in sequences(dump)}
    for path in paths.values():
        enclosing: list[tuple[int, str]] = []
        for line in path.read_text().splitlines():
            match = re.search(r"\bk[A-Z]\w+", line)
            if match is None:
                continue
            depth = len(line) - len(line.lstrip())
            while enclosing and enclosing[-1][0] >= depth:
                enclosing.pop()
            if match.group() == "kCustomCall":
                found.setdefault(path.name, []).append([kind for _, kind in enclosing])
            enclosing.append((depth, match.group()))
    return found


def run(dump: pathlib.Path, flags: str) -> dict[str, list[list[str]]]:
    program = PROGRAM.format(tests=str(ROOT / "tests"), root=str(ROOT))
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_pass_re=NONE {flags}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines()[-1] == "all equal"
    return thunks_around_the_call(dump)


def test_the_call_is_inside_a_command_buffer(tmp_path):
    found = run(tmp_path, "--xla_gpu_graph_min_graph_size=1")
    straight = [calls for name, calls in found.items() if "jit_straight" in name]
    loop = [calls for name, calls in found.items() if "jit_loop" in name]
    assert straight, f"no thunk sequence of the straight program was dumped: {sorted(found)}"
    assert loop, f"no thunk sequence of the loop was dumped: {sorted(found)}"
    for calls in (*straight, *loop):
        for enclosing in calls:
            assert "kCommandBuffer" in enclosing, f"a call lies outside, in {enclosing}"
    assert sum(map(len, straight)) >= 6


def test_the_search_tells_inside_from_outside(tmp_path):
    found = run(tmp_path, "--xla_gpu_graph_min_graph_size=1000")
    calls = [enclosing for calls in found.values() for enclosing in calls]
    assert calls, f"no call in the dumped files {sorted(path.name for path in tmp_path.iterdir())}"
    assert not any("kCommandBuffer" in enclosing for enclosing in calls)
    assert any("kWhile" in enclosing for enclosing in calls)
