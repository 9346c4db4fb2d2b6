"""Every setting of training once: its default, its help and its check. The command line and `fastpoem.fit` are both made from it.

A *recipe* is only a set of other defaults, so a flag given beside it wins without any bookkeeping of who set what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from fastpoem.errors import InputError, brief
from fastpoem.paths import given_path

HUB_MODEL = "uer/gpt2-distil-chinese-cluecorpussmall"


PATHS = ("data", "val_data", "model", "cache_dir")  # settings that name what is there already
NO_POEM = re.compile("[\n\r\0\ud800-\udfff]")  # what no poem, and no beginning of one, can hold
MANY = 2**40  # more than any run counts to, and far from where arithmetic gets odd
RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, MANY),
    ("max_steps", 1, MANY),
    ("batch_size", 1, 65536),
    ("accumulate", 1, 65536),
    ("max_length", 2, 65535),
    ("buckets", 1, 255),
    ("val_poems", 0, MANY),
    ("lr", 0.0, 1000.0),
    ("warmup_steps", 0, MANY),
    ("weight_decay", 0.0, 1000.0),
    ("max_grad_norm", 1e-30, math.inf),  # inf does not clip
    ("dropout", 0.0, 0.999),
    ("seed", 0, 2**63 - 1),
    ("log_every", 1, MANY),
    ("save_every", 1, MANY),
    ("sample_every", 0, MANY),
    ("keep", 1, MANY),
    ("patience", 1, MANY),
)


TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")
OTHER_TRACKERS = {"weights-and-biases": "wandb", "wb": "wandb", "w&b": "wandb", "tb": "tensorboard"}

OTHER_NAMES = {  # what other programs call our settings, for who types that
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "block_size": "max_length",
    "max_seq_length": "max_length",
    "output_dir": "out",
    "model_name_or_path": "model",
    "train_file": "data",
    "dataset": "data",
    "validation_file": "val_data",
    "lr_scheduler_type": "schedule",
    "warmup": "warmup_steps",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "save_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "report_to": "log_to",
    "early_stopping_patience": "patience",
    "load_best_model_at_end": "best",
    "bf16": "precision",
    "fp16": "precision",
}


@dataclass(frozen=True)
class TrainConfig:
    """Train GPT-2 on poems. Without --data and --model: a small model from scratch on the bundled verses, in a minute or so."""

    data: tuple[str, ...] = ()
    """Poems: text files with one poem a line, .jsonl, .json, .csv or .tsv files (plain, .gz, .xz, .bz2 or .zip), folders of them, or a
    token store. Several are one corpus. Without it: the bundled verses."""
    field: str | None = None
    """Column (or key) that holds the poem in .csv, .tsv and JSON. None: content, text, paragraphs and the like are tried."""
    line_break: str | None = None
    """Token that stands for a line break inside a poem, such as [unused1]. None: the model's own, if it has one; otherwise the lines of
    a poem are joined."""
    model: str | None = None
    """Hugging Face name, folder of a model, or a run's folder. None takes uer/gpt2-distil-chinese-cluecorpussmall, or the bundled small model without --data."""
    from_scratch: bool = False
    """Take only the configuration and the tokenizer of --model; draw the weights from --seed."""
    shape: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """With --from-scratch, these layers, width, heads and 1,024 positions in place of --model's: of 124, 355, 774 and 1,558 million parameters
    with GPT-2's own vocabulary."""
    out: str | None = None
    """Folder of the run: metrics.jsonl, config.json, checkpoints/, model/. None makes runs/<time>."""
    cache_dir: str | None = None
    """Where prepared token stores are kept, what was checked on a GPU, and what was compiled. None: stores in .fastpoem/ beside the text, the
    rest in ~/.cache/fastpoem."""
    recipe: Literal["default", "notebook", "fast"] = "default"
    """A set of other defaults. notebook: random batches padded to their longest, loss on padding, fp32, nothing held out. fast: more
    learned in one epoch, by a higher rate that rises first and falls to zero at the end, without dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto: the CUDA device with the most free memory, else the CPU. mps (Apple): in fp32, plainly."""

    parallel: Literal["auto", "data", "sharded", "fsdp"] = "auto"
    """What several processes (torchrun) divide. data: the poems of a step. sharded: the update and its moments too (ZeRO-1). fsdp: the weights
    as well, for models that do not fit one GPU. auto: sharded on GPUs, data on CPUs."""

    epochs: int = 1
    """Passes over the poems."""
    max_steps: int | None = None
    """Stop after so many optimizer steps."""
    batch_size: int = 16
    """Poems a step, whatever the number of processes that torchrun starts."""
    accumulate: int = 1
    """Micro-batches of a step in each process: less memory, the same step."""
    exact: bool = False
    """Add up in one order, so that weights do not depend on the number of processes, bit for bit. On a CPU, in one thread a process or
    OMP_NUM_THREADS. The step is done in 8 micro-batches."""
    max_length: int | None = None
    """Tokens of a poem, [CLS] and [SEP] included; what is longer is cut. None: 512, or the model's positions if they are fewer."""
    batching: Literal["auto", "bucket", "pack", "pad"] = "auto"
    """pack: random poems without padding. bucket: poems of like length, padded to the longest. pad: random poems, padded to the longest.
    auto: pack where attention inside packed batches is fast, on a CPU with gcc and on a GPU with the flash kernel; else bucket."""
    buckets: int | None = None
    """Length buckets of the token store. None: 32, of which --batching bucket takes several together where the text is small."""
    shuffle: bool = True
    """--no-shuffle takes the poems in the order of the text."""
    convert: Literal["none", "t2s", "s2t"] = "none"
    """t2s converts traditional to simplified characters, s2t the other way (needs OpenCC)."""
    clean: bool = False
    """Remove what is not part of a poem where that is safe: spaces inside, HTML entities, notes in brackets."""
    whole: bool = False
    """A poem longer than --max-length is cut after its last whole sentence."""
    dedup: bool = False
    """Train on one of each poem, where the text has copies of it."""
    val_poems: int | None = None
    """Poems held out for validation, with all their copies. None: 512, never more than 5% of the corpus."""
    val_data: tuple[str, ...] = ()
    """Poems to validate on, in any form that --data takes. Nothing of --data is held out then."""
    best: bool = False
    """Leave in RUN/model the checkpoint with the lowest validation loss, not the last one."""
    patience: int | None = None
    """Stop after so many epochs without a lower validation loss."""

    lr: float | None = 2e-5
    """Peak learning rate. None: 0.2 divided by the model's width, 2.6e-4 at 768."""
    schedule: Literal["epoch-cosine", "cosine", "constant"] = "epoch-cosine"
    """epoch-cosine falls once an epoch (CosineAnnealingLR with T_max=epochs), cosine every step to zero at the last."""
    warmup_steps: int | None = 0
    """Steps over which the learning rate rises linearly. None: a twentieth of the run, 100 at most."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on every weight."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm."""
    dropout: float | None = None
    """Override all dropout probabilities of the model."""
    grow_vocab: bool = False
    """Add the characters of the text that the vocabulary lacks, with new rows in the embedding."""
    vocab: Literal["all", "corpus"] = "all"
    """corpus: train the embedding and the head for the ids that occur in the poems only. The other rows keep their values, and no
    poem is written with them."""
    loss_on_padding: bool = False
    """Count padding as targets in the loss."""
    seed: int = 0
    """Order of poems, dropout and weights drawn from scratch."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 keep fp32 master weights; fp16 scales the loss, too, and is for GPUs without bf16 (T4, V100, RTX 20). auto: bf16 on a
    GPU that has it, fp16 on an older one; on a CPU fp32 or bf16, measured, the faster."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the model. auto: on a GPU with Triton; off on a CPU, where it was measured to be slower."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as CUDA graphs."""
    checkpoint_activations: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again: much less memory, a third more work, the same numbers."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """flash insists on the flash kernel."""

    log_every: int = 100
    """Steps between lines of the log."""
    save_every: int | None = None
    """Steps between checkpoints. None: at the end of an epoch, and about every ten minutes in between."""
    keep: int = 3
    """Checkpoints to keep: the newest, and beside them the one with the lowest validation loss."""
    resume: bool = False
    """Continue from the newest complete checkpoint in --out. Settings that are not given are those the run was started with."""
    log_to: tuple[str, ...] = ()
    """Also show the curves in these programs, where they are installed: tensorboard, wandb, swanlab, mlflow, with a comma or space between."""
    tensorboard: bool = False
    """The same as --log-to tensorboard: the curves lie in RUN/tensorboard."""
    sample: str | None = None
    """At the end, print a poem that begins so. Poems on the way begin so, too."""
    sample_every: int | None = None
    """Steps between a few poems from the weights as they are, kept in RUN/samples.jsonl; 0: none. None: at the end of each epoch, of short
    ones every hundred steps or so."""
    quiet: bool = False
    """Say nothing but errors."""
    lang: Literal["auto", "en", "zh"] = "auto"
    """Language of the summaries, the progress and the steps' lines. auto: on a terminal that of the locale, in a pipe English."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The programs that the curves are shown in, each once."""
        named = [name.strip().lower() for given in self.log_to for name in given.split(",")]
        return tuple(dict.fromkeys([*filter(None, named), *["tensorboard"] * self.tensorboard]))

    def check(self) -> TrainConfig:
        """Refuse what cannot work, naming the flag. Comparisons are written so that NaN fails them."""
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"--{name.replace('_', '-')} {value}", "out of range", f"use {_between(low, high)}")
        for name in ("data", "val_data", "model", "out", "cache_dir"):
            value = getattr(self, name)
            for path in value if isinstance(value, tuple) else [value] if value is not None else []:
                given_path(f"--{name.replace('_', '-')}", path)
        if self.sample is not None and NO_POEM.search(self.sample):
            raise InputError(
                f"--sample {self.sample!r:.80}", "holds what no poem does", "use characters of UTF-8 on one line"
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise InputError(f"--device {self.device}", "no such kind of device", "use auto, cpu, cuda, cuda:N or mps")
        for name in self.trackers:
            if name not in TRACKERS:
                near = difflib.get_close_matches(name, [*TRACKERS, *OTHER_TRACKERS], n=1)
                mend = f"did you mean {OTHER_TRACKERS.get(near[0], near[0])}?" if near else f"use {', '.join(TRACKERS)}"
                raise InputError(f"--log-to {name[:40]}", "no such program", mend)
        if self.val_data and self.val_poems:
            raise InputError("--val-poems", "--val-data says what is validated on", "drop one of the two")
        if self.loss_on_padding and self.batching == "pack":
            raise InputError("--loss-on-padding", "packed batches have no padding", "drop it, or use --batching pad")
        if self.resume and self.out is None:
            raise InputError("--resume", "it needs to know which run", "name the run's folder with --out")
        return self


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "notebook": {
        "batching": "pad",
        "loss_on_padding": True,
        "schedule": "epoch-cosine",
        "warmup_steps": 0,
        "precision": "fp32",
        "val_poems": 0,
    },
    # One pass over new poems does not overfit, so nothing is dropped. docs/log.md has what was tried.
    "fast": {"lr": None, "schedule": "cosine", "warmup_steps": None, "dropout": 0.0},
}
RATE_BY_WIDTH = 0.2  # Adam's best rate falls as the model widens (Yang et al., "Tensor Programs V", 2022)

