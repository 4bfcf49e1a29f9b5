"""FFI handlers of the CPU target, the selection on raw buffers, and the planner for CUDA."""

from typing import TypedDict

class DeviceLimits(TypedDict):
    num_sms: int
    smem_per_block_bytes: int
    smem_per_sm_bytes: int
    max_cluster_size: int

class LaunchPlan(TypedDict):
    cluster_size: int
    num_ctas: int
    num_stages: int
    list_capacity: int
    part_elements: int
    smem_bytes: int
    path: str

VERSION: str
FFI_API_VERSION: tuple[int, int]

def registrations() -> dict[str, object]: ...
def plan_launch(
    rows: int,
    width: int,
    k: int,
    dtype: str,
    sorted: bool,
    limits: DeviceLimits,
    overrides: str = "",
) -> LaunchPlan: ...
def select(
    operand: int,
    starts: int,
    lengths: int,
    values: int,
    indices: int,
    rows: int,
    width: int,
    k: int,
    dtype: str,
    smallest: bool,
    sorted: bool,
    threads: int,
) -> None: ...
