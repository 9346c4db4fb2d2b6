"""The C for bfloat16 against float64: it computes in float32, so whatever it writes is rounded once. (The laws that do not depend on how
numbers are stored, dropout's above all, are held in float32 by test_kernels_native and test_kernels_attention.)"""

import math

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import clipped_adamw_, cross_entropy, native
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_kernels_attention import attend, in_float64, made_up
from tests.test_kernels_native import drawn, trained

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(native.why_not(HALF) is not None, reason=str(native.why_not(HALF)))
ROWS, WIDTHS, SEEDS = st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31)


def rounded_once(mine, exact, least=0.0):
    """bfloat16 has 8 bits; float32's own error is a little of the largest there is."""
    assert mine.dtype == HALF
    assert ((mine.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * max(exact.abs().max(), least)).all()


def halves(*shape):
    return torch.randn(*shape).to(HALF)


def test_every_number_is_rounded_as_pytorch_rounds():
    """Of all 2^32 floats those whose rounding may go wrong: the halves between two bfloat16, their neighbours, and what has no neighbour."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    x = torch.cat([(bits + low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    zero, low = torch.zeros(len(x)), torch.empty(len(x), dtype=HALF)
    native.run("adamw", x, zero.to(HALF), zero.clone(), zero.clone(), low, len(x), *(1.0,) * 2, *(0.0,) * 4, 1.0)
    assert torch.equal(low.view(torch.int16)[~x.isnan()], x.to(HALF).view(torch.int16)[~x.isnan()])
    assert low[x.isnan()].isnan().all()


@settings(max_examples=40, deadline=None)
@given(ROWS, WIDTHS, SEEDS, st.sampled_from([1.0, 4.0, 30.0]))
def test_gelu(rows, width, seed, spread):
    torch.manual_seed(seed)
    x, bias, upstream = halves(rows, width) * spread, halves(width), halves(rows, width)
    before, after, d, dbias = x.clone(), torch.empty_like(x), upstream.clone(), torch.empty_like(bias)
    native.run("bias_gelu", before, bias, after, rows, width)
    native.run("gelu_backward", before, d, dbias, rows, width)
    rounded_once(before, x.double() + bias.double())
    exact = before.double().requires_grad_()
    reference = F.gelu(exact, approximate="tanh")
    reference.backward(upstream.double())
    rounded_once(after, reference.detach(), least=1)
    rounded_once(d, exact.grad, least=1)
    rounded_once(dbias, exact.grad.sum(0), least=math.sqrt(rows))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), WIDTHS, SEEDS, st.sampled_from([0.0, 0.1, 0.9])
)
def test_dropout_is_float32s(sizes, width, seed, p):
    torch.manual_seed(seed)
    rows = sum(sizes)
    x, residual, upstream, bias = halves(rows, width), halves(rows, width), halves(rows, width), halves(width)
    by, mask = drawn(sizes, width, p), torch.empty(rows, width)
    native.run("drop", torch.ones(rows, width), mask, *by)
    mask = mask.double()
    alone, out, dx, dbias = torch.empty_like(x), x.clone(), torch.empty_like(x), torch.empty_like(bias)
    native.run("drop", x, alone, *by)
    native.run("drop_add", out, bias, residual, *by)
    native.run("drop_add_backward", upstream, dx, dbias, *by)
    rounded_once(alone, x.double() * mask)
    rounded_once(out, residual.double() + (x.double() + bias.double()) * mask, least=(x.abs() * mask).max())
    rounded_once(dx, upstream.double() * mask)
    rounded_once(dbias, (upstream.double() * mask).sum(0), least=math.sqrt(rows))


@settings(max_examples=40, deadline=None)
@given(ROWS, WIDTHS, SEEDS, st.sampled_from([0.0, 3.0, 100.0]))
def test_layer_norm(rows, width, seed, shift):
    torch.manual_seed(seed)
    x, weight, bias, dy = halves(rows, width) + shift, halves(width), halves(width), halves(rows, width)
    y, stats, dx = torch.empty_like(x), torch.full((rows, 2), math.nan), torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    native.run("layer_norm", x, weight, bias, y, stats, rows, width, 1e-5)
    native.run("layer_norm_backward", x, weight, stats, dy, dx, dweight, dbias, rows, width)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    reference = F.layer_norm(exact[0], (width,), exact[1], exact[2], 1e-5)
    reference.backward(dy.double())
    rounded_once(y, reference.detach(), least=1)
    rounded_once(dx, exact[0].grad, least=stats[:, 1].max())
    rounded_once(dweight, exact[1].grad, least=10 * math.sqrt(rows))
    rounded_once(dbias, exact[2].grad, least=math.sqrt(rows))


def test_layer_norm_of_what_is_too_large_is_no_number():
    for x in (torch.full((1, 8), 3e19), torch.tensor([[1.0, math.inf]]), torch.tensor([[1.0, math.nan]])):
        x = (x * torch.tensor([1.0, -1.0]).repeat(x.shape[1] // 2)).to(HALF)
        one, y, stats = torch.ones(x.shape[1], dtype=HALF), torch.empty_like(x), torch.empty(1, 2)
        native.run("layer_norm", x, one, one, y, stats, 1, x.shape[1], 1e-5)
        assert y.isnan().all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=1, max_size=4).filter(any), st.integers(1, 3), st.integers(1, 70), SEEDS)
def test_attention(lengths, heads, width, seed):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    case = *(t.to(HALF) for t in made_up(starts[-1], heads, width, seed)), starts, heads, 0.5 / width**0.5
    for mine, exact in zip(attend(*case), in_float64(*case), strict=True):
        rounded_once(mine, exact, least=1)


@pytest.mark.parametrize("length", [96, 97, 300])
def test_long_poems_drop_what_float32_drops(length):
    single = *made_up(length, 2, 20), [0, length], 2
    half = *(t.to(HALF) for t in single[:3]), *single[3:]
    as_single = *(t.float() for t in half[:3]), *half[3:]
    for mine, expected in zip(attend(*half, p=0.3), attend(*as_single, p=0.3), strict=True):
        rounded_once(mine, expected.double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.sampled_from([1, 2, 17, 511, 512, 513, 1500]), SEEDS, st.sampled_from([0.1, 5.0, 60.0]))
def test_loss_and_gradient(rows, vocabulary, seed, spread):
    torch.manual_seed(seed)
    logits, target = halves(rows, vocabulary) * spread, torch.randint(0, vocabulary, (rows,))
    target[torch.rand(rows) < 0.2] = -100
    exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    mine = cross_entropy(leaf * 1, target)
    mine.loss.backward()
    if (target == -100).all():
        assert mine.loss == 0 and not leaf.grad.any()
        return
    reference = F.cross_entropy(exact, target)
    reference.backward()
    assert mine.loss.item() == pytest.approx(reference.item(), rel=1e-6, abs=1e-6)
    assert mine.correct == sum(row.argmax() == wanted for row, wanted in zip(logits, target, strict=True))
    rounded_once(leaf.grad, exact.grad, least=1e-3 / rows)


@pytest.mark.parametrize("copied", [True, False])
def test_update(copied):
    """A bfloat16 gradient, with a copy in bfloat16 and without, moves what the same gradient in float32 moves."""
    torch.manual_seed(0)
    flats = [[torch.randn(9001), torch.zeros(9001), torch.zeros(9001)]]
    flats.append([t.clone() for t in flats[0]])
    low = torch.full((9001,), math.nan, dtype=HALF)
    steps = [dict(step=torch.zeros(()), lr=torch.tensor(1e-3), max_norm=torch.tensor(1.0)) for _ in flats]
    for _ in range(3):
        grad = halves(9001)
        half, _ = clipped_adamw_(flats[0][0], grad, *flats[0][1:], low_precision=low if copied else None, **steps[0])
        single, _ = clipped_adamw_(flats[1][0], grad.float(), *flats[1][1:], **steps[1])
        assert half.item() == pytest.approx(single.item(), rel=1e-6)
    for mine, expected in zip(*flats, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-9)
    assert not copied or torch.equal(low, flats[0][0].to(HALF))


def test_any_number_of_threads_gives_the_same_numbers():
    before, made = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        x, weight, bias, dy = halves(53, 131), halves(131), halves(131), halves(53, 131)
        y, stats, dx, dweight, dbias = torch.empty_like(x), torch.empty(53, 2), *map(torch.empty_like, (x, bias, bias))
        native.run("layer_norm", x, weight, bias, y, stats, 53, 131, 1e-5)
        native.run("layer_norm_backward", x, weight, stats, dy, dx, dweight, dbias, 53, 131)
        case = *(t.to(HALF) for t in made_up(217, 3, 33)), [0, 50, 51, 200, 217], 3, 0.2, 0.2
        made.append((y, dx, dweight, dbias, *attend(*case)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_losses_are_within_a_thousandth_of_float32s():
    single, half = trained(100, 0.0), trained(100, 0.0, HALF)
    assert ((half - single).abs() / single).mean() < 1e-3
    assert abs(half[-50:].mean() / single[-50:].mean() - 1) < 1e-3
    assert not torch.equal(half, single)
