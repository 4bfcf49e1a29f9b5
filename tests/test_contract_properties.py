"""Properties that every correct top-k has, on inputs that hypothesis chooses."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from runners import assert_same

import jax_topk
from jax_topk.bench import oracle

ROWS, WIDTH = 3, 40  # one shape, so that few programs are compiled
KS = (1, 7, 40)

bits32 = hypothesis.extra.numpy.arrays(
    np.uint32,
    (ROWS, WIDTH),
    elements=st.one_of(
        st.integers(0, 2**32 - 1),
        st.sampled_from(
            [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x3F800000]
        ),
    ),
)
finite = hypothesis.extra.numpy.arrays(
    np.float32,
    (ROWS, WIDTH),
    elements=st.one_of(
        st.integers(-4, 4).map(float),
        st.floats(-1e6, 1e6, width=32).map(lambda value: value + 0.0),
    ),
)
counts = hypothesis.extra.numpy.arrays(
    np.int32,
    (ROWS,),
    elements=st.one_of(st.integers(-2, WIDTH + 2), st.sampled_from([2**31 - 1, -(2**31)])),
)
ks = st.sampled_from(KS)

settings = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@settings
@hypothesis.given(bits=bits32, starts=counts, lengths=counts, k=ks, is_smallest=st.booleans())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_bits_and_any_window(runner, dtype, bits, starts, lengths, k, is_smallest):
    x = bits.view(np.float32)
    if dtype != "float32":
        x = (bits >> np.uint32(16)).astype(np.uint16).view(getattr(jnp, dtype))
    mode = "smallest" if is_smallest else "largest"
    runner.check(x, k, starts=starts, lengths=lengths, mode=mode)


@settings
@hypothesis.given(x=finite, k=ks, seed=st.integers(0, 1000))
def test_permuting_a_row_permutes_the_indices(runner, x, k, seed):
    order = np.random.default_rng(seed).permutation(WIDTH)
    values, indices = runner.top_k(x, k)
    permuted_values, permuted = runner.top_k(x[:, order], k)
    assert_same(permuted_values, values)
    back = order[permuted]
    # Ties may be taken in another order, the values at the indices may not differ.
    assert_same(np.take_along_axis(x, back, 1), np.take_along_axis(x, indices, 1))


@settings
@hypothesis.given(x=finite, lengths=counts, k=ks)
def test_negation_swaps_the_modes(runner, x, lengths, k):
    values, indices = runner.top_k(x, k, lengths=lengths)
    negated_values, negated = runner.top_k(-x, k, lengths=lengths, mode="smallest")
    assert_same(negated, indices)
    assert_same(negated_values, -values)


@settings
@hypothesis.given(x=finite, k=ks)
def test_a_strictly_monotone_map_keeps_the_indices(runner, x, k):
    _, indices = runner.top_k(x, k)
    ranks = np.stack([np.unique(row, return_inverse=True)[1] for row in x + 0.0])
    _, mapped = runner.top_k((ranks * 3 - 50).astype(np.float32), k)
    assert_same(mapped, indices)


@settings
@hypothesis.given(x=finite, k=ks, border=st.integers(0, WIDTH))
def test_concatenation_equals_merging(runner, x, k, border):
    values, indices = runner.top_k(x, k)
    left_values, left = runner.top_k(x, k, lengths=border)
    right_values, right = runner.top_k(x, k, row_starts=border)
    right = np.where(right < 0, -1, right + border)
    both = np.concatenate([left_values, right_values], 1), np.concatenate([left, right], 1)
    for row in range(ROWS):
        candidates = sorted(
            (-value, index)
            for value, index in zip(both[0][row], both[1][row], strict=True)
            if index >= 0
        )
        assert [index for _, index in candidates[:k]] == indices[row].tolist()
    assert_same(np.take_along_axis(x, indices, 1), values)


@settings
@hypothesis.given(x=finite, start=st.integers(0, WIDTH), length=st.integers(0, WIDTH), k=ks)
def test_a_window_equals_a_slice(runner, x, start, length, k):
    values, indices = runner.top_k(x, k, row_starts=start, lengths=length)
    part = x[:, start : start + length]
    num_valid = min(k, part.shape[1])
    wanted = oracle.top_k(np.ascontiguousarray(part), num_valid)
    assert_same(np.ascontiguousarray(values[:, :num_valid]), wanted[0])
    assert_same(np.ascontiguousarray(indices[:, :num_valid]), wanted[1])
    assert (indices[:, num_valid:] == -1).all()
    assert np.isneginf(values[:, num_valid:]).all()


@settings
@hypothesis.given(x=finite, lengths=counts, k=ks)
def test_sorted_unsorted_and_indices_are_one_set(runner, x, lengths, k):
    values, indices = runner.top_k(x, k, lengths=lengths)
    unsorted_values, unsorted = runner.top_k(x, k, lengths=lengths, sorted=False)
    assert_same(runner.top_k_indices(x, k, lengths=lengths), unsorted)
    order = np.argsort(np.where(indices < 0, WIDTH, indices), axis=1, kind="stable")
    assert_same(np.take_along_axis(indices, order, 1), unsorted)
    assert_same(np.take_along_axis(values, order, 1), unsorted_values)


@settings
@hypothesis.given(
    x=hypothesis.extra.numpy.arrays(np.int8, (ROWS, WIDTH), elements=st.integers(-128, 127)),
    lengths=counts,
    k=ks,
)
def test_integers(x, lengths, k):
    for result, wanted in zip(
        jax_topk.top_k(x, k, lengths=lengths, mode="smallest"),
        oracle.top_k(x, k, None, lengths, True),
        strict=True,
    ):
        assert_same(np.asarray(result), wanted)
