"""`python -m fastpoem.train`: the main job."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from fastpoem import signals
from fastpoem.cli import parse, prog, read, run_command
from fastpoem.config import GROUPS, TrainConfig, with_defaults
from fastpoem.config_file import with_file
from fastpoem.errors import InputError, rank

SLOW = ("rich.progress", "numpy", "torch", "tokenizers", "fastpoem.doctor.trust", "fastpoem.run.fit")


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    config: str | None = None
    """A file of settings, in TOML (`lr = 1e-4`), or the config.json of a run. Explicit flags override it."""
    dry_run: bool = False
    """Check everything, print the plan, time a few steps, and write nothing."""


TrainCommand.__doc__ = TrainConfig.__doc__


def main(argv: Sequence[str] | None = None) -> int:
    argv = [*(sys.argv[1:] if argv is None else argv)]
    config, dry_run = read_settings(argv)

    signals.imported("fastpoem.run.console")
    from fastpoem.run.console import Voice

    voice = Voice(config.quiet or rank() > 0, config.lang)  # of several processes the first speaks
    # It takes seconds, for which --help or a wrong flag should not wait. In a pipe nothing is said before it is known what goes wrong.
    with voice.phase("loading PyTorch") if voice.live else nullcontext():
        signals.imported(*SLOW)
    from fastpoem.run.fit import fit

    if dry_run:
        from fastpoem.run.rehearsal import rehearse

        rehearse(config, voice)
        return 0
    run = fit(config, voice, prog("generate"))
    if run.stopped_by is not None:
        again = [*argv, *([] if config.out else ["--out", str(run.folder)]), *([] if config.resume else ["--resume"])]
        voice.say("stopped after a complete checkpoint; go on with: {0}", f"{_called()} {shlex.join(again)}")
        return 128 + run.stopped_by
    return 0


def _called() -> str:
    """How this command was started."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return prog("train") if processes == "1" else f"torchrun --nproc-per-node {processes} -m fastpoem.train"


def read_settings(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """(the checked settings of a command line: its flags, over those of --config, over the defaults; whether it is a dry run).
    Raises InputError."""
    given = parse(TrainCommand, argv, prog=prog("train"), groups=GROUPS)
    flags = read(TrainCommand, argv)
    flags.pop("config", None), flags.pop("dry_run", None)
    named = flags if given.config is None else with_file(given.config, flags)
    config = replace(with_defaults(TrainConfig(**named), named), **named).check()
    if given.dry_run and config.resume:
        raise InputError("--dry-run", "looks at a run that begins", "leave out --resume, or --dry-run")
    return config, given.dry_run


if __name__ == "__main__":
    run_command(main)
