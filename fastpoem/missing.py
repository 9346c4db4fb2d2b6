"""What to do where a library is not installed, in one line: on a machine without a network each wheel has to be carried there, so all that
are missing are named at once. Which those are is written down here, since the library's own metadata is missing with it.
"""

from __future__ import annotations

from importlib.util import find_spec

from fastpoem.errors import InputError

WHEELS = {
    "numpy": "numpy",
    "torch": "torch",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "rich": "rich",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "pygments": "pygments",
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "typing_extensions": "typing-extensions",
}
"""By what each is imported as: what no command does without (tyro only --help), and all that rich and tyro ask for in turn."""


def missing(module: str | None) -> InputError | None:
    """The user's line for a module that was not found. None where it is no library of WHEELS: then it is a bug."""
    name = (module or "").partition(".")[0]
    if name == "fastpoem_kernels":
        mend = "install fastpoem, or from its folder begin the command with PYTHONPATH=.:kernels"
        return InputError(name, "is not on Python's path", mend)
    if name not in WHEELS:
        return None
    wheels = " ".join(wheel for one, wheel in WHEELS.items() if one == name or not _found(one))
    reason = "is not installed" + (", and only --help needs it" if name == "tyro" else "")
    mend = f"pip install {wheels}; where there is no network, pip download the same elsewhere and carry the wheels here"
    return InputError(WHEELS[name], reason, mend)


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
