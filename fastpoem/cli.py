"""What every command shares: flags from a dataclass, one line on stderr with exit code 2 for the user's mistakes, and how a command ends.

The fields of the dataclass are the flags, their annotations the kinds of values, and `--help` is tyro's, made from the same. Reading is done
here: a person in a terminal (and a script reading stderr) is best served by one line in the field's words that names the flag, the reason
and the mend, where a library would speak of its own parser; and a wrong flag should not wait for a library's import.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from fastpoem import signals
from fastpoem.config import OTHER_NAMES
from fastpoem.errors import Elsewhere, Ended, InputError, rank, say
from fastpoem.missing import missing

Config = TypeVar("Config")
HELP = ("-h", "--help")
BEHIND = 30.0  # seconds that the first of several processes may start after the others
MENDED = "see --help for the flags there are"


class Kind(NamedTuple):
    """What a setting takes: `base` (str, int, float or bool), or one of `choices`; None too where it is optional; several where `many`."""

    base: type
    choices: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False

    @property
    def words(self) -> str:
        if self.choices:
            return " or ".join([", ".join(self.choices[:-1]), self.choices[-1]])
        return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[self.base]


def begin() -> None:
    """The first line of every command, before anything that takes long to import: from here on a signal is noted."""
    if sys.platform == "win32":
        print("fastpoem: fastpoem runs on Linux and macOS; on Windows use WSL 2", file=sys.stderr)
        sys.exit(2)
    signals.listen(command=True)


_called: str | None = None  # the one command that this process was called by, where it was that


def called(name: str) -> None:
    """From here on commands are named as those of the one command `name`."""
    global _called
    _called = name


def prog(command: str) -> str:
    """How a command is called, as this process was: `fastpoem train` or `python -m fastpoem.train`."""
    return f"{_called} {command}" if _called else f"python -m fastpoem.{command}"


def kinds(cls: type) -> dict[str, Kind]:
    """The kind of each field of a dataclass whose annotations are those that `Kind` can say."""
    from types import NoneType
    from typing import Literal, get_args, get_origin, get_type_hints

    def kind(hint: Any) -> Kind:
        if get_origin(hint) is Literal:
            return Kind(str, get_args(hint))
        if get_origin(hint) is tuple:
            return kind(get_args(hint)[0])._replace(many=True)
        if NoneType in get_args(hint):
            (rest,) = (one for one in get_args(hint) if one is not NoneType)
            return kind(rest)._replace(optional=True)
        assert hint in (str, int, float, bool), f"{cls.__name__}: no flag can be made of {hint}"
        return Kind(hint)

    hints = get_type_hints(cls)
    return {field.name: kind(hints[field.name]) for field in fields(cls)}


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    default: Config | None = None,
    groups: Mapping[str, str] | None = None,
) -> Config:
    """Read `cls` (a dataclass) from the command line; what is not given is as in `default`. `-` and `_` in flags are the user's choice.

    Raises InputError for an unknown flag (naming the nearest known one), a missing or a repeated one, or a value that does not parse.
    `--help` prints and exits 0. groups: title -> names of its fields, with "" for those that no other group has.
    """
    args = [*(sys.argv[1:] if argv is None else argv)]
    if any(arg in HELP for arg in args):
        import tyro

        signals.ask()
        shown, about = (cls, default) if groups is None else (_grouped(cls, default, groups), None)
        tyro.cli(shown, args=["--help"], prog=prog, description=cls.__doc__, default=about)
    given = read(cls, args)
    if default is not None:
        return dataclasses.replace(default, **given)  # type: ignore[type-var]
    needed = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in given]:
        raise InputError(", ".join(map(flag_of, missing)), "must be given", "see --help")
    return cls(**given)


def alone(cls: type, name: str, args: Sequence[str]) -> list[str]:
    """The arguments with those that stand alone, wherever they stand, given as the flag of `name`."""
    takes_one = {flag_of(other) for other, kind in kinds(cls).items() if kind.base is not bool and other != name}
    found, rest, before = list[str](), list[str](), ""
    for arg in args:
        if arg.startswith(("-", "–", "—")) or before.replace("_", "-") in takes_one:
            rest += [arg] * (arg != flag_of(name))
        else:
            found.append(arg)
        before = arg
    return [*rest, *([flag_of(name), *found] if found else [])]


def helps(cls: type) -> dict[str, str]:
    """The help of each field, which stands below it in the source; of none where there is no source."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            (tree,) = ast.parse(inspect.getsource(one)).body
            assert isinstance(tree, ast.ClassDef)
            for field, after in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())  # type: ignore[union-attr]
    return found


def _grouped(cls: type, default: Any, groups: Mapping[str, str]) -> type:
    """A dataclass of dataclasses, one a group, whose help is that of `cls` in groups."""
    import tyro

    words, hints = helps(cls), get_type_hints(cls)
    default = cls() if default is None else default
    named = {name for names in groups.values() for name in names.split()}
    parts = []
    for title, names in groups.items():
        inside = names.split() or [field.name for field in fields(cls) if field.name not in named]
        made = dataclasses.make_dataclass(
            title,
            [
                (
                    name,
                    Annotated[hints[name], tyro.conf.arg(help=words.get(name, ""))],
                    dataclasses.field(default=getattr(default, name)),
                )
                for name in inside
            ],
            frozen=True,
        )
        made.__doc__ = None
        parts.append((title, Annotated[made, tyro.conf.OmitArgPrefixes], made()))
    return dataclasses.make_dataclass(cls.__name__, parts, frozen=True)


