"""Causal self-attention over a padded batch or a packed one, with no mask in either.

Right padding needs none: a causal query never looks to its right, and what padded queries compute is never used. A mask would cost the
flash kernel. A *packed* batch is poems laid end to end in one row of tokens; everything but attention treats it as (1, N), and attention
unfolds it to (poems, longest), so that poems cannot see each other and the matrix products, nearly all of the work, run without padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpoem.model import ops


class Packing(NamedTuple):
    """Where the poems of a packed batch of N tokens are. Built by the feed."""

    positions: Tensor  # (N,) int64, each token's position in its poem
    unfold: Tensor  # (P * T,) int64, for each place of a padded (P, T) batch the packed token there; 0 on padding
    fold: Tensor  # (N,) int64, each packed token's place in the padded batch
    poems: int  # P


def causal_attention(qkv: Tensor, heads: int, scale: float, dropout: float, packing: Packing | None) -> Tensor:
    """qkv (B, T, 3 * D), q then k then v, each of `heads` heads -> (B, T, D). With `packing`, B = 1 and T = N packed tokens.

    scale multiplies q k^T; dropout is the probability with which attention weights are dropped.
    """
    if packing is not None:
        padded = qkv[0].index_select(0, packing.unfold).view(packing.poems, -1, qkv.shape[-1])  # (P, T, 3 * D)
        out = causal_attention(padded, heads, scale, dropout, None)  # (P, T, D)
        return out.reshape(-1, out.shape[-1]).index_select(0, packing.fold)[None]  # (1, N, D)
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if _keeps_weights(qkv, dropout):
        return ops.CausalAttention.apply(qkv, heads, scale, dropout)
    q, k, v = (
        x.view(batch, length, heads, width // heads).transpose(1, 2) for x in qkv.split(width, dim=-1)
    )  # (B, H, T, D / H)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)  # (B, H, T, D / H)
    return out.transpose(1, 2).reshape(batch, length, width)


def _keeps_weights(qkv: Tensor, dropout: float) -> bool:
    """On a CPU, SDPA's kernel for training has no dropout and computes the weights twice: for short poems, keeping them is faster."""
    eager = qkv.is_cpu and qkv.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and (dropout > 0 or qkv.shape[1] <= 128)


def pack_index(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(positions, unfold, fold) of `Packing` for poems of these lengths."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes  # (P,)
    place = torch.arange(int(sizes.max()))  # (T,)
    real = place < sizes[:, None]  # (P, T)
    unfold = torch.where(real, starts[:, None] + place, 0).flatten()
    positions = place.expand_as(real)[real]
    return positions, unfold, real.flatten().nonzero().squeeze(1)
