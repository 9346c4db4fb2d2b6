"""attention.c against PyTorch in float64: values, gradients, dropout, packed poems, and what a head must not do to others."""

import math
import resource
from itertools import pairwise

import pytest
import torch
from fastpoem_kernels import native
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.feed import Shape
from fastpoem.engine.batch import assemble
from fastpoem.engine.optim import FlatAdamW
from fastpoem.model import fused
from fastpoem.model.gpt2 import GPT2, GPT2Config

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def attend(qkv, bias, upstream, starts, heads, scale=0.5, p=0.0, seeds=None):
    """The C's (out, dqkv, dbias) of poems that begin at `starts`, the last of which is their end, in memory that holds NaN before."""
    seeds = torch.arange(len(starts) - 1) if seeds is None else seeds
    starts, width = torch.tensor(starts, dtype=torch.int32), upstream.shape[1] // heads
    sizes = len(starts) - 1, heads, width, scale, seeds, fused.dropped(p)
    out, dqkv, dbias = (torch.full_like(t, math.nan) for t in (upstream, qkv, bias))
    stats = torch.full((heads, len(qkv), 2), math.nan)
    sums = torch.full((len(starts) - 1, len(bias)), math.nan, dtype=torch.float64)
    count = native.run("attention_scratch", starts, len(starts) - 1, width, dtype=qkv.dtype)
    scratch = torch.full((count + 8,), math.nan)
    scratch[-8:] = 7
    native.run("attention", qkv, bias, out, stats, scratch, starts, *sizes)
    scratch[:-8] = math.nan
    native.run("attention_backward", qkv, bias, stats, upstream, dqkv, dbias, sums, scratch, starts, *sizes)
    assert (scratch[-8:] == 7).all()
    return out, dqkv, dbias


def in_float64(qkv, bias, upstream, starts, heads, scale=0.5, masks=None):
    """The same by the formula and autograd; masks: for each poem (H, T, T)."""
    exact, exact_bias = qkv.double().requires_grad_(), bias.double().requires_grad_()
    out = []
    for poem, (start, end) in enumerate(pairwise(starts)):
        q, k, v = (
            (exact + exact_bias)[start:end].view(end - start, 3, heads, upstream.shape[1] // heads).permute(1, 2, 0, 3)
        )  # (H, T, D / H)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(future, -math.inf).softmax(-1)
        left = weights if masks is None else weights * masks[poem]
        out.append((left @ v).transpose(0, 1).flatten(1))
    out = torch.cat(out)
    out.backward(upstream.double())
    return out.detach(), exact.grad, exact_bias.grad


def made_up(rows, heads, width, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, 3 * heads * width), torch.randn(3 * heads * width), torch.randn(rows, heads * width)


def close(mine, exact, within=(1e-6, 3e-6), least=0.0):
    (out, dqkv, dbias), (exact_out, exact_dqkv, exact_dbias) = mine, exact
    assert (out - exact_out).abs().max() <= within[0] * max(exact_out.abs().max(), least)
    most = within[1] * max(exact_dqkv.abs().max(), least)
    assert (dqkv - exact_dqkv).abs().max() <= most
    assert (dbias - exact_dbias).abs().max() <= max(
        most, within[1] * exact_dbias.abs().max()
    )  # sums that nearly cancel


def dropped(heads, length, p, seed):
    """The masks (H, T, T) of a poem alone, as seen by what becomes of values that are unit vectors, at equal weights."""
    if length == 0:
        return torch.ones(heads, 0, 0)
    values = torch.zeros(length, 3, heads, length)
    values[:, 2] = torch.eye(length)[:, None]
    qkv, bias, upstream = values.view(length, -1), torch.zeros(3 * heads * length), torch.zeros(length, heads * length)
    out, *_ = attend(qkv, bias, upstream, [0, length], heads, 1.0, p, torch.tensor([seed]))
    share = torch.arange(1, length + 1)[:, None]
    return (out.view(length, heads, length).transpose(0, 1) * share).double()  # 0 in the future too


SEEDS, SCALES = st.integers(0, 2**31), st.sampled_from([0.1, 0.35, 1.0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 70), SEEDS, SCALES)
def test_attention(poems, length, heads, width, seed, scale):
    case = (
        *made_up(poems * length, heads, width, seed),
        [*range(0, poems * length + 1, length)],
        heads,
        scale / width**0.5,
    )
    close(attend(*case), in_float64(*case), least=1e-2)  # equal keys have a gradient of nothing


@pytest.mark.parametrize("length", [96, 97, 146, 192, 193, 512, 700])
def test_poems_longer_than_a_tile(length):
    case = *made_up(length, 2, 20), [0, length], 2
    close(attend(*case), in_float64(*case))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=1, max_size=5).filter(any), st.integers(1, 3), SEEDS)
