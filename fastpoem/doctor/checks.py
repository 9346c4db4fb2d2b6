"""What training relies on, against something that cannot be wrong in the same way, on the very device: kernels, graphs, compiler, attention.

The tests of the project run where there is no GPU, and a card's numbers, races and drivers are seen only on the card. So every fast path
has a check here that takes seconds, runs on any device, and fails when the path is broken. None of them compares with nothing: where every
number is zero, or the weights did not move, that is a failure too.

A check is named by a line: `kernels 21128` (the vocabulary; with `float16` where that is computed in), or `attention`, `compiled` or `replay` with a dtype and `packed`, `compiled`,
`full` (the real model's shape), `separate` (compiled without combined kernels, which failed), `plain-loss` or `plain-update` (without a kernel of ours, which failed) behind it. As a program it runs
checks in a process of their own (`fastpoem.doctor.apart`), because a kernel that writes where it should not leaves a CUDA context in which
nothing works any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from fastpoem_kernels import check as kernel_check
from fastpoem_kernels.check import Record
from torch import Tensor

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.doctor.check_attention import attention, farthest, worst
from fastpoem.doctor.check_dropout import same_masks
from fastpoem.engine.compile import combines, compiled_pieces, forms, one_of_each_form
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.kernels import OURS, Kernels, done_without, kernels_without
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_device, has_bf16
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model.flash import find_varlen
from fastpoem.model.gpt2 import GPT2, GPT2Config

REAL = GPT2Config(21128, 1024, 768, 6, 12)  # 59.5 M parameters
# Heads as wide as the real model's, and weights large enough for one batch's loss to be told from another's.
SMALL = GPT2Config(1000, 160, 128, 2, 2, initializer_range=0.1)
STEPS, POEMS, RATE, SCALE = 12, 8, 1e-3, 4096.0
SEPARATE = "separate"  # in the name of a check: compiled without combined kernels


class Trace(NamedTuple):
    """What a few steps of training did, on the CPU."""

    losses: Tensor  # (steps,) float64
    gradient: dict[str, Tensor]  # of the first step, where it was asked for
    moved: Tensor  # (P,) float32, the weights' change


def wanted(dtype: torch.dtype, *, vocabulary: int, packed: bool, compiles: bool, graphs: bool) -> list[str]:
    """The checks of what a run in `dtype` uses."""
    kind, forms_of = str(dtype)[6:], " packed" if packed else ""
    names = [f"kernels {vocabulary}{' float16' if dtype == torch.float16 else ''}", f"attention {kind}"]
    names += [f"attention {kind} packed"] if packed else []
    names += [f"compiled {kind}{forms_of}"] if compiles else []
    names += [f"replay {kind}{forms_of}"] if graphs else []
    return names + ([f"replay {kind}{forms_of} compiled"] if graphs and compiles else [])


def cost(name: str) -> tuple[bool, bool, int]:
    """By which checks are sorted, the cheapest first: what compiles a model takes far longer than the rest, the real model the longest; and
    `kernels` comes before what trains with them."""
    piece, *more = name.split()
    order = {"kernels": 0, "attention": 1}
    return "full" in more, "compiled" in (piece, *more), order.get(piece, 2)


def with_kernels(names: Sequence[str], failed: Mapping[str, Iterable[str]]) -> list[str]:
    """The same checks, those that train without the kernels that failed: one broken kernel must not cost graphs and compiler too.

    failed: check's name -> its records that are not ok."""
    less = done_without([record for name, some in failed.items() if name.startswith("kernels") for record in some])
    return [" ".join([name, *less]) if name.startswith(("compiled", "replay")) else name for name in names]


def with_separate(names: Sequence[str], failed: Mapping[str, Iterable[str]]) -> list[str]:
    """The same checks; where a step compiled with combined kernels failed, the one without them is checked too, and replayed in its place.

    failed: check's name -> its records that are not ok."""
    if not combines():
        return list(names)
    found = list[str]()
    for name in names:
        if name.startswith("compiled"):
            found += [name, separate(name)] if failed.get(name) else [name]
        else:
            found.append(separate(name) if failed.get(_compiled(name)) else name)
    return list(dict.fromkeys(found))


