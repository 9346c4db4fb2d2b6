"""What every command shares: flags from a dataclass (by tyro), and one line on stderr with exit code 2 for the user's mistakes.

tyro answers a wrong flag with a framed, many-line panel; a person in a terminal (and a script reading stderr) is better served by one
line that names the flag, the reason and the mend, so its panel is caught and folded.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from types import FrameType
from typing import TypeVar, cast

from fastpoem.errors import Ended, InputError
from fastpoem.run.signals import heeded

Config = TypeVar("Config")


def parse(
    cls: type[Config], argv: Sequence[str] | None = None, *, prog: str | None = None, default: Config | None = None
) -> Config:
    """Read `cls` (a dataclass) from the command line. `-` and `_` in flags are the user's choice.

    Raises InputError for an unknown flag (naming the nearest known one), a missing one or a value that does not parse. `--help` prints
    and exits 0.
    """
    import tyro

    said = io.StringIO()
    args = _gathered(cls, sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                cls, args=args, prog=prog, description=cls.__doc__, default=default, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        given = [_flag(arg) for arg in args if arg.startswith("--")]
        for flag in given:  # tyro says what is missing before what was misspelt for it
            if flag != "--help" and flag not in _known(cls):
                raise _no_such(cls, flag) from None
        needed = [_flag(field.name) for field in fields(cls) if field.default is MISSING]  # type: ignore[arg-type]
        if missing := [flag for flag in needed if flag not in given]:
            raise InputError(", ".join(missing), "must be given", "see --help") from None
        raise InputError("command line", _first_paragraph(said.getvalue()), "see --help") from None
    if unknown:
        raise _no_such(cls, unknown[0].split("=")[0])
    return cast(Config, config)


def _gathered(cls: type, argv: Sequence[str]) -> list[str]:
    """The command line with every flag once: those that take several values have them in one place. Raises InputError for another
    flag that was given twice."""
    several = {_flag(field.name) for field in fields(cls) if str(field.type).startswith("tuple")}
    alike = {_flag("no-" + field.name): _flag(field.name) for field in fields(cls) if field.type in (bool, "bool")}
    first: list[str] = []
    values: dict[str, list[str]] = {}
    into = first
    for arg in argv:
        if not arg.startswith("--"):
            into.append(arg)
            continue
        flag = alike.get(_flag(arg), _flag(arg))
        if flag in values and flag not in several:
            raise InputError(flag, "given twice", "give it once")
        into = values.setdefault(flag, [])
        if flag in several:
            into.extend([arg.split("=", 1)[1]] if "=" in arg else [])
        else:
            into.append(arg)
    return first + [arg for flag, found in values.items() for arg in ([flag, *found] if flag in several else found)]


def _flag(text: str) -> str:
    """`--batch-size` of `batch_size`, `--batch_size` and `--batch_size=3`."""
    return "--" + text.removeprefix("--").split("=")[0].replace("_", "-")


def _known(cls: type) -> list[str]:
    negated = ["no-" + field.name for field in fields(cls) if field.type in (bool, "bool")]
    return [_flag(name) for name in [*(field.name for field in fields(cls)), *negated]]


def _no_such(cls: type, flag: str) -> InputError:
    near = difflib.get_close_matches(flag.replace("_", "-"), _known(cls), n=1, cutoff=0.6)
    mend = f"did you mean {near[0]}?" if near and flag.startswith("-") else "see --help for the flags there are"
    return InputError(flag, "no such flag" if flag.startswith("-") else "a value without a flag", mend)


def _first_paragraph(panel: str) -> str:
    """The message inside tyro's frame, up to its first rule, on one line."""
    lines = [re.sub(r"^[│╭╰ ]+|[│╮╯ ]+$", "", line) for line in panel.splitlines()[1:]]
    stop = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return " ".join(lines[:stop]).strip().rstrip(".") or "it could not be read"


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave the process: 0 or its own code, 2 for an InputError, 1 for Ended,
    128 + N for signal N; bugs keep their traceback.

    A second signal ends the process at once.
    """
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for one in signals:
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt

    signals = heeded()
    for one in signals:
        signal.signal(one, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell must not end a run
    try:
        code = main()
    except InputError as error:
        print(f"fastpoem: {error}", file=sys.stderr)
        code = 2
    except Ended as error:
        print(f"fastpoem: {error}", file=sys.stderr)
        code = 1
    except BaseException:  # an interrupted import may raise anything
        if not told:
            raise
        print(f"fastpoem: stopped by {signal.Signals(told[0]).name}", file=sys.stderr)
        with contextlib.suppress(OSError, AttributeError):  # None where it was closed
            sys.stdout.flush()
        os._exit(128 + told[0])  # libraries that are half imported do not survive an orderly end
    sys.exit(code or 0)
