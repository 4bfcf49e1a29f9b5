"""Cells of the bench and the blocks and suites that they come from.

A `Block` is a full product (rows x lengths x distributions x ...); a suite is a list of blocks. All
of it is plain data: nothing here touches a device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

Length = int | str
"""Valid entries per row: a number, `"mixed"` (log-uniform) or `"full"` (no lengths argument)."""

WIDTH = 163840
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS: tuple[Length, ...] = (
    *(2048, 4096, 8192, 16384, 32768, 65536, 96000, 128000, 163840),
    "mixed",
)
SHORT_LENGTHS: tuple[Length, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
DISTRIBUTIONS = ("normal", "clust", "equal", "sorted")
HOSTILE_DISTRIBUTIONS = ("clust", "equal", "sorted", "sorted_desc", "head", "relu")
ADVERSARIAL_DISTRIBUTIONS = ("periodic", "striped", "hidden")
K = 2048

DTYPES = ("float32", "bfloat16", "float16")
OUTPUTS = ("indices", "values_sorted", "values_unsorted")

GRAPH, OTHERS, JIT, CALL = "graph_chain_us", "behind_others_us", "jit_chain_us", "call_us"
METRICS = (GRAPH, OTHERS, JIT, CALL)
"""What `--metric` offers; `timing.py` defines them."""
STREAM = "stream_chain_us"
"""Stands for `graph_chain_us` where a library's launches cannot be captured in a CUDA graph."""

PACKAGE = ("cuda", "cpu", "xla")
"""Names under which this package's own implementations are recorded."""
IMPLEMENTATIONS = (*PACKAGE, "lax", "torch", "flashinfer")
FLOORS = ("floor_empty", "floor_read", "dependency_floor")

