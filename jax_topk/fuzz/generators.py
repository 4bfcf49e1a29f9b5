"""What rows hold: values made to break guesses, sums of counts, tie rules and comparisons.

A generator is a pure function of the place of an element in its row's window and of the row's seed,
in integer arithmetic and conversions that every platform rounds alike. So NumPy and XLA on any
device make the same bits (`rows_of` and the fuzzer's programs call the same functions), elements
cost no state, and one row of a large batch can be made again alone, which is what a replay does.

Two kinds: *value* generators give an integer and a power of two, whose product is rounded to the
dtype; *bits* generators give bits of the dtype itself. `GENERATORS` names all of them; the first
line of a generator's docstring says what it is and what it is meant to break.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "GENERATORS",
    "INFINITY_BITS",
    "OUTSIDE",
    "Elements",
    "bits_of_keys",
    "describe",
    "make_bits",
    "row_bits",
]

INFINITY_BITS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
"""Bits of +inf; its exponent field is all ones."""

OUTSIDE = ("best", "infinity", "worst", "large", "noise")
"""What lies outside the window: the pattern that beats all others in the mode (a NaN with a full
payload and the winning sign), +inf or -inf, the pattern that loses to all others, the largest
finite value with the winning sign, or random bits."""

_UNIT = np.float32(2.0**-21)  # of `Elements.normal`


def _mix(xp: Any, x: Any) -> Any:
    """A bijection of uint32 that looks random (`lowbias32`, C. Wellons, github.com/skeeto)."""
    x = x ^ (x >> xp.uint32(16))
    x = x * xp.uint32(0x7FEB352D)
    x = x ^ (x >> xp.uint32(15))
    x = x * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


@dataclasses.dataclass(frozen=True)
class Elements:
    """The elements of rows, and what a generator may ask about them.

    Attributes:
        xp: `numpy` or `jax.numpy`; all arrays are its own.
        column: `[rows, n]` uint32, places counted from the window's start (outside the window they
            wrap around, and what is made there is not used).
        length: `[rows, 1]` uint32, at least 1.
        k: `[rows, 1]` uint32.
        seed: `[rows, 1]` uint32.
        num_bits: 32 or 16, static.
        infinity: `[1, 1]` uint32, one of `INFINITY_BITS`.
    """

    xp: Any
    column: Any
    length: Any
    k: Any
    seed: Any
    num_bits: int
    infinity: Any

    def u32(self, value: int) -> Any:
        """A uint32 constant `[1, 1]`."""
        return self.xp.full((1, 1), value, self.xp.uint32)

    @property
    def sign(self) -> Any:
        """The sign bit of the dtype."""
        return self.u32(1 << (self.num_bits - 1))

    def choice(self, stream: int) -> Any:
        """A random uint32 per row, `[rows, 1]`."""
        return _mix(self.xp, self.seed + self.u32((stream * 0x9E3779B9) & 0xFFFFFFFF))

    def random_at(self, place: Any, stream: int) -> Any:
        """A random uint32 per element, a function of `place` (uint32) and the row."""
        return _mix(self.xp, place * self.u32(0x9E3779B9) + self.choice(stream + 16))

    def random(self, stream: int) -> Any:
        """A random uint32 per element."""
        return self.random_at(self.column, stream)

    @property
    def normal(self) -> Any:
        """int32, nearly normal with a deviation of about 2.4 million: 1.15 in units of 2**-21."""
        xp, low = self.xp, self.u32(0xFFFF)
        a, b = self.random(0), self.random(1)
        total = (a & low) + (a >> self.u32(16)) + (b & low) + (b >> self.u32(16))
        fine = total * self.u32(64) + (_mix(xp, a ^ b) & self.u32(63))
        return fine.astype(xp.int32) - xp.int32(131070 * 64)

    @property
    def random_payload(self) -> Any:
        """Bits of NaNs of both signs, quiet and signalling, with random payloads."""
        payload = self.random(2)
        mantissa = self.infinity ^ (self.sign - self.u32(1))
        quiet_or_not = self.xp.maximum(payload & mantissa, self.u32(1))
        return self.infinity | quiet_or_not | self.random_sign

    @property
    def random_sign(self) -> Any:
        """The sign bit, or 0."""
        return self.xp.where((self.random(3) & self.u32(1)) == 0, self.u32(0), self.sign)


def bits_of_keys(xp: Any, keys: Any, num_bits: int) -> Any:
    """Bits of a float whose ordered key (larger is better) is given; the inverse of the order."""
    sign = xp.full((1, 1), 1 << (num_bits - 1), xp.uint32)
    full = xp.full((1, 1), (1 << num_bits) - 1, xp.uint32)
    return xp.where((keys & sign) != 0, keys ^ sign, ~keys & full)


Value = tuple[Any, np.float32]

# --- values ---------------------------------------------------------------------------------------


def _normal(e: Elements) -> Value:
    """Nearly normal values: the ordinary case."""
    return e.normal, _UNIT


def _clustered(e: Elements) -> Value:
    """10 + 0.14 N: nearly all values share a few coarse bins, so candidate lists overflow."""
    return e.xp.int32(10 << 21) + (e.normal >> e.xp.int32(3)), _UNIT


def _few(e: Elements) -> Value:
    """2 to 8 distinct values: long runs of ties at every level, also at the k-th value."""
    levels = e.u32(2) + e.choice(0) % e.u32(7)
    return (e.random(0) % levels).astype(e.xp.int32) - e.xp.int32(3), np.float32(1)


def _head(e: Elements) -> Value:
    """All winners at one end of the row: one of several workers gets all the work."""
    xp = e.xp
    is_at_end = (e.choice(0) & e.u32(1)) != 0
    size = xp.where((e.choice(1) & e.u32(1)) != 0, e.k * e.u32(2), e.length // e.u32(7) + e.u32(1))
    place = xp.where(is_at_end, e.length - e.u32(1) - e.column, e.column)
    return e.normal + xp.where(place < size, xp.int32(100 << 21), xp.int32(0)), _UNIT


def _relu(e: Elements) -> Value:
    """ReLU scores: a plateau of exact zeros that crosses, or nearly crosses, the k-th value."""
    xp = e.xp
    shares = e.choice(0) % e.u32(3)
    share = xp.where(shares == 0, e.k // e.u32(2), xp.where(shares == 1, e.k, e.k * e.u32(2)))
    is_positive = e.random(1) % e.length < share
    positive = (e.random(0) >> e.u32(9)).astype(xp.int32) + xp.int32(1)
    return xp.where(is_positive, positive, xp.int32(0)), _UNIT


def _outlier(e: Elements) -> Value:
    """One value far away, among equal or ordinary ones: a linear map gives it all the bins."""
    xp = e.xp
    rest = xp.where((e.choice(0) & e.u32(1)) != 0, xp.int32(1 << 21), e.normal)
    far = xp.where((e.choice(1) & e.u32(1)) != 0, xp.int32(2**30), xp.int32(-(2**30)))
    return xp.where(e.column == e.choice(2) % e.length, far, rest), _UNIT


def _period(e: Elements) -> Any:
    """Whether an element lies on the row's period of 4, 16 or 64, at a random offset."""
    which = e.choice(4) % e.u32(3)
    period = e.xp.where(which == 0, e.u32(4), e.xp.where(which == 1, e.u32(16), e.u32(64)))
    return e.column % period == e.choice(5) % period


