"""The fused cross-entropy beside what it replaces: `F.cross_entropy`, an argmax for the accuracy, and the backward pass.

At the shape of a step of training: 1,030 rows of 21,128 logits. `extra_info` holds the peak of memory beyond the logits.
"""

import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastpoem_kernels import cross_entropy

from benchmarks.devices import DEVICES
from benchmarks.race import ROOT

ROWS, VOCABULARY = 1030, 21128


class FromModel(torch.autograd.Function):
    """Logits as a model's last layer returns them; the layer's own backward pass is left out."""

    @staticmethod
    def forward(ctx, leaf, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def plain(logits, target):
    loss = F.cross_entropy(logits.float(), target)
    correct = (logits.argmax(1) == target).sum()
    loss.backward()
    return correct


def fused(logits, target):
    out = cross_entropy(logits, target)
    out.loss.backward()
    return out.correct


def batch(dtype, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator)
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    learned = torch.arange(0, ROWS, 4)  # the model is right a quarter of the time
    logits[learned, target[learned]] = 9.0
    return logits.to(device, dtype), target.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [plain, fused], ids=["pytorch", "fused"])
def test_cross_entropy(benchmark, form, dtype, device):
    benchmark.group = f"cross-entropy, accuracy, gradient [{ROWS}, {VOCABULARY}] {str(dtype)[6:]} on {device}"
    logits, target = batch(dtype, device)
    leaf = torch.zeros((), device=device, requires_grad=True)

    def fresh():
        return (FromModel.apply(leaf, logits.clone()), target), {}

    def run(made, target):
        form(made, target).item()  # on CUDA: wait for it

    if device == "cpu":
        benchmark.extra_info["extra_MiB"] = extra_memory(form.__name__, dtype)
    benchmark.pedantic(run, setup=fresh, rounds=15, warmup_rounds=2)


def extra_memory(form, dtype):
    """MiB that a fresh process needs at its peak beyond holding the logits."""
    command = [sys.executable, "-m", "benchmarks.test_kernels_loss", form, str(dtype)[6:]]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    run, dtype = globals()[sys.argv[1]], getattr(torch, sys.argv[2])
    leaf, target = torch.zeros((), requires_grad=True), torch.randint(0, VOCABULARY, (ROWS,))
    run(FromModel.apply(leaf, torch.randn(2, VOCABULARY, dtype=dtype)), target[:2])  # load the code first
    logits = FromModel.apply(leaf, torch.randn(ROWS, VOCABULARY, dtype=dtype))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(logits, target)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
