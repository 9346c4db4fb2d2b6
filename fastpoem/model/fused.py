"""Pieces of the network whose passes between the products are fastpoem_kernels' C: the float32 step on a CPU, where gcc is.

What `fastpoem.model.ops` does for every weight (its gradient written straight into the flat buffer), and beside it: GELU with its bias, the
residual sum with its bias and dropout are one pass each, forward and backward, and what is dropped is drawn again from its seed instead of
being kept. Numbers differ from PyTorch's only by rounding; what dropout draws differs from what
`ops` would draw.
"""

from __future__ import annotations

from typing import Any

import torch
from fastpoem_kernels import native
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpoem.model.ops import Drawn, direct, draw


def usable(x: Tensor, weight: Tensor) -> bool:
    """Should `x` go through these pieces with `weight`?"""
    return direct(weight) and native.usable(x, weight)


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