def _spikes(e: Elements) -> Value:
    """Raised on a period of 4, 16 or 64: a sample on a stride sees large values only, or none."""
    return e.normal + e.xp.where(_period(e), e.xp.int32(8 << 21), e.xp.int32(0)), _UNIT


def _hidden(e: Elements) -> Value:
    """Lowered on a period of 4, 16 or 64: a sample there promises far too little."""
    return e.normal - e.xp.where(_period(e), e.xp.int32(8 << 21), e.xp.int32(0)), _UNIT


def _stripes(e: Elements) -> Value:
    """Raised in one of 16 chunks of 32 to 4096: one part of a dealt row holds all winners."""
    shift = e.u32(5) + e.choice(0) % e.u32(8)
    is_large = (e.column >> shift) % e.u32(16) == e.choice(1) % e.u32(16)
    return e.normal + e.xp.where(is_large, e.xp.int32(8 << 21), e.xp.int32(0)), _UNIT


def _around_k(e: Elements) -> Value:
    """Exactly k - 1, k or k + 1 large entries, evenly spread, above a plateau of one value."""
    xp = e.xp
    count = xp.minimum(e.k + e.choice(0) % e.u32(3) - (e.k != 0).astype(xp.uint32), e.length)
    # Multiplied in 32 bits: exact while length * (k + 1) is below 2**32.
    is_large = (e.column + e.u32(1)) * count // e.length > e.column * count // e.length
    distinct = (e.random(0) >> e.u32(10)).astype(xp.int32)
    spread = xp.where((e.choice(1) & e.u32(1)) != 0, distinct, xp.int32(0))
    return xp.where(is_large, xp.int32(1 << 22) + spread, xp.int32(1 << 21)), _UNIT


