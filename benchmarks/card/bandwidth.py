"""How near both kernels come to a plain copy on this device.

A launch from Python costs more than a kernel at batch 16 runs: on a GPU what is timed is a graph of many launches. The logits of 16 poems
(42 MiB) may stay in a large card's L2, those of 256 do not; the copy beside each is of the same tensor, and profits alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.card.place import Place
from benchmarks.card.tools import steps


def bandwidth(place: Place, seconds: float) -> dict[str, Any]:
    """`rows`: by name, microseconds of kernel and copy, their GB/s, and the kernel's share of the copy's rate."""
    rows = {}
    for name, (run, copy, moved, copied) in steps(place.device, place.small).items():
        mine, theirs = timed(place, run), timed(place, copy)
        rate, best = moved / mine / 1e9, copied / theirs / 1e9
        rows[name] = {"us": 1e6 * mine, "gb_s": rate, "copy_us": 1e6 * theirs, "copy_gb_s": best, "share": rate / best}
    return {"rows": rows}


def timed(place: Place, run: Callable[[], Any], times: int = 20, rounds: int = 7) -> float:
    """Seconds of one run: the median over some rounds of `times` in a row."""
    if not place.gpu:
        run()
        return statistics.median(_clock(run) for _ in range(rounds))
    aside = torch.cuda.Stream(place.device)
    aside.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream(place.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        for _ in range(times):
            run()
    found = []
    for number in range(rounds + 1):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        if number:
            found.append(first.elapsed_time(last) / 1e3 / times)
    return max(statistics.median(found), 1e-9)


def _clock(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return max(time.perf_counter() - begin, 1e-9)
