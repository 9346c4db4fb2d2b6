"""The checks of a device, run here on the CPU: each passes on what is right and fails on what is not; what is trusted and remembered; the doctor."""

import functools
import json
import math
import os
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from fastpoem_kernels import native, plain
from fastpoem_kernels.check import Record, check

from fastpoem.config import TrainConfig
from fastpoem.doctor import __main__ as doctor
from fastpoem.doctor import apart, check_attention, checks, examine, machine, trial, trust, verdicts
from fastpoem.engine import cards
from fastpoem.engine.build import Trusted
from fastpoem.engine.compile import keep_caches_in
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.kernels import PLAIN, kernels_without
from fastpoem.engine.step import Pieces
from fastpoem.errors import InputError
from fastpoem.model import fused, gpt2, ops
from fastpoem.model.attention import causal_attention
from fastpoem.model.dropout import draw_seeds, drop
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.signals import Stopped

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
TINY = GPT2Config(120, 160, 32, 1, 2, initializer_range=0.1)


def right(records):
    return all(record.ok for record in records)


@pytest.mark.parametrize(
    "name",
    [
        "kernels 500",
        *(f"attention {dtype}{packed}" for dtype in ("float32", "bfloat16", "float16") for packed in ("", " packed")),
        "kernels 500 float16",
        "compiled float32",
        "compiled bfloat16 packed",
        "replay float32",
        "replay bfloat16 packed",
        "replay float16",
        pytest.param("replay float32 compiled", marks=pytest.mark.slow),
    ],
)
def test_what_is_right_passes(name, monkeypatch):
    monkeypatch.setattr(checks, "SMALL", TINY)
    state = torch.get_rng_state()
    records = checks.run(name, CPU)
    assert right(records), records
    assert all(record.error <= record.tolerance for record in records)
    if not name.startswith("kernels"):
        assert all(record.name.startswith(name) for record in records)
        assert torch.equal(torch.get_rng_state(), state)


# Replay


class Stale(Graphs):
    """Replays with the message of the step before."""

    def __call__(self, shape):
        now = self.step.message.clone()
        if hasattr(self, "before"):
            self.step.message[:-1, 1].copy_(self.before[:-1, 1])
        self.before = now
        super().__call__(shape)


class OldRate(Graphs):
    def __call__(self, shape):
        self.rate = getattr(self, "rate", self.step.message[-1].clone())
        self.step.message[-1].copy_(self.rate)
        super().__call__(shape)


class SameMask(Graphs):
    """What comes of a generator that is not registered with the graph."""

    def __call__(self, shape):
        torch.manual_seed(1)
        super().__call__(shape)


class OneShape(Graphs):
    """Replays the graph of the shortest poems whatever the batch."""

    def record(self, shapes):
        self.shortest = min(shapes, key=lambda shape: shape.longest)
        super().record(shapes)

    def __call__(self, shape):
        super().__call__(self.shortest)


