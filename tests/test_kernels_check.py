"""The check that a user's card gets, run here on the CPU forms; and what the package promises of itself."""

import ast
import subprocess
import sys
from pathlib import Path

import fastpoem_kernels
import pytest
import torch
from fastpoem_kernels import adamw, check, loss_cpu

SMALL = {"rows": 40, "vocabulary": 500, "parameters": 6000}
NAMES = [
    "cross_entropy float32", "cross_entropy bfloat16", "cross_entropy_evaluate float32", "cross_entropy_evaluate bfloat16",
    "clipped_adamw float32", "clipped_adamw bfloat16",
]  # fmt: skip


def test_sound_kernels_pass_and_are_timed():
    records = check.check("cpu", **SMALL)
    assert [r.name for r in records] == NAMES
    for record in records:
        assert record.ok, record
        assert record.error <= record.tolerance
        assert min(record.ms, record.gb_per_s, record.share_of_copy, record.torch_ms) > 0
        assert record.liger_ms is None  # it has no CPU form
        assert record.note == ""


def failed(records):
    return [r.name for r in records if not r.ok]


@pytest.mark.parametrize(
    "fault",
    [
        lambda loss, correct, valid, counted, logits: logits.mul_(1.02),
        lambda loss, correct, valid, counted, logits: loss.mul_(1.0001),
        lambda loss, correct, valid, counted, logits: loss.fill_(torch.nan),
        lambda loss, correct, valid, counted, logits: correct.add_(1),
        lambda loss, correct, valid, counted, logits: logits[3].fill_(torch.nan),
    ],
)
def test_a_wrong_loss_kernel_is_found(fault, monkeypatch):
    sound = loss_cpu.cross_entropy

    def faulty(logits, *rest):
        out = sound(logits, *rest)
        fault(*out, logits)
        return out

    monkeypatch.setattr(loss_cpu, "cross_entropy", faulty)
    assert set(NAMES[:2]) <= set(failed(check.check("cpu", **SMALL))) <= set(NAMES[:4])


def test_logits_that_should_have_been_left_alone(monkeypatch):
    sound = loss_cpu.cross_entropy
    monkeypatch.setattr(loss_cpu, "cross_entropy", lambda *arguments: sound(*arguments[:4], True))
    assert failed(check.check("cpu", **SMALL)) == NAMES[2:4]


def test_float16_is_checked_with_its_scale(monkeypatch):
    """Sound kernels pass; one that leaves the scale out, where it is put in or where it is taken out, does not."""
    dtypes = (torch.float16,)
    assert failed(check.check("cpu", **SMALL, dtypes=dtypes)) == []
    loss, update = loss_cpu.cross_entropy, adamw.clipped_adamw_
    monkeypatch.setattr(loss_cpu, "cross_entropy", lambda *arguments: loss(*arguments[:5], None))
    monkeypatch.setattr(adamw, "clipped_adamw_", lambda *args, grad_scale, **kinds: update(*args, **kinds))
    assert failed(check.check("cpu", **SMALL, dtypes=dtypes)) == ["cross_entropy float16", "clipped_adamw float16"]


@pytest.mark.parametrize(
    "fault",
    [
        lambda state, norm, skipped: state[0].mul_(1.00001),
        lambda state, norm, skipped: state[2].mul_(0.99999),
        lambda state, norm, skipped: norm.mul_(1.0001),
        lambda state, norm, skipped: skipped.logical_not_(),
    ],
)
def test_a_wrong_optimizer_is_found(fault, monkeypatch):
    sound = adamw.clipped_adamw_

    def faulty(param, grad, m, v, **kinds):
        norm, skipped = sound(param, grad, m, v, **kinds)
        fault((param, m, v), norm, skipped)
        return norm, skipped

    monkeypatch.setattr(adamw, "clipped_adamw_", faulty)
    assert failed(check.check("cpu", **SMALL)) == NAMES[4:]


def test_a_kernel_that_does_not_run_is_a_record_with_the_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("ptxas fatal: unknown architecture\nand more")

    monkeypatch.setattr(loss_cpu, "cross_entropy", broken)
    records = check.check("cpu", **SMALL)
    assert failed(records) == NAMES[:4]
    assert records[0].note == "RuntimeError: ptxas fatal: unknown architecture"
    assert records[0].ms is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernels_on_the_card():
    assert failed(check.check("cuda")) == []


def test_the_package_stands_alone():
    folder = Path(fastpoem_kernels.__file__).parent
    assert not (folder.parent / "__init__.py").exists()  # transformers probes for a package called kernels
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "fastpoem" for name in names), file


def test_the_cpu_forms_need_no_triton():
    script = """
import sys; sys.modules["triton"] = None
import torch
from fastpoem_kernels import cross_entropy
logits = torch.zeros(2, 4, requires_grad=True)
cross_entropy(logits, torch.tensor([0, 1])).loss.backward()
print(logits.grad[0, 0].item())
"""
    paths = {"PYTHONPATH": str(Path(fastpoem_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=paths, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(-0.375)
