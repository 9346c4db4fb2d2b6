"""argparse keeps the last of a flag given twice, without a word. Here that is an error, unless the flag collects its values."""

from __future__ import annotations

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose ordinary flags may be given once."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        for name in (None, "store"):
            self.register("action", name, _Once)


class _Once(argparse.Action):
    was_given = False

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.was_given:
            parser.error(f"{option_string or self.dest}: given twice; give it once")
        self.was_given = option_string is not None
        setattr(namespace, self.dest, values)
