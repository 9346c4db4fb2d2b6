"""The pieces of the network whose backward pass is written here: the eager CPU step is made of them,
where gcc is with `fastpoem.model.fused` in place of some.

Autograd's own pieces are right but, on a CPU, spend a third of a step beside the matrix products. What is different here:

* a weight's gradient goes straight into its place in the optimizer's flat buffer (`weight.main_grad`, set by FlatAdamW), where autograd
  would make a new tensor, zero the buffer and add: three more passes over every weight;
* dropout takes 16 random bits an element from wide draws, one a poem, where `F.dropout` draws a number each, and its mask is applied
  together with the residual sum;
* attention keeps its weights for the backward pass instead of computing them again, and drops them without leaving its buffers.

Every gradient is written exactly once a step, so nothing is zeroed; the head, which shares the embedding's weight, writes first and the
embedding adds. Numbers differ from autograd's only by the order of sums. Where there is no `main_grad` (another optimizer, torch.compile,
no gradient wanted, a device that is neither a CPU nor CUDA's) the model uses the plain pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastpoem_kernels import product
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpoem.model.dropout import Poems

LANES = 4  # 16-bit lanes in a random int64
LEVELS = 2**16


def direct(weight: Tensor) -> bool:
    """Should this weight's gradient be written straight into the flat buffer?"""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or getattr(weight, "main_grad", None) is None:
        return False
    return weight.is_cpu or weight.is_cuda


def keep_mask(sizes: Sequence[int], seeds: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """(n,) for poems of so many elements, one after the other: 0 (with probability p to the nearest 1/65536) or 1 / (1 - that probability),
    so that the expectation is exact (in bfloat16, to its rounding). seeds (P,) int64: an element's follows from its poem's, and its number."""
    dropped = round(p * LEVELS)
    bits = np.random.PCG64DXSM(0)  # PyTorch's own generator takes 32 bits of a seed, and is slower
    begin = {"state": 0, "inc": 1}
    state: Any = {"bit_generator": "PCG64DXSM", "state": begin, "has_uint32": 0, "uinteger": 0}
    drawn = []
    for seed, size in zip(seeds.tolist(), sizes, strict=True):
        begin["state"] = (seed % 2**64) * (2**64 + 1)
        bits.state = state
        drawn.append(bits.random_raw(-(-size // LANES)).view(np.int16)[:size])
    lanes = torch.from_numpy(np.concatenate(drawn))  # (n,), uniform in [-2**15, 2**15)
    mask = torch.ge(lanes, dropped - LEVELS // 2, out=torch.empty(len(lanes), dtype=dtype))
    return mask.mul_(LEVELS / (LEVELS - dropped))


class Affine(torch.autograd.Function):
    """x (N, in) @ weight (in, out) + bias (out,)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return torch.addmm(bias, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        torch.mm(x.t(), dy, out=ctx.weight.main_grad)
        torch.sum(dy, 0, out=ctx.bias.main_grad)
        return dy @ ctx.weight.t(), None, None


class Head(torch.autograd.Function):
    """x (N, D) @ weight (V, D)^T. Writes the shared weight's gradient; `Embed` adds to it later in the same backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        product(dy.t(), x, out=ctx.weight.main_grad)
        return product(dy, ctx.weight), None


class Embed(torch.autograd.Function):
    """tokens[ids] + places[positions], ids (B, T), positions None for 0 … T - 1 or (N,) of a packed batch."""

    @staticmethod
    def forward(ctx, tokens, places, ids, positions):
        ctx.tokens, ctx.places, ctx.ids, ctx.positions = tokens, places, ids, positions
        return F.embedding(ids, tokens) + (
            places[: ids.shape[1]] if positions is None else F.embedding(positions, places)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # (B, T, D)
        gradient, ids, rows = ctx.tokens.main_grad, ctx.ids.flatten(), dy.flatten(0, 1)
        # In float32 whatever the dtype: a comma comes a hundred times in a batch.
        if gradient.dtype == torch.float32:
            gradient.index_add_(0, ids, rows)
        else:  # each id's sum at one of its places, whichever; no copy of the whole vocabulary's rows
            numbers = torch.arange(len(ids), device=ids.device)
            place = ids.new_empty(len(gradient)).scatter_(0, ids, numbers).index_select(0, ids)  # (N,)
            total = torch.zeros_like(rows, dtype=torch.float32).index_add_(0, place, rows.float())
            sums = gradient.index_select(0, ids).float() + total.index_select(0, place)
            gradient.index_copy_(0, ids, sums.to(gradient.dtype))
        places = ctx.places.main_grad.zero_()
        if ctx.positions is None:
            torch.sum(dy, 0, out=places[: dy.shape[1]])
        else:
            places.index_add_(0, ctx.positions, dy[0])
        return None, None, None, None


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight, ctx.bias = weight, bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        wanted = [True, True, True]
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, mean, rstd, weight, bias, wanted
        )
        weight.main_grad.copy_(dweight)
        bias.main_grad.copy_(dbias)
        return dx, None, None, None


class DropAdd(torch.autograd.Function):
    """residual + dropout(x); residual None is dropout alone."""

    @staticmethod
    def forward(ctx, x, residual, p, poems: Poems):
        sizes = (poems.starts.diff() * x.shape[-1]).tolist()
        ctx.mask = keep_mask(sizes, poems.seeds, p, x.dtype).view(x.shape)
        ctx.residual = residual is not None
        return x * ctx.mask if residual is None else torch.addcmul(residual, x, ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * ctx.mask, dy if ctx.residual else None, None, None


class CausalAttention(torch.autograd.Function):
    """qkv (B, T, 3 * D) -> (B, T, D), attention weights dropped with probability p, by seeds (B,) int64.

    With weights P = softmax(scale * q k^T) and what is left of them by dropout R = P * mask, the output is R v and, since
    dP * P = dR * R, the softmax's gradient is dR * R - P * rowsum(dR * R): the mask itself need not be kept.
    """

    @staticmethod
    def forward(ctx, qkv, heads, scale, p=0.0, seeds=None):
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        parts = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, -1)
        q, k, v = parts  # (B * H, T, D / H)
        weights = _causal_softmax(q, k, scale)  # (B * H, T, T)
        sizes = [heads * length * length] * batch
        left = weights * keep_mask(sizes, seeds, p, weights.dtype).view_as(weights) if p > 0 else weights
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
        dscores = torch.bmm(dy, v.transpose(1, 2))  # (B * H, T, T)
        dscores.mul_(left)
        dscores.addcmul_(weights, dscores.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
        torch.bmm(dscores, k, out=dparts[0])
        torch.bmm(dscores.transpose(1, 2), q, out=dparts[1])
        dqkv = dparts.view(3, batch, heads, length, -1).permute(1, 3, 0, 2, 4).reshape(batch, length, 3 * width)
        return dqkv, None, None, None, None


def _causal_softmax(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q, k (B * H, T, D / H) -> attention's weights (B * H, T, T)."""
    future = torch.full((q.shape[1], q.shape[1]), -math.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores) if scores.dtype == torch.float32 else torch.softmax(scores, -1)
