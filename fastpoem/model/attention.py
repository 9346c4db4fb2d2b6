"""Causal self-attention over a padded batch or a packed one, with no mask in either.

Right padding needs none: a causal query never looks to its right, and what padded queries compute is never used. A mask would cost the
flash kernel. A *packed* batch is poems laid end to end in one row of tokens; everything but attention treats it as (1, N). Attention has
flash's variable-length kernel for it or, on a CPU, C (`fastpoem.model.fused`) where there is one; elsewhere it unfolds the row to (poems,
longest), so that poems cannot see each other and the matrix products, nearly all of the work, run without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpoem.model import ops
from fastpoem.model.dropout import Draw, Poems, drop


class Packing(NamedTuple):
    """Where the P poems of a packed batch of N tokens are. What is left of N after the last poem is padding."""

    positions: Tensor  # (N,) int64, each token's position in its poem; 0 on padding
    unfold: Tensor  # (P, T) int64, for each place of a padded batch the packed token there; 0 on padding
    fold: Tensor  # (N,) int64, each packed token's place in the padded batch, flat; anywhere on padding
    borders: Tensor  # (P + 2,) int32, where each poem begins, where the last ends, and N


# (q, k, v each (N, H, D / H), borders, longest, scale, dropout) -> (N, H, D / H): attention inside each of several sequences
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], Tensor]


def causal_attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    dropout: float,
    packing: Packing | None,
    varlen: Varlen | None = None,
    draw: Draw = None,
) -> Tensor:
    """qkv (B, T, 3 * D), q then k then v, each of `heads` heads -> (B, T, D). With `packing`, B = 1 and T = N packed tokens.

    scale multiplies q k^T; dropout is the probability with which attention weights are dropped, draw what they are drawn by where no fused
    kernel does it.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if packing is not None and varlen is not None:
        q, k, v = qkv.view(length, 3, heads, width // heads).unbind(1)  # (N, H, D / H)
        # padding is a sequence too, of less than a slot of the feed's, which is no longer than T
        out = varlen(q, k, v, packing.borders, packing.unfold.shape[1], scale, dropout)
        return out.reshape(1, length, width)
    if packing is not None:
        padded = qkv[0].index_select(0, packing.unfold.flatten()).view(*packing.unfold.shape, qkv.shape[-1])
        out = causal_attention(padded, heads, scale, dropout, None, draw=draw)  # (P, T, D)
        return out.reshape(-1, out.shape[-1]).index_select(0, packing.fold)[None]  # (1, N, D)
    if dropout > 0 and isinstance(draw, Poems):
        return ops.CausalAttention.apply(qkv, heads, scale, dropout, draw.seeds[:batch])
    if dropout == 0 and _keeps_weights(qkv):
        return ops.CausalAttention.apply(qkv, heads, scale)
    q, k, v = (
        x.view(batch, length, heads, width // heads).transpose(1, 2) for x in qkv.split(width, dim=-1)
    )  # (B, H, T, D / H)
    if dropout > 0 and draw is not None and not _fused(q):
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-2, -1) * scale).masked_fill(future, -math.inf)  # (B, H, T, T)
        out = drop(torch.softmax(scores, -1), dropout, draw) @ v
        return out.transpose(1, 2).reshape(batch, length, width)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)  # (B, H, T, D / H)
    return out.transpose(1, 2).reshape(batch, length, width)


def _fused(q: Tensor) -> bool:
    """Does SDPA surely take a kernel that has dropout of its own, which keeps what it was drawn by? A compiler takes the plain form apart."""
    return q.is_cuda and _has_fused() and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _has_fused() -> bool:
    return torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()


# torch.compiler.assume_constant_result does this and no more, but imports torch._dynamo, which takes seconds.
_has_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _keeps_weights(qkv: Tensor) -> bool:
    """On a CPU, SDPA's kernel for training computes the weights twice: for short poems, keeping them is faster."""
    eager = qkv.is_cpu and qkv.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and qkv.shape[1] <= 128
