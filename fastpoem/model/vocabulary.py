"""A model that knows only some ids: the embedding, which is also the head, with the rows of those alone.

The bundled vocabulary of BERT has 21,128 ids, 217,561 classical poems use 5,184 of them, and the head is 28% of a step's arithmetic. Rows
that no poem asks for need not be computed: as inputs they never come, as outputs they would only learn to be unlikely. What leaves the
run (RUN/model, checkpoints) has every row again, the others with the very values they began with. Nothing taught these to be unlikely,
so generation_config.json says never to write them, which transformers and `fastpoem.generate` obey. It says so of every model's unknown,
padding and other tokens that no text is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastpoem.errors import InputError
from fastpoem.model.gpt2 import GPT2

EMBEDDING = "transformer.wte.weight"
GENERATION = "generation_config.json"
LARGEST_GENERATION = 1 << 24  # bytes
PIPELINE_ASKS = 256  # new tokens of transformers' text-generation pipeline


class Narrowed:
    """Cuts `model`'s embedding (V, D) down to the rows `ids` (K,) int64 and remembers the whole of it, on the CPU."""

    def __init__(self, model: GPT2, ids: np.ndarray) -> None:
        self.ids = torch.from_numpy(ids)
        self.whole = model.transformer.wte.weight.detach().clone()  # (V, D)
        model.transformer.wte = nn.Embedding.from_pretrained(self.whole[self.ids], freeze=False)  # (K, D)

    def widen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with every row in the embedding."""
        whole = self.whole.clone()
        whole[self.ids] = weights[EMBEDDING].detach().float().cpu()
        return {**weights, EMBEDDING: whole}

    def adopt(self, weights: Mapping[str, Tensor], embedding: Tensor) -> None:
        """Go on from what `widen` returned: `embedding` (K, D) gets its rows, and the others are those of a later `widen`."""
        self.whole.copy_(weights[EMBEDDING])
        embedding.copy_(self.whole[self.ids])

    def others(self) -> list[int]:
        """The ids that are not trained."""
        return (
            torch.ones(len(self.whole), dtype=torch.bool).index_fill_(0, self.ids, False).nonzero().flatten().tolist()
        )


def generation_config(special: Mapping[str, int], never: Iterable[int], positions: int) -> bytes:
    """What makes `generate` and pipelines write other ids than `never`. special: bos, eos and pad, as in config.json.

    A pipeline asks for 256 tokens more, which a model of few positions has no room for: there, its poems end with the positions.
    """
    most = {"max_length": positions} if positions <= PIPELINE_ASKS + 64 else {}
    return json.dumps({**special, **most, "suppress_tokens": sorted({*never})}).encode()


def never_written(folder: Path, vocabulary: int) -> list[int]:
    """The ids that a model folder says never to write: `suppress_tokens` of its generation_config.json. Raises InputError."""
    path = folder / GENERATION
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > LARGEST_GENERATION:
            raise ValueError(f"larger than {LARGEST_GENERATION:,} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, f"unreadable ({error})", "fetch the file again, or remove it") from error
    ids = (content.get("suppress_tokens") if isinstance(content, dict) else None) or []
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < vocabulary for one in ids):
        raise InputError(path, "its suppress_tokens are no ids of this model", "fetch the file again, or remove it")
    if len({*ids}) == vocabulary:
        raise InputError(path, "its suppress_tokens leave no id to write", "fetch the file again, or remove it")
    return ids
