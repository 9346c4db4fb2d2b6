"""Hugging Face's `Trainer` on batches that it is given: the loop that people reach for when the notebook's is too slow.

As it comes: fp32, fused AdamW, clip at 1.0, its own collator (padded to the longest, labels -100 on padding) and training step. Poems are tokenized
before. Only the batches are ours, so that the same class runs at random lengths (*plain*) and at the best that sorting could do (*sorted*),
and there under autocast too, with its flag bf16=True (*sorted, bf16*).

The strongest that can be had of it (*compiled*): bf16, torch.compile, fused AdamW, SDPA, sorted batches. The Trainer needs accelerate;
where that is not installed, `loop` does the same without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
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


def _collator(tokenizer: BertTokenizer, mask: bool) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
    """Padded to the longest, labels -100 on padding."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return collate if mask else lambda rows: {name: x for name, x in collate(rows).items() if name != "attention_mask"}


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
    mask: bool = True,
    **arguments: Any,
) -> Trainer:
    """Train on `batches`, each of `batch_size` tokenized poems, in their order. `folder` is where the Trainer may write; it does not.
    mask: the forward gets an attention mask, as the collator makes one."""
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
        data_collator=_collator(tokenizer, mask),
    )
    trainer.train()
    return trainer


def strongest(device: str) -> dict[str, Any]:
    """What makes the Trainer as fast as its flags can: bf16, compiled, and nothing asked of the device at each step. No attention mask either,
    which right padding does not need and which keeps SDPA from its flash kernel. A CPU gets fp32 and the front half of the compiler."""
    fast: dict[str, Any] = {
        "mask": False,
        "optim": "adamw_torch_fused",
        "torch_compile": True,
        "logging_nan_inf_filter": False,
    }
    return fast | ({"torch_compile_backend": "eager"} if device == "cpu" else {"bf16": True})


def loop(
    model: PreTrainedModel,
    tokenizer: BertTokenizer,
    batches: Iterable[list[Example]],
    *,
    folder: Path,
    device: str = "cpu",
    batch_size: int = 16,
    lr: float = 2e-5,
) -> None:
    """What the Trainer does under `strongest`, by hand: bf16 autocast over fp32 weights, the compiled model, labels -100 on padding, clip at
    1.0, fused AdamW without decay. Nothing is read from the device."""
    model.to(device).train()
    compiled = torch.compile(model, backend="eager" if device == "cpu" else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    collate = _collator(tokenizer, mask=False)
    for examples in DataLoader(
        _Examples(batches), batch_size=batch_size, collate_fn=collate, pin_memory=device != "cpu"
    ):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in examples.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            loss = compiled(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