# What `python -m fastpoem.train` does on its own: the bundled verses, a small model from scratch, a poem at the end.
EMBEDDED: dict[str, Any] = {
    "from_scratch": True,
    "epochs": 10,
    "lr": 1.5e-3,
    "schedule": "cosine",
    "warmup_steps": 20,
    "log_every": 50,
    "sample": "春",
}


GROUPS = {  # of --help: those that none of the others has are the run's
    "data": "data field line_break max_length convert clean whole dedup val_data val_poems",
    "model": "model from_scratch shape dropout grow_vocab vocab",
    "optimisation": "recipe epochs max_steps batch_size accumulate exact batching buckets shuffle lr schedule warmup_steps weight_decay max_grad_norm "
    "loss_on_padding seed best patience",
    "speed": "device parallel precision compile graphs checkpoint_activations attention",
    "run": "",
}


def with_defaults(given: TrainConfig, named: Collection[str] = ()) -> TrainConfig:
    """The defaults under which `given`'s flags are to be read: those of its recipe, and the embedded run's where it names no data and no
    model; of a run that is resumed, its own. named: the settings that were given, which matters where one says another's part anew.
    Raises InputError where the run's own cannot be read."""
    if given.resume and given.out is not None and (saved := saved_settings(given_path("--out", given.out))) is not None:
        recipe = RECIPES[given.recipe] if given.recipe != "default" or "recipe" in named else {}
        length = {"max_steps": None} if "epochs" in named else {}  # so many epochs, and not those steps of them
        apart: dict[str, Any] = {}  # what one of the two says of validation leaves the other, saved, without a part
        if given.val_data:
            apart = {"val_poems": None}
        elif given.val_poems is not None:
            apart = {"val_data": ()}
        return TrainConfig(**{**saved, **recipe, **length, **apart})
    embedded = EMBEDDED if not given.data and given.model is None else {}
    return TrainConfig(**{**embedded, **RECIPES[given.recipe]})


