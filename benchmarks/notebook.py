"""The loop to beat, as the notebook has it: `python -m benchmarks.notebook --data poems.txt --model DIR`.

A Dataset of stripped lines, BertTokenizer on every batch, padded to the longest of 16 and truncated at 512, Hugging Face's forward with
labels = input ids (so padding counts in the loss), AdamW 2e-5, gradient clip 1.0, CosineAnnealingLR stepped once an epoch, and every
100 steps a line of loss and accuracy without padding. Nothing in it is tuned, neither up nor down.

The forward gets `input_ids` and `labels` only: right padding needs no attention mask, and the tokenizer's `token_type_ids` would add the
embedding of [PAD] to every position.
"""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fastpoem_kernels.arguments import Parser
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel


class Poems(Dataset):
    def __init__(self, path: Path, limit: int | None = None) -> None:
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as stream:
            self.lines = [line.strip() for line in stream if line.strip()][:limit]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> str:
        return self.lines[index]


def load_model(folder: Path, *, from_scratch: bool, dropout: float | None, seed: int) -> GPT2LMHeadModel:
    """A Hugging Face model of the folder: its weights, or with `from_scratch` fresh ones."""
    changes = {} if dropout is None else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    if not from_scratch:
        return GPT2LMHeadModel.from_pretrained(folder, **changes)
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config.from_pretrained(folder, **changes))


def train(
    model: GPT2LMHeadModel,
    tokenizer: BertTokenizer,
    poems: Sequence[str],
    *,
    device: str = "cpu",
    epochs: int = 1,
    batch_size: int = 16,
    lr: float = 2e-5,
    shuffle: bool = True,
    max_steps: int | None = None,
    log_every: int = 100,
) -> Iterator[dict[str, Any]]:
    """The notebook's loop; yields a row of figures at every step it logs: step, epoch, lr, loss, accuracy."""

    def collate(lines: list[str]) -> torch.Tensor:
        return tokenizer(lines, padding=True, truncation=True, max_length=512, return_tensors="pt")["input_ids"]

    loader = DataLoader(poems, batch_size=batch_size, shuffle=shuffle, drop_last=True, collate_fn=collate)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    step = 0
    for epoch in range(epochs):
        for input_ids in loader:
            input_ids = input_ids.to(device)  # (B, T)
            out = model(input_ids=input_ids, labels=input_ids)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % log_every == 0:
                labels, guess = input_ids[:, 1:], out.logits.argmax(dim=2)[:, :-1]  # (B, T - 1)
                real = labels != tokenizer.pad_token_id
                accuracy = (labels[real] == guess[real]).sum().item() / real.sum().item()
                rate = optimizer.param_groups[0]["lr"]
                yield {"step": step + 1, "epoch": epoch + 1, "lr": rate, "loss": out.loss.item(), "accuracy": accuracy}
            step += 1
            if step == max_steps:
                return
        scheduler.step()


def main() -> None:
    parser = Parser(description="The notebook's training loop.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shuffle", action="store_true")
    args = parser.parse_args()
    model = load_model(args.model, from_scratch=args.from_scratch, dropout=args.dropout, seed=args.seed)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    for row in train(
        model,
        tokenizer,
        Poems(args.data),
        device=args.device,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        shuffle=not args.no_shuffle,
        max_steps=args.max_steps,
        log_every=args.log_every,
    ):
        row["poems_per_s"] = row["step"] * args.batch_size / (time.perf_counter() - begin)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
