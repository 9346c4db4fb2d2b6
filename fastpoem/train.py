"""`python -m fastpoem.train`: the main job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from fastpoem import signals
from fastpoem.cli import parse, read, run_command
from fastpoem.config import TrainConfig, with_defaults

PROG = "python -m fastpoem.train"
SLOW = ("rich.progress", "numpy", "torch", "tokenizers", "fastpoem.doctor.trust", "fastpoem.run.fit")


def main(argv: Sequence[str] | None = None) -> int:
    argv = [*(sys.argv[1:] if argv is None else argv)]
    given = parse(TrainConfig, argv, prog=PROG)
    config = parse(TrainConfig, argv, prog=PROG, default=with_defaults(given, read(TrainConfig, argv))).check()

    signals.imported(*SLOW)  # torch takes seconds to import, and --help or a wrong flag should not wait for it
    from fastpoem.run.fit import fit
    from fastpoem.run.metrics import Voice

    voice = Voice()
    run = fit(config, voice)
    if run.stopped_by is not None:
        again = [*argv, *([] if config.out else ["--out", str(run.folder)]), *([] if config.resume else ["--resume"])]
        voice.say(f"stopped after a complete checkpoint; go on with: {PROG} {shlex.join(again)}")
        return 128 + run.stopped_by
    return 0


if __name__ == "__main__":
    run_command(main)
