"""What of the fast path a run may take on its GPU: only what was checked on that very card, with that driver, PyTorch and source.

The checks (`fastpoem.engine.checks`) take a minute or two, most of it compiling, so what they found is kept on disk, and a card is checked
once. They run in a process of their own: a kernel that goes wrong can leave a CUDA context in which nothing works, or never end. What fails
there costs the run that piece and nothing else; a check that could not even begin is not held against the card beyond this run.

FASTPOEM_ASSUME_CHECKED=1 spares all of it (for a pretend GPU, where nothing is computed).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastpoem_kernels
import torch
from fastpoem_kernels import native
from fastpoem_kernels.check import Record

import fastpoem
from fastpoem.config import TrainConfig
from fastpoem.engine import checks
from fastpoem.engine.compile import why_not_compile
from fastpoem.engine.kernels import OURS, PLAIN, Kernels, choose_kernels
from fastpoem.errors import InputError
from fastpoem.paths import keep_caches, user_cache
from fastpoem.signals import ask

Failures = dict[str, str]  # record's name -> reason; empty where a check has passed
PATIENCE = 600.0  # seconds that a process of checks may take


class Trusted(NamedTuple):
    """What a run takes where the user has not said otherwise. False: it failed its check on this card."""

    kernels: Kernels = OURS
    sdpa: bool = True  # scaled_dot_product_attention's fused kernels
    varlen: bool = True
    compile: bool = True
    graphs: bool = True


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

    def trusted(flag: str, name: str, insists: bool, otherwise: str) -> bool:
        (name,) = checks.with_kernels([name], {"kernels": chosen})
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
    compile_it = not compiles or trusted(
        "--compile on", f"compiled {suffix}", config.compile == "on", "the model is not compiled"
    )
    replay = f"replay {suffix}" + (" compiled" if compiles and compile_it else "")
    graphs = config.graphs == "off" or trusted(
        "--graphs on", replay, config.graphs == "on", "the step's kernels are launched one by one"
    )
    return Trusted(kernels, sdpa, varlen, compile_it, graphs)


def look_up(device: torch.device, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Failures]:
    """What each check found on this card, now or at any time before."""
    if os.environ.get("FASTPOEM_ASSUME_CHECKED") == "1":
        return {}
    known, told = remembered(card(device)), False
    while True:
        exact = checks.with_kernels(names, {name: known[name] for name in names if name in known})
        missing = [name for name in exact if name not in known]
        if not missing:
            return {name: known[name] for name in exact}
        if not told:
            pieces = ", ".join(dict.fromkeys(name.split()[0] for name in missing))
            say(f"checking this GPU, once: {pieces} (a minute or two)")
            told = True
        found = dict(in_a_process(device, missing))
        remember(card(device), found)
        known |= {name: failures(records) for name, records in found.items()}


def failures(records: Sequence[Record]) -> Failures:
    """The reasons of those that are not ok."""
    return {
        record.name: record.note
        if record.error is None
        else f"error {record.error:.2g}, {record.tolerance or 0:.2g} allowed"
        + (f", {record.note}" if record.note else "")
        for record in records
        if not record.ok
    }


def in_a_process(
    device: torch.device, names: Sequence[str], patience: float = PATIENCE
) -> Iterator[tuple[str, list[Record]]]:
    """Run checks apart from this process, and in another one after each that fails; yields (name, its records).

    Those that train and come after `kernels` do without the kernels that failed, which their names then say."""
    left = list(names)
    while left:
        done, begun, ending = _one_process(device, left, patience)
        unwilling = begun is None and not done
        if unwilling:
            done[left[0]] = [Record(left[0], False, note=f"{NOT_BEGUN}: {ending}")]
        if begun is not None:
            done[begun] = [Record(begun, False, note=f"its process {ending}")]
        yield from done.items()
        left = [name for name in left if name not in done]
        left = checks.with_kernels(left, {name: failures(records) for name, records in done.items()})
        if unwilling:
            yield from ((name, [Record(name, False, note=f"{NOT_BEGUN}: {ending}")]) for name in left)
            return


NOT_BEGUN = "the check could not begin"


def _one_process(
    device: torch.device, names: Sequence[str], patience: float
) -> tuple[dict[str, list[Record]], str | None, str]:
    """(records of the checks that ended, the one that was under way when the process ended, how it ended)."""
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (fastpoem, fastpoem_kernels)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    done: dict[str, list[Record]] = {}
    begun: str | None = None
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        try:
            ending = _ending(
                subprocess.Popen(
                    [sys.executable, "-m", "fastpoem.engine.checks", str(device), *names],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=errors,
                    env={**os.environ, "PYTHONPATH": path},
                ),
                patience,
            )
        except OSError as error:
            ending = f"could not be started: {error}"
        said.seek(0)
        errors.seek(0)
        output = said.read()
        last = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    for line in output.decode(errors="replace").splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # libraries print to stdout too
            continue
        if isinstance(told, dict) and "begins" in told:
            begun = told["begins"]
        elif isinstance(told, dict) and "check" in told:
            begun, done[told["check"]] = None, [Record(**fields) for fields in told["records"]]
    return done, begun, ending + (f" ({last[-1][:200]})" if last else "")


def _ending(process: subprocess.Popen[bytes], patience: float) -> str:
    """How a process ended, in words; it is killed where it takes longer than `patience` seconds. Raises Stopped, and then it is dead too."""
    end = time.monotonic() + patience
    try:
        while process.poll() is None:
            ask()
            if time.monotonic() > end:
                return f"had not ended after {patience:.0f} s"
            time.sleep(0.05)
        ask()  # it may have died of the same Ctrl-C
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    code = process.returncode
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


# What is kept


def keep_caches_in(folder: str | None) -> None:
    """Have the verdicts, and all that compilers make, kept in `folder` (--cache-dir), None: in the user's cache."""
    keep_caches(folder)
    native.keep_in(None if folder is None else user_cache() / "native")


