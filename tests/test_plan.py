"""Launch planning: a pure function of static shapes and device limits, tested without a device."""

from __future__ import annotations

import pytest

from jax_topk import _native

LIMITS = {
    "H100": {"num_sms": 132, "smem_per_block_bytes": 232448, "smem_per_sm_bytes": 233472,
             "max_cluster_size": 16,
             "resident_clusters": [132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7]},
    "A100": {"num_sms": 108, "smem_per_block_bytes": 166912, "smem_per_sm_bytes": 167936,
             "max_cluster_size": 1},
    "RTX": {"num_sms": 170, "smem_per_block_bytes": 101376, "smem_per_sm_bytes": 102400,
            "max_cluster_size": 8},
    "slice": {"num_sms": 16, "smem_per_block_bytes": 232448, "smem_per_sm_bytes": 233472,
              "max_cluster_size": 8},
}  # fmt: skip


def plan(rows, width, k=2048, *, device="H100", dtype="float32", is_sorted=False, overrides=""):
    module = _native.CPU.module
    assert module is not None, _native.CPU.reason
    return module.plan_launch(rows, width, k, dtype, is_sorted, LIMITS[device], overrides)


@pytest.mark.parametrize(
    ("rows", "cluster"),
    [(1, 16), (7, 16), (9, 9), (10, 8), (16, 6), (32, 3), (64, 2), (66, 2), (67, 1), (4096, 1)],
)
def test_clusters_leave_each_cta_an_sm(rows, cluster):
    assert plan(rows, 163840)["cluster_size"] == cluster
    assert plan(rows, 163840)["num_ctas"] == rows * cluster


def test_a_device_that_does_not_count_its_clusters_is_taken_for_one_group_of_sms():
    module = _native.CPU.module
    assert module is not None
    limits = {key: value for key, value in LIMITS["H100"].items() if key != "resident_clusters"}
    for rows, cluster in ((8, 16), (9, 14), (33, 4), (132, 1)):
        plan = module.plan_launch(rows, 163840, 2048, "float32", False, limits, "")
        assert plan["cluster_size"] == cluster


def test_a_count_for_every_cluster_size_is_needed():
    module = _native.CPU.module
    assert module is not None
    limits = {**LIMITS["H100"], "resident_clusters": [132, 66]}
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        module.plan_launch(8, 163840, 2048, "float32", False, limits, "")


def test_narrow_rows_get_no_more_ctas_than_they_can_use():
    assert plan(1, 2048)["cluster_size"] == 1
    assert plan(1, 4096)["cluster_size"] == 2
    assert plan(1, 9000)["cluster_size"] == 5


@pytest.mark.parametrize("device", LIMITS)
@pytest.mark.parametrize("k", [1, 64, 512, 2048, 4096])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130, 5000])
def test_every_plan_fits_its_device(device, k, is_sorted, rows):
    limits = LIMITS[device]
    result = plan(rows, 163840, k, device=device, is_sorted=is_sorted)
    assert result["smem_bytes"] <= limits["smem_per_block_bytes"]
    assert result["cluster_size"] <= limits["max_cluster_size"]
    # Room for k winners, and for some that turn out not to be.
    assert result["list_capacity"] >= k + 256
    assert result["list_capacity"] % 4 == 0


def test_two_ctas_share_an_sm_where_there_are_more_ctas_than_sms():
    for rows in (133, 256, 4096):
        assert 2 * (plan(rows, 163840)["smem_bytes"] + 1024) <= 233472


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_large_tiles_serve_launches_of_few_ctas_per_row(dtype):
    for cluster in range(1, 17):
        result = plan(1, 163840, dtype=dtype, overrides=f"cluster={cluster}")
        assert result["uses_large_tile"] == (cluster <= 4)
    for rows in (128, 256):
        assert plan(rows, 163840, dtype=dtype)["uses_large_tile"]


