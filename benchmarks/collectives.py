"""What a collective costs on N GPUs: rings and trees over the links inside a machine and between machines, by latency and bandwidth.

The model is that by which NCCL itself chooses an algorithm (`ncclTopoTuneModel` in src/graph/tuning.cc; NCCL 2.30.7, commit 5067397). A
collective starts, takes steps that wait for one another, each with the latency of its link, and moves its bytes at the rate of the slowest
link it uses. A ring passes every GPU; a tree is a chain inside each machine and binary between machines, so its steps grow with the logarithm
of the machines, and it moves a little more. NCCL takes whichever is faster. Reduce-scatter and all-gather are rings where a machine has more
than one GPU (NCCL's logarithmic PAT is for one GPU a machine). Left out, and each would make an all-reduce faster: NVLink SHARP, which on 8
H100 reaches 480 GB/s for large messages where a ring has 370 (nccl-tests #212), and reduction in InfiniBand's switches.
"""

from __future__ import annotations

from typing import NamedTuple

from fastpoem.doctor.machine import PEAKS, Peak

MACHINE = 8  # GPUs of a machine
NIC = 47.0  # GB/s that NCCL gets from an NDR adapter (400 Gb/s): 46 to 48 (nccl-tests #290, NVIDIA)
TREE = 0.92  # of a ring's bandwidth (tuning.cc)


class Protocol(NamedTuple):
    """How NCCL sends: seconds of the start and of a step between machines, both for (ring, tree); of a step inside by `inside`; and the
    share of the bandwidth that is left. All from tuning.cc."""

    start: tuple[float, float]
    inside: dict[str, tuple[float, float]]
    between: tuple[float, float]
    share: float


# LL128 sends flags with the data; NCCL uses it over NVLink only.
PROTOCOLS = (
    Protocol((8.4e-6, 8.4e-6), {"NVLink": (3.4e-6, 4.0e-6), "PCIe": (5.7e-6, 4.0e-6)}, (14e-6, 14e-6), 1.0),  # Simple
    Protocol((14e-6, 14e-6), {"NVLink": (1.9e-6, 1.25e-6)}, (4.0e-6, 8.5e-6), 0.92),  # LL128
)


class Cluster(NamedTuple):
    """Machines of MACHINE GPUs. rate: GB/s of a ring inside one. nics: InfiniBand adapters of each."""

    name: str
    card: Peak
    inside: str
    rate: float
    nics: int

    def slowest(self, gpus: int) -> float:
        """Bytes a second of a ring through so many GPUs."""
        return 1e9 * (self.rate if gpus <= MACHINE else min(self.rate, self.nics * NIC))


# NVLink 4: 370 of 450 GB/s are left to a ring (nccl-tests #212, NVIDIA). PCIe 5 x16: 28 of 63 GB/s, reported of 8 RTX 5090 (nccl #1639; 4 of
# them had 35): it hangs on the host's CPUs and memory.
CLUSTERS = (
    Cluster("NVLink, 8 adapters a machine", PEAKS["H100"], "NVLink", 370, 8),
    Cluster("NVLink, 1 adapter a machine", PEAKS["H100"], "NVLink", 370, 1),
    Cluster("PCIe 5, 1 adapter a machine", PEAKS["H100 PCIe"], "PCIe", 28, 1),
)


def ring(cluster: Cluster, gpus: int, size: float, passes: int) -> float:
    """Seconds for `size` bytes. passes: 2 of an all-reduce, 1 of a reduce-scatter or an all-gather."""
    machines = -(-gpus // MACHINE)
    seconds = []
    for one in PROTOCOLS:
        if cluster.inside in one.inside:
            waits = (gpus - machines) * one.inside[cluster.inside][0] + (machines - 1) * one.between[0]
            moves = (gpus - 1) / gpus * size / (cluster.slowest(gpus) * one.share)
            seconds.append(one.start[0] + passes * (waits + moves))
    return min(seconds)


def tree(cluster: Cluster, gpus: int, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes: up and down again."""
    machines = -(-gpus // MACHINE)
    deep = (machines - 1).bit_length()
    seconds = []
    for one in PROTOCOLS:
        if cluster.inside in one.inside:
            waits = (gpus // machines - 1) * one.inside[cluster.inside][1] + deep * one.between[1]
            seconds.append(one.start[1] + 2 * (waits + size / (cluster.slowest(gpus) * TREE * one.share)))
    return min(seconds)


def all_reduce(cluster: Cluster, gpus: int, size: float) -> float:
    return 0.0 if gpus == 1 else min(ring(cluster, gpus, size, 2), tree(cluster, gpus, size))


def all_gather(cluster: Cluster, gpus: int, size: float) -> float:
    """Of `size` bytes in all, of which each GPU has its part before. A reduce-scatter, the other way round, takes as long."""
    return 0.0 if gpus == 1 else ring(cluster, gpus, size, 1)
