"""What every benchmark runs on: poems, and models of a shape, made in a folder so that any machine has them.

With the shared data (FASTPOEM_SHARED, or ../shared) the poems are the 217,561 real ones. Without it they are made up of the bundled verses' characters,
with lengths drawn as the real ones have them: speed depends on lengths and shapes, not on sense, and weights are random either way.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.corpus.store import TokenStore, cached_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.memory import keep_freed_memory
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model import hub
from fastpoem.model.flash import find_varlen
from fastpoem.model.gpt2 import GPT2, GPT2Config

SHARED = Path(os.environ.get("FASTPOEM_SHARED", Path(__file__).parents[2] / "shared"))
CORPUS, TOKENIZER = SHARED / "data/poems.txt.xz", SHARED / "models/gpt2-distil-chinese"
REAL = CORPUS.is_file() and (TOKENIZER / "vocab.txt").is_file()
MADE_UP = 20_000  # poems, where the real ones are not there
BATCH, LENGTH = 16, 66  # the step that stages and scaling are timed at: the commonest poems of two lines

FULL = GPT2Config(vocab_size=21128, n_positions=1024, n_embd=768, n_layer=6, n_head=12)  # 59.5 M parameters
SMALL = dataclasses.replace(FULL, n_embd=192, n_layer=3, n_head=3)  # learns enough in a minute to show a curve

# Poems in 200, ordered, by characters: quantiles of the real corpus.
LENGTHS = {
    6: 1, 12: 2, 16: 2, 20: 1, 24: 11, 28: 2, 32: 51, 36: 2, 40: 1, 42: 1, 48: 41, 52: 1, 57: 1, 60: 2, 64: 44, 66: 1, 72: 6, 80: 1,
    84: 1, 92: 1, 96: 5, 108: 1, 112: 1, 120: 3, 127: 1, 128: 1, 132: 1, 144: 2, 152: 1, 160: 1, 168: 1, 170: 1, 184: 1, 192: 1,
    208: 1, 228: 1, 240: 1, 276: 1, 336: 1, 480: 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """data: a text of one poem a line. Models and stores are made under `folder`."""

    folder: Path
    data: Path
    tokenizer: Path

    @property
    def poems(self) -> str:
        return "real poems" if self.data == CORPUS else "made-up poems of real lengths"

    def store(self) -> TokenStore:
        return cached_store(self.data, PoemTokenizer.load(self.tokenizer), cache_dir=self.folder)

    def model(self, shape: GPT2Config) -> Path:
        """A model folder with random weights that both fastpoem and transformers load."""
        folder = self.folder / f"model-{shape.n_layer}x{shape.n_embd}"
        if not folder.exists():
            weights = GPT2(shape)
            weights.initialise(0)
            config: dict[str, Any] = {
                **dataclasses.asdict(shape),
                "model_type": "gpt2",
                "architectures": ["GPT2LMHeadModel"],
            }
            files = PoemTokenizer.load(self.tokenizer).files
            hub.write_folder(folder, weights.state_dict(), hub.companions(config, files))
        return folder


def make_scene(folder: Path, *, real: bool = REAL, poems: int = MADE_UP, text: str = "poems.txt") -> Scene:
    if real:
        return Scene(folder, CORPUS, TOKENIZER)
    data = folder / text
    draw = np.random.default_rng(0)
    characters = np.array(list("".join((hub.BUNDLED / "poems.txt").read_text(encoding="utf-8").split())))
    lengths = draw.choice(list(LENGTHS), poems, p=np.array(list(LENGTHS.values())) / sum(LENGTHS.values()))
    data.write_text("".join("".join(draw.choice(characters, n)) + "\n" for n in lengths), encoding="utf-8")
    return Scene(folder, data, hub.BUNDLED / "model")


def row_lengths(store: TokenStore) -> np.ndarray:
    """Tokens of each poem, (rows,) int64, in the order of the text."""
    bucket, index = store.locate(np.arange(store.rows))
    lengths = np.empty(store.rows, np.int64)
    for one, source in enumerate(store.buckets):
        lengths[bucket == one] = source.lengths[index[bucket == one]]
    return lengths


def make_step(
    shape: GPT2Config,
    device: str,
    *,
    poems: int = BATCH,
    longest: int = LENGTH,
    dtype: torch.dtype = torch.float32,
) -> TrainStep:
    """The engine's step in `dtype` on a model of random weights, for `poems` poems of up to `longest` tokens (neither compiled nor recorded)."""
    keep_freed_memory()
    model = GPT2(shape, find_varlen(torch.device(device), dtype, shape.n_embd // shape.n_head)[0])
    model.initialise(0)
    model.to(device).train()
    optimizer = FlatAdamW(model, torch.device(device), dtype, weight_decay=0.01, max_norm=1.0)
    optimizer.lr.fill_(2e-5)
    source = torch.zeros(poems * longest, dtype=torch.int16, device=device)
    return TrainStep(Pieces(model), optimizer, source, poems=poems, pad_id=0)


def made_up_rows(shape: GPT2Config, poems: int, length: int) -> Rows:
    """Poems of random ids, all of `length` tokens."""
    ids = torch.randint(shape.vocab_size, (poems * length,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    where = torch.stack([torch.arange(poems) * length, torch.full((poems,), length)], 1)
    return Rows(ids, where, Shape(poems, length), poems * (length - 1))
