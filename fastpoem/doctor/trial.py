"""Ten steps of training at the real shape, and what an epoch of 217,561 poems would then take; beside them the notebook's loop.

No corpus is needed: the lengths are those of the corpus, as the mean of each tenth of the poems in order of length, and a step's time is
near enough to linear in its tokens that ten such steps stand for an epoch: of batches of one length each, or of packed ones that have all
of them. 73% of the poems have 34, 66, 50 or 26 tokens. For the notebook, whose batches are random and padded, it is the mean of each tenth of the longest of 16. A CPU takes seconds a
step: three steps of ours there, and one of the notebook's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.doctor import machine
from fastpoem.doctor.checks import REAL
from fastpoem.engine.compile import compiled_pieces, one_of_each_form
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.kernels import OURS, Kernels
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model.flash import find_varlen
from fastpoem.model.gpt2 import GPT2, GPT2Config

POEMS, BATCH = 217_561, 16
LENGTHS = (24, 34, 34, 40, 50, 53, 66, 66, 84, 193)  # mean 64.4
THIRDS = (31, 53, 110)
LONGEST = (75, 105, 126, 146, 166, 189, 216, 249, 306, 444)  # of 16 random poems, mean 202
MEAN = (202,)


@dataclasses.dataclass(frozen=True)
class Trial:
    """form: what ran. epoch_s: projected. note: why there are no figures."""

    form: str
    step_ms: float | None = None
    epoch_s: float | None = None
    poems_per_s: float | None = None
    setup_s: float | None = None
    peak_bytes: int | None = None  # of device memory, on CUDA
    note: str = ""


def train(
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiles: bool = False,
    graphs: bool = False,
    combined: bool = True,
    packed: bool = False,
    kernels: Kernels = OURS,
    lengths: Sequence[int] = LENGTHS,
    shape: GPT2Config = REAL,
    rounds: int = 1,
) -> Trial:
    """Our step, random weights, dropout on."""
    form = " + ".join([*["compiled"] * compiles, *["graphs"] * graphs]) or "plain"
    _peak_memory(device, reset=True)
    begin = time.perf_counter()
    model = GPT2(shape, find_varlen(device, dtype, shape.n_embd // shape.n_head)[0] if packed else None)
    model.initialise(0)
    optimizer = FlatAdamW(model.to(device).train(), device, dtype, weight_decay=0.01, max_norm=1.0, kernels=kernels)
    if packed:
        dealt = [[lengths[(at + poem) % len(lengths)] for poem in range(BATCH)] for at in range(len(lengths))]
        batches = [_batch(poems, shape.vocab_size, rounded=device.type == "cuda") for poems in dealt]
    else:
        batches = [_batch([length] * BATCH, shape.vocab_size) for length in lengths]
    shapes = [rows.shape for rows in batches]
    source = torch.zeros(BATCH * max(lengths), dtype=torch.int16, device=device)
    step = TrainStep(Pieces(model), optimizer, source, poems=BATCH, pad_id=0)
    if compiles:
        torch._dynamo.reset()
        step.pieces = compiled_pieces(model, combined=combined)
        for one in one_of_each_form(shapes):
            with step.rehearsal(one):
                step.work(one)
    if graphs:
        said: list[str] = []
        step.launch = recorded = Graphs(step, said.append)
        recorded.record(shapes)
        if recorded.broken:
            return Trial(form, note=said[-1])
    for rows in batches if device.type == "cuda" else batches[:1]:
        step(rows, 1e-4)
    machine.wait(device)
    setup = time.perf_counter() - begin

    def run() -> None:
        for rows in batches:
            step(rows, 1e-4)

    took = _median(device, run, rounds) / len(batches)
    totals, peak = step.totals(), _peak_memory(device)
    failed = totals.skipped if optimizer.scale is None else int(step.account.most_failed)  # float16 tries its scale
    note = f"{failed} steps were not finite" if failed else ""
    return _trial(form, took, setup, peak, note)


def notebook(
    device: torch.device, *, longest: Sequence[int] = LONGEST, shape: GPT2Config = REAL, rounds: int = 1
) -> Trial:
    """The notebook's step without its data loader: Hugging Face's GPT-2 in fp32, 16 poems padded to the longest, padding in the loss,
    PyTorch's AdamW and clipping."""
    form = "the notebook's loop"
    try:
        from transformers import GPT2Config as HFConfig
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError as error:
        return Trial(form, note=f"transformers cannot be imported ({error})")
    logging.set_verbosity_error()  # its words about ids that nothing here asks for
    _peak_memory(device, reset=True)
    begin = time.perf_counter()
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    model = GPT2LMHeadModel(HFConfig(**{name: getattr(shape, name) for name in names})).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    batches = [torch.randint(1, shape.vocab_size, (BATCH, length)) for length in longest]

    def learn(ids: torch.Tensor) -> None:
        ids = ids.to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for ids in batches if device.type == "cuda" else [batches[0][:, :24]]:
        learn(ids)
    setup = time.perf_counter() - begin

    def run() -> None:
        for ids in batches:
            learn(ids)

    took = _median(device, run, rounds) / len(batches)
    peak = _peak_memory(device)
    return _trial(form, took, setup, peak)


def _trial(form: str, took: float, setup: float, peak: int | None, note: str = "") -> Trial:
    return Trial(form, 1e3 * took, took * (POEMS // BATCH), BATCH / took, setup, peak, note)


def _batch(lengths: Sequence[int], vocabulary: int, rounded: bool = False) -> Rows:
    """Random ids: rows where the poems are of one length, packed where they are not."""
    longest, tokens = max(lengths), sum(lengths) - BATCH
    draw = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1, vocabulary, (BATCH * longest,), generator=draw, dtype=torch.int32).short()
    where = torch.stack([torch.arange(BATCH) * longest, torch.tensor(lengths)], 1)
    if min(lengths) == longest:
        return Rows(ids, where, Shape(BATCH, longest), tokens)
    shape = Shape(BATCH, longest, tokens)
    return Rows(ids, where, shape.rounded() if rounded else shape, tokens)


def _median(device: torch.device, run: Any, rounds: int) -> float:
    """Seconds of a round, the median of `rounds`."""
    times = []
    for _ in range(rounds):
        machine.wait(device)
        begin = time.perf_counter()
        run()
        machine.wait(device)
        times.append(time.perf_counter() - begin)
    return max(statistics.median(times), 1e-9)


def _peak_memory(device: torch.device, reset: bool = False) -> int | None:
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)
