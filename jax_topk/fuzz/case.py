"""One small reproducer as a line of text, made on the host and checked with the NumPy oracle.

    implementation=cuda;dtype=float32;width=5000;k=64;mode=largest;output=sorted;
    plan=path=exact,cluster=4;entry=native;offset=3;rows=relu:7@0+5000!best,nans:9:64:100@10+90!noise

(in one line). A row is `VALUES@START+LENGTH!OUTSIDE`: start and length as they are passed, what
lies outside the window (`generators.OUTSIDE`), and the values of the window: `NAME:SEED` of a
generator, `NAME~NAME:SEED` of two for its halves, followed by `:K:LENGTH` where they are a prefix
of values that were made for another k and length; or `bits:` and bits in hexadecimal, joined by
`_`, `*N` behind those that repeat.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_topk.bench import oracle
from jax_topk.fuzz import generators
from jax_topk.fuzz.batch import DTYPES, GUARD, HEAD, MAX_OFFSET, OUTPUTS, Batch
from jax_topk.fuzz.targets import Call, Target
from jax_topk.fuzz.windows import clamp

__all__ = ["Case", "Row", "case_of_batch", "explicit", "run_case"]

_ENTRIES = ("native", "jit")
_MODES = ("largest", "smallest")
_POISON = np.frombuffer(b"\xa5" * 4, np.int32)[0]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a case.

    Attributes:
        values: as the module's docstring describes them.
        start: not clamped.
        length: not clamped.
        outside: one of `generators.OUTSIDE`.
    """

    values: str
    start: int
    length: int
    outside: str

    def __str__(self) -> str:
        return f"{self.values}@{self.start}+{self.length}!{self.outside}"

    @classmethod
    def parse(cls, text: str) -> Row:
        """Reads what `str` wrote; raises ValueError with a sentence."""
        match = re.fullmatch(r"([^@]+)@(-?\d+)\+(-?\d+)!(\w+)", text)
        if match is None:
            raise ValueError(f"row {text!r} does not have the form VALUES@START+LENGTH!OUTSIDE")
        values, start, length, outside = match.groups()
        if outside not in generators.OUTSIDE:
            raise ValueError(
                f"row {text!r}: what is outside is one of {', '.join(generators.OUTSIDE)}"
            )
        _check_values(values)
        for number in (int(start), int(length)):
            if not -(2**31) <= number < 2**31:
                raise ValueError(f"row {text!r}: {number} is not an int32")
        return cls(values, int(start), int(length), outside)


