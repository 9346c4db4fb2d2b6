"""PNGs of what card.json holds: speed by batch size, the forms' losses, what was learned, kernels against a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import budget
from benchmarks.card.entries import TRAINER
from benchmarks.card.forms import FORMS
from benchmarks.card.learn import RUNS
from benchmarks.card.results import Results
from fastpoem.doctor.checks import REAL

COLOURS = ("#c14a4a", "#5b6f8f", "#d8a657", "#7daea3", "#8f6f9f")


def charts(results: Results, say: Callable[[str], None]) -> list[Path]:
    """The files that were made: none for what was not measured, none at all without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        say(
            "no pictures: matplotlib is not installed; python -m benchmarks.card --part draw makes them of card.json elsewhere"
        )
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, draw, panels in (
        ("batches", speed, 1),
        ("forms", forms, 2),
        ("learn", learn, 1),
        ("kernels", kernels, 1),
    ):
        figure, axes = pyplot.subplots(1, panels, figsize=(7.5, 3.4), layout="constrained", squeeze=False)
        try:
            if draw(results, *axes[0]):
                about = results.content["about"]
                caption = f"{about.get('name')}, torch {about.get('torch')}" + ", small sizes" * bool(
                    about.get("small")
                )
                figure.supxlabel(caption, fontsize=6, color="#808080", x=0.99, ha="right")
                for axis in axes[0]:
                    axis.spines[["top", "right"]].set_visible(False)
                made.append(results.folder / f"{name}.png")
                figure.savefig(made[-1], dpi=110)
        finally:
            pyplot.close(figure)
    return made


def speed(results: Results, axis: Any) -> bool:
    lines = {f"fastpoem, {batching}": f"batch {{}}, {batching}" for batching in ("pack", "bucket")}
    drawn = False
    for (label, name), colour in zip(
        {**lines, "compiled bf16 Trainer": f"{TRAINER}, batch {{}}"}.items(), COLOURS, strict=False
    ):
        points = [
            (poems, one["tokens_per_s"] / 1e6)
            for poems in results.batches()
            if (one := results.result(name.format(poems)))
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, lw=1.4, ms=4, label=label)
            drawn = True
    if drawn and (peak := results.peak()):
        for label, computed, style in (
            ("computed: floor", budget.floor, ":"),
            ("computed: likely", budget.likely, "--"),
        ):
            rates = [
                poems * budget.INPUTS / computed(REAL, poems, peak, budget.INPUTS) / 1e6 for poems in budget.BATCHES
            ]
            axis.plot(budget.BATCHES, rates, style, color="#808080", lw=1, label=label)
    if drawn:
        axis.set_xscale("log", base=2)
        axis.set_xticks(results.batches(), list(map(str, results.batches())))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set(title="Real tokens a second", xlabel="poems a step", ylabel="millions")
        axis.legend(frameon=False, fontsize=8)
    return drawn


def forms(results: Results, left: Any, right: Any) -> bool:
    found = {
        form: one["losses"]
        for form in FORMS
        if (one := results.result(f"steps, {form}")) and any(x is not None for x in one["losses"])
    }
    for (form, losses), colour in zip(found.items(), COLOURS, strict=False):
        left.plot(
            range(1, len(losses) + 1),
            [float("nan") if x is None else x for x in losses],
            color=colour,
            lw=1,
            label=form,
        )
        if form != "fp32" and "fp32" in found:
            apart = [
                float("nan") if a is None or b is None else a - b for a, b in zip(losses, found["fp32"], strict=False)
            ]
            right.plot(range(1, len(apart) + 1), apart, color=colour, lw=1, label=form)
    left.set(title="Loss from one seed, no dropout", xlabel="step")
    right.set(title="Its distance from fp32's", xlabel="step")
    if found:
        left.legend(frameon=False, fontsize=8)
    return bool(found)


def learn(results: Results, axis: Any) -> bool:
    found = {name: one for name in RUNS if (one := results.result(f"learn {name}")) and one["curve"]}
    for (name, one), colour in zip(found.items(), COLOURS, strict=False):
        points = [(step, loss) for step, loss in one["curve"] if loss is not None]
        if points:
            value = "none" if one["val_loss"] is None else f"{one['val_loss']:.3f}"
            axis.plot(*zip(*points, strict=True), color=colour, lw=1, label=f"{name}: {value}")
    axis.set(title="Training loss; in the legend: validation loss at the end", xlabel="step")
    if found:
        axis.legend(frameon=False, fontsize=8)
    return bool(found)


def kernels(results: Results, axis: Any) -> bool:
    found = results.result("bandwidth")
    names = list(found["rows"]) if found else []
    for at, name in enumerate(reversed(names)):
        share = found["rows"][name]["share"]  # type: ignore[index]
        axis.barh(at, 100 * share, color=COLOURS[0], height=0.5)
        axis.annotate(f" {share:.0%}", (100 * share, at), fontsize=8, va="center")
    axis.set_yticks(range(len(names)), names[::-1])
    axis.axvline(100, color="#808080", lw=1, ls="--", zorder=0)
    axis.margins(x=0.12)
    axis.set(title="Bandwidth of our kernels, % of a copy's")
    return bool(names)