def saved_settings(run: Path, name: str = "config.json") -> dict[str, Any] | None:
    """The settings in RUN/config.json. None where there is no such file. Raises InputError for what this version does not understand."""
    file = run / name
    mend = "give the run's settings as flags, with that file moved away"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        saved, where = dict(content["settings"]), content.get("cwd")
        by = content.get("versions", {}).get("fastpoem", "another version")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror})", "check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(file, "is damaged: it holds no settings of a run", mend) from None
    known = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    for name in [*saved]:
        if name not in known:
            raise InputError(file, f"has a setting {name[:40]}, unknown here (it is fastpoem {by!s:.20}'s)", mend)
        value = saved[name]
        if isinstance(value, str) and known[name].startswith("float"):
            with contextlib.suppress(ValueError):
                value = float(value)  # JSON has no infinity
        try:
            saved[name] = coerce(name, value, known[name])
        except InputError:
            raise InputError(file, f"is damaged: its {name} is {value!r:.40}", mend) from None
    for name in PATHS:  # as they were meant where the run was started
        if isinstance(where, str) and (value := saved.get(name)):
            saved[name] = (
                tuple(found_from(one, where) for one in value) if isinstance(value, tuple) else found_from(value, where)
            )
    saved.pop("out", None)
    saved.pop("resume", None)
    saved.pop("quiet", None)
    saved.pop("lang", None)
    return saved


