"""`python -m fastpoem.report RUN [RUN2 …] [--out PLACE]`: a page to look at, of runs that train, were stopped or are finished, and its charts as PNGs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastpoem import disk, signals
from fastpoem.cli import alone, parse, run_command
from fastpoem.errors import InputError
from fastpoem.paths import given_path

PROG = "python -m fastpoem.report"
_NAMES_A_FILE = re.compile(r"\.(?!html?$)[a-z]\w{1,4}$", re.IGNORECASE)  # x.txt, not v1.2


@dataclass(frozen=True)
class ReportConfig:
    """Make one HTML page of one or several runs: their curves, lengths, poems and settings. RUN [RUN2 …] may stand alone."""

    runs: tuple[str, ...] = ()
    """Folders of runs, as --out of training named them."""
    out: str | None = None
    """A file ending in .html, with the PNGs beside it, or a folder for report.html and the PNGs. None: RUN/report of the first run."""
    lang: Literal["auto", "en", "zh"] = "auto"
    """Language of the page. auto: that of the locale."""
    png: bool = True
    """Make the PNGs, too (needs matplotlib)."""


def main(argv: Sequence[str] | None = None) -> int:
    args = [*(sys.argv[1:] if argv is None else argv)]
    config = parse(ReportConfig, alone(ReportConfig, "runs", args), prog=PROG)
    signals.ask()
    from fastpoem.reporting import png
    from fastpoem.reporting.page import MARK, page
    from fastpoem.reporting.told import names, told
    from fastpoem.reporting.words import speaker
    from fastpoem.run.opened import Run

    if not config.runs:
        raise InputError("RUN", "must be given", "name the folder of a run, or several")
    found = [Run(one) for one in config.runs]
    folders = [run.folder for run in found]
    for index, folder in enumerate(folders):
        if any(folder.samefile(other) for other in folders[:index]):
            raise InputError(folder, "is given twice", "name each run once")
    goal = _goal(config.out, folders[0], MARK)
    runs = [told(run.folder, name, run.metrics) for run, name in zip(found, names(folders), strict=True)]
    content = page(runs, speaker(config.lang)).encode("utf-8", "replace")
    reason = png.why_not()
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        made = goal.with_name(f".{goal.name}.partial")
        made.unlink(missing_ok=True)
        disk.write_bytes(made, content)
        os.replace(made, goal)
        pictures = png.pictures(runs, goal.with_suffix("")) if config.png and reason is None else []
    except OSError as error:
        mend = "name another place with --out"
        raise InputError(goal, f"cannot be written ({error.strerror or error})", mend) from None
    print(goal, *pictures, sep="\n")
    if config.png and reason is not None:
        print(f"fastpoem: no PNGs: {reason} ({png.MISSING})", file=sys.stderr)
    return 0


def _goal(out: str | None, first: Path, mark: str) -> Path:
    """The page's file. Raises InputError where something else is there."""
    if out is None:
        goal = first / "report" / "report.html"
    else:
        goal = given_path("--out", out)
        if _NAMES_A_FILE.search(out) and not goal.is_dir():
            mend = f"let it end in .html, or in a slash if {goal.name} is to be a folder"
            raise InputError(f"--out {out}", "the page is HTML", mend)
        goal = goal if goal.suffix.lower() in (".html", ".htm") else goal / "report.html"
    try:
        with goal.open("rb") as stream:
            ours = mark.encode() in stream.read(4096)
    except FileNotFoundError:
        return goal
    except OSError as error:
        raise InputError(goal, f"cannot be written ({error.strerror})", "name another place with --out") from None
    if not ours:
        raise InputError(goal, "is no report, and would be written over", "name another file with --out")
    return goal


if __name__ == "__main__":
    run_command(main)
