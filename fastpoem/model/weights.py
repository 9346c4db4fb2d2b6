"""A model folder's weights, of whatever name and form, into ours: safetensors, or pytorch_model.bin as plain tensors and nothing else.

The same GPT-2 comes under many names: bare or below `transformer.`, behind the `module.` of DataParallel, the `_orig_mod.` of
torch.compile and the `model.` of a wrapper, and in the layout of UER-py and TencentPretrain, where the Chinese GPT-2s were trained. All are
brought to Hugging Face's names first, on tensors that may be without memory: so a folder is checked for presence, names and shapes from
the headers of its files alone, long before its weights are needed.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastpoem.errors import InputError
from fastpoem.model.gpt2 import GPT2, GPT2Config, count_parameters
from fastpoem.paths import spelled

WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
EMBEDDING = "transformer.wte.weight"
WRAPPERS = ("module.", "_orig_mod.", "model.")
INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where a saved training state keeps the weights
MEND = "use the weights that belong to this config.json"


def check_weights(shape: GPT2Config, folder: Path, rows: int | None = None) -> None:
    """Raises InputError where `load_weights` would for what the files' headers tell: names, shapes and kinds, not the numbers."""
    with torch.device("meta"):
        wanted = GPT2(shape).state_dict()
    _matched(wanted, shape, folder, shape.vocab_size if rows is None else rows, values=False)


def load_weights(model: GPT2, folder: Path, rows: int | None = None) -> None:
    """Copy a folder's weights into `model`. Raises InputError where they are missing, damaged or of another shape.

    rows: how many rows the folder's embedding has, where the model has more; the others stay as they are.
    """
    wanted = model.state_dict()
    found = _matched(wanted, model.config, folder, model.config.vocab_size if rows is None else rows, values=True)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter[: len(found[name])].copy_(found[name])


def _matched(
    wanted: Mapping[str, Tensor], shape: GPT2Config, folder: Path, rows: int, *, values: bool
) -> dict[str, Tensor]:
    """The folder's weights by our names, all of `wanted` among them; without `values`, tensors that need not have any."""
    most = 32 * count_parameters(shape) + 8 * shape.n_layer * shape.n_positions**2 + (1 << 20)  # with masks, in double
    try:
        size = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    except OSError as error:  # a link to nothing
        raise InputError(error.filename, f"cannot be read ({error.strerror})", "fetch the model folder again") from None
    if size > most:
        raise InputError(folder, f"holds {size:,} bytes of weights, its model needs a fraction of them", MEND)
    saved = _read_tensors(folder, values=values)
    found = _by_our_names(saved, folder)
    if wanted.keys().isdisjoint(found):
        names = ", ".join(sorted(saved)[:3]) or "nothing"
        raise InputError(folder, f"its weights are no GPT-2's: they hold {names} …", MEND)
    for name, parameter in wanted.items():
        if name not in found:
            raise InputError(folder, f"its weights lack {name}", MEND)
        tensor, goal = found[name], tuple(parameter.shape)
        if name == EMBEDDING:
            goal = (rows, *goal[1:])
        if tensor.shape != goal:
            raise InputError(
                folder, f"{name} has shape {tuple(tensor.shape)} in the weights, {goal} by config.json", MEND
            )
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise InputError(folder, f"{name} is {tensor.dtype}, {tensor.layout}", "use plain floating-point weights")
        if values and not tensor.float().isfinite().all():
            raise InputError(folder, f"{name} holds NaN or infinity", "use undamaged weights")
    head, embedding = found.get("lm_head.weight"), found[EMBEDDING]
    if head is not None and (head.shape != embedding.shape or (values and not torch.equal(head, embedding))):
        raise InputError(folder, "its head is not tied to its embedding", "only tied GPT-2 weights are supported")
    layers = {name.split(".")[2] for name in found if name.startswith("transformer.h.")}
    if len(layers) > shape.n_layer:
        raise InputError(
            folder, f"{len(layers)} layers in the weights, {shape.n_layer} by config.json", "correct n_layer"
        )
    return found


