"""`python -m fastpoem.doctor`: what this machine is, whether what training would use is right on it, and how long training will take.

`--json` prints one object: `schema` 1, `ok`, `machine`, `versions`, `compiler` (what is missing, or null), `checks` (records), `skipped`
(`name`, `reason`), `memory` (bytes, and how PyTorch's allocator takes them), `rates` (GB/s, TFLOP/s; `peak_…` null where the card's are not
known), `trials`, `notebook` (null where it was not run), `uses`, `sentence`. Times in the key's own unit. Exit code 0: what training will
use is right; 1: a check failed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpoem import signals
from fastpoem.cli import parse, prog, run_command
from fastpoem.errors import InputError


@dataclass(frozen=True)
class DoctorConfig:
    """Check this machine: devices, kernels, graph replay, compiler, attention, and what training will use and why."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Small models only, three steps instead of ten on a GPU, and no comparison with the notebook's loop."""
    check_seconds: float = 60.0
    """How long a check may take on a GPU before it is ended and counts as failed; five times as long where it compiles the model."""
    cache_dir: str | None = None
    """As of training: where it is kept what was checked and compiled."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DoctorConfig, argv, prog=prog("doctor"))
    if not 0 < config.check_seconds < math.inf:
        raise InputError(f"--check-seconds {config.check_seconds:g}", "out of range", "give seconds, more than 0")
    shown = () if config.json else ("rich.console", "rich.table")  # what is missing is told before minutes of checks
    signals.imported(*shown, "numpy", "torch", "fastpoem.doctor.examine")
    from fastpoem.doctor.examine import examine  # torch takes seconds to import, and --help should not wait
    from fastpoem.engine.compile import keep_caches_in
    from fastpoem.engine.precision import choose_device

    keep_caches_in(config.cache_dir)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    device = choose_device(config.device, say)
    if device.type == "mps":
        raise InputError("--device mps", "there are no checks for it yet", "use --device cpu")
    report = examine(device, quick=config.quick, say=say, seconds=config.check_seconds)
    if config.json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        show(report)
    return 0 if report["ok"] else 1


def show(report: dict[str, Any]) -> None:
    """The report for a person."""
    from rich.console import Console
    from rich.table import Table

    from fastpoem.doctor.examine import duration

    console = Console(highlight=False)
    about, memory, rates = report["machine"], report["memory"], report["rates"]

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, name in enumerate(columns):
            outer = number in (0, len(columns) - 1)
            made.add_column(name, justify="left" if outer else "right", no_wrap=number == 0, overflow="fold")
        return made

    def cell(value: Any, form: str = "{:,.1f}") -> str:
        return "" if value is None else form.format(value)

    facts = table("This machine", "", "")
    capability = about["capability"] and ".".join(map(str, about["capability"]))
    facts.add_row(
        "device", f"{about['device']}: {about['name']}" + (f", compute capability {capability}" if capability else "")
    )
    if about["unused_gpu"]:
        facts.add_row("GPU", about["unused_gpu"])
    facts.add_row("CPU", f"{about['cpu']}, {about['cpu_threads']} threads, {' '.join(about['cpu_instructions'])}")
    facts.add_row("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number))
    facts.add_row("compiler", report["compiler"] or "there")
    taken = f", a step of 16 takes {memory['step'] / 2**30:.1f}" if memory["step"] else ""
    facts.add_row("memory", f"{memory['free'] / 2**30:,.1f} of {memory['total'] / 2**30:,.1f} GiB free{taken}")
    if about["capability"]:
        grows = {None: "not known", True: "on", False: "off"}[memory["expandable_segments"]]
        asked = memory["allocator"] or "PYTORCH_ALLOC_CONF is not set"
        facts.add_row("allocator", f"expandable segments {grows} ({asked})")
    for name, key, top, unit in (
        ("copy", "copy_gb_s", "peak_memory_gb_s", "GB/s"),
        ("fp32 products", "fp32_tflop_s", "peak_fp32_tflop_s", "TFLOP/s"),
        ("bf16 products", "bf16_tflop_s", "peak_bf16_tflop_s", "TFLOP/s"),
        ("fp16 products", "fp16_tflop_s", "peak_fp16_tflop_s", "TFLOP/s"),
    ):
        if key not in rates:
            continue
        of = f", {rates[key] / rates[top]:.0%} of the card's {rates[top]:,.0f}" if rates[top] else ""
        facts.add_row(name, f"{rates[key]:,.4g} {unit}{of}")
    console.print(facts, "")

    checked = table("Checks", "check", "error", "allowed", "ms", "PyTorch ms", "")
    for record in report["checks"]:
        figures = [cell(record[key], "{:.1e}") for key in ("error", "tolerance")]
        figures += [cell(record[key], "{:.3g}") for key in ("ms", "torch_ms")]
        checked.add_row(record["name"], *figures, "right" if record["ok"] else f"WRONG {record['note']}")
    console.print(checked)
    for reason in dict.fromkeys(one["reason"] for one in report["skipped"]):
        names = ", ".join(one["name"] for one in report["skipped"] if one["reason"] == reason)
        console.print(f"skipped ({reason}): {names}")
    console.print()

    speed = table(
        "A step of the real model, and an epoch of 217,561 poems",
        "form",
        "ms a step",
        "poems/s",
        "epoch",
        "set-up s",
        "",
    )
    for one in [*report["trials"], *filter(None, [report["notebook"]])]:
        epoch = duration(one["epoch_s"]) if one["epoch_s"] else ""
        speed.add_row(
            one["form"], cell(one["step_ms"]), cell(one["poems_per_s"]), epoch, cell(one["setup_s"]), one["note"]
        )
    console.print(speed, "")
    if report["times_the_notebook"]:
        console.print(f"{report['times_the_notebook']:.1f} times the speed of the notebook's loop on this device")
    for line in report["uses"]["why"]:
        console.print(line)
    console.print(report["sentence"], style="bold")


if __name__ == "__main__":
    run_command(main)
