"""One contender in a process of its own, which trains when it is told to: `python -m benchmarks.worker JOB.json`.

A process each, because fastpoem tells the C allocator to keep its memory: contenders that shared its process would be faster than they are.

JOB: {"contender", "data", "model", "folder", "device", "precision" (fastpoem's), "lr", "val_poems", "batch", "cache"}. A line of JSON on stdin is a
turn: {"batches": rows of the text, a list for each step, "steps": fastpoem's numbers of these steps (or null), "seconds": when to stop at the latest}. Answers {"seconds", "steps"}. {"evaluate": true} is answered
with {"loss"}: a mean over the real tokens of the held-out poems, {"write": N} with what `benchmarks.written` finds in so many poems; both by the same code for every contender.

All contenders are alive at once, so at the end of a turn each gives the kernel the pages that it has freed, or those who wait would leave no room for who trains; and before
its next turn it has as many mapped again. Both are outside the clock: within it nobody pays for pages that it would have kept by itself, nor has more of them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from benchmarks.written import written
from fastpoem.config import from_kwargs
from fastpoem.corpus.feed import Feed, validation_steps
from fastpoem.corpus.hold_out import hold_out
from fastpoem.corpus.store import TokenStore, cached_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.step import evaluate
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.paths import keep_caches


class Turns:
    """Batches as they are asked for: a turn's clock runs from its first batch to the request for the one after its last."""

    def __init__(self, job: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.answer = job, answer
        self.prepare: Callable[[dict[str, Any]], list[Any]] = lambda turn: turn["batches"]
        self.weights: Callable[[], Mapping[str, Tensor]]

    def __iter__(self) -> Iterator[Any]:
        self.answer({"ready": True})
        for line in sys.stdin:
            turn = json.loads(line)
            if turn.get("evaluate"):
                self.answer({"loss": self._loss()})
                continue
            if turn.get("write"):
                self.answer(written(self._model(), Path(self.job["model"]), turn["write"]))
                continue
            batches, limit, steps = self.prepare(turn), turn["seconds"], 0
            take_back_memory()
            begin = time.perf_counter()
            for batch in batches:
                yield batch
                steps += 1
                if time.perf_counter() - begin >= limit:
                    break
            if self.job["device"] == "cuda":
                torch.cuda.synchronize()
            took = {"seconds": time.perf_counter() - begin, "steps": steps}
            give_back_memory()
            self.answer(took)
        raise SystemExit  # the race is over

    def _model(self) -> GPT2:
        model = GPT2(hub.read_config(Path(self.job["model"]))[0])
        model.load_state_dict(self.weights())
        return model

    def _loss(self) -> float:
        store = open_store(self.job)
        steps = validation_steps(store, hold_out(store, self.job["val_poems"], 0).validation, 16)
        return evaluate(self._model(), map(Feed(store, "bucket"), steps), torch.device("cpu"), store.pad_id).loss


class _Lines(IterableDataset):
    """The poems of the turns, one at a time."""

    def __init__(self, batches: Turns) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[str]:
        for batch in self.batches:
            yield from batch


def give_back_memory() -> None:
    """Freed pages inside the heap go back to the kernel, whatever the C library (where it is glibc) was told to keep; the heap keeps its extent."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(2**62))


def take_back_memory() -> None:
    """All pages of the heap are there again, as before `give_back_memory` (Linux 5.14 and later; elsewhere they come at first use, within the clock)."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        if line.endswith("[heap]"):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            populate_write = 23
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), populate_write)


def open_store(job: dict[str, Any]) -> TokenStore:
    return cached_store(Path(job["data"]), PoemTokenizer.load(Path(job["model"])), cache_dir=Path(job["cache"]))


def run_fastpoem(job: dict[str, Any], turns: Turns) -> None:
    from fastpoem.run.console import Voice
    from fastpoem.run.fit import assembled

    places: dict[str, Any] = {
        "data": job["data"],
        "model": job["model"],
        "out": f"{job['folder']}/run",
        "cache_dir": job["cache"],
    }
    places |= {"batch_size": job["batch"]}
    places |= {"device": job["device"], "precision": job["precision"]}
    config = from_kwargs(**places, val_poems=job["val_poems"], lr=job["lr"])
    with assembled(config, Voice(quiet=True)) as (loop, _):

        def steps(turn: dict[str, Any]) -> list[int]:
            for step, rows in zip(turn["steps"], turn["batches"], strict=True):
                mine, (bucket, index) = loop.order(0, step), loop.feed.store.locate(np.array(rows))
                if not (np.array_equal(mine.bucket, bucket) and np.array_equal(mine.index, index)):
                    raise RuntimeError(f"step {step} is not of the poems that the others are given")
            return turn["steps"]

        turns.prepare, turns.weights = (
            steps,
            lambda: {name: tensor.detach().cpu() for name, tensor in loop.model.state_dict().items()},
        )
        loop.model.train()
        for step in turns:
            loop.done = step
            loop.one_step()


def run_transformers(job: dict[str, Any], turns: Turns) -> None:
    from transformers import BertTokenizer

    from benchmarks import notebook, peers

    model = notebook.load_model(Path(job["model"]), from_scratch=False, dropout=None, seed=0)
    tokenizer = BertTokenizer.from_pretrained(job["model"])
    lines = notebook.Poems(Path(job["data"])).lines
    turns.weights = lambda: {
        name: value.detach().cpu() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    torch.manual_seed(0)
    if job["contender"] == "notebook":
        turns.prepare = lambda turn: [[lines[row] for row in rows] for rows in turn["batches"]]
        list(
            notebook.train(
                model,
                tokenizer,
                _Lines(turns),
                device=job["device"],
                lr=job["lr"],
                batch_size=job["batch"],
                shuffle=False,
            )
        )
    else:
        compiled = job["contender"].endswith(", compiled")
        turns.prepare = lambda turn: [
            peers.tokenized(tokenizer, [lines[row] for row in rows]) for rows in turn["batches"]
        ]
        run = peers.loop if job["contender"].startswith("loop") else peers.train
        settings = peers.strongest(job["device"]) if compiled and run is peers.train else {}
        if job["contender"].endswith(", bf16"):
            settings = {"bf16": True}
        keep_caches(job["cache"])
        run(
            model,
            tokenizer,
            turns,
            folder=Path(job["folder"]),
            device=job["device"],
            lr=job["lr"],
            batch_size=job["batch"],
            **settings,
        )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers)

    (run_fastpoem if job["contender"] == "fastpoem" else run_transformers)(job, Turns(job, answer))


if __name__ == "__main__":
    main()