# --- bits -----------------------------------------------------------------------------------------


def _equal(e: Elements) -> Any:
    """One value everywhere, ordinary or any pattern: all is a tie, and the lowest indices win."""
    random = e.choice(0) >> e.u32(32 - e.num_bits)
    # 1.0 in every format: all bits of the exponent but the highest.
    one = (e.infinity >> e.u32(1)) & e.infinity
    return e.xp.where((e.choice(1) & e.u32(1)) != 0, random, one)


def _finite_keys(e: Elements) -> tuple[Any, Any]:
    """The lowest and the highest ordered key of a finite value, `[1, 1]`."""
    highest = e.sign | (e.infinity - e.u32(1))
    return e.u32((1 << e.num_bits) - 1) - highest, highest


def _ramp(e: Elements) -> Any:
    """Ascending keys `[rows, n]`: over all finite values, or one key apart in a single bin."""
    lowest, highest = _finite_keys(e)
    span = highest - lowest
    if e.num_bits == 32:
        wide = span // e.length
        step = e.xp.where((e.choice(0) & e.u32(1)) != 0, wide, e.u32(1))
        jitter = e.random(0) % e.xp.maximum(step, e.u32(1))
        return (
            lowest
            + e.xp.where(step == 1, span - e.length, e.u32(0)) // e.u32(2)
            + (e.column * step + jitter)
        )
    # 16 bits: rows are longer than there are keys. A twelfth of the range for most.
    wide = e.column * (span >> e.u32(4)) // e.length * e.u32(16)
    narrow = (span >> e.u32(1)) + e.column * e.u32(256) // e.length
    return lowest + e.xp.where((e.choice(0) & e.u32(1)) != 0, wide, narrow)


def _ascending(e: Elements) -> Any:
    """Sorted, the best at the end: every guess from the beginning is refuted."""
    return bits_of_keys(e.xp, _ramp(e), e.num_bits)


def _descending(e: Elements) -> Any:
    """Sorted, the best at the beginning: a sample elsewhere misses them."""
    backwards = dataclasses.replace(e, column=e.length - e.u32(1) - e.column)
    return bits_of_keys(e.xp, _ramp(backwards), e.num_bits)


def _one_bin(e: Elements) -> Any:
    """64 neighbouring keys around a random finite value: no coarse bin separates them."""
    lowest, highest = _finite_keys(e)
    first = lowest + e.choice(0) % (highest - lowest - e.u32(64))
    return bits_of_keys(e.xp, first + (e.random(0) & e.u32(63)), e.num_bits)