def place() -> Path:
    return user_cache() / "checked.json"


def card(device: torch.device) -> str:
    """All that a verdict depends on, in a line."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    properties = torch.cuda.get_device_properties(device)
    parts = [
        f"{properties.name} {getattr(properties, 'uuid', '')}",
        f"sm {capability}",
        f"driver {driver()}",
        f"torch {torch.__version__}",
    ]
    parts += [f"{name} {version(name) or 'none'}" for name in ("triton", "flash-attn")]
    return ", ".join([*parts, f"fastpoem {version('fastpoem') or '?'} {source_hash()}"])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str:
    """The driver's own version where Linux tells it, else the CUDA version that it is made for."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    number = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


@functools.cache
def source_hash() -> str:
    """Of every source file that runs on the device or checks it."""
    digest = hashlib.sha256()
    rooms = [Path(fastpoem.__file__).parent / "engine", Path(fastpoem.__file__).parent / "model"]
    for room in [*rooms, Path(fastpoem_kernels.__file__).parent]:
        for file in sorted(room.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def remembered(key: str) -> dict[str, Failures]:
    """What is known of a card; nothing where the file is missing or damaged."""
    found = _read().get(key)
    if not isinstance(found, dict):
        return {}
    return {
        name: reasons
        for name, reasons in found.items()
        if isinstance(reasons, dict) and all(isinstance(reason, str) for reason in reasons.values())
    }


def remember(key: str, found: Mapping[str, Sequence[Record]]) -> None:
    """Keep what checks found, as well as the disk allows: passes, and wrong numbers. What could not begin or end, ran out of memory or found
    no compiler may be another's fault, and is tried again."""
    new = {
        name: failures(records)
        for name, records in found.items()
        if all(record.ok or record.error is not None for record in records)
    }
    if not new:
        return
    everything = _read()
    everything[key] = {**remembered(key), **new}
    with contextlib.suppress(OSError, InputError):
        path = place()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(everything, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def _read() -> dict[str, Any]:
    try:
        found = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, InputError):
        return {}
    return found if isinstance(found, dict) else {}
