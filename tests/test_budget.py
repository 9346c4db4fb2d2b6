"""The budget on paper: counted as PyTorch counts, in step with the kernels, and as docs/performance.md has it."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arithmetic, budget
from fastpoem.doctor.checks import REAL
from fastpoem.model.gpt2 import GPT2, GPT2Config

PAGE = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
SMALL = GPT2Config(300, 32, 48, 2, 4, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def test_products_are_those_that_pytorch_counts():
    model = GPT2(SMALL)
    model.initialise(0)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(3, 17, dtype=torch.int64)).sum().backward()
    matrices = {
        str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    }
    assert sum(matrices.values()) == sum(item.flops for item in budget.products(SMALL, 3 * 17))
    assert len(budget.products(REAL, 1040)) == 75


def test_flops_are_the_models():
    """All but attention's backward pass, which computes the weights again."""
    items = budget.step(REAL, 16, 65)
    assert sum(item.flops for item in items) == pytest.approx(arithmetic.model_flops(REAL, [65] * 16), rel=2e-3)


def test_the_update_moves_what_its_kernels_move():
    moved = {item.name: item.bytes for item in budget.step(REAL, 16)}
    parameters = sum(p.numel() for p in GPT2(SMALL).parameters())
    small = {item.name: item.bytes for item in budget.step(SMALL, 16)}
    master, moments, gradient, copy = 2 * 4, 4 * 4, 2, 2  # read and written, but the gradient and the copy
    assert small["AdamW"] == parameters * (master + moments + gradient + copy)
    assert moved["AdamW"] / moved["norm of the gradient"] == 14


@pytest.mark.parametrize("card", budget.CARDS.values(), ids=budget.CARDS)
def test_floors_are_floors(card):
    for poems in budget.BATCHES:
        items = budget.step(REAL, poems, budget.INPUTS)
        least = budget.floor(REAL, poems, card, budget.INPUTS)
        assert least >= sum(i.flops for i in items) / card.half / 1e12
        assert least >= max(i.seconds(card) for i in items)
        assert budget.likely(REAL, poems, card, budget.INPUTS) > least
    per_poem = [budget.floor(REAL, n, card) / n for n in budget.BATCHES]
    assert per_poem == sorted(per_poem, reverse=True)


@pytest.mark.parametrize("name", budget.CARDS)
def test_the_page_has_these_tables(name):
    card = budget.CARDS[name]
    assert budget.parts(card) in PAGE and budget.sweep(card) in PAGE


def test_the_page_counts_its_launches():
    table = PAGE.split("## Launches")[1].split("\nTogether ")[0]
    rows = re.findall(r"^\| [^|]+ \| (\d+) \|", table, re.M)
    assert sum(map(int, rows)) == budget.NODES
