"""The doctor's examination: the checks, what training would take of what they leave, and a moment of training with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fastpoem_kernels import native
from fastpoem_kernels.check import Record

from fastpoem.config import TrainConfig
from fastpoem.doctor import checks, machine, trial, trust, verdicts
from fastpoem.doctor.apart import SECONDS, in_a_process
from fastpoem.engine.batching import choose_batching
from fastpoem.engine.compile import why_not_compile
from fastpoem.engine.memory import keep_freed_memory
from fastpoem.engine.precision import choose_dtype, has_bf16
from fastpoem.model.flash import why_not_flash
from fastpoem.signals import ask

HEAD_WIDTH = checks.REAL.n_embd // checks.REAL.n_head


def examine(
    device: torch.device, *, quick: bool, say: Callable[[str], None], seconds: float = SECONDS
) -> dict[str, Any]:
    """The report, as `--json` has it. seconds: what a check may take on a GPU (`in_a_process`)."""
    gpu = device.type == "cuda"
    if not gpu:
        keep_freed_memory()
    dtype, why = choose_dtype("auto", device, checks.REAL, 1030)
    compiler = why_not_compile(device)
    packs = choose_batching(TrainConfig(), device, dtype, HEAD_WIDTH)[0] == "pack"
    # First, while this process holds nothing on the card.
    names, skipped = _checks(device, dtype, compiler, quick, packs)
    found: dict[str, list[Record]] = {}
    if gpu and os.environ.get("FASTPOEM_ASSUME_CHECKED") == "1":
        skipped += [{"name": name, "reason": "FASTPOEM_ASSUME_CHECKED=1"} for name in names]
    else:
        say(f"checking {', '.join(dict.fromkeys(name.split()[0] for name in names))}")
        ended = verdicts.keep(verdicts.card(device)) if gpu else None
        while names:
            # on a CPU nothing that fails can spoil the process
            here = ((name, checks.run(name, device)) for name in names)
            for name, records in in_a_process(device, names, seconds, ended) if ended else here:
                ask()
                found[name] = records
                for record in records:
                    say(f"  {record.name}: {'right' if record.ok else 'WRONG'}")
            names = _beside(device, dtype, compiler, found) if packs else []
        if gpu:
            verdicts.remember(verdicts.card(device), found)
    records = [record for some in found.values() for record in some]

    ask()
    say("measuring memory and matrix units")
    about, free = machine.describe(device), machine.memory(device)
    peak = machine.peak(about["name"]) if gpu else None
    rates = {
        **machine.rates(device),
        "peak_memory_gb_s": peak and 1e3 * peak.memory,
        "peak_bf16_tflop_s": peak.half if peak and has_bf16(device) else None,
        "peak_fp16_tflop_s": peak and peak.half,
        "peak_fp32_tflop_s": peak and peak.fp32,
    }

    lines: list[str] = []
    failed = {name: verdicts.failures(some) for name, some in found.items()}
    config = TrainConfig(device=str(device), batching="auto" if packs else "bucket")
    trusted = trust.decide(config, device, dtype, checks.REAL.vocab_size, lines.append, failed)
    packs = packs and trusted.varlen
    flash = why_not_flash(device, dtype)
    uses = {
        "precision": str(dtype)[6:],
        "precision_why": why,
        "loss": _whose(trusted.kernels.cross_entropy),
        "optimizer": _whose(trusted.kernels.clipped_adamw_),
        "attention": ("flash" if flash is None else "scaled_dot_product_attention") if trusted.sdpa else "plain",
        "batching": "pack" if packs else "bucket",
        "compile": gpu and compiler is None and trusted.compile,
        "graphs": gpu and trusted.graphs,
        "why": lines,
    }

    say("training the real model for a moment")
    lengths = trial.LENGTHS if gpu and not quick else trial.THIRDS
    trials = []
    for compiles, graphs in ((False, False), (False, True), (True, False), (True, True)) if gpu else ((False, False),):
        ask()
        form = " + ".join([*["compiled"] * compiles, *["graphs"] * graphs]) or "plain"
        if compiles and compiler is not None:
            trials.append(trial.Trial(form, note=compiler))
            continue
        if (compiles and not trusted.compile) or (graphs and not trusted.graphs):
            trials.append(trial.Trial(form, note="failed its check"))
            continue
        options: dict[str, Any] = dict(
            compiles=compiles,
            graphs=graphs,
            combined=trusted.combined,
            packed=packs,
            kernels=trusted.kernels,
            lengths=lengths,
        )
        rounds = 5 if gpu else 1
        trials.append(_tried(partial(trial.train, device, dtype, rounds=rounds, **options), form))
        say(f"  {form}: {_milliseconds(trials[-1].step_ms)}")
    notebook = None
    ask()
    if not quick:
        longest, rounds = (trial.LONGEST, 3) if gpu else (trial.MEAN, 1)
        notebook = _tried(partial(trial.notebook, device, longest=longest, rounds=rounds), "the notebook's loop")
        say(f"  {notebook.form}: {_milliseconds(notebook.step_ms)}")

    mine = _mine(trials, uses)
    broken = [record.name for record in records if not record.ok]
    ok = not broken and mine.step_ms is not None and not mine.note
    return {
        "schema": 1,
        "ok": ok,
        "machine": about,
        "versions": machine.versions(device),
        "compiler": compiler,
        "checks": [checks.as_json(record) for record in records],
        "skipped": skipped,
        "memory": {**free, "step": mine.peak_bytes, **machine.allocator(device)},
        "rates": rates,
        "trials": [dataclasses.asdict(one) for one in trials],
        "notebook": notebook and dataclasses.asdict(notebook),
        "times_the_notebook": notebook.step_ms / mine.step_ms
        if notebook and notebook.step_ms and mine.step_ms
        else None,
        "uses": uses,
        "sentence": _sentence(device, uses, compiler, len(records), broken, mine),
    }


def _checks(
    device: torch.device, dtype: torch.dtype, compiler: str | None, quick: bool, packs: bool
) -> tuple[list[str], list[dict[str, str]]]:
    """(the checks for this device, those left out and why). What is compiled takes most of the time: only what a run without flags uses,
    which has packed batches or not."""
    gpu, kind = device.type == "cuda", str(dtype)[6:]
    names, rest = list[str](), list[str]()
    compiles = gpu and compiler is None
    for one, packed in dict.fromkeys([(dtype, False), (dtype, True), (torch.float32, False)]):
        uses: dict[str, Any] = dict(vocabulary=checks.REAL.vocab_size, packed=packed, graphs=True)
        usual = (one, packed) == (dtype, packs)
        names += checks.wanted(one, compiles=compiles and usual, **uses)
        rest += checks.wanted(one, compiles=compiles, **uses)
    names = sorted(dict.fromkeys(names), key=checks.cost)
    if not gpu:
        return names, [{"name": "compiled", "reason": "training on a CPU does not compile"}]
    if compiler is not None:
        return names, [{"name": "compiled", "reason": compiler}]
    left = [name for name in dict.fromkeys(rest) if name not in names]
    skipped = [{"name": name, "reason": "checked when a run first uses it"} for name in left]
    kind += " packed" if packs else ""
    full = [f"compiled {kind} full", f"replay {kind} full compiled"]
    if quick:
        return names, [*skipped, *({"name": name, "reason": "--quick"} for name in full)]
    return names + full, skipped


def _beside(
    device: torch.device, dtype: torch.dtype, compiler: str | None, found: Mapping[str, Sequence[Record]]
) -> list[str]:
    """The checks, not among those `found`, of the batches that are taken on a GPU where attention inside packed ones failed."""
    if device.type != "cuda" or all(record.ok for record in found.get(f"attention {str(dtype)[6:]} packed", ())):
        return []
    bucketed = checks.wanted(
        dtype, vocabulary=checks.REAL.vocab_size, packed=False, compiles=compiler is None, graphs=True
    )
    known = {name: verdicts.failures(records) for name, records in found.items()}
    return [name for name in checks.with_kernels(bucketed, known) if name not in found]


def _tried(run: Callable[[], Any], form: str) -> Any:
    try:
        return run()
    except Exception as error:  # out of memory, a compiler that gives up: said, and the rest goes on
        return trial.Trial(form, note=f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}")


def _mine(trials: Sequence[Any], uses: dict[str, Any]) -> Any:
    """The trial of what training will use."""
    form = " + ".join(piece for piece, used in (("compiled", uses["compile"]), ("graphs", uses["graphs"])) if used)
    return next(one for one in trials if one.form == (form or "plain"))


def _whose(function: Any) -> str:
    return "plain" if function.__module__.endswith("plain") else "fastpoem"


def _milliseconds(value: float | None) -> str:
    return "no figure" if value is None else f"{value:,.1f} ms a step"


def _sentence(
    device: torch.device, uses: dict[str, Any], compiler: str | None, count: int, broken: list[str], mine: Any
) -> str:
    """What training will use and why, in one line."""
    parts = [f"{uses['precision']} ({uses['precision_why']})"]
    if device.type == "cuda":
        own = [name for name in ("loss", "optimizer") if uses[name] == "plain"]
        parts.append("fastpoem's kernels" + (f" but PyTorch's own {' and '.join(own)}" if own else ""))
        parts.append(f"{uses['attention']} attention, {'packed' if uses['batching'] == 'pack' else 'bucketed'} batches")
        parts.append("torch.compile" if uses["compile"] else f"no torch.compile ({compiler or 'it failed its check'})")
        parts.append("CUDA graphs" if uses["graphs"] else "no CUDA graphs (they failed their check)")
    else:
        reason = native.why_not(getattr(torch, uses["precision"]))
        parts.append("fastpoem's C between the products" if reason is None else f"PyTorch's operators ({reason})")
        parts.append("packed batches" if uses["batching"] == "pack" else "bucketed batches")
    named = ", ".join(broken) if len(broken) <= 3 else f"{len(broken)} of {count} checks"
    verdict = f"{named} failed" if broken else f"all {count} checks passed" if count else "nothing was checked"
    epoch = f"; an epoch of 217,561 poems would take {duration(mine.epoch_s)}" if mine.epoch_s else ""
    return f"training on {device} will use {', '.join(parts)}: {verdict}{epoch}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
