"""Poems a second: fastpoem and the loops it replaces, in turn, on the same poems, the same model and the same recipe.

Every contestant trains the same slice of poems, an epoch a round, and the rounds alternate (notebook, fastpoem, notebook, …), so that a
machine whose speed drifts slows them alike: read the ratio within a round, and the median over rounds. The model has the full shape
where the shared data is there; else the bundled small one is used, and the names of the tests say so.

FASTPOEM_BENCH_POEMS (default 96) and FASTPOEM_BENCH_ROUNDS (3) make it longer.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from benchmarks import notebook
from fastpoem.config import from_kwargs
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.run.fit import assembled
from fastpoem.run.metrics import Voice

POEMS = int(os.environ.get("FASTPOEM_BENCH_POEMS", 96))
ROUNDS = int(os.environ.get("FASTPOEM_BENCH_ROUNDS", 3))
SHARED = Path(os.environ.get("FASTPOEM_SHARED", Path(__file__).parents[2] / "shared"))
FULL = (SHARED / "data/poems.txt.xz").exists()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """(text file of the slice, model folder with weights, a folder for runs)."""
    folder = tmp_path_factory.mktemp("throughput")
    source = SHARED / "data/poems.txt.xz" if FULL else hub.BUNDLED / "poems.txt"
    shape = SHARED / "models/gpt2-distil-chinese" if FULL else hub.BUNDLED / "model"
    data = folder / "slice.txt"
    data.write_text("\n".join(random.Random(0).sample(notebook.Poems(source).lines, POEMS)), encoding="utf-8")
    config, raw = hub.read_config(shape)
    model = GPT2(config)
    model.initialise(0)
    names = ("vocab.txt", "tokenizer_config.json")
    hub.save_folder(folder / "model", model.state_dict(), raw, [shape / name for name in names])
    return data, folder / "model", folder


@pytest.fixture(scope="module")
def notebook_epoch(task):
    data, model_folder, _ = task
    model = notebook.load_model(model_folder, from_scratch=False, dropout=None, seed=0)
    tokenizer, poems = BertTokenizer.from_pretrained(model_folder), notebook.Poems(data)
    return lambda: list(notebook.train(model, tokenizer, poems))


@pytest.fixture(scope="module")
def fastpoem_epoch(task):
    data, model_folder, folder = task
    settings = {"data": str(data), "model": str(model_folder), "out": str(folder / "run"), "val_poems": 0}
    with assembled(from_kwargs(**settings, epochs=10_000, device="cpu"), Voice(quiet=True)) as (loop, _):
        loop.model.train()
        loop.one_step()  # what only a first step pays

        def epoch():
            for _ in range(loop.order.steps):
                loop.one_step()

        yield epoch


@pytest.mark.parametrize("contestant", ["notebook", "fastpoem"])
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_poems_per_second(benchmark, request, turn, contestant):
    """An epoch of the slice; poems/s is in `extra_info`."""
    epoch = request.getfixturevalue(f"{contestant}_epoch")
    benchmark.group = f"throughput, {'59.5 M parameters' if FULL else 'the bundled small model'}, round {turn}"
    benchmark.pedantic(epoch, rounds=1, iterations=1)
    benchmark.extra_info.update(
        contestant=contestant, turn=turn, poems=POEMS, poems_per_s=POEMS // 16 * 16 / benchmark.stats.stats.median,
        threads=torch.get_num_threads(), full_shape=FULL,
    )  # fmt: skip
