"""What larger models need: shapes by name, an estimate of memory, activations that are computed again. FSDP: tests/test_torchrun.py."""

import dataclasses
import json

import pytest
import torch
from fastpoem_kernels import cross_entropy

import fastpoem
from fastpoem.config import TrainConfig
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.world import World
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.dropout import Masks
from fastpoem.model.gpt2 import GPT2, GPT2Config, count_parameters
from fastpoem.run.processes import bytes_on, check_memory
from tests.runs import settings

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


def gradient(again: bool, dtype: torch.dtype, direct: bool, dropout: float) -> tuple[torch.Tensor, int]:
    """Of one batch, with the bytes that the forward pass keeps."""
    model = GPT2(GPT2Config(211, 40, 32, 3, 4, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout))
    model.initialise(0)
    model.train().transformer.is_checkpointed = again
    optimizer = FlatAdamW(model, CPU, dtype, weight_decay=0.0, max_norm=1.0)
    ids = torch.randint(0, 211, (4, 40), generator=torch.Generator().manual_seed(1))
    if not direct:  # as under FSDP
        for parameter in model.parameters():
            del parameter.main_grad
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids, masks=Masks(7, 0))
    cross_entropy(logits, ids.flatten()).loss.backward()
    if not direct:
        for name, parameter in model.named_parameters():
            optimizer.view(optimizer.grad, name).copy_(parameter.grad)
    return optimizer.grad.clone(), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_computed_again_is_the_same(dtype, direct, dropout):
    once, kept = gradient(False, dtype, direct, dropout)
    again, less = gradient(True, dtype, direct, dropout)
    assert torch.equal(once, again) and once.abs().sum() > 0
    assert less < kept / 2


def test_a_run_that_computes_activations_again_is_the_same(base, tmp_path):
    runs = [
        fastpoem.fit(**settings(base, out=str(tmp_path / str(again)), max_steps=6, checkpoint_activations=again))
        for again in (False, True)
    ]
    assert [row["loss"] for row in runs[0].metrics[:6]] == [row["loss"] for row in runs[1].metrics[:6]]


@pytest.mark.parametrize(
    "name, millions", [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)]
)
def test_shapes_by_name_are_openais(name, millions):
    shape, raw = hub.with_shape(name, GPT2Config(50257, 64, 16, 1, 2, n_inner=48), {"n_inner": 48, "bos_token_id": 3})
    assert count_parameters(shape) / 1e6 == pytest.approx(millions, abs=0.06)
    assert raw["n_embd"] == shape.n_embd and raw["n_inner"] is None and raw["bos_token_id"] == 3


def test_a_shape_takes_the_tokenizer_of_the_model(base, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.PRESETS, "gpt2", (3, 24, 2))  # the real one takes a minute
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=2, shape="gpt2"))
    config = json.loads((run.model / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_positions"]) == (3, 24, 1024)
    assert run.generate("春", count=1)
    with pytest.raises(InputError, match="shape='gpt2': is for new weights; add from_scratch=True"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "other"), shape="gpt2", from_scratch=False))
    with pytest.raises(InputError, match="shape"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "other"), shape="gpt3"))


def test_memory_of_a_device_before_it_trains():
    shape = GPT2Config(21128, 1024, 1600, 48, 25)
    parameters = count_parameters(shape)
    of = lambda world, dtype=torch.bfloat16, **more: (
        bytes_on(shape, TrainConfig(**more), CARD, dtype, world) / parameters
    )
    four = World(size=4)
    assert of(World()) == 16 and of(World(), torch.float32) == 16
    assert of(four, parallel="data") == 20  # sums in float32
    assert of(four) == of(four, parallel="sharded") == pytest.approx(11, abs=0.1)
    assert 6 < of(four, parallel="fsdp") < 7 < of(four, parallel="fsdp", accumulate=2) < 8
    assert of(World(), accumulate=2) == of(World(), torch.float32, accumulate=2) == 20


def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    shape = GPT2Config(21128, 1024, 1600, 48, 25)
    card = dataclasses.make_dataclass("Card", ["total_memory"])(24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    config = TrainConfig(parallel="fsdp")
    large = dataclasses.replace(shape, n_layer=96)
    check_memory(shape, config, CARD, torch.float32, World())
    with pytest.raises(InputError) as found:
        check_memory(large, config, CARD, torch.float32, World())
    assert "GiB a GPU, this one has 24.0" in str(found.value) and "--parallel fsdp" in str(found.value)
    check_memory(large, config, CARD, torch.float32, World(size=4))
    check_memory(shape, config, CPU, torch.float32, World())
