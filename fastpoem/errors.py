"""The exception for mistakes of the user: what it names, why it is wrong, and how to mend it.

Commands print it as one line on stderr and exit with code 2. `Ended` is their other line, with exit code 1: a run that the world, not
its user, brought to an end. Everything else is a bug and keeps its traceback.
"""

import os
import sys


class Ended(RuntimeError):
    """A run that could not go on or could not be saved: what happened, and what to do. One line."""


class Elsewhere(Ended):
    """Another of the processes that train together has failed, and says why itself."""


class InputError(Exception):
    """`thing`: the file, flag or value as the user wrote it. `reason`: why it cannot be used. `mend`: what to do instead. `here`: of the
    processes that torchrun started this one alone may have met it, and says so even if it is not the first."""

    here = False

    def __init__(self, thing: object, reason: str, mend: str) -> None:
        self.thing, self.reason, self.mend = str(thing), reason, mend
        super().__init__(" ".join(f"{thing}: {reason}; {mend}".split()))  # one line, whatever the parts contain


def first_line(error: BaseException) -> str:
    """What an exception says, as a part of a sentence: its first line, cut where it is long; its kind where it says nothing."""
    line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return line if len(line) <= 160 else f"{line[:158]} …"


def brief(value: object, most: int = 80) -> str:
    """A value as a message shows it: as Python writes it, cut where it is long, whatever it is."""
    if isinstance(value, str):
        value = value[: most + 1]  # repr of a whole book would be made only to be cut
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 2]} …"


def rank() -> int:
    """The number that torchrun gave this process, 0 where it started none or one."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() and os.environ.get("WORLD_SIZE", "1") not in ("", "1") else 0


def say(line: object) -> None:
    """A line of a command's own on stderr, at once."""
    which = f"process {rank()}: " if rank() else ""
    print(f"fastpoem: {which}{line}", file=sys.stderr, flush=True)
