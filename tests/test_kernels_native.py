"""native.c against PyTorch in float64; and training without it, which everything else here has where gcc is."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import cross_entropy, native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model import fused
from fastpoem.model.gpt2 import GPT2, GPT2Config

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
TAKEN_OUT = "taken out by a test"
SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)  # rows of each poem
ROWS, WIDTHS = st.integers(1, 40), st.integers(1, 70)  # widths around one and several vectors, with every remainder


def worst(mine, exact):
    """The largest error as a share of the largest value, or of 1 where all are smaller (a lone GELU of -6, a gradient near its zero)."""
    return ((mine.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item()


def drawn(sizes, width, p, seeds=None):
    """What native.c draws by, for poems of so many rows."""
    starts = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)
    return starts, len(sizes), width, torch.arange(len(sizes)) if seeds is None else seeds, fused.dropped(p)


def dropped(shape, p, seed):
    """The mask that native.c draws for a poem, of 0 and 1 / (1 - p), as seen by what becomes of ones."""
    mask = torch.empty(shape)
    native.run("drop", torch.ones(shape), mask, *drawn(shape[:1], shape[1], p, torch.tensor([seed])))
    return mask


@settings(max_examples=60, deadline=None)
@given(ROWS, WIDTHS, st.integers(0, 2**31), st.sampled_from([1.0, 4.0, 30.0]))
def test_gelu(rows, width, seed, spread):
    torch.manual_seed(seed)
    before, bias, upstream = torch.randn(rows, width) * spread, torch.randn(width), torch.randn(rows, width)
    exact, exact_bias = before.double().requires_grad_(), bias.double().requires_grad_()
    reference = F.gelu(exact + exact_bias, approximate="tanh")
    reference.backward(upstream.double())
    after, d, dbias = torch.empty(rows, width), upstream.clone(), torch.empty(width)
    native.run("bias_gelu", before, bias, after, rows, width)
    native.run("gelu_backward", before, d, dbias, rows, width)
    assert torch.equal(before, exact.detach().float() + bias)
    assert worst(after, reference.detach()) < 1e-6
    assert worst(d, exact.grad) < 3e-6
    assert (dbias.double() - exact_bias.grad).abs().max() < 1e-5 * max(1.0, math.sqrt(rows))


def test_a_row_wider_than_a_stack():
    width, before = 2_000_001, torch.get_num_threads()
    torch.set_num_threads(1)
    x, dx, dbias = torch.linspace(-30, 30, width)[None], torch.ones(1, width), torch.empty(width)
    exact = x.double().requires_grad_()
    F.gelu(exact, approximate="tanh").sum().backward()
    native.run("gelu_backward", x, dx, dbias, 1, width)
    assert worst(dx, exact.grad) < 3e-6 and torch.equal(dx[0], dbias)
    native.run("drop_add_backward", x, dx, dbias, *drawn([1], width, 0.5))
    torch.set_num_threads(before)
    assert torch.equal(dx[0], dbias) and abs((dx == 0).double().mean() - 0.5) < 0.01


def test_gelu_of_extremes():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 9.9, -9.9, 11.0, -11.0, 1e4, -1e4, 1e30, -1e30, math.inf, math.nan])
    before, after, d, dbias = x.clone()[None], torch.empty(1, len(x)), torch.ones(1, len(x)), torch.empty(len(x))
    native.run("bias_gelu", before, torch.zeros(len(x)), after, 1, len(x))
    torch.testing.assert_close(after[0], F.gelu(x, approximate="tanh"), equal_nan=True, rtol=1e-6, atol=1e-7)
    native.run("gelu_backward", before, d, dbias, 1, len(x))
    assert d[0, :10].isfinite().all() and d[0, 8] == 1 and d[0, 9].abs() < 1e-20 and d[0, 13].isnan()


@settings(max_examples=60, deadline=None)
@given(SIZES, WIDTHS, st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.999]))
def test_residual_sum_and_its_gradient_drop_what_each_poem_drops_alone(sizes, width, seed, p):
    torch.manual_seed(seed)
    rows = sum(sizes)
    x, residual, upstream = torch.randn(3, rows, width)
    bias, seeds = torch.randn(width), torch.randint(-(2**63), 2**63 - 1, (len(sizes),))
    mask = torch.cat([dropped((size, width), p, one) for size, one in zip(sizes, seeds.tolist(), strict=True)]).double()
    out, dx, dbias = x.clone(), torch.empty(rows, width), torch.empty(width)
    native.run("drop_add", out, bias, residual, *drawn(sizes, width, p, seeds))
    native.run("drop_add_backward", upstream, dx, dbias, *drawn(sizes, width, p, seeds))
    exact = residual.double() + (x.double() + bias.double()) * mask
    assert (out.double() - exact).abs().max() < 1e-6 * (residual.abs() + (x.abs() + bias.abs()) * mask).max()
    assert worst(dx, upstream.double() * mask) < 1e-6
    assert (dbias.double() - (upstream.double() * mask).sum(0)).abs().max() <= 1e-5 * math.sqrt(rows) * mask.max()


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-3, 0.999])
def test_dropout_is_independent_from_element_to_element_and_seed_to_seed(p):
    first, second = (dropped((1000, 1001), p, seed) for seed in (0, 2**63 - 9))
    n = first.numel()
    for mask in (first, second):
        kept = mask != 0
        assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        assert mask[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-6)
        for sums in (kept.double().sum(0), kept.double().sum(1)):  # as spread as binomial counts are
            assert sums.var().item() / (n / len(sums) * p * (1 - p)) == pytest.approx(1, abs=0.25)
    flat, other = ((mask != 0).flatten().double() - (1 - p) for mask in (first, second))
    pairs = [flat[lag:] * flat[:-lag] for lag in (1, 2, 3, 4, 16, 1001, 65536)] + [flat * other]
    assert all(abs(pair.mean().item() / (p * (1 - p))) < 5 / math.sqrt(n) for pair in pairs)


def test_any_number_of_threads_gives_the_same_numbers():
    torch.manual_seed(0)
    by, before, made = drawn([0, 11, 0, 0, 40, 2, 0], 131, 0.2), torch.get_num_threads(), []
    x, upstream = torch.randn(2, 53, 131)
    for count in (1, 3):
        torch.set_num_threads(count)
        out, dx, dbias, alone = x.clone(), torch.empty_like(x), torch.empty(131), torch.empty_like(x)
        native.run("drop_add", out, torch.ones(131), x, *by)
        native.run("drop_add_backward", upstream, dx, dbias, *by)
        native.run("drop", x, alone, *by)
        d, gelu_bias = upstream.clone(), torch.empty(131)
        native.run("gelu_backward", x, d, gelu_bias, *x.shape)
        made.append((out, dx, dbias, alone, d, gelu_bias))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def trained(steps, dropout, dtype=torch.float32):
    """Losses of a small model's first steps."""
    shape = GPT2Config(500, 40, 48, 2, 3, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    model = GPT2(shape)
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), torch.device("cpu"), dtype, weight_decay=0.01, max_norm=1.0)
    step = TrainStep(Pieces(model), optimizer, torch.zeros(8 * 40, dtype=torch.int16), poems=8, pad_id=0)
    draw = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = []
    for number in range(steps):
        length = 5 + number % 30
        ids = torch.randint(1, 60, (8 * length,), generator=draw).to(torch.int16)
        where = torch.stack([torch.arange(8) * length, torch.full((8,), length)], 1)
        step(Rows(ids, where, Shape(8, length), 8 * (length - 1)), 3e-3)
        losses.append(step.result().loss)
    return torch.tensor(losses)


