"""`python -m benchmarks.card --out DIR`: measure what is not in DIR/card.json yet, for --minutes at the most, and write card.json, card.md, PNGs,
and log.txt (what libraries said).

A call goes on where the last one ended, so DIR must be a folder that lasts from call to call, as `runs/card`; what failed or was wrong is
tried again after what was never tried. `--part draw` measures nothing: it writes card.md and
the PNGs (where matplotlib is) of a card.json that came from another machine.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from fastpoem_kernels.arguments import Parser

from benchmarks.card import draw, markdown
from benchmarks.card.entries import PARTS, chosen, entries
from benchmarks.card.place import FEW, Place
from benchmarks.card.results import Results
from benchmarks.card.worker import paced
from fastpoem.doctor import machine
from fastpoem.doctor.trial import POEMS
from fastpoem.engine.precision import choose_device
from fastpoem.errors import InputError

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "benchmarks.card.worker"]
LATE = "had not ended in its time"
GRACE = 5.0  # seconds that an entry may be late, before its process is ended
HERE = ("data/poems.txt.xz", "models/gpt2-distil-chinese")  # in the folder of shared data


class Outcome(NamedTuple):
    """How a process of entries ended and what it said last, which of them it had ended or left out, and the one that it was in."""

    ending: str
    last: str
    handled: set[str]
    under_way: str | None


def measure(results: Results, place: Place, names: Sequence[str], end: float, say: Callable[[str], None]) -> None:
    """Run entries in processes until `end` (of `time.time`); each is kept as soon as it is there."""
    left, parts = list(names), {entry.name: entry.part for entry in entries(place.device, place.small)}
    while left and time.time() < end:
        ending, last, handled, under_way = _one_process(results, place, left, end, say)
        lost = under_way or (left[0] if not handled else None)  # a process that could not even begin costs the first
        if lost is not None and ending == LATE and time.time() >= end:
            results.leave_out(lost, "the time was over before it had ended")
            say(f"  {lost}: left out, the time was over before it had ended")
        elif lost is not None:
            entry = {"part": parts[lost], "error": f"its process {ending}; the end of its log: {last}"}
            results.keep(lost, entry)
            say(f"  {lost}: {_words(entry)}")
        left = [name for name in left if name not in handled | {lost}]
    for name in left:
        results.leave_out(name, "the time was over")


def _one_process(
    results: Results, place: Place, names: Sequence[str], end: float, say: Callable[[str], None]
) -> Outcome:
    job = {**vars(paced(place, "epoch", results.entries.get("epoch", {}))), "device": str(place.device)}
    job = {key: str(value) if isinstance(value, Path) else value for key, value in job.items()}
    file, log = place.work / "job.json", results.folder / "log.txt"
    file.write_text(json.dumps({"place": job, "names": list(names), "end": end}), encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    quiet = {
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("ab") as errors:
        before = errors.tell()
        process = subprocess.Popen(
            [*WORKER, str(file)], cwd=ROOT, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    handled, under_way, limit, ending = set[str](), None, end, None
    try:
        while True:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                if time.time() > limit + GRACE:
                    ending = LATE
                    break
                continue
            if not line:
                break
            try:
                told = json.loads(line)
            except ValueError:  # half a line, of a process that died over it
                continue
            if "begins" in told:
                under_way, limit = told["begins"], time.time() + told["limit"]
            elif "ends" in told:
                results.keep(told["ends"], told["entry"])
                say(f"  {told['ends']}: {_words(told['entry'])}")
                handled.add(told["ends"])
                under_way, limit = None, end
            else:
                results.leave_out(told["leaves"], told["reason"])
                say(f"  {told['leaves']}: left out, {told['reason']}")
                handled.add(told["leaves"])
        if ending is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)  # it has closed its output, and only has to end
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        code = process.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines() or ["empty"]
    return Outcome(ending or how, said[-1][:300], handled, under_way)


def _read(stream: IO[str] | None, lines: queue.Queue[str]) -> None:
    """All lines, and an empty one at the end."""
    for line in stream or ():
        lines.put(line)
    lines.put("")


def _words(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"FAILED ({entry['error']})"
    if "missing" in entry:
        return f"not here ({entry['missing']})"
    result = entry["result"]
    shown = {
        "step_ms": "{:.3g} ms a step",
        "tokens_per_s": "{:,.0f} tokens/s",
        "epoch_s": "epoch {:.1f} s",
        "val_loss": "validation loss {:.4f}",
    }
    parts = [form.format(result[key]) for key, form in shown.items() if result.get(key) is not None]
    parts += [("right" if result["ok"] else "WRONG")] if "ok" in result else []
    return ", ".join([*parts, f"{entry['seconds']:.0f} s"])


def find_data(data: Path | None, tokenizer: Path | None) -> tuple[Path | None, Path | None]:
    """(poems, tokenizer's folder): given, or the shared ones where they are; None where they are made up."""
    given = os.environ.get("FASTPOEM_SHARED")
    for shared in [Path(given)] if given else [ROOT.parent / "shared", ROOT / "shared"]:
        found, model = (shared / part for part in HERE)
        data = data or (found if found.is_file() else None)
        tokenizer = tokenizer or (model if (model / "vocab.txt").is_file() else None)
    return data, tokenizer if data is not None else None


def about(place: Place) -> dict[str, Any]:
    """What everything in the file was measured with."""
    peak = machine.peak(torch.cuda.get_device_name(place.device)) if place.gpu else None
    poems = (
        "made up, of real lengths"
        if place.data is None
        else "the given ones"
        if HERE[0] not in str(place.data)
        else "the real ones"
    )
    facts = {**machine.describe(place.device), **machine.versions(place.device), "small": place.small, "poems": poems}
    return facts | {
        "count": FEW if place.small else POEMS,
        "precision": place.precision,
        "peak": peak and peak._asdict(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.card", description="Everything a card can tell.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for card.json, card.md and PNGs, that lasts from call to call"
    )
    parser.add_argument(
        "--part", choices=[*PARTS, "all", "draw"], default="all", help="draw: only write what card.json says"
    )
    parser.add_argument(
        "--only", action="append", metavar="ENTRY", default=[], help="this entry, done or not; may be given again"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="what does not fit into so many is left out, and said"
    )
    parser.add_argument(
        "--data", type=Path, help="poems (default: the shared ones, or made-up ones of their lengths; small: made up)"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the model whose vocabulary is taken")
    parser.add_argument(
        "--work", type=Path, help="folder for stores and compilers' caches (default: in the user's cache)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="on a GPU too: sizes that a CPU takes by default")
    parser.add_argument("--list", action="store_true", help="print the entries and end")
    given = parser.parse_args(arguments)
    begin, say = time.time(), lambda line: print(line, flush=True)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # its process must not outlive it
    try:
        if given.part == "draw" and not (given.out / "card.json").is_file():
            raise InputError(given.out, "holds no card.json", "name the folder that --out named when it was measured")
        given.out.mkdir(parents=True, exist_ok=True)
        results = Results(given.out)
        if given.part != "draw" or given.list:
            device = choose_device(given.device, say)
            small, data, tokenizer = given.small or device.type != "cuda", given.data, given.tokenizer
            if not small:  # with the real vocabulary a small model is slow, and no better than with a small one
                data, tokenizer = find_data(data, tokenizer)
            work = given.work or machine_cache()
            place = Place(device, small, work.absolute(), data, tokenizer)
            listed = entries(device, place.small)
            if unknown := [name for name in given.only if name not in {one.name for one in listed}]:
                raise InputError(f"--only {unknown[0]}", "is no entry", "--list prints them")
            if given.list:
                for one in listed:
                    print(f"{one.part}: {one.name}, about {one.needs:.0f} s")
                return 0
            work.mkdir(parents=True, exist_ok=True)
            results.begin(about(place))
            wanted = [
                one.name
                for one in chosen(listed, given.part, given.only)
                if given.only or not results.is_done(one.name)
            ]
            wanted.sort(key=lambda name: name in results.entries)  # what failed before comes last
            for name in wanted:
                results.content["left_out"].pop(name, None)
            say(f"poems: {results.content['about']['poems']}{f' ({data})' if data else ''}")
            if wanted:
                say(
                    f"{len(wanted)} entries, {given.minutes:g} minutes at the most, on {machine.describe(device)['name']}"
                )
            try:
                measure(results, place, wanted, begin + 60 * given.minutes, say)
            finally:
                markdown.write(results)  # whatever ends it
        for path in [markdown.write(results), *draw.charts(results, say)]:
            say(str(path))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = [
        name
        for name, entry in results.entries.items()
        if "error" in entry or entry.get("result", {}).get("ok") is False
    ]
    if failed:
        say(f"failed or wrong: {'; '.join(failed)}")
    return 1 if failed else 0


def machine_cache() -> Path:
    from fastpoem.paths import user_cache

    return user_cache() / "card"


if __name__ == "__main__":
    sys.exit(main())
