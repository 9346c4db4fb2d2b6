"""Writes docs/settings.md from the settings' own declarations: `python docs/settings.py`. A test holds the page to them."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
COMMANDS = {
    "train": ("fastpoem.train", "TrainCommand"),
    "generate": ("fastpoem.generate", "GenerateCommand"),
    "evaluate": ("fastpoem.evaluate", "EvaluateConfig"),
    "report": ("fastpoem.report", "ReportConfig"),
    "demo": ("fastpoem.demo", "DemoConfig"),
    "prepare": ("fastpoem.prepare", "PrepareConfig"),
    "doctor": ("fastpoem.doctor.__main__", "DoctorConfig"),
}
HEAD = """# Settings

Made from the code by `python docs/settings.py`. A flag is the setting's name with `--` before it; a dash or an underscore is your choice. In Python the names are the arguments of `fastpoem.fit` and `run.generate`; `fit` also takes [`on_log` and `on_epoch`](usage.md#in-a-notebook).
`--recipe` changes some defaults of training; explicit flags override it.
"""


def declared(cls: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, help) of each field, in order, all as they are written in the source."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = [] if cls.__base__ in (None, object) else declared(cls.__base__)
    for one, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
            text = " ".join(str(ast.literal_eval(after.value)).split())
            default = ast.unparse(one.value) if one.value is not None else ""
            found.append((one.target.id, ast.unparse(one.annotation), default, text))
    return found


def flag(name: str, kind: str) -> str:
    word = name.replace("_", "-")
    if kind == "bool":
        return f"--{word}"
    if kind.startswith("Literal["):
        return f"--{word} " + r"\|".join(part.strip(" '") for part in kind[8:-1].split(","))
    return f"--{word} …" if kind.startswith("tuple") else f"--{word} {kind.split(' |')[0]}"


def shown(kind: str, default: str) -> str:
    if kind == "bool":
        return "on" if default == "True" else "off"
    return "" if default in ("", "()", "None") else f"`{default.strip(chr(39))}`"


def page() -> str:
    parts = [HEAD]
    for command, (module, name) in COMMANDS.items():
        rows = declared(getattr(importlib.import_module(module), name))
        parts.append(f"## fastpoem {command}\n\n| flag | default | |\n| --- | --- | --- |")
        for field, kind, default, text in rows:
            off = f"--no-{field.replace('_', '-')}" if (kind, default) == ("bool", "True") else flag(field, kind)
            parts[-1] += f"\n| `{off}` | {shown(kind, default)} | {text.replace('|', chr(92) + '|')} |"
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parent.parent))
    PAGE.write_text(page(), encoding="utf-8")
