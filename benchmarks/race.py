"""Contenders on the same poems, in alternating turns: each in a process of its own, with the batches that it would make of the corpus.

fastpoem's batches, as a user without flags has them on the device, are chosen first, evenly spaced by their tokens over its epoch, so that a few steps stand
for an epoch (a small slice of the text would not do: what is left over of sparse buckets would fill batches of the longest). *trainer, sorted* gets the very
same poems, sorted by length, and so does the Trainer in bf16, which runs where fastpoem computes in bf16. *notebook* and *trainer, plain* get random batches of
the corpus, chosen in the same way, both the same ones. Turns alternate, so that a machine whose speed drifts slows all alike: compare sums over all turns.

A contender that dies is out of the race, and each of its turns that are left fails with the line that says why; the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.precision import dtype_on
from benchmarks.scene import BATCH, FULL, Scene, row_lengths
from benchmarks.worker import give_back_memory
from benchmarks.written import POEMS
from fastpoem.config import from_kwargs
from fastpoem.corpus.hold_out import hold_out
from fastpoem.corpus.store import TokenStore
from fastpoem.engine.batching import choose_batching
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.run.folder import PRECISIONS
from fastpoem.run.given import order_of

ROOT = Path(__file__).parents[1]
BF16 = "trainer, sorted, bf16"
CONTENDERS = ("notebook", "trainer, plain", "trainer, sorted", BF16, "fastpoem")


def contenders(dtype: torch.dtype) -> dict[str, str]:
    """{name: "fp32", "bf16" or "fp16", what it computes in} where fastpoem computes in `dtype`; the Trainer in bf16 only where that is bf16."""
    own = {BF16: "bf16", "fastpoem": PRECISIONS[dtype]}
    return {name: own.get(name, "fp32") for name in CONTENDERS if name != BF16 or dtype == torch.bfloat16}


def everyone() -> list[str]:
    """Who contends on any device of this machine."""
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    found = {name for device in devices for name in contenders(dtype_on(device))}
    return [name for name in CONTENDERS if name in found]


@dataclass
class Batches:
    """rows: poems of the text of each batch. steps: their numbers in fastpoem's epoch, None where they are not its. packed: no padding."""

    rows: list[list[int]]
    steps: list[int] | None = None
    packed: bool = False

    def part(self, indices: Sequence[int]) -> Batches:
        return Batches([self.rows[i] for i in indices], self.steps and [self.steps[i] for i in indices], self.packed)


