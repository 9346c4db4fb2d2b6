"""The cross-entropy kernel against PyTorch in float64, in the cases that kernels like it got wrong.

The same tests serve both forms: here the CPU one, and with TRITON_INTERPRET=1 the Triton kernels (test_kernels_interpreter.py).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import cross_entropy, plain
from fastpoem_kernels.check import hard_batch
from fastpoem_kernels.dispatch import INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st

compiled_form_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not run under torch.compile")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates where a GPU rounds.
TRUNCATION = 2**-7 if INTERPRETED else 0.0


def produced(logits):
    """The logits as a model hands them over: not a leaf, in memory of their own, and what they were computed from."""
    source = logits.detach().clone().requires_grad_()
    return source, source.clone()


def reference(logits, target, ignore_index=-100):
    """Loss and gradient in float64, correct and valid by their definition."""
    exact = logits.detach().double().requires_grad_()
    valid = target != ignore_index
    loss = F.cross_entropy(exact, target, ignore_index=ignore_index, reduction="sum") / valid.sum().clamp(min=1)
    loss.backward()
    hits = (logits.argmax(1) == target) & valid if len(target) else valid
    return loss.item(), exact.grad, hits.sum().item(), valid.sum().item()


def worst(mine, exact):
    """The largest error as a share of the largest value."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return (mine.double() - exact).abs().max().item() / largest if largest else mine.abs().sum().item()


def agree(logits, target, ignore_index=-100):
    source, made = produced(logits)
    out = cross_entropy(made, target, ignore_index)
    out.loss.backward()
    loss, gradient, correct, valid = reference(logits, target, ignore_index)
    assert out.loss.dtype == torch.float32
    assert out.correct.dtype == out.valid.dtype == torch.int64
    assert (out.correct.item(), out.valid.item(), out.counted.item()) == (correct, valid, valid)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6, abs=2e-7)  # a loss near 0 is a difference of floats near 1
    if logits.dtype == torch.float32:
        off = (source.grad.double() - gradient).abs().max().item() if gradient.numel() else 0.0
        largest = gradient.abs().max().item() if gradient.numel() else 0.0
        assert off <= 1e-6 * largest + 2**-23 / max(1, valid)  # p - 1 has no more digits where p is nearly 1
    else:
        plain = logits.detach().clone().requires_grad_()
        kept = (target != ignore_index).sum().clamp(min=1)
        (F.cross_entropy(plain.float(), target, ignore_index=ignore_index, reduction="sum") / kept).backward()
        assert worst(source.grad, gradient) <= 2 * worst(plain.grad, gradient) + TRUNCATION


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(16, 1000), (5, 21128), (12 if INTERPRETED else 40, 7), (3, 1024), (3, 1025), (9, 1)]
)
def test_equals_pytorch_in_float64(shape, dtype):
    for seed in range(1 if INTERPRETED else 3):
        agree(*hard_batch(*shape, dtype, seed=seed))