def _runs(e: Elements) -> Any:
    """Runs of 8 or 64 equal values: a sample says less than its size promises."""
    lowest, highest = _finite_keys(e)
    shift = e.xp.where((e.choice(0) & e.u32(1)) != 0, e.u32(3), e.u32(6))
    keys = lowest + e.random_at(e.column >> shift, 0) % (highest - lowest)
    return bits_of_keys(e.xp, keys, e.num_bits)


def _zeros(e: Elements) -> Any:
    """+0.0 and -0.0: the former is above the latter, whatever their places."""
    return e.random_sign


def _subnormals(e: Elements) -> Any:
    """Subnormals and zeros of both signs, which arithmetic may flush and comparisons may merge."""
    mantissa = e.infinity ^ (e.sign - e.u32(1))
    few = e.xp.where((e.choice(0) & e.u32(1)) != 0, mantissa, e.u32(7))
    return (e.random(0) & mantissa & few) | e.random_sign


def _only_infinity(e: Elements) -> Any:
    """The same infinity everywhere: as many real worst (or best) values as there are places."""
    flip = e.xp.where((e.choice(0) & e.u32(1)) != 0, e.sign, e.u32(0))
    return e.infinity | flip


def _some_infinities(e: Elements) -> Any:
    """A third -inf and a ninth +inf among finite bits: real ones must not pass for padding."""
    which = e.random(1) % e.u32(9)
    finite = _exponents(e)
    bits = e.xp.where(which < e.u32(3), e.infinity | e.sign, finite)
    return e.xp.where(which == e.u32(3), e.infinity, bits)


def _nans(e: Elements) -> Any:
    """A quarter NaNs of both signs, quiet and signalling, many payloads, among finite bits."""
    is_nan = (e.random(1) & e.u32(3)) == 0
    return e.xp.where(is_nan, e.random_payload, _exponents(e))


def _extreme_bits(e: Elements) -> Any:
    """Half the lowest (or highest) pattern of the order, which code likes to use as filler."""
    full = e.u32((1 << e.num_bits) - 1)
    filler = e.xp.where((e.choice(0) & e.u32(1)) != 0, full, full ^ e.sign)
    return e.xp.where((e.random(1) & e.u32(1)) == 0, filler, _exponents(e))


def _random_bits(e: Elements) -> Any:
    """Every bit pattern is equally likely: all exponents, and NaNs."""
    return e.random(0) >> e.u32(32 - e.num_bits)


def _exponents(e: Elements) -> Any:
    """Every finite pattern is equally likely: half the row is tiny, and no linear map fits."""
    bits = e.random(0) >> e.u32(32 - e.num_bits)
    # An exponent of all ones loses its lowest bit.
    lowest_exponent_bit = (e.infinity ^ (e.infinity << e.u32(1))) & e.infinity
    return e.xp.where((bits & e.infinity) == e.infinity, bits ^ lowest_exponent_bit, bits)


_VALUES: tuple[Callable[[Elements], Value], ...] = (
    *(_normal, _clustered, _few, _head, _relu, _outlier, _spikes, _hidden, _stripes, _around_k),
)
_BITS: tuple[Callable[[Elements], Any], ...] = (
    *(_equal, _ascending, _descending, _one_bin, _runs, _zeros, _subnormals, _only_infinity),
    *(_some_infinities, _nans, _extreme_bits, _random_bits, _exponents),
)

GENERATORS: tuple[str, ...] = tuple(f.__name__.lstrip("_") for f in (*_VALUES, *_BITS))
"""Names of all generators; a generator's number is its place here."""


def describe() -> dict[str, str]:
    """Name of each generator -> the first line of its docstring."""
    return {
        name: (function.__doc__ or "").splitlines()[0]
        for name, function in zip(GENERATORS, (*_VALUES, *_BITS), strict=True)
    }


