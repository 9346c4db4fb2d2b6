"""The folder of a run: who may write there, and whether the run in it is the one that a resumed command means."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import platform
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import torch

from fastpoem import disk
from fastpoem.config import TrainConfig, with_defaults
from fastpoem.corpus.plan import BucketOrder, Order
from fastpoem.corpus.store import TokenStore
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import Ended, InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.run import checkpoint
from fastpoem.run.opened import Run
from fastpoem.run.validate import Validation
from fastpoem.signals import Stopped
from fastpoem.version import __version__

# Settings that a resumed run may change: they say how long, where and how loudly, not what is computed …
FREE_ON_RESUME = frozenset(
    {
        "out",
        "cache_dir",
        "resume",
        "device",
        "compile",
        "graphs",
        "attention",
        "accumulate",
        "parallel",
        "exact",
        "checkpoint_activations",
        "shape",  # it is compared as it came out
        "epochs",
        "max_steps",
        "log_every",
        "save_every",
    }
    | {
        "keep",
        "log_to",
        "tensorboard",
        "sample",
        "data",
        "model",
        "from_scratch",
        "val_data",
        "best",
        "patience",
        "sample_every",
        "quiet",
        "lang",
    }
)
IN_THE_STORE = frozenset(
    {"max_length", "convert", "buckets", "field", "line_break", "clean", "whole"}
)  # … and those that are compared as the store has them
CONFIG = "config.json"
PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
ANOTHER = "name another folder with --out"


def choose(config: TrainConfig) -> Path:
    """The run's folder, not made yet. Raises InputError where a run stands that is not to be resumed, or nothing can be written."""
    out = Path(config.out).expanduser() if config.out else _new_in(Path("runs"))
    try:
        if out.exists() and not out.is_dir():
            raise InputError(out, "is a file", "name a folder with --out")
        if (rows := out / "metrics.jsonl").is_symlink() or (rows.exists() and not rows.is_file()):
            raise InputError(rows, "is no file of this folder", ANOTHER)
        if not config.resume:
            refuse_a_run(out)
        foreign = [name for name in ("config.json", "model", "manifest.json") if (out / name).exists()]
        if foreign and not (out / "metrics.jsonl").exists() and not checkpoint.listed(out):
            raise InputError(out, f"holds {foreign[0]} but no run, and would be written over", ANOTHER)
        if (kept := out / checkpoint.FOLDER).exists() and not kept.is_dir():
            raise InputError(kept, "is a file, where a folder is needed", ANOTHER)
        if kept.exists() and kept.stat().st_dev != out.stat().st_dev:  # a checkpoint is renamed into it
            raise InputError(kept, "is on another disk", "put the whole run there with --out")
        above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    except OSError as error:  # too long, a parent that may not be searched
        raise InputError(out, f"cannot be a folder ({error.strerror})", ANOTHER) from None
    if not above.is_dir():
        raise InputError(out, f"cannot be made: {above} is a file", ANOTHER)
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(out, f"cannot be written ({above} is read-only)", ANOTHER)
    return out


def _new_in(runs: Path) -> Path:
    """A folder named after the time, that is not there yet."""
    name = time.strftime("%Y%m%d-%H%M%S")
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next((runs / one for one in names if not (runs / one).exists()), runs / name)


def refuse_a_run(out: Path) -> None:
    """Raises InputError where a run stands that a fresh one would write over."""
    path = out / "metrics.jsonl"  # empty where a run was cut short before its first step
    if checkpoint.listed(out) or (path.exists() and path.stat().st_size):
        raise InputError(out, "holds a run already", f"add --resume to continue it, or {ANOTHER}")


class Taken(Ended):
    """The folder that this run was writing to is another's now."""


