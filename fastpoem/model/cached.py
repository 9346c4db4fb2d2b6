"""The network one token further, from the keys and values of the tokens before it: what writing poems needs and training does not.

A poem's next token depends on all before it, but only their keys and values do: kept, a step costs one token's arithmetic for each poem
of a batch. Poems of a batch all stand at the same position, so there is neither a mask nor a table of positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpoem.model.gpt2 import GPT2, Attention, GPT2Config

ROOM = 64  # positions a cache is made for at first


def bytes_a_poem(shape: GPT2Config, longest: int) -> int:
    """Memory that one poem of `longest` tokens takes while it is written: its cache twice, as when it grows, and its logits as they are
    sorted and summed in float64."""
    return 4 * (2 * 2 * shape.n_layer * shape.n_embd * longest + 8 * shape.vocab_size)


class Cache:
    """Keys and values (L, 2, B, H, capacity, D / H) of the `length` tokens that each of B poems has so far, at most `longest`."""

    def __init__(self, model: GPT2, poems: int, longest: int) -> None:
        shape, weight = model.config, model.transformer.wte.weight
        self.model, self.longest, self.length = model, longest, 0
        self._kept = weight.new_empty(
            shape.n_layer, 2, poems, shape.n_head, min(ROOM, longest), shape.n_embd // shape.n_head
        )

    @torch.no_grad()
    def advance(self, ids: Tensor) -> Tensor:
        """Take the next tokens of every poem, ids (B, T) int64, and return the logits (B, V) of what follows the last of them."""
        network, begin = self.model.transformer, self.length
        self._make_room(begin + ids.shape[1])
        self.length += ids.shape[1]
        x = network.wte(ids) + network.wpe.weight[begin : self.length]  # (B, T, D)
        for layer, block in enumerate(network.h):
            x = self._attend(block.attn, layer, begin, block.ln_1(x), x)
            x = block.mlp(block.ln_2(x), x)
        return F.linear(network.ln_f(x[:, -1]), network.wte.weight)

    def _attend(self, attention: Attention, layer: int, begin: int, x: Tensor, residual: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, attention.heads, width // attention.heads)
        q, k, v = (
            part.view(heads).transpose(1, 2) for part in attention.c_attn(x).split(width, dim=-1)
        )  # (B, H, T, D / H)
        keys, values = self._kept[layer, :, :, :, : self.length].unbind(0)  # (B, H, begin + T, D / H)
        keys[:, :, begin:], values[:, :, begin:] = k, v
        # SDPA's causal mask begins at the upper left: right where nothing is kept, and one query sees all
        assert begin == 0 or length == 1
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=length > 1, scale=attention.scale)
        return residual + attention.c_proj(out.transpose(1, 2).reshape(x.shape))

    def keep(self, poems: Tensor) -> None:
        """Go on with some of the poems only: their numbers, (K,) int64."""
        self._kept = self._kept.index_select(2, poems)

    def _make_room(self, length: int) -> None:
        if length > (capacity := self._kept.shape[4]):
            larger = min(max(length, 2 * capacity), self.longest)
            grown = self._kept.new_empty(*self._kept.shape[:4], larger, self._kept.shape[5])
            grown[..., : self.length, :] = self._kept[..., : self.length, :]
            self._kept = grown
