"""A training step on 1 to 1,024 GPUs on paper: `python -m benchmarks.scaling` prints the tables of docs/scaling.md.

Nothing of that is measured. A step is the largest share's forward and backward pass, the exchange, and the update. The first and the last
come from `benchmarks.budget` (its *likely* figures), the exchange from `benchmarks.collectives`. There are three ways: *replicated*, as
fastpoem does it; *ZeRO-1*, where each GPU updates its part of the weights; *FSDP*, where each keeps only its part of them.

`--measure` holds the sum of these three parts against real steps of 1, 2 and 4 processes on this machine (`benchmarks.gloo`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastpoem_kernels.arguments import Parser

from benchmarks import budget, gloo
from benchmarks.budget import BF16, FP32, INPUTS, REAL
from benchmarks.collectives import CLUSTERS, Cluster, all_gather, all_reduce
from fastpoem.corpus.feed import size_of_share
from fastpoem.doctor.machine import Peak
from fastpoem.doctor.trial import POEMS
from fastpoem.engine.optim import ALIGN
from fastpoem.model.hub import count_parameters

GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
BATCHES = (16, 128, 1024, 8192)  # poems of a step, all GPUs together
PARAMETERS = count_parameters(REAL)
TAIL = FP32 * ALIGN  # bytes that travel with the gradient: losses and counts
# Bytes a parameter: the gradient added to the sums, which are fp32, and these set to zero again.
ADD = BF16 + 3 * FP32
CAST = BF16 + FP32  # of a gradient made fp32
UPDATE = FP32 + budget.ADAMW + FP32 - BF16  # norm and AdamW, both of an fp32 gradient


class Step(NamedTuple):
    """Seconds of a step. exchange: what of it is not behind the compute."""

    compute: float
    exchange: float
    update: float

    @property
    def total(self) -> float:
        return sum(self)


def moved(card: Peak, size: float) -> float:
    """Seconds of kernels that only move so many bytes."""
    return size / (card.memory * 1e12) / budget.REST


def alone(poems: int, card: Peak) -> Step:
    """On one GPU, as `budget.likely` has it: the update reads a bf16 gradient, and nothing is added up."""
    update = moved(card, (BF16 + budget.ADAMW) * PARAMETERS)
    return Step(budget.likely(REAL, poems, card, INPUTS) - update, 0.0, update)


def replicated(poems: int, gpus: int, cluster: Cluster) -> Step:
    """One all-reduce of the fp32 gradient between the backward pass and the update, which every GPU does whole."""
    card = cluster.card
    share = alone(size_of_share(poems, gpus), card)
    if gpus == 1:
        return share
    exchange = all_reduce(cluster, gpus, FP32 * PARAMETERS + TAIL)
    return Step(share.compute + moved(card, ADD * PARAMETERS), exchange, moved(card, UPDATE * PARAMETERS))


def zero1(poems: int, gpus: int, cluster: Cluster) -> Step:
    """The fp32 gradient reduced to parts, each updated on its GPU; the norm is the whole gradient's; the new bf16 weights are gathered."""
    card = cluster.card
    share = alone(size_of_share(poems, gpus), card)
    if gpus == 1:
        return share
    scattered, gathered = (all_gather(cluster, gpus, size * PARAMETERS) for size in (FP32, BF16))
    exchange = scattered + all_reduce(cluster, gpus, TAIL) + gathered
    return Step(share.compute + moved(card, ADD * PARAMETERS), exchange, moved(card, UPDATE * PARAMETERS / gpus))


def fsdp(poems: int, gpus: int, cluster: Cluster) -> Step:
    """Each layer's bf16 weights gathered before its forward and again before its backward pass, its fp32 gradient reduced to parts after it;
    embedding and head, which are one matrix, gathered once. A third of a layer's compute is forward."""
    card, layers = cluster.card, REAL.n_layer
    share = alone(size_of_share(poems, gpus), card)
    if gpus == 1:
        return share
    root = (REAL.vocab_size + REAL.n_positions + 2) * REAL.n_embd  # parameters outside the layers
    layer = (PARAMETERS - root) / layers
    rows = size_of_share(poems, gpus) * INPUTS
    products = sum(i.seconds(card) for i in budget.products(REAL, rows) if not i.name.startswith("head"))
    parts = {item.name: item.seconds(card) for item in budget.step(REAL, size_of_share(poems, gpus), INPUTS)}
    between = parts["attention"] + parts["norms, GELU, dropout, biases"]
    inside = (products / budget.PRODUCTS + between / budget.REST) / layers
    compute = share.compute + moved(card, CAST * PARAMETERS)
    took = simulated(
        layers,
        forward=inside / 3,
        head=compute - layers * inside,
        backward=inside * 2 / 3,
        gather=all_gather(cluster, gpus, BF16 * layer),
        gather_root=all_gather(cluster, gpus, BF16 * root),
        scatter=all_gather(cluster, gpus, FP32 * layer),
        scatter_root=all_gather(cluster, gpus, FP32 * root),
    )
    exchange = took - compute + all_reduce(cluster, gpus, TAIL)
    return Step(compute, exchange, moved(card, UPDATE * PARAMETERS / gpus))


