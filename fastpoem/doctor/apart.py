"""Checks in a process of their own: a kernel that goes wrong can leave a CUDA context in which nothing works, or never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fastpoem_kernels
import torch
from fastpoem_kernels.check import Record

from fastpoem.doctor import checks
from fastpoem.doctor.verdicts import failures
from fastpoem.signals import ask

Ended = Callable[[str, list[Record]], None]
SECONDS = 60.0  # that a check may take
# times as long while it compiles a model; and for the process to start, which reads PyTorch from a disk and wakes the card
PREPARING = 5


def in_a_process(
    device: torch.device,
    names: Sequence[str],
    seconds: float = SECONDS,
    ended: Ended = lambda name, records: None,
) -> Iterator[tuple[str, list[Record]]]:
    """Run checks apart from this process, the cheapest first, and in another one after each that fails; yields (name, its records).

    Those that train and come after `kernels` do without the kernels that failed, which their names then say. seconds: what a check may take,
    and PREPARING times as long for what it compiles: one that hangs costs that, and the others nothing. ended: hears of each that its
    process has told of, at once: who is stopped before the last has those."""
    left = sorted(names, key=checks.cost)
    while left:
        done, begun, ending = _one_process(device, left, seconds, ended)
        unwilling = begun is None and not done
        if unwilling:
            done[left[0]] = [Record(left[0], False, note=f"{NOT_BEGUN}: {ending}")]
        if begun is not None:
            done[begun] = [Record(begun, False, note=f"its process {ending}")]
        yield from done.items()
        failed = {name: failures(records) for name, records in done.items()}
        left = checks.with_kernels([name for name in left if name not in done], failed)
        left = [name for name in checks.with_separate([*done, *left], failed) if name not in done]
        if unwilling:
            yield from ((name, [Record(name, False, note=f"{NOT_BEGUN}: {ending}")]) for name in left)
            return


NOT_BEGUN = "the check could not begin"


def _one_process(
    device: torch.device, names: Sequence[str], seconds: float, ended: Ended
) -> tuple[dict[str, list[Record]], str | None, str]:
    """(records of the checks that ended, the one that was under way when the process ended, how it ended)."""
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (checks, fastpoem_kernels)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    done: dict[str, list[Record]] = {}
    begun: str | None = None
    compiles, heard = False, 0
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:

        def under_way() -> tuple[str | None, bool]:
            """Take what the process has said since: (the check that it is at, whether that compiles now)."""
            nonlocal begun, compiles, heard
            # pread: the place in the file is the process' own, too
            output = os.pread(said.fileno(), os.fstat(said.fileno()).st_size - heard, heard)
            whole = output[: output.rfind(b"\n") + 1]
            heard += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                try:
                    told = json.loads(line)
                except ValueError:  # libraries print to stdout too
                    continue
                if not isinstance(told, dict):
                    continue
                if "begins" in told:
                    begun, compiles = told["begins"], False
                elif "compiles" in told:
                    compiles = told["compiles"]
                elif "check" in told:
                    begun, compiles = None, False
                    done[told["check"]] = [Record(**fields) for fields in told["records"]]
                    ended(told["check"], done[told["check"]])
            return begun, compiles

        try:
            ending = _ending(
                subprocess.Popen(
                    [sys.executable, "-m", "fastpoem.doctor.checks", str(device), *names],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=errors,
                    env={**os.environ, "PYTHONPATH": path},
                ),
                under_way,
                seconds,
            )
        except OSError as error:
            ending = f"could not be started: {error}"
        under_way()
        errors.seek(0)
        last = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    return done, begun, ending + (f" ({last[-1][:200]})" if last else "")


def _ending(process: subprocess.Popen[bytes], under_way: Callable[[], tuple[str | None, bool]], seconds: float) -> str:
    """How a process ended, in words; it is killed where it takes too long to start, to compile or for the rest of a check. Raises Stopped,
    and then it is dead too."""
    at: tuple[str | None, bool] = (None, False)
    begin = time.monotonic()
    try:
        while process.poll() is None:
            ask()
            if (now := under_way()) != at:
                at, begin = now, time.monotonic()
            check, compiles = at
            allowed = seconds * (PREPARING if compiles or check is None else 1)
            if time.monotonic() - begin > allowed:
                return f"had not ended after {allowed:g} s; python -m fastpoem.doctor --check-seconds gives it longer"
            time.sleep(0.05)
        ask()  # it may have died of the same Ctrl-C
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    code = process.returncode
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
