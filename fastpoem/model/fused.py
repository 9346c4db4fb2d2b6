"""Pieces of the network whose passes between the products are fastpoem_kernels' C: the float32 and the bfloat16 step on a CPU, where gcc is.

What `fastpoem.model.ops` does for every weight (its gradient written straight into the flat buffer), and beside it: GELU with its bias, the
residual sum with its bias and dropout are one pass each, forward and backward, attention is one task a head, which keeps nothing of (T, T),
and what is dropped is drawn again from its seed instead of being kept.
Numbers differ from PyTorch's only by rounding; what dropout draws differs from what `ops` would draw, and is for a poem in a pack what it
is in a padded batch.
"""

from __future__ import annotations

from typing import Any

import torch
from fastpoem_kernels import native, product
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpoem.model.dropout import Poems
from fastpoem.model.ops import direct


def usable(x: Tensor, weight: Tensor) -> bool:
    """Should `x` go through these pieces with `weight`?"""
    return direct(weight) and native.usable(x, weight)


def dropped(p: float) -> int:
    """How many of 2^32 elements, for dropout with probability p."""
    return min(round(p * 2**32), 2**32 - 1)


class Drop(torch.autograd.Function):
    """dropout(x), x (B, T, D)."""

    @staticmethod
    def forward(ctx, x, p, poems: Poems):
        ctx.drawn = poems.starts, len(poems.seeds), x.shape[-1], poems.seeds, dropped(p)
        out = torch.empty_like(x)
        native.run("drop", x, out, *ctx.drawn)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        native.run("drop", dy.contiguous(), dx, *ctx.drawn)
        return dx, None, None


class LayerNorm(torch.autograd.Function):
    """x (B, T, D) bfloat16 -> (B, T, D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, stats = torch.empty_like(x), torch.empty(x.numel() // len(weight), 2, dtype=torch.float32)
        native.run("layer_norm", x, weight, bias, y, stats, len(stats), len(weight), eps)
        ctx.save_for_backward(x, stats)
        ctx.weight, ctx.bias = weight, bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, stats = ctx.saved_tensors
        weight, bias, dx = ctx.weight, ctx.bias, torch.empty_like(x)
        outputs = dx, weight.main_grad, bias.main_grad
        native.run("layer_norm_backward", x, weight, stats, dy.contiguous(), *outputs, len(stats), len(weight))
        return dx, None, None, None


class Attention(torch.autograd.Function):
    """x (B, T, D) -> (B, T, D): causal attention of q, k, v = x @ weight (D, 3 * D) + bias, its weights dropped with probability p.

    In a packed batch B = 1 and T = N packed tokens, and a token sees those of its poem. scale multiplies q k^T.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, poems: Poems, heads, scale, p):
        rows = x.flatten(0, 1)  # (N, D)
        qkv = product(rows, weight)  # (N, 3 * D)
        starts, seeds = poems
        sizes = len(seeds), heads, x.shape[-1] // heads, scale
        out, stats = torch.empty_like(rows), torch.empty(heads, len(rows), 2, dtype=torch.float32)
        drawn, scratch = (seeds, dropped(p)), _scratch(x.dtype, starts, *sizes)
        native.run("attention", qkv, bias, out, stats, scratch, starts, *sizes, *drawn)
        ctx.save_for_backward(rows, qkv, stats, starts)
        ctx.weight, ctx.bias, ctx.sizes, ctx.drawn = weight, bias, sizes, drawn
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, qkv, stats, starts = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        d, sums = torch.empty_like(qkv), stats.new_empty(len(starts) - 1, len(bias), dtype=torch.float64)
        inputs, outputs = (qkv, bias, stats, dy.contiguous()), (d, bias.main_grad, sums)
        scratch = _scratch(dy.dtype, starts, *ctx.sizes)
        native.run("attention_backward", *inputs, *outputs, scratch, starts, *ctx.sizes, *ctx.drawn)
        product(rows.t(), d, out=weight.main_grad)
        return product(d, weight.t()).view_as(dy), None, None, None, None, None, None


def _scratch(dtype: torch.dtype, starts: Tensor, poems: int, heads: int, width: int, scale: float) -> Tensor:
    return torch.empty(native.run("attention_scratch", starts, poems, width, dtype=dtype), dtype=torch.float32)


class Project(torch.autograd.Function):
    """x (B, T, in) -> residual (B, T, D) + dropout(x @ weight + bias)."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, p, poems: Poems):
        x = x.flatten(0, 1)
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        out, ctx.drawn = _project(x, weight, bias, residual, p, poems)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = _project_backward(dy, x, ctx.weight, ctx.bias, ctx.drawn)
        return dx.view(*dy.shape[:-1], -1), None, None, dy, None, None


class FeedForward(torch.autograd.Function):
    """x (B, T, D) -> residual (B, T, D) + dropout(gelu(x @ fc + fc_bias) @ proj + proj_bias), GELU in its tanh form."""

    @staticmethod
    def forward(ctx, x, fc, fc_bias, proj, proj_bias, residual, p, poems: Poems):
        x = x.flatten(0, 1)  # (N, D)
        before = product(x, fc)  # (N, I)
        after = torch.empty_like(before)
        native.run("bias_gelu", before, fc_bias, after, *before.shape)
        ctx.save_for_backward(x, before, after)
        ctx.weights = fc, fc_bias, proj, proj_bias
        out, ctx.drawn = _project(after, proj, proj_bias, residual, p, poems)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, before, after = ctx.saved_tensors
        fc, fc_bias, proj, proj_bias = ctx.weights
        d = _project_backward(dy, after, proj, proj_bias, ctx.drawn)  # (N, I)
        native.run("gelu_backward", before, d, fc_bias.main_grad, *d.shape)
        product(x.t(), d, out=fc.main_grad)
        return product(d, fc.t()).view_as(dy), None, None, None, None, dy, None, None


Drawn = tuple[Tensor, int, int, Tensor, int]  # the last arguments of drop_add


def _project(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, p: float, poems: Poems) -> tuple[Tensor, Drawn]:
    """x (N, in), residual (B, T, D) -> the sum (B, T, D), and what was drawn for it."""
    drawn, out = (poems.starts, len(poems.seeds), len(bias), poems.seeds, dropped(p)), product(x, weight)
    native.run("drop_add", out, bias, residual.contiguous(), *drawn)
    return out.view_as(residual), drawn


def _project_backward(dy: Tensor, x: Tensor, weight: Any, bias: Any, drawn: Drawn) -> Tensor:
    """dy (B, T, D) -> dx (N, in); writes the gradients of weight and bias."""
    d = dy.new_empty(len(x), dy.shape[-1])
    native.run("drop_add_backward", dy.contiguous(), d, bias.main_grad, *drawn)
    product(x.t(), d, out=weight.main_grad)
    return product(d, weight.t())
