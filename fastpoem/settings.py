"""The settings of `fastpoem.fit` for editors and type checkers: the fields of `fastpoem.config.TrainConfig`, each of which may be left out.

Nothing imports this when the program runs. A test holds it to TrainConfig, which says what each one means."""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict

Data = str | PathLike[str] | Sequence[str | PathLike[str]]


class Settings(TypedDict, total=False):
    field: str | None
    line_break: str | None
    model: str | PathLike[str] | None
    from_scratch: bool
    shape: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None
    out: str | PathLike[str] | None
    cache_dir: str | PathLike[str] | None
    recipe: Literal["default", "notebook", "fast"]
    device: str
    parallel: Literal["auto", "data", "sharded", "fsdp"]
    epochs: int
    max_steps: int | None
    batch_size: int
    accumulate: int
    exact: bool
    max_length: int | None
    batching: Literal["auto", "bucket", "pack", "pad"]
    buckets: int | None
    shuffle: bool
    convert: Literal["none", "t2s", "s2t"]
    clean: bool
    whole: bool
    dedup: bool
    val_poems: int | None
    val_data: Data
    best: bool
    patience: int | None
    lr: float | None
    schedule: Literal["epoch-cosine", "cosine", "constant"]
    warmup_steps: int | None
    weight_decay: float
    max_grad_norm: float
    dropout: float | None
    grow_vocab: bool
    vocab: Literal["all", "corpus"]
    loss_on_padding: bool
    seed: int
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto", "on", "off"]
    graphs: Literal["auto", "on", "off"]
    checkpoint_activations: bool
    attention: Literal["auto", "flash", "sdpa"]
    log_every: int
    save_every: int | None
    keep: int
    resume: bool
    log_to: Data
    tensorboard: bool
    sample: str | None
    sample_every: int | None
    quiet: bool
    lang: Literal["auto", "en", "zh"]
