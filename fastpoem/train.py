"""`python -m fastpoem.train`: the main job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from fastpoem.cli import parse, run_command
from fastpoem.config import TrainConfig, with_defaults


def main(argv: Sequence[str] | None = None) -> int:
    prog = "python -m fastpoem.train"
    given = parse(TrainConfig, argv, prog=prog)
    config = parse(TrainConfig, argv, prog=prog, default=with_defaults(given)).check()

    from fastpoem.run.fit import fit  # torch takes seconds to import, and --help or a wrong flag should not wait for it
    from fastpoem.run.metrics import Voice

    voice = Voice()
    run = fit(config, voice)
    if run.stopped_by is not None:
        again = [*(sys.argv[1:] if argv is None else argv)]
        again += [] if config.out else ["--out", str(run.folder)]
        again += [] if config.resume else ["--resume"]
        voice.say(f"stopped after a complete checkpoint; go on with: {prog} {shlex.join(again)}")
        return 128 + run.stopped_by
    return 0


if __name__ == "__main__":
    run_command(main)
