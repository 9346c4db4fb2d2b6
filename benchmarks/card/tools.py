"""What NVIDIA's own tools say of our kernels: compute-sanitizer at tiny shapes, and ncu at those of training.

`python -m benchmarks.card.tools tiny|real DEVICE` is the program that they look at. PyTorch's allocator is off under the sanitizer: inside one of
its large blocks a kernel may write where it should not, and nobody would see it.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastpoem_kernels import check as kernel_check
from fastpoem_kernels.check import check

from benchmarks.card.place import Missing, Place

ROOT = Path(__file__).parents[2]
TINY = (24, 21128), (5, 33000)  # rows and vocabulary: a kernel that holds a row whole, and one that loops over it
PARAMETERS = 5003
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent",
}
OURS = (
    "whole_row",
    "looped_row",
    "update",
    "partial_squares",
    "scale_unless_one",
    "count_targets",
    "add_rows",
    "step_scalars",
)


def sanitizer(tool: str, place: Place, seconds: float) -> dict[str, Any]:
    """tool: memcheck, racecheck, initcheck or synccheck. `ok`: no error; `summary`: its last words; `errors`: its first lines of errors."""
    program = _there("compute-sanitizer", place)
    options = ["--tool", tool, "--error-exitcode", "7", "--print-limit", "20"]
    for name in OURS:  # PyTorch's kernels are nobody's here to mend, and take most of the time
        options += ["--kernel-name", f"kernel_substring={name}"]
    # Kernels are compiled beforehand, or the tool would look at the compiler too.
    left = seconds - _program("tiny", place, seconds / 3)
    code, said = _ran([program, *options, *_command("tiny", place)], left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=========")]
    heading, none = ("RACECHECK SUMMARY", "0 hazards") if tool == "racecheck" else ("ERROR SUMMARY", "0 errors")
    summary = next((line for line in reversed(lines) if heading in line), None)
    if summary is None:
        raise RuntimeError(f"{tool} said nothing (exit code {code}): {' | '.join(said.splitlines()[-3:])}")
    clean = code == 0 and re.search(rf"\b{none}\b", summary) is not None
    return {"ok": clean, "summary": summary, "errors": [line for line in lines if line and "SUMMARY" not in line][:20]}


def ncu(place: Place, seconds: float) -> dict[str, Any]:
    """`kernels`: by name, microseconds and bytes of memory read and written (medians over the launches), and percent of the memory's peak."""
    program = _there("ncu", place)
    options = [
        "--csv",
        "--clock-control",
        "none",  # at the clocks of training
        "--page",
        "raw",
        "--metrics",
        ",".join(METRICS),
        "--kernel-name",
        f"regex:^({'|'.join(OURS)})",
        "--launch-count",
        "40",
    ]
    left = seconds - _program("real", place, seconds / 3)
    code, said = _ran([program, *options, *_command("real", place)], left)
    if "ERR_NVGPUCTRPERM" in said:
        raise Missing("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    if not (found := read_ncu(said)):
        raise RuntimeError(f"ncu read nothing (exit code {code}): {' | '.join(said.splitlines()[-3:])}")
    return {"kernels": found}


def read_ncu(said: str) -> dict[str, dict[str, float]]:
    """ncu's CSV: a line of names, one of units, then one a launch. By kernel, and grid where it is told: µs, bytes."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if len(rows) < 2:
        return {}
    units, launches = rows[0], rows[1:]
    times = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}
    sizes = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    found: dict[str, dict[str, float]] = {}
    called = lambda row: " ".join(filter(None, [row["Kernel Name"], row.get("Grid Size", "").replace(" ", "")]))
    for name in dict.fromkeys(map(called, launches)):
        mine = [row for row in launches if called(row) == name]

        def median(metric: str, scale: dict[str, float], mine: list[dict[str, str]] = mine) -> float:
            values = sorted(float(row[metric].replace(",", "")) for row in mine)
            return values[len(values) // 2] * scale.get(units[metric], 1.0)

        time_, read, written, percent = METRICS
        found[name] = {"launches": len(mine), "us": median(time_, times), "percent": median(percent, {})}
        found[name] |= {"read": median(read, sizes), "written": median(written, sizes)}
    return found


def _there(tool: str, place: Place) -> str:
    if not place.gpu:
        raise Missing(f"{tool} looks at a GPU")
    places = (shutil.which(tool), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{tool}")
    found = next((path for path in places if path and Path(path).is_file()), None)
    if found is None:
        raise Missing(f"{tool} is not installed")
    return found


def _command(what: str, place: Place) -> list[str]:
    return [sys.executable, "-m", "benchmarks.card.tools", what, str(place.device)]


def _program(what: str, place: Place, seconds: float) -> float:
    """Once without a tool: what fails here is the kernel's fault and no tool's. Returns the seconds that it took."""
    begin = time.monotonic()
    code, said = _ran(_command(what, place), seconds)
    if code != 0:
        raise RuntimeError(f"the kernels failed before any tool looked: {' | '.join(said.splitlines()[-3:])}")
    return time.monotonic() - begin


def _ran(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """(exit code, all that it said). Raises RuntimeError where it takes longer."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **variables}, timeout=max(1.0, seconds),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        last = (said.splitlines() or ["nothing was said"])[-1]
        raise RuntimeError(
            f"{Path(command[0]).name} had not ended after {time.monotonic() - begin:.0f} s ({last[:200]})"
        ) from None
    return done.returncode, done.stdout


def steps(device: torch.device, small: bool) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int, int]]:
    """By name: (a kernel at a shape of training, a copy of a tensor of the size that it works on, bytes that it must move, bytes that the copy
    moves). Its tensors live as long as it does."""
    from fastpoem_kernels import adamw

    vocabulary, parameters = (1901, 100_000) if small else (21128, 59_499_264)
    half, found = (torch.float32 if device.type == "cpu" else torch.bfloat16), {}
    draw = torch.Generator().manual_seed(0)
    for rows in (130, 260) if small else (1030, 16 * 1030):
        logits = torch.randn(rows, vocabulary, device=device, dtype=half)
        target = torch.randint(vocabulary, (rows,), generator=draw).to(device)
        one, sink = torch.ones((), device=device), torch.empty_like(logits)

        def loss(logits: Any = logits, target: Any = target, one: Any = one) -> None:
            torch.ops.fastpoem.cross_entropy_overwrite(logits, target, -100, 0, None)
            torch.ops.fastpoem.scale_unless_one(logits, one)

        size = logits.numel() * logits.itemsize
        found[f"loss, {rows:,} rows"] = loss, partial(sink.copy_, logits), 2 * size, 2 * size
    master, first, second = (torch.zeros(parameters, device=device) for _ in range(3))
    grad = torch.zeros(parameters, device=device, dtype=half)
    low = None if half == torch.float32 else torch.zeros_like(grad)
    kinds: dict[str, Any] = {
        name: torch.tensor(value, device=device) for name, value in (("step", 0.0), ("lr", 1e-4), ("max_norm", 1.0))
    }
    sink = torch.empty_like(master)
    update = partial(adamw.clipped_adamw_, master, grad, first, second, **kinds, low_precision=low)
    # norm: the gradient; update: master and both moments read and written, the gradient read, the copy written
    narrow = 2 * grad.itemsize + (0 if low is None else low.itemsize)
    found[f"norm and AdamW, {parameters:,} parameters"] = (
        update, partial(sink.copy_, master), parameters * (6 * 4 + narrow), 8 * parameters,
    )  # fmt: skip
    return found


def _once(device: torch.device, runs: list[Callable[[], Any]], rounds: int = 0) -> list[list[float]]:
    """In place of a check's timing: our kernel, which is the first, runs once."""
    runs[0]()
    return [[1.0] * len(runs)]


def main(what: str, name: str) -> None:
    device = torch.device(name)
    if what == "tiny":
        wrong = []
        for rows, vocabulary in TINY:
            dtypes = (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32,)
            with mock.patch.object(kernel_check, "_alternate", _once):  # the tool's clock is nobody's
                wrong += [record for record in check(device, rows, vocabulary, PARAMETERS, dtypes) if not record.ok]
        if wrong and os.environ.get("FASTPOEM_ASSUME_CHECKED") != "1":
            raise SystemExit(f"wrong: {wrong}")
    else:
        for run, *_ in steps(device, small=device.type == "cpu").values():
            for _ in range(3):
                run()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
