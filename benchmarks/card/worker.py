"""The process that entries run in: `python -m benchmarks.card.worker JOB.json`. It ends after one that fails, and another goes on.

What fails on a GPU can leave a context in which nothing works any more. JOB: `place`, `names`, and `end`, the time (of `time.time`) at which it must
be done. Answers, a line of JSON each, on what was its standard output: {"begins", "limit"}, {"ends", "entry"}, {"leaves", "reason"}.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.card.entries import Entry, entries
from benchmarks.card.place import Missing, Place
from benchmarks.card.results import finite
from fastpoem.doctor.verdicts import source_hash
from fastpoem.engine.compile import keep_caches_in
from fastpoem.errors import first_line


def attempt(entry: Entry, place: Place, seconds: float) -> dict[str, Any]:
    """What an entry found, in the form that is kept."""
    begin, found = time.monotonic(), dict[str, Any]()
    try:
        found["result"] = entry.run(place, seconds)
    except Missing as missing:
        found["missing"] = str(missing)
    except (Exception, KeyboardInterrupt) as error:  # whatever it was: it is written down, and the rest goes on
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {first_line(error)}"[:500]
    return {"part": entry.part, "seconds": time.monotonic() - begin, "code": source_hash(), **found}


def paced(place: Place, name: str, entry: dict[str, Any]) -> Place:
    """The same place, that knows how fast an epoch was."""
    found = entry.get("result")
    if name != "epoch" or not found:
        return place
    return dataclasses.replace(place, pace=(found["setup_s"], found["seconds"] / found["steps"], found["of"]))


def free(place: Place) -> None:
    """What an entry leaves is not the next one's."""
    torch._dynamo.reset()
    gc.collect()
    if place.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)


def main(job: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> int:
    place = read_place(job["place"])
    keep_caches_in(str(place.work))
    shutil.rmtree(place.work / "runs", ignore_errors=True)  # of one that was killed
    known = {entry.name: entry for entry in entries(place.device, place.small)}
    for name in job["names"]:
        entry, left = known[name], job["end"] - time.time()
        if left < entry.needs:
            answer(
                {"leaves": name, "reason": f"it needs about {entry.needs:.0f} s, and {max(0, left):.0f} s were left"}
            )
            continue
        limit = min(left, entry.most)
        answer({"begins": name, "limit": limit})
        found = attempt(entry, place, max(1.0, limit - 5))
        answer({"ends": name, "entry": found})
        if "error" in found or found.get("result", {}).get("ok") is False:
            return 1
        place = paced(place, name, found)
        free(place)
    return 0


def read_place(job: dict[str, Any]) -> Place:
    paths = {name: None if job[name] is None else Path(job[name]) for name in ("data", "tokenizer")}
    pace = job["pace"] and tuple(job["pace"])
    return Place(torch.device(job["device"]), job["small"], Path(job["work"]), **paths, pace=pace)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    written = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(main(written, lambda what: print(json.dumps(finite(what), ensure_ascii=False), file=answers)))