class Claim:
    """The lock on a run's folder, held by this process. It is the kernel's, so a process that dies leaves none behind."""

    def __init__(self, out: Path) -> None:
        self.out, self._one_at_a_time = out, threading.Lock()
        self.config: bytes | None = None  # of config.json, once it is written
        self._lock = self._take()

    def hold(self) -> None:
        """To be called before anything is written: a folder that vanished is made again, with its config.json. Raises Taken where another
        run has it by now, OSError where it cannot be made."""
        path = self.out / ".lock"
        with self._one_at_a_time:
            if not path.exists():
                with contextlib.suppress(InputError):  # another process was quicker, and will be found below
                    gone, self._lock = self._lock, self._take()
                    gone.close()
            if not os.path.samestat(os.fstat(self._lock.fileno()), path.stat()):
                raise Taken(
                    f"{self.out} was removed while this run was writing there, and another run has it now: nothing of this run was "
                    "written into it. Start again with another --out"
                )
            if self.config is not None and not (self.out / CONFIG).exists():
                put_config(self.out, self.config)

    def close(self) -> None:
        self._lock.close()

    def _take(self) -> IO[str]:
        disk.make_folder(self.out)
        flags = (
            os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        )  # a link would lead out of the folder
        lock = os.fdopen(os.open(self.out / ".lock", flags, 0o644), "a+")
        try:
            disk.lock(lock)
        except disk.NoLocks as error:
            lock.close()
            mend = "name a folder on a local disk with --out, or have this one mounted with locks"
            raise InputError(self.out, str(error), mend) from None
        except BlockingIOError:
            lock.seek(0)
            by = "".join(lock.read(40).split()[:1])
            lock.close()
            reason = "another run is writing there" + (f" (process {by})" if by.isdecimal() else "")
            raise InputError(self.out, reason, f"wait for it, or {ANOTHER}") from None
        with contextlib.suppress(OSError):  # the lock is what counts, the number a courtesy that a full disk may refuse
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()}\n{_parent()}\n".encode())
        return lock


def _parent() -> str:
    """The process that started this one, told from any other that had its number."""
    number = os.getppid()
    with contextlib.suppress(OSError, IndexError):  # Linux has its start in /proc
        return f"{number}-{Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[19]}"
    return str(number)


def begun_by_this_torchrun(out: Path) -> bool:
    """Whether the run in a folder was begun by the torchrun that has started this process again: not one that stood there before."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (out / ".lock").read_text().split()[1:] == [_parent()]
    return False


@contextlib.contextmanager
def claim(out: Path, *, fresh: bool) -> Iterator[Claim]:
    """Hold the run's folder for this process, clean of what a killed one left half-done. Raises InputError."""
    left = {".lock"} if out.exists() else {".lock", "metrics.jsonl", ".config.json.partial"}
    with refused_by_the_disk(out):
        held = Claim(out)
    with contextlib.closing(held):
        try:
            with refused_by_the_disk(out):
                if fresh:
                    refuse_a_run(out)  # one that began and ended since `choose` looked
                checkpoint.clean(out)
                disk.recover(hub.partial(out / "model"), out / "model")
            yield held
        except (InputError, Stopped):  # before a step was done: as if the command had not been given
            with contextlib.suppress(OSError):
                found = {path.name: path for path in out.iterdir()}
                if found.keys() <= left and not ("metrics.jsonl" in found and found["metrics.jsonl"].stat().st_size):
                    for path in found.values():
                        path.unlink()
                    out.rmdir()
            raise


