"""What of the fast path a run may take on its GPU: only what was checked on that very card, with that driver, PyTorch and source.

The checks take a minute or two, most of it compiling, so a card is checked once (`verdicts`), in a process of its own (`apart`). What fails
there costs the run that piece and nothing else; a check that could not even begin is not held against the card beyond this run.

FASTPOEM_ASSUME_CHECKED=1 spares all of it (for a pretend GPU, where nothing is computed).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import torch

from fastpoem.config import TrainConfig
from fastpoem.doctor import checks
from fastpoem.doctor.apart import in_a_process
from fastpoem.doctor.verdicts import Failures, card, failures, keep, remember, remembered
from fastpoem.engine.build import Trusted
from fastpoem.engine.compile import why_not_compile
from fastpoem.engine.kernels import PLAIN, choose_kernels
from fastpoem.errors import InputError


def decide(
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    say: Callable[[str], None],
    failed: Mapping[str, Failures] | None = None,
) -> Trusted:
    """failed: what is known of each check (None: it is looked up, and what was never checked is checked now). Raises InputError for a
    piece that `config` insists on and that failed.

    --batching auto: batches are to be packed, and where attention inside them failed, it is decided for batches that are not (`varlen` tells).
    """
    if (
        device.type != "cuda"
    ):  # a CPU's form of a kernel is PyTorch's operators and C; elsewhere we have none of our own
        return Trusted() if device.type == "cpu" else Trusted(kernels=PLAIN, compile=False, graphs=False)
    kind, packed = str(dtype)[6:], config.batching in ("auto", "pack")
    compiles = config.compile != "off" and why_not_compile(device) is None
    names = checks.wanted(dtype, vocabulary=vocabulary, packed=packed, compiles=compiles, graphs=config.graphs != "off")
    known, failed = failed, look_up(device, names, say) if failed is None else failed
    if config.batching == "auto" and (reasons := failed.get(f"attention {kind} packed")):
        say(
            f"attention {kind} packed failed its check on this GPU ({'; '.join(reasons.values())}): batches are bucketed"
        )
        bucketed = dataclasses.replace(config, batching="bucket")
        return decide(bucketed, device, dtype, vocabulary, say, known)._replace(varlen=False)
    suffix = f"{kind} packed" if packed else kind
    chosen = failed.get(names[0], {})
    kernels = choose_kernels(chosen, say)

    def exact(name: str, apart: bool = False) -> str:
        (name,) = checks.with_kernels([name], {"kernels": chosen})
        return checks.separate(name) if apart else name

    def trusted(flag: str, name: str, insists: bool, otherwise: str, apart: bool = False) -> bool:
        name = exact(name, apart)
        if not failed.get(name):
            return True
        reason = "; ".join(failed[name].values())
        if insists:
            raise InputError(flag, f"it failed its check on this GPU ({name}: {reason})", f"use {flag.split()[0]} auto")
        say(f"{name} failed its check on this GPU ({reason}): {otherwise}")
        return False

    insists = config.attention == "flash"
    sdpa = trusted("--attention flash", f"attention {kind}", insists, "attention is computed by plain operators")
    varlen = not packed or trusted(
        "--attention flash", f"attention {suffix}", insists, "packed poems are attended to in a padded batch"
    )
    model = f"compiled {suffix}"
    apart = (
        compiles and exact(model, apart=True) in failed and not trusted("", model, False, "kernels are not combined")
    )
    compile_it = not compiles or trusted(
        "--compile on", model, config.compile == "on", "the model is not compiled", apart
    )
    apart = apart and compile_it
    replay = f"replay {suffix}" + (" compiled" if compiles and compile_it else "")
    graphs = config.graphs == "off" or trusted(
        "--graphs on", replay, config.graphs == "on", "the step's kernels are launched one by one", apart
    )
    return Trusted(kernels, sdpa, varlen, compile_it, graphs, not apart)


def look_up(device: torch.device, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Failures]:
    """What each check found on this card, now or at any time before."""
    if os.environ.get("FASTPOEM_ASSUME_CHECKED") == "1":
        return {}
    known, told = remembered(card(device)), False
    while True:
        exact = checks.with_kernels(names, {name: known[name] for name in names if name in known})
        exact = checks.with_separate(exact, known)
        missing = [name for name in exact if name not in known]
        if not missing:
            return {name: known[name] for name in exact}
        if not told:
            pieces = ", ".join(dict.fromkeys(name.split()[0] for name in missing))
            say(f"checking this GPU, once: {pieces} (a minute or two)")
            told = True
        found = dict(in_a_process(device, missing, ended=keep(card(device))))
        remember(card(device), found)
        known |= {name: failures(records) for name, records in found.items()}
