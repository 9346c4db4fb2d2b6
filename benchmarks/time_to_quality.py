"""Validation loss against time: the notebook's loop, the same with a tuned learning rate, and `--recipe fast`.

`python -m benchmarks.time_to_quality --out DIR [--seeds 3]` trains, writes DIR/time_to_quality.json after every run (one that is there
already is not done again) and prints a table; `--plot FILE.png` draws what DIR holds. It takes 40 minutes of one core, most of them the
notebook's, which is why it is no test of `pytest benchmarks/`.

Real poems (3,200 to train on, 400 held out), a model of 2 layers, 128 wide, over the characters that they use, from weights drawn anew
("scratch") and from a model trained before on 16,000 others, all of five-character lines ("trained": so there is something new to learn,
as for a model of prose that goes on with poems). The contestants take turns seed by seed. Time is the process' CPU time on one thread,
which other processes disturb less than the clock; both are in the JSON. Validating and loading the model cost nothing, preparing the
text counts.

A run with a schedule says nothing halfway, so the fast recipe is run to the end for several lengths: shares of an epoch.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from fastpoem_kernels.arguments import Parser
from transformers import BertTokenizer

import fastpoem
from benchmarks import notebook
from benchmarks.report import share
from benchmarks.written import written
from fastpoem.config import from_kwargs
from fastpoem.corpus.feed import Feed, validation_steps
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.step import evaluate
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.signals import StopRequest

CPU = torch.device("cpu")
HELD, TEXT, BEFORE = 400, 3200, 16_000  # poems
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)  # of an epoch, that the fast recipe is run for
SHOWN = ("in_form", "rhyming")  # of the poems that a model writes
TUNED = {"scratch": 1e-3, "trained": 5e-4}  # learning rates for the notebook


class Stopwatch:
    """Seconds of CPU and of the clock while running."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def __enter__(self) -> Stopwatch:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall

    def read(self) -> dict[str, float]:
        return {"cpu": self.cpu, "wall": self.wall}