def separate(name: str) -> str:
    """The check of the same, compiled without combined kernels."""
    return name if SEPARATE in name.split() else f"{name} {SEPARATE}"


def _compiled(name: str) -> str:
    """The check of the step that a compiled one's `replay` replays; nothing for others."""
    more = name.split()[1:]
    return " ".join(["compiled", *(word for word in more if word != "compiled")]) if "compiled" in more else ""


def run(name: str, device: torch.device) -> list[Record]:
    """The records of one check. What raises is a record that is not ok, with the reason."""
    piece, first, *more = name.split()
    if piece == "kernels":
        rows = 1030 if device.type == "cuda" else 128  # a step has about a thousand; the CPU is only shown to be right
        half = [torch.float16] if "float16" in more else [torch.bfloat16] if has_bf16(device) else []
        return kernel_check.check(device, rows, int(first), parameters=4_000_000, dtypes=(torch.float32, *half))
    dtype = getattr(torch, first)
    shape, kernels, combined = REAL if "full" in more else SMALL, kernels_without(more), SEPARATE not in more
    checks: dict[str, Callable[[], list[Record]]] = {
        "attention": lambda: attention(device, dtype, batches(True, count=1)[0] if "packed" in more else None),
        "compiled": lambda: [compiled(device, dtype, "packed" in more, shape, kernels, combined=combined)],
        "replay": lambda: [
            replay(device, dtype, "packed" in more, shape, kernels, compiles="compiled" in more, combined=combined)
        ],
    }
    try:
        with _apart(device):
            records = checks[piece]()
    except Exception as error:  # the compiler, the driver or our own mistake: whichever it was, the plain path is taken
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return [Record(name, False, note=f"{type(error).__name__}: {reason}")]
    for record in records:
        record.name = f"{name} {record.name}".strip()
    return records


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Leave random state and compiled forms as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


# Training: graphs and compiler


def batches(packed: bool, shape: GPT2Config = SMALL, count: int = STEPS) -> list[Rows]:
    """Poems of every length in batches of three sizes, random ids."""
    draw, made = torch.Generator().manual_seed(5), []
    for number in range(count):
        # 66, 32 and 50 inputs: divisible by 8, and not; packed ones are rounded to two lengths
        longest = (67, 33, 131 if packed else 51)[number % 3]
        lengths = torch.randint(2, longest + 1, (POEMS,), generator=draw)
        lengths[number % POEMS] = longest
        ids = torch.randint(1, shape.vocab_size, (POEMS * longest,), generator=draw).short()
        where = torch.stack([torch.arange(POEMS) * longest, lengths], 1)
        tokens = int(lengths.sum()) - POEMS
        size = Shape(POEMS, longest)
        if packed:  # as the feed rounds them
            size = Shape(POEMS, longest, tokens).rounded()
        made.append(Rows(ids, where, size, tokens))
    return made