SHARDED = ("sharded", "gathered", "one_device", "merge", "exchange", "all_gather")
"""Implementations of the suite over several devices; `sharded.py` defines them."""
SHARDED_ROWS = (1, 8, 32)
SHARDED_WIDTHS = (1 << 20, 1 << 23)


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell: the job that every implementation is given.

    Attributes:
        rows: rows of the batch.
        length: valid entries per row, see `Length`.
        distribution: name of the generator of values, see `inputs.GENERATORS`.
        k: entries selected per row.
        dtype: dtype of the values.
        output: `"indices"` (ascending), `"values_sorted"` (both, best first) or
            `"values_unsorted"` (both, ascending index).
        width: allocated columns of a row.
        plan: overrides of this package's launch plan (`"path=exact"`); empty: none.
        cold: whether launches rotate over enough rows that the L2 cache never holds the next ones.
        devices: over how many devices each row is spread.
    """

    rows: int
    length: Length
    distribution: str
    k: int
    dtype: str
    output: str
    width: int
    plan: str = ""
    cold: bool = False
    devices: int = 1

    def __str__(self) -> str:
        """Short form for progress and messages."""
        text = f"{self.rows} x {self.length} {self.distribution} k={self.k} {self.dtype}"
        extras = (
            self.output if self.output != "indices" else "",
            f"width={self.width}" if self.width != WIDTH and self.length != "full" else "",
            f"plan={self.plan}" if self.plan else "",
            "cold" if self.cold else "",
            f"over {self.devices} devices" if self.devices > 1 else "",
        )
        if self.length == "full":
            text = f"{self.rows} x {self.width} {self.distribution} k={self.k} {self.dtype}"
        return " ".join((text, *filter(None, extras)))


@dataclasses.dataclass(frozen=True)
class Block:
    """A product of cells measured with the same implementations and metrics.

    An empty `implementations` or `metrics` stands for what the platform offers.
    """

    rows: tuple[int, ...] = ROWS
    lengths: tuple[Length, ...] = LENGTHS
    distributions: tuple[str, ...] = DISTRIBUTIONS
    ks: tuple[int, ...] = (K,)
    dtypes: tuple[str, ...] = ("float32",)
    outputs: tuple[str, ...] = ("indices",)
    width: int = WIDTH
    plan: str = ""
    cold: bool = False
    devices: int = 1
    implementations: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def cases(self) -> Iterator[Case]:
        """Yields the legal cells: k and every numeric length must fit into the width."""
        product = itertools.product(
            self.distributions, self.dtypes, self.ks, self.outputs, self.rows, self.lengths
        )
        for distribution, dtype, k, output, rows, length in product:
            if k <= self.width and (isinstance(length, str) or length <= self.width):
                yield Case(
                    rows,
                    length,
                    distribution,
                    k,
                    dtype,
                    output,
                    self.width,
                    self.plan,
                    self.cold,
                    self.devices,
                )

    def num_skipped(self) -> int:
        """Cells of the product that do not fit into the width."""
        fitting = sum(k <= self.width for k in self.ks) * sum(
            isinstance(length, str) or length <= self.width for length in self.lengths
        )
        others = len(self.distributions) * len(self.dtypes) * len(self.outputs) * len(self.rows)
        return others * (len(self.ks) * len(self.lengths) - fitting)


CPU_ROWS = (1, 4, 32, 256)
CPU_WIDTHS = (128, 512, 1024, 4096, 16384, 163840)
CPU_KS = (1, 8, 16, 64, 512, 2048)


def cpu_suite() -> list[Block]:
    """The grid of the CPU target against `jax.lax.top_k`, and ragged batches.

    `"full"` cells give no lengths, so that `lax.top_k` runs on the operand as it is: the drop-in
    comparison, at its best for `lax`.
    """
    grid = Block(
        rows=CPU_ROWS,
        lengths=("full",),
        distributions=("normal",),
        ks=CPU_KS,
        outputs=("values_sorted",),
        implementations=("cpu", "lax"),
        metrics=(CALL,),
    )
    ragged = replace(grid, rows=(4, 32), lengths=("mixed",), ks=(64, 2048))
    large = replace(grid, rows=(1, 32), ks=(K,))
    return [
        *(replace(grid, width=width) for width in CPU_WIDTHS),
        *(replace(ragged, width=width) for width in (16384, WIDTH)),
        replace(large, distributions=HOSTILE_DISTRIBUTIONS),
        replace(large, outputs=("indices",)),
        replace(large, dtypes=("bfloat16", "float16")),
    ]


def full_suite() -> list[Block]:
    """Everything the committed GPU results hold: every target of the project is judged from it.

    The blocks are ordered by weight of evidence, so that a run cut short keeps what matters most.
    """
    grid = Block(distributions=("normal",), implementations=("cuda",), metrics=(GRAPH,))
    return [
        # The grid against the peers, inside one jit next to lax, and next to torch.
        replace(grid, distributions=("normal", "clust")),
        replace(grid, implementations=("cuda", "lax"), metrics=(JIT,)),
        replace(grid, implementations=("torch", "flashinfer")),
        # As in a decode step.
        replace(grid, metrics=(OTHERS,)),
        # The values must not matter.
        replace(grid, distributions=HOSTILE_DISTRIBUTIONS[1:]),
        replace(grid, distributions=ADVERSARIAL_DISTRIBUTIONS),
        # Values out, other k, other dtypes.
        replace(grid, outputs=("values_sorted", "values_unsorted")),
        replace(grid, ks=(64, 256, 512, 1024, 4096)),
        replace(grid, dtypes=("bfloat16", "float16")),
        # Short rows: in the wide buffer and in a buffer of just their size.
        replace(grid, lengths=SHORT_LENGTHS[:4]),
        replace(grid, lengths=SHORT_LENGTHS, width=8192),
        # Long rows that the L2 cache does not hold.
        replace(grid, rows=(64, 128, 256), lengths=LENGTHS[5:], cold=True),
    ]


def sharded_suite(devices: int) -> list[Block]:
    """Rows of a million and of eight million elements, each spread over all devices."""
    block = Block(
        rows=SHARDED_ROWS,
        lengths=("full",),
        distributions=("normal",),
        outputs=("values_sorted",),
        devices=devices,
    )
    return [replace(block, width=width) for width in SHARDED_WIDTHS]


def quick(block: Block) -> Block:
    """A corner of a block: few rows, few lengths, at most two distributions."""
    rows = tuple(r for r in (1, 32, 256) if r in block.rows) or block.rows[:1]
    wanted: tuple[Length, ...] = (4096, 32768, WIDTH, "mixed", "full")
    lengths = tuple(n for n in wanted if n in block.lengths) or block.lengths[:1]
    return replace(block, rows=rows, lengths=lengths, distributions=block.distributions[:2])


SUITES = ("grid", "full", "cpu", "sharded")


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    """Parses `"1,2,64"`; raises ValueError with a sentence."""
    try:
        numbers = tuple(int(item.replace("_", "")) for item in text.split(","))
    except ValueError:
        raise ValueError(
            f"{what}={text!r} is not a list of whole numbers; pass for instance 1,32,256"
        ) from None
    if any(number < 0 for number in numbers):
        raise ValueError(f"{what}={text!r} holds a negative number; pass numbers from 0 on")
    return numbers


def parse_lengths(text: str) -> tuple[Length, ...]:
    """Parses `"2048,mixed,full"`; raises ValueError with a sentence."""
    words = ("mixed", "full")
    return tuple(
        item if item in words else parse_numbers(item, "length")[0] for item in text.split(",")
    )


def parse_choices(text: str, choices: Iterable[str], what: str) -> tuple[str, ...]:
    """Parses a comma-separated list of `choices`; raises ValueError with a sentence."""
    choices = tuple(choices)
    items = tuple(text.split(","))
    unknown = [item for item in items if item not in choices]
    if unknown:
        raise ValueError(f"{what}={unknown[0]!r} is unknown; choose from {', '.join(choices)}")
    return items
