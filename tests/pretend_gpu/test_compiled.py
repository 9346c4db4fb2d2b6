"""What is compiled for the cards, and what a step costs there: no kernel spills, a step's launches, its memory."""

import dataclasses
import re

import pytest
import torch
from conftest import TRAIN, UNCOVERED, assert_sound
from pretend import cubins, kind_of

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.doctor import checks
from fastpoem.engine import compile
from fastpoem.engine.batch import assemble
from fastpoem.engine.compile import compiled_pieces, one_of_each_form
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_device
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model.gpt2 import GPT2, GPT2Config

FULL = GPT2Config(21128, 1024, 768, 6, 12)  # 59.5 M parameters
CARD = torch.device("cuda:0")


@pytest.mark.parametrize("sm", [80, 90])
def test_no_kernel_spills(command, wide, tmp_path, sm):
    """Every kernel that training at the full model's width and vocabulary compiles, ours and Inductor's; in fp32 for one of the cards."""
    command.cache = tmp_path / "cache"  # the narrow models of other tests are not what is trained, and may spill
    forms = (["--batching", "bucket"], ["--batching", "pack"], ["--precision", "fp32"])
    for number, more in enumerate(forms if sm == 90 else forms[:2]):
        flags = [*wide, "--out", tmp_path / f"run-{number}", "--max-steps", 3, "--compile", "on", *more]
        assert_sound(command(TRAIN, *flags, sm=sm, extra=UNCOVERED))
    found = cubins(command.cache / f"sm_{sm}")
    names = {one.name for one in found}
    assert {"whole_row", "update", "partial_squares", "step_scalars"} <= names and sum(
        name.startswith("triton_") for name in names
    ) > 10
    assert {one.arch.rstrip("a") for one in found} == {f"sm_{sm}"}
    kernels = {
        (one.name, one.source) for one in found
    }  # Inductor's in several block sizes, of which it uses the fastest
    assert kernels == {(one.name, one.source) for one in found if not one.spilled}
    assert [one for one in found if one.spilled and not one.name.startswith("triton_")] == []
    print(f"sm_{sm}: {len(found)} cubins, at most {max(one.registers for one in found)} registers")


def step_of(poems: int, compiled: bool, dtype=torch.bfloat16) -> tuple[TrainStep, Rows]:
    """A step of the full model on `poems` poems of 67 tokens, the commonest long length, and one batch for it."""
    choose_device("cuda:0")  # as a run does: without cuDNN's attention
    model = GPT2(FULL).train().to(CARD)
    optimizer = FlatAdamW(model, CARD, dtype, weight_decay=0.01, max_norm=1.0)
    source = torch.zeros(poems * 67, dtype=torch.int16, device=CARD)
    step = TrainStep(Pieces(model), optimizer, source, poems=poems, pad_id=0)
    where = torch.stack([torch.arange(poems) * 67, torch.full((poems,), 67)], 1)
    rows = Rows(None, where, Shape(poems, 67), poems * 66)
    if compiled:
        step.pieces = compiled_pieces(model)
        for shape in one_of_each_form([rows.shape]):
            with step.rehearsal(shape):
                step.work(shape)
    return step, rows


# Nodes of a step's graph. Raise a number here only with a reason; bring it down with every kernel that is fused away.
NODES = {False: 345, True: 201}  # compiled: 198 by PyTorch 2.14, 201 by 2.11


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operations_of_a_step_are_counted(tape, compiled, capsys):
    step, rows = step_of(16, compiled)
    graphs = Graphs(step, print)
    graphs.record([rows.shape])
    assert not graphs.broken
    (one,) = tape.take().captures
    kinds: dict[str, int] = {}
    for entry in one.operations:
        kinds[kind_of(entry)] = kinds.get(kind_of(entry), 0) + 1
    with capsys.disabled():
        print(f"\n{'compiled' if compiled else 'eager'}: {one.nodes} nodes, {kinds}")
    assert kinds["product"] <= 76 and kinds["attention"] == 24
    assert one.nodes == sum(kinds.values()) <= NODES[compiled]