def _check_values(values: str) -> None:
    name, *numbers = values.split(":")
    if name == "bits":
        if not re.fullmatch(r"([0-9a-f]+(\*\d+)?(_|$))*", ":".join(numbers)):
            raise ValueError(f"{values!r}: bits are hexadecimal numbers HEX or HEX*N joined by _")
        return
    unknown = set(name.split("~")) - set(generators.GENERATORS)
    if unknown or name.count("~") > 1:
        raise ValueError(
            f"{values!r}: values are bits:..., or one generator or two joined by ~, of "
            f"{', '.join(generators.GENERATORS)}"
        )
    if len(numbers) not in (1, 3) or not all(number.isdigit() for number in numbers):
        raise ValueError(f"{values!r} does not have the form NAME:SEED or NAME:SEED:K:LENGTH")
    if int(numbers[0]) >= 2**32:
        raise ValueError(f"{values!r}: the seed must be below 2**32")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and its rows.

    Attributes:
        implementation: `"cuda"`, `"cpu"` or `"xla"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        width: allocated columns.
        k: number of results.
        mode: `"largest"` or `"smallest"`.
        output: `"sorted"`, `"unsorted"` or `"indices"`.
        plan: overrides of the CUDA plan, or `threads=N` for the CPU target.
        entry: `"native"`, or `"jit"` for the public functions.
        offset: elements by which the rows are displaced in their buffer, 0 to 16.
        rows: at least one.
    """

    implementation: str
    dtype: str
    width: int
    k: int
    mode: str
    output: str
    plan: str
    entry: str
    offset: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rows"] = ",".join(map(str, self.rows))
        return ";".join(f"{name}={value}" for name, value in fields.items())

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads what `str` wrote; raises ValueError with a sentence that says what is wrong."""
        fields: dict[str, Any] = {}
        for item in text.strip().split(";"):
            name, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"{item!r} does not have the form NAME=VALUE")
            fields[name] = value
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(fields) != sorted(names):
            raise ValueError(f"a case has the fields {', '.join(names)}, not {', '.join(fields)}")
        for name in ("width", "k", "offset"):
            if not fields[name].isdigit():
                raise ValueError(f"{name}={fields[name]} is not a whole number")
            fields[name] = int(fields[name])
        for name, choices in (
            ("dtype", DTYPES),
            ("mode", _MODES),
            ("output", OUTPUTS),
            ("entry", _ENTRIES),
        ):
            if fields[name] not in choices:
                raise ValueError(f"{name}={fields[name]} is not one of {', '.join(choices)}")
        if fields["k"] > fields["width"] or fields["offset"] > MAX_OFFSET:
            raise ValueError(f"k must not exceed the width, nor offset {MAX_OFFSET}, in {text!r}")
        fields["rows"] = tuple(Row.parse(row) for row in fields["rows"].split(","))
        return cls(**fields)

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Clamped starts and lengths, `[rows]`."""
        return clamp(
            np.array([row.start for row in self.rows]),
            np.array([row.length for row in self.rows]),
            self.width,
        )

    def bits(self) -> np.ndarray:
        """The rows, `[rows, width]` uint32 or uint16."""
        windows = zip(self.rows, *self.windows(), strict=True)
        return np.stack([_row_bits(self, row, int(s), int(n)) for row, s, n in windows])


def _row_bits(case: Case, row: Row, start: int, length: int) -> np.ndarray:
    name, *numbers = row.values.split(":")
    is_explicit = name == "bits"
    made_for = None if is_explicit or len(numbers) == 1 else (int(numbers[2]), int(numbers[1]))
    bits = generators.row_bits(
        ["equal"] if is_explicit else name.split("~"),
        0 if is_explicit else int(numbers[0]),
        row.outside,
        width=case.width,
        start=start,
        length=length,
        k=case.k,
        dtype=case.dtype,
        smallest=case.mode == "smallest",
        made_for=made_for,
    )
    if is_explicit:
        given = _parse_bits(numbers[0], bits.dtype)
        if len(given) < length:
            raise ValueError(f"the window holds {length} elements and {row.values!r} has fewer")
        bits[start : start + length] = given[:length]
    return bits


def _parse_bits(text: str, dtype: np.dtype) -> np.ndarray:
    words: list[int] = []
    for item in filter(None, text.split("_")):
        word, _, count = item.partition("*")
        words += [int(word, 16)] * int(count or 1)
    return np.array(words, np.uint64).astype(dtype)


def explicit(bits: np.ndarray) -> str:
    """Values of a row from their bits."""
    runs = [(word, len(list(group))) for word, group in itertools.groupby(bits.tolist())]
    return "bits:" + "_".join(f"{word:x}" + (f"*{n}" if n > 1 else "") for word, n in runs)


def case_of_batch(implementation: str, batch: Batch, row_numbers: list[int]) -> Case:
    """Rows of one launch of a batch, as a case."""
    launch = batch.launch_of(row_numbers[0])
    rows = []
    for number in row_numbers:
        names = [generators.GENERATORS[int(g[number])] for g in (batch.first, batch.last)]
        values = "~".join(dict.fromkeys(names)) + f":{batch.row_seeds[number]}"
        outside = generators.OUTSIDE[int(batch.outside[number])]
        rows.append(Row(values, int(batch.starts[number]), int(batch.lengths[number]), outside))
    return Case(
        implementation=implementation,
        dtype=batch.dtype,
        width=batch.width,
        k=launch.k,
        mode=_MODES[launch.smallest],
        output=launch.output,
        plan=launch.plan,
        entry=_ENTRIES[launch.uses_api],
        offset=batch.offset,
        rows=tuple(rows),
    )


def run_case(case: Case, target: Target) -> list[str]:
    """Runs a case; returns one sentence for each thing that is wrong.

    Raises:
        RuntimeError: the target refused the call.
    """
    bits = case.bits()
    rows, width, k = len(case.rows), case.width, case.k
    full = np.iinfo(bits.dtype).max
    operand = np.concatenate(
        [
            np.full(HEAD - MAX_OFFSET + case.offset, full >> 1, bits.dtype),
            bits.reshape(-1),
            np.full(GUARD + MAX_OFFSET - case.offset, full, bits.dtype),
        ]
    )
    starts = np.array([row.start for row in case.rows], np.int32)
    lengths = np.array([row.length for row in case.rows], np.int32)
    arena_size = rows * k + 2 * GUARD
    values_poison = np.full(arena_size, _POISON, np.int32).astype(bits.dtype)
    indices_poison = np.full(arena_size, _POISON, np.int32)
    call = Call(
        rows=rows,
        width=width,
        k=k,
        dtype=case.dtype,
        smallest=case.mode == "smallest",
        output=case.output,
        plan=case.plan,
        uses_api=case.entry == "jit",
        operand_begin=HEAD - MAX_OFFSET + case.offset,
        first_row=0,
        out_begin=GUARD,
    )
    # Copies: the target writes into what is placed, which may share memory with its source.
    given = jax.device_put((operand.copy(), starts.copy(), lengths.copy()), target.device)
    arenas = jax.device_put((values_poison.copy(), indices_poison.copy()), target.device)
    jax.block_until_ready((given, arenas))
    found = [np.asarray(arena) for arena in target.run(call, *given, *arenas)]

    problems = []
    for name, array, before in zip(
        ("operand", "starts", "lengths"), given, (operand, starts, lengths), strict=True
    ):
        if not np.array_equal(np.asarray(array), before):
            problems.append(f"the input {name} was changed")
    has_values = case.output != "indices"
    end = GUARD + rows * k
    for name, array, poison, is_written in zip(
        ("values", "indices"),
        found,
        (values_poison, indices_poison),
        (has_values, True),
        strict=True,
    ):
        changed = np.flatnonzero(array != poison)
        outside = changed[(changed < GUARD) | (changed >= (end if is_written else GUARD))]
        if outside.size:
            problems.append(
                f"{outside.size} elements around the {name} were written, the first at"
                f" {outside[0] - GUARD} of {rows * k}"
            )
    expected_values, expected_indices = oracle.top_k(
        bits.view(jnp.dtype(case.dtype)),
        k,
        starts,
        lengths,
        case.mode == "smallest",
        case.output == "sorted",
    )
    expected = [expected_values.view(bits.dtype), expected_indices]
    for name, array, wanted in zip(("values", "indices"), found, expected, strict=True):
        if name == "values" and not has_values:
            continue
        wrong = np.argwhere(array[GUARD:end].reshape(rows, k) != wanted)
        if len(wrong):
            row, place = (int(n) for n in wrong[0])
            is_value = name == "values"
            shown = [hex(x) if is_value else int(x) for x in (
                array[GUARD + row * k + place], wanted[row, place])]  # fmt: skip
            problems.append(
                f"{len(wrong)} {name} are wrong, the first in row {row} at place {place}:"
                f" {shown[0]} instead of {shown[1]}"
            )
    return problems