def make_bits(
    e: Elements,
    which: Any,
    to_bits: Callable[[Any], Any],
) -> Any:
    """Bits of every element.

    Args:
        e: the elements.
        which: `[rows, n]` or `[rows, 1]` uint32, the number of each element's generator.
        to_bits: rounds float32 values to the dtype and gives their bits as uint32.

    Returns:
        `[rows, n]` uint32, of which the low `e.num_bits` are used.
    """
    xp = e.xp
    value = xp.zeros(e.column.shape, xp.float32)
    for number, make_value in enumerate(_VALUES):
        integer, unit = make_value(e)
        value = xp.where(which == xp.uint32(number), integer.astype(xp.float32) * unit, value)
    bits = to_bits(value)
    for number, make in enumerate(_BITS, start=len(_VALUES)):
        bits = xp.where(which == xp.uint32(number), make(e), bits)
    return bits


def outside_bits(e: Elements, kind: Any, is_smallest: Any) -> Any:
    """What lies outside the windows, as `OUTSIDE` lists it; random bits for `noise`.

    Args:
        e: the elements.
        kind: `[rows, 1]` uint32, a place in `OUTSIDE`.
        is_smallest: `[rows, 1]` bool, the mode.

    Returns:
        `[rows, n]` uint32.
    """
    xp = e.xp
    full = e.u32((1 << e.num_bits) - 1)
    winning_sign = xp.where(is_smallest, e.sign, e.u32(0))
    best = (full ^ e.sign) | winning_sign
    bits = _random_bits(e)
    for number, pattern in enumerate(
        (best, e.infinity | winning_sign, best ^ e.sign, (e.infinity - e.u32(1)) | winning_sign)
    ):
        bits = xp.where(kind == xp.uint32(number), pattern, bits)
    return bits


def row_bits(
    generators: Sequence[str],
    seed: int,
    outside: str,
    *,
    width: int,
    start: int,
    length: int,
    k: int,
    dtype: str,
    smallest: bool,
    made_for: tuple[int, int] | None = None,
) -> np.ndarray:
    """One row from NumPy, the same bits as in a batch.

    Args:
        generators: one name, or two: the first half of the window is of the first.
        seed: of the row, `0 <= seed < 2**32`.
        outside: one of `OUTSIDE`.
        width: allocated columns.
        start: clamped start of the window.
        length: clamped length of the window.
        k: number of results.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        smallest: the mode, which decides what a winning pattern outside is.
        made_for: the length and k that the generator goes by, if not those of the window: a prefix
            of a longer window.

    Returns:
        `[width]` uint32 or uint16.
    """
    num_bits = 32 if dtype == "float32" else 16
    made_length, made_k = made_for or (length, k)

    def column_vector(value: int) -> np.ndarray:
        return np.full((1, 1), value, np.uint32)

    place = np.arange(width, dtype=np.int64) - start
    e = Elements(
        np,
        (place & 0xFFFFFFFF).astype(np.uint32)[None],
        column_vector(max(made_length, 1)),
        column_vector(made_k),
        column_vector(seed),
        num_bits,
        column_vector(INFINITY_BITS[dtype]),
    )
    first, last = (np.uint32(GENERATORS.index(name)) for name in (generators[0], generators[-1]))
    which = np.where(place[None] < made_length // 2, first, last)

    def to_bits(value: np.ndarray) -> np.ndarray:
        if dtype == "float32":
            return value.view(np.uint32)
        narrow = value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        return narrow.view(np.uint16).astype(np.uint32)

    with np.errstate(over="ignore"):
        bits = make_bits(e, which, to_bits)
        poison = outside_bits(e, column_vector(OUTSIDE.index(outside)), np.full((1, 1), smallest))
    is_inside = (place >= 0) & (place < length)
    merged = np.where(is_inside[None], bits, poison)[0]
    return merged.astype(np.uint32 if num_bits == 32 else np.uint16)