class Programme:
    """Who trains on what, where fastpoem computes in `dtype` (None: what it does on the device). `contenders`: {name: precision}; `lengths` (rows,)
    are tokens of each poem."""

    def __init__(
        self,
        store: TokenStore,
        val_poems: int = 0,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch: int = BATCH,
    ) -> None:
        self.batch = batch
        self.lengths = row_lengths(store)
        held = hold_out(store, val_poems, 0).left_out
        bucket, index = store.locate(np.arange(store.rows))
        self._row = np.empty((len(store.buckets), max(b.rows for b in store.buckets)), np.int64)
        self._row[bucket, index] = np.arange(store.rows)
        config, where = from_kwargs(data="poems", batch_size=batch, seed=0), torch.device(device)
        self.dtype = dtype or dtype_on(device)
        self.contenders = contenders(self.dtype)
        self.batching, _ = choose_batching(config, where, self.dtype, FULL.n_embd // FULL.n_head)
        self.order = order_of(dataclasses.replace(config, batching=self.batching), store, held)
        free = np.delete(np.arange(store.rows), held)
        self.random = np.random.default_rng(0).permutation(free)[: len(free) // batch * batch].reshape(-1, batch)

    def rows(self, step: int) -> list[int]:
        found = self.order(0, step)
        return self._row[found.bucket, found.index].tolist()

    def evenly(self, count: int) -> dict[str, Batches]:
        """`count` batches for each contender that stand for an epoch, ordered by length."""
        steps = spread(range(self.order.steps), count, lambda step: int(self.lengths[self.rows(step)].sum()))
        ours = [self.rows(step) for step in steps]
        random = [batch.tolist() for batch in spread(self.random, count, lambda batch: self.lengths[batch].max())]
        return self._each(Batches(random), Batches(self._sorted(ours)), Batches(ours, steps, self.batching == "pack"))

    def _each(self, random: Batches, alike: Batches, ours: Batches) -> dict[str, Batches]:
        theirs = {"notebook": random, "trainer, plain": random, "fastpoem": ours}
        return {name: theirs.get(name, alike) for name in self.contenders}

    def _sorted(self, batches: list[list[int]]) -> list[list[int]]:
        """The same poems in batches of like length."""
        rows = np.concatenate(batches)
        return rows[np.argsort(self.lengths[rows], kind="stable")].reshape(-1, self.batch).tolist()

    def epoch(self, count: int) -> dict[str, Batches]:
        """The first `count` batches of an epoch, in the order of training; those that are sorted shuffled."""
        steps = list(range(count))
        random = Batches(self.random[:count].tolist())
        ours = Batches([self.rows(step) for step in steps], steps, self.batching == "pack")
        alike = self._sorted(ours.rows)
        np.random.default_rng(1).shuffle(alike)
        return self._each(random, Batches(alike), ours)

    def figures(self, batches: Batches) -> dict[str, int]:
        """poems, real tokens that are targets, and positions computed: with padding to the longest where they are not packed."""
        lengths = self.lengths[np.array(batches.rows)]  # (batches, B)
        return {
            "poems": lengths.size,
            "tokens": int((lengths - 1).sum()),
            "padded": int((lengths - 1).sum() if batches.packed else (lengths.max(1) * lengths.shape[1]).sum()),
        }


def spread(batches: Sequence[Any], count: int, length: Callable[[Any], int]) -> list[Any]:
    """`count` of the batches, evenly spaced by length, ascending."""
    stride = len(batches) // count
    return sorted(batches, key=length)[stride // 2 :: stride][:count]


def dealt(count: int, turns: int) -> list[list[int]]:
    """0 … count - 1 dealt to turns so that each gets short and long ones alike: who goes first changes every round."""
    return [[at for at in range(count) if (at + at // turns) % turns == turn] for turn in range(turns)]


class Contender:
    """A worker's other end. Once the worker is dead, even at its start, `turn` and `loss` raise RuntimeError with the cause."""

    def __init__(
        self,
        name: str,
        scene: Scene,
        shape: GPT2Config,
        *,
        device: str,
        precision: str,
        lr: float,
        val_poems: int,
        batch: int = BATCH,
        cache: Path | None = None,
        out: Path | None = None,
    ) -> None:
        """precision: fastpoem's; what the others compute in follows from their names. cache: where stores and compilers keep what they make, None:
        nowhere that lasts. out: where its folder is made (None: the scene's)."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name.replace(', ', '-')}-", dir=out or scene.folder))
        self.name, self.log = name, folder / "log"
        self._resident, self._death = "unknown", ""
        job: dict[str, Any] = {"contender": name, "data": str(scene.data), "model": str(scene.model(shape))}
        job |= {"folder": str(folder), "device": device, "precision": precision}
        job |= {"lr": lr, "val_poems": val_poems, "batch": batch, "cache": str(cache or folder)}
        (folder / "job.json").write_text(json.dumps(job))
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(folder / "job.json")],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        with contextlib.suppress(RuntimeError):
            self._answer()

    def turn(self, batches: Batches, seconds: float = 1e9) -> dict[str, Any]:
        """Train on the batches, until `seconds` have passed at most. {"seconds", "steps"} it took."""
        return self._ask({"batches": batches.rows, "steps": batches.steps, "seconds": seconds})

    def loss(self) -> float:
        """On the held-out poems."""
        return self._ask({"evaluate": True})["loss"]

    def written(self, poems: int = POEMS) -> dict[str, Any]:
        """What the model writes now, as `benchmarks.written` has it."""
        return self._ask({"write": poems})

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        if self._death:
            raise RuntimeError(self._death)
        with contextlib.suppress(BrokenPipeError):  # there is no answer either
            print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            with contextlib.suppress(OSError):  # Linux has /proc
                status = Path(f"/proc/{self._process.pid}/status").read_text()
                self._resident = next(
                    (row[6:].strip() for row in status.splitlines() if row.startswith("VmRSS")), self._resident
                )
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        how = f"failed with exit status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += f": out of memory? (resident when last seen: {self._resident})"
        said = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
        self._death = f"{self.name} {how}; the end of its log: {said or 'empty'}"
        raise RuntimeError(self._death)


@contextlib.contextmanager
def start(
    scene: Scene,
    shape: GPT2Config,
    names: Iterable[str],
    *,
    device: str = "cpu",
    precision: str = "fp32",
    lr: float = 2e-5,
    val_poems: int = 0,
    batch: int = BATCH,
    cache: Path | None = None,
    out: Path | None = None,
) -> Iterator[dict[str, Contender]]:
    """Contenders of these names, one after the other, so that their loading does not disturb anybody's first turn; closed at the end.
    precision: fastpoem's."""
    give_back_memory()  # what this process has measured before leaves gigabytes
    settings: dict[str, Any] = {"device": device, "precision": precision, "lr": lr, "val_poems": val_poems}
    settings |= {"batch": batch, "cache": cache, "out": out}
    found = {name: Contender(name, scene, shape, **settings) for name in names}
    try:
        yield found
    finally:
        for one in found.values():
            one.close()
