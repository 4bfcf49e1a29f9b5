"""FFI handlers of the CUDA target, device facts, timing, and the launch on raw buffers."""

from jax_topk._cpu import DeviceLimits

VERSION: str
FFI_API_VERSION: tuple[int, int]
ARCHITECTURES: list[str]
MAX_K: int
RUNTIME_VERSION: int

def registrations() -> dict[str, object]: ...
def device_limits(device: int = 0) -> DeviceLimits: ...
def driver_version() -> int: ...
def compute_capabilities() -> list[tuple[int, int]]: ...
def graph_chain(
    kind: str,
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
    plan: str,
    launches: int,
    replays: int,
    device: int,
) -> list[float]: ...
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
    plan: str,
    device: int,
) -> None: ...
