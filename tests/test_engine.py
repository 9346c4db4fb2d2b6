"""engine/: the step against the plain loop it replaces, steps that are not finite, and the fallback when a kernel fails its check."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import plain

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.engine import build
from fastpoem.engine.compile import compiled_pieces
from fastpoem.engine.kernels import OURS, PLAIN, Kernels, choose_kernels
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import GIVE_UP, Pieces, TrainStep
from fastpoem.model.gpt2 import GPT2, GPT2Config

SHAPE = GPT2Config(101, 24, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
CPU = torch.device("cpu")


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(1, 101, (4, 13), generator=generator)
        where = torch.tensor([[0, 6], [13, 13], [26, 13], [39, 13]])
        yield Rows(ids.short().flatten(), where, Shape(4, 13), 41)


def unrolled(rows, padding=-100):
    """inputs (B, T) and targets (B * T,) of a batch, by hand."""
    ids = rows.source.long().view(4, 13)
    targets = ids[:, 1:].clone()
    targets[0, 5:] = padding
    ids[0, 6:] = 0
    return ids[:, :-1], targets.flatten()


def make(chosen=OURS, dtype=torch.float32, max_norm=0.5, pad_targets=False):
    model = GPT2(SHAPE)
    model.initialise(0)
    model.train()
    optimizer = FlatAdamW(model, CPU, dtype, weight_decay=0.01, max_norm=max_norm, kernels=chosen)
    return model, TrainStep(
        Pieces(model), optimizer, torch.zeros(52, dtype=torch.int16), poems=4, pad_id=0, pad_targets=pad_targets
    )


@pytest.mark.parametrize("chosen", [OURS, Kernels(plain.cross_entropy, plain.clipped_adamw_)])
def test_a_hundred_steps_are_those_of_the_plain_loop(chosen):
    model, step = make(chosen)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data = parameter.data.clone()
        if hasattr(parameter, "main_grad"):
            del parameter.main_grad
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    for number, batch in enumerate(batches(100)):
        lr = 1e-3 * (1 + number % 3)
        step(batch, lr)
        result = step.result()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        inputs, targets = unrolled(batch)
        logits = reference(inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.norm == pytest.approx(norm.item(), rel=1e-4)
        real = targets != -100
        assert result.counted == int(real.sum()) == batch.tokens
        assert result.correct == int((logits.argmax(1) == targets)[real].sum())
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        # A key's bias has no gradient but rounding, which Adam makes as large as any: hence no tighter.
        assert (a - b).abs().max() < 1e-3 * b.abs().max() + 1e-6, name
    totals = step.totals()
    assert totals.valid == sum(batch.tokens for batch in batches(100)) and totals.skipped == 0


@pytest.mark.parametrize("chosen", [OURS, Kernels(plain.cross_entropy, plain.clipped_adamw_)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(chosen, dtype):
    _, step = make(chosen, dtype)
    stream = batches(20)
    step(next(stream), 1e-3)
    optimizer = step.optimizer
    before = [flat.clone() for flat in (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.applied)]
    good = optimizer.working[3].clone()
    for failures in (1, 2):
        optimizer.working[3] = math.nan
        step(next(stream), 1e-3)
        optimizer.working[3] = good
        if optimizer.working is optimizer.master:
            before[0][3] = good
        assert step.result().skipped and int(step.account.failed_in_a_row) == failures
        for flat, old in zip(
            (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.applied), before, strict=True
        ):
            assert torch.equal(flat, old)
    totals = step.totals()
    assert totals.skipped == 2 and math.isfinite(totals.loss)
    step(next(stream), 1e-3)
    assert not step.result().skipped
    assert (int(step.account.failed_in_a_row), int(step.account.most_failed)) == (0, 2)


@pytest.mark.parametrize("chosen", [OURS, PLAIN])
def test_a_scale_too_large_for_float16_is_halved_until_it_fits(chosen):
    """Steps that overflow by it change nothing, are counted, and are no failures; the others train as with a scale that fits at once."""
    (_, step), (_, fits) = make(chosen, torch.float16), make(chosen, torch.float16)
    optimizer = step.optimizer
    optimizer.scale.value.fill_(2.0**26)
    before = optimizer.master.clone()
    (batch,) = batches(1)
    for number in range(1, 40):
        step(batch, 1e-3)
        assert float(optimizer.scale.value) == 2.0 ** (26 - number) or not step.result().skipped
        if not step.result().skipped:
            break
        assert torch.equal(optimizer.master, before) and math.isfinite(step.result().loss)
    lost = step.totals().skipped
    assert 3 < lost < 20 and (int(step.account.failed_in_a_row), int(step.account.most_failed)) == (0, 0)
    fits.optimizer.scale.value.copy_(optimizer.scale.value)
    fits(batch, 1e-3)
    for later in batches(10, seed=1):
        step(later, 1e-3)
        fits(later, 1e-3)
    assert torch.equal(optimizer.master, fits.optimizer.master)
    assert step.totals().skipped - lost == fits.totals().skipped < 3


def test_a_scale_that_fits_is_doubled_after_two_thousand_steps():
    _, step = make(dtype=torch.float16)
    (batch,) = batches(1)
    step.optimizer.scale.good.fill_(1998)
    values = []
    for _ in range(3):
        step(batch, 0.0)
        values.append(float(step.optimizer.scale.value))
    assert values == [2.0**16, 2.0**17, 2.0**17] and step.optimizer.scale.good == 1


@pytest.mark.parametrize("fault", ["weights", "gradient"])
def test_what_no_scale_mends_ends_a_float16_run(fault):
    """NaN weights are told by the loss, and counted from the first step; a gradient that is never finite, once the scale is at its floor."""
    _, step = make(dtype=torch.float16)
    if fault == "weights":
        step.optimizer.master[3] = math.nan
        step.optimizer.reload()
    else:
        model = step.pieces.model
        step.pieces = step.pieces._replace(model=lambda *given: Endless.apply(model(*given)))
    (batch,) = batches(1)
    while int(step.account.most_failed) < GIVE_UP and step.totals().skipped < 30:
        step(batch, 1e-3)
        assert step.result().skipped
    assert step.totals().skipped == (GIVE_UP if fault == "weights" else 16 + GIVE_UP)
    assert float(step.optimizer.scale.value) == (2.0**16 if fault == "weights" else 1.0)


class Endless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.full_like(dy, math.inf)


def test_padding_counts_in_the_loss_but_not_in_the_accuracy():
    batch = next(batches(1))
    inputs, targets = unrolled(batch, padding=0)
    model, step = make(pad_targets=True)
    logits = model(inputs).detach()
    step(batch, 0.0)
    assert step.result().loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert step.result().counted == batch.tokens < targets.numel()


def test_a_kernel_that_fails_its_check_is_not_used():
    said: list[str] = []
    assert choose_kernels({}, said.append) == OURS and said == []
    assert choose_kernels({"cross_entropy bfloat16": "CompileError: no"}, said.append) == Kernels(plain.cross_entropy)
    assert len(said) == 1 and "cross_entropy bfloat16" in said[0] and "CompileError" in said[0]
    both = {"cross_entropy_evaluate float32": "", "clipped_adamw bfloat16": "error 1"}
    assert choose_kernels(both, said.append) == Kernels(plain.cross_entropy, plain.clipped_adamw_)
    died = {"kernels 21128": "its process was ended by signal 11"}
    assert choose_kernels(died, said.append) == Kernels(plain.cross_entropy, plain.clipped_adamw_)


def test_compiled_gradients_reach_the_flat_buffer():
    """A model whose backward pass is torch.compile's (here AOTAutograd's, eager) trains as the eager one does."""
    _, eager = make()
    model, step = make()
    step.pieces = compiled_pieces(model, backend="aot_eager")
    for batch in batches(5):
        eager(batch, 1e-3)
        step(batch, 1e-3)
        a, b = eager.result(), step.result()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.norm == pytest.approx(b.norm, rel=1e-4)


@pytest.mark.parametrize(("broken", "insists"), [(0, False), (1, True), (2, False), (2, True)])
def test_with_combined_kernels_then_without_then_uncompiled(broken, insists, monkeypatch):
    """Each is said in a line; what the user insists on is raised once nothing is left to try."""
    asked, said = [], list[str]()

    def pieces(model, combined):
        asked.append(combined)
        made = Pieces(model)

        def refuse(*_):
            raise RuntimeError(f"InductorError: combined={combined}\nand more")

        return made._replace(model=refuse) if len(asked) <= broken else made

    monkeypatch.setattr(build, "compiled_pieces", pieces)
    model, step = make()
    plain = step.pieces
    goes = contextlib.nullcontext() if broken < 2 or not insists else pytest.raises(RuntimeError, match="False")
    with goes:
        build._compile(step, model, [Shape(4, 13)], insists, True, said.append)
    assert asked == [True, False][: broken + 1]
    lines = [line.split(" (")[0] for line in said]
    refused = ["the compiled step failed with combined kernels", "the model could not be compiled"]
    end = [] if broken == 2 else ["compiled in 0 s"]
    assert lines == refused[: broken - (insists and broken == 2)] + end
    assert (step.pieces is plain) == (broken == 2 and not insists) and not any("and more" in line for line in said)


@pytest.mark.parametrize(
    "says",
    ["CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_whoever_runs_out_of_a_cards_memory(monkeypatch, says):
    """PyTorch's allocator, the driver and cuBLAS say it in errors of different kinds; any other error is left as it is."""
    from fastpoem.config import TrainConfig
    from fastpoem.engine.memory import enough_memory
    from fastpoem.errors import InputError

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for name in ("max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 6 << 30)
    card = torch.device("cuda:0")
    with (
        pytest.raises(InputError, match=r"cuda:0 has 8.0 GiB, of which training held 6.0 GiB"),
        enough_memory(TrainConfig(), card),
    ):
        raise RuntimeError(says)
    with pytest.raises(RuntimeError, match="misaligned"), enough_memory(TrainConfig(), card):
        raise RuntimeError("CUDA error: misaligned address")
    with pytest.raises(RuntimeError), enough_memory(TrainConfig(), torch.device("cpu")):
        raise RuntimeError(says)
