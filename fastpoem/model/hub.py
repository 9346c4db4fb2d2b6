"""Hugging Face model folders in and out, without importing transformers: config.json, weights, and the tokenizer's files as they are.

Weights are read from safetensors, or from pytorch_model.bin as plain tensors (`weights_only=True`); nothing in a folder is ever executed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpoem import disk
from fastpoem.errors import InputError
from fastpoem.model.gpt2 import ACTIVATIONS, GPT2, GPT2Config
from fastpoem.paths import spelled

BUNDLED = Path(__file__).parent.parent / "assets"  # the verses and the small model of the embedded default
WEIGHTS = "model.safetensors"
MOST_LAYERS = 1024
LARGEST_CONFIG = 1 << 20
_KEPT = ("model_type", "tokenizer_class", "n_ctx", "task_specific_params")  # of config.json, beside the shape


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
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt2":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(path, f"describes {kind!r}, not a GPT-2", "use a model whose model_type is gpt2")
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


def count_parameters(shape: GPT2Config) -> int:
    """How many numbers a GPT-2 of this shape learns, known before any memory is taken."""
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    layer = 4 * wide + 4 * wide * (wide + 1) + inner * (wide + 1) + wide * (inner + 1)
    return (shape.vocab_size + shape.n_positions) * wide + shape.n_layer * layer + 2 * wide


def refuse_too_large(shape: GPT2Config, folder: Path, each: int, what: str) -> None:
    """Raises InputError where this machine has less than `each` bytes of memory a parameter, `what` ("to train") says for what."""
    parameters = count_parameters(shape)
    needed, there = each * parameters / 2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        reason = f"a model of {parameters / 1e6:,.0f} M parameters takes {needed:,.0f} GiB {what}, this machine has {there:,.0f}"
        raise InputError(folder / "config.json", reason, "use a smaller model")


def load_weights(model: GPT2, folder: Path) -> None:
    """Copy a folder's weights into `model`. Raises InputError where they are missing, damaged or of another shape."""
    prefix, mend = "transformer.", "use the weights that belong to this config.json"
    shape = model.config
    most = 32 * count_parameters(shape) + 8 * shape.n_layer * shape.n_positions**2 + (1 << 20)  # with masks, in double
    try:
        size = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    except OSError as error:  # a link to nothing
        raise InputError(error.filename, f"cannot be read ({error.strerror})", "fetch the model folder again") from None
    if size > most:
        raise InputError(folder, f"holds {size:,} bytes of weights, its model needs a fraction of them", mend)
    found = {
        name if name.startswith((prefix, "lm_head.")) else prefix + name: tensor
        for name, tensor in _read_tensors(folder).items()
    }
    wanted = model.state_dict()
    for name, parameter in wanted.items():
        if name not in found:
            raise InputError(folder, f"its weights lack {name}", mend)
        tensor = found[name]
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)} in the weights, {tuple(parameter.shape)} by config.json"
            raise InputError(folder, f"{name} has shape {shapes}", mend)
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise InputError(folder, f"{name} is {tensor.dtype}, {tensor.layout}", "use plain floating-point weights")
        if not tensor.float().isfinite().all():
            raise InputError(folder, f"{name} holds NaN or infinity", "use undamaged weights")
    head, embedding = found.get("lm_head.weight"), found["transformer.wte.weight"]
    if head is not None and not (head.shape == embedding.shape and torch.equal(head, embedding)):
        raise InputError(folder, "its head is not tied to its embedding", "only tied GPT-2 weights are supported")
    layers = {name.split(".")[2] for name in found if name.startswith("transformer.h.")}
    if len(layers) > model.config.n_layer:
        raise InputError(
            folder, f"{len(layers)} layers in the weights, {model.config.n_layer} by config.json", "correct n_layer"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index, path = folder / "model.safetensors.index.json", folder / WEIGHTS
    try:
        if path.is_file():
            return _load(path)
        if index.is_file():
            path = index
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if any(Path(shard).name != shard for shard in shards):
                raise ValueError("it names a file outside its folder")
            return {name: tensor for shard in sorted(shards) for name, tensor in _load(folder / shard).items()}
        path = folder / "pytorch_model.bin"
        if path.is_file():
            with path.open("rb") as stream:
                _refuse_more_than_tensors(stream)
                content = torch.load(stream, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not all(
                isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
            ):
                raise ValueError("it holds something else than named tensors")
            return content
    except Exception as error:  # whatever a damaged file makes the parsers raise
        reason = f"unreadable weights ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        raise InputError(path, reason, "fetch the file again, or train with --from-scratch") from error
    raise InputError(
        folder, "no weights (model.safetensors or pytorch_model.bin)", "add them, or train with --from-scratch"
    )


def _load(path: Path) -> dict[str, Tensor]:
    with spelled(path) as name:
        return load_file(name)


_PLAIN = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
)


def _refuse_more_than_tensors(stream: BinaryIO) -> None:
    """Raises ValueError for a .bin of anything but ordinary tensors, or of more than its size: `weights_only` keeps code out, but builds
    sparse, nested and quantized tensors, ones without memory, and ones that take far more of it than the file. Leaves `stream` at its start."""
    if stream.read(4) == b"PK\3\4":
        entries = zipfile.ZipFile(stream).infolist()
        if sum(entry.file_size for entry in entries) > stream.seek(0, os.SEEK_END):
            raise ValueError("it is compressed, and larger than it looks")
        pickles = [zipfile.ZipFile(stream).read(entry) for entry in entries if entry.filename.endswith("data.pkl")]
        parts: list[Any] = [io.BytesIO(content) for content in pickles]
    else:
        stream.seek(0)
        parts = [stream] * 4  # of the form before 1.6: a number, a version, a machine, and what was saved
    for part in parts:
        for opcode, argument, _ in pickletools.genops(part):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"its pickle uses {opcode.name}")
            if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
                raise ValueError(f"it holds {argument}, not ordinary tensors")
    stream.seek(0)


def save_folder(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer_files: Iterable[Path]
) -> None:
    """Write a model folder that transformers loads with no further argument; `folder` appears whole or not at all.

    weights: as of `GPT2.state_dict()`, on any device. config: of config.json. An existing folder is replaced. Raises OSError.
    """
    write_folder(folder, weights, companions(config, tokenizer_files))


def companions(config: Mapping[str, Any], tokenizer_files: Iterable[Path]) -> dict[str, bytes]:
    """What a model folder holds beside its weights, by name."""
    card = json.dumps(config, indent=2) + "\n"
    return {path.name: path.read_bytes() for path in tokenizer_files} | {"config.json": card.encode()}


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
    dropout = {name: getattr(config, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    return {**kept, **dropout, **special, "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