def read(cls: type, args: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line gives, by name. Raises InputError."""
    known, given = kinds(cls), dict[str, Any]()
    values: list[str] | None = None  # of a flag that takes several
    before = ""  # the switch that stands before
    rest = iter(args)
    for arg in rest:
        if arg.startswith(("–", "—")):  # as word processors and phones write two hyphens
            typed = "--" + arg.lstrip("–—-")
            name = typed.partition("=")[0].removeprefix("--").replace("-", "_")
            if values is None or name in known or name.removeprefix("no_") in known:
                arg = typed
        if not arg.startswith("-") or arg == "-" or _is_number(arg):
            if values is not None:
                values.append(arg)
                continue
            if before:
                raise InputError(f"{before} {arg[:60]}", "takes no value", f"write {before} alone")
            mend = f"did you mean --data {arg[:80]}?" if "data" in known and not given else MENDED
            raise InputError(arg[:80], "a value without a flag", mend)
        before = ""
        flag, equals, text = arg.partition("=")
        name, no = _named(cls, known, flag)
        kind, flag = known[name], flag_of(name)
        if name in given and not kind.many:
            raise InputError(flag, "given twice", "give it once")
        values = None
        if kind.base is bool:
            if equals:
                raise InputError(arg[:80], "takes no value", f"write {flag} or {flag_of('no_' + name)}")
            given[name], before = not no, arg
            continue
        if not equals:
            text = next(rest, None)  # type: ignore[assignment]
            if text is None or text.startswith("--"):  # one that begins so is given with "="
                raise InputError(flag, f"needs a value, {kind.words}", "see --help")
        value = converted(flag, kind, text)
        if kind.many:
            values = given.setdefault(name, [])
            values.append(value)
        else:
            given[name] = value
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def converted(flag: str, kind: Kind, text: str) -> Any:
    """A value as text in its kind. Raises InputError."""
    if kind.optional and text == "None":
        return None
    if kind.choices and text not in kind.choices:
        near = _nearest(text, kind.choices)
        raise InputError(
            f"{flag} {text[:60]}", "no such choice", f"did you mean {near}?" if near else f"use {kind.words}"
        )
    try:
        return kind.base(text)
    except ValueError:
        shown = text if len(text) <= 60 else f"{text[:58]} …"
        reason = "has too many digits" if text.isdecimal() else f"is not {kind.words}"
        raise InputError(f"{flag} {shown or repr(shown)}", reason, f"give {kind.words}") from None


def flag_of(name: str) -> str:
    """`--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return False
    return True


def _named(cls: type, known: dict[str, Kind], flag: str) -> tuple[str, bool]:
    """(field, whether it is said no to) of `--batch-size`, `--batch_size` or `--no-shuffle`. Raises InputError."""
    name = flag.removeprefix("--").replace("-", "_")
    if flag.startswith("--") and name in known:
        return name, False
    if flag.startswith("--no") and (positive := name.removeprefix("no_")) in known and known[positive].base is bool:
        return positive, True
    flags = [
        flag_of(prefix + one)[2:] for one in known for prefix in ("", "no_") if not prefix or known[one].base is bool
    ]
    word, mend = flag.lstrip("-").replace("_", "-"), MENDED  # without the hyphens, in which all flags are alike
    longer = [one for one in flags if word and one.startswith(word)]
    near = longer[0] if len(longer) == 1 else _nearest(word, flags) or _nearest(word.removeprefix("no-"), flags)
    if near is not None:
        mend = f"did you mean --{near}?"
    elif (other := OTHER_NAMES.get(_nearest(name, [*OTHER_NAMES]) or "")) in known:
        mend = f"did you mean {flag_of(other)}? see --help"
    raise InputError(flag.replace("_", "-")[:80], "no such flag", mend)


def _nearest(word: str, words: Sequence[str]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.7)), None)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave the process: 0 or its own code, 2 for an InputError or a library that is not installed, 1 for Ended,
    128 + N for signal N; bugs keep their traceback. Where nobody reads stdout any more (`… | head -1`), the command ends quietly with 0.

    A second signal ends the process at once.
    """
    begin()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell must not end a run
    code: object
    try:
        code = main()
    except Ended as error:
        if not (isinstance(error, Elsewhere) and rank() > 0):
            say(error)
        code = 1
    except InputError as error:
        _leave_if_told()  # a compiler that Ctrl-C ended as well may look like the user's mistake
        if error.here or rank() == 0:
            say(error)
        else:
            _let_the_first_speak()
        code = 2
    except ModuleNotFoundError as error:
        if (line := missing(error.name)) is None:
            raise
        say(line)
        code = 2
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        code = 0
    except BaseException:
        _leave_if_told()
        raise
    try:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that is gone can still be answered
    except BrokenPipeError:
        _nobody_reads()
    except OSError as error:
        print(f"fastpoem: what it says could not be written ({error.strerror})", file=sys.stderr)
        code = code or 1
    if (
        not code and rank() == 0
    ):  # all was done, but whoever sent a signal is told that it came; torchrun would take it for a failure of all
        _leave_if_told()
    sys.exit(code or 0)


def _let_the_first_speak() -> None:
    """What every process refuses, the first one says. torchrun ends all when one has ended, and the first may still be importing."""
    end = time.monotonic() + BEHIND
    while signals.noted() is None and time.monotonic() < end:
        time.sleep(0.05)


def _leave_if_told() -> None:
    """Where a signal was noted: say so, and end the process then and there, whatever still runs in other threads."""
    if (number := signals.noted()) is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # None where it was closed
            stream.flush()
    signals.leave(number)


def _nobody_reads() -> bool:
    """Whether stdout's reader has gone. Then what is left to be written goes nowhere, or the interpreter would try once more and say so."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
        if gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return gone
