"""Poems a second: fastpoem and the loop it replaces, in turn, on the same corpus and the same model, each with the batches it makes.

Of each contestant's batches over the whole corpus those are trained on that are evenly spaced by length, so that a few steps stand for an
epoch (a small slice of the text would not do: what is left over of its sparse buckets would fill batches of the longest). The turns
alternate, so that a machine whose speed drifts slows both alike: compare the sums over all turns. The two share a process, so the notebook
too has the allocator that keeps its memory: it is the faster for it.

The model has the full shape where the shared data is there; else the bundled small one is used, and the groups say so.
FASTPOEM_BENCH_STEPS (default 16) is the number of steps of each.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from benchmarks import notebook
from fastpoem.config import from_kwargs
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.run.fit import assembled
from fastpoem.run.metrics import Voice

TURNS = 4
STEPS = max(1, int(os.environ.get("FASTPOEM_BENCH_STEPS", 16)) // TURNS) * TURNS
POEMS = STEPS // TURNS * 16  # a turn
SHARED = Path(os.environ.get("FASTPOEM_SHARED", Path(__file__).parents[2] / "shared"))
FULL = (SHARED / "data/poems.txt.xz").exists()


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """{contestant: turn -> trains a quarter of the poems}."""
    folder = tmp_path_factory.mktemp("throughput")
    data = SHARED / "data/poems.txt.xz" if FULL else hub.BUNDLED / "poems.txt"
    shape = SHARED / "models/gpt2-distil-chinese" if FULL else hub.BUNDLED / "model"
    config, raw = hub.read_config(shape)
    weights = GPT2(config)
    weights.initialise(0)
    model = folder / "model"
    hub.save_folder(model, weights.state_dict(), raw, [shape / name for name in ("vocab.txt", "tokenizer_config.json")])
    places = {"data": str(data), "model": str(model), "out": str(folder / "run"), "cache_dir": str(folder)}
    with assembled(from_kwargs(**places, val_poems=0, device="cpu"), Voice(quiet=True)) as (loop, _):
        order, store = loop.order, loop.feed.store
        ours = evenly(range(order.steps), lambda step: order(0, step).length)
        bucket, index = store.locate(np.arange(store.rows))
        length = np.array([store.buckets[b].lengths[i] for b, i in zip(bucket.tolist(), index.tolist(), strict=True)])
        batches = (
            np.random.default_rng(0).permutation(store.rows)[: store.rows // 16 * 16].reshape(-1, 16)
        )  # as a shuffling DataLoader
        lines = notebook.Poems(data).lines
        theirs = [[lines[row] for row in batch] for batch in evenly(batches, lambda batch: length[batch].max())]
        network, tokenizer = (
            notebook.load_model(model, from_scratch=False, dropout=None, seed=0),
            BertTokenizer.from_pretrained(model),
        )

        def notebook_turn(turn: int) -> None:
            poems = [poem for batch in theirs[turn::TURNS] for poem in batch]
            list(notebook.train(network, tokenizer, poems, shuffle=False))

        def fastpoem_turn(turn: int) -> None:
            for step in ours[turn::TURNS]:
                loop.done = step
                loop.one_step()

        loop.model.train()
        for step in range(TURNS):  # what only first steps pay
            fastpoem_turn(step)
        notebook_turn(0)
        yield {"notebook": notebook_turn, "fastpoem": fastpoem_turn}


def evenly(batches, length):
    """STEPS of the batches, evenly spaced by length, in a random order."""
    chosen = sorted(batches, key=length)[len(batches) // STEPS // 2 :: len(batches) // STEPS][:STEPS]
    random.Random(0).shuffle(chosen)
    return chosen


@pytest.mark.parametrize("contestant", ["notebook", "fastpoem"])
@pytest.mark.parametrize("turn", range(TURNS))
def test_poems_per_second(benchmark, race, turn, contestant):
    """poems/s is in `extra_info`."""
    benchmark.group = f"throughput, {'59.5 M parameters' if FULL else 'the bundled small model'}, turn {turn}"
    benchmark.pedantic(race[contestant], args=(turn,), rounds=1, iterations=1)
    benchmark.extra_info.update(
        contestant=contestant, turn=turn, poems=POEMS, poems_per_s=POEMS / benchmark.stats.stats.median,
        threads=torch.get_num_threads(), full_shape=FULL,
    )  # fmt: skip