class Task:
    """The texts, the model's folder, the one trained before and the held-out store, under `folder`; made once."""

    def __init__(self, poems: Path, folder: Path, layers: int = 2, wide: int = 128) -> None:
        self.folder, self.text = folder, folder / "text.txt"
        self.models = {"scratch": folder / "model", "trained": folder / "before" / "model"}
        if not (folder / "model").exists():
            self._make(poems, layers, wide)
        tokenizer = PoemTokenizer.load(folder / "model")
        self.held = prepare_store(folder / "held.txt", tokenizer, folder / "held")
        self.pad_id = tokenizer.pad_id
        if not self.models["trained"].exists():
            fastpoem.fit(
                data=str(folder / "before.txt"), model=str(folder / "model"), from_scratch=True, out=str(folder / "before"),
                device="cpu", lr=2e-3, schedule="cosine", warmup_steps=50, dropout=0.0, val_poems=0,
            )  # fmt: skip

    def _make(self, poems: Path, layers: int, wide: int) -> None:
        lines = notebook.Poems(poems).lines
        random.Random(0).shuffle(lines)
        held, text, others = lines[:HELD], lines[HELD : HELD + TEXT], lines[HELD + TEXT :]
        before = [line for line in others if len(line) % 12 == 0 and {line[5], line[11]} == {*"，。"}][:BEFORE]
        for name, part in (("held", held), ("text", text), ("before", before)):
            (self.folder / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
        model = self.folder / "model"
        model.mkdir()
        characters = sorted(
            {character for line in held + text + before for character in line if not character.isspace()}
        )
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
        (model / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        shape = {"vocab_size": len(words), "n_positions": 512, "n_embd": wide, "n_layer": layers, "n_head": wide // 32}
        shape |= {"model_type": "gpt2", "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        (model / "config.json").write_text(json.dumps(shape))

    def judged(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """`val_loss`, a mean over the real tokens of the held-out poems, and what `benchmarks.written` finds in the model's own."""
        model = GPT2(hub.read_config(self.folder / "model")[0])
        model.load_state_dict({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"})
        batches = map(Feed(self.held, "bucket"), validation_steps(self.held, torch.arange(self.held.rows).numpy(), 16))
        loss = evaluate(model, batches, CPU, self.pad_id).loss
        return {"val_loss": loss, **written(model, self.folder / "model")}


Points = Iterator[dict[str, Any]]


def by_notebook(task: Task, start: str, seed: int, lr: float, every: int = 50) -> Points:
    """The notebook's own loop for one epoch; a point every so many steps, and at the end."""
    folder = task.models[start]
    model = notebook.load_model(folder, from_scratch=start == "scratch", dropout=None, seed=seed)
    tokenizer = BertTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    watch, rows = Stopwatch(), notebook.train(model, tokenizer, notebook.Poems(task.text), lr=lr, log_every=every)
    row: dict[str, Any] | None = {}
    while row is not None:
        with watch:
            row = next(rows, None)
        yield {"step": row["step"] if row else TEXT // 16, **watch.read(), **task.judged(model.state_dict())}
        model.train()


def by_fastpoem(task: Task, start: str, seed: int, share: float, **settings: Any) -> Points:
    """fastpoem under `settings` for a share of an epoch; a point at the end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, watch = task.models[start], Stopwatch()
        with watch:
            store: TokenStore = prepare_store(task.text, PoemTokenizer.load(folder), Path(temporary) / "store")
        batch = from_kwargs(data="x", **settings).batch_size
        config = from_kwargs(
            data=str(store.path), model=str(folder), from_scratch=start == "scratch", out=str(Path(temporary) / "run"),
            device="cpu", val_poems=0, seed=seed, max_steps=max(1, round(share * (store.rows // batch))), **settings,
        )  # fmt: skip
        with assembled(config, Voice(quiet=True)) as (loop, _):
            with watch:
                loop.run(StopRequest())  # its checkpoint too
            weights = loop.train_state.tensors()[hub.WEIGHTS]  # of the whole vocabulary, whatever is trained of it
            yield {"step": loop.done, "share": share, **watch.read(), **task.judged(weights)}


CONTESTANTS: dict[str, Callable[[Task, str, int], Points]] = {
    "notebook": lambda task, start, seed: by_notebook(task, start, seed, 2e-5),
    "notebook, tuned": lambda task, start, seed: by_notebook(task, start, seed, TUNED[start]),
    "fast": lambda task, start, seed: chain.from_iterable(
        by_fastpoem(task, start, seed, one, recipe="fast") for one in SHARES
    ),
    "fast, batches of 8": lambda task, start, seed: chain.from_iterable(
        by_fastpoem(task, start, seed, one, recipe="fast", batch_size=8) for one in SHARES
    ),
}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """For each start: loss at the end, shares of poems in a form and that rhyme, and CPU seconds of the notebook's loops; for each length of the fast recipe's, the same and the
    share of the notebook's time. Means over the seeds, and in brackets the spread from least to most."""
    lines = [
        "| from | | epoch | CPU s | of the notebook's | validation loss | in a form | that rhyme |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for start in TUNED:
        whole = None
        for name in CONTESTANTS:
            seeds = [points for key, points in sorted(runs.items()) if key.startswith(f"{start}/{name}/")]
            if not seeds:
                continue
            for ends in [[points[-1] for points in seeds]] if name.startswith("notebook") else zip(*seeds, strict=True):
                cpu = statistics.mean(point["cpu"] for point in ends)
                losses = [point["val_loss"] for point in ends]
                told = [{one: statistics.mean(point[one] for point in ends)} if one in ends[0] else {} for one in SHOWN]
                whole = whole or cpu
                lines.append(
                    f"| {start} | {name} | {ends[0].get('share', 1.0):.0%} | {cpu:.1f} | {cpu / whole:.3f} "
                    f"| {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
                    f"| {share(told[0], SHOWN[0])} | {share(told[1], SHOWN[1])} |"
                )
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(CONTESTANTS, ("#b0b0b0", "#5b6f8f", "#c14a4a", "#d8a657"), strict=True))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=220)
    for axis, start, title in zip(axes, TUNED, ("from scratch", "a trained model goes on"), strict=True):
        for key, points in runs.items():
            of, name, seed = key.split("/")
            if of == start:
                style = ".-" if name.startswith("notebook") else "o-"
                label = name if seed == "0" else None
                cpu, loss = [point["cpu"] for point in points], [point["val_loss"] for point in points]
                axis.plot(cpu, loss, style, color=colours[name], lw=1, ms=4, label=label)
        axis.set(title=title, xlabel="CPU seconds, one thread", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = Parser(description="Validation loss against time.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the task and time_to_quality.json")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("FASTPOEM_SHARED", "../shared")) / "data/poems.txt.xz"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="not the others")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    task, file = Task(args.data, args.out), args.out / "time_to_quality.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(args.seeds):
        for start in TUNED:
            for name in args.only or CONTESTANTS:
                key = f"{start}/{name}/{seed}"
                if key not in runs:
                    runs[key] = list(CONTESTANTS[name](task, start, seed))
                    file.write_text(json.dumps(runs, indent=1))
                    print(key, runs[key][-1], flush=True)
    print(table(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
