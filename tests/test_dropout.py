"""What a step drops on a CPU, in C and in PyTorch: the same however its batch is cut into parts, whatever else is drawn, and nothing twice."""

import dataclasses
import math
from itertools import combinations, pairwise

import pytest
import torch
from fastpoem_kernels import cross_entropy, native
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastpoem.corpus.feed import Shape
from fastpoem.engine.batch import assemble
from fastpoem.engine.optim import FlatAdamW
from fastpoem.model import ops
from fastpoem.model.dropout import Masks
from fastpoem.model.gpt2 import GPT2, GPT2Config
from tests import test_kernels_attention, test_kernels_native

SHAPE = GPT2Config(50, 24, 18, 2, 3, embd_pdrop=0.3, attn_pdrop=0.4, resid_pdrop=0.5, initializer_range=0.2)
IDS = torch.arange(2000, dtype=torch.int16) * 7 % 49
KEY = -1234567890123456789


@pytest.fixture(params=["C", "PyTorch"])
def path(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_loaded", lambda *_: "taken out by a test")
    elif native.why_not() is not None:
        pytest.skip(native.why_not())
    return request.param


def model_of(dtype=torch.float32):
    """The same weights every time; in float64 by autograd, else with gradients written in place."""
    model = GPT2(SHAPE).train()
    model.initialise(0)
    if dtype == torch.float64:
        return model.double()
    FlatAdamW(model, torch.device("cpu"), dtype, weight_decay=0.01, max_norm=1.0)
    return model


def step(model, lengths, here, packed, masks):
    """Poems `here` (a slice) of a batch whose poems have so many inputs -> (logits (n, V) of those, gradients of the sum of their losses)."""
    at = torch.tensor([0, *lengths]).cumsum(0)[:-1] * 2
    where = torch.stack([at, torch.tensor(lengths) + 1], 1)[here]
    shape = Shape(len(where), max(lengths) + 1, sum(lengths[here]) + 3 if packed else 0)
    batch = assemble(IDS, where, shape, 0)
    logits, target = model(batch.inputs, batch.packing, masks=masks), batch.targets.flatten()
    real, dtype = target != -100, next(model.parameters()).dtype
    seen = logits[real].detach().clone()
    if dtype == torch.float32:
        out = cross_entropy(logits, target)
        (out.loss * out.valid).backward()
        return seen, torch.cat([weight.main_grad.flatten() for weight in model.parameters()]).clone()
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    return seen, torch.cat([weight.grad.flatten() for weight in model.parameters()])


def near(mine, exact, within):
    return (mine - exact).abs().max() <= within * exact.abs().max()


def masks_of_c(dropouts):
    """In place of `ops.keep_mask`: the masks that C draws, of a model's dropouts in their order."""
    count = iter(range(dropouts))

    def mask(sizes, seeds, p, dtype):
        attention, drawn = next(count) % 3 == 1, []
        for size, seed in zip(sizes, seeds.tolist(), strict=True):
            if attention:
                drawn.append(test_kernels_attention.dropped(SHAPE.n_head, math.isqrt(size // SHAPE.n_head), p, seed))
            else:
                drawn.append(test_kernels_native.dropped((size // SHAPE.n_embd, SHAPE.n_embd), p, seed))
        return torch.cat([(one != 0).flatten() for one in drawn]).to(dtype) / (1 - p)

    return mask


CUTS = st.sets(st.integers(1, 5), max_size=3)
LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, CUTS, st.booleans())
@example([9, 0, 20, 1, 7], {1, 2, 3}, True)
@example([9, 0, 20, 1, 7], {1, 3}, False)
def test_a_batch_drops_the_same_however_it_is_cut(path, lengths, cuts, packed):
    """Logits, and gradients by their sum, of parts and of the whole: to rounding, and to that of float64 with the same masks. A poem may be
    empty: a row of padding, or a border twice."""
    model, first = model_of(), 5
    whole, gradient = step(model, lengths, slice(None), packed, Masks(KEY, first))
    seen, total = [], torch.zeros_like(gradient)
    for start, end in pairwise([0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]):
        if any(lengths[start:end]):
            part, one = step(model, lengths, slice(start, end), packed, Masks(KEY, first + start))
            seen.append(part)
            total += one
    with pytest.MonkeyPatch.context() as patch:
        if path == "C":
            patch.setattr(ops, "keep_mask", masks_of_c(model.dropouts))
        exact, exact_gradient = step(model_of(torch.float64), lengths, slice(None), packed, Masks(KEY, first))
    assert near(torch.cat(seen), whole, 1e-5) and near(whole, exact, 1e-5)
    assert near(total, gradient, 1e-5) and near(gradient, exact_gradient, 1e-5)


def test_in_c_a_packed_poem_drops_what_it_drops_in_a_row(path):
    if path == "C":
        for lengths in ([9, 0, 20, 1, 7], [24], [5] * 6):
            rows, packed = (step(model_of(), lengths, slice(None), pack, Masks(KEY, 0)) for pack in (False, True))
            assert all(near(mine, other, 1e-5) for mine, other in zip(packed, rows, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_empty_poems_change_nothing_of_the_others(path, packed):
    without, gradient = step(model_of(), [12, 20], slice(None), packed, Masks(KEY, 0))
    for lengths in ([12, 20, 0], [12, 20, 0, 0]):
        seen, one = step(model_of(), lengths, slice(None), packed, Masks(KEY, 0))
        assert near(seen, without, 1e-6) and near(one, gradient, 1e-6)


def test_with_masks_nothing_else_matters_and_without_them_pytorchs_generator_does(path):
    model = model_of()
    run = lambda masks=None: step(model, [12, 20], slice(None), False, masks)[0]
    torch.manual_seed(0)
    state, by_key = torch.get_rng_state(), run(Masks(KEY, 0))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = run(), run()
    assert torch.equal(run(Masks(KEY, 0)), by_key)
    torch.manual_seed(0)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    others = [first, second, by_key, run(Masks(KEY + 1, 0)), run(Masks(KEY, 1))]
    assert not any(near(one, other, 0.1) for one, other in combinations(others, 2))


def test_where_nothing_is_dropped_nothing_is_drawn(path):
    shape = dataclasses.replace(SHAPE, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    ids, dropping = IDS[:40].long().view(2, 20), model_of()
    still, state = GPT2(shape), torch.get_rng_state()
    still.load_state_dict(dropping.state_dict())
    out = [still.train()(ids), still(ids, masks=Masks(KEY, 0)), dropping.eval()(ids), dropping(ids, masks=Masks(1, 0))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3]) and near(out[0], out[2], 1e-5)


def test_no_two_seeds_are_equal():
    """Of keys that follow each other, as steps may; and a poem has the same wherever a part begins."""
    keys = [*range(-300, 300), 2**63 - 1, -(2**63), KEY]
    seeds = torch.stack([Masks(key, 0).seeds(19, 64) for key in keys])  # (keys, dropouts, P)
    assert len(seeds.unique()) == seeds.numel()
    assert torch.equal(Masks(KEY, 37).seeds(19, 20), seeds[-1][:, 37:57])
    bits = (seeds.flatten()[:, None] >> torch.arange(64) & 1).double()  # (n, 64)
    assert (bits.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(bits))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_other_poems_dropouts_and_keys_are_independent(path, p):
    """As many dropped as should be, and no two masks alike: each within five standard deviations."""
    seeds = torch.stack([Masks(key, 0).seeds(4, 5) for key in range(5)]).flatten()  # 100
    seeds[:20:2] = seeds[1:20:2] ^ 2**40  # of which not all halves differ
    seeds[20:40:2] = seeds[21:40:2] ^ 1
    if path == "C":
        masks = torch.stack([test_kernels_native.dropped((66, 96), p, seed).flatten() for seed in seeds.tolist()])
    else:
        masks = ops.keep_mask([66 * 96] * len(seeds), seeds, p, torch.float32).view(len(seeds), -1)
    unit = ((masks != 0).double() - (1 - p)) / math.sqrt(p * (1 - p))  # (100, n)
    together = unit @ unit.t() / math.sqrt(unit.shape[1])  # standard normal off the diagonal
    assert (unit.sum(1) / math.sqrt(unit.shape[1])).abs().max() < 5
    assert together.triu(1).abs().max() < 5 and abs(together.triu(1).square().sum() / 4950 - 1) < 0.15


def test_a_poems_mask_begins_as_that_of_a_longer_one():
    """In PyTorch too: a poem's elements, whatever poems are beside it."""
    seeds = torch.tensor([3, -9, 2**62])
    long = ops.keep_mask([999, 1000, 70], seeds, 0.5, torch.float32).split([999, 1000, 70])
    short = ops.keep_mask([7, 0, 70], seeds, 0.5, torch.float32).split([7, 0, 70])
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(short, long, strict=True))
    rounded = ops.keep_mask([7, 0, 70], seeds, 0.5, torch.bfloat16).split([7, 0, 70])
    assert all(torch.equal(a, b) for a, b in zip(short, rounded, strict=True))
