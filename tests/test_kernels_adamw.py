"""Clipped AdamW over a flat buffer against `clip_grad_norm_` and `torch.optim.AdamW`.

The same tests serve both forms: here the CPU one, and with TRITON_INTERPRET=1 the Triton kernels (test_kernels_interpreter.py).
"""

import math

import pytest
import torch
from fastpoem_kernels import clipped_adamw_, gradient_norm, plain
from fastpoem_kernels.dispatch import INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st


class Flat:
    """The state of the optimizer under test and, in float64 or float32, that of PyTorch's."""

    def __init__(self, length, *, seed=0, lr=1e-3, max_norm=1.0, exact=torch.float32, **kinds):
        self.random = torch.Generator().manual_seed(seed)
        self.param = torch.randn(length, generator=self.random)
        self.m, self.v, self.step = torch.zeros(length), torch.zeros(length), torch.zeros(())
        self.lr, self.max_norm, self.kinds = torch.tensor(lr), torch.tensor(max_norm), kinds
        self.peer = torch.nn.Parameter(self.param.to(exact, copy=True))
        names = {"eps": kinds.get("eps", 1e-8), "weight_decay": kinds.get("weight_decay", 0.01)}
        betas = (kinds.get("beta1", 0.9), kinds.get("beta2", 0.999))
        self.optimizer = torch.optim.AdamW([self.peer], lr=self.lr.item(), betas=betas, **names)

    def gradient(self, scale=1.0):
        return scale * torch.randn(len(self.param), generator=self.random)

    def take(self, grad, **more):
        return clipped_adamw_(
            self.param, grad, self.m, self.v, step=self.step, lr=self.lr, max_norm=self.max_norm, **self.kinds, **more
        )

    def take_both(self, grad, **more):
        self.peer.grad = grad.to(self.peer.dtype, copy=True)
        expected = torch.nn.utils.clip_grad_norm_([self.peer], self.max_norm.item())
        self.optimizer.step()
        norm, skipped = self.take(grad, **more)
        assert not skipped
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)

    def assert_equal(self, tolerance=1e-6):
        state = self.optimizer.state[self.peer]
        assert self.step == state["step"]
        for mine, theirs in ((self.param, self.peer), (self.m, state["exp_avg"]), (self.v, state["exp_avg_sq"])):
            assert (mine.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("exact", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_a_hundred_steps_equal_pytorchs(max_norm, exact):
    flat = Flat(5000, max_norm=max_norm, exact=exact)
    for number in range(100):
        flat.take_both(flat.gradient(scale=10.0 ** (number % 5 - 3)))  # clipped and not
        if number % 10 == 0:
            flat.lr.fill_(1e-3 / (1 + number))  # a schedule moves the rate on the device
            flat.optimizer.param_groups[0]["lr"] = flat.lr.item()
    flat.assert_equal(tolerance=2e-6)  # PyTorch's own float32 is 1.02e-6 from its float64


@settings(max_examples=10 if INTERPRETED else 25)
@given(
    length=st.integers(1, 9000), seed=st.integers(0, 2**30), lr=st.floats(1e-6, 0.1), max_norm=st.floats(1e-3, 100),
    beta1=st.sampled_from([0.5, 0.9, 0.95]), beta2=st.sampled_from([0.9, 0.95, 0.999, 0.9999]),
    eps=st.sampled_from([1e-6, 1e-8]), weight_decay=st.floats(0, 0.3), scale=st.sampled_from([1e-4, 1.0, 1e4]),
)  # fmt: skip
@example(length=4096, seed=0, lr=1e-3, max_norm=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0)
@example(length=8193, seed=0, lr=1e-3, max_norm=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0)
def test_any_settings(length, seed, lr, max_norm, scale, **kinds):
    flat = Flat(length, seed=seed, lr=lr, max_norm=max_norm, exact=torch.float64, **kinds)
    before = flat.param.double()
    for _ in range(4):
        flat.take_both(flat.gradient(scale))
    flat.assert_equal(tolerance=2e-6)
    # The change of the weights, not the weights alone: as exact as float32 weights can show it.
    rounding = 4 * 2**-24 * before.norm()
    change = flat.peer.detach() - before
    assert (flat.param.double() - before - change).norm() <= 5e-6 * change.norm() + rounding


@pytest.mark.parametrize("steps", [0, 1, 30, 700, 100_000, 2_000_000])
def test_bias_correction_at_any_step(steps):
    flat = Flat(300, exact=torch.float64)
    flat.take_both(flat.gradient())
    flat.step.fill_(steps)
    flat.optimizer.state[flat.peer]["step"].fill_(steps)
    before = flat.param.double()
    peer_before = flat.peer.detach().clone()
    flat.take_both(flat.gradient())
    change = flat.peer.detach() - peer_before
    assert (flat.param.double() - before - change).norm() <= 2e-6 * change.norm() + 2**-23 * before.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    flat = Flat(5000)
    flat.take(flat.gradient())
    before = [t.clone() for t in (flat.param, flat.m, flat.v, flat.step)]
    grad = flat.gradient().to(dtype)
    grad[4999] = bad  # the square of 1e30 is beyond float32, and so is clip_grad_norm_'s norm
    norm, skipped = flat.take(grad)
    assert skipped
    assert not norm.isfinite()
    for was, now in zip(before, (flat.param, flat.m, flat.v, flat.step), strict=True):
        assert torch.equal(was, now)
    _, skipped = flat.take(flat.gradient())
    assert not skipped
    assert flat.step == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    flat = Flat(100)
    before = flat.param.clone()
    norm, skipped = flat.take(flat.gradient(), loss=torch.tensor(bad))
    assert skipped
    assert norm.isfinite()
    assert torch.equal(flat.param, before)
    assert flat.step == 0
    _, skipped = flat.take(flat.gradient(), loss=torch.tensor(2.5))
    assert not skipped
    assert flat.step == 1


@pytest.mark.parametrize("plain_form", [False, True])
def test_a_rate_that_is_not_finite_changes_nothing(plain_form):
    flat = Flat(100)
    flat.take(flat.gradient())
    tensors = (flat.param, flat.m, flat.v, flat.step)
    before = [t.clone() for t in tensors]
    update = plain.clipped_adamw_ if plain_form else clipped_adamw_
    nan = torch.tensor(math.nan)
    _, skipped = update(flat.param, flat.gradient(), flat.m, flat.v, step=flat.step, lr=nan, max_norm=torch.tensor(1.0))
    assert skipped and all(map(torch.equal, before, tensors))


def test_no_gradient_at_all_only_decays():
    flat = Flat(100)
    before = flat.param.clone()
    norm, skipped = flat.take(torch.zeros(100))
    assert (norm, bool(skipped)) == (0, False)
    torch.testing.assert_close(flat.param, before * (1 - 1e-3 * 0.01))


def test_the_low_precision_copy_is_the_rounded_weights():
    flat = Flat(5000)
    low = torch.full((5000,), math.nan, dtype=torch.bfloat16)
    for _ in range(3):
        flat.take_both(flat.gradient(), low_precision=low)
        if INTERPRETED:  # which truncates where a GPU rounds
            torch.testing.assert_close(low.float(), flat.param, rtol=2**-7, atol=0)
        else:
            assert torch.equal(low, flat.param.bfloat16())
    low.fill_(math.nan)
    flat.take(flat.gradient() * math.nan, low_precision=low)
    assert low.isfinite().all()
    flat.assert_equal()


def test_a_bfloat16_gradient_moves_what_it_does_in_float32():
    length = 9000 if INTERPRETED else 1_100_000  # more than one piece of the CPU form
    narrow, wide = Flat(length), Flat(length)
    for _ in range(3):
        grad = narrow.gradient().bfloat16()
        norms = narrow.take(grad)[0], wide.take(grad.float())[0]
        assert norms[0] == pytest.approx(norms[1].item(), rel=1e-6)  # the sums' order is the processor's
    for mine, theirs in ((narrow.param, wide.param), (narrow.m, wide.m), (narrow.v, wide.v)):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("form", [clipped_adamw_, plain.clipped_adamw_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_the_scale_of_a_gradient_is_taken_out(form, dtype, max_norm):
    """Of a gradient that is exactly `scale` times another, norm, clip, moments and weights are the other's."""
    pair = Flat(5000, max_norm=max_norm), Flat(5000, max_norm=max_norm)
    for number in range(6):
        true = pair[0].gradient(10.0 ** (number % 3 - 2)).half().float()  # a power of two changes no digit of it
        scale = torch.tensor(2.0 ** (number + 1))
        norms = []
        for flat, grad, more in ((pair[0], true, {}), (pair[1], (true * scale).to(dtype), {"grad_scale": scale})):
            rest = dict(step=flat.step, lr=flat.lr, max_norm=flat.max_norm, **more)
            norm, skipped = form(flat.param, grad, flat.m, flat.v, **rest)
            assert not skipped
            norms.append(norm.item())
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for one, other in zip((pair[0].param, pair[0].m, pair[0].v), (pair[1].param, pair[1].m, pair[1].v), strict=True):
        assert (one.double() - other.double()).norm() <= 2e-6 * one.double().norm()


@pytest.mark.parametrize("form", [clipped_adamw_, plain.clipped_adamw_])
@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("spoiled", [False, True])
def test_the_parts_of_an_update_are_the_whole(form, scale, spoiled):
    """Given the whole gradient's norm, each part is what the whole update makes of it; a part without the NaN is skipped too."""
    whole, part = Flat(9000, max_norm=0.5), Flat(9000, max_norm=0.5)
    grad, here = whole.gradient(), slice(4096, 8192)
    grad[0] = math.nan if spoiled else grad[0]
    scale = None if scale is None else torch.tensor(scale)
    told = []
    for flat, at, norm in ((whole, slice(None), None), (part, here, gradient_norm(grad))):
        rest = dict(step=flat.step, lr=flat.lr, max_norm=flat.max_norm, grad_scale=scale, norm=norm)
        told.append(form(flat.param[at], grad[at].clone(), flat.m[at], flat.v[at], **rest))
    assert told[0][0].item() == pytest.approx(told[1][0].item(), rel=1e-6, nan_ok=True)
    assert bool(told[0][1]) == bool(told[1][1]) == spoiled
    for mine, theirs in ((part.param, whole.param), (part.m, whole.m), (part.v, whole.v)):
        assert (mine[here] - theirs[here]).norm() <= 2e-7 * theirs[here].norm()
    assert torch.equal(part.param[:4096], Flat(9000).param[:4096]) and not part.m[8192:].any()


def test_nothing_and_one():
    for length in (0, 1):
        flat = Flat(length)
        norm, skipped = flat.take(torch.ones(length))
        assert (norm, bool(skipped), flat.step) == (length, False, 1)


@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
def test_the_norm_is_exact_and_the_same_for_any_number_of_threads():
    flat, threads = Flat(3_000_001), torch.get_num_threads()
    grad = flat.gradient() + 3.0  # a sum that only grows is what float32 adds up worst
    norms = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        norms.append(flat.take(grad.clone())[0].item())
    torch.set_num_threads(threads)
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(grad.double().norm().item(), rel=1e-7)


def test_the_norm_is_the_same_every_time():
    flat = Flat(50_000)
    grad = flat.gradient()
    assert len({flat.take(grad.clone())[0].item() for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"grad": torch.zeros(9)}, ValueError),
        ({"param": torch.zeros(10, 2)[:, 0]}, ValueError),
        ({"step": torch.zeros(1)}, ValueError),
        ({"loss": torch.zeros(1)}, ValueError),
        ({"step": torch.zeros((), dtype=torch.int64)}, TypeError),
        ({"grad": torch.zeros(10, dtype=torch.float64)}, TypeError),
        ({"grad_scale": torch.ones((), dtype=torch.float16)}, TypeError),
        ({"grad_scale": torch.ones(1)}, ValueError),
        ({"norm": torch.ones(1)}, ValueError),
        ({"norm": torch.ones((), dtype=torch.float64)}, TypeError),
        ({"exp_avg": torch.zeros(10, dtype=torch.bfloat16)}, TypeError),
        ({"low_precision": torch.zeros(9, dtype=torch.bfloat16)}, ValueError),
    ],
)
def test_refuses_what_it_does_not_compute(change, error):
    given_values = {name: torch.zeros(10) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    given_values |= {name: torch.ones(()) for name in ("step", "lr", "max_norm")}
    with pytest.raises(error, match=r"must be|expected"):
        clipped_adamw_(**(given_values | change))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not run under torch.compile")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    def step(param, grad, m, v, count, rate, limit, low):
        return clipped_adamw_(
            param, grad * 2.0, m, v, step=count, lr=rate, max_norm=limit, loss=grad.sum(), low_precision=low
        )

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        flat, low = Flat(1000), torch.zeros(1000, dtype=torch.bfloat16)
        for _ in range(2):
            norm, skipped = run(flat.param, flat.gradient(), flat.m, flat.v, flat.step, flat.lr, flat.max_norm, low)
        results.append((norm, skipped, flat.param, flat.m, flat.v, flat.step, low))
    for eager, same in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not run under torch.compile")
@pytest.mark.parametrize("with_low", [True, False])
def test_the_operator_is_what_it_declares(with_low):
    flat = Flat(50)
    low = torch.zeros(50, dtype=torch.bfloat16) if with_low else None
    arguments = (flat.param, flat.gradient(100.0), flat.m, flat.v, flat.step, flat.lr, flat.max_norm)
    torch.library.opcheck(torch.ops.fastpoem.clipped_adamw_.default, (*arguments, None, low, 0.9, 0.999, 1e-8, 0.01))
