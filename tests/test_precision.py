"""engine/precision: bfloat16 and float16 learn what float32 learns."""

import numpy as np
import pytest
import torch

from fastpoem.corpus.feed import Feed
from fastpoem.corpus.plan import BucketOrder
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_dtype
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.hub import BUNDLED


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision") / "store"
    prepare_store(BUNDLED / "poems.txt", PoemTokenizer.load(BUNDLED / "model"), folder, buckets=4)
    return TokenStore.open(folder)


def curve(store, dtype, steps, poems=16, wide=64, rate=1e-3):
    """The losses of so many steps on the bundled verses, (steps,) float64, from loss 7.6 to about 4.7."""
    held_out = [np.empty(0, np.int64)] * len(store.buckets)
    order = BucketOrder([b.length for b in store.buckets], [b.rows for b in store.buckets], held_out, poems, seed=0)
    model = GPT2(GPT2Config(store.vocab_size, 80, wide, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), torch.device("cpu"), dtype, weight_decay=0.01, max_norm=1.0)
    source = torch.zeros(poems * store.buckets[-1].length, dtype=torch.int16)
    step, feed = TrainStep(Pieces(model), optimizer, source, poems=poems, pad_id=store.pad_id), Feed(store, "bucket")
    losses = []
    for number in range(steps):
        step(feed(order(*divmod(number, order.steps))), rate)
        losses.append(step.result().loss)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
def test_bf16_follows_fp32_over_300_steps(store):
    """Means over 20 steps within 0.1%, single steps within 0.5%; seeds differ by up to 1.4%."""
    full, half = (curve(store, dtype, 300, poems=8) for dtype in (torch.float32, torch.bfloat16))
    assert full[:20].mean() > 7 and full[-20:].mean() < 5
    assert ((half - full) / full).abs().max() < 5e-3
    assert ((half - full).view(15, 20).mean(1) / full.view(15, 20).mean(1)).abs().max() < 1e-3


def test_fp16_on_a_cpu_is_said_to_be_slow():
    assert "slow on a CPU" in choose_dtype("fp16", torch.device("cpu"), None, 1)[1]


@pytest.fixture(scope="module")
def full(store):
    """(120,) float64, from a loss of 7.5 to 5.8 in fp32."""
    losses = curve(store, torch.float32, 120, poems=4, wide=32, rate=2e-3)
    assert losses[:4].mean() > 7 and losses[-20:].mean() < 6
    return losses


@pytest.mark.parametrize(("dtype", "each", "means"), [(torch.float16, 1e-3, 2e-4), (torch.bfloat16, 3e-3, 5e-4)])
def test_16_bits_follow_fp32_over_120_steps(store, full, dtype, each, means):
    """Every step, and means over 20 steps; no step is lost at fp16's first loss scale."""
    half = curve(store, dtype, 120, poems=4, wide=32, rate=2e-3)
    assert ((half - full) / full).abs().max() < each
    assert (half.view(6, 20).mean(1) / full.view(6, 20).mean(1) - 1).abs().max() < means
