"""The suite over several devices: one row spread over all of them, against what else one could do.

    sharded     `sharded_top_k`: local selection, exchange of candidates, selection
    gathered    `jax.lax.top_k` on the sharded array under jit: XLA gathers the rows first
    one_device  this package's `top_k` on one device that holds the whole rows
    merge       what `sharded_top_k` does after the local selection: exchange, unpacking, selection
    exchange    the exchange alone: this device's k values and indices in, those of all devices in
                its memory; unpacking them is fused into whatever prepares the selection
    all_gather  the floor of the exchange: an all-gather of as many bytes, already in one array

The last three do not depend on the width and are measured once per number of rows.
`sharded_tables.EXCHANGE_RATIO` bounds the ratio of the last two.

The devices may belong to several processes (`processes.py`), each of which then runs all of this in
step with the others.

On a machine without several GPUs the devices are simulated (`request_devices`). They share the
processors and the memory of one machine: such a run shows that the programs are right, and their
volume, and says nothing about the speed of several devices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils

from jax_topk import sharding, top_k

from . import implementations
from .cases import CALL, JIT, SHARDED, Block, Case
from .implementations import IMPOSSIBLE, Selector, wait
from .results import Record
from .runner import Batch, Runner, Settings, _result, _waiting
from .timing import MAX_REPEATS, Stats, interleave, slopes

AXIS = "devices"
"""Name of the mesh axis over which the rows are spread."""

CHAIN_STEPS = {
    "sharded": (4, 16),
    "gathered": (1, 3),
    "one_device": (4, 16),
    "merge": (4, 16),
    "exchange": (4, 24),
    "all_gather": (4, 24),
}
"""Steps of the short and the long chain, whose slope is `jit_chain_us` in this suite."""

MAX_SIMULATED_BYTES = 1 << 30
"""Simulated devices share one memory, and each of them holds what is gathered: a gather that would
leave more than this there is not measured."""

ROUNDS_TOGETHER = 11
"""Samples that each of several processes takes."""

_NO_WORD = -0x5EED
"""As int32 no index, and neither as uint16: what no exchanged word of an index holds."""
_IMPOSSIBLE_WORD = 0xDEAD


def request_devices(count: int) -> None:
    """Asks JAX for `count` simulated CPU devices; in vain once JAX has started its CPU client.

    GPUs are not affected. An `--xla_force_host_platform_device_count` that is set stays in force.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"


def find_devices(platform: str, count: int) -> list[jax.Device]:
    """The first `count` devices of `"gpu"` or `"cpu"`; ValueError if there are fewer."""
    devices = jax.devices(platform)
    if len(devices) < count:
        raise ValueError(
            f"--devices {count}: JAX sees {len(devices)} device(s) of platform "
            f"{platform!r}; pass --devices {len(devices)}, or set JAX_PLATFORMS=cpu to "
            "simulate devices (XLA_FLAGS must not ask for fewer)"
        )
    return devices[:count]


# --- what is timed --------------------------------------------------------------------------------


@functools.cache
def spread_selector(mesh: jax.sharding.Mesh, k: int) -> Selector:
    """`sharded_top_k` over a mesh, as a function of whole rows and lengths."""
    rows, everywhere = jax.P(None, AXIS), jax.P()

    def local(block: Array, lengths: Array | None) -> tuple[Array, Array]:
        values, indices = sharding.sharded_top_k(block, k, axis_name=AXIS, lengths=lengths)
        return values, indices

    def select(operand: Array, lengths: Array | None) -> tuple[Array, Array]:
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, everywhere), out_specs=everywhere)
        return mapped(operand, lengths)

    return select


