"""`fit` puts the house together: device, model, store, order, step, loop; and leaves RUN/model behind.

Everything that can be wrong with what the user gave is found before the run's folder is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastpoem
from fastpoem.config import HUB_MODEL, TrainConfig
from fastpoem.corpus.feed import Feed
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, held_out_rows
from fastpoem.corpus.store import TokenStore, cached_store, is_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.memory import keep_freed_memory
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_device, choose_dtype
from fastpoem.engine.step import TrainStep
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.run import checkpoint
from fastpoem.run.loop import Loop
from fastpoem.run.metrics import Metrics, Voice

# Settings that a resumed run may change: they say how long, where and how loudly, not what is computed.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "cache_dir",
        "resume",
        "device",
        "epochs",
        "max_steps",
        "log_every",
        "save_every",
        "keep",
        "tensorboard",
        "sample",
        "data",
        "model",
        "from_scratch",
        "convert",
        "buckets",
    }
)


@dataclass
class Run:
    """A finished (or stopped) run: its folder, the rows of metrics.jsonl, and the signal that stopped it, if one did."""

    folder: Path
    metrics: list[dict[str, Any]]
    stopped_by: int | None = None

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def generate(self, prompt: str, **options: Any) -> list[str]:
        """Poems that begin with `prompt`; options as of `fastpoem.generate.sample`: count, top_k, top_p, temperature, seed …"""
        from fastpoem.generate import sample

        return sample(self.model, prompt, **options)


def fit(config: TrainConfig, voice: Voice | None = None) -> Run:
    """Train as `config` (checked) says. Raises InputError for what the user gave wrongly, Diverged when numbers go wrong."""
    with assembled(config, voice or Voice()) as (loop, export):
        run = Run(loop.folder, loop.metrics.rows, loop.run())
        if run.stopped_by is None:
            export(run.model)
    return run


@contextlib.contextmanager
def assembled(config: TrainConfig, voice: Voice) -> Iterator[tuple[Loop, Callable[[Path], None]]]:
    """The loop of a run, ready to go and holding its folder, and what writes the trained model into a folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun", "training on several devices is not supported yet", "start one process")
    device = choose_device(config.device)
    dtype, why = choose_dtype(config.precision, device)
    _refuse_what_needs_a_gpu(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    out = _claimable(config)

    source = Path(config.data).expanduser() if config.data is not None else hub.BUNDLED / "poems.txt"
    if not source.exists():
        raise InputError(source, "no such file or folder", "check the path given to --data")
    name = config.model or (HUB_MODEL if config.data is not None else str(hub.BUNDLED / "model"))
    model_folder = hub.resolve_folder(name)
    shape, raw_config = hub.read_config(model_folder)
    if config.dropout is not None:
        shape = dataclasses.replace(
            shape, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout
        )
    tokenizer = PoemTokenizer.load(model_folder)
    if tokenizer.vocab_size > shape.vocab_size:
        reason = f"its tokenizer has {tokenizer.vocab_size} ids, its embedding {shape.vocab_size}"
        raise InputError(model_folder, reason, "use a tokenizer and a model that belong together")

    store = _open_store(config, source, tokenizer, shape, voice)
    held = held_out_rows(store.rows, config.val_poems, config.seed)
    order = _order(config, store, held)
    model = GPT2(shape)
    if config.from_scratch:
        model.initialise(config.seed)
    else:
        hub.load_weights(model, model_folder)
    model.to(device)
    optimizer = FlatAdamW(model, device, dtype, weight_decay=config.weight_decay, max_norm=config.max_grad_norm)

    with _claim(out):
        resumed = checkpoint.load_newest(out / "checkpoints", voice.say) if config.resume else None
        identity = _identity(config, store, shape)
        if resumed is not None:
            _refuse_another_run(resumed[0]["identity"], identity, out)
        compiled, compile_seconds = _compile(config, model, device)
        step = TrainStep(
            compiled,
            optimizer,
            pad_id=tokenizer.pad_id if config.loss_on_padding else None,
            compiled=compiled is not model,
        )
        feed = Feed(store, config.batching, pad_targets=config.loss_on_padding)
        keep_bytes = resumed[0]["metrics_bytes"] if resumed else 0
        metrics = Metrics(out, keep_bytes=keep_bytes, tensorboard=config.tensorboard)
        loop = Loop(config, out, device, model, step, order, feed, held, metrics, voice, identity)
        torch.manual_seed(config.seed)
        if resumed is not None:
            loop.restore(*resumed)
            voice.say(f"resuming after step {loop.done} of {loop.last_step}")
        _write_config(out, config, identity, store, device, dtype)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        voice.say(f"{parameters:.1f} M parameters on {device} in {str(dtype)[6:]} ({why})")
        voice.say(
            f"{order.steps:,} steps an epoch of {config.batch_size} poems, {len(held):,} poems held out for validation"
        )
        if compile_seconds:
            voice.say(f"compiled in {compile_seconds:.0f} s")

        def export(folder: Path) -> None:
            special = {
                "bos_token_id": tokenizer.cls_id,
                "eos_token_id": tokenizer.sep_id,
                "pad_token_id": tokenizer.pad_id,
            }
            weights = dict(optimizer.named(optimizer.master))
            hub.save_folder(folder, weights, hub.saved_config(raw_config, shape, special), tokenizer.files)

        try:
            yield loop, export
        finally:
            metrics.close()


def _refuse_what_needs_a_gpu(config: TrainConfig, device: torch.device) -> None:
    if config.graphs == "on":
        raise InputError("--graphs on", "this version does not capture CUDA graphs", "use --graphs auto")
    if config.attention == "flash" and device.type != "cuda":
        raise InputError(
            "--attention flash", f"the flash kernel runs on CUDA devices, not on {device}", "use --attention auto"
        )


def _open_store(
    config: TrainConfig, source: Path, tokenizer: PoemTokenizer, shape: GPT2Config, voice: Voice
) -> TokenStore:
    """The token store of the run's text, made if need be."""
    longest = shape.n_positions
    if config.max_length is not None and config.max_length > longest:
        raise InputError(
            f"--max-length {config.max_length}", f"the model has {longest} positions", f"use at most {longest}"
        )
    if is_store(source):
        store = TokenStore.open(source)
        if store.fingerprint != tokenizer.fingerprint:
            raise InputError(source, "was made with another tokenizer", "prepare the text again with this --model")
        if store.buckets[-1].length > longest:
            reason = f"holds poems of {store.buckets[-1].length} tokens, the model has {longest} positions"
            raise InputError(source, reason, f"prepare the text again with --max-length {longest}")
        return store
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else None
    if config.data is None and cache is None:  # not beside the package's own files
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastpoem"
    begin = time.perf_counter()
    store = cached_store(
        source,
        tokenizer,
        cache_dir=cache,
        max_length=config.max_length or min(512, longest),
        buckets=config.buckets,
        convert=None if config.convert == "none" else config.convert,
    )
    voice.say(f"{store.rows:,} poems of {source.name} in {store.path} ({time.perf_counter() - begin:.1f} s)")
    return store


def _order(config: TrainConfig, store: TokenStore, held: np.ndarray) -> Order:
    lengths = [bucket.length for bucket in store.buckets]
    if config.batching == "bucket" and config.shuffle:
        where, index = store.locate(held)
        held_by_bucket = [np.sort(index[where == bucket]) for bucket in range(len(lengths))]
        rows = [bucket.rows for bucket in store.buckets]
        return BucketOrder(lengths, rows, held_by_bucket, config.batch_size, config.seed)
    seed = config.seed if config.shuffle else None
    return TextOrder(lengths, store.rows, store.locate, held, config.batch_size, seed)


def _compile(config: TrainConfig, model: GPT2, device: torch.device) -> tuple[nn.Module, float]:
    """The model as the step calls it, and the seconds its compilation took (it compiles at its first call, here)."""
    if config.compile == "off" or (config.compile == "auto" and device.type == "cpu"):
        return model, 0.0
    begin = time.perf_counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    ids = torch.zeros(config.batch_size, 8, dtype=torch.int64, device=device)
    state = torch.get_rng_state()
    compiled(ids, None).sum().backward()
    torch.set_rng_state(state)
    return compiled, time.perf_counter() - begin


def _claimable(config: TrainConfig) -> Path:
    """The run's folder, not made yet. Raises InputError where a run stands that is not to be resumed, or nothing can be written."""
    out = Path(config.out).expanduser() if config.out else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "name a folder with --out")
    if (out / "metrics.jsonl").exists() and not config.resume:
        raise InputError(out, "holds a run already", "add --resume to continue it, or name another folder with --out")
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not os.access(above, os.W_OK):
        raise InputError(out, f"cannot be written ({above} is read-only)", "name another folder with --out")
    return out


