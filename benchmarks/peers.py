"""Hugging Face's `Trainer` on batches that it is given: the loop that people reach for when the notebook's is too slow.

As it comes: fp32, fused AdamW, clip at 1.0, its own collator (padded to the longest, labels -100 on padding) and training step. Poems are tokenized
before. Only the batches are ours, so that the same class runs at random lengths (*plain*) and at the best that sorting could do (*sorted*).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

Example = dict[str, list[int]]


def tokenized(tokenizer: BertTokenizer, lines: list[str]) -> list[Example]:
    found = tokenizer(lines, truncation=True, max_length=512, return_token_type_ids=False)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


class _Examples(IterableDataset):
    def __init__(self, batches: Iterable[list[Example]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Example]:
        for batch in self.batches:
            yield from batch


class _InTurn(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        """Without accelerate's wrapper, which asks for a batch before the one in hand is trained on: turns could not end."""
        return DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator)


def train(
    model: PreTrainedModel,
    tokenizer: BertTokenizer,
    batches: Iterable[list[Example]],
    *,
    folder: Path,
    device: str = "cpu",
    batch_size: int = 16,
    lr: float = 2e-5,
    max_steps: int = 10**6,
    **arguments: Any,
) -> Trainer:
    """Train on `batches`, each of `batch_size` tokenized poems, in their order. `folder` is where the Trainer may write; it does not."""
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        max_steps=max_steps,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    trainer = _InTurn(
        model=model,
        args=settings,
        train_dataset=_Examples(batches),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return trainer
