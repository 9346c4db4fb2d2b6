"""GPT-2 with a tied head, in Hugging Face's parameter names and layouts, so that weights pass in and out without translation.

Why not transformers' own: importing it takes seconds, and the step wants what it does not offer: no caches, masks or output objects on
the way, logits already flat for the fused loss, and packed batches. The arithmetic is the same (Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019): pre-norm blocks, learned positions, tanh-approximated GELU, weights of shape (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastpoem_kernels import native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpoem.model import fused, ops
from fastpoem.model.attention import Packing, Varlen, causal_attention
from fastpoem.model.dropout import Draw, Masks, Poems, drop

ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
}  # config's name -> F.gelu's approximation


@dataclass(frozen=True)
class GPT2Config:
    """The shape of the model, in the names of Hugging Face's config.json."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


def count_parameters(shape: GPT2Config) -> int:
    """How many numbers a GPT-2 of this shape learns, known before any memory is taken."""
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    layer = 4 * wide + 4 * wide * (wide + 1) + inner * (wide + 1) + wide * (inner + 1)
    return (shape.vocab_size + shape.n_positions) * wide + shape.n_layer * layer + 2 * wide


class Affine(nn.Module):
    """x @ weight + bias, weight (in, out): what Hugging Face calls Conv1D."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        rows = x.flatten(0, 1)
        if ops.direct(self.weight):
            return ops.Affine.apply(rows, self.weight, self.bias).view(*x.shape[:-1], -1)
        return torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.weight.dtype == torch.bfloat16 and fused.usable(x, self.weight):
            return fused.LayerNorm.apply(x, self.weight, self.bias, self.eps)
        if ops.direct(self.weight):
            return ops.LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Dropout(nn.Module):
    """dropout(x), added to `residual` where there is one."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def now(self) -> float:
        """The probability: 0 in evaluation."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None, draw: Draw = None) -> Tensor:
        if self.now > 0 and isinstance(draw, Poems):
            if residual is None and native.usable(x):
                return fused.Drop.apply(x, self.p, draw)
            return ops.DropAdd.apply(x, residual, self.p, draw)
        dropping = self.now > 0 and draw is not None
        x = drop(x, self.p, draw) if dropping else F.dropout(x, self.p, self.training)
        return x if residual is None else residual + x


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, varlen: Varlen | None) -> None:
        super().__init__()
        self.varlen = varlen
        self.c_attn = Affine(config.n_embd, 3 * config.n_embd)
        self.c_proj = Affine(config.n_embd, config.n_embd)
        self.heads, self.dropout = config.n_head, config.attn_pdrop
        self.resid_dropout = Dropout(config.resid_pdrop)
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, residual: Tensor, packing: Packing | None, draws: Sequence[Draw]) -> Tensor:
        """x, residual (B, T, D), two draws -> residual + dropout(attention(x)) (B, T, D)"""
        dropout, qkv, proj = self.dropout if self.training else 0.0, self.c_attn, self.c_proj
        weights_draw, draw = draws
        if isinstance(weights_draw, Poems) and fused.usable(x, qkv.weight):
            x = fused.Attention.apply(x, qkv.weight, qkv.bias, weights_draw, self.heads, self.scale, dropout)
        else:
            x = causal_attention(qkv(x), self.heads, self.scale, dropout, packing, self.varlen, weights_draw)
        if isinstance(draw, Poems) and fused.usable(x, proj.weight):
            return fused.Project.apply(x, proj.weight, proj.bias, residual, self.resid_dropout.now, draw)
        return self.resid_dropout(proj(x), residual, draw)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Affine(config.n_embd, inner)
        self.c_proj = Affine(inner, config.n_embd)
        self.approximate = ACTIVATIONS[config.activation_function]
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, residual: Tensor, draw: Draw = None) -> Tensor:
        """x, residual (B, T, D) -> residual + dropout(proj(gelu(fc(x)))) (B, T, D)"""
        fc, proj, dropout = self.c_fc, self.c_proj, self.resid_dropout
        if isinstance(draw, Poems) and self.approximate == "tanh" and fused.usable(x, fc.weight):
            return fused.FeedForward.apply(x, fc.weight, fc.bias, proj.weight, proj.bias, residual, dropout.now, draw)
        return dropout(proj(F.gelu(fc(x), approximate=self.approximate)), residual, draw)


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, varlen: Varlen | None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, varlen)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, packing: Packing | None, draws: Sequence[Draw]) -> Tensor:
        """x (B, T, D), three draws -> (B, T, D)"""
        x = self.attn(self.ln_1(x), x, packing, draws[:2])
        return self.mlp(self.ln_2(x), x, draws[2])


class Transformer(nn.Module):
    def __init__(self, config: GPT2Config, varlen: Varlen | None) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, varlen) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = Dropout(config.embd_pdrop)
        self.is_checkpointed = (
            False  # of each block its input alone is kept, and the rest computed again in the backward pass
        )

    def forward(self, ids: Tensor, packing: Packing | None, draws: Sequence[Draw]) -> Tensor:
        """ids (B, T) int64, 1 + 3 * L draws -> (B, T, D)"""
        positions = None if packing is None else packing.positions
        if ops.direct(self.wte.weight):
            x = ops.Embed.apply(self.wte.weight, self.wpe.weight, ids, positions)
        else:
            x = self.wte(ids) + (self.wpe.weight[: ids.shape[1]] if positions is None else self.wpe(positions))
        x = self.dropout(x, draw=draws[0])
        for layer, block in enumerate(self.h):
            mine = draws[3 * layer + 1 : 3 * layer + 4]
            if self.is_checkpointed and torch.is_grad_enabled():
                again: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=draws[0] is None)
                x = checkpoint(block, x, packing, mine, **again)
            else:
                x = block(x, packing, mine)
        return self.ln_f(x)


class GPT2(nn.Module):
    """The language model. `state_dict()` has the names of `GPT2LMHeadModel` (whose tied `lm_head.weight` is `transformer.wte.weight`).

    varlen: attention for packed batches (fastpoem.model.flash); without it poems are attended to in a padded batch.
    """

    def __init__(self, config: GPT2Config, varlen: Varlen | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, varlen)

    @property
    def dropouts(self) -> int:
        return 1 + 3 * self.config.n_layer

    def forward(
        self,
        ids: Tensor,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        masks: Masks | None = None,
    ) -> Tensor:
        """ids (B, T) int64 -> next-token logits (B * T, V), rows in the order of ids. With `packing`, ids is (1, N).

        seeds (dropouts, 2) int32: what each dropout draws by under a compiler. masks: what all of them draw by on a CPU without one; others
        have no use for it. With neither, masks come from PyTorch's generator."""
        hidden = self.transformer(ids, packing, self._draws(ids, packing, masks) if seeds is None else seeds)
        weight = self.transformer.wte.weight
        if ops.direct(weight):
            return ops.Head.apply(hidden.flatten(0, 1), weight)
        return F.linear(hidden.flatten(0, 1), weight)

    def _draws(self, ids: Tensor, packing: Packing | None, masks: Masks | None) -> list[Draw]:
        """What each dropout draws by."""
        if torch.compiler.is_compiling() or type(ids) is not Tensor or not ids.is_cpu:  # a FakeTensor holds no numbers
            return [None] * self.dropouts
        poems, length = ids.shape
        starts = packing.borders if packing else length * torch.arange(poems + 1, dtype=torch.int32, device="cpu")
        shape = self.config
        dropping = self.training and max(shape.embd_pdrop, shape.attn_pdrop, shape.resid_pdrop) > 0
        return Poems.of_each(self.dropouts, starts, (masks or Masks.drawn()) if dropping else None)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the weights as GPT-2's are: normal(0, initializer_range), residual projections divided by sqrt(2 * n_layer)."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1)
            else:
                narrow = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1
                parameter.normal_(0, std / narrow, generator=generator)
