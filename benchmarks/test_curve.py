"""Loss against time: a small model from random weights, every contender given the same seconds of training in turn.

The loss is that of held-out poems over their real tokens, and at the end it is counted how many of the poems that each writes are in a form and rhyme: by the same
code for all, outside the clock. All take AdamW at one constant rate and clip at 1.0.
"""

import pytest

from benchmarks import race
from benchmarks.devices import DEVICES
from benchmarks.scene import SMALL

pytestmark = pytest.mark.timeout(900)  # slow machines: a turn of the notebook's, and everybody's start before it
TURNS, SECONDS = 4, 4.0
HELD_OUT, RATE = 256, 5e-4
ENOUGH = 500  # steps for the fastest, on a machine ten times as fast as two cores


@pytest.fixture(scope="module", params=DEVICES)
def contest(request, scene):
    programme = race.Programme(scene.store(), HELD_OUT, request.param)
    batches = programme.epoch(min(programme.order.steps, TURNS * ENOUGH))
    names, settings = programme.contenders, dict(device=request.param, lr=RATE, val_poems=HELD_OUT)
    done = dict.fromkeys(names, 0)
    curves = {name: [] for name in names}
    with race.start(scene, SMALL, names, precision=names["fastpoem"], **settings) as contenders:

        def turn(name):
            """Train on the next batches and return the whole curve, [(seconds, loss)]."""
            one, curve = contenders[name], curves[name]
            if not curve:
                curve.append((0.0, one.loss()))
            left = batches[name].part(range(done[name], min(done[name] + ENOUGH, len(batches[name].rows))))
            took = one.turn(left, SECONDS)
            done[name] += took["steps"]
            curve.append((curve[-1][0] + took["seconds"], one.loss()))
            return curve, done[name]

        yield turn, request.param, lambda name: contenders[name].written(), names


@pytest.mark.parametrize("contender", race.everyone())
@pytest.mark.parametrize("number", range(TURNS))
def test_loss_against_time(benchmark, contest, number, contender):
    turn, device, written, names = contest
    if contender not in names:
        pytest.skip(f"bf16 is not what pays on {device}")
    benchmark.group = f"loss against time on {device}, turn {number}"
    curve, steps = benchmark.pedantic(turn, args=(contender,), rounds=1)
    benchmark.extra_info.update(
        kind="curve",
        contender=contender,
        precision=names[contender],
        turn=number,
        device=device,
        curve=list(curve),
        steps=steps,
    )
    if number == TURNS - 1:
        benchmark.extra_info.update(written(contender))
