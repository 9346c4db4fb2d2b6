"""Poems a second: the notebook, Hugging Face's Trainer (plain, on sorted batches, and there in bf16 too where that pays) and fastpoem, in turn on the
same corpus and the same model.

The model has the full shape, 59.5 M parameters. `extra_info` has poems, real tokens and padded positions of each turn beside the worker's own seconds.
FASTPOEM_BENCH_STEPS sets the steps of each contender (a multiple of four); else 16, or fewer where by the notebook's first one
that would take more than some minutes. Sixteen on the CPU take some 18 GB of memory: at its longest batch, of 510 tokens, the notebook has 12 of them.
"""

import contextlib
import os

import pytest
import torch

from benchmarks import race
from benchmarks.devices import DEVICES
from benchmarks.scene import FULL

pytestmark = pytest.mark.timeout(900)  # slow machines: a turn of the notebook's, and everybody's start before it
TURNS = 4
MOST, SECONDS = 16, 270.0


@pytest.fixture(scope="module", params=DEVICES)
def contest(request, scene):
    """(turn of a contender, device): what it took, and the figures of its batches."""
    programme = race.Programme(scene.store(), device=request.param)
    sample, names = programme.evenly(TURNS), programme.contenders
    with race.start(scene, FULL, names, device=request.param, precision=names["fastpoem"]) as contenders:
        slow = 0.0
        for name, one in contenders.items():  # what only first steps pay
            with contextlib.suppress(RuntimeError):  # its turns will say why
                took = one.turn(sample[name].part([0]))["seconds"]
                if name == "notebook":
                    slow = took / programme.figures(sample[name].part([0]))["padded"]
        steps = int(os.environ.get("FASTPOEM_BENCH_STEPS", 0)) or MOST
        while "FASTPOEM_BENCH_STEPS" not in os.environ and steps > TURNS:
            positions = sum(programme.figures(batches)["padded"] for batches in programme.evenly(steps).values())
            if slow * positions <= SECONDS:
                break
            steps -= TURNS
        chosen, hands = programme.evenly(steps), race.dealt(steps, TURNS)

        def turn(name, number):
            mine = chosen[name].part(hands[number])
            return contenders[name].turn(mine) | programme.figures(mine)

        yield turn, request.param, names


@pytest.mark.parametrize("contender", race.everyone())
@pytest.mark.parametrize("number", range(TURNS))
def test_poems_per_second(benchmark, scene, contest, number, contender):
    turn, device, names = contest
    if contender not in names:
        pytest.skip(f"bf16 is not what pays on {device}")
    benchmark.group = f"throughput on {device}, turn {number}"
    took = benchmark.pedantic(turn, args=(contender, number), rounds=1)
    benchmark.extra_info.update(
        kind="throughput", contender=contender, precision=names[contender], contenders=[*names], turn=number, device=device,
        corpus=scene.poems, threads=torch.get_num_threads(), poems_per_s=took["poems"] / took["seconds"], **took,
    )  # fmt: skip
