"""Checks in a process of their own: a kernel that goes wrong can leave a CUDA context in which nothing works, or never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import fastpoem_kernels
import torch
from fastpoem_kernels.check import Record

from fastpoem.doctor import checks
from fastpoem.doctor.verdicts import failures
from fastpoem.signals import ask

PATIENCE = 600.0  # seconds that a process of checks may take


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
        failed = {name: failures(records) for name, records in done.items()}
        left = checks.with_kernels([name for name in left if name not in done], failed)
        left = [name for name in checks.with_separate([*done, *left], failed) if name not in done]
        if unwilling:
            yield from ((name, [Record(name, False, note=f"{NOT_BEGUN}: {ending}")]) for name in left)
            return


NOT_BEGUN = "the check could not begin"


def _one_process(
    device: torch.device, names: Sequence[str], patience: float
) -> tuple[dict[str, list[Record]], str | None, str]:
    """(records of the checks that ended, the one that was under way when the process ended, how it ended)."""
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (checks, fastpoem_kernels)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    done: dict[str, list[Record]] = {}
    begun: str | None = None
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        try:
            ending = _ending(
                subprocess.Popen(
                    [sys.executable, "-m", "fastpoem.doctor.checks", str(device), *names],
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