class Broken(Graphs):
    def record(self, shapes):
        self.broken = True
        self.say("operation not permitted when stream is capturing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Stale, OldRate, SameMask, OneShape, Broken])
def test_a_wrong_replay_is_found(kind, dtype, monkeypatch):
    monkeypatch.setattr(checks, "Graphs", kind)
    record = checks.replay(CPU, dtype, shape=TINY)
    assert not record.ok, record
    assert kind is not Broken or "capturing" in record.note


@pytest.mark.parametrize("name", ["replay float32", "compiled float32"])
def test_zeros_are_equal_and_prove_nothing(name, monkeypatch):
    monkeypatch.setattr(checks, "SMALL", TINY)
    monkeypatch.setattr(checks.TrainStep, "work", lambda step, shape: step.account.losses.zero_())
    (record,) = checks.run(name, CPU)
    assert not record.ok and "computes nothing" in record.note


# The compiler


class LosesABias(torch.nn.Module):
    """One gradient of two dozen goes missing on the way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, packing=None):
        out = self.model.transformer.h[0].mlp.c_fc.bias
        kept = out.data.clone()
        logits = self.model(ids, packing)
        out.register_hook(lambda gradient: gradient * 0.5) if not hasattr(self, "once") else None
        self.once = kept
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["logits", "bias", "break", "again"])
def test_a_wrong_compiler_is_found(fault, dtype, monkeypatch):
    seen = iter(range(100))

    def pieces(model, backend, combined):
        if fault == "break":
            raise RuntimeError("Unsupported: Tensor.item\nand more")
        if fault == "again":
            monkeypatch.setattr(checks, "forms", lambda: next(seen))
        made = LosesABias(model) if fault == "bias" else model
        scale = 1.05 if fault == "logits" else 1.0
        # the gradient must come by autograd, as the compiler's does
        for parameter in model.parameters():
            parameter.kept, parameter.main_grad = parameter.main_grad, None

        def call(ids, packing):
            logits = made(ids, packing)
            return logits * scale

        def collect(optimizer=None):
            for parameter in model.parameters():
                parameter.kept.copy_(parameter.grad)
                parameter.grad = None

        monkeypatch.setattr(checks.FlatAdamW, "collect", lambda optimizer: collect())
        return Pieces(call, autograd=True)

    monkeypatch.setattr(checks, "SMALL", TINY)
    monkeypatch.setattr(checks, "compiled_pieces", pieces)
    (record,) = checks.run(f"compiled {str(dtype)[6:]}", CPU)
    assert not record.ok, record
    assert fault != "break" or record.note == "RuntimeError: Unsupported: Tensor.item"
    assert fault != "again" or "compiled again" in record.note


# Dropout


class Redrawn(torch.autograd.Function):
    """What comes of a mask that is drawn again in the backward pass, by other bits."""

    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p = p
        ctx.save_for_backward(seed)
        return drop(x, p, seed)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return drop(dy, ctx.p, seed ^ 1), None, None


@pytest.mark.parametrize(
    "name",
    [
        "compiled float32",
        pytest.param("compiled bfloat16 packed", marks=pytest.mark.slow),
        "replay float32",
        "replay bfloat16",
        "replay float32 packed",
        "replay bfloat16 packed",
    ],
)
def test_masks_that_differ_are_found(name, monkeypatch):
    """Every other comparison is of the step with itself, or without dropout."""
    monkeypatch.setattr(checks, "SMALL", TINY)
    if name.startswith("compiled"):
        monkeypatch.setattr(gpt2, "drop", Redrawn.apply)
    else:
        monkeypatch.setattr(fused, "usable", lambda *_: False)

        def backward(ctx, dy):
            other = ops.keep_mask([dy.numel()], torch.tensor([7]), 0.1, dy.dtype).view_as(dy)
            return dy * other, dy if ctx.residual else None, None, None

        monkeypatch.setattr(ops.DropAdd, "backward", staticmethod(backward))
    (record,) = checks.run(name, CPU)
    assert not record.ok and "masks" in record.note and record.error > 3 * record.tolerance, record


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_is_dropped_depends_on_seed_and_position_alone(p):
    """As often as it should be, and independent of other places and seeds: within five standard deviations of 2^18 draws."""
    torch.manual_seed(0)
    one, other = ((drop(torch.ones(2**18), p, seed) > 0).double() for seed in draw_seeds(2, CPU))
    unit = lambda kept: (kept - (1 - p)) / (p * (1 - p)) ** 0.5
    assert abs(unit(one).mean()) * 2**9 < 5
    for a, b in [(one, other), *((one[lag:], one[:-lag]) for lag in (1, 2, 4, 64, 768))]:
        assert abs((unit(a) * unit(b)).mean()) * 2**9 < 5
    x = torch.randn(50, 7, requires_grad=True)
    seed = draw_seeds(1, CPU)[0]
    out = drop(x, p, seed)
    out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0) and torch.equal(out, drop(x.flatten(), p, seed).view(50, 7))
    assert x.grad.max() == pytest.approx(1 / (1 - p), rel=1e-6)


# Attention


class Skewed(torch.autograd.Function):
    """Right forward, a gradient that is 5% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.05


def not_causal(qkv, heads, scale, dropout, packing, *rest):
    flat = qkv.flip(1) if packing is None else qkv
    out = causal_attention(flat, heads, scale, dropout, packing, *rest)
    return out.flip(1) if packing is None else out.roll(1, 1)


def wrong_scale(qkv, heads, scale, dropout, *rest):
    return causal_attention(qkv, heads, 1.1 * scale, dropout, *rest)


def no_dropout(qkv, heads, scale, dropout, *rest):
    return causal_attention(qkv, heads, scale, 0.0, *rest)


def half_the_dropout(qkv, heads, scale, dropout, *rest):
    return causal_attention(qkv, heads, scale, dropout / 2, *rest)


def not_rescaled(qkv, heads, scale, dropout, *rest):
    return causal_attention(qkv, heads, scale, dropout, *rest) * (1 - dropout)


def the_same_mask(qkv, heads, scale, dropout, packing, varlen, draw):
    draw = draw._replace(seeds=torch.arange(len(draw.seeds)))
    return causal_attention(qkv, heads, scale, dropout, packing, varlen, draw)


def skewed_gradient(qkv, heads, scale, dropout, *rest):
    return Skewed.apply(causal_attention(qkv, heads, scale, dropout, *rest))


def forgets_a_row(qkv, heads, scale, dropout, *rest):
    out = causal_attention(qkv, heads, scale, dropout, *rest).clone()
    out[:, -1] = torch.nan
    return out


def across_poems(qkv, heads, scale, dropout, packing, *rest):
    if packing is None:
        return causal_attention(qkv.roll(1, 0), heads, scale, dropout, None, *rest)
    return causal_attention(qkv[:, :128], heads, scale, dropout, None, *rest).repeat(1, 9, 1)[:, : qkv.shape[1]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fault",
    [
        not_causal, wrong_scale, no_dropout, half_the_dropout, not_rescaled, the_same_mask, skewed_gradient,
        forgets_a_row, across_poems,
    ],
)  # fmt: skip
def test_wrong_attention_is_found(fault, dtype, packed, monkeypatch):
    monkeypatch.setattr(check_attention, "causal_attention", fault)
    batch = checks.batches(True, count=1)[0] if packed else None
    assert not right(check_attention.attention(CPU, dtype, batch, heads=4))


# Trust


@pytest.fixture
def a_card(monkeypatch, tmp_path):
    """A CUDA device as far as `trust` asks for one; `ran` are the checks that were run on it, `outcome` what they find."""

    class Card:
        ran, outcome, records, name, said, stopped = [], {}, {}, "H100, driver 1", [], None

    keep_caches_in(None)  # an earlier run of this process may have said --cache-dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTPOEM_ASSUME_CHECKED", raising=False)
    monkeypatch.setattr(trust, "card", lambda device: Card.name)
    monkeypatch.setattr(trust, "why_not_compile", lambda device: None)

    def run(device, names, patience, ended):
        done = {}
        for name in names:
            Card.ran.append(name)
            note = Card.outcome.get(name)
            done[name] = [Record(Card.records.get(name, name), note is None, note=note or "")]
            ended(name, done[name])
            if Card.stopped == name:
                raise Stopped(15)
            if note is not None:
                break
        return done, None, "ended"

    monkeypatch.setattr(apart, "_one_process", run)
    return Card


def decide(card, **settings):
    return trust.decide(TrainConfig(**{"batching": "bucket", **settings}), CUDA, torch.bfloat16, 101, card.said.append)


USED = ["kernels 101", "attention bfloat16", "replay bfloat16", "compiled bfloat16", "replay bfloat16 compiled"]


def test_float16_is_checked_as_itself(a_card):
    """Its kernels too, apart from those of bfloat16: a card that uses one of them need not compile the other."""
    a_card.outcome = {"kernels 101 float16": "it does not compile"}
    found = trust.decide(TrainConfig(), CUDA, torch.float16, 101, a_card.said.append)
    assert a_card.ran[:2] == ["kernels 101 float16", "attention float16"] and found.kernels == PLAIN
    assert "replay float16 packed compiled plain-loss plain-update" in a_card.ran and found.graphs
    assert decide(a_card) == Trusted()


def test_a_card_is_checked_once(a_card):
    assert decide(a_card) == Trusted()
    assert a_card.ran == USED
    assert len(a_card.said) == 1 and a_card.said[0].startswith(
        "checking this GPU, once: kernels, attention, compiled, replay"
    )
    assert decide(a_card) == Trusted() and a_card.ran == USED and len(a_card.said) == 1
    decide(a_card, batching="pack")  # what it uses beside
    assert a_card.ran[len(USED) :] == [
        "attention bfloat16 packed",
        "replay bfloat16 packed",
        "compiled bfloat16 packed",
        "replay bfloat16 packed compiled",
    ]
    a_card.ran.clear()
    a_card.name = "H100, driver 2"
    decide(a_card)
    assert a_card.ran == USED
    a_card.ran.clear()
    a_card.name = "H100, driver 1"
    decide(a_card)
    assert a_card.ran == []


def test_only_what_a_run_uses_is_checked(a_card):
    decide(a_card, compile="off", graphs="off")
    assert a_card.ran == USED[:2]


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\xfe\x00", b"[]", b"{", b'{"H100, driver 1": 3}', b'{"H100, driver 1": {"kernels 101": "good"}}', b"[" * 100_000,
     b'{"H100, driver 1": {"kernels 101": {"x": 1}}}'],
)  # fmt: skip
def test_a_damaged_memory_is_no_memory(a_card, damage):
    verdicts.place().parent.mkdir(parents=True)
    verdicts.place().write_bytes(damage)
    assert decide(a_card) == Trusted()
    assert a_card.ran == USED
    decide(a_card)
    assert a_card.ran == USED


@pytest.mark.parametrize("kind", ["a file above", "a folder in its place"])
def test_a_memory_that_cannot_be_written_stops_nothing(a_card, kind, tmp_path):
    if kind == "a file above":
        (tmp_path / "fastpoem").write_text("")
    else:
        (verdicts.place() / "x").mkdir(parents=True)
    for _ in range(2):
        assert decide(a_card) == Trusted()
    assert a_card.ran == 2 * USED
    assert [*tmp_path.rglob("checked.json?*")] == []


def test_nothing_is_checked_where_that_is_assumed(a_card, monkeypatch):
    monkeypatch.setenv("FASTPOEM_ASSUME_CHECKED", "1")
    assert decide(a_card) == Trusted() and a_card.ran == [] and a_card.said == []


def test_a_cpu_needs_no_check(a_card):
    assert trust.decide(TrainConfig(), CPU, torch.float32, 101, a_card.said.append) == Trusted()
    assert a_card.ran == []


@pytest.mark.parametrize(
    ("failing", "settings", "lost", "words"),
    [
        ("attention bfloat16", {}, {"sdpa": False}, "plain operators"),
        ("attention bfloat16 packed", {"batching": "pack"}, {"varlen": False}, "padded"),
        ("compiled bfloat16", {}, {"combined": False}, "not combined"),
        ("replay bfloat16 compiled", {}, {"graphs": False}, "one by one"),
        ("replay bfloat16", {"compile": "off"}, {"graphs": False}, "one by one"),
        ("replay bfloat16", {}, {}, None),  # not what this run replays
    ],
)
def test_what_failed_is_done_without(a_card, failing, settings, lost, words):
    a_card.outcome[failing] = "error 0.3"
    for _ in range(2):  # found, and then remembered
        assert decide(a_card, **settings) == Trusted(**lost)
        said = [line for line in a_card.said if "failed its check" in line]
        assert len(said) == (words is not None)
        assert all(failing in line and "error 0.3" in line and words in line for line in said)
        a_card.said.clear()


def test_batches_are_packed_until_attention_inside_them_fails(a_card):
    """Then it is as if they had been bucketed from the start, said once; who asks for packed ones has them padded."""
    packed = [f"{name} packed" for name in ("attention bfloat16", "replay bfloat16", "compiled bfloat16")]
    assert decide(a_card, batching="auto") == Trusted()
    assert a_card.ran == [*USED[:2], *packed, "replay bfloat16 packed compiled"]
    a_card.name, a_card.outcome["attention bfloat16 packed"] = "another", "error 0.3"
    a_card.outcome["compiled bfloat16"] = "error 0.4"
    for _ in range(2):
        a_card.said.clear()
        assert decide(a_card, batching="auto") == Trusted(varlen=False, combined=False)
        assert [line for line in a_card.said if "bucketed" in line] == [
            "attention bfloat16 packed failed its check on this GPU (error 0.3): batches are bucketed"
        ]
        assert sum("failed its check" in line for line in a_card.said) == 2
    assert {*USED[2:4], "compiled bfloat16 separate", "replay bfloat16 compiled separate"} <= {*a_card.ran}
    assert decide(a_card, batching="auto", attention="flash") == Trusted(varlen=False, combined=False)


def test_a_step_that_does_not_compile_may_still_be_replayed(a_card):
    failing = ("compiled bfloat16", "compiled bfloat16 separate", "replay bfloat16 compiled separate")
    a_card.outcome |= dict.fromkeys(failing, "no")
    assert decide(a_card) == Trusted(compile=False)
    assert [line for line in a_card.said if "failed" in line] == [
        "compiled bfloat16 failed its check on this GPU (no): kernels are not combined",
        "compiled bfloat16 separate failed its check on this GPU (no): the model is not compiled",
    ]


def test_combined_kernels_that_fail_cost_themselves_alone(a_card):
    """The step without them is checked and replayed in their place, and that is remembered, though they raised: it is no other's fault."""
    a_card.outcome["compiled bfloat16"] = "InductorError: combo kernel"
    for _ in range(2):
        assert decide(a_card, compile="on", graphs="on") == Trusted(combined=False)
    assert a_card.ran == [*USED[:4], "compiled bfloat16 separate", "replay bfloat16 compiled separate"]
    a_card.outcome["replay bfloat16 compiled separate"], a_card.name = "error 0.3", "another"
    assert decide(a_card) == Trusted(combined=False, graphs=False)


def test_kernels_that_failed(a_card):
    a_card.outcome["kernels 101"] = "error 1"
    chosen = decide(a_card).kernels
    assert chosen.cross_entropy is plain.cross_entropy and chosen.clipped_adamw_ is plain.clipped_adamw_


@pytest.mark.parametrize(
    ("record", "loss", "update"),
    [("cross_entropy bfloat16", True, False), ("clipped_adamw float32", False, True), ("its process", True, True)],
)
def test_a_broken_kernel_costs_itself_alone(a_card, record, loss, update):
    """What trains is checked without it, graphs and compiler stay; and what was checked with it does not stand for that."""
    without = " plain-loss" * loss + " plain-update" * update
    assert decide(a_card) == Trusted() and a_card.ran == USED
    a_card.name, a_card.ran[:] = "another", []
    a_card.outcome["kernels 101"], a_card.records["kernels 101"] = "error 1", record
    found = decide(a_card)
    assert found == Trusted(found.kernels) and found.kernels == kernels_without(without.split())
    assert (found.kernels.cross_entropy is plain.cross_entropy) == loss
    assert (found.kernels.clipped_adamw_ is plain.clipped_adamw_) == update
    assert a_card.ran == [*USED[:2], *(name + without for name in USED[2:])]
    a_card.outcome["compiled bfloat16" + without] = "error 2"
    a_card.name = "a third"
    assert decide(a_card) == Trusted(found.kernels, combined=False)
    a_card.outcome[f"compiled bfloat16{without} separate"], a_card.name = "error 2", "a fourth"
    assert decide(a_card) == Trusted(found.kernels, compile=False)


def test_a_kernel_that_fails_later_has_the_others_checked_again(a_card):
    """Another vocabulary, the same card."""
    decide(a_card)
    a_card.ran.clear()
    a_card.outcome["kernels 102"], a_card.records["kernels 102"] = "error 1", "cross_entropy float32"
    trust.decide(TrainConfig(batching="bucket"), CUDA, torch.bfloat16, 102, a_card.said.append)
    assert a_card.ran == ["kernels 102", *(name + " plain-loss" for name in USED[2:])]
    assert sum("checking this GPU" in line for line in a_card.said) == 2


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("replay float32", "cross_entropy"),
        ("replay float32", "clipped_adamw_"),
        ("compiled float32", "cross_entropy"),
        pytest.param("compiled float32", "clipped_adamw_", marks=pytest.mark.slow),  # half a minute, as the replay's
    ],
)
def test_a_check_does_without_the_kernels_that_failed(name, broken, monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(checks, "SMALL", TINY)
    monkeypatch.setattr("fastpoem.engine.kernels." + broken, breaks)
    (record,) = checks.run(name + " plain-loss plain-update", CPU)
    assert record.ok and "plain-loss" in record.name, record
    less = "plain-update" if broken == "cross_entropy" else "plain-loss"
    (record,) = checks.run(f"{name} {less}", CPU)
    assert record.note == "RuntimeError: an illegal memory access"


@pytest.mark.parametrize(
    ("failing", "settings"),
    [
        ("attention bfloat16", {"attention": "flash"}),
        ("attention bfloat16 packed", {"attention": "flash", "batching": "pack"}),
        ("compiled bfloat16 separate", {"compile": "on"}),
        ("replay bfloat16 compiled", {"graphs": "on"}),
    ],
)
def test_what_the_user_insists_on_is_not_done_without(a_card, failing, settings):
    a_card.outcome |= {failing: "error 0.3", failing.removesuffix(" separate"): "error 0.3"}
    with pytest.raises(InputError, match="failed its check") as error:
        decide(a_card, **settings)
    name = next(iter(settings))
    assert error.value.thing == f"--{name} {settings[name]}" and "error 0.3" in error.value.reason


def test_who_is_stopped_keeps_what_has_ended(a_card):
    a_card.stopped = "attention bfloat16"
    with pytest.raises(Stopped):
        decide(a_card)
    a_card.stopped = None
    assert decide(a_card) == Trusted() and a_card.ran == USED


def test_what_could_not_begin_is_not_held_against_the_card(a_card):
    for name in ("compiled bfloat16", "compiled bfloat16 separate"):
        a_card.outcome[name] = f"{apart.NOT_BEGUN}: all devices are busy"
    assert not decide(a_card).compile
    a_card.outcome.clear()
    assert decide(a_card) == Trusted() and a_card.ran.count("compiled bfloat16") == 2


def test_numbers_that_are_none_are_wrong_numbers(a_card, monkeypatch, capsys):
    """They are said and remembered on their way out of the process that found them."""
    wrong = Record("clipped_adamw float32", False, error=math.inf, tolerance=1e-6)
    monkeypatch.setattr(checks, "run", lambda name, device: [wrong])
    monkeypatch.setattr(checks, "__name__", "__main__")  # the process of checks, which alone tells
    checks.main(["cpu", "kernels 101"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    verdicts.remember("card", {told["check"]: [Record(**fields) for fields in told["records"]]})
    assert verdicts.remembered("card") == {"kernels 101": {"clipped_adamw float32": "error inf, 1e-06 allowed"}}


def test_a_verdict_depends_on_card_driver_versions_and_source(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    card = SimpleNamespace(name="NVIDIA H100", uuid="one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(verdicts, "driver", lambda: "580.1")
    key = verdicts.card(CUDA)
    for part in ("NVIDIA H100", "9.0", "580.1", torch.__version__, verdicts.source_hash()):
        assert part in key
    card.uuid = "another"
    assert verdicts.card(CUDA) != key
    card.uuid = "one"
    verdicts.source_hash.cache_clear()
    try:
        read = verdicts.Path.read_bytes
        monkeypatch.setattr(
            verdicts.Path, "read_bytes", lambda path: read(path) + b" " * (path.name == "loss_triton.py")
        )
        assert verdicts.card(CUDA) != key
    finally:
        verdicts.source_hash.cache_clear()


SCRIPT = """#!{python}
import json, os, pathlib, signal, sys, time

looks, clock = (pathlib.Path("{folder}", name) for name in ("looks", "clock"))

def seen():
    "Until who waits for this process has heard all that it said."
    before = int(looks.read_text())
    while int(looks.read_text()) < before + 4:
        time.sleep(0.02)

def later(seconds):
    "By the clock of who waits."
    seen()
    pathlib.Path(str(clock) + "new").write_text(str(int(clock.read_text()) + seconds))
    os.replace(str(clock) + "new", clock)
    seen()

print("a library's word")
for name in sys.argv[4:]:
    if "unwilling" in name:
        sys.exit("RuntimeError: all CUDA-capable devices are busy")
    print(json.dumps(dict(begins=name)), flush=True)
    if name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        later(70)
        time.sleep(600)
    for part in name.split()[1:]:
        if part.startswith("compiles"):
            print(json.dumps(dict(compiles=True)), flush=True)
            later(int(part[8:]))
            print(json.dumps(dict(compiles=False)), flush=True)
        else:
            later(int(part[4:]))
    print(json.dumps(dict(check=name, records=[dict(name=name, ok=name != "fails", note="")])), flush=True)
    if name == "fails":
        break
"""


def test_checks_run_apart_and_what_they_break_is_theirs(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(SCRIPT.format(python=sys.executable, folder=tmp_path))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(apart.sys, "executable", str(script))
    names = ["good", "dies", "better", "fails", "hangs", "last"]
    looks, clock = tmp_path / "looks", tmp_path / "clock"
    clock.write_text("0")

    def monotonic():
        (tmp_path / "new").write_text(str(monotonic.calls))
        os.replace(tmp_path / "new", looks)
        monotonic.calls += 1
        return time.monotonic() + int(clock.read_text())

    monotonic.calls = 0
    monkeypatch.setattr(apart, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    told = []
    found = dict(apart.in_a_process(CPU, names, ended=lambda name, records: told.append(name)))
    assert list(found) == names and told == [name for name in names if name not in ("dies", "hangs")]
    assert [name for name in names if not right(found[name])] == ["dies", "fails", "hangs"]
    assert "signal 11" in found["dies"][0].note
    assert (
        "had not ended after 60 s; python -m fastpoem.doctor --check-seconds gives it longer" in found["hangs"][0].note
    )

    # Each has its own time, what it compiles has five times as much, and what comes then has its own again.
    names = [
        "one runs50",
        "two runs50 runs50",
        "three compiles250 runs50",
        "four compiles310",
        "five compiles250 runs70",
    ]
    found = dict(apart.in_a_process(CPU, names))
    assert [name for name in names if not right(found[name])] == [names[1], names[3], names[4]]
    assert "300 s" in found[names[3]][0].note and "60 s" in found[names[4]][0].note
    assert right(dict(apart.in_a_process(CPU, names[1:2], seconds=110))[names[1]])
    found = dict(apart.in_a_process(CPU, ["unwilling", "unwilling too"]))
    assert all(r.note.startswith(apart.NOT_BEGUN) and "busy" in r.note for some in found.values() for r in some)

    asked = []

    def ask():
        asked.append(1)
        if len(asked) == 3:
            raise Stopped(15)

    monkeypatch.setattr(apart, "ask", ask)
    with pytest.raises(Stopped):
        list(apart.in_a_process(CPU, ["hangs"]))
    monkeypatch.undo()
    monkeypatch.setattr(apart.sys, "executable", str(tmp_path / "none"))
    assert not right(dict(apart.in_a_process(CPU, ["good"]))["good"])


def test_the_cheapest_checks_come_first(monkeypatch):
    asked = []
    monkeypatch.setattr(
        apart, "_one_process", lambda device, names, seconds, ended: asked.append([*names]) or ({}, None, "")
    )
    names = examine._checks(CUDA, torch.bfloat16, None, quick=False, packs=True)[0]
    list(apart.in_a_process(CUDA, names[::-1]))
    pieces = [name.split()[0] for name in asked[0]]
    compiled = [name for name in asked[0] if "compiled" in name.split()]
    assert pieces[:2] == ["kernels", "attention"] and "replay" in pieces[: -len(compiled)]
    assert asked[0][-len(compiled) :] == compiled and all("full" in name for name in compiled[-2:])


def test_a_process_of_checks_says_when_it_compiles(monkeypatch, capsys):
    """And nothing where checks are run in one's own."""
    told = []
    monkeypatch.setattr(checks, "SMALL", TINY)
    monkeypatch.setattr(checks, "compiled_pieces", lambda model, backend, combined: Pieces(model))
    monkeypatch.setattr(checks, "tell", told.append)
    checks.main(["cpu", "compiled float32"])
    monkeypatch.undo()
    compiling = [("compiles", True), ("compiles", False)] * 2  # without dropout and with it
    assert [next(iter(one.items())) for one in told] == [
        ("begins", "compiled float32"),
        *compiling,
        ("check", "compiled float32"),
    ]
    checks.tell({"compiles": True})
    assert capsys.readouterr().out == ""


def test_the_process_of_checks_is_the_real_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = dict(apart.in_a_process(CPU, ["nonsense float32", "attention float32 packed"]))
    assert {name: len(some) for name, some in found.items()} == {"attention float32 packed": 2, "nonsense float32": 1}
    assert right(found["attention float32 packed"])
    assert found["nonsense float32"][0].note == "KeyError: 'nonsense'"


# The doctor


@pytest.fixture
def small_doctor(monkeypatch):
    """The doctor with a small model and no products, which it returns."""
    for name in ("train", "notebook"):
        monkeypatch.setattr(trial, name, functools.partial(getattr(trial, name), shape=GPT2Config(120, 512, 32, 1, 2)))
    monkeypatch.setattr(checks, "SMALL", TINY)
    monkeypatch.setattr(checks, "REAL", TINY)  # its vocabulary
    few = lambda device, rows, vocabulary, parameters, **kinds: check(device, 40, vocabulary, 6000, **kinds)
    monkeypatch.setattr(checks.kernel_check, "check", few)
    monkeypatch.setattr(machine, "seconds", lambda device, run: (run(), 1e-3)[1])
    products = machine.rates
    monkeypatch.setattr(machine, "rates", lambda device: {"copy_gb_s": 9.0, "fp32_tflop_s": 0.1})
    return products


KEYS = {
    "schema", "ok", "machine", "versions", "compiler", "checks", "skipped", "memory", "rates", "trials", "notebook",
    "times_the_notebook", "uses", "sentence",
}  # fmt: skip


def test_the_doctor_speaks_json(small_doctor, capsys, monkeypatch):
    monkeypatch.setattr(machine, "rates", small_doctor)
    code = doctor.main(["--device", "cpu", "--json"])
    out = capsys.readouterr().out
    report = json.loads(out)
    assert out.count("\n") == 1 and code == 0 and report["ok"] is True
    assert set(report) == KEYS and report["schema"] == 1
    assert {"device", "name", "cpu", "cpu_threads", "cpu_instructions", "gpus", "capability"} <= set(report["machine"])
    assert {"python", "torch", "triton", "cuda", "driver", "flash_attn", "transformers"} <= set(report["versions"])
    assert report["versions"]["torch"] == torch.__version__
    assert {"name", "ok", "error", "tolerance", "note"} <= set(report["checks"][0])
    assert all(record["ok"] for record in report["checks"]) and len(report["checks"]) >= 10
    assert report["skipped"] == [{"name": "compiled", "reason": "training on a CPU does not compile"}]
    assert 0 < report["memory"]["free"] <= report["memory"]["total"]
    assert report["rates"]["fp32_tflop_s"] > 0 and report["rates"]["peak_bf16_tflop_s"] is None
    (one,) = report["trials"]
    assert one["form"] == "plain" and one["epoch_s"] == pytest.approx(one["step_ms"] * 13.597, rel=1e-3)
    assert one["poems_per_s"] == pytest.approx(16e3 / one["step_ms"])
    assert report["times_the_notebook"] == pytest.approx(report["notebook"]["step_ms"] / one["step_ms"])
    assert report["uses"]["batching"] == ("pack" if native.why_not() is None else "bucket")
    assert report["uses"]["compile"] is False and report["sentence"].startswith("training on cpu will use")


def test_the_doctor_speaks_to_a_person(small_doctor, capsys):
    assert doctor.main(["--device", "cpu", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert "replay float32" in out and "poems/s" in out and "skipped (training on a CPU does not compile)" in out
    assert "checking kernels, attention, replay" in err


def test_a_gpu_that_is_not_used_is_said(small_doctor, capsys, monkeypatch):
    """nvidia-smi finds one, PyTorch does not."""
    if torch.cuda.is_available():
        pytest.skip("said of a machine whose GPU PyTorch cannot use")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for memory in ("900, 1024", "[N/A], [N/A]"):  # of one that shares the machine's
        smi = lambda command, memory=memory, **options: SimpleNamespace(stdout=f"GPU-abc, {memory}\n")
        monkeypatch.setattr(cards, "subprocess", SimpleNamespace(run=smi, SubprocessError=subprocess.SubprocessError))
        assert cards.idle().startswith("there is a GPU, but it is not used: ")
    monkeypatch.setattr(examine, "_checks", lambda *_: ([], []))
    assert doctor.main(["--quick"]) == 0
    out, err = capsys.readouterr()
    assert " ".join(out.split()).count("there is a GPU, but it is not used: ") == 1
    assert err.count("there is a GPU, but it is not used: ") == 1


@pytest.mark.parametrize("fault", ["check", "trial"])
def test_what_is_wrong_is_exit_code_1(small_doctor, fault, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory\nand more")

    if fault == "check":
        monkeypatch.setattr(check_attention, "causal_attention", no_dropout)
    else:
        monkeypatch.setattr(trial, "train", broken)
    assert doctor.main(["--device", "cpu", "--quick", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    if fault == "check":
        assert "attention float32 dropout" in report["sentence"] and "failed" in report["sentence"]
    else:
        assert report["trials"][0]["note"] == "RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda:99"], "cuda:99: "),
        (["--devise", "cpu"], "did you mean --device"),
        *(
            (["--check-seconds", wrong], f"--check-seconds {wrong}: out of range")
            for wrong in ("0", "-1", "nan", "inf")
        ),
    ],
)
def test_the_users_mistakes_are_exit_code_2(arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "fastpoem.doctor", *arguments],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_gpu_without_a_compiler(monkeypatch):
    names, skipped = examine._checks(CUDA, torch.bfloat16, "there is no C compiler", quick=False, packs=False)
    assert not any("compiled" in name for name in names) and skipped[0]["reason"] == "there is no C compiler"
    for packs, mine, others in ((False, "", " packed"), (True, " packed", "")):
        names, skipped = examine._checks(CUDA, torch.bfloat16, None, quick=False, packs=packs)
        kind = f"bfloat16{mine}"
        assert {f"compiled {kind}", f"replay {kind} compiled", f"compiled {kind} full"} <= {*names}
        later = {one["name"] for one in skipped}
        assert later >= {f"compiled bfloat16{others}", "compiled float32", f"replay bfloat16{others} compiled"}
        assert {one["reason"] for one in skipped} == {"checked when a run first uses it"}
        assert len(set(names)) == len(names) and not later & {*names}


@pytest.mark.parametrize("compiler", [None, "there is no C compiler"])
def test_where_packed_attention_fails_bucketed_batches_are_checked(compiler):
    names, _ = examine._checks(CUDA, torch.bfloat16, compiler, quick=True, packs=True)
    found = {name: [Record("a", ok=True)] for name in names}
    assert examine._beside(CUDA, torch.bfloat16, compiler, found) == []
    found["attention bfloat16 packed"] = [Record("a", ok=False, error=1.0, tolerance=0.1)]
    beside = examine._beside(CUDA, torch.bfloat16, compiler, found)
    assert ("replay bfloat16 compiled" in beside) == ("compiled bfloat16" in beside) == (compiler is None)
    assert not any("packed" in name for name in beside)
    assert examine._beside(CPU, torch.bfloat16, compiler, found) == []


def test_known_cards_by_name():
    assert machine.peak("NVIDIA H100 80GB HBM3").memory == 3.35 and machine.peak("NVIDIA H100 PCIe").half == 756
    assert machine.peak("NVIDIA A100-SXM4-80GB").half == 312 and machine.peak("NVIDIA Something") is None