@pytest.mark.parametrize("poems", [16, 64, 256])
def test_memory_is_what_weights_and_activations_need(tape, poems, capsys):
    """Peak of PyTorch's own allocator, which counts here as on a card: 18 bytes a weight in bf16, and the activations of a step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = torch.cuda.memory_allocated()
    step, rows = step_of(poems, compiled=False)
    fixed = torch.cuda.memory_allocated() - begun
    graphs = Graphs(step, print)
    graphs.record([rows.shape])
    peak, held = torch.cuda.max_memory_allocated() - begun, torch.cuda.memory_reserved()
    parameters = step.optimizer.master.numel()
    tokens = poems * 66
    # bf16, a layer: input, norm, q k v, attention, projection and dropouts (12 wide), gelu's two (8 wide); the logits and their gradient's copy
    activations = tokens * (FULL.n_layer * 24 * FULL.n_embd * 2 + 2 * FULL.vocab_size * 2)
    with capsys.disabled():
        print(
            f"\n{poems} poems of 66: {fixed / 2**20:,.0f} MiB fixed, peak {peak / 2**20:,.0f} MiB, held {held / 2**20:,.0f} MiB"
        )
    assert 16 * parameters < fixed < 19 * parameters
    assert fixed < peak < 1.1 * (fixed + activations) + (64 << 20)
    del step, graphs


@pytest.mark.parametrize("largest_first", [True, False])
def test_recordings_share_the_memory_of_the_largest(tape, largest_first):
    """They do not where they grow, one by one: that is the control, and why the largest is recorded before training begins."""
    lengths = range(60, 301, 10)
    step, _ = step_of(16, compiled=False)
    step.source = torch.zeros(16 * 300, dtype=torch.int16, device=CARD)
    held = []
    graphs = Graphs(step, print)
    for length in [300, *lengths] if largest_first else lengths:
        graphs(Shape(16, length))
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert len(graphs.recorded) == len(lengths) and not graphs.broken
    grown = held[-1] - held[0]
    assert grown <= 64 << 20 if largest_first else grown > 2 << 30, [at >> 20 for at in held]
    del step, graphs


class NotCompiled:
    """A kernel of Inductor's that is written and not compiled: its text is what is looked at."""

    def run(self, *_, **__) -> None:
        pass


def written(monkeypatch, width: int, dtype: torch.dtype, packed: bool) -> list[str]:
    """What Inductor writes for the forward and the backward pass of a model with dropout."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(AsyncCompile, "triton", lambda *_, **__: NotCompiled())
    torch._dynamo.reset()
    choose_device("cuda:0")  # as a run does: without cuDNN's attention
    shape = dataclasses.replace(checks.SMALL, n_embd=width, n_layer=1, n_head=max(1, width // 64))
    step = checks.make_step(CARD, dtype, shape, packed, 0.1)
    rows = checks.batches(packed, shape, 1)[0]
    batch = assemble(rows.source.to(CARD), rows.where.to(CARD), rows.shape, 0)
    pieces = compiled_pieces(step.optimizer.module)

    def both() -> None:
        logits = pieces.model(batch.inputs, batch.packing)
        logits.backward(torch.zeros_like(logits))

    with config.patch(force_disable_caches=True):  # which pytest's monkeypatch would take away for good
        return run_and_get_code(both)[1]


DRAWN = re.compile(r"= (?:tl|triton_helpers)\.(rand\w*|philox\w*)\(")  # by a form that depends on the kernel's shape
HASHED = "-2073254261"  # a constant of fastpoem.model.dropout, once for each of a mask's two words


@pytest.mark.parametrize(
    ("width", "dtype", "packed"),
    [
        (128, torch.bfloat16, True),
        (768, torch.bfloat16, False),
        (36, torch.float32, False),
        (2048, torch.float32, True),
    ],
)
def test_masks_are_functions_of_seed_and_position(tape, monkeypatch, width, dtype, packed):
    """However wide the model, and so whatever the shape of the kernels that draw them, in either pass. Heads 36 wide have no fused attention."""
    forward, backward = written(monkeypatch, width, dtype, packed)
    assert not DRAWN.findall(forward + backward)
    assert HASHED in forward and "native_dropout" not in re.sub(r"(?m)^\s*#.*", "", forward + backward)


def test_masks_by_the_compilers_own_generator_are_seen(tape, monkeypatch):
    """The control: what the compiler makes of F.dropout."""
    monkeypatch.setattr(compile, "draw_seeds", lambda *_: None)
    forward, _ = written(monkeypatch, 128, torch.bfloat16, False)
    assert DRAWN.findall(forward)


def test_combined_kernels_that_cannot_be_compiled_are_done_without(tiny, tape, tmp_path, monkeypatch):
    from test_step import training
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.triton_combo_kernel import ComboKernel

    def refuse(*_, **__):
        raise AssertionError("no such combination")

    monkeypatch.setattr(ComboKernel, "__init__", refuse)
    monkeypatch.setattr(AsyncCompile, "triton", lambda *_, **__: NotCompiled())
    torch._dynamo.reset()
    flags = ["--out", tmp_path / "run", "--compile", "on", "--graphs", "off"]
    with config.patch(force_disable_caches=True), training(tiny, *flags) as (loop, said):
        assert loop.step.pieces.autograd
    lines = [line for line in said if "compiled" in line]
    assert len(lines) == 2 and "no such combination" in lines[0] and "a launch of its own" in lines[0]
    assert lines[1].startswith("compiled in")


def test_backward_of_our_loss_runs_its_own_kernels(tape):
    """In this thread, so that coverage sees what autograd's own thread runs on a card."""
    step, rows = step_of(2, compiled=False, dtype=torch.float32)
    with torch.autograd.set_multithreading_enabled(False):
        step(rows, 1e-3)
    names = [entry.words[1] for entry in tape.take().launches]
    assert {"count_targets", "whole_row", "add_rows", "scale_unless_one", "update"} <= {*names}
