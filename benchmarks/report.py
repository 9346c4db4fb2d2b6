"""`python -m benchmarks.report FILE.json [--out FOLDER]`: what `pytest benchmarks/ --benchmark-json=FILE.json` measured, as a Markdown table and PNG charts.

A benchmark says in its `extra_info` what it is (`kind`); this reads nothing else but its times. Contenders are compared by the sums over all turns of one
run, with the ratios of the single turns beside them, because a shared machine drifts; each is named with the precision that it computed in. What the
file does not hold is left out: a contender that lost turns is compared on those that it has, and its row says which.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpoem_kernels.arguments import Parser

from fastpoem.doctor.machine import units

Row = dict[str, Any]  # extra_info and "seconds_median"
US = "fastpoem"
STAGES = ("feed", "forward", "loss", "backward", "update")
COLOURS = {
    "notebook": "#b0b0b0",
    "trainer, plain": "#d8a657",
    "trainer, sorted": "#7daea3",
    "trainer, sorted, bf16": "#45707a",
    US: "#c14a4a",
}


def read(path: Path) -> tuple[Mapping[str, Any], dict[str, list[Row]]]:
    """(machine_info, rows by kind) of pytest-benchmark's JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, list[Row]] = defaultdict(list)
    for one in content["benchmarks"]:
        rows[one["extra_info"].get("kind", "other")].append(
            {"seconds_median": one["stats"]["median"], "name": one["name"], **one["extra_info"]}
        )
    return content["machine_info"], rows