@contextlib.contextmanager
def _claim(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process. The lock is the kernel's, so a process that dies leaves none behind."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                out, "another run is writing there", "wait for it, or name another folder with --out"
            ) from None
        yield


def _identity(config: TrainConfig, store: TokenStore, shape: GPT2Config) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_ON_RESUME}
    return {
        "store": store.identity,
        "tokenizer": store.fingerprint,
        "shape": dataclasses.asdict(shape),
        "settings": settings,
    }


def _refuse_another_run(saved: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    def different(before: Any, after: Any, name: str) -> Iterator[str]:
        if isinstance(before, dict) and isinstance(after, dict):
            for key in {**before, **after}:
                yield from different(before.get(key), after.get(key), key)
        elif before != after:
            yield f"{name} was {before}, is {after}"

    found = "; ".join(different(saved, now, ""))
    if found:
        raise InputError(out, f"cannot be resumed: {found}", "give the settings and data the run was started with")


def _write_config(
    out: Path,
    config: TrainConfig,
    identity: dict[str, Any],
    store: TokenStore,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    packages = {name: metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    content = {
        "settings": dataclasses.asdict(config),
        "versions": {"fastpoem": fastpoem.__version__, "python": platform.python_version(), **packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype)[6:],
        "store": {"path": str(store.path), "identity": store.identity, "rows": store.rows},
        "tokenizer": store.fingerprint,
        "model": identity["shape"],
    }
    made = out / ".config.json.partial"
    made.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(made, out / "config.json")
