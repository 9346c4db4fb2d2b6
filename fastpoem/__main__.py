"""`fastpoem COMMAND …`, also `python -m fastpoem`: one name for the commands, each of which is a module of its own and is imported only when
it is called. A command whose module is not there is not listed."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from fastpoem import cli
from fastpoem.errors import InputError
from fastpoem.version import __version__

COMMANDS = {  # in the order in which somebody comes to need them
    "train": "train a model on poems",
    "generate": "write poems with a trained model",
    "evaluate": "loss, perplexity and accuracy of a model on a text",
    "report": "a page with the curves, poems and settings of runs",
    "demo": "a page in the browser to write poems on",
    "prepare": "turn a text into a token store, and say what is in it",
    "doctor": "check this machine, and say what training will use and why",
}
SHELLS = ("bash", "zsh")
USAGE = """usage: {called} COMMAND [flags]

{commands}

{called} COMMAND --help       its flags
{called} --version
{called} --print-completion bash|zsh
"""


def available() -> dict[str, str]:
    """The commands that there are, each with a line of what it does."""
    return {name: does for name, does in COMMANDS.items() if find_spec(f"fastpoem.{name}") is not None}


def main(argv: Sequence[str] | None = None) -> None:
    """The console script."""
    cli.run_command(lambda: dispatch([*(sys.argv[1:] if argv is None else argv)]))


def dispatch(argv: Sequence[str]) -> int | None:
    """Run the command that `argv` names. Raises InputError where there is none of that name."""
    called = "python -m fastpoem" if sys.argv[0].endswith("__main__.py") else "fastpoem"
    first, *rest = argv or ["--help"]
    commands = available()
    if first in cli.HELP or first == "help":
        width = max(map(len, commands))
        listed = "\n".join(f"  {name:<{width}}  {does}" for name, does in commands.items())
        print(USAGE.format(called=called, commands=listed), end="")
        return 0
    if first == "--version":
        print(f"fastpoem {__version__}")
        return 0
    if first == "--print-completion":
        if rest not in [[shell] for shell in SHELLS]:
            raise InputError(" ".join([first, *rest])[:80], "no such shell", f"use {' or '.join(SHELLS)}")
        print(completion(rest[0]), end="")
        return 0
    if first not in commands:
        near = difflib.get_close_matches(first.removeprefix("--"), commands, n=1, cutoff=0.5)
        mend = (
            f"did you mean {called} {near[0]}?" if near else f"use {', '.join([*commands][:-1])} or {[*commands][-1]}"
        )
        raise InputError(first[:80] or "''", "no such command", mend)
    cli.called(called)
    code: int | None = _module(first).main(rest)
    return code


def _module(command: str) -> Any:
    spec = find_spec(f"fastpoem.{command}")
    assert spec is not None
    return importlib.import_module(f"{spec.name}.__main__" if spec.submodule_search_locations else spec.name)


def _settings(command: str) -> type | None:
    """The dataclass that a command's flags are made of: the last one of its module that is named after it."""
    found = [one for one in vars(_module(command)).values() if isinstance(one, type) and dataclasses.is_dataclass(one)]
    return next((one for one in reversed(found) if one.__name__.lower().startswith(command)), None)


COMPLETION = """# fastpoem's completion for {shell}: eval "$(fastpoem --print-completion {shell})"
{before}_fastpoem() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else case "${{COMP_WORDS[1]}} $before" in
{choices}
    *) case "${{COMP_WORDS[1]}}" in
{flags}
    esac ;;
    esac fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fastpoem fastpoem
"""


def completion(shell: str) -> str:
    """What a shell is to be told for the tab key: commands, their flags, and the values of flags that have a choice; else files."""
    flags, choices, commands = [], [], available()
    for command in commands:
        if (settings := _settings(command)) is None:
            continue
        found = cli.kinds(settings)
        names = [cli.flag_of(name) for name in found]
        flags.append(f'    {command}) words="{" ".join([*names, "--help"])}" ;;')
        choices += [
            f'    "{command} {cli.flag_of(name)}") words="{" ".join(kind.choices)}" ;;'
            for name, kind in found.items()
            if kind.choices
        ]
    before = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return COMPLETION.format(
        shell=shell, before=before, commands=" ".join(commands), choices="\n".join(choices), flags="\n".join(flags)
    )


if __name__ == "__main__":
    main()
