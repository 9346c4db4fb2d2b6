"""What the order of poems costs in learning and wins in time: batches of like length against random ones.

`python -m benchmarks.order --out DIR [--seeds 3]` trains small models, writes DIR/order.json after every run (one that is there already is
not done again) and prints two tables: the held-out loss that each order ends at, for each text, start and learning rate, and its processor
time. `--speed MODEL` times steps instead, of the model in that folder and of random weights: packed and bucketed batches that stand for an
epoch, a step of each in turn.

Three texts: "lyrics", few poems of nearly every length, four times; "poems", a few thousand of all kinds, once; and "copies", a short text
whose lines stand there ten times each, judged on those very lines. From weights drawn anew ("scratch") and from a model trained before on
others ("trained"). All are judged by the same code on the same poems. The vocabulary has the characters of the texts that the tokenizer's
has, so that as many are [UNK] as in life. `pad` (without loss on padding) trains on the very batches of `pack`, so it is not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastpoem
from benchmarks import notebook
from benchmarks.race import spread
from benchmarks.time_to_quality import Stopwatch
from fastpoem.config import from_kwargs
from fastpoem.corpus.feed import Feed, validation_steps
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.step import evaluate
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.signals import StopRequest

CPU, BATCH = torch.device("cpu"), 16
RATES = {"scratch": (5e-4, 1e-3, 2e-3), "trained": (1e-4, 5e-4, 1e-3)}


class Text(NamedTuple):
    poems: int  # different ones
    epochs: int
    held: int  # poems it is judged on; 0: on itself
    copies: int = 1


TEXTS = {"lyrics": Text(800, 4, 300), "poems": Text(3200, 1, 300), "copies": Text(80, 6, 0, copies=10)}
LYRICS = slice(48_000, 56_000)  # of the shared corpus: 434 lengths, the four commonest a quarter of the poems
BEFORE = 8_000  # poems that "trained" was trained on
ORDERS: dict[str, dict[str, Any]] = {
    "32 buckets": dict(batching="bucket", buckets=32),
    "8 buckets": dict(batching="bucket", buckets=8),
    "pack": dict(batching="pack"),
}


class Task:
    """The texts, the model's folder and the one trained before, under `folder`; made once."""

    def __init__(self, poems: Path, tokenizer: Path, folder: Path, *, layers: int, wide: int) -> None:
        self.folder = folder
        self.models = {"scratch": folder / "model", "trained": folder / "before" / "model"}
        if not self.models["scratch"].exists():
            self._make(notebook.Poems(poems).lines, tokenizer, layers, wide)
        mine = PoemTokenizer.load(self.models["scratch"])
        self.pad_id = mine.pad_id
        self.held = {name: prepare_store(folder / f"{name}-held.txt", mine, folder / f"{name}-held") for name in TEXTS}
        if not self.models["trained"].exists():
            fastpoem.fit(
                data=str(folder / "before.txt"), model=str(folder / "model"), from_scratch=True, out=str(folder / "before"),
                device="cpu", lr=2e-3, schedule="cosine", warmup_steps=50, dropout=0.0, val_poems=0, batching="pack",
            )  # fmt: skip

    def _make(self, lines: list[str], tokenizer: Path, layers: int, wide: int) -> None:
        draw = random.Random(0)
        varied = lines[LYRICS] or lines
        others = lines[: LYRICS.start] + lines[LYRICS.stop :]
        draw.shuffle(varied)
        draw.shuffle(others)
        written = []
        for name, text in TEXTS.items():
            source = varied if name == "lyrics" else others
            taken, source[: text.poems + text.held] = source[: text.poems + text.held], []
            train = taken[text.held :] * text.copies
            draw.shuffle(train)
            for end, part in (("", train), ("-held", taken[: text.held] or taken)):
                (self.folder / f"{name}{end}.txt").write_text("\n".join(part), encoding="utf-8")
                written += part
        before = others[:BEFORE]
        (self.folder / "before.txt").write_text("\n".join(before), encoding="utf-8")
        known = {*(tokenizer / "vocab.txt").read_text(encoding="utf-8").split("\n")}
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(known & {*"".join(written + before)})]
        model = self.models["scratch"]
        model.mkdir()
        (model / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        shape = {"vocab_size": len(words), "n_positions": 512, "n_embd": wide, "n_layer": layers, "n_head": wide // 32}
        shape |= {"model_type": "gpt2", "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        (model / "config.json").write_text(json.dumps(shape))

    def train(self, text: str, start: str, rate: float, order: dict[str, Any], seed: int) -> dict[str, float]:
        """{"loss": on the held-out poems at the end, "cpu", "wall": seconds}."""
        with tempfile.TemporaryDirectory() as temporary:
            config = from_kwargs(
                data=str(self.folder / f"{text}.txt"), model=str(self.models[start]), from_scratch=start == "scratch",
                out=f"{temporary}/run", cache_dir=temporary, device="cpu", precision="fp32", val_poems=0, seed=seed, lr=rate,
                epochs=TEXTS[text].epochs, **order,
            )  # fmt: skip
            with assembled(config, Voice(quiet=True)) as (loop, _):
                with Stopwatch() as watch:
                    loop.run(StopRequest())
                weights = loop.train_state.tensors()[hub.WEIGHTS]
                weights.pop("lm_head.weight", None)
            model = GPT2(hub.read_config(self.models["scratch"])[0])
            model.load_state_dict(weights)
            return {"loss": self.loss(model, text), **watch.read()}

    def loss(self, model: GPT2, text: str) -> float:
        held = self.held[text]
        steps = validation_steps(held, np.arange(held.rows), BATCH)
        return evaluate(model, map(Feed(held, "bucket"), steps), CPU, self.pad_id).loss


def table(runs: dict[str, dict[str, float]]) -> str:
    """Means over the seeds and in brackets the spread from least to most; for each order also the differences of its losses to those of
    `pack` with the same seed, in the mean."""
    lines = [f"| text | from | rate | {' | '.join(ORDERS)} |", f"| --- | --- | --- |{' --- |' * len(ORDERS)}"]
    for text, start, rate in dict.fromkeys(tuple(key.split("/")[:3]) for key in sorted(runs)):
        cells = []
        for order in ORDERS:
            found = {
                key.split("/")[4]: run["loss"]
                for key, run in runs.items()
                if key.startswith(f"{text}/{start}/{rate}/{order}/")
            }
            packed = {seed: runs.get(f"{text}/{start}/{rate}/pack/{seed}", {}).get("loss") for seed in found}
            apart = [loss - packed[seed] for seed, loss in found.items() if packed[seed] is not None]
            cell = (
                f"{statistics.mean(found.values()):.3f} ({min(found.values()):.3f} to {max(found.values()):.3f})"
                if found
                else ""
            )
            cells.append(cell + (f", {statistics.mean(apart):+.3f}" if apart and order != "pack" else ""))
        lines.append(f"| {text} | {start} | {rate} | {' | '.join(cells)} |")
    lines += ["", "| text | order | CPU s |", "| --- | --- | --- |"]
    for text in TEXTS:
        for order in ORDERS:
            took = [run["cpu"] for key, run in runs.items() if key.startswith(f"{text}/") and f"/{order}/" in key]
            lines += [f"| {text} | {order} | {statistics.median(took):.1f} |"] if took else []
    return "\n".join(lines)


def speed(data: Path, model: Path, folder: Path, steps: int, precision: str = "fp32", seed: int = 0) -> dict[str, Any]:
    """Tokens a second of CPU time in `steps` bucketed batches evenly spaced by length over an epoch and as many packed ones (evenly spaced
    by tokens), a step of each in turn after one of each that is not counted."""
    took: dict[str, list[float]] = {"bucket": [], "pack": []}
    tokens: dict[str, list[int]] = {"bucket": [], "pack": []}
    common: dict[str, Any] = dict(
        data=str(data), model=str(model), from_scratch=True, device="cpu", precision=precision, val_poems=0,
        cache_dir=str(folder), seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        bucket, pack = (from_kwargs(**common, out=f"{temporary}/{one}", batching=one) for one in took)
        with assembled(bucket, Voice(quiet=True)) as (one, _), assembled(pack, Voice(quiet=True)) as (other, _):
            loops = {"bucket": one, "pack": other}
            some = random.Random(0).sample(range(one.order.steps), min(one.order.steps, 50 * steps))
            chosen = {
                name: spread(some, steps, lambda step, loop=loop: loop.feed(loop.order(0, step)).tokens)
                for name, loop in loops.items()
            }
            order = random.Random(1).sample(range(steps), steps)
            for number, at in enumerate([order[0], *order]):
                for name in ("bucket", "pack") if number % 2 else ("pack", "bucket"):
                    loop, step = loops[name], chosen[name][at]
                    rows = loop.feed(loop.order(0, step))
                    begin = time.process_time()
                    loop.step(rows, 1e-4)
                    if number:
                        took[name].append(time.process_time() - begin)
                        tokens[name].append(rows.tokens)
    rate = {name: sum(tokens[name]) / sum(took[name]) for name in took}
    each = {name: [count / seconds for count, seconds in zip(tokens[name], took[name], strict=True)] for name in took}
    ratios = [packed / bucketed for packed, bucketed in zip(each["pack"], each["bucket"], strict=True)]
    return {
        "tokens_per_s": rate, "ratio": rate["pack"] / rate["bucket"], "median_of_ratios": statistics.median(ratios),
        "seconds": took, "tokens": tokens,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    shared = Path(os.environ.get("FASTPOEM_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description="Held-out loss and time by the order of training.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the task and order.json")
    parser.add_argument("--data", type=Path, default=shared / "data/poems.txt.xz")
    parser.add_argument("--tokenizer", type=Path, default=shared / "models/gpt2-distil-chinese")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--wide", type=int, default=64)
    parser.add_argument("--text", action="append", choices=TEXTS, help="not the others")
    parser.add_argument("--start", action="append", choices=["scratch", "trained"], help="not the other")
    parser.add_argument("--rate", action="append", type=float, help="not the others")
    parser.add_argument("--order", action="append", choices=ORDERS, help="not the others")
    parser.add_argument("--speed", type=Path, metavar="MODEL", help="time steps of the model in this folder")
    parser.add_argument("--steps", type=int, default=16, help="of each kind that --speed times")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.speed:
        found = speed(args.data, args.speed, args.out, args.steps)
        (args.out / "speed.json").write_text(json.dumps(found, indent=1))
        print(f"packed against bucketed: {found['ratio']:.3f} of the tokens a second (ratio of sums),", end=" ")
        print(f"{found['median_of_ratios']:.3f} (median over steps)")
        return
    task = Task(args.data, args.tokenizer, args.out, layers=args.layers, wide=args.wide)
    file = args.out / "order.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(args.seeds):
        for text in args.text or TEXTS:
            for start in args.start or RATES:
                for rate in args.rate or RATES[start]:
                    for name in args.order or ORDERS:
                        key = f"{text}/{start}/{rate:g}/{name}/{seed}"
                        if key not in runs:
                            runs[key] = task.train(text, start, rate, ORDERS[name], seed)
                            file.write_text(json.dumps(runs, indent=1))
                            print(key, runs[key], flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