def test_the_losses_are_those_without_it(monkeypatch):
    with_it = trained(50, 0.0)
    monkeypatch.setattr(native, "_loaded", lambda *_: TAKEN_OUT)
    without = trained(50, 0.0)
    assert not torch.equal(with_it, without)  # it is another computation
    assert (with_it - without).abs().max() < 1e-5
    assert with_it[-1] < with_it[0] - 1


def test_with_dropout_the_losses_are_spread_alike(monkeypatch):
    torch.manual_seed(0)
    with_it, again = trained(150, 0.1), trained(150, 0.1)
    assert torch.equal(with_it, again)
    monkeypatch.setattr(native, "_loaded", lambda *_: TAKEN_OUT)
    without = trained(150, 0.1)
    assert abs(with_it[50:].mean() - without[50:].mean()) < 0.01


@pytest.mark.parametrize("suite", ["tests/test_kernels_loss.py", "tests/test_model.py"])
def test_everything_holds_without_a_compiler(suite):
    """PyTorch's operators, where gcc is not found: the same tests, in a process without a PATH."""
    environment = os.environ | {"PATH": "/nonexistent", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile", suite]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def gradients(model, ids):
    torch.manual_seed(1)
    result = cross_entropy(model(ids), ids.flatten())
    result.loss.backward()
    return result.loss.item(), next(model.parameters()).main_grad.clone()


def test_torchs_default_dtype_changes_nothing():
    model = GPT2(GPT2Config(50, 20, 24, 1, 3))
    model.initialise(0)
    FlatAdamW(model.train(), torch.device("cpu"), torch.float32, weight_decay=0.01, max_norm=1.0)
    ids = torch.arange(80).view(4, 20) % 50
    before, expected = torch.get_default_dtype(), gradients(model, ids)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            loss, gradient = gradients(model, ids)
            assert loss == expected[0] and torch.equal(gradient, expected[1]), dtype
    finally:
        torch.set_default_dtype(before)


def test_what_has_no_float32_memory_is_left_to_pytorch():
    """A product under autocast is bfloat16 and a FakeTensor's memory is nowhere: C would write beyond both."""
    x = torch.ones(2, 3)
    assert native.usable(x, torch.nn.Parameter(x))
    assert not native.usable(x, x.t()) and not native.usable(x, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.usable(x)
    with FakeTensorMode():
        model = GPT2(GPT2Config(50, 20, 24, 1, 3)).train()
        assert not native.usable(model.transformer.wte.weight)
        model(torch.zeros(2, 20, dtype=torch.int64)).sum().backward()


WHY = "from fastpoem_kernels import native; import torch; print(native.why_not()); print(native.usable(torch.ones(3)))"


def why_not(**environment):
    done = subprocess.run(
        [sys.executable, "-c", WHY], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:2]


def compiler(folder: Path, script: str) -> dict[str, str]:
    """A PATH whose gcc is this shell script."""
    (folder / "gcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "gcc").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.mark.parametrize("script, says", [
    ("echo 'cc1: no such option' >&2; exit 1", "gcc failed: cc1: no such option"),
    ("exit 3", "gcc failed: exit code 3"),
    (r"printf 'not\377utf-8' >&2; exit 1", "gcc failed: not"),
    ('for goal; do :; done; echo no library > "$goal"', "file too short"),
])  # fmt: skip
def test_a_compiler_that_fails_is_said_and_done_without(tmp_path, script, says):
    reason, usable = why_not(**compiler(tmp_path, script))
    assert says in reason and usable == "False"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "cache").write_text("a file")
    reason, usable = why_not(XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "cache" in reason and usable == "False"


def test_two_processes_that_compile_at_once(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", WHY], env=environment, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    assert [one.communicate()[0].split("\n")[1] for one in both] == ["True", "True"]
    assert len(list((tmp_path / "fastpoem" / "native").iterdir())) == 1
