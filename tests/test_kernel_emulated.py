"""The CUDA kernel's own code, run on the CPU thread by thread: exact, on any machine.

Memory ordering needs a GPU (tests/test_cuda.py and compute-sanitizer); everything else that can go
wrong in the kernel fails here, without one: wrong order, lost candidates, missing barriers and
waits, deadlocks, reads and writes out of bounds, stale shared memory. `tests/mutations` plants such
defects and shows that they do.
"""

from __future__ import annotations

import ctypes
import math
import pathlib

import emulation
import inputs
import jax.numpy as jnp
import numpy as np
import pytest

from jax_topk.bench import oracle

ROOT = pathlib.Path(__file__).parents[1]
DTYPES = [np.float32, jnp.bfloat16, np.float16]
PLANS = [
    "",
    "path=exact",
    "path=sample",
    "path=sample,cluster=16,part=300",
    "path=exact,cluster=5,part=100",
    "candidates=64",
    "cluster=1,stages=2",
]
# Rows at which 384 threads begin to own another vector of four elements, up to the largest tile.
TILES = [384 * 4 * vectors for vectors in (1, 2, 3, 4, 5, 6, 7)]
LARGE_TILE = 384 * 4 * 11


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return emulation.build(tmp_path_factory.mktemp("emulation"))


def check(library, x, k, starts=None, lengths=None, *, smallest=False, is_sorted=False, **keywords):
    rows, width = x.shape
    starts = np.zeros(rows, np.int32) if starts is None else starts
    lengths = np.full(rows, width, np.int32) if lengths is None else lengths
    values, indices = emulation.top_k(
        library, x, k, starts, lengths, smallest=smallest, sorted=is_sorted, **keywords
    )
    expected_values, expected_indices = oracle.top_k(x, k, starts, lengths, smallest, is_sorted)
    np.testing.assert_array_equal(indices, expected_indices)
    if values is not None:
        assert values.tobytes() == expected_values.tobytes()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_hostile_rows(library, dtype, plan):
    # Every plan meets every generator with one dtype, and every dtype every generator.
    seed = PLANS.index(plan)
    rng = np.random.default_rng(seed)
    for generator in inputs.GENERATORS[(seed + DTYPES.index(dtype)) % 3 :: 3]:
        width = int(rng.choice([300, 2500, 4100, 13000]))
        x = inputs.cast(generator(rng, width), dtype)[None]
        k = min(int(rng.choice([1, 33, 256, 2048])), width)
        starts, lengths = inputs.windows_of(1, width, seed=int(rng.integers(1 << 30)))
        if rng.integers(2):
            starts, lengths = None, None
        check(
            library, x, k, starts, lengths,
            smallest=bool(rng.integers(2)), is_sorted=bool(rng.integers(2)), plan=plan,
            schedule=str(rng.choice(emulation.SCHEDULES)), seed=int(rng.integers(1 << 30)),
        )  # fmt: skip


@pytest.mark.parametrize("k", [1, 64, 2048])
def test_lengths_at_every_boundary(library, k):
    boundaries = {0, 1, k, *TILES, LARGE_TILE}
    lengths = sorted({b + d for b in boundaries for d in (-1, 0, 1)} | {2**31 - 1, -(2**31)})
    rng = np.random.default_rng(k)
    x = np.full((len(lengths), LARGE_TILE + 60), np.nan, np.float32)
    for row, length in enumerate(lengths):
        x[row, : max(0, length)] = rng.normal(size=min(max(0, length), x.shape[1]))
    for plan in ("cluster=2", "path=sample,cluster=2"):
        check(library, x, k, lengths=np.array(lengths, np.int32), plan=plan)


@pytest.mark.parametrize("elements", [2 * TILES[-1], 2 * TILES[-1] + 1, 3 * TILES[-1] + 7])
def test_parts_at_the_border_between_resident_and_streamed(library, elements):
    x = np.random.default_rng(elements).normal(size=(1, elements)).astype(np.float32)
    check(library, x, 700, plan="cluster=2")
    check(library, x, 700, plan="cluster=1", is_sorted=True)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("rest", [*range(8), 129, 384, 385, 892, 893])
def test_streams_that_end_anywhere_in_a_tile(library, start, rest):
    """The windows lie among values that would be selected, and end `rest` elements into a tile."""
    tiles = 12 * 32 * 28  # one of each warp
    length = 2 * tiles + rest
    rng = np.random.default_rng(rest)
    x = rng.normal(size=(1, length + 40)).astype(np.float32)
    x[0, :start] = x[0, start + length :] = 9.0
    check(
        library,
        x,
        600,
        np.array([start]),
        np.array([length]),
        plan="path=sample,cluster=1,stages=1",
    )


