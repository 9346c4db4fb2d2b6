"""Every kernel against its reference on this device, and its speed against PyTorch's and Liger's: what a doctor asks for.

Inputs are fresh and hold the rows that kernels get wrong: confident ones, ties, ignored targets, the first and the last id. The
reference is PyTorch in float64. Speed is bandwidth: the least bytes the task must move over the time taken, beside a plain copy
of a tensor of the same size. A kernel that fails to compile or to run is a record like any other, with the reason.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpoem_kernels import adamw

BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01
FP32_TOLERANCE = 1e-6
SCALE = 65536.0  # of a float16 gradient


@dataclass
class Record:
    """`error` and `tolerance` are relative. `share_of_copy`: `gb_per_s` over that of a device copy. None: not measured."""

    name: str
    ok: bool
    error: float | None = None
    tolerance: float | None = None
    ms: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    torch_ms: float | None = None
    liger_ms: float | None = None
    note: str = ""


def check(
    device: torch.device | str = "cuda",
    rows: int = 1030,
    vocabulary: int = 21128,
    parameters: int = 20_000_000,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> list[Record]:
    """One record a kernel and dtype. On a CPU the CPU forms are checked, on CUDA the Triton kernels; takes some seconds. float16 is
    checked as it is used, with a scale."""
    device = torch.device(device)
    return [
        *(_guarded(_check_loss, device, dtype, True, rows, vocabulary) for dtype in dtypes),
        *(_guarded(_check_loss, device, dtype, False, rows, vocabulary) for dtype in dtypes),
        *(_guarded(_check_adamw, device, dtype, parameters) for dtype in dtypes),
    ]


def _guarded(run: Callable[..., Record], *arguments: Any) -> Record:
    dtype = next(a for a in arguments if isinstance(a, torch.dtype))
    kernel = (
        "clipped_adamw" if run is _check_adamw else "cross_entropy" if True in arguments else "cross_entropy_evaluate"
    )
    name = f"{kernel} {str(dtype).removeprefix('torch.')}"
    try:
        record = run(*arguments)
    except Exception as error:  # the compiler, the driver or the kernel: whichever it was, the plain path is taken
        return Record(name, False, note=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    record.name = name
    return record


def hard_batch(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and targets (N,) with confident rows, ties, ignored (-100) and padded (0) targets, first and last ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    for row in range(rows):
        match row % 8:
            case 0:
                target[row] = -100
            case 1:
                logits[row, target[row]] = 25.0  # p = 1 but for the last digits
            case 2:
                logits[row, [target[row], vocabulary // 2]] = 20.0  # a tie: the first counts
            case 3:
                target[row] = 0
            case 4:
                target[row] = vocabulary - 1
    return logits.to(device), target.to(device)


def _check_loss(device: torch.device, dtype: torch.dtype, overwrite: bool, rows: int, vocabulary: int) -> Record:
    logits, target = hard_batch(rows, vocabulary, dtype, device, seed=time.time_ns() % 2**31)
    scale = torch.tensor(SCALE, device=device) if dtype == torch.float16 else None
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target)
    (gradient,) = torch.autograd.grad(expected if scale is None else SCALE * expected, exact)
    counted = (target != -100) & (target != 0)
    correct = ((logits.argmax(1) == target) & counted).sum()

    if overwrite:
        run = lambda logits: torch.ops.fastpoem.cross_entropy_overwrite(logits, target, -100, 0, scale)
    else:
        run = lambda logits: torch.ops.fastpoem.cross_entropy_evaluate(logits, target, -100, 0)
    mine, one = logits.clone(), torch.ones((), device=device)
    out = run(mine)
    counts_ok = all(
        int(a) == int(b) for a, b in zip(out[1:], (correct, (target != -100).sum(), counted.sum()), strict=True)
    )
    if not expected > 0:
        return Record("", False, note="PyTorch computes nothing here")
    errors = [(_relative(out[0], expected), FP32_TOLERANCE)]
    if overwrite:
        plain = logits.clone().requires_grad_()
        factor = 1.0 if scale is None else SCALE
        (rounded,) = torch.autograd.grad(factor * F.cross_entropy(plain.float(), target), plain)
        allowed = FP32_TOLERANCE if dtype == torch.float32 else 2 * _relative(rounded, gradient)
        errors.append((_relative(mine, gradient), allowed))
    else:
        counts_ok &= bool((mine == logits).all())
    del exact, gradient

    def ours() -> None:
        run(mine)
        if overwrite:
            torch.ops.fastpoem.scale_unless_one(mine, one)

    def torchs() -> None:
        plain = logits.detach().requires_grad_(overwrite)
        value = F.cross_entropy(plain, target)
        ((plain.argmax(1) == target) & counted).sum()
        if overwrite:
            torch.autograd.grad(value, plain)

    moved = logits.numel() * logits.itemsize * (2 if overwrite else 1)
    record = _timed(device, ours, torchs, moved, logits)
    record.error, record.tolerance = max(errors, key=lambda pair: pair[0] / pair[1])
    record.ok = counts_ok and record.error <= record.tolerance
    record.note = "" if counts_ok else "counts differ, or logits that should have been left alone were not"
    record.liger_ms = _liger_ms(logits, target) if overwrite and device.type == "cuda" else None
    return record


def _check_adamw(device: torch.device, grad_dtype: torch.dtype, parameters: int) -> Record:
    param = torch.randn(parameters, device=device) * 0.02
    m, v, step = torch.zeros_like(param), torch.zeros_like(param), torch.zeros((), device=device)
    lr, limit = torch.tensor(1e-3, device=device), torch.tensor(1.0, device=device)
    low = None if grad_dtype == torch.float32 else torch.empty(parameters, dtype=grad_dtype, device=device)
    # a gradient of 10 would overflow float16 at SCALE
    scale = torch.tensor(SCALE / 128, device=device) if grad_dtype == torch.float16 else None
    kinds: dict[str, Any] = dict(step=step, lr=lr, max_norm=limit, low_precision=low, grad_scale=scale)
    exact = torch.nn.Parameter(param.double())
    settings: dict[str, Any] = dict(lr=lr.item(), betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY)
    reference = torch.optim.AdamW([exact], **settings)
    start, errors, sound = param.double(), [], True
    for size in (1e-6, 1.0, 10.0):  # below the limit and above it
        grad = (size * (1.0 if scale is None else scale) * torch.randn(parameters, device=device)).to(grad_dtype)
        exact.grad = grad.double() if scale is None else grad.double() / scale
        expected = torch.nn.utils.clip_grad_norm_([exact], limit.item())
        reference.step()
        more = {"norm": adamw.gradient_norm(grad)} if size == 10.0 else {}  # as for a part of a gradient
        norm, skipped = adamw.clipped_adamw_(param, grad, m, v, **kinds, **more)
        errors.append(_relative(norm, expected))
        sound &= not skipped
    state = reference.state[exact]
    errors += [_distance(param, exact), _distance(m, state["exp_avg"])]
    errors.append(_distance(v, state["exp_avg_sq"]) / 2)  # it has the square of the norm in it, so twice its error
    # The weights hardly move in three steps: the change itself must agree too, as far as float32 weights can tell.
    sound &= _distance(param.double() - start, exact.detach() - start) < 1e-5
    before = [t.clone() for t in (param, m, v, step)]
    grad[parameters // 2] = float("nan")
    _, skipped = adamw.clipped_adamw_(param, grad, m, v, **kinds)
    sound &= bool(skipped) and all(bool((a == b).all()) for a, b in zip(before, (param, m, v, step), strict=True))
    sound &= low is None or bool((low == param.to(grad_dtype)).all())
    del reference, exact, state, start, before

    grad.zero_()
    plain = torch.nn.Parameter(param.clone())
    plain.grad = grad.float()
    optimizer = torch.optim.AdamW([plain], fused=True, **settings)

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_([plain], 1.0)
        optimizer.step()
        if low is not None:
            low.copy_(plain.detach())

    moved = parameters * (6 * 4 + 2 * grad.itemsize + (2 if low is not None else 0))
    record = _timed(device, lambda: adamw.clipped_adamw_(param, grad, m, v, **kinds), torchs, moved, param)
    record.ok, record.error, record.tolerance = sound and max(errors) <= FP32_TOLERANCE, max(errors), FP32_TOLERANCE
    record.note = "" if sound else "a step that is not finite must change nothing, and one that is must be taken"
    return record


def _relative(mine: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where a NaN hides it."""
    error = ((mine.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    return error if error == error else float("inf")


def _distance(mine: Tensor, expected: Tensor) -> float:
    error = ((mine.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def _timed(
    device: torch.device, ours: Callable[[], Any], torchs: Callable[[], Any], moved: int, like: Tensor
) -> Record:
    """Times as medians of alternating runs, so that what disturbs one disturbs the other."""
    source, sink = torch.zeros_like(like), torch.empty_like(like)
    runs: list[Callable[[], Any]] = [ours, torchs, lambda: sink.copy_(source)]
    mine, theirs, copy = (statistics.median(times) for times in zip(*_alternate(device, runs), strict=True))
    speed, copy_speed = moved / mine / 1e6, 2 * like.numel() * like.itemsize / copy / 1e6
    return Record("", True, ms=mine, gb_per_s=speed, share_of_copy=speed / copy_speed, torch_ms=theirs)


def _alternate(device: torch.device, runs: list[Callable[[], Any]], rounds: int = 9) -> Iterator[list[float]]:
    """Milliseconds of each run, a round at a time; the first rounds warm up and are not reported."""
    for number in range(rounds + 2):
        times = [_milliseconds(device, run) for run in runs]
        if number >= 2:
            yield times


def _milliseconds(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            first.record()
            run()
            last.record()
            last.synchronize()
        return first.elapsed_time(last)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _liger_ms(logits: Tensor, target: Tensor) -> float | None:
    """Liger's loss and backward on the same rows, where it is installed and runs."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        criterion = LigerCrossEntropyLoss()

        def run() -> None:
            plain = logits.clone().requires_grad_()
            criterion(plain, target).backward()

        copy = statistics.median(t[0] for t in _alternate(logits.device, [lambda: logits.clone()]))
        return statistics.median(t[0] for t in _alternate(logits.device, [run])) - copy
    except Exception:  # not installed, or not for this PyTorch, Triton or card: no figure
        return None


if __name__ == "__main__":
    for record in check("cuda" if torch.cuda.is_available() else "cpu"):
        print(record)