def _by_our_names(saved: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same tensors by the names of Hugging Face's GPT2LMHeadModel."""
    bare: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        if name.startswith(("encoder.transformer.", "encoder.layer_norm.", "embedding.", "target.")):
            bare[name] = tensor
        else:
            bare[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    if len(bare) < len(saved):
        raise InputError(folder, "two of its weights have the same name but for a prefix", "keep one of the two")
    return _from_uer(bare) if any(name.startswith("encoder.transformer.") for name in bare) else bare


_UER = {
    "embedding.word.embedding.weight": EMBEDDING,
    "embedding.pos.embedding.weight": "transformer.wpe.weight",
    "embedding.word_embedding.weight": EMBEDDING,  # these two, and the head's second name, before 2022
    "embedding.position_embedding.weight": "transformer.wpe.weight",
    "encoder.layer_norm.gamma": "transformer.ln_f.weight",
    "encoder.layer_norm.beta": "transformer.ln_f.bias",
    "target.lm.output_layer.weight": "lm_head.weight",
    "target.output_layer.weight": "lm_head.weight",
}
_UER_LAYER = {
    "layer_norm_1.gamma": "ln_1.weight",
    "layer_norm_1.beta": "ln_1.bias",
    "layer_norm_2.gamma": "ln_2.weight",
    "layer_norm_2.beta": "ln_2.bias",
    "self_attn.final_linear.weight": "attn.c_proj.weight",
    "self_attn.final_linear.bias": "attn.c_proj.bias",
    "feed_forward.linear_1.weight": "mlp.c_fc.weight",
    "feed_forward.linear_1.bias": "mlp.c_fc.bias",
    "feed_forward.linear_2.weight": "mlp.c_proj.weight",
    "feed_forward.linear_2.bias": "mlp.c_proj.bias",
}


def _from_uer(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UER-py's and TencentPretrain's layout: matrices are (out, in), and query, key and value three of their own. What has no place in
    a GPT-2 keeps its name. https://github.com/dbiir/UER-py, scripts/convert_gpt2_from_uer_to_huggingface.py"""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in saved.items():
        _, _, rest = name.partition("encoder.transformer.")
        layer, _, inner = rest.partition(".")
        if match := re.fullmatch(r"self_attn\.linear_layers\.([012])\.(weight|bias)", inner):
            parts.setdefault(f"transformer.h.{layer}.attn.c_attn.{match[2]}", {})[int(match[1])] = tensor
        elif inner in _UER_LAYER:
            found[f"transformer.h.{layer}.{_UER_LAYER[inner]}"] = tensor.t() if tensor.dim() == 2 else tensor
        else:
            found[_UER.get(name, name)] = tensor
    for name, three in parts.items():
        if len(three) == 3 and len({tensor.shape for tensor in three.values()}) == 1:
            joined = torch.cat([three[part] for part in range(3)])
            found[name] = joined.t() if joined.dim() == 2 else joined
    return found


def _read_tensors(folder: Path, *, values: bool) -> dict[str, Tensor]:
    path = folder
    try:
        for name in (WEIGHTS, BIN):
            read = _safetensors if name == WEIGHTS else _bin
            path = folder / name
            if path.is_file():
                return read(path, values)
            path = folder / f"{name}.index.json"
            if path.is_file():
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                if any(Path(shard).name != shard for shard in shards):
                    raise ValueError("it names a file outside its folder")
                return {
                    name: tensor for shard in sorted(shards) for name, tensor in read(folder / shard, values).items()
                }
    except Exception as error:  # whatever a damaged file makes the parsers raise
        reason = f"unreadable weights ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        raise InputError(path, reason, "fetch the file again, or train with --from-scratch") from error
    raise _without_weights(folder)


def _without_weights(folder: Path) -> InputError:
    """What to say of a folder without weights that we read: it may hold some under another name or in another form."""
    reason, mend = f"no weights ({WEIGHTS} or {BIN})", "add them, or train with --from-scratch"
    if (folder / "adapter_model.safetensors").is_file() or (folder / "adapter_model.bin").is_file():
        return InputError(
            folder, f"{reason}, but an adapter of PEFT", "merge it into its model first (merge_and_unload)"
        )
    others = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
    )
    others = [name for name in others if not re.search("optimizer|scheduler|training_args|rng_state", name)]
    if others:
        goal = WEIGHTS if others[0].endswith(".safetensors") else BIN
        mend = (
            f"if {others[0]} is the model, rename it to {goal}; otherwise add the weights, or train with --from-scratch"
        )
    elif foreign := sorted(
        path.name for path in folder.glob("*") if path.suffix in (".h5", ".msgpack", ".gguf", ".onnx")
    ):
        reason += f", but {foreign[0]}"
    return InputError(folder, reason, mend)


def _safetensors(path: Path, values: bool) -> dict[str, Tensor]:
    with spelled(path) as name:
        if values:
            return load_file(name)
        with safe_open(name, framework="pt") as stream:
            slices = {key: stream.get_slice(key) for key in stream.keys()}  # noqa: SIM118  (no mapping)
            return {
                key: torch.empty(part.get_shape(), dtype=_KINDS.get(part.get_dtype(), torch.int8), device="meta")
                for key, part in slices.items()
            }


_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_KINDS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def _bin(path: Path, values: bool) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        _refuse_more_than_tensors(stream)
        if values or not zipfile.is_zipfile(path):  # the form before torch 1.6 can only be read whole
            content = torch.load(stream, map_location="cpu", weights_only=True)
        else:
            with spelled(path) as name:
                content = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(content, dict):
        content = next((content[key] for key in INSIDE if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError("it holds something else than named tensors")
    return content


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