@pytest.mark.parametrize("each", [1, 3, 7, 8, 9, 15, 16, 28])
def test_lanes_of_a_stream_that_keep_many(library, each):
    """Some lanes' runs of 28 hold `each` of the best, which the list has room for or not."""
    rng = np.random.default_rng(each)
    x = rng.normal(size=(800, 28)).astype(np.float32)
    x[rng.permutation(800)[: 1400 // each], :each] += 8.0
    for plan in ("path=sample,cluster=1,stages=1", "path=sample,cluster=2,stages=1,candidates=256"):
        check(library, x.reshape(1, -1), 1200, plan=plan)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("k", [1400, 2048, 3600])
def test_a_stream_of_one_cta_that_keeps_thousands(library, k, is_sorted):
    """Up to two groups of four for each thread, and of k = 3600 more."""
    x = np.random.default_rng(k).normal(size=(1, 30001)).astype(np.float32)
    check(library, x, k, plan="path=sample,cluster=1,stages=1", is_sorted=is_sorted)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_parts_of_every_number_of_vectors_per_thread(library, dtype):
    """Runs of few vectors are filtered by a loop, longer ones by code for as many, or for more."""
    rng = np.random.default_rng(12)
    per_turn = 384 * 16 // np.dtype(dtype).itemsize
    for turns in range(1, 10 if dtype is np.float32 else 6):  # the last is streamed
        x = inputs.cast(rng.normal(size=(1, 2 * turns * per_turn - 37)), dtype)
        for plan in ("path=sample,cluster=2", "path=sample,cluster=2,stages=1"):
            check(library, x, 1000, plan=plan)
        # Where the open keys lie right behind one tile.
        check(library, x[:, : turns * per_turn], 1000, plan="path=sample,cluster=1,stages=1")
        check(library, x[:, 1:], 1000, plan="path=exact,cluster=2")


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_rows_off_vector_boundaries(library, dtype, offset):
    """Odd widths and an operand at an odd address: vectors begin before and end after rows."""
    rng = np.random.default_rng(offset)
    rows, width = 3, 2999
    buffer = inputs.cast(rng.normal(size=rows * width + offset), dtype)
    x = buffer[offset:].reshape(rows, width)
    starts = np.array([0, 1, 3], np.int32)
    lengths = np.full(rows, width, np.int32)
    check(library, x, 50, starts, lengths, plan="path=sample,cluster=3,part=64")


def test_garbage_windows(library):
    """Starts and lengths of any value: clamped on the device, in every path."""
    extremes = (0, 1, -1, 2999, 3000, 3001, 2**31 - 1, -(2**31))
    pairs = np.array([(start, length) for start in extremes for length in extremes], np.int32)
    x = np.random.default_rng(6).normal(size=(len(pairs), 3000)).astype(np.float32)
    for plan in ("", "path=exact,cluster=3,part=64"):
        check(library, x, 40, pairs[:, 0], pairs[:, 1], plan=plan)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_rows_of_at_most_k_elements(library, is_sorted):
    """All is selected and the rest is padding: every remainder of the four indices of a store."""
    k = 37
    lengths = np.array([0, 1, 2, 3, 4, 5, 6, 7, k - 2, k - 1, k, k + 1], np.int32)
    x = np.full((len(lengths), 50), np.nan, np.float32)
    for row, length in enumerate(lengths):
        x[row, :length] = np.random.default_rng(row).normal(size=length)
    check(library, x, k, lengths=lengths, is_sorted=is_sorted)


@pytest.mark.parametrize("plan", ["path=exact,cluster=3,part=64,candidates=4", "cluster=1", ""])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_poison_beside_the_window(library, dtype, plan):
    """The largest values of all lie beside the window, at every distance from a vector's border."""
    width, num_rows = 13_000, 9
    x = inputs.cast(np.full(num_rows * width, np.nan), dtype).reshape(num_rows, width)
    starts = np.arange(num_rows, dtype=np.int32)
    lengths = (width - 17 - 2 * starts).astype(np.int32)
    rng = np.random.default_rng(7)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        x[row, start : start + length] = inputs.cast(rng.normal(size=length), dtype)
    check(library, x, 100, starts, lengths, plan=plan)


@pytest.mark.parametrize("seed", range(6))
def test_random_rows_plans_and_schedules(library, seed):
    """Combinations that nobody thought of: two races were found so, see docs/trust.md."""
    rng = np.random.default_rng(seed)
    plans = [*PLANS, "path=sample,cluster=4,part=100", "path=exact,cluster=3,candidates=4"]
    for _ in range(40):
        dtype = DTYPES[rng.choice([0, 0, 1, 2])]
        width = int(rng.choice([1, 100, 3000, 9000, 14_000, 26_000]) * rng.uniform(0.5, 1) + 1)
        k = min(width, int(rng.choice([1, 64, 500, 2048, 4096]) * rng.uniform(0.3, 1) + 1))
        x = inputs.cast(inputs.GENERATORS[rng.integers(len(inputs.GENERATORS))](rng, width), dtype)
        is_whole = rng.random() < 0.5
        start = 0 if is_whole else rng.integers(-2, max(2, width // 3))
        length = width if is_whole else rng.integers(-1, width + 5)
        check(
            library,
            x[None],
            k,
            np.array([start], np.int32),
            np.array([length], np.int32),
            smallest=rng.random() < 0.3,
            is_sorted=rng.random() < 0.4,
            plan=str(rng.choice(plans)),
            schedule=str(rng.choice(emulation.SCHEDULES)),
            seed=int(rng.integers(100)),
        )


def sampled_elements(width: int) -> np.ndarray:
    """The elements that the kernel samples of an aligned float32 row, of one round."""
    source = (ROOT / "ffi" / "cuda" / "estimate_bracket.cuh").read_text()
    assert "const uint32_t jitter = ((piece + 1) * 0x9E3779B1u) >> kStretchBits;" in source
    num_vectors, pieces = 768, 192
    stretch = (width // 4 - 3) * (2**32 // pieces) >> 18
    number = np.arange(num_vectors)
    piece = number // 4
    place = (piece << 18) + ((piece + 1) * 0x9E3779B1 % 2**32 >> 14)
    vectors = (place * stretch >> 32) + number % 4
    return (4 * vectors[:, None] + np.arange(4)).ravel()


def rows_that_mislead_a_sample(width: int) -> np.ndarray:
    """Too much is above the guess in the first row, and too little in the second one.

    In the others neighbours are alike, so the sample says less than its size promises.
    """
    rng = np.random.default_rng(8)
    rows, run = 12, 50
    x = np.repeat(rng.normal(size=(rows, width // run)), run, axis=1)
    x += 1e-4 * rng.normal(size=x.shape)
    sampled = rng.permutation(sampled_elements(width))
    x[:2] = rng.normal(size=(2, width))
    x[0, rng.permutation(np.delete(np.arange(width), sampled))[:3000]] += 20
    x[1, sampled[:600]] += 20
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("width", "cluster", "schedule"),
    [
        (14_000, 2, "sweep"),  # resident; the other schedules are in the test below
        *((10_000, 1, schedule) for schedule in emulation.SCHEDULES),  # resident, by one CTA
        *((14_000, 1, schedule) for schedule in emulation.SCHEDULES),  # streamed
    ],
)
def test_a_sample_that_misleads(library, width, cluster, schedule):
    x = rows_that_mislead_a_sample(width)
    for k in (300, 1500):
        check(library, x, k, plan=f"path=sample,cluster={cluster}", schedule=schedule)


@pytest.mark.parametrize("schedule", ["eager", "late"])
def test_a_second_exchange_of_counts_may_overtake_the_first(library, schedule):
    x = rows_that_mislead_a_sample(14_000)
    for seed in range(4):
        for k in (300, 1500):
            check(library, x, k, plan="path=sample,cluster=4", schedule=schedule, seed=seed)


@pytest.mark.parametrize("candidates", [4, 64])
@pytest.mark.parametrize("cluster", [3, 5])
def test_a_peer_may_be_a_round_of_histograms_ahead(library, cluster, candidates):
    """It has all sums of a CTA and sends it the next counts, while other sums are not yet made."""
    plan = f"path=exact,cluster={cluster},part=100,candidates={candidates}"
    for seed in range(10):
        x = (10 + 0.1 * np.random.default_rng(seed).normal(size=(1, 9000))).astype(np.float32)
        for k in (300, 2000):
            check(library, x, k, plan=plan, schedule="eager", seed=seed)


def test_streamed_parts_wait_for_barriers_of_their_peers(library):
    """In some of these orders one CTA has counted its part before another one has begun."""
    x = np.random.default_rng(0).normal(size=(1, 70_000)).astype(np.float32)
    for seed in range(4):
        check(library, x, 300, plan="cluster=5", schedule="eager", seed=seed)


def test_the_best_of_a_streamed_row_may_be_written_last(library):
    """A warp that looks at the pairs before all are there takes too low a key for the best.

    All keys lie around zero, so that nothing that was in their place before is better.
    """
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = (-(2.0**-100) * rng.random((1, 14_000))).astype(np.float32)
        x[0, rng.integers(14_000)] = 2.0**-96
        plan = "path=sample,cluster=1"
        check(library, x, 1500, plan=plan, is_sorted=True, schedule="eager", seed=seed)


def test_winners_may_arrive_while_the_first_cta_sends_its_open_keys(library):
    """Of a sorted row: one peer has all open keys and answers before another one has them."""
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=(1, 1713)).astype(np.float16)
        plan = "path=exact,cluster=5,part=100"
        check(library, x, 348, plan=plan, is_sorted=True, schedule="eager", seed=seed)


@pytest.mark.parametrize("plan", ["cluster=1,candidates=4", "cluster=2,candidates=64", "cluster=1"])
def test_a_sample_that_promises_too_much(library, plan):
    """A piece of the sample meets the few best neighbours, and the guess is too high.

    Five bits of mantissa: every value is the lowest of its coarse bin, so what is just above a
    failed guess and what is just below it differ by one key.
    """
    rng = np.random.default_rng(8)
    rows, width, run = 30, 60_000, 16
    x = np.repeat(rng.normal(size=(rows, width // run)), run, axis=1).astype(np.float16)
    coarse = (x.view(np.uint16) & np.uint16(0xFFE0)).view(np.float16)
    check(library, coarse, 64, plan=f"path=sample,{plan}")


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
def test_sorted_rows_with_a_list(library, schedule):
    """The pairs are padded to a power of two while other threads still read the list."""
    x = np.random.default_rng(9).normal(size=(1, 22_000)).astype(np.float32)
    for seed in range(3):
        check(
            library, x, 2100, is_sorted=True, plan="path=sample,cluster=2", schedule=schedule,
            seed=seed,
        )  # fmt: skip


def test_an_operand_of_more_than_2_31_elements(library):
    """The last row begins at element 2^31. Only what is written here takes memory."""
    rows, width = 33, 1 << 26
    x = np.zeros((rows, width), np.float16)
    x[-1, :5000] = np.random.default_rng(10).normal(size=5000)
    lengths = np.zeros(rows, np.int32)
    lengths[-1] = 5000
    check(library, x, 20, lengths=lengths, plan="cluster=1")
    check(library, x, 20, lengths=lengths, plan="path=exact,cluster=2,part=64")
    # A window that does not begin with its row.
    check(library, x, 20, np.full(rows, 3, np.int32), lengths, plan="cluster=1")


def test_ties_spread_over_ctas(library):
    """The wanted ties end inside a middle CTA; everything before it takes all of its own."""
    rng = np.random.default_rng(0)
    x = rng.choice([0.0, 1.0], size=(1, 9000), p=[0.7, 0.3]).astype(np.float32)
    for k in (1, 500, 1350, 2600):
        check(library, x, k, plan="path=sample,cluster=8,part=500")
        check(library, x, k, plan="path=exact,cluster=8,part=500", is_sorted=True)


def test_lowest_key_competes_with_padding(library):
    """-NaN with all bits set has key 0, the value that pads exchanged candidates."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 5000)).astype(np.float32)
    x.view(np.uint32)[0, rng.permutation(5000)[:2500]] = 0xFFFFFFFF
    for k in (2400, 2600, 4096):
        check(library, x, k, plan="path=sample,cluster=7,part=300")


@pytest.mark.parametrize("plan", ["path=sample,cluster=1", "path=sample,cluster=3,part=300"])
def test_few_elements_of_the_lowest_key(library, plan):
    """They are ranked among few others, by sums that do not carry beside the lowest key."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 4000)).astype(np.float32)
    x.view(np.uint32)[0, rng.permutation(4000)[:5]] = 0xFFFFFFFF
    for k in range(3995, 4000):
        check(library, x, k, plan=plan, is_sorted=k % 2 == 1)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 6])
def test_lowest_key_competes_with_what_is_beside_the_window(library, start):
    """Short rows take what lies outside the window for elements of key 0; ties go by position."""
    x = np.random.default_rng(start).normal(size=(1, 5000)).astype(np.float32)
    x.view(np.uint32)[0, : start + 2001] = 0xFFFFFFFF
    lengths = np.array([3001], np.int32)
    for k in (1, 999, 1000, 1001, 1002, 2500, 3000):
        check(library, x, k, np.array([start], np.int32), lengths, is_sorted=k % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_rows_around_the_shortest_that_has_a_sample(library, start, dtype):
    """Only vectors that lie in the window are sampled, four side by side; fewer are counted."""
    rng = np.random.default_rng(start)
    x = rng.normal(size=(1, 60)).astype(np.float32).astype(dtype)
    starts = np.array([start], np.int32)
    for length in (2, 3, 7, 8, 9, 15, 16, 17, 19, 20, 23, 24, 31, 32, 33, 38, 39, 40, 47, 53):
        row = x[:, : start + length]  # nothing lies behind it
        for k in {1, length // 2, length - 1}:
            check(
                library, row, k, starts, np.array([length], np.int32), plan="path=sample,cluster=2"
            )


@pytest.mark.parametrize("start", [0, 2])
def test_few_ties_at_the_threshold_of_a_short_row(library, start):
    """So few open elements that each is ranked by the thread that has it: ties go by position."""
    rng = np.random.default_rng(start)
    x = rng.normal(size=(1, TILES[2])).astype(np.float32)
    x[(x >= 3.0) & (x < 3.1)] = 0.0  # the ties have their bin to themselves
    length = TILES[2] - start
    x[0, start + rng.permutation(length)[:5]] = 3.0
    above = int((x[0, start:] > 3.0).sum())
    for num_ties in range(1, 5):
        check(
            library, x, above + num_ties, np.array([start], np.int32),
            np.array([length], np.int32), is_sorted=num_ties % 2 == 1,
        )  # fmt: skip


def half_of_one_value(rng: np.random.Generator, width: int) -> np.ndarray:
    """Most of what a top-k of a seventh selects is one value; the rest spreads out above it."""
    x = rng.normal(size=width)
    x[::3] = 1.5
    return x


def keys_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 keys (see `ordered_key.cuh`) of one of many ranges, spacings and outliers."""
    center = rng.integers(0, 2**32)
    reach = int(2 ** rng.uniform(0, 33))
    spacing = 2 ** rng.integers(0, 32)
    keys = center + rng.integers(-reach, reach + 1, size=count) // spacing * spacing
    kind = rng.integers(5)
    if kind == 0:  # normal values, of which some may be negative
        values = rng.normal(size=count) + rng.integers(0, 4)
        keys = oracle.ordered_keys(values.astype(np.float32)).astype(np.int64)
    elif kind == 1:  # the same with a step between them
        values = np.round(rng.normal(size=count) * 8) / 2 ** rng.integers(0, 4)
        keys = oracle.ordered_keys(values.astype(np.float32)).astype(np.int64)
    keys = keys.clip(0, 2**32 - 1).astype(np.uint32)
    for _ in range(rng.integers(4)):
        outlier = rng.choice([0, 0x7FFFFF, 0xFF800000, 2**32 - 1, 2**31, 2**31 - 1])
        keys[rng.integers(0, count, size=rng.integers(1, 4))] = outlier
    return keys


@pytest.mark.parametrize("is_float32", [True, False])
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_bins_of_a_sort_keep_the_order(library, attempt, is_float32):
    """Better pairs never come to later bins, and no bin lies outside the histogram."""
    rng = np.random.default_rng([20, attempt])
    for _ in range(4000):
        count = int(rng.choice([2, 3, 64, 700, 4096]))
        keys = keys_of(rng, count)
        keys = keys if is_float32 else keys >> 16
        if keys.max() == keys.min() or (attempt > 0 and keys.max() - keys.min() < 2):
            continue  # the kernel asks for no bins
        bins = emulation.pair_bins(library, keys, attempt=attempt, is_float32=is_float32)
        assert bins.max() < 16384
        in_order = bins[np.lexsort((np.arange(count), ~keys))]
        assert np.all(in_order[1:] >= in_order[:-1])


@pytest.mark.parametrize("population", [8200, 16384, 32768, 163840])
@pytest.mark.parametrize("k", [1, 64, 512, 2048, 4096])
def test_ranks_of_a_sample_leave_few_rows_out(library, k, population):
    """Of a random sample without return, less than one in 20000 on either side, and not by much."""
    size = 3072
    high, low = emulation.sample_ranks(library, k, population, size)

    def log_choose(n, r):
        return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)

    def probability(selected):  # hypergeometric
        others = log_choose(population - k, size - selected)
        return math.exp(log_choose(k, selected) + others - log_choose(population, size))

    above = sum(probability(number) for number in range(high))
    below = sum(probability(number) for number in range(low, min(k, size) + 1))
    assert above < 5e-5
    assert below < 5e-5
    if k * size / population > 30:
        assert above > 1e-5
        assert below > 1e-5


def test_bins_of_candidates_share_out_their_bracket(library):
    """Each bin holds the keys that it is said to hold, and few keys have a bin each."""
    rng = np.random.default_rng(21)
    for _ in range(3000):
        span = min(int(2 ** rng.uniform(0, 32)), 2**32 - 1)
        lowest = int(rng.integers(0, 2**32 - span))
        keys = lowest + rng.integers(0, span + 1, size=300)
        keys[:2] = lowest, lowest + span
        bins, lowest_of, highest_of = emulation.even_bins(library, lowest, lowest + span, keys)
        assert (bins[1] == 0 and 127 <= bins[0] < 256) or span < 127
        assert np.all((lowest_of <= keys) & (keys <= highest_of))
        for ends in (lowest_of, highest_of):
            assert np.array_equal(
                emulation.even_bins(library, lowest, lowest + span, ends)[0], bins
            )
        above = highest_of[highest_of < lowest + span].astype(np.int64) + 1
        in_next = emulation.even_bins(library, lowest, lowest + span, above)[0]
        assert np.all(in_next < bins[highest_of < lowest + span])
        if span < 256:
            assert np.array_equal(lowest_of, highest_of)


# Long rows by one CTA and by several, in tiles and streamed.
LONG = ["path=sample,cluster=1", "path=sample,cluster=3,part=100", "path=sample,cluster=2,stages=1"]


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("plan", LONG)
@pytest.mark.parametrize("num_keys", [1, 2, 31, 1000])
def test_candidates_that_meet_in_a_bin(library, num_keys, plan, is_sorted):
    """As many as a bin keeps, one more, and many more, of `num_keys` neighbouring keys.

    Everywhere in the row or side by side, for the CTAs that have none of them count the others.
    """
    rng = np.random.default_rng([22, num_keys])
    low = np.float32(1).view(np.int32)
    for width, count in ((9000, 31), (9000, 32), (24_000, 33), (9000, 34), (24_000, 700)):
        x = rng.uniform(-1.5, 1.1, size=width).astype(np.float32)
        crowd = (low + 7 + rng.integers(0, num_keys, size=count).astype(np.int32)).view(np.float32)
        first = int(rng.integers(width - count))
        x[first : first + count] = crowd
        above = int((x > crowd.max()).sum())
        for rank in (1, count // 2, count):
            check(library, x[None], above + rank, plan=plan, is_sorted=is_sorted)
        x = rng.permutation(x)
        for rank in (2, count - 1):
            check(library, x[None], above + rank, plan=plan, is_sorted=is_sorted)
            check(library, -x[None], above + rank, plan=plan, is_sorted=is_sorted, smallest=True)


def test_padding_is_no_tie_of_the_lowest_candidate(library):
    """Many ties of the lowest key of a bracket, which one CTA takes for few, behind padding."""
    rng = np.random.default_rng(24)
    for seed in range(6):
        x = rng.uniform(-2, -1, size=9000)
        for cta, num_ties in enumerate((43, 60, 250)):
            own = 3000 * cta + rng.permutation(3000)[: 150 + num_ties]
            x[own[:150]] = 1 + rng.integers(1, 32, size=150) / 128
            x[own[150:]] = 1
        x = x.astype(jnp.bfloat16)[None]
        for num_ties in (60, 100):
            check(library, x, 450 + num_ties, plan="path=sample,cluster=3,part=100", seed=seed)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
@pytest.mark.parametrize("plan", LONG)
def test_candidates_with_many_ties(library, plan, schedule):
    """Half of the candidates are few values, so that they are only counted at first."""
    rng = np.random.default_rng(23)
    width, k = 24_000, 2000
    x = rng.normal(size=(2, width)).astype(np.float32)
    threshold = np.sort(x[0])[-k]
    step = np.float32(1e-6)
    for row, num_values in enumerate((1, 3)):
        near = np.flatnonzero(np.abs(x[row] - threshold) < 0.1)
        tied = rng.permutation(near)[: len(near) // 2]
        x[row, tied] = threshold + step * rng.integers(0, num_values, size=len(tied))
    for rank in (k - 300, k, k + 40):
        check(library, x, rank, plan=plan, schedule=schedule)
        check(library, x, rank, plan=plan, schedule=schedule, is_sorted=True)


def far_outliers(rng: np.random.Generator, width: int) -> np.ndarray:
    """A half of it spans many octaves, down to zero, and three values lie far above the rest."""
    x = rng.normal(size=width)
    x[::3000] = 1e30
    return x


def short_mantissas(rng, width):
    """Keys that are alike in their last bits: those of bfloat16, as float32."""
    bits = rng.normal(size=width).astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
@pytest.mark.parametrize(
    ("generator", "k", "plan"),
    [
        (inputs.normal, 512, "path=sample,cluster=4"),  # parts that fit a tile
        (inputs.clustered, 700, "path=exact,cluster=3"),  # histograms that travel
        (inputs.normal, 300, "path=sample,cluster=2,candidates=4"),  # a guess that is given up
        (inputs.few_values, 300, "path=exact,cluster=1"),  # streamed, and a single key
        (inputs.normal, 1500, "path=sample,cluster=1,stages=2"),  # streamed, more tiles in flight
        (inputs.normal, 3000, "path=sample,cluster=1,candidates=4"),  # lists that overflow
        (half_of_one_value, 2101, "path=sample,cluster=2"),  # too many in a bin to be ranked there
        (far_outliers, 3999, "path=short"),  # too many in one that is even in value
        (far_outliers, 3000, "path=sample,cluster=1"),  # streamed, and few set the range of keys
        (inputs.normal, 300, "path=short"),
        (half_of_one_value, 1500, "path=short"),  # a crowded bin below others
        (short_mantissas, 600, "path=short"),  # equal keys that share bins by their numbers
        (short_mantissas, 2400, "path=sample,cluster=2"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_no_schedule_changes_the_result(library, generator, k, plan, schedule):
    """For missing barriers and waits: one warp runs ahead, data comes at once or very late."""
    width = 8000 if plan == "path=short" else 14000
    x = inputs.cast(generator(np.random.default_rng(3), width), np.float32)[None]
    for seed in range(4):
        check(library, x, k, plan=plan, schedule=schedule, is_sorted=seed % 2 == 1, seed=seed)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize(
    "plan",
    ["path=sample,cluster=1", "path=sample,cluster=3", "cluster=16"],
)
def test_plateau_below_the_threshold_or_across_it(library, plan, is_sorted):
    """ReLU scores. What lies above the plateau of zeros is kept, however k falls.

    From so few that k takes ties, past k itself, where the ties are all left out and what is above
    them must be searched, to more than the list holds.
    """
    rng = np.random.default_rng(6)
    width, k = 26_000, 500
    for num_above in (1, k - 1, k, k + 1, 700, 4600):
        x = np.zeros((1, width), np.float32)
        x[0, rng.permutation(width)[:num_above]] = rng.exponential(size=num_above)
        check(library, x, k, plan=plan, is_sorted=is_sorted)
        check(library, -x, k, plan=plan, is_sorted=is_sorted, smallest=True)
        # With the same list, and other values in the plateau's coarse bin.
        x[0, rng.permutation(width)[:2000]] += np.float32(1e-7)
        check(library, x, k, plan=plan, is_sorted=is_sorted)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
@pytest.mark.parametrize("plan", ["path=sample,cluster=4,part=100", "cluster=2"])
def test_large_values_in_few_ctas(library, plan, schedule):
    """CTAs that have nothing open do not get the open keys, and still know what is before them."""
    rng = np.random.default_rng(7)
    width, k = 26_000, 300
    for first, count in ((0, 800), (0, 7000), (6500, 800), (12_000, 2500), (25_000, 1000)):
        x = rng.normal(size=(1, width)).astype(np.float32)
        x[0, first : first + count] += 20
        x[0, ::2600] += 40  # selected for certain, elsewhere too
        for seed in range(4):
            check(
                library, x, k, plan=plan, schedule=schedule, is_sorted=seed % 2 == 1, seed=seed
            )  # fmt: skip


def values_in_one_bin(rng, count: int, pattern: str) -> np.ndarray:
    """Float32 values of [1, 1 + 1/32), a coarse bin of the kernel that 128 bins of 2048 split."""
    low = np.float32(1).view(np.int32)
    if pattern == "spread":
        bits = low + rng.permutation(2**18)[:count]
    elif pattern == "pairs":
        bits = low + 2048 * (rng.permutation(2**18)[:count] // 2048) + 7
    elif pattern == "fives":  # more than a vector
        bits = low + 2048 * (np.arange(count) // 5 % 128) + rng.integers(0, 2048, count)
    elif pattern == "twelves":  # as many as a bin has room for
        bits = low + 2048 * (np.arange(count) // 12 % 128) + rng.integers(0, 2048, count)
    elif pattern == "thirteens":  # one more
        bits = low + 2048 * (np.arange(count) // 13 % 128) + rng.integers(0, 2048, count)
    else:  # "crowd": all in one of the 128
        bits = low + 2048 * 77 + rng.integers(0, 2048, count)
    return bits.astype(np.int32).view(np.float32)


@pytest.mark.parametrize("pattern", ["spread", "pairs", "fives", "twelves", "thirteens", "crowd"])
def test_open_elements_of_a_short_row(library, pattern):
    """The threshold lies among 8, 9, ... 641 elements of one coarse bin, of either sign."""
    rng = np.random.default_rng(11)
    for width, count in ((3000, 8), (3000, 9), (4000, 96), (7000, 97), (12_000, 640), (9300, 641)):
        x = rng.uniform(-0.9, 0.9, size=width).astype(np.float32)
        x[:40] = rng.uniform(1.1, 3, size=40)
        x[40 : 40 + count] = values_in_one_bin(rng, count, pattern)
        x = rng.permutation(x)[None]
        for rank in (1, count // 2, count):
            check(library, x, 40 + rank, plan="cluster=1")
            check(library, -x, 40 + rank, plan="cluster=1", smallest=True)
            if width <= 4000:  # the bin is below zero, and all but forty are better
                check(library, -x, width - 40 - rank, plan="cluster=1")
                check(library, x, width - 40 - rank, plan="cluster=1", smallest=True)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: np.dtype(dtype).name)
def test_open_elements_of_a_short_row_of_16_bit_values(library, dtype, schedule):
    """They have few keys: as many of each as come together, and one more than is counted so."""
    rng = np.random.default_rng(15)
    for width, count in ((3000, 9), (7000, 97), (9300, 700), (12_000, 1024), (12_000, 1025)):
        x = rng.uniform(-0.9, 0.9, size=width)
        x[:40] = rng.uniform(1.1, 3, size=40)
        x[40 : 40 + count] = 1 + rng.integers(0, 32, size=count) / 1024  # bfloat16 has four of them
        x = rng.permutation(x).astype(dtype)[None]
        for rank in (1, count // 2, count):
            check(library, x, 40 + rank, plan="cluster=1", schedule=schedule)
            check(library, -x, 40 + rank, plan="cluster=1", smallest=True)
            if width <= 3000:  # the bin is below zero, and all but forty are better
                check(library, -x, width - 40 - rank, plan="cluster=1")


@pytest.mark.parametrize(("value", "above"), [(1e30, 0), (1e-30, 40), (-1e-30, 40), (-1e30, 3900)])
def test_open_elements_of_the_widest_bins(library, value, above):
    """The threshold lies in a coarse bin at an end of either half, whose keys differ by more."""
    rng = np.random.default_rng(12)
    count, width = 60, 4000
    x = np.concatenate(
        [
            rng.uniform(1, 2, size=above),
            value * np.exp(rng.uniform(-3, 0, size=count)),
            rng.uniform(-2, -1, size=width - above - count),
        ]
    )
    x = rng.permutation(x.astype(np.float32))[None]
    for rank in (1, 30, count):
        check(library, x, above + rank, plan="cluster=1")
        check(library, -x, above + rank, plan="cluster=1", smallest=True)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
def test_a_crowd_that_is_narrowed_twice(library, schedule):
    """Two neighbouring values fill one of 2048 bins of a coarse bin; the first warp has but one."""
    rng = np.random.default_rng(14)
    width = 3000
    low = np.float32(1).view(np.int32)
    bits = np.full(width, low + 7, np.int32)
    of_other_warps = np.flatnonzero(np.arange(width) % 1536 >= 128)
    bits[rng.permutation(of_other_warps)[:1000]] += 3
    bits[rng.permutation(of_other_warps)[:5]] = low + 2**18 - 9  # far away in the coarse bin
    x = bits.view(np.float32)[None]
    for k in (400, 990, 1500):
        for seed in range(4):
            check(library, x, k, plan="cluster=1", schedule=schedule, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("plan", ["cluster=4", "cluster=1,stages=1", "path=sample,cluster=2"])
def test_rows_whose_best_lie_side_by_side(library, plan, dtype):
    """Few threads, or one warp, have all that is kept: they take it by vectors."""
    rng = np.random.default_rng(13)
    width = 36_000
    x = np.sort(rng.normal(size=(4, width)), axis=1)
    x[1] = x[1, ::-1]
    x[2] = np.roll(x[2], 17_001)  # across two CTAs
    x[3] = -np.abs(np.round(x[3], 2))  # ties, and a plateau of zeros
    x = x.astype(dtype)
    for is_sorted in (False, True):
        check(library, x, 2048, plan=plan, is_sorted=is_sorted)
    check(library, x, 2048, plan=plan, smallest=True)


@pytest.mark.parametrize("k", [700, 2304, 2305, 4096])
def test_sorted_rows_with_many_ties(library, k):
    """Ties of the highest and the lowest key have bins of their own, others a bitonic sort."""
    rng = np.random.default_rng(k)
    width = 2 * k + 100
    for share in (0.1, 0.5, 0.9, 1.0):
        lowest = np.where(rng.random((1, width)) < share, 0.5, 1 + rng.random((1, width)))
        other = np.where(rng.random((1, width)) < share, 1.5, 1 + rng.random((1, width)))
        wide = np.where(rng.random((1, width)) < share, 1e-30, rng.normal(size=(1, width)))
        few = rng.integers(0, 5, (1, width))
        for x in (lowest, other, wide, few):
            check(library, x.astype(np.float32), k, is_sorted=True)
    # More than half of a power of two, and the ties are neither highest nor lowest: that sort.
    crowd = rng.random((1, width))
    order = rng.permutation(width)
    crowd[0, order[: k - k // 20]] = 1.5
    crowd[0, order[: k // 40]] += rng.random(k // 40)
    for plan in ("path=sample,cluster=2", "path=short,cluster=1,candidates=4"):
        check(library, crowd.astype(np.float32), k, is_sorted=True, plan=plan)


@pytest.mark.parametrize("cluster", [2, 3, 5, 8])
def test_sorted_rows_of_one_winner_per_cta(library, cluster):
    """Pairs are sent by vectors of two: here halves of them, at even places and at odd ones."""
    rng = np.random.default_rng(cluster)
    x = rng.normal(size=(1, cluster * 1000)).astype(np.float32)
    x[0, 500::1000] = rng.permutation(cluster) + 10
    for k in (cluster, cluster + 1):
        check(library, x, k, plan=f"path=sample,part=100,cluster={cluster}", is_sorted=True)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
@pytest.mark.parametrize("most", [3, 4, 5, 15, 16, 17])
def test_sorted_rows_with_crowded_bins(library, most, schedule):
    """Groups of neighbouring keys that share a bin: it holds fifteen, four are sorted at once."""
    rng = np.random.default_rng(most)
    for k, plan in ((90, ""), (700, "path=sample,cluster=2"), (2400, "path=short")):
        sizes = np.minimum(rng.geometric(0.4, size=k), most)
        sizes[rng.integers(0, k // most, size=5)] = most
        group = np.repeat(np.arange(k), sizes)[:k]
        place = np.concatenate([np.arange(size) for size in sizes])[:k]
        bits = np.uint32(0x3F800000) + (group << 14 | place).astype(np.uint32)
        x = -np.ones((1, 2 * k + 900), np.float32)
        x[0, rng.permutation(x.shape[1])[:k]] = rng.permutation(bits).view(np.float32)
        check(library, x, k, plan=plan, is_sorted=True, schedule=schedule, seed=most)


@pytest.mark.parametrize("schedule", emulation.SCHEDULES)
def test_sorted_keys_that_differ_between_warps_alone(library, schedule):
    """The lowest bit in which keys differ has one value in a warp and another one in the others.

    The warp that took it for a common one would put its pairs of high numbers behind worse ones. It
    is the last one, which comes first in a sweep.
    """
    rng = np.random.default_rng(25)
    k = 2000
    is_in_last_warp = np.arange(k) % 384 >= 352
    bits = 0x3F80FFFF + (rng.integers(0, 8, size=k) << 20) + np.where(is_in_last_warp, 2, 1) * 2**16
    x = -np.ones((1, 3000), np.float32)
    x[0, np.sort(rng.permutation(3000)[:k])] = bits.astype(np.uint32).view(np.float32)
    check(library, x, k, plan="path=short", is_sorted=True, schedule=schedule)


def test_plateau_in_a_list_without_room_for_k_ties(library):
    """Streamed ties beyond the list's capacity: counted, and read again as far as wanted."""
    rng = np.random.default_rng(4)
    x = rng.choice([0.0, 1.0], size=(1, 30000), p=[0.99, 0.01]).astype(np.float32)
    for plan in ("cluster=1,candidates=64", "cluster=2,candidates=4", "path=exact,candidates=4"):
        check(library, x, 2000, plan=plan)


@pytest.mark.parametrize("smem", [101_376, 166_912])
def test_devices_without_clusters(library, smem):
    """sm_80 and sm_120: one CTA per row and less shared memory."""
    limits = {
        "num_sms": 84,
        "smem_per_block_bytes": smem,
        "smem_per_sm_bytes": smem + 1024,
        "max_cluster_size": 1,
    }
    x = np.random.default_rng(5).normal(size=(1, 20011)).astype(np.float32)
    check(library, x, 2048, limits=limits)
    check(library, x, 4096, limits=limits, is_sorted=True)


@pytest.mark.parametrize(
    ("num_sms", "max_cluster_size"), [(1, 1), (7, 3), (14, 1), (16, 8), (33, 16)]
)
def test_slices_of_a_device(library, num_sms, max_cluster_size):
    """MIG-like devices: the planner's own clusters, which are smaller and fewer there."""
    limits = {**emulation.H100, "num_sms": num_sms, "max_cluster_size": max_cluster_size}
    x = np.random.default_rng(num_sms).normal(size=(2, 17_001)).astype(np.float32)
    check(library, x, 512, lengths=np.array([17_001, 9_000], np.int32), limits=limits)


def test_refuses_what_it_cannot_plan(library):
    x = np.zeros((1, 5000), np.float32)
    with pytest.raises(RuntimeError, match="k=5000 exceeds 4096"):
        emulation.top_k(library, x, 5000, np.zeros(1), np.zeros(1))
    with pytest.raises(RuntimeError, match="plan override 'path=fast' is not valid"):
        emulation.top_k(library, x, 5, np.zeros(1), np.zeros(1), plan="path=fast")