def test_packed_poems_of_several_lengths(lengths, heads, seed):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    case = *made_up(starts[-1], heads, 7, seed), starts, heads
    close(attend(*case), in_float64(*case), least=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=3).filter(any),
    st.integers(1, 3),
    SEEDS,
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_forward_and_backward_drop_what_each_poem_drops_alone(lengths, heads, seed, p):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    case = *made_up(starts[-1], heads, 9, seed), starts, heads, 0.3
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(lengths),))
    masks = [dropped(heads, length, p, one) for length, one in zip(lengths, seeds.tolist(), strict=True)]
    assert all(((mask == 0) | ((mask - 1 / (1 - p)).abs() < 1e-5)).all() for mask in masks)
    close(attend(*case, p, seeds), in_float64(*case, masks), within=(1e-5, 1e-5), least=0.1)


def test_what_is_dropped_does_not_depend_on_the_poems_length():
    long = dropped(3, 210, 0.5, -7)
    for length in (1, 5, 97):
        assert torch.equal(dropped(3, length, 0.5, -7) != 0, long[:, :length, :length] != 0)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1e-3])
def test_dropout_is_independent_from_head_to_head_and_seed_to_seed(p):
    heads, length = 6, 300
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    first, second = ((dropped(heads, length, p, seed)[:, seen] != 0).double() for seed in (0, 2**63 - 9))  # (H, n)
    if p == 0:
        assert first.all()
        return
    n, other, off = first.numel(), second - (1 - p), first - (1 - p)
    assert abs(first.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for pair in (off * other, off[1:] * off[:-1], off[:, 1:] * off[:, :-1], off[:, 300:] * off[:, :-300]):
        assert abs(pair.mean() / (p * (1 - p))) < 5 / math.sqrt(pair.numel())


def test_any_number_of_threads_gives_the_same_numbers():
    case, before, made = (
        (*made_up(217, 3, 33), [0, 50, 51, 200, 217], 3, 0.2, 0.2),
        torch.get_num_threads(),
        [],
    )
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made.append(attend(*case))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*made, strict=True))


def test_scores_of_ten_thousands():
    """Whole numbers, whose products are exact: the largest, ties for it, and weights that are 0 to any precision."""
    torch.manual_seed(0)
    qkv, upstream = torch.randint(-60, 61, (80, 3 * 32)).float(), torch.randn(80, 32)
    qkv[40:44, 32:64] = qkv[44:48, 32:64]
    case = qkv, torch.zeros(96), upstream, [0, 80], 2, 1.0
    assert (qkv[:, :16] @ qkv[:, 32:48].t()).abs().max() > 1e4
    close(attend(*case), in_float64(*case))


def test_a_score_beyond_floats_range_is_a_nan_not_a_crash():
    qkv, bias, upstream = made_up(20, 1, 8)
    qkv[5, :16] = 1e30
    out, dqkv, _ = attend(qkv, bias, upstream, [0, 20], 1)
    assert out[:5].isfinite().all() and out[5].isnan().all() and out[6:].isfinite().all() and dqkv[5].isnan().any()


def test_a_nan_stays_in_its_poem_and_head():
    clean = *made_up(60, 3, 8), [0, 20, 40, 60], 3
    spoilt = clean[0].clone().view(60, 3, 3, 8)
    spoilt[30, :, 1] = math.nan
    for mine, without in zip(attend(spoilt.view(60, -1), *clean[1:])[:2], attend(*clean)[:2], strict=True):
        mine, without = mine.view(3, 20, -1, 3, 8), without.view(3, 20, -1, 3, 8)  # (poem, T, part, head, 8)
        assert torch.equal(mine[::2], without[::2]) and torch.equal(mine[:, :, :, ::2], without[:, :, :, ::2])
        assert mine[1, 10:, :, 1].isnan().all()


def gradients(packed: bool, seed: int = 0):
    """Every gradient of a small model whose attention is far from even, from poems of several lengths; with the loss."""
    model = GPT2(
        GPT2Config(60, 40, 24, 2, 3, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, scale_attn_by_inverse_layer_idx=True)
    )
    model.initialise(seed)
    FlatAdamW(model.train(), torch.device("cpu"), torch.float32, weight_decay=0.01, max_norm=1.0)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(20)
            block.attn.c_attn.bias.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.arange(300, dtype=torch.int16) * 7 % 59
    where = torch.tensor([[0, 31], [40, 2], [50, 18], [100, 30]])
    batch = assemble(ids, where, Shape(4, 31, 96 if packed else 0), 0)
    logits = model(batch.inputs, batch.packing)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), {name: weight.main_grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
def test_a_models_gradients_are_those_without_it(monkeypatch, packed):
    loss, mine = gradients(packed)
    monkeypatch.setattr(native, "_loaded", lambda *_: "taken out by a test")
    expected, theirs = gradients(packed)
    assert abs(loss - expected) < 1e-6
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).abs().max() < 2e-5 * gradient.abs().max(), name
    assert not all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_its_scratch_is_given_back():
    case = *made_up(600, 4, 32), [0, 300, 600], 4
    peaks = []
    for _ in range(3):
        for _ in range(70):
            attend(*case)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[2] - peaks[0] < 4096  # KiB; the scratch of one call is 2 MB a thread


def test_scratch_of_more_floats_than_an_int_counts():
    starts, width = torch.tensor([0, 200_000], dtype=torch.int32), 4096
    assert native.run("attention_scratch", starts, 1, width) > 5 * 200_000 * width
