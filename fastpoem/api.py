"""`fastpoem.fit`: training as a call. Its signature and its help are those of the settings, and it speaks of them in Python's words.

The rooms below name settings as the command line does, since they do not know who called. A call's errors are put into its words here:
`--batch-size 0` is `batch_size=0`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, get_type_hints

from fastpoem import signals
from fastpoem.cli import helps, kinds, read
from fastpoem.config import TrainConfig, coerce, from_kwargs
from fastpoem.errors import InputError
from fastpoem.paths import keep_caches

if TYPE_CHECKING:
    from typing import Unpack

    from fastpoem.run.opened import Run
    from fastpoem.settings import Data, Settings

KINDS = kinds(TrainConfig)
TRAIN = "python -m fastpoem.train"
SLOW = (
    "rich.progress",
    "numpy",
    "torch",
    "tokenizers",
    "fastpoem.run.console",
    "fastpoem.doctor.trust",
    "fastpoem.run.fit",
)
NOT_GIVEN: Any = ()
Listener = Callable[[dict[str, Any]], object]


def fit(
    data: Data = NOT_GIVEN,
    *,
    on_log: Listener | None = None,
    on_epoch: Listener | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """Train. The settings are the flags of `python -m fastpoem.train`, with underscores.

    `on_log` is called with each logged step's row of metrics.jsonl, a dict, and `on_epoch` with each epoch's. An error in one of them ends
    the run: a checkpoint is written, then the error is raised, and `fit(out=…, resume=True)` goes on after that row.

    Raises `fastpoem.errors.InputError` for what cannot work, naming the thing, the reason and the mend. Ctrl-C finishes the step, writes a
    checkpoint and then raises KeyboardInterrupt; `fit(out=…, resume=True)` goes on from there. SIGTERM and SIGHUP do the same, but the run
    is returned, with `stopped_by`.
    """
    if sys.platform == "win32":
        raise InputError("fastpoem", "runs on Linux and macOS", "on Windows use WSL 2")
    run: Run | None = None
    stopped: signals.Stopped | None = None
    stop = signals.StopRequest()
    try:
        with stop:
            given: dict[str, Any] = {} if data is NOT_GIVEN else {"data": data}
            for name, listener in (("on_log", on_log), ("on_epoch", on_epoch)):
                if listener is not None and not callable(listener):
                    raise InputError(name, "is not a function", "give one that takes a row, a dict")
            config = configured(**given, **settings)
            signals.imported(*SLOW)
            from fastpoem.run.fit import fit as run_fit
            from fastpoem.run.notebook import voice_of

            def on_row(row: dict[str, Any]) -> None:
                listener = on_epoch if row.get("event") == "epoch" else on_log
                if listener is not None:
                    listener(row)

            with contextlib.closing(voice_of(config.quiet, config.lang)) as voice:
                run = run_fit(config, voice, None, on_row if on_log or on_epoch else None)
                if run.stopped_by is not None:
                    again = f"fastpoem.fit(out={str(run.folder)!r}, resume=True)"
                    by = signal.Signals(run.stopped_by).name
                    voice.say("stopped by {0} after a complete checkpoint; go on with: {1}", by, again)
    except InputError as error:
        raise in_python(error) from error.__cause__
    except signals.Stopped as error:
        stopped = error
    finally:
        # Whoever listened before hears of it now. Python's answer to Ctrl-C is KeyboardInterrupt: what follows in a notebook does not begin.
        if stop.signal is not None and (stop.signal == signal.SIGINT or run is None):
            signals.deliver(stop.signal)
    if run is None:
        assert stopped is not None
        raise stopped  # who listened before has not ended anything
    return run


def configured(**settings: Any) -> TrainConfig:
    """The checked configuration of a call; poems given as they are have been written to files. Raises InputError."""
    for name in ("data", "val_data"):
        if name in settings and not isinstance(settings[name], str | PurePath | None):
            from fastpoem.corpus.given_poems import as_paths

            cache = coerce("cache_dir", settings.get("cache_dir"), "str | None")
            if cache is None:
                keep_caches(None)  # an earlier call may have had a folder of its own
            settings[name] = as_paths(name, settings[name], settings.get("field"), cache)
    return from_kwargs(**settings)


def in_python(error: InputError) -> InputError:
    """The same error in the words of a call."""
    return InputError(_thing(error.thing), _words(error.reason), _words(error.mend))


def _thing(text: str) -> str:
    """`batch_size=0` of `--batch-size 0`."""
    flag, _, value = text.partition(" ")
    name = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or name not in KINDS or not value:
        return _words(text)
    return f"{name}={value}" if KINDS[name].base is not str or value[0] in "'\"" else f"{name}={value!r}"


def _words(text: str) -> str:
    """Flags as settings, a flag with its choice as a keyword with its value, a command as a call."""
    if TRAIN in text:
        before, _, command = text.partition(f"{TRAIN} ")
        with contextlib.suppress(ValueError, InputError):
            given = read(TrainConfig, shlex.split(command))
            return f"{before}fastpoem.fit({', '.join(f'{name}={_short(value)}' for name, value in given.items())})"
    return re.sub(r"--(no-)?([a-z][a-z_-]*)((?: \S+)?)", _word, text).replace("the flag", "the setting")


def _word(found: re.Match[str]) -> str:
    no, name, value = found[1], found[2].replace("-", "_"), found[3]
    if name not in KINDS:
        return found[0]
    kind = KINDS[name]
    if kind.base is bool:
        return f"{name}={not no}{value}"
    word = value.strip(" ,;.)")
    if word and (word in kind.choices or (kind.base is not str and re.fullmatch(r"[0-9.e-]+", word))):
        return f"{name}={word!r}".replace("'", "" if kind.base is not str else "'") + value[1 + len(word) :]
    before = found.string[: found.start()]
    return f"{name}=…{value}" if before.endswith("with ") and not word.startswith("…") else name + value


def _short(value: Any) -> str:
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return repr(list(value) if isinstance(value, tuple) else value)


def _signature() -> inspect.Signature:
    hints = get_type_hints(TrainConfig)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "data" else inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[name],
        )
        for name, field in TrainConfig.__dataclass_fields__.items()
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Listener | None)
        for name in ("on_log", "on_epoch")
    ]
    return inspect.Signature(parameters, return_annotation="Run")


def _help() -> str:
    """What fit does, and each setting's help, which stands below it in the source."""
    lines = [inspect.cleandoc(fit.__doc__ or ""), ""]
    lines += [f"{name}: {text}" for name, text in helps(TrainConfig).items()]
    return "\n".join(lines)


fit.__signature__ = _signature()  # type: ignore[attr-defined]
fit.__doc__ = _help()
