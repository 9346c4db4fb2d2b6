"""Where a model's folder is: a local one, or the download of a Hugging Face name. Without torch, so that refusals do not wait for it."""

from __future__ import annotations

from pathlib import Path

from fastpoem.errors import InputError
from fastpoem.paths import given_path
from fastpoem.signals import imported, waiting

HUB_SECONDS = 10.0
_SHAPE = ["*.json", "vocab.txt"]
_WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]


def resolve_folder(name_or_dir: str, *, weights: bool = True) -> Path:
    """The local folder of a model: itself, or the download of a Hugging Face name, without its weights where only shape and tokenizer
    are wanted. Raises InputError where there is neither."""
    folder = given_path("--model", name_or_dir)
    try:
        if (folder / "config.json").is_file():
            return folder
        there = folder.exists()
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})", "check its permissions") from None
    if there:
        raise InputError(folder, "no model folder: it has no config.json", "name a folder in Hugging Face format")
    looks_local = folder.is_absolute() or name_or_dir.startswith(".") or name_or_dir.count("/") != 1
    looks_local = looks_local or Path(name_or_dir).parent.is_dir()  # runs/x, mistyped
    if looks_local:
        raise InputError(
            name_or_dir, "no such folder", "check the path, or give a Hugging Face name such as owner/model"
        )
    path = _fetch(name_or_dir, _SHAPE + _WEIGHTS if weights else _SHAPE)
    if not (path / "config.json").is_file():
        raise InputError(name_or_dir, "its repository has no config.json", "name a GPT-2 model in Hugging Face format")
    return path


def _fetch(name: str, wanted: list[str]) -> Path:
    """The folder of a Hugging Face name, from the hub, or from its cache where the hub does not answer in time."""
    imported("huggingface_hub")
    from huggingface_hub import HfApi, constants, snapshot_download

    refusal = None
    try:
        api = HfApi()
        waiting(
            lambda: api.repo_info(name, timeout=HUB_SECONDS)
        )  # snapshot_download asks the same without a time limit
    except Exception as error:  # the library raises a dozen kinds: no network, no such name, gated, offline mode
        refusal = error
    try:
        offline = refusal is not None
        return Path(waiting(lambda: snapshot_download(name, allow_patterns=wanted, local_files_only=offline)))
    except Exception as error:
        reason = f"it could not be fetched from the hub at {constants.ENDPOINT} ({type(refusal or error).__name__})"
        mend = "check the name and the network, set HF_ENDPOINT to a mirror, or give --model a folder fetched elsewhere"
        raise InputError(name, reason, mend) from error