@functools.cache
def gathering_selector(mesh: jax.sharding.Mesh, k: int, output: str) -> Selector:
    """`jax.lax.top_k` on rows that are spread over a mesh, with the result on every device."""
    select = implementations.selector("lax", k, output)
    everywhere = jax.NamedSharding(mesh, jax.P())

    def everywhere_select(operand: Array, lengths: Array | None) -> tuple[Array | None, Array]:
        values, indices = select(operand, lengths)
        found: tuple[Array, Array] = lax.with_sharding_constraint((values, indices), everywhere)
        return found

    return everywhere_select


def find_candidates(mesh: jax.sharding.Mesh, operand: Array, k: int) -> tuple[Array, Array]:
    """Every device's candidates, `[rows, D * k]` values and global indices, spread as the rows."""

    def local(block: Array) -> tuple[Array, Array]:
        values, indices = top_k(block, k, sorted=False)
        return values, indices + lax.axis_index(AXIS) * block.shape[-1]

    rows = jax.P(None, AXIS)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=(rows, rows))
    return wait(jax.jit(mapped)(operand))


@functools.cache
def exchange_function(mesh: jax.sharding.Mesh, steps: int) -> Callable[[Array, Array], Any]:
    """`steps` exchanges of candidates, each depending on the one before, jitted.

    The next step's candidates are those of this one, unless a gathered word holds an impossible
    value: equal at run time, unknown to the compiler.

    Returns:
        A function of values and indices as `find_candidates` makes them; its results are twice the
        packed candidates of all devices, `[D, rows, words]`.
    """

    def chain(values: Array, indices: Array) -> tuple[Array, Array]:
        for _ in range(steps):
            packed = sharding._pack(values, indices)
            gathered = sharding._all_gather(packed, AXIS, stacked=True)
            last = implementations._barrier(gathered)[0, :, -1:].astype(jnp.int32)
            indices = jnp.where(last == _NO_WORD, last, indices)
        return gathered, gathered

    return _mapped(mesh, chain)


@functools.cache
def merge_function(mesh: jax.sharding.Mesh, k: int, steps: int) -> Callable[[Array, Array], Any]:
    """`steps` times what follows the local selection, chained as `exchange_function`, jitted."""

    def chain(values: Array, indices: Array) -> tuple[Array, Array]:
        for _ in range(steps):
            best, found = sharding._exchange(
                values,
                indices,
                k,
                (AXIS,),
                may_hold_padding=False,
                mode="largest",
                implementation=None,
            )
            first = implementations._barrier(found)[:, :1]
            indices = jnp.where(first < IMPOSSIBLE, first, indices)
        return best, found

    return _mapped(mesh, chain)


def _mapped(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of every device's candidates with replicated results, jitted over the mesh."""
    rows = jax.P(None, AXIS)
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=(rows, rows), out_specs=(jax.P(), jax.P()))
    )


@functools.cache
def all_gather_function(mesh: jax.sharding.Mesh, steps: int) -> Callable[[Array], Any]:
    """`steps` all-gathers of one flat array of words, each depending on the one before, jitted."""

    def chain(words: Array) -> tuple[Array, Array]:
        for _ in range(steps):
            gathered = implementations._barrier(sharding._all_gather(words, AXIS))
            words = jnp.where(gathered[:1] == _IMPOSSIBLE_WORD, gathered[:1], words)
        return gathered, gathered

    spread = jax.P(AXIS)
    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spread, out_specs=(jax.P(), jax.P())))


def make_words(mesh: jax.sharding.Mesh, rows: int, k: int, dtype: str) -> Array:
    """As many bytes per device as its candidates have, as unsigned words spread over the mesh."""
    itemsize = jnp.dtype(dtype).itemsize
    unit = min(itemsize, 4)
    count = mesh.size * rows * k * (itemsize + 4) // unit
    words = np.arange(count).astype(f"uint{8 * unit}")
    words[words == _IMPOSSIBLE_WORD] = 0
    return place(words, mesh, jax.P(AXIS))


def place(x: Any, mesh: jax.sharding.Mesh, spec: Any) -> Array:
    """Puts an array that every process has onto a mesh that may span several processes."""
    sharding = jax.NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return wait(jax.device_put(x, sharding))
    host = np.asarray(x)
    return wait(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]))