@settings(max_examples=15 if INTERPRETED else 40)
@given(
    rows=st.integers(0, 9), vocabulary=st.integers(1, 70), seed=st.integers(0, 2**30), spread=st.sampled_from([0.1, 3, 40]),
    dtype=st.sampled_from(DTYPES), ignore_index=st.sampled_from([-100, 0, 3]),
)  # fmt: skip
@example(rows=0, vocabulary=5, seed=0, spread=3, dtype=torch.float32, ignore_index=-100)
@example(rows=4, vocabulary=1, seed=0, spread=3, dtype=torch.bfloat16, ignore_index=0)
def test_any_shape(rows, vocabulary, seed, spread, dtype, ignore_index):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = ignore_index
    agree(logits, target, ignore_index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows_keep_their_gradient(dtype):
    """At p = 0.999 the target's gradient is 0.001: lost if 1 is subtracted from a probability that was stored first."""
    vocabulary = 1000
    logits = torch.zeros(2, vocabulary, dtype=dtype)
    logits[:, 7] = 13.8125  # exact in every dtype
    target = torch.tensor([7, 7])
    _, made = produced(logits)
    cross_entropy(made, target)
    exact = reference(logits, target)[1]
    assert exact[0, 7].abs() < 2e-3
    relative = ((made.detach().double() - exact) / exact)[:, 7].abs().max().item()
    assert relative <= {torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype] + TRUNCATION


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_first_of_equal_largest_logits_is_right(dtype):
    logits = torch.zeros(5, 33, dtype=dtype)
    logits[:, [4, 20]] = 2.0
    assert cross_entropy(logits, torch.tensor([4, 20, 0, 32, 4])).correct == 2
    assert cross_entropy(torch.zeros(3, 33, dtype=dtype), torch.tensor([0, 1, 32])).correct == 1


def test_ignored_rows():
    logits, target = torch.randn(6, 50), torch.tensor([3, -100, 49, -100, 0, -100])
    logits[1] = math.nan  # an ignored row may hold anything
    _, made = produced(logits)
    out = cross_entropy(made, target)
    clean = torch.nan_to_num(logits)
    assert out.loss.item() == pytest.approx(reference(clean, target)[0], rel=1e-6)
    assert out.valid == 3
    assert (made[[1, 3, 5]] == 0).all()


def test_a_batch_of_ignored_rows_is_worth_nothing():
    source, made = produced(torch.randn(4, 50))
    out = cross_entropy(made, torch.full((4,), -100))
    out.loss.backward()
    assert [x.item() for x in out] == [0.0, 0, 0, 0]
    assert (source.grad == 0).all()


def test_an_empty_batch_is_worth_nothing():
    source, made = produced(torch.randn(0, 50))
    out = cross_entropy(made, torch.zeros(0, dtype=torch.int64))
    out.loss.backward()
    assert [x.item() for x in out] == [0.0, 0, 0, 0]
    assert source.grad.shape == (0, 50)


def test_padding_counts_in_the_loss_and_not_in_the_accuracy():
    logits = torch.zeros(5, 9)
    logits[:, 0] = 1.0
    target = torch.tensor([0, 0, 4, -100, 0])
    out = cross_entropy(logits, target, accuracy_ignore_index=0)
    assert (out.correct, out.valid, out.counted) == (0, 4, 1)
    assert out.loss.item() == pytest.approx(reference(logits, target)[0], rel=1e-6)
    out = cross_entropy(logits, target)
    assert (out.correct, out.valid, out.counted) == (3, 4, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    biggest = torch.finfo(dtype).max
    logits = torch.randn(4, 40).to(dtype)
    logits[0, 3], logits[0, 5] = biggest, -biggest
    logits[1, 1:] = -math.inf  # masked vocabulary
    logits[2] = -biggest
    target = torch.tensor([3, 0, 39, 7])
    source, made = produced(logits)
    out = cross_entropy(made, target)
    out.loss.backward()
    loss, gradient, correct, _ = reference(logits, target)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert out.correct == correct
    assert worst(source.grad, gradient) <= (1e-6 if dtype == torch.float32 else 2**-8) + TRUNCATION


def test_a_nan_is_seen():
    _, made = produced(torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]]))
    assert cross_entropy(made, torch.tensor([0, 1])).loss.isnan()