@contextlib.contextmanager
def refused_by_the_disk(out: Path) -> Iterator[None]:
    """Before training begins, what the disk refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        mend = f"mend its permissions, make room, or {ANOTHER}"
        raise InputError(error.filename or out, f"cannot be written ({error.strerror or error})", mend) from None


def identity(
    config: TrainConfig,
    store: TokenStore,
    shape: GPT2Config,
    dtype: torch.dtype,
    order: Order,
    validation: Validation,
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    free = FREE_ON_RESUME | IN_THE_STORE
    source, counts = store.manifest["source"], store.manifest["counts"]
    config = dataclasses.replace(config, precision=PRECISIONS[dtype])  # what auto came to
    groups = {}
    if isinstance(order, BucketOrder) and len(order.ends) < len(store.buckets):
        groups["groups of buckets"] = len(order.ends)
    return {
        "store": {
            "poems": f"{counts['rows']} of {source.get('name')} ({str(source.get('sha256'))[:8]})",
            "max_length": store.max_length,
            "convert": source.get("convert"),
            **{name: source[name] for name in ("field", "line_break", "clean", "whole") if source.get(name)},
            "buckets": [bucket.length for bucket in store.buckets],
            "token store": store.identity,
        },
        "tokenizer": store.fingerprint,
        "val_data": f"{validation.store.rows} poems ({validation.store.identity[:8]})" if validation.own else None,
        "shape": dataclasses.asdict(shape),
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in free} | groups,
    }


def refuse_another_run(saved: dict[str, Any], now: dict[str, Any], out: Path, config: TrainConfig) -> None:
    """Raises InputError naming every difference between the identities of the run in `out` and of the one that would continue it, with
    the command for a new run as `config` has it, from the weights of this one."""

    def different(before: Any, after: Any, name: str) -> Iterator[str]:
        if isinstance(before, dict) and isinstance(after, dict):
            if "token store" in after and before.get("token store") == after["token store"]:
                return  # the same ids, whatever the text was called
            for key in {**before, **after}:
                yield from different(before.get(key), after.get(key), key)
        elif before != after:
            yield f"{name} was {_short(before)}, is {_short(after)}"

    found = list(different(saved, json.loads(json.dumps(now)), "all"))
    if len(found) > 1:
        found = [
            one for one in found if not one.startswith("token store ")
        ]  # the hash that follows from another difference
    # A recipe is only other defaults: without another difference, somebody has spelled its flags out.
    if any(not one.startswith("recipe ") for one in found):
        fits = _weights_fit(saved.get("shape"), now["shape"])
        mend = f"leave out what differs, or {'train on from its weights' if fits else 'train a new run'}: "
        raise InputError(out, f"cannot be resumed: {'; '.join(found)}", mend + onward(out, config, weights=fits))


def _weights_fit(before: Any, now: dict[str, Any]) -> bool:
    """Whether two shapes are those of one model, whatever is dropped and how many ids there are."""
    return not isinstance(before, dict) or not any(
        before.get(name) != now.get(name)
        for name in {**before, **now}
        if name != "vocab_size" and not name.endswith("_pdrop")
    )


def onward(run: Path, config: TrainConfig, *, weights: bool = True) -> str:
    """The command that trains a new run as `config` says, beginning with the weights of the one in `run`; without `weights`, with those
    that `config` names."""
    folder, run = run, run if run.name else run.absolute()
    names = [run.with_name(f"{run.name}-{number}") for number in range(2, 1000)]
    new = next((path for path in names if not path.exists()), names[0])
    config = dataclasses.replace(config, out=str(new), resume=False)
    if weights:
        model = Run(folder, []).model
        grow = config.grow_vocab or _is_new(config.line_break, model)
        config = dataclasses.replace(config, model=str(model), from_scratch=False, grow_vocab=grow)
    plain = with_defaults(TrainConfig(data=config.data, model=config.model, recipe=config.recipe))
    flags, said = list[str](), set[str]()
    for name in ("model", "out", *(field.name for field in dataclasses.fields(config))):
        flag, value = "--" + name.replace("_", "-"), getattr(config, name)
        if name in said or value == getattr(plain, name):
            continue
        said.add(name)
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = value if isinstance(value, tuple) else (str(value),)
            like_a_flag = any(one.startswith("-") for one in values)
            flags += [f"{flag}={one}" for one in values] if like_a_flag else [flag, *values]
    return f"python -m fastpoem.train {shlex.join(flags)}"


def _is_new(token: str | None, model: Path) -> bool:
    """Whether the model in a folder has no row for a token for line breaks."""
    if token is None:
        return False
    with contextlib.suppress(InputError):  # what is wrong with that model is for the command to say
        index = PoemTokenizer.load(model, token).library.token_to_id(token)
        return index is None or index >= hub.read_config(model)[0].vocab_size
    return False


def _for_json(value: Any) -> Any:
    """JSON has no infinity: the word for it, as it is given to a flag."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def write_config(
    out: Path, config: TrainConfig, same: dict[str, Any], store: TokenStore, device: torch.device, dtype: torch.dtype
) -> bytes:
    """RUN/config.json: every setting, the versions, the store's identity. Returns its content. Raises OSError."""
    packages = {name: str(importlib.import_module(name).__version__) for name in ("torch", "tokenizers", "numpy")}
    on_gpu = device.type == "cuda"
    content = {
        "settings": {name: _for_json(value) for name, value in dataclasses.asdict(config).items()},
        "cwd": os.path.abspath("."),  # where the settings' relative paths begin
        "versions": {"fastpoem": __version__, "python": platform.python_version(), **packages},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype)[6:],
        "batching": same["settings"]["batching"],  # what auto came to
        "store": {"path": str(store.path), "identity": store.identity, "rows": store.rows},
        "tokenizer": store.fingerprint,
        "model": same["shape"],
    }
    text = (json.dumps(content, indent=2) + "\n").encode()
    put_config(out, text)
    return text


def put_config(out: Path, content: bytes) -> None:
    """Write RUN/config.json in one step. Raises OSError."""
    made = out / f".{CONFIG}.partial"
    made.unlink(missing_ok=True)
    disk.write_bytes(made, content)
    os.replace(made, out / CONFIG)
