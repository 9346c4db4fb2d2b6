"""How much of the machine's best matrix product a step is worth: model FLOPs on real tokens a second, over the fastest product of its shapes in
the same precision.

Batches evenly spaced by length over the corpus, the products timed in turn with them. The formula is in `benchmarks.arithmetic`.
"""

import pytest

from benchmarks import race
from benchmarks.arithmetic import best_product, model_flops, products, settle
from benchmarks.devices import DEVICES
from benchmarks.scene import BATCH, FULL, LENGTH, make_step
from fastpoem.corpus.feed import Feed

STEPS, ROUNDS = 8, 3


@pytest.mark.parametrize("device", DEVICES)
def test_share_of_the_best_product(benchmark, scene, device):
    store = scene.store()
    programme = race.Programme(store, device=device)
    step = make_step(FULL, device, longest=512, dtype=programme.dtype)
    feed = Feed(store, programme.batching)
    chosen = programme.evenly(STEPS)["fastpoem"]
    batches = [feed(programme.order(0, number)) for number in chosen.steps or []]
    flops = model_flops(FULL, [int(programme.lengths[row]) - 1 for rows in chosen.rows for row in rows])
    best = []

    def product():
        best.append(best_product(products(FULL, BATCH * (LENGTH - 1)), programme.dtype, device))

    def train():
        for batch in batches:
            step(batch, 2e-5)
        settle(device)

    step(batches[-1], 2e-5)
    benchmark.group = f"share of the best product on {device}"
    benchmark.pedantic(train, setup=product, rounds=ROUNDS)
    rate = flops / benchmark.stats.stats.median
    benchmark.extra_info.update(
        kind="share", device=device, precision=programme.contenders["fastpoem"], corpus=scene.poems, flops=flops, flops_per_s=rate,
        best_product=max(best), share=rate / max(best),
    )  # fmt: skip
