"""Clipped AdamW over one flat buffer beside PyTorch's, over a model's tensors: one by one, and fused.

59.5 million parameters as the model has them; every form clips to a norm of 1 and updates.
"""

import pytest
import torch
from fastpoem_kernels import clipped_adamw_

from benchmarks.devices import DEVICES

BLOCK = [768, 768, 2304 * 768, 2304, 768 * 768, 768, 768, 768, 3072 * 768, 3072, 768 * 3072, 768]
SIZES = [21128 * 768, 1024 * 768, *(BLOCK * 6), 768, 768]


def pytorch(device, **kinds):
    parameters = [torch.nn.Parameter(0.02 * torch.randn(size, device=device)) for size in SIZES]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, **kinds)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def step():
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return norm

    return step


def flat(device):
    param, grad = 0.02 * torch.randn(sum(SIZES), device=device), torch.randn(sum(SIZES), device=device)
    m, v, count = torch.zeros_like(param), torch.zeros_like(param), torch.zeros((), device=device)
    lr, limit = torch.tensor(2e-5, device=device), torch.tensor(1.0, device=device)
    return lambda: clipped_adamw_(param, grad, m, v, step=count, lr=lr, max_norm=limit)[0]


FORMS = {
    "one by one": lambda device: pytorch(device, foreach=False),
    "fused": lambda device: pytorch(device, fused=True),
    "flat": flat,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_clipped_adamw(benchmark, form, device):
    benchmark.group = f"clip and AdamW, {sum(SIZES):,} parameters on {device}"
    step = FORMS[form](device)
    benchmark.pedantic(lambda: step().item(), rounds=11, warmup_rounds=2)