def test_the_plan_ignores_nothing_but_run_time_lengths():
    assert plan(4, 163840) == plan(4, 163840)
    assert plan(4, 163840, 64) != plan(4, 163840, 4096)


def test_overrides_change_what_they_name():
    result = plan(3, 163840, overrides="path=exact,cluster=5,candidates=64,part=100,stages=2")
    assert result["path"] == "exact"
    assert result["cluster_size"] == 5
    assert result["list_capacity"] == 2048 + 64
    assert result["part_elements"] == 100
    assert result["num_stages"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("fast", "write name=value, for instance path=exact"),
        ("path=fast", "path is one of auto, short, sample, exact"),
        ("cluster=0", "cluster is between 1 and 16"),
        ("cluster=17", "cluster is between 1 and 16"),
        ("cluster=two", "the value must be an integer"),
        ("candidates=1", "candidates is at least 4"),
        ("part=0", "part is at least 1"),
        ("stages=3", "stages is 1 or 2"),
        ("speed=9", "the names are path, cluster, candidates, part, stages"),
        ("path=exact,", "ends in a comma"),
    ],
)
def test_bad_overrides_say_what_is_wrong(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(1, 4096, overrides=overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 1, "width": 100, "k": 101}, "k=101 must lie between 0 and the row width 100"),
        ({"rows": 1, "width": 100, "k": -1}, "k=-1 must lie between 0"),
        ({"rows": 1, "width": 9999, "k": 4097}, "k=4097 exceeds 4096"),
        ({"rows": 1, "width": 2**31, "k": 1}, "the width must stay below 2\\^31"),
        ({"rows": 2**31, "width": 1, "k": 1}, "fewer than 2\\^31"),
        (
            {"rows": 2**27, "width": 9999, "k": 1, "overrides": "cluster=16"},
            "2\\^31 divided by its cluster size of 16",
        ),
        ({"rows": 1, "width": 9999, "k": 9, "dtype": "int32"}, "dtype 'int32' is not one of"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_a_cluster_beyond_the_device_is_refused():
    with pytest.raises(ValueError, match="cluster=16 exceeds the device's largest cluster of 8"):
        plan(1, 163840, device="RTX", overrides="cluster=16")


@pytest.mark.parametrize("candidates", [4, 5, 6, 7])
def test_capacities_are_whole_vectors(candidates):
    """Lists and candidates are moved four at a time."""
    for k in (1, 2047, 2048):
        capacity = plan(1, 9000, k, overrides=f"candidates={candidates}")["list_capacity"]
        assert capacity % 4 == 0
        assert k + candidates <= capacity < k + candidates + 4


def test_the_runtime_keeps_a_share_of_an_sm():
    """A block may ask for all that an SM has, but 1024 bytes of it are the runtime's."""
    module = _native.CPU.module
    assert module is not None
    limits = {**LIMITS["A100"], "smem_per_block_bytes": 167936}
    for k in (2048, 4096):
        result = module.plan_launch(1, 163840, k, "float32", False, limits, "")
        assert result["smem_bytes"] <= limits["smem_per_sm_bytes"] - 1024
    # An SM that is one byte short of this plan and the runtime's share gets a smaller plan.
    wanted = plan(1, 163840, device="A100")["smem_bytes"]
    tight = {**limits, "smem_per_block_bytes": wanted, "smem_per_sm_bytes": wanted + 1023}
    result = module.plan_launch(1, 163840, 2048, "float32", False, tight, "")
    assert result["smem_bytes"] < wanted


def test_too_little_shared_memory_is_refused():
    small = {**LIMITS["H100"], "smem_per_block_bytes": 49152}
    module = _native.CPU.module
    assert module is not None
    with pytest.raises(ValueError, match="bytes of shared memory per block"):
        module.plan_launch(1, 163840, 4096, "float32", False, small, "")


def test_empty_shapes_are_legal():
    assert plan(0, 100, 5)["num_ctas"] == 0
    assert plan(3, 0, 0)["list_capacity"] >= 0