def found_from(path: str, where: str) -> str:
    """A path as given in the folder `where`, for use in this one."""
    there = os.path.join(where, os.path.expanduser(path))
    return path if os.path.exists(os.path.expanduser(path)) or not os.path.exists(there) else there


def from_kwargs(**settings: Any) -> TrainConfig:
    """The checked configuration of `fastpoem.fit(...)`: same names, same defaults as the flags.

    Raises InputError for a name that is no setting or a value out of range or of the wrong kind.
    """
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *OTHER_NAMES], n=1, cutoff=0.6)
            mend = f"did you mean {OTHER_NAMES.get(near[0], near[0])}?" if near else "see help(fastpoem.fit)"
            raise InputError(name[:80], "no such setting", mend)
        settings[name] = coerce(name, value, str(known[name].type))
    base = with_defaults(TrainConfig(**settings), settings)
    return dataclasses.replace(base, **settings).check()


def coerce(name: str, value: Any, kind: str) -> Any:
    """Check a keyword's value against its annotation, so that a call is held to what the command line is held to."""
    if value is None and "None" in kind:
        return None
    if kind.startswith("Literal"):
        allowed = [word.strip(" '\"") for word in kind[len("Literal[") : -1].split(",")]
        if value not in allowed:
            raise InputError(f"{name}={brief(value)}", "is not one of them", "use " + " or ".join(allowed))
        return value
    if kind.startswith("tuple"):
        value = () if value is None else (value,) if isinstance(value, str | PurePath) else value
        if isinstance(value, tuple | list) and all(isinstance(one, str | PurePath) for one in value):
            return tuple(map(str, value))
        raise InputError(f"{name}={brief(value)}", "is of the wrong kind", "give a path, or a list of paths")
    base = kind.split(" |")[0]
    fits = {
        "str": isinstance(value, str | PurePath),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
    }
    if not fits[base]:
        words = {"str": "a text", "bool": "True or False", "int": "a whole number", "float": "a number"}[base]
        raise InputError(f"{name}={brief(value)}", "is of the wrong kind", f"give {words}")
    if base == "float":
        return (
            float(max(-(2**1000), min(value, 2**1000))) if isinstance(value, int) else float(value)
        )  # 10**400 has none
    return str(value) if base == "str" else value


def _between(low: float, high: float) -> str:
    return f"at least {low}" if high in (MANY, math.inf) else f"a number from {low} to {high}"
