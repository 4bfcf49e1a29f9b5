"""A model on paper of the exchange of candidates: bytes and microseconds on many devices.

Nothing here is measured. The model is NCCL's own estimate of a ring all-gather, by which it chooses
its protocol (`ncclTopoTuneModel`), fed with the peak bandwidths of H100 nodes:

    time = base + hops inside nodes * hop + hops between nodes * hop + bytes received / bandwidth

for each of two protocols, of which NCCL takes the faster: LL, with short hops and a share of the
bandwidth, and Simple. It leaves out the selections before, between and after, the kernels that pack
and unpack, and whatever else uses the links.

Sources of the constants:
    protocols   github.com/NVIDIA/nccl, src/graph/tuning.cc at commit b647562: `baseLat`, `hwLat`,
                `llMaxBws`, the shares of LL, and the overhead of posting to the network (Intel)
    NVLink      H100 SXM data sheet: 900 GB/s per GPU, both directions together
    InfiniBand  DGX H100 user guide: one ConnectX-7 port of 400 Gb/s (NDR) per GPU
"""

from __future__ import annotations

import dataclasses

INDEX_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How NCCL sends. Latencies in microseconds, bandwidths in bytes per microsecond.

    Attributes:
        name: NCCL's name.
        base_us: of every call.
        nvlink_hop_us: from GPU to GPU inside a node.
        network_hop_us: from node to node.
        post_us: least latency of a hop inside a node if others of the ring cross the network.
        nvlink_share: of the links' bandwidth that is used, inside one node.
        network_share: the same, over several nodes.
        nvlink_cap: bandwidth that is not exceeded inside one node.
        network_cap: the same, over several nodes.
    """

    name: str
    base_us: float
    nvlink_hop_us: float
    network_hop_us: float
    post_us: float
    nvlink_share: float
    network_share: float
    nvlink_cap: float
    network_cap: float


LL = Protocol("LL", 6.6, 0.6, 2.7, 1.0, 1 / 3, 1 / 4, 87_700.0, 19_000.0)
SIMPLE = Protocol("Simple", 8.4, 3.4, 14.0, 3.0, 1.0, 1.0, float("inf"), float("inf"))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Bandwidths in bytes per microsecond, per GPU and direction."""

    devices_per_node: int
    nvlink: float
    network: float
    protocols: tuple[Protocol, ...] = (LL, SIMPLE)


H100 = Cluster(devices_per_node=8, nvlink=450_000.0, network=50_000.0)


@dataclasses.dataclass(frozen=True)
class Gather:
    """One all-gather.

    Attributes:
        devices: that take part.
        received_bytes: that arrive at each device from others.
        us: microseconds.
        protocol: the faster one.
    """

    devices: int
    received_bytes: int
    us: float
    protocol: str


def all_gather(sent_bytes: int, devices: int, devices_per_node: int, cluster: Cluster) -> Gather:
    """An all-gather of `sent_bytes` from each of `devices`.

    Args:
        sent_bytes: what each device contributes.
        devices: that take part.
        devices_per_node: how many of them are in one node.
        cluster: links.
    """
    num_nodes = -(-devices // devices_per_node)
    received = (devices - 1) * sent_bytes
    if devices == 1:
        return Gather(1, 0, 0.0, "none")
    times = {}
    for protocol in cluster.protocols:
        if num_nodes == 1:
            bandwidth = min(protocol.nvlink_cap, protocol.nvlink_share * cluster.nvlink)
            hop = protocol.nvlink_hop_us
        else:
            # Every GPU has a network port of its own, and a ring through each of them.
            slowest = min(cluster.nvlink, cluster.network * devices_per_node)
            bandwidth = min(protocol.network_cap, protocol.network_share * slowest)
            hop = max(protocol.nvlink_hop_us, protocol.post_us)
        times[protocol.name] = (
            protocol.base_us
            + (devices - num_nodes) * hop
            + (num_nodes - 1) * protocol.network_hop_us
            + received / bandwidth
        )
    fastest = min(times, key=lambda name: times[name])
    return Gather(devices, received, times[fastest], fastest)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The stages of an exchange, innermost first."""

    stages: tuple[Gather, ...]

    @property
    def received_bytes(self) -> int:
        """Bytes that arrive at each device in all stages."""
        return sum(stage.received_bytes for stage in self.stages)

    @property
    def us(self) -> float:
        """Microseconds of all stages."""
        return sum(stage.us for stage in self.stages)


def _check_devices(devices: int, cluster: Cluster) -> None:
    if devices < 1 or (devices > cluster.devices_per_node and devices % cluster.devices_per_node):
        raise ValueError(
            f"devices={devices} does not fill nodes of {cluster.devices_per_node}; pass up to "
            f"{cluster.devices_per_node}, or a multiple"
        )


def exchange(
    rows: int,
    k: int,
    element_bytes: int,
    devices: int,
    *,
    staged: bool = True,
    cluster: Cluster = H100,
) -> Exchange:
    """The exchange of `sharded_top_k`: every device sends k values and k int32 indices per row.

    Args:
        rows: rows of the batch.
        k: candidates per row and device; after a stage k are left.
        element_bytes: size of a value.
        devices: over which each row is spread.
        staged: two mesh axes, the devices of a node and the nodes; False: one axis over all.
        cluster: links.
    """
    _check_devices(devices, cluster)
    sent = rows * k * (element_bytes + INDEX_BYTES)
    per_node = min(devices, cluster.devices_per_node)
    if not staged or devices == per_node:
        return Exchange((all_gather(sent, devices, per_node, cluster),))
    inside = all_gather(sent, per_node, per_node, cluster)
    # One device of each node in every group; the groups work side by side, each on its own port.
    between = all_gather(sent, devices // per_node, 1, cluster)
    return Exchange((inside, between))


def gather_of_rows(
    rows: int, width: int, element_bytes: int, devices: int, *, cluster: Cluster = H100
) -> Gather:
    """What `lax.top_k` on a sharded array costs before it selects: all of every row, everywhere.

    Args:
        rows: rows of the batch.
        width: elements of a whole row, a multiple of `devices`.
        element_bytes: size of a value.
        devices: over which each row is spread.
        cluster: links.
    """
    _check_devices(devices, cluster)
    per_node = min(devices, cluster.devices_per_node)
    return all_gather(rows * width // devices * element_bytes, devices, per_node, cluster)
