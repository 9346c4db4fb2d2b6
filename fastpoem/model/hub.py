"""Hugging Face model folders in and out, without importing transformers: config.json, weights (fastpoem.model.weights), and the tokenizer's
files. Nothing in a folder is ever executed. What is written needs nothing beside it: AutoTokenizer, AutoModelForCausalLM and pipeline load it
with no argument, whatever the folder that training began with left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpoem import disk
from fastpoem.errors import InputError
from fastpoem.model.gpt2 import ACTIVATIONS, GPT2Config, count_parameters
from fastpoem.model.weights import WEIGHTS
from fastpoem.model.weights import check_weights as check_weights
from fastpoem.model.weights import load_weights as load_weights

BUNDLED = Path(__file__).parent.parent / "assets"  # the verses and the small model of the embedded default
MOST_LAYERS = 1024
LARGEST_CONFIG = 1 << 20
_KEPT = ("n_ctx", "task_specific_params")  # of config.json, beside the shape
_SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")  # what a config.json must say for itself


PRESETS = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}


def read_config(folder: Path) -> tuple[GPT2Config, dict[str, Any]]:
    """The model's shape, and config.json as it stands. Raises InputError for a model that is not a GPT-2 this module computes."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG:,} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, f"unreadable ({error})", "restore the file from where the model came from") from error
    if isinstance(raw, dict) and "model_type" not in raw and (model := folder / "model" / "config.json").is_file():
        raise InputError(folder, "is the folder of a run, its model is below", f"name {model.parent}")
    if not isinstance(raw, dict) or raw.get("model_type", "gpt2") != "gpt2":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(path, f"describes {kind!r}, not a GPT-2", "use a model whose model_type is gpt2")
    if "model_type" not in raw and not {"n_embd", "n_layer", "n_head"} <= raw.keys():
        raise _without_type(path, raw)
    for name, supported in (
        ("add_cross_attention", False),
        ("tie_word_embeddings", True),
        ("quantization_config", None),
    ):
        if raw.get(name, supported) != supported:
            raise InputError(path, f"{name} is {str(raw[name])[:60]}", f"only {name}={supported} is supported")
    kinds = {field.name: str(field.type) for field in dataclasses.fields(GPT2Config)}
    given = {name: raw[name] for name in kinds if raw.get(name) is not None}
    defaults = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    }  # GPT2Config's of Hugging Face
    shape = {**defaults, **given}
    for name, value in shape.items():
        kind = kinds[name].split(" ")[0]
        right = isinstance(value, {"int": int, "float": int | float, "bool": bool, "str": str}[kind])
        if not right or (kind != "bool" and isinstance(value, bool)):
            raise InputError(path, f"{name} is {value!r}", f"give it as {kind}")
        most = MOST_LAYERS if name == "n_layer" else 2**24
        least = 2 if name == "n_positions" else 1  # something to predict
        if kind == "int" and not least <= value <= most:
            raise InputError(path, f"{name} is {value}", f"give a number from {least} to {most}")
        if name.endswith("pdrop") and not 0 <= value < 1:
            raise InputError(path, f"{name} is {value}", "give a probability from 0 to below 1")
        if kind == "float" and not 0 <= value <= 1:  # NaN too
            raise InputError(path, f"{name} is {value}", "give a number from 0 to 1")
    if shape["n_embd"] % shape["n_head"]:
        raise InputError(
            path, f"n_embd {shape['n_embd']} is no multiple of n_head {shape['n_head']}", "correct one of them"
        )
    if shape.get("activation_function", "gelu_new") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(
            path, f"activation_function {shape['activation_function']!r} is not known", f"use one of {known}"
        )
    return GPT2Config(**shape), raw


def with_shape(name: str, shape: GPT2Config, raw: Mapping[str, Any]) -> tuple[GPT2Config, dict[str, Any]]:
    """What `read_config` returned, with layers, width, heads and positions of one of OpenAI's models (Radford et al., 2019)."""
    layers, width, heads = PRESETS[name]
    sizes: dict[str, Any] = dict(n_layer=layers, n_embd=width, n_head=heads, n_positions=1024, n_inner=None)
    return dataclasses.replace(shape, **sizes), {**raw, **sizes}


def _without_type(path: Path, raw: Mapping[str, Any]) -> InputError:
    """What to say of a config.json that neither names its kind nor has a GPT-2's keys."""
    if {"emb_size", "layers_num"} & raw.keys():
        mend = "write one with n_embd, n_layer, n_head, n_positions and vocab_size, or take the model as uer has it on the hub"
        return InputError(path, "is UER's description of a model, not Hugging Face's", mend)
    return InputError(
        path, "names no model_type, and has not n_embd, n_layer and n_head as a GPT-2 has", 'add "model_type": "gpt2"'
    )


def refuse_too_large(shape: GPT2Config, folder: Path, each: int, what: str) -> None:
    """Raises InputError where this machine has less than `each` bytes of memory a parameter, `what` ("to train") says for what."""
    parameters = count_parameters(shape)
    needed, there = each * parameters / 2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        reason = f"a model of {parameters / 1e6:,.0f} M parameters takes {needed:,.0f} GiB {what}, this machine has {there:,.0f}"
        raise InputError(folder / "config.json", reason, "use a smaller model")


def save_folder(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer_files: Iterable[Path]
) -> None:
    """Write a model folder that transformers loads with no further argument; `folder` appears whole or not at all.

    weights: as of `GPT2.state_dict()`, on any device. config: of config.json. An existing folder is replaced. Raises OSError.
    """
    files = {path.name: path.read_bytes() for path in tokenizer_files}
    write_folder(folder, weights, companions(config, files))


def companions(config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a model folder holds beside its weights, by name. config.json names the class that tokenizer_config.json does: without one,
    AutoTokenizer takes a GPT-2's tokenizer to be GPT-2's own, which knows nothing of a vocab.txt and gives no ids at all."""
    named = json.loads(tokenizer_files.get("tokenizer_config.json", b"{}")).get("tokenizer_class")
    card = json.dumps({**config, **({"tokenizer_class": named} if named else {})}, indent=2) + "\n"
    return dict(tokenizer_files) | {"config.json": card.encode()}


def write_folder(folder: Path, weights: Mapping[str, Tensor], beside: Mapping[str, bytes]) -> None:
    """`save_folder`, of files that are read already."""
    made = partial(folder)
    disk.recover(made, folder)
    made.mkdir(parents=True)
    try:
        for name, content in beside.items():
            disk.write_bytes(made / name, content)
        disk.write_tensors(made / WEIGHTS, {name: tensor.detach().float().cpu() for name, tensor in weights.items()})
        disk.put(made, folder)
    except BaseException:
        disk.recover(made, folder)
        raise


def partial(folder: Path) -> Path:
    """Where a model folder is while it is being written."""
    return folder.with_name(f".{folder.name}.partial")


def saved_config(raw: Mapping[str, Any], config: GPT2Config, special: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a trained model: its shape as it came, with the dropout it was trained with and the tokenizer's own special ids.

    What else a stranger's file holds stays behind: names in it make transformers fetch kernels and import code.
    """
    kept = {name: raw[name] for name in (*(field.name for field in dataclasses.fields(config)), *_KEPT) if name in raw}
    shape = {name: getattr(config, name) for name in _SHAPE}
    dropout = {name: getattr(config, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    known = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    return {**kept, **shape, **dropout, **special, **known}
