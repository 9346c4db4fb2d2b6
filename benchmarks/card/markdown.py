"""card.md: what card.json holds as tables. Those of speed are in `tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.card.forms import COMPARED, FORMS
from benchmarks.card.results import Results, write_whole
from benchmarks.card.tables import batches, epochs, grid, kernels, learned, number

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
    said += [
        f"Poems: {about.get('poems')}{number(about.get('count'), ', {:,}')}. Training computes in {about.get('precision')}."
    ]
    if about.get("small"):
        said += ["**Small sizes**: these figures show that the command works, and nothing of speed."]
    return " ".join(said)


def right(value: Any) -> str:
    return "right" if value else "**WRONG**"


def checks(results: Results) -> Iterator[str]:
    doctor, records = results.result("doctor") or results.result("doctor, quick"), []
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
        yield grid(("doctor's trial", "ms a step", "epoch, projected, s", "set-up s", ""), rows)
        units = {"copy_gb_s": "GB/s", "bf16_tflop_s": "TFLOP/s in bf16", "fp32_tflop_s": "TFLOP/s in fp32"}
        rates = ", ".join(
            f"{doctor['rates'][key]:,.4g} {unit}" for key, unit in units.items() if key in doctor["rates"]
        )
        if rates:
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
        yield grid(("check", "error", "allowed", "ms", "PyTorch ms", ""), rows)
    if tools := [(name, found) for name in TOOLS if (found := results.result(name))]:
        yield grid(
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
        yield grid(columns, rows)
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
        yield grid(("", "", "losses from the plain run's", "the plain run's from itself", ""), rows)


def rest(results: Results) -> Iterator[str]:
    lines: list[Line] = [
        (name, "failed", entry["error"]) for name, entry in results.entries.items() if "error" in entry
    ]
    lines += [
        (name, "not on this machine", entry["missing"]) for name, entry in results.entries.items() if "missing" in entry
    ]
    lines += [(name, "left out", reason) for name, reason in results.content["left_out"].items()]
    if lines:
        yield grid(("entry", "", "why"), lines)
    codes = {entry.get("code") for entry in results.entries.values()} - {None}
    if len(codes) > 1:
        yield f"The entries were measured with {len(codes)} versions of the source (`code` in card.json)."
