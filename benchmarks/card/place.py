"""Where and at what size everything is measured: the device, the poems, the model, and the runs of training that the entries are made of.

On a card it is the real model and 217,561 poems: the real ones where they are found, else made-up ones of their lengths, on which speed is
the same and a loss says nothing. `small` takes a model and a text that two CPU cores train on in seconds, by the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.notebook import Poems
from benchmarks.scene import FULL, Scene, make_scene
from fastpoem.config import from_kwargs
from fastpoem.corpus.store import TokenStore, cached_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.doctor.trial import POEMS
from fastpoem.engine.precision import choose_dtype
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.model.hub import BUNDLED
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.run.loop import Loop
from fastpoem.signals import StopRequest

FEW = 1200  # poems of the small text
TINY = dataclasses.replace(FULL, vocab_size=1901, n_positions=512, n_embd=64, n_layer=2, n_head=1)


class Missing(Exception):
    """What an entry needs is not on this machine."""


class Heard(Voice):
    """A voice that keeps what it says."""

    def __init__(self) -> None:
        super().__init__(quiet=True, lang="en")
        self.lines: list[str] = []

    def say(self, english: str, *values: Any) -> None:
        self.lines.append(self.words(english, *values))


class Deadline(StopRequest):
    """Asks to stop when so many seconds have passed, too."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def signal(self) -> int | None:
        return super().signal or (signal.SIGALRM if time.monotonic() >= self._end else None)


@dataclasses.dataclass(frozen=True)
class Place:
    """work: folder for models, stores, runs and compilers' caches, kept between calls. data, tokenizer: None where they are made up.
    pace: seconds of setting up and of a step, and steps, of an epoch of the default run, where that was timed."""

    device: torch.device
    small: bool
    work: Path
    data: Path | None = None
    tokenizer: Path | None = None
    pace: tuple[float, float, int] | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> GPT2Config:
        if not self.small:
            return FULL
        return TINY if self.tokenizer is None else dataclasses.replace(TINY, vocab_size=FULL.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype("auto", self.device, FULL, 1030)[0] if self.gpu else torch.float32

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def size(self, real: int, small: int) -> int:
        return small if self.small else real

    def scene(self, poems: int | None = None) -> Scene:
        """The text and what is made of it, made once. poems: every so many-th only, so that there are so many."""
        tokenizer = self.tokenizer or BUNDLED / "model"
        name = "-".join(
            ["text", *["small"] * self.small, *["given"] * (self.data is not None), *[str(poems)] * bool(poems)]
        )
        folder, text = self.work / name, self.work / name / "poems.txt"
        if poems is None and self.data is not None and not self.small:
            text = self.data
        folder.mkdir(parents=True, exist_ok=True)
        if not text.exists():
            if poems is None and self.data is None:
                made = make_scene(folder, real=False, poems=self.size(POEMS, FEW), text="partial").data
            else:
                lines = Poems(self.data if poems is None and self.data else self.scene().data).lines
                most, made = poems or FEW, folder / "partial"
                made.write_text("\n".join(lines[:: max(1, len(lines) // most)][:most]), encoding="utf-8")
            os.replace(made, text)
        return Scene(folder, text, tokenizer)

    def store(self) -> TokenStore:
        """Of the whole text, where training finds it too."""
        scene = self.scene()
        return cached_store(scene.data, PoemTokenizer.load(scene.tokenizer), cache_dir=self.work)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """One that is gone afterwards: checkpoints of a run are most of a gigabyte."""
        runs = self.work / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=runs))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    @contextlib.contextmanager
    def run(
        self, out: Path, poems: int | None = None, *, checked: bool = False, **settings: Any
    ) -> Iterator[tuple[Loop, list[str]]]:
        """(the loop of a run from scratch on the text, what it says). checked: what this card was never checked for is checked first, as in
        training; otherwise every piece is taken as it is, because how it does is what is asked. On a CPU nothing is replayed, and
        `compile="on"` is the front half of the compiler."""
        compiles = not self.gpu and settings.pop("compile", "off") == "on"
        if not self.gpu:
            settings.pop("graphs", None)
        scene = self.scene(poems)
        with _unchecked(not checked):
            config = from_kwargs(
                **{
                    "data": str(scene.data), "model": str(scene.model(self.shape)), "from_scratch": True, "out": str(out),
                    "device": str(self.device), "cache_dir": str(self.work), "val_poems": 0, "precision": self.precision,
                    "log_every": 10**6, "sample_every": 0, **settings,
                }
            )  # fmt: skip
            voice = Heard()
            with assembled(config, voice) as (loop, _):
                if compiles:
                    from fastpoem.doctor.checks import compile_step
                    from fastpoem.engine.compile import forms

                    compile_step(
                        loop.step, [loop.feed(loop.order(0, number)) for number in range(min(2, loop.order.steps))]
                    )
                    loop.step.forms, loop._forms = forms, forms()
                yield loop, voice.lines


@contextlib.contextmanager
def _unchecked(wanted: bool) -> Iterator[None]:
    before = os.environ.get("FASTPOEM_ASSUME_CHECKED")
    if wanted:
        os.environ["FASTPOEM_ASSUME_CHECKED"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("FASTPOEM_ASSUME_CHECKED", None)
        else:
            os.environ["FASTPOEM_ASSUME_CHECKED"] = before
