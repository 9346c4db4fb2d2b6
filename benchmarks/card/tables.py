"""The tables of speed and of what is learned: measured, beside what `benchmarks.budget` computes (docs/performance.md has that whole)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import budget
from benchmarks.card.entries import NOTEBOOK, TRAINER
from benchmarks.card.learn import RUNS
from benchmarks.card.results import Results
from benchmarks.report import table
from fastpoem.doctor.checks import REAL


def grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells may hold anything."""
    return table(head, ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows))


def number(value: Any, form: str = "{:,.2f}", none: str = "") -> str:
    return none if value is None else form.format(value)


def epochs(results: Results) -> Iterator[str]:
    first = results.batches()
    batch = first[0] if first else 16
    found = {"fastpoem": results.result("epoch")}
    found |= {name: results.result(f"{name}, batch {batch}") for name in (NOTEBOOK, TRAINER)}
    mine, rows = found["fastpoem"], []
    for name, one in found.items():
        if one is None:
            continue
        who = one.get("by", name)
        against = number(one["epoch_s"] / mine["epoch_s"] if mine and one is not mine else None, "**{:.1f}**")
        told = f"{one['steps']:,}" + (f" of {one['of']:,}" if "of" in one else f" in {one['turns']} turns")
        rows.append(
            (
                who,
                told,
                f"{one['epoch_s']:,.1f}",
                f"{one['poems_per_s']:,.0f}",
                f"{one['tokens_per_s']:,.0f}",
                number(one["mfu"], "{:.1%}"),
                against,
            )
        )
    if rows:
        yield grid(
            ("", "steps", "epoch s", "poems/s", "real tokens/s", "share of peak", "fastpoem's speed over it"), rows
        )
    if mine:
        yield (
            f"fastpoem's epoch: {mine['seconds']:.1f} s for its steps, {mine['setup_s']:.1f} s before the first (preparing, checking, compiling, recording), "
            f"{mine['whole_s']:.1f} s in all. Projected where the time was over before."
        )
    if mine and (peak := results.peak()):
        step = [f(REAL, 16, peak, budget.INPUTS) * 13_597 for f in (budget.floor, budget.likely)]
        yield f"Computed: {step[0]:.0f} s at the floor, {step[1]:.0f} s likely."


def batches(results: Results) -> Iterator[str]:
    peak, rows = results.peak(), []
    for poems in results.batches():
        theirs = results.result(f"{TRAINER}, batch {poems}")
        for batching in ("pack", "bucket"):
            one = results.result(f"batch {poems}, {batching}")
            if one is None:
                continue
            computed = [f(REAL, poems, peak, budget.INPUTS) if peak else None for f in (budget.floor, budget.likely)]
            nodes = budget.NODES + (budget.PACKING if batching == "pack" else 0)
            memory = (
                one["memory"] and f"{one['memory']['allocated'] / 2**30:.1f} / {one['memory']['reserved'] / 2**30:.1f}"
            )
            again = theirs and f"**{one['tokens_per_s'] / theirs['tokens_per_s']:.2f}**"
            rows.append(
                (poems, batching, number(one["step_ms"]), *(number(x and 1e3 * x) for x in computed), number(one["epoch_s"], "{:,.1f}"),
                 number(one["tokens_per_s"] / 1e6, "{:.3f}"), number(one["mfu"], "{:.1%}"), memory or "",
                 "" if one["nodes"] is None else f"{one['nodes']} ({nodes})", again or "")
            )  # fmt: skip
    if rows:
        head = (
            "batch",
            "batches",
            "step ms",
            "floor ms, computed",
            "likely ms, computed",
            "epoch s",
            "M tokens/s",
            "share of peak",
        )
        yield grid(
            (*head, "GiB allocated / reserved", "graph nodes (counted)", "speed over the compiled Trainer"), rows
        )
    if trainers := [
        (poems, one) for poems in results.batches() if (one := results.result(f"{TRAINER}, batch {poems}"))
    ]:
        lines = [
            (
                poems,
                one["by"],
                number(one["step_ms"]),
                number(one["tokens_per_s"] / 1e6, "{:.3f}"),
                number(one["mfu"], "{:.1%}"),
                number(one["setup_s"], "{:.0f}"),
            )
            for poems, one in trainers
        ]
        yield grid(
            (
                "batch",
                "sorted batches, bf16, torch.compile, fused AdamW, SDPA",
                "step ms",
                "M tokens/s",
                "share of peak",
                "set-up s",
            ),
            lines,
        )


def kernels(results: Results) -> Iterator[str]:
    if found := results.result("bandwidth"):
        rows = [
            (
                name,
                *(number(one[key], "{:,.1f}") for key in ("us", "gb_s", "copy_us", "copy_gb_s")),
                f"**{one['share']:.0%}**",
            )
            for name, one in found["rows"].items()
        ]
        yield grid(("kernel", "µs", "GB/s", "copy µs", "copy GB/s", "of the copy's rate"), rows)
    if found := results.result("ncu"):
        rows = [
            (
                name,
                one["launches"],
                f"{one['us']:,.1f}",
                *(f"{one[key] / 1e6:,.1f}" for key in ("read", "written")),
                f"{one['percent']:.0f}%",
            )
            for name, one in found["kernels"].items()
        ]
        yield grid(("ncu", "launches", "µs", "MB read", "MB written", "of the memory's peak"), rows)


def learned(results: Results) -> Iterator[str]:
    rows = [
        (
            name,
            number(one["lr"], "{:.2e}"),
            f"{one['steps']:,}",
            f"{one['share']:.0%}",
            f"{one['seconds']:.1f}",
            number(one["val_loss"], "**{:.4f}**"),
        )
        for name in RUNS
        if (one := results.result(f"learn {name}"))
    ]
    if rows:
        yield grid(("run", "rate", "steps", "of an epoch", "s", "validation loss"), rows)
        if "made up" in results.content["about"].get("poems", ""):
            yield "On made-up poems there is nothing to learn but which characters are common."
