"""`python -m fastpoem.generate`: poems from a trained model, printed as they are written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from fastpoem import signals
from fastpoem.cli import parse, prog, run_command
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.poems import poems
from fastpoem.generation.poems import sample as sample


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(GenerateConfig, argv, prog=prog("generate")).check()

    signals.imported("torch")  # which takes seconds
    from fastpoem.run.trained import trained_model

    model = trained_model(config.model, lambda line: print(f"fastpoem: {line}", file=sys.stderr))
    for poem in poems(dataclasses.replace(config, model=model)):
        print(poem, end="\n\n" if "\n" in poem else "\n", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