@pytest.mark.parametrize("bad", [9, -1])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    logits, target = torch.randn(3, 9), torch.tensor([0, bad, 2])
    if INTERPRETED:  # a device cannot raise: the step must not be taken
        _, made = produced(logits)
        assert cross_entropy(made, target).loss.isnan()
        assert made[1].isnan().all()
    else:
        with pytest.raises(IndexError, match="outside the vocabulary of 9"):
            cross_entropy(logits, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_touch(dtype):
    wide = torch.randn(6, 80).to(dtype)
    target = torch.randint(0, 50, (6,))
    source = wide.clone().requires_grad_()
    whole = source.clone()
    rest = whole[:, 50:].detach().clone()
    out = cross_entropy(whole[:, :50], target)
    out.loss.backward()
    _, gradient, correct, _ = reference(wide[:, :50], target)
    assert out.correct == correct
    assert worst(source.grad[:, :50], gradient) <= (1e-6 if dtype == torch.float32 else 2**-8) + TRUNCATION
    assert (source.grad[:, 50:] == 0).all()
    assert torch.equal(whole[:, 50:], rest)  # the neighbours in memory are not touched


@pytest.mark.parametrize("shape", ["transposed", "one row for all", "every other column", "reshaped", "shifted"])
def test_any_layout(shape):
    target = torch.randint(0, 20, (6,))
    base, view = {
        "transposed": (torch.randn(20, 6), lambda x: x.t()),
        "one row for all": (torch.randn(1, 20), lambda x: x.expand(6, 20)),
        "every other column": (torch.randn(6, 40), lambda x: x[:, ::2]),
        "reshaped": (torch.randn(2, 3, 20), lambda x: x.view(-1, 20)),
        "shifted": (torch.randn(2, 4, 20), lambda x: x[:, :-1].reshape(-1, 20)),
    }[shape]
    source = base.clone().requires_grad_()
    cross_entropy(view(source.clone()), target).loss.backward()
    exact = base.double().requires_grad_()
    F.cross_entropy(view(exact), target).backward()
    assert worst(source.grad, exact.grad) <= 1e-6


def test_offsets_beyond_31_bits():
    stride = 2**30 + 8
    room = torch.empty(2 * stride + 16, dtype=torch.bfloat16)  # 4 GiB, of which three pages are touched
    logits = room.as_strided((3, 16), (stride, 1))
    values = torch.randn(3, 16).bfloat16()
    logits.copy_(values)
    target = torch.tensor([1, 2, 15])
    exact = reference(values, target)[1]
    torch.ops.fastpoem.cross_entropy_overwrite(logits, target, -100, None)
    assert worst(logits, exact) <= 2**-8 + TRUNCATION
    torch.ops.fastpoem.scale_unless_one(logits, torch.tensor(3.0))
    assert worst(logits, 3 * exact) <= 2**-7 + 2 * TRUNCATION


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5, 1024.0])
def test_any_upstream_gradient(upstream, dtype):
    logits, target = hard_batch(8, 60, dtype)
    source, made = produced(logits)
    (cross_entropy(made, target).loss * upstream).backward()
    assert (
        worst(source.grad, upstream * reference(logits, target)[1])
        <= (1e-6 if dtype == torch.float32 else 2**-7) + 2 * TRUNCATION
    )


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_backward_twice_gives_the_same_twice(upstream):
    logits, target = hard_batch(8, 60, torch.float32)
    source, made = produced(logits)
    loss = cross_entropy(made, target).loss * upstream
    loss.backward(retain_graph=True)
    first = source.grad.clone()
    source.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(source.grad, first)
    loss.backward()
    assert torch.equal(source.grad, 2 * first)


def test_a_second_derivative_is_refused():
    source, made = produced(torch.randn(4, 9))
    (gradient,) = torch.autograd.grad(cross_entropy(made, torch.arange(4)).loss, source, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_overwrites_in_place_and_says_so():
    source, made = produced(torch.randn(5, 30))
    version, memory = made._version, made.data_ptr()
    target = torch.arange(5)
    out = cross_entropy(made, target)
    assert made._version > version
    assert made.data_ptr() == memory
    out.loss.backward()
    assert torch.equal(made, source.grad)


def test_what_autograd_needs_afterwards_is_missed():
    source = torch.randn(5, 30, requires_grad=True)
    loss = cross_entropy(source.softmax(1), torch.arange(5)).loss  # softmax keeps its output, now overwritten
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_was_touched_is_missed():
    _, made = produced(torch.randn(5, 30))
    loss = cross_entropy(made, torch.arange(5)).loss
    with torch.no_grad():
        made.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_and_their_views_are_not_overwritten():
    target = torch.arange(5)
    for view in (lambda x: x, lambda x: x.view(5, 30), lambda x: x[:, :20]):
        leaf = torch.randn(5, 30, requires_grad=True)
        before = leaf.detach().clone()
        cross_entropy(view(leaf), target).loss.backward()
        assert torch.equal(leaf, before)
        exact = before.double().requires_grad_()
        F.cross_entropy(view(exact), target).backward()
        assert worst(leaf.grad, exact.grad) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_the_logits_are_left_alone(dtype):
    logits, target = hard_batch(8, 60, dtype)
    loss, _, correct, valid = reference(logits, target)
    _, made = produced(logits)
    for given_logits, context in (
        (made, torch.no_grad()),
        (made, torch.inference_mode()),
        (made.detach(), torch.enable_grad()),
    ):
        version = made._version
        with context:
            out = cross_entropy(given_logits, target)
        assert torch.equal(made, logits)
        assert made._version == version
        assert not out.loss.requires_grad
        assert (out.correct, out.valid) == (correct, valid)
        assert out.loss.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "target", "error"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), ValueError),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), ValueError),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), TypeError),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), TypeError),
    ],
)
def test_refuses_what_it_does_not_compute(logits, target, error):
    with pytest.raises(error, match=r"expected|empty"):
        cross_entropy(logits, target)


