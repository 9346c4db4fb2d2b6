"""How much a step has to compute, and how fast this machine multiplies matrices: the two ends of "share of sgemm".

Model FLOPs of a token that sees k tokens, itself included: forward 2 P + 4 L D k, where P is the number of weights in matrix products (12 D^2 a layer and V D in the
head, for an inner width of 4 D), L layers, D wide; backward twice that. So 6 P + 12 L D k, counted for real tokens only: padding earns nothing, and of attention only the causal half counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from fastpoem_kernels.products import product, uses_tiles
from torch import Tensor

from fastpoem.model.gpt2 import GPT2Config

Shape = tuple[int, int, int]


def matrix_weights(shape: GPT2Config) -> int:
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    return shape.n_layer * (4 * wide**2 + 2 * wide * inner) + shape.vocab_size * wide


def model_flops(shape: GPT2Config, lengths: Iterable[int]) -> int:
    """Of one training step on poems of which so many tokens are inputs with a target (length - 1)."""
    weights, attention = matrix_weights(shape), shape.n_layer * shape.n_embd
    return sum(6 * weights * n + 12 * attention * (n * (n + 1) // 2) for n in lengths)


def products(shape: GPT2Config, rows: int) -> list[Shape]:
    """(m, k, n) of the products x @ weight of a forward pass over `rows` tokens."""
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    return [(rows, wide, n) for n in (3 * wide, wide, inner, shape.vocab_size)] + [(rows, inner, wide)]


def best_product(shapes: Iterable[Shape], dtype: torch.dtype, device: str, rounds: int = 3) -> float:
    """FLOP/s of the fastest of these products, each the best of some rounds, by PyTorch and where fastpoem has one of its own by that too.

    In 16 bits also in the other layouts and sizes that a step may give them: on matrix units these differ by a factor of three. In float32
    they are alike.
    """
    best = 0.0
    for m, k, n in shapes:
        for a, b in operands(m, k, n, dtype, device):
            flops, out = 2 * a.shape[0] * a.shape[1] * b.shape[1], a @ b
            for multiply in (torch.mm, product) if uses_tiles(a) else (torch.mm,):
                for _ in range(rounds):
                    settle(device)
                    begin = time.perf_counter()
                    multiply(a, b, out=out)
                    settle(device)
                    best = max(best, flops / (time.perf_counter() - begin))
    return best


def operands(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What a weight (k, n) over m tokens is multiplied as; a first operand that is transposed has been copied so beforehand."""

    def made(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=device)

    x, dy = made(m, k), made(m, n)
    yield x, made(k, n)
    if dtype != torch.float32:
        yield x, made(n, k).t()  # the weight kept transposed
        yield dy, made(k, n).t()  # gradient of x
        yield made(k, m), dy  # gradient of the weight
        yield made(n, m), x  # the same, transposed


def settle(device: str) -> None:
    """Wait for what the device was given to do."""
    if device != "cpu":
        torch.cuda.synchronize()
