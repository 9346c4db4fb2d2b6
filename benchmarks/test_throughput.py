"""Poems a second: fastpoem and the loop it replaces, in turn, on the same poems, the same model and the same recipe.

The poems are those of some steps of fastpoem's order over the whole corpus, evenly spaced by length, so that they have the corpus'
lengths (a small slice of text would not do: what is left over of its sparse buckets would fill batches of the longest). The notebook gets
the same poems in random batches. A turn is a quarter of them, for one and then for the other, so that a machine whose speed drifts slows both
alike: compare within a turn, and the sums over all turns.

The model has the full shape where the shared data is there; else the bundled small one is used, and the groups say so.
FASTPOEM_BENCH_STEPS (default 24) is the number of steps.
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
STEPS = max(1, int(os.environ.get("FASTPOEM_BENCH_STEPS", 24)) // TURNS) * TURNS
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
        by_length = sorted(range(order.steps), key=lambda step: order(0, step).length)
        chosen = [by_length[int((i + 0.5) * order.steps / STEPS)] for i in range(STEPS)]
        bucket, index = store.locate(np.arange(store.rows))
        row_of = {place: row for row, place in enumerate(zip(bucket.tolist(), index.tolist(), strict=True))}
        lines = notebook.Poems(data).lines
        places_of = (zip(order(0, s).bucket.tolist(), order(0, s).index.tolist(), strict=True) for s in chosen)
        poems = [lines[row_of[place]] for step in places_of for place in step]
        random.Random(0).shuffle(poems)
        share = len(poems) // TURNS
        theirs, tokenizer = (
            notebook.load_model(model, from_scratch=False, dropout=None, seed=0),
            BertTokenizer.from_pretrained(model),
        )

        def notebook_turn(turn: int) -> None:
            list(notebook.train(theirs, tokenizer, poems[turn * share : (turn + 1) * share]))

        def fastpoem_turn(turn: int) -> None:
            for step in chosen[turn::TURNS]:
                loop.done = step
                loop.one_step()

        loop.model.train()
        fastpoem_turn(TURNS - 1)  # the longest among them: memory is taken once
        yield {"notebook": notebook_turn, "fastpoem": fastpoem_turn, "poems": share}


@pytest.mark.parametrize("contestant", ["notebook", "fastpoem"])
@pytest.mark.parametrize("turn", range(TURNS))
def test_poems_per_second(benchmark, race, turn, contestant):
    """poems/s is in `extra_info`."""
    benchmark.group = f"throughput, {'59.5 M parameters' if FULL else 'the bundled small model'}, turn {turn}"
    benchmark.pedantic(race[contestant], args=(turn,), rounds=1, iterations=1)
    benchmark.extra_info.update(
        contestant=contestant, turn=turn, poems=race["poems"], poems_per_s=race["poems"] / benchmark.stats.stats.median,
        threads=torch.get_num_threads(), full_shape=FULL,
    )  # fmt: skip