def step(hidden, weight, target):
    out = cross_entropy(hidden @ weight.t(), target, accuracy_ignore_index=0)
    return out.loss * 2.0, out.correct, out.counted


@compiled_form_only
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    hidden, target = torch.randn(12, 8), torch.arange(12) - 2
    target[:2] = -100
    weight = torch.randn(40, 8, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for run in (step, compiled):
        weight.grad = None
        loss, *counts = run(hidden, weight, target)
        loss.backward()
        results.append((loss.detach(), *counts, weight.grad))
    for eager, same in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        loss, correct, _ = compiled(hidden, weight, target)
    assert (loss, correct) == pytest.approx((results[0][0].item(), results[0][1].item()), rel=1e-6)


@compiled_form_only
def test_compiled_code_does_not_copy_the_logits():
    from torch._inductor.utils import run_and_get_code

    def forward_and_backward(hidden, weight, target):
        loss, *_ = compiled(hidden, weight, target)
        loss.backward()

    compiled = torch.compile(step, fullgraph=True)
    weight = torch.randn(41, 8, requires_grad=True)
    _, (forward, backward) = run_and_get_code(forward_and_backward, torch.randn(12, 8), weight, torch.arange(12))
    assert "cross_entropy_overwrite" in forward
    assert forward.count("empty_strided_cpu((12, 41)") == 1  # the logits themselves
    assert "scale_unless_one" in backward
    assert "empty_strided_cpu((12, 41)" not in backward


@compiled_form_only
def test_operators_are_what_they_declare():
    logits, target = torch.randn(6, 20), torch.tensor([0, 1, -100, 3, 4, 19])
    torch.library.opcheck(torch.ops.fastpoem.cross_entropy_overwrite.default, (logits.clone(), target, -100, 0))
    torch.library.opcheck(torch.ops.fastpoem.cross_entropy_evaluate.default, (logits, target, -100, None))
    torch.library.opcheck(torch.ops.fastpoem.scale_unless_one.default, (logits.clone(), torch.tensor(2.0)))


@pytest.mark.skipif(not INTERPRETED, reason="the CPU form has no loop over the vocabulary")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [64, 65, 200])
def test_a_vocabulary_beyond_one_block(vocabulary, dtype, monkeypatch):
    from fastpoem_kernels import loss_triton

    monkeypatch.setattr(loss_triton, "WHOLE_ROW", 32)
    monkeypatch.setattr(loss_triton, "LOOP_BLOCK", 64)
    logits, target = hard_batch(8, vocabulary, dtype)
    agree(logits, target)
    logits = torch.full((3, vocabulary), -math.inf, dtype=dtype)
    logits[:, -1] = logits[1, 0] = 1.0  # whole blocks of nothing; a tie across blocks
    agree(logits, torch.tensor([vocabulary - 1, vocabulary - 1, vocabulary - 1]))


@pytest.mark.parametrize("form", [cross_entropy, plain.cross_entropy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_multiplies_the_gradient_and_not_the_loss(form, dtype):
    logits, target = hard_batch(16, 300, dtype)
    source, made = produced(logits)
    out = form(made, target, scale=torch.tensor(4096.0))
    out.loss.backward()
    loss, gradient, _, _ = reference(logits, target)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert worst(source.grad, 4096 * gradient) <= rounding + TRUNCATION


@pytest.mark.parametrize("form", [cross_entropy, plain.cross_entropy])
def test_small_gradients_of_float16_survive_by_the_scale(form):
    """p / N of an unlikely id is 8e-9, which float16 rounds to zero unless the scale is in it when it is formed."""
    logits, target = torch.zeros(100, 33, dtype=torch.float16), torch.zeros(100, dtype=torch.int64)
    logits[:, 0] = 14.0
    left = []
    for scale in (None, torch.tensor(65536.0)):
        source, made = produced(logits)
        form(made, target, scale=scale).loss.backward()
        left.append(source.grad[:, 1:])
    exact = reference(logits, target)[1][:, 1:]
    assert exact.min() > 0 and (left[0] == 0).all()
    assert worst(left[1].double() / 65536, exact) <= 2**-10 + TRUNCATION


@pytest.mark.parametrize("scale", [torch.ones(1), torch.ones((), dtype=torch.float16)])
def test_a_scale_is_one_float32(scale):
    with pytest.raises(TypeError, match="scale expected"):
        cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), scale=scale)