def simulated(
    layers: int,
    *,
    forward: float,
    head: float,
    backward: float,
    gather: float,
    gather_root: float,
    scatter: float,
    scatter_root: float,
) -> float:
    """Seconds of FSDP's passes: the GPU computes one thing at a time and the link moves one thing at a time, in the order asked for. The next
    layer's weights are asked for when a layer begins, its gradient is given away when its backward pass ends."""
    now = 0.0  # until when the GPU is busy
    link = here = gather_root + gather  # until when the link is, and when the next layer's weights are here
    for layer in range(layers):
        now = max(now, here)
        if layer + 1 < layers:
            link = here = max(link, now) + gather
        now += forward
    link = here = max(link, now) + gather
    now += head
    for layer in reversed(range(layers)):
        now = max(now, here)
        if layer > 0:
            link = here = max(link, now) + gather
        now += backward
        link = max(link, now) + scatter
    return link + scatter_root


Way = Callable[[int, int, Cluster], Step]
WAYS: dict[str, Way] = {"replicated": replicated, "ZeRO-1": zero1, "FSDP": fsdp}


def efficiency(way: Way, poems: int, gpus: int, cluster: Cluster) -> float:
    """The speed of one of these GPUs, as a share of that of one alone on the same batch."""
    return alone(poems, cluster.card).total / way(poems, gpus, cluster).total / gpus


def from_which(way: Way, gpus: int, cluster: Cluster, least: float) -> int | None:
    """The smallest batch, a multiple of `gpus`, at which the efficiency is more than `least`; None where the corpus has no such batch. It grows
    with the batch, as what does not depend on the batch counts ever less."""
    low, high = 0, POEMS // gpus
    if efficiency(way, high * gpus, gpus, cluster) <= least:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if efficiency(way, middle * gpus, gpus, cluster) > least:
            high = middle
        else:
            low = middle
    return high * gpus


def exchanges(cluster: Cluster) -> str:
    """Milliseconds of the exchange and of the update, which no batch changes, as a Markdown table."""
    lines = ["| ms | " + " | ".join(f"{n:,}" for n in GPUS[1:]) + " |", "| --- |" + " ---: |" * len(GPUS[1:])]
    sized = {
        "all-reduce of the fp32 gradient": lambda n: all_reduce(cluster, n, FP32 * PARAMETERS + TAIL),
        "reduce-scatter of it": lambda n: all_gather(cluster, n, FP32 * PARAMETERS),
        "all-gather of bf16 weights": lambda n: all_gather(cluster, n, BF16 * PARAMETERS),
        "update, replicated": lambda n: replicated(n, n, cluster).update,
        "update, ZeRO-1 and FSDP": lambda n: zero1(n, n, cluster).update,
    }
    for name, seconds in sized.items():
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * seconds(n):.2f}" for n in GPUS[1:]) + " |")
    return "\n".join(lines)


def sweep(cluster: Cluster) -> str:
    """Milliseconds a step, and thousands of poems a second, over batches and GPUs."""
    lines = ["| batch | | " + " | ".join(f"{n:,}" for n in GPUS) + " |", "| ---: | --- |" + " ---: |" * len(GPUS)]
    for poems in BATCHES:
        for name, way in WAYS.items():
            cells = []
            for gpus in GPUS:
                took = way(poems, gpus, cluster).total if gpus <= poems else None
                cells.append(f"{1e3 * took:.2f} ({poems / took / 1e3:,.0f} k)" if took else "")
            lines.append(f"| {poems:,} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def thresholds(cluster: Cluster) -> str:
    """From which batch on more GPUs are faster than one, half as fast each, and 90% as fast each: three batches a cell."""
    lines = ["| | " + " | ".join(f"{n:,}" for n in GPUS[1:]) + " |", "| --- |" + " ---: |" * len(GPUS[1:])]
    for name, way in WAYS.items():
        cells = []
        for gpus in GPUS[1:]:
            found = [from_which(way, gpus, cluster, least) for least in (1 / gpus, 0.5, 0.9)]
            cells.append(" · ".join("none" if one is None else f"{one:,}" for one in found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description="A training step on many GPUs on paper, and its model against several processes here.")
    parser.add_argument("--measure", action="store_true", help="against real steps of 1, 2 and 4 processes on this CPU")
    if parser.parse_args().measure:
        print(gloo.measured())
        return
    for cluster in CLUSTERS:
        print(f"### {cluster.name}\n\n{exchanges(cluster)}\n\n{sweep(cluster)}\n\n{thresholds(cluster)}\n")


if __name__ == "__main__":
    main()
