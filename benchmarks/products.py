"""The matrix products of a step on this CPU, each in every way that there is: `python -m benchmarks.products`.

A step multiplies with every weight three times (x W, dy W^T, x^T dy), and a library's speed depends on which operand it is given transposed
and on how many columns come out. For each product, in turn, medians in GFLOP/s: PyTorch as it is called; PyTorch with transposed operands
copied beforehand, outside the clock, which is what another layout could win; and fastpoem's own where it has one. Then all of a step's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from fastpoem_kernels.products import product, uses_tiles
from torch import Tensor

from benchmarks.arithmetic import products
from benchmarks.scene import BATCH, FULL, LENGTH
from fastpoem.engine.memory import keep_freed_memory
from fastpoem.model.gpt2 import GPT2Config

Way = Callable[[Tensor, Tensor, Tensor], object]


def in_every_way(a: Tensor, b: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a @ b, medians of ways that are taken in turn. Operands are read from memory, as a step finds its weights."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
    copied = a.contiguous(), b.contiguous()
    ways: dict[str, Way] = {"PyTorch": lambda a, b, out: torch.mm(a, b, out=out)}
    if not (a.is_contiguous() and b.is_contiguous()):
        ways["copied beforehand"] = lambda a, b, out: torch.mm(*copied, out=out)
    if uses_tiles(a):
        ways["fastpoem"] = lambda a, b, out: product(a, b, out=out)
    took: dict[str, list[float]] = {name: [] for name in ways}
    elsewhere = torch.empty(16 << 20)
    for number in range(rounds + 1):
        for name, way in ways.items():
            elsewhere.fill_(number)
            begin = time.perf_counter()
            way(a, b, out)
            if number:  # the first loads code and touches memory
                took[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def measured(
    shape: GPT2Config, tokens: int, dtype: torch.dtype, rounds: int
) -> list[tuple[str, int, int, dict[str, float]]]:
    """(what, how often a step has it, FLOPs, seconds of each way) of every product with a weight."""
    rows = []
    for m, k, n in products(shape, tokens):
        times = 1 if n == shape.vocab_size else shape.n_layer
        x, weight, dy = (torch.randn(size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
        weight = weight.t().contiguous().t() if n == shape.vocab_size else weight  # the head's is the embedding's
        for what, a, b in (("x W", x, weight), ("dy Wᵀ", dy, weight.t()), ("xᵀ dy", x.t(), dy)):
            if n == shape.vocab_size and what == "xᵀ dy":
                what, a, b = "dyᵀ x", dy.t(), x
            rows.append((f"{k} → {n}, {what}", times, 2 * m * k * n, in_every_way(a, b, rounds)))
    return rows


def table(rows: list[tuple[str, int, int, dict[str, float]]], dtype: torch.dtype) -> str:
    """In Markdown, with the sum over a step of each way, PyTorch's where there is no other."""
    ways = list(dict.fromkeys(way for *_, seconds in rows for way in seconds))
    lines = [f"| {str(dtype)[6:]}, GFLOP/s | {' | '.join(ways)} |", f"| --- |{' --- |' * len(ways)}"]
    for what, _, flops, seconds in rows:
        cells = (f"{flops / seconds[way] / 1e9:,.0f}" if way in seconds else "" for way in ways)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    sums = [sum(times * seconds.get(way, seconds["PyTorch"]) for _, times, _, seconds in rows) for way in ways]
    lines.append(f"| a step's, ms | {' | '.join(f'{total * 1e3:,.0f}' for total in sums)} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="python -m benchmarks.products")
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--tokens", type=int, default=BATCH * (LENGTH - 1), help="of a step")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(given)
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, {options.tokens} tokens\n")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if options.precision in (name, "both"):
            print(table(measured(FULL, options.tokens, dtype, options.rounds), dtype), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
