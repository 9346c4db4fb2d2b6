"""Where a step's time goes: each of its stages alone, and the step whole, at the full shape and the commonest length.

A stage is given what the stages before it leave, made anew outside the clock. (Preparing a corpus has a file of its own.)
"""

import itertools

import pytest
from fastpoem_kernels import cross_entropy

from benchmarks import race
from benchmarks.arithmetic import model_flops, settle
from benchmarks.devices import DEVICES
from benchmarks.precision import dtype_on
from benchmarks.scene import BATCH, FULL, LENGTH, Scene, made_up_rows, make_step
from fastpoem.corpus.feed import Feed
from fastpoem.engine.batch import IGNORE, assemble
from fastpoem.run.folder import PRECISIONS

ROUNDS = 7


@pytest.fixture(scope="module", params=DEVICES)
def engine(request):
    """The step, what it trains on, and the device's name."""
    step, rows = make_step(FULL, request.param, dtype=dtype_on(request.param)), made_up_rows(FULL, BATCH, LENGTH)
    step(rows, 2e-5)
    return step, rows, request.param


def stages(step, rows):
    """{stage: (what it is given, what it does with it)}."""
    step.send(rows, 2e-5)
    batch = assemble(step.source, step.message[:-1], rows.shape, step.pad_id)
    model, targets = step.pieces.model, batch.targets.flatten()
    forward = lambda: model(batch.inputs, None)
    loss = lambda logits: cross_entropy(logits, targets, IGNORE).loss
    return {
        "forward": (lambda: (), forward),
        "loss": (lambda: (forward(),), loss),
        "backward": (lambda: (loss(forward()),), lambda value: value.backward()),
        "update": (lambda: (loss(forward()).detach(),), step.optimizer.step),
        "step": (lambda: (), lambda: step(rows, 2e-5)),
    }


@pytest.mark.parametrize("stage", ["forward", "loss", "backward", "update", "step"])
def test_stage(benchmark, engine, stage):
    step, rows, device = engine
    given, run = stages(step, rows)[stage]

    def setup():
        before = given()
        settle(device)
        return before, {}

    def timed(*before):
        run(*before)
        settle(device)

    benchmark.group = f"stages of a step, {BATCH} poems of {LENGTH} tokens on {device}"
    benchmark.extra_info.update(kind="stage", stage=stage, device=device, precision=PRECISIONS[dtype_on(device)])
    if stage == "step":
        benchmark.extra_info.update(tokens=rows.tokens, flops=model_flops(FULL, [LENGTH - 1] * BATCH))
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=1)


def test_feed(benchmark, scene: Scene):
    """From the number of a step to its batch as tensors, along an epoch."""
    store = scene.store()
    order, feed, number = race.Programme(store).order, Feed(store, "bucket"), itertools.count()
    order(0, 0)

    def batch():
        rows = feed(order(0, next(number) % order.steps))
        assemble(rows.source, rows.where, rows.shape, store.pad_id)

    benchmark.group = f"stages of a step, {BATCH} poems"
    benchmark.extra_info.update(kind="stage", stage="feed", device="cpu", corpus=scene.poems)
    benchmark.pedantic(batch, rounds=200, warmup_rounds=20)
