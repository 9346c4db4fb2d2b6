"""engine/: the step against the plain loop it replaces, steps that are not finite, and the fallback when a kernel fails its check."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import plain
from fastpoem_kernels.check import Record

from fastpoem.corpus.feed import Batch
from fastpoem.engine import kernels
from fastpoem.engine.kernels import OURS, Kernels, choose_kernels
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import TrainStep
from fastpoem.model.gpt2 import GPT2, GPT2Config

SHAPE = GPT2Config(101, 24, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
CPU = torch.device("cpu")


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(1, 101, (4, 13), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, 5:] = -100
        yield Batch(ids[:, :-1].contiguous(), targets, None, 4, int((targets != -100).sum()))


def make(chosen=OURS, dtype=torch.float32, max_norm=0.5, pad_id=None):
    model = GPT2(SHAPE)
    model.initialise(0)
    model.train()
    optimizer = FlatAdamW(model, CPU, dtype, weight_decay=0.01, max_norm=max_norm, kernels=chosen)
    return model, TrainStep(model, optimizer, pad_id=pad_id)


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
        result = step(batch, lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        logits = reference(batch.inputs)
        loss = F.cross_entropy(logits, batch.targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert result.norm.item() == pytest.approx(norm.item(), rel=1e-4)
        real = batch.targets.flatten() != -100
        assert int(result.counted) == int(real.sum()) == batch.tokens
        assert int(result.correct) == int((logits.argmax(1) == batch.targets.flatten())[real].sum())
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
        result = step(next(stream), 1e-3)
        optimizer.working[3] = good
        if optimizer.working is optimizer.master:
            before[0][3] = good
        assert bool(result.skipped) and int(step.failed_in_a_row) == failures
        for flat, old in zip(
            (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.applied), before, strict=True
        ):
            assert torch.equal(flat, old)
    totals = step.totals()
    assert totals.skipped == 2 and math.isfinite(totals.loss)
    assert not bool(step(next(stream), 1e-3).skipped)
    assert (int(step.failed_in_a_row), int(step.most_failed)) == (0, 2)


def test_padding_counts_in_the_loss_but_not_in_the_accuracy():
    batch = next(batches(1))
    padded = batch._replace(targets=batch.targets.masked_fill(batch.targets == -100, 0))
    model, step = make(pad_id=0)
    logits = model(padded.inputs).detach()
    result = step(padded, 0.0)
    assert result.loss.item() == pytest.approx(F.cross_entropy(logits, padded.targets.flatten()).item(), rel=1e-6)
    assert int(result.counted) == batch.tokens < batch.targets.numel()


def test_a_kernel_that_fails_its_check_is_not_used(monkeypatch):
    """The control flow of a CUDA device, with records standing in for the card's."""
    said: list[str] = []
    records = [Record("cross_entropy bfloat16", False, note="CompileError: no"), Record("clipped_adamw float32", True)]
    monkeypatch.setattr(kernels, "check", lambda *_, **__: records)
    monkeypatch.delenv("FASTPOEM_ASSUME_CHECKED", raising=False)
    chosen = choose_kernels(torch.device("cuda"), 101, said.append)
    assert chosen == Kernels(cross_entropy=plain.cross_entropy)
    assert len(said) == 1 and "cross_entropy bfloat16" in said[0] and "CompileError" in said[0]
    records[:] = [Record("cross_entropy_evaluate float32", False), Record("clipped_adamw bfloat16", False, error=1.0)]
    assert choose_kernels(torch.device("cuda"), 101, said.append) == Kernels(plain.cross_entropy, plain.clipped_adamw_)
    monkeypatch.setenv("FASTPOEM_ASSUME_CHECKED", "1")
    assert choose_kernels(torch.device("cuda"), 101, said.append) == OURS


def test_compiled_gradients_reach_the_flat_buffer():
    """A model whose backward pass is torch.compile's (here AOTAutograd's, eager) trains as the eager one does."""
    _, eager = make()
    model, other = make()
    compiled = TrainStep(
        torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True),
        other.optimizer,
        pad_id=None,
        compiled=True,
    )
    for batch in batches(5):
        a, b = eager(batch, 1e-3), compiled(batch, 1e-3)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
        assert a.norm.item() == pytest.approx(b.norm.item(), rel=1e-4)