def to_host(x: Array) -> np.ndarray:
    """The whole of an array, whichever processes hold its parts; all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def packed_on_host(values: Array, indices: Array, devices: int) -> np.ndarray:
    """What the exchange of these candidates leaves on every device, put together by NumPy."""
    host = [to_host(part) for part in (values, indices)]
    word = np.dtype(f"uint{8 * min(part.dtype.itemsize for part in host)}")
    blocks = zip(*(np.split(part, devices, axis=-1) for part in host), strict=True)
    return np.stack(
        [
            np.concatenate([np.ascontiguousarray(p).view(word) for p in block], axis=-1)
            for block in blocks
        ]
    )


# --- measuring ------------------------------------------------------------------------------------


class ShardedRunner(Runner):
    """Measures cells of the suite over several devices; values are made on the first of them."""

    def __init__(
        self,
        platform: str,
        devices: Sequence[jax.Device],
        settings: Settings,
        say: Callable[[str], None] = print,
    ):
        """Measures nothing yet.

        Args:
            platform: `"gpu"` or `"cpu"`.
            devices: over which rows are spread.
            settings: how much is sampled.
            say: prints a line.
        """
        super().__init__(platform, settings, say)
        self._mesh = jax.make_mesh(
            (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self._exchanged: set[Any] = set()

    def participants(self, block: Block) -> dict[str, tuple[str, ...]]:
        """Metric -> implementations; inside jit on GPUs, single calls on simulated devices."""
        metrics = block.metrics or ((JIT,) if self.platform == "gpu" else (CALL,))
        return dict.fromkeys(metrics, block.implementations or SHARDED)

    def measure(
        self, case: Case, participants: dict[str, tuple[str, ...]], pool_rows: int
    ) -> list[Record]:
        """Measures one cell with every metric and implementation."""
        batch = self._batch_for(case, pool_rows)
        records: list[Record] = []
        for metric, names in participants.items():
            records += self._select(case, batch, metric, names)
            key = (metric, case.rows, case.k, case.dtype)
            if key not in self._exchanged:
                self._exchanged.add(key)
                records += self._move(case, batch, metric, names)
        return records

    def _spread(self, case: Case, batch: Batch) -> Array:
        return place(batch.rows(case.rows), self._mesh, jax.P(None, AXIS))

    def _select(self, case: Case, batch: Batch, metric: str, names: Sequence[str]) -> list[Record]:
        """The three ways to the k best of a row."""
        whole = batch.rows(case.rows)
        spread = self._spread(case, batch)
        lengths = wait(batch.lengths(case)[1][: case.rows])
        everywhere = place(lengths, self._mesh, jax.P())
        native = "cuda" if self.platform == "gpu" else "cpu"
        ways: dict[str, tuple[Selector, Array, Array]] = {
            "sharded": (spread_selector(self._mesh, case.k), spread, everywhere),
            "gathered": (implementations.selector("lax", case.k, case.output), spread, everywhere),
            "one_device": (
                implementations.selector(
                    native if self.is_available(native) else "xla", case.k, case.output
                ),
                whole,
                lengths,
            ),
        }
        gathered_bytes = spread.nbytes * self._mesh.size
        if self.platform == "cpu" and gathered_bytes > MAX_SIMULATED_BYTES and "gathered" in names:
            self._say(
                f"gathered is not measured on {case}: {self._mesh.size} simulated devices would "
                f"hold {gathered_bytes / 2**30:.0f} GiB in one memory"
            )
            del ways["gathered"]
        calls: dict[str, Callable[[], Any]] = {}
        names = [name for name in names if name in ways]
        for name in names:
            select, operand, counts = ways[name]
            if metric == CALL:
                given = None if case.length == "full" else counts
                calls[name] = _waiting(implementations.call_function(select), 1, operand, given)
            else:
                for index, steps in enumerate(CHAIN_STEPS[name]):
                    chain = implementations.chain_function(select, steps)
                    calls[f"{name}/{index}"] = _waiting(chain, 0, operand, counts)

        def verify(name: str, before: Any, after: Any) -> str:
            return self._verify_selections(case, batch, name, before, after)

        # What gathers takes its turns alone: on a CPU it takes and returns so much memory that the
        # calls after it pay for it.
        records = []
        for group in (["gathered"], ["sharded", "one_device"]):
            wanted = [name for name in names if name in group]
            own = {call: f for call, f in calls.items() if call.partition("/")[0] in wanted}
            if wanted:
                records += self._sample(case, metric, wanted, own, verify)
        return records

    def _verify_selections(
        self, case: Case, batch: Batch, name: str, before: Any, after: Any
    ) -> str:
        results = []
        for result in (before, after):
            values, indices = _result(result)
            results.append((np.asarray(values), np.asarray(indices), 0))
        return self._verify_all(case, batch, name, results)

    def _move(self, case: Case, batch: Batch, metric: str, names: Sequence[str]) -> list[Record]:
        """The exchange and its floor."""
        names = [name for name in names if name in ("merge", "exchange", "all_gather")]
        if not names:
            return []
        mesh = self._mesh
        candidates = find_candidates(mesh, self._spread(case, batch), case.k)
        words = make_words(mesh, case.rows, case.k, case.dtype)
        calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            counts = (1,) if metric == CALL else CHAIN_STEPS[name]
            for index, steps in enumerate(counts):
                call = f"{name}/{index}" if metric == JIT else name
                if name == "all_gather":
                    calls[call] = _waiting(all_gather_function(mesh, steps), 0, words)
                elif name == "merge":
                    calls[call] = _waiting(merge_function(mesh, case.k, steps), 0, *candidates)
                else:
                    calls[call] = _waiting(exchange_function(mesh, steps), 0, *candidates)
        sent = {
            "exchange": packed_on_host(*candidates, mesh.size),
            "all_gather": to_host(words),
        }

        def verify(name: str, before: Any, after: Any) -> str:
            if name == "merge":
                return self._verify_selections(case, batch, name, before, after)
            for moment, result in (("before", before), ("after", after)):
                if np.asarray(result[0]).tobytes() != sent[name].tobytes():
                    self._say(f"WRONG {moment} timing: {name} on {case}: other bits arrived")
                    return f"WRONG{case.rows}"
            return "equal"

        return self._sample(case, metric, names, calls, verify)

    def _sample(
        self,
        case: Case,
        metric: str,
        names: Sequence[str],
        calls: dict[str, Callable[[], Any]],
        verify: Callable[[str, Any, Any], str],
    ) -> list[Record]:
        """Times calls in turns; `verify` takes the results before and after."""
        checked = {name: f"{name}/1" if metric == JIT else name for name in names}
        before = {name: calls[call]() for name, call in checked.items()}
        before = {name: jax.tree.map(np.asarray, result) for name, result in before.items()}
        settings, is_alone = self.settings, jax.process_count() == 1
        samples = interleave(
            calls,
            budget_s=settings.budget_s * len(calls),
            # Several processes call equally often, whatever their clocks say.
            min_rounds=settings.min_rounds if is_alone else ROUNDS_TOGETHER,
            max_rounds=settings.max_rounds if is_alone else ROUNDS_TOGETHER,
            max_repeats=MAX_REPEATS if is_alone else 1,
        )
        records = []
        for name in names:
            if metric == JIT:
                short, long = CHAIN_STEPS[name]
                taken = slopes(samples[f"{name}/0"], samples[f"{name}/1"], long - short)
            else:
                taken = samples[name]
            verified = verify(name, before[name], calls[checked[name]]())
            records.append(self._record(case, name, metric, Stats.of(taken), verified))
        return records
