"""Pieces of the network whose passes between the products are fastpoem_kernels' C: the float32 step on a CPU, where gcc is.

What `fastpoem.model.ops` does for every weight (its gradient written straight into the flat buffer), and beside it: GELU with its bias, the
residual sum with its bias and dropout, and attention's softmax with its dropout are one pass each, forward and backward, and what is
dropped is drawn again from its seed instead of being kept. Numbers differ from PyTorch's only by rounding; what dropout draws differs from what
`ops` would draw.
"""

from __future__ import annotations

from typing import Any

import torch
from fastpoem_kernels import native
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpoem.model.ops import direct


def usable(x: Tensor, weight: Tensor) -> bool:
    """Should `x` go through these pieces with `weight`?"""
    return direct(weight) and native.usable(x, weight)


Drawn = tuple[Tensor, int]


def draw(p: float) -> Drawn:
    """(seed (1,) int64 from PyTorch's generator, elements dropped of 2^32) for dropout with probability p."""
    return torch.empty(1, dtype=torch.int64).random_(-(2**63), None), min(round(p * 2**32), 2**32 - 1)


class Project(torch.autograd.Function):
    """x (B, T, in) -> residual (B, T, D) + dropout(x @ weight + bias)."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, p):
        x = x.flatten(0, 1)
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        out, ctx.drawn = _project(x, weight, bias, residual, p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = _project_backward(dy, x, ctx.weight, ctx.bias, ctx.drawn)
        return dx.view(*dy.shape[:-1], -1), None, None, dy, None


class FeedForward(torch.autograd.Function):
    """x (B, T, D) -> residual (B, T, D) + dropout(gelu(x @ fc + fc_bias) @ proj + proj_bias), GELU in its tanh form."""

    @staticmethod
    def forward(ctx, x, fc, fc_bias, proj, proj_bias, residual, p):
        x = x.flatten(0, 1)  # (N, D)
        before = x @ fc  # (N, I)
        after = torch.empty_like(before)
        native.run("bias_gelu", before, fc_bias, after, *before.shape)
        ctx.save_for_backward(x, before, after)
        ctx.weights = fc, fc_bias, proj, proj_bias
        out, ctx.drawn = _project(after, proj, proj_bias, residual, p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, before, after = ctx.saved_tensors
        fc, fc_bias, proj, proj_bias = ctx.weights
        d = _project_backward(dy, after, proj, proj_bias, ctx.drawn)  # (N, I)
        native.run("gelu_backward", before, d, fc_bias.main_grad, *d.shape)
        torch.mm(x.t(), d, out=fc.main_grad)
        return (d @ fc.t()).view_as(dy), None, None, None, None, dy, None


class CausalAttention(torch.autograd.Function):
    """As `ops.CausalAttention`."""

    @staticmethod
    def forward(ctx, qkv, heads, scale, p):
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        parts = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, -1)
        q, k, v = parts  # (B * H, T, D / H)
        weights = torch.bmm(q, k.transpose(1, 2))  # (B * H, T, T)
        left = torch.empty_like(weights)
        native.run("causal_softmax", weights, left, *weights.shape[:2], scale, *draw(p))
        ctx.save_for_backward(parts, weights, left)
        ctx.scale = scale
        return torch.bmm(left, v).view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        parts, weights, left = ctx.saved_tensors
        q, k, v = parts
        batch, length, width = dy.shape
        heads = q.shape[0] // batch
        dy = dy.view(batch, length, heads, -1).transpose(1, 2).reshape(batch * heads, length, -1)  # (B * H, T, D / H)
        dparts = torch.empty_like(parts)
        torch.bmm(left.transpose(1, 2), dy, out=dparts[2])
        d = torch.bmm(dy, v.transpose(1, 2))  # (B * H, T, T)
        native.run("causal_softmax_backward", weights, left, d, *d.shape[:2], ctx.scale)
        torch.bmm(d, k, out=dparts[0])
        torch.bmm(d.transpose(1, 2), q, out=dparts[1])
        dqkv = dparts.view(3, batch, heads, length, -1).permute(1, 3, 0, 2, 4).reshape(batch, length, 3 * width)
        return dqkv, None, None, None


def _project(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, p: float) -> tuple[Tensor, Drawn]:
    """x (N, in), residual (B, T, D) -> the sum (B, T, D), and what was drawn for it."""
    drawn, out = draw(p), x @ weight
    native.run("drop_add", out, bias, residual.contiguous(), *out.shape, *drawn)
    return out.view_as(residual), drawn


def _project_backward(dy: Tensor, x: Tensor, weight: Any, bias: Any, drawn: Drawn) -> Tensor:
    """dy (B, T, D) -> dx (N, in); writes the gradients of weight and bias."""
    d = dy.new_empty(len(x), dy.shape[-1])
    native.run("drop_add_backward", dy.contiguous(), d, bias.main_grad, *d.shape, *drawn)
    torch.mm(x.t(), d, out=weight.main_grad)
    return d @ weight.t()