def machine(info: Mapping[str, Any]) -> str:
    cpu = info.get("cpu", {})
    parts = [cpu.get("brand_raw", info.get("machine", "unknown processor")), f"{cpu.get('count', '?')} cores"]
    parts += [*units(cpu.get("flags", [])), f"{info['threads']} threads", f"torch {info['torch']}"]
    parts += [f"Python {info['python_version']}", *([info["gpu"]] if info.get("gpu") else [])]
    return ", ".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def by_contender(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Each contender's turns, in order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["turn"]):
        found[row["contender"]].append(row)
    return found


def every_turn(found: Mapping[str, Sequence[Row]]) -> set[int]:
    return {turn["turn"] for turns in found.values() for turn in turns}


def label(name: str, turns: Sequence[Row], whole: set[int]) -> str:
    """The contender's name with the precision that it computed in, and which turns it has where it lost some."""
    mine = [turn["turn"] for turn in turns]
    name = f"{name.removesuffix(', bf16')}, {turns[0]['precision']}"
    return name if len(mine) == len(whole) else f"{name} (of {len(whole)} turns only {', '.join(map(str, mine))})"


def rate(turns: Sequence[Row], what: str) -> float:
    """`what` a second over all turns."""
    return sum(turn[what] for turn in turns) / sum(turn["seconds"] for turn in turns)


def shared(found: Mapping[str, Sequence[Row]], name: str) -> list[tuple[Row, Row]]:
    """The turns that fastpoem and this one both have, (fastpoem's, the other's)."""
    return [(us, them) for us in found.get(US, []) for them in found.get(name, []) if us["turn"] == them["turn"]]


def gain(both: Sequence[tuple[Row, Row]]) -> float:
    """Times as many poems a second by fastpoem, over all these turns."""
    ours, theirs = zip(*both, strict=True)
    return rate(ours, "poems") / rate(theirs, "poems")


def headline(found: Mapping[str, Sequence[Row]]) -> str:
    """fastpoem against the notebook, and against the Trainer that comes nearest to it, in whichever precision; "" where no turn is shared."""
    gains = {name: gain(both) for name in found if name != US and (both := shared(found, name))}
    said = [f"**{gains['notebook']:.2f} times** as many as the notebook"] if "notebook" in gains else []
    if trainers := {name: value for name, value in gains.items() if name.startswith("trainer")}:
        best = min(trainers, key=trainers.__getitem__)
        said += [
            f"**{trainers[best]:.2f} times** as many as the best Trainer ({label(best, found[best], every_turn(found))})"
        ]
    return f"Poems a second, fastpoem in {found[US][0]['precision']}: {', '.join(said)}." if said else ""


def throughput(rows: Iterable[Row]) -> str:
    found = by_contender(rows)
    whole = every_turn(found)
    lines = []
    for name, turns in found.items():
        both = shared(found, name) if name != US else []
        times, spread = "", ""
        if both:
            times = f"**{gain(both):.2f}**"
            ratios = [rate([us], "poems") / rate([them], "poems") for us, them in both]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        padding = 1 - sum(turn["tokens"] for turn in turns) / sum(turn["padded"] for turn in turns)
        lines.append(
            (label(name, turns, whole), f"{rate(turns, 'poems'):.2f}", f"{rate(turns, 'tokens'):,.0f}", f"{padding:.0%}", times, spread)
        )  # fmt: skip
    first = next(iter(found.values()))[0]
    note = f"{len(whole)} alternating turns of {first['steps']} steps of 16, {first['corpus']}, on {first['device']}."
    if none := [name for name in first["contenders"] if name not in found]:
        note += f" No turns of: {'; '.join(none)}."
    head = ("", "poems/s", "real tokens/s", "positions without a target", "fastpoem against it", "by turn")
    return "\n\n".join(filter(None, (table(head, lines), headline(found), note)))


def stages(rows: Sequence[Row]) -> str:
    found = {row["stage"]: row["seconds_median"] for row in rows}
    whole = found.get("step")
    head = ("stage", "median", "of a step")
    return table(
        head,
        (
            (stage, pretty(found[stage]), f"{found[stage] / whole:.1%}" if whole and stage != "prepare" else "")
            for stage in ("prepare", *STAGES, "step")
            if stage in found
        ),
    )


def scaling(rows: Iterable[Row]) -> str:
    return table(
        ("", "", "step", "tokens/s", "model GFLOP/s"),
        (
            (row["axis"], row["at"], pretty(row["seconds_median"]), f"{row['tokens_per_s']:,.0f}", f"{row['flops_per_s'] / 1e9:,.0f}")
            for row in rows
        ),
    )  # fmt: skip


def share(row: Row, name: str) -> str:
    """In percent; nothing where it was not measured, as in a turn that was not the last."""
    return f"{row[name]:.0%}" if name in row else ""


def in_precision(rows: Iterable[Row]) -> str:
    """What these were computed in, for a title; "" where none of them computes."""
    return "".join(f", {name}" for name in sorted({row["precision"] for row in rows if "precision" in row}))


def pretty(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def markdown(info: Mapping[str, Any], rows: Mapping[str, list[Row]], device: str) -> str:
    """All tables of what was measured on one kind of device."""
    mine = {kind: [row for row in some if row.get("device", "cpu") == device] for kind, some in rows.items()}
    parts = [f"Measured on: {machine(info)}."]
    if mine.get("throughput"):
        parts += ["### Throughput", throughput(mine["throughput"])]
    if mine.get("curve"):
        found = by_contender(mine["curve"])
        ends = [(label(name, turns, every_turn(found)), f"{turns[-1]['steps']}", *(f"{value:.3f}" for value in turns[-1]["curve"][-1][::-1]),
                 share(turns[-1], "in_form"), share(turns[-1], "rhyming")) for name, turns in found.items()]  # fmt: skip
        head = ("", "steps", "held-out loss", "after seconds", "poems in a form", "poems that rhyme")
        parts += ["### Loss against time", table(head, ends)]
        if poems := next((turns[-1]["written"] for turns in found.values() if "written" in turns[-1]), None):
            parts += [f"Forms and rhymes of {poems} poems that each model writes at the end."]
    if mine.get("stage"):
        parts += [f"### Where a step's time goes{in_precision(mine['stage'])}", stages(mine["stage"])]
    for row in mine.get("share", []):
        parts += [
            f"On real poems the step does {row['flops_per_s'] / 1e9:,.0f} GFLOP/s of model FLOPs on real tokens, "
            f"**{row['share']:.0%}** of the best {row['precision']} product of its shapes in the same run ({row['best_product'] / 1e9:,.0f} GFLOP/s)."
        ]
    if mine.get("scaling"):
        parts += [f"### Scaling{in_precision(mine['scaling'])}", scaling(mine["scaling"])]
    for row in mine.get("encode", []):
        parts += [
            f"Encoding {row['poems']:,} poems, table {row['table']}: {row['times_the_library']:.0f} times the library's tokenizer."
        ]
    for row in mine.get("memory", []):
        parts += [
            f"Preparing peaks at {row['peak_mb_one']:.0f} MB for one corpus, {row['peak_mb_twelve']:.0f} MB for twelve."
        ]
    return "\n\n".join(parts) + "\n"


def charts(rows: Mapping[str, list[Row]], folder: Path, caption: str, device: str) -> list[Path]:
    """PNGs of what there is: throughput.png, stages.png, loss.png; elsewhere than on the CPU with the device in their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    mine = {kind: [row for row in some if row.get("device", "cpu") == device] for kind, some in rows.items()}
    made = []

    def chart(name: str, title: str, height: float) -> Any:
        figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11)
        figure.supxlabel(caption, fontsize=6, color="#808080", x=0.99, ha="right")
        made.append(folder / (f"{name}.png" if device == "cpu" else f"{name}-{device}.png"))
        return axes

    def done() -> None:
        plt.savefig(made[-1], dpi=220)
        plt.close()

    if mine.get("throughput"):
        axes = chart("throughput", "Training throughput, 59.5 M parameters, batch size 16", 2.6)
        found = by_contender(mine["throughput"])
        for at, (name, turns) in enumerate(reversed(found.items())):
            axes.barh(at, rate(turns, "poems"), color=COLOURS[name])
            axes.plot([rate([turn], "poems") for turn in turns], [at] * len(turns), ".", color="black", markersize=3)
            end = max(rate(turns, "poems"), *(rate([turn], "poems") for turn in turns))
            axes.annotate(f"  {rate(turns, 'poems'):.2f}", (end, at), fontsize=8, va="center")
        names = [label(name, turns, every_turn(found)) for name, turns in found.items()]
        axes.set_yticks(range(len(names)), names[::-1])
        axes.set_xlabel("poems per second (bar: all turns; dots: each turn)")
        axes.margins(x=0.1)
        done()
    if mine.get("curve"):
        axes = chart("loss", "Held-out loss against seconds of training, small model from random weights", 3.4)
        found = by_contender(mine["curve"])
        for name, turns in found.items():
            axes.plot(
                *zip(*turns[-1]["curve"], strict=True),
                marker=".",
                label=f"{label(name, turns, every_turn(found))}, {turns[-1]['steps']} steps",
                color=COLOURS[name],
            )
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("held-out loss")
        axes.legend(frameon=False, fontsize=8)
        done()
    found_stages = {row["stage"]: row["seconds_median"] for row in mine.get("stage", [])}
    if present := [stage for stage in STAGES if stage in found_stages]:
        axes = chart(
            "stages",
            f"Where a step's time goes{in_precision(mine['stage'])}: 16 poems of 66 tokens, each stage alone",
            2.6,
        )
        axes.barh(present[::-1], [1e3 * found_stages[stage] for stage in present[::-1]], color=COLOURS[US])
        for at, stage in enumerate(present[::-1]):
            axes.annotate(f" {pretty(found_stages[stage])}", (1e3 * found_stages[stage], at), fontsize=8, va="center")
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds")
        done()
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.report", description="A table and charts of a run of the benchmarks.")
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder for the charts")
    given = parser.parse_args(arguments)
    try:
        info, rows = read(given.file)
        caption = machine(info)
        devices = sorted({row.get("device", "cpu") for some in rows.values() for row in some})
        tables = {device: markdown(info, rows, device) for device in devices}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"{given.file}: no JSON of these benchmarks ({type(error).__name__}: {error}); make it with pytest benchmarks/ --benchmark-json",
            file=sys.stderr,
        )
        return 2
    for device, said in tables.items():
        if len(tables) > 1:
            print(f"## On {device}\n")
        print(said)
        for path in charts(rows, given.out, caption, device):
            print(f"chart: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
