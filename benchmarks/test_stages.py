"""Where a step's time goes: each of its stages alone, and the step whole, at the full shape and the commonest length.

A stage is given what the stages before it leave, made anew outside the clock. (Preparing a corpus has a file of its own.)
"""

import itertools

import pytest
from fastpoem_kernels import cross_entropy

from benchmarks import race
from benchmarks.arithmetic import model_flops, settle
from benchmarks.scene import BATCH, DEVICES, FULL, LENGTH, Scene, made_up_batch, make_step
from fastpoem.corpus.feed import IGNORE, Feed

ROUNDS = 7


@pytest.fixture(scope="module", params=DEVICES)
def engine(request):
    """The step, its batch and the device's name."""
    step, batch = make_step(FULL, request.param), made_up_batch(FULL, BATCH, LENGTH, request.param)
    step(batch, 2e-5)
    return step, batch, request.param


def stages(step, batch):
    """{stage: (what it is given, what it does with it)}."""
    model, targets = step.model, batch.targets.flatten()
    forward = lambda: model(batch.inputs, None)
    loss = lambda logits: cross_entropy(logits, targets, IGNORE).loss
    return {
        "forward": (lambda: (), forward),
        "loss": (lambda: (forward(),), loss),
        "backward": (lambda: (loss(forward()),), lambda value: value.backward()),
        "update": (lambda: (loss(forward()).detach(),), step.optimizer.step),
        "step": (lambda: (), lambda: step(batch, 2e-5)),
    }


@pytest.mark.parametrize("stage", ["forward", "loss", "backward", "update", "step"])
def test_stage(benchmark, engine, stage):
    step, batch, device = engine
    given, run = stages(step, batch)[stage]

    def setup():
        before = given()
        settle(device)
        return before, {}

    def timed(*before):
        run(*before)
        settle(device)

    benchmark.group = f"stages of a step, {BATCH} poems of {LENGTH} tokens on {device}"
    benchmark.extra_info.update(kind="stage", stage=stage, device=device)
    if stage == "step":
        benchmark.extra_info.update(tokens=batch.tokens, flops=model_flops(FULL, [LENGTH - 1] * BATCH))
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=1)


def test_feed(benchmark, scene: Scene):
    """From the number of a step to its batch as tensors, along an epoch."""
    store = scene.store()
    order, feed, number = race.Programme(store).order, Feed(store, "bucket"), itertools.count()
    order(0, 0)
    benchmark.group = f"stages of a step, {BATCH} poems"
    benchmark.extra_info.update(kind="stage", stage="feed", device="cpu", corpus=scene.poems)
    benchmark.pedantic(lambda: feed(order(0, next(number) % order.steps)), rounds=200, warmup_rounds=20)