def make_step(
    device: torch.device,
    dtype: torch.dtype,
    shape: GPT2Config,
    packed: bool,
    dropout: float,
    max_norm: float = 1.0,
    kernels: Kernels = OURS,
) -> TrainStep:
    """A step of a model drawn from seed 0."""
    shape = dataclasses.replace(shape, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    model = GPT2(shape, find_varlen(device, dtype, shape.n_embd // shape.n_head)[0] if packed else None)
    model.initialise(0)
    settings: dict[str, Any] = dict(weight_decay=0.01, max_norm=max_norm, kernels=kernels)
    optimizer = FlatAdamW(model.to(device).train(), device, dtype, **settings)
    _begin_scale(optimizer)
    source = torch.zeros(POEMS * 131, dtype=torch.int16, device=device)
    return TrainStep(Pieces(model), optimizer, source, poems=POEMS, pad_id=0)


def _begin_scale(optimizer: FlatAdamW) -> None:
    """float16 begins at a scale at which no step is lost: what is compared is arithmetic, not the search for a scale."""
    if optimizer.scale is not None:
        optimizer.scale.value.fill_(SCALE)
        optimizer.scale.good.zero_()


def compile_step(step: TrainStep, rows: Sequence[Rows], backend: str | None = None, combined: bool = True) -> None:
    """Compile the step and warm it up. A CPU, where training does not compile, gets the front half of the compiler."""
    tell({"compiles": True})
    step.pieces = compiled_pieces(
        step.optimizer.module, backend or ("inductor" if step.device.type == "cuda" else "aot_eager"), combined
    )
    for shape in one_of_each_form([one.shape for one in rows]):
        with step.rehearsal(shape):
            step.work(shape)
    tell({"compiles": False})


def train(step: TrainStep, rows: Sequence[Rows], begin: Tensor | None = None, gradient: bool = False) -> Trace:
    """Train on `rows`, from the weights `begin` (P,) if given. Nothing is read from the device before the end, as in training; but the
    first gradient where it is wanted."""
    optimizer, seen = step.optimizer, {}
    if begin is not None:
        optimizer.master.copy_(begin)
        for tensor in (optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.applied):
            tensor.zero_()
        _begin_scale(optimizer)
        optimizer.reload()
    start = optimizer.master.clone()
    torch.manual_seed(1)
    for number, one in enumerate(rows):
        step(one, RATE * (1 + number % 2))
        if gradient and number == 0:
            times = 1.0 if optimizer.scale is None else float(optimizer.scale.value)
            seen = {name: part.detach().double().cpu() / times for name, part in optimizer.named(optimizer.grad)}
    return Trace(step.account.losses[-len(rows) :].double().cpu(), seen, (optimizer.master - start).cpu())


def replay(
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = False,
    shape: GPT2Config = SMALL,
    kernels: Kernels = OURS,
    *,
    compiles: bool = False,
    combined: bool = True,
) -> Record:
    """Graph replay against the same step launched kernel by kernel, same random state, dropout off and on: losses and weights; and its
    dropout's masks (`same_masks`).

    Some of PyTorch's backward kernels add in whatever order threads come, so that a step does not repeat itself bit for bit. It is run
    twice, and a replay may differ four times as far as that; 1e-6 (in 16 bits: 1e-3) where it does repeat itself.
    """
    rows, floor = batches(packed, shape), 1e-6 if dtype == torch.float32 else 1e-3
    found, plains, said = list[Record](), list[Trace](), list[str]()
    for dropout in (0.0, 0.1):
        step = make_step(device, dtype, shape, packed, dropout, kernels=kernels)
        if compiles:
            compile_step(step, rows, combined=combined)
        begun = step.optimizer.master.clone()
        plain, again = train(step, rows, begun), train(step, rows, begun)
        if note := _lifeless(plain):
            return Record("", False, note=note)
        step.launch = graphs = Graphs(step, said.append)
        graphs.record({one.shape for one in rows})
        if graphs.broken:
            return Record("", False, note=said[-1])
        error, spread = difference(train(step, rows, begun), plain), difference(again, plain)
        allowed = max(floor, 4 * spread)
        note = f"dropout {dropout:g}, the plain step repeats itself to {spread:.1g}"
        found.append(Record("", error <= allowed, error=error, tolerance=allowed, note=note))
        plains.append(plain)
        if dropout:
            found.append(same_masks(step, rows[:2]))
    if difference(*plains) == 0:
        return Record("", False, note="dropout drops nothing")
    return worst(found)


def compiled(
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = False,
    shape: GPT2Config = SMALL,
    kernels: Kernels = OURS,
    backend: str | None = None,
    *,
    combined: bool = True,
) -> Record:
    """The compiled step against the eager one, dropout off: losses, every parameter's first gradient, the weights after a few steps. With
    dropout on, against itself: its masks (`same_masks`).

    In 16 bits both round, in different places: the compiled step may be twice as far from the fp32 step as the eager one is.
    """
    rows = batches(packed, shape)

    def eager(dtype: torch.dtype) -> Trace:
        return train(make_step(device, dtype, shape, packed, 0.0, math.inf, kernels), rows, gradient=True)

    truth = eager(torch.float32)
    if note := _lifeless(truth):
        return Record("", False, note=note)
    step = make_step(device, dtype, shape, packed, 0.0, math.inf, kernels)
    compile_step(step, rows, backend, combined)
    seen = forms()
    mine = train(step, rows, gradient=True)
    if forms() != seen:
        return Record("", False, note="it was compiled again for a length that it should serve")
    rounded = truth if dtype == torch.float32 else eager(dtype)
    found = [Record("", True, error=0.0, tolerance=1.0)]
    # On a CPU PyTorch adds up LayerNorm's gradients in bfloat16, and the C of the eager step does not.
    coarse = dtype == torch.bfloat16 and device.type == "cpu"
    for what, measure, least in (
        ("losses", lambda trace: farthest(trace.losses, truth.losses), 1e-5 if dtype == torch.float32 else 2e-3),
        ("gradients", lambda trace: _worst_gradient(trace, truth), 5e-2 if coarse else 1e-4),
        ("weights", lambda trace: _apart_by(trace.moved, truth.moved), 1e-1 if coarse else 1e-2),
    ):
        allowed = max(least, 2 * measure(rounded))
        found.append(
            Record("", measure(mine) <= allowed, error=measure(mine), tolerance=allowed, note=f"farthest in {what}")
        )
    step = make_step(device, dtype, shape, packed, 0.1, kernels=kernels)
    few = rows[: 2 if device.type == "cuda" else 1]  # of the two forms that a length divisible by 8 makes there
    compile_step(step, few, backend, combined)
    return worst([*found, same_masks(step, few)])


def difference(one: Trace, other: Trace) -> float:
    """The larger of the relative differences of losses and of the weights' change; infinite where a NaN hides it."""
    return max(farthest(one.losses, other.losses), _apart_by(one.moved, other.moved))


def _lifeless(trace: Trace) -> str:
    """What shows that nothing was computed."""
    if not bool(torch.isfinite(trace.losses).all()) or not bool(torch.isfinite(trace.moved).all()):
        return "the plain step's numbers are not finite"
    return "" if trace.losses.min() > 0 and trace.moved.norm() > 0 else "the plain step computes nothing"


def _apart_by(mine: Tensor, exact: Tensor) -> float:
    """Distance, over the length of `exact`."""
    error = ((mine.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()
    return error if error == error else math.inf


def _worst_gradient(mine: Trace, exact: Trace) -> float:
    return max(_apart_by(mine.gradient[name], gradient) for name, gradient in exact.gradient.items())


# A process of their own


def tell(news: Mapping[str, Any]) -> None:
    """A line of JSON (Python's, which has NaN) for `fastpoem.doctor.apart`, where this is its process."""
    if __name__ == "__main__":
        print(json.dumps(news), flush=True)


def as_json(record: Record) -> dict[str, Any]:
    """A record for machines: numbers that are not finite become null, which JSON can say."""
    plain = dataclasses.asdict(record)
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in plain.items()}


def main(arguments: Sequence[str]) -> None:
    """DEVICE NAME…: tells of each check begun, of when it compiles, and each one's records. Ends after the first check that fails: what it
    has done to the CUDA context must not be held against the next."""
    device = choose_device(arguments[0])
    if device.type == "cuda":
        torch.zeros((), device=device)
    for name in arguments[1:]:
        tell({"begins": name})
        records = run(name, device)
        tell({"check": name, "records": [dataclasses.asdict(record) for record in records]})
        if not all(record.ok for record in records):
            return


if __name__ == "__main__":
    main(sys.argv[1:])
