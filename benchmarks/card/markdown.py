"""card.md: what card.json holds as tables, measured beside what `benchmarks.budget` computes (docs/performance.md has that whole)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import budget
from benchmarks.card.entries import NOTEBOOK, TRAINER
from benchmarks.card.forms import COMPARED, FORMS
from benchmarks.card.learn import RUNS
from benchmarks.card.results import Results, write_whole
from benchmarks.report import table
from fastpoem.doctor.checks import REAL
from fastpoem.doctor.machine import Peak

Line = Sequence[object]
TOOLS = ("memcheck", "racecheck")


def write(results: Results) -> Path:
    path = results.folder / "card.md"
    write_whole(path, text(results))
    return path


def text(results: Results) -> str:
    """All of it; a section for which nothing was measured is not there."""
    about = results.content["about"]
    parts = [f"# {about.get('name', 'A card')}: measured", _about(about)]
    for title, section in (
        ("Checks", checks), ("The same training in every form", steps), ("What goes wrong late", late), ("An epoch at batch 16", epochs),
        ("Batch sizes", batches), ("Kernels against a copy", kernels), ("What is learned", learned), ("What is not here", rest),
    ):  # fmt: skip
        if found := "\n\n".join(section(results)):
            parts += [f"## {title}", found]
    return "\n\n".join(parts) + "\n"


def _about(about: dict[str, Any]) -> str:
    said = [
        f"{about.get('name')}, driver {about.get('driver')}, CUDA {about.get('cuda')}, torch {about.get('torch')}, triton {about.get('triton')}"
    ]
    said[0] += (
        f", transformers {about.get('transformers')}, Python {about.get('python')}, {about.get('cpu_threads')} CPU threads."
    )
    said += [f"Poems: {about.get('poems')}, {about.get('count', 0):,}. Training computes in {about.get('precision')}."]
    if about.get("small"):
        said += ["**Small sizes**: these figures show that the command works, and nothing of speed."]
    return " ".join(said)


def number(value: Any, form: str = "{:,.2f}", none: str = "") -> str:
    return none if value is None else form.format(value)


def right(value: Any) -> str:
    return "right" if value else "**WRONG**"


def checks(results: Results) -> Iterator[str]:
    doctor, records = results.result("doctor"), []
    if doctor is not None:
        yield doctor["sentence"] + "."
        rows = [
            (
                one["form"],
                number(one["step_ms"]),
                number(one["epoch_s"], "{:,.1f}"),
                number(one["setup_s"], "{:,.1f}"),
                one["note"],
            )
            for one in [*doctor["trials"], *filter(None, [doctor["notebook"]])]
        ]
        yield table(("doctor's trial", "ms a step", "epoch, projected, s", "set-up s", ""), rows)
        units = {"copy_gb_s": "GB/s", "bf16_tflop_s": "TFLOP/s in bf16", "fp32_tflop_s": "TFLOP/s in fp32"}
        rates = ", ".join(
            f"{doctor['rates'][key]:,.4g} {unit}" for key, unit in units.items() if key in doctor["rates"]
        )
        yield f"Copy and products: {rates}."
        records += doctor["checks"]
    records += [
        record
        for name, entry in results.entries.items()
        if name.startswith("check ")
        for record in entry.get("result", {}).get("records", ())
    ]
    if records:
        rows = [
            (one["name"], number(one["error"], "{:.1e}"), number(one["tolerance"], "{:.1e}"), number(one["ms"], "{:.3g}"),
             number(one["torch_ms"], "{:.3g}"), right(one["ok"]) + f" {one['note']}" * bool(one["note"]))
            for one in records
        ]  # fmt: skip
        yield table(("check", "error", "allowed", "ms", "PyTorch ms", ""), rows)
    if tools := [(name, found) for name in TOOLS if (found := results.result(name))]:
        yield table(
            ("compute-sanitizer", "", "its summary"), [(name, right(one["ok"]), one["summary"]) for name, one in tools]
        )
        for name, one in tools:
            if not one["ok"]:
                yield f"{name}:\n\n```\n" + "\n".join(one["errors"]) + "\n```"


def steps(results: Results) -> Iterator[str]:
    for before, head, what in (
        ("steps, ", "form", "no dropout"),
        ("steps with dropout, ", "form, with dropout", "its masks differ"),
    ):
        found = {form: one for form in FORMS if (one := results.result(before + form))}
        if not found:
            continue
        truth = found.get("fp32")
        rows = []
        for form, one in found.items():
            losses, norms = one["losses"], one["norms"]
            apart = (
                (far(losses, truth["losses"]), far(norms, truth["norms"])) if truth and form != "fp32" else (None, None)
            )
            note = "; ".join(line for line in one["said"] if re.search("could not|again|failed", line))
            rows.append(
                (form, len(losses), number(losses[0], "{:.4f}"), number(tail(losses), "{:.4f}"), *(number(x, "{:.1e}") for x in apart),
                 one["recompiled"], one["recorded"], note)
            )  # fmt: skip
        columns = (
            head,
            "steps",
            "first loss",
            "mean of the last tenth",
            "losses from fp32's",
            "norms from fp32's",
            "recompiled",
            "graphs",
            "",
        )
        yield table(columns, rows)
        yield f"From fp32's: the median over the steps of the relative difference ({what}). All begin from one seed and see the same poems."


def far(mine: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Median of the relative differences, where both are numbers."""
    both = sorted(abs(a - b) / abs(b) for a, b in zip(mine, other, strict=False) if a is not None and b)
    return both[len(both) // 2] if both else None


def tail(values: Sequence[float | None]) -> float | None:
    last = [value for value in values[-max(1, len(values) // 10) :] if value is not None]
    return sum(last) / len(last) if last else None


def late(results: Results) -> Iterator[str]:
    rows: list[Line] = []
    for name in COMPARED:
        if one := results.result(name):
            note = [*one.get("said", ()), *([f"{one['checkpoints']} checkpoints"] if "checkpoints" in one else [])]
            note += [f"wrong at steps {one['wrong']}"] if one.get("wrong") else []
            rows.append(
                (
                    name,
                    right(one["ok"]),
                    number(one["apart"], "{:.1e}", "none"),
                    number(one["spread"], "{:.1e}", "none"),
                    "; ".join(note),
                )
            )
    if rows:
        yield table(("", "", "losses from the plain run's", "the plain run's from itself", ""), rows)


def epochs(results: Results) -> Iterator[str]:
    first = _batches(results)
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
        yield table(
            ("", "steps", "epoch s", "poems/s", "real tokens/s", "share of peak", "fastpoem's speed over it"), rows
        )
    if mine:
        yield (
            f"fastpoem's epoch: {mine['seconds']:.1f} s for its steps, {mine['setup_s']:.1f} s before the first (preparing, checking, compiling, recording), "
            f"{mine['whole_s']:.1f} s in all. Projected where the time was over before."
        )
    if mine and (peak := _peak(results)):
        step = [f(REAL, 16, peak, budget.INPUTS) * 13_597 for f in (budget.floor, budget.likely)]
        yield f"Computed: {step[0]:.0f} s at the floor, {step[1]:.0f} s likely."


def batches(results: Results) -> Iterator[str]:
    peak, rows = _peak(results), []
    for poems in _batches(results):
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
        yield table(
            (*head, "GiB allocated / reserved", "graph nodes (counted)", "speed over the compiled Trainer"), rows
        )
    if trainers := [
        (poems, one) for poems in _batches(results) if (one := results.result(f"{TRAINER}, batch {poems}"))
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
        yield table(
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
        yield table(("kernel", "µs", "GB/s", "copy µs", "copy GB/s", "of the copy's rate"), rows)
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
        yield table(("ncu", "launches", "µs", "MB read", "MB written", "of the memory's peak"), rows)


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
        yield table(("run", "rate", "steps", "of an epoch", "s", "validation loss"), rows)
        if "made up" in results.content["about"].get("poems", ""):
            yield "On made-up poems there is nothing to learn but which characters are common."


def rest(results: Results) -> Iterator[str]:
    lines: list[Line] = [
        (name, "failed", entry["error"]) for name, entry in results.entries.items() if "error" in entry
    ]
    lines += [
        (name, "not on this machine", entry["missing"]) for name, entry in results.entries.items() if "missing" in entry
    ]
    lines += [(name, "left out", reason) for name, reason in results.content["left_out"].items()]
    if lines:
        yield table(("entry", "", "why"), [tuple(str(cell).replace("|", "\\|") for cell in line) for line in lines])
    codes = {entry.get("code") for entry in results.entries.values()} - {None}
    if len(codes) > 1:
        yield f"The entries were measured with {len(codes)} versions of the source (`code` in card.json)."


def _batches(results: Results) -> list[int]:
    found: Iterable[Any] = (
        re.fullmatch(r".*batch (\d+)(, \w+)?", name) for name, entry in results.entries.items() if "result" in entry
    )
    return sorted({int(match[1]) for match in found if match})


def _peak(results: Results) -> Peak | None:
    known = results.content["about"].get("peak")
    return Peak(**known) if known and not results.content["about"].get("small") else None
