"""How a step's speed changes with the length of the poems, their number and the size of the model, one of them at a time.

On one device. Over the number of GPUs it is computed: benchmarks/scaling.py."""

import dataclasses

import pytest

from benchmarks.arithmetic import model_flops, settle
from benchmarks.devices import DEVICES
from benchmarks.precision import dtype_on
from benchmarks.scene import BATCH, FULL, LENGTH, made_up_rows, make_step
from fastpoem.run.folder import PRECISIONS

ROUNDS = 3
CASES = [
    *(("length", FULL, BATCH, length) for length in (18, 34, LENGTH, 130)),
    *(("batch", FULL, poems, LENGTH) for poems in (1, 4, BATCH, 32)),
    *(
        ("model", dataclasses.replace(FULL, n_layer=layers, n_embd=wide, n_head=wide // 64), BATCH, LENGTH)
        for layers, wide in ((2, 128), (4, 256), (6, 512), (6, 768), (12, 768))
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("axis", "shape", "poems", "length"), CASES, ids=lambda value: getattr(value, "n_embd", value))
def test_scaling(benchmark, axis, shape, poems, length, device):
    dtype, rows = dtype_on(device), made_up_rows(shape, poems, length)
    step = make_step(shape, device, poems=poems, longest=length, dtype=dtype)

    def train():
        step(rows, 2e-5)
        settle(device)

    benchmark.group = f"scaling with {axis} on {device}"
    benchmark.pedantic(train, rounds=ROUNDS, warmup_rounds=1)
    seconds, flops = benchmark.stats.stats.median, model_flops(shape, [length - 1] * poems)
    at = {"length": length, "batch": poems, "model": f"{shape.n_layer} x {shape.n_embd}"}[axis]
    benchmark.extra_info.update(
        kind="scaling",
        axis=axis,
        at=at,
        device=device,
        precision=PRECISIONS[dtype],
        tokens_per_s=rows.tokens / seconds,
        flops_per_s=flops / seconds,
    )
