"""model/: the same numbers as transformers' GPT-2, and folders that pass both ways."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from fastpoem_kernels import native
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel, TextGenerationPipeline

from fastpoem.corpus.feed import Shape
from fastpoem.engine.batch import assemble
from fastpoem.errors import InputError
from fastpoem.model import hub, ops
from fastpoem.model.find import resolve_folder
from fastpoem.model.gpt2 import GPT2


def ours(folder) -> GPT2:
    model = GPT2(hub.read_config(folder)[0])
    hub.load_weights(model, folder)
    return model.eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu"}, {"scale_attn_by_inverse_layer_idx": True},
                                     {"scale_attn_weights": False}, {"n_inner": 48}, {"n_head": 8}])  # fmt: skip
def test_logits_are_those_of_transformers(tmp_path, changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 211, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
    # eager, since its SDPA scaled by neither of these two settings in transformers 5.0
    theirs = GPT2LMHeadModel(GPT2Config(**{**shape, **changes}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 211, (3, 40))
    with torch.no_grad():
        assert relative(ours(tmp_path)(ids), theirs(ids).logits.flatten(0, 1)) < 1e-5


def test_logits_at_the_full_shape(shared_model, tmp_path):
    config, raw = hub.read_config(shared_model)
    model = GPT2(config).eval()
    model.initialise(3)
    hub.save_folder(tmp_path / "full", model.state_dict(), raw, [])
    ids = torch.randint(0, config.vocab_size, (2, 66))
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "full").eval()(ids).logits
        assert relative(model(ids), theirs.flatten(0, 1)) < 1e-5


def test_weights_drawn_from_a_seed_are_distributed_as_transformers_draws_them():
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    theirs = dict(GPT2LMHeadModel(config).named_parameters())
    model = GPT2(hub.GPT2Config(500, 64, 64, 3, 4))
    model.initialise(0)
    for name, parameter in model.named_parameters():
        assert parameter.mean().item() == pytest.approx(theirs[name].mean().item(), abs=3e-3), name
        std = theirs[name].std().item()
        if name.endswith(
            "c_proj.weight"
        ):  # GPT-2's own, which transformers 5.0 missed: what is added to the stream shrinks with depth
            std = config.initializer_range / (2 * config.n_layer) ** 0.5
        assert parameter.std().item() == pytest.approx(std, rel=0.1), name
    again, other = GPT2(model.config), GPT2(model.config)
    again.initialise(0)
    other.initialise(1)
    wte = "transformer.wte.weight"
    assert torch.equal(model.state_dict()[wte], again.state_dict()[wte])
    assert not torch.equal(model.state_dict()[wte], other.state_dict()[wte])


def packing_of(lengths):
    """For poems of so many inputs."""
    where = torch.tensor([[0, length + 1] for length in lengths])
    shape = Shape(len(lengths), max(lengths) + 1, sum(lengths))
    return assemble(torch.zeros(max(lengths) + 1, dtype=torch.int16), where, shape, 0).packing


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_packed_poems_are_computed_as_if_alone(small_model, lengths, seed):
    model = ours(small_model)
    torch.manual_seed(seed)
    poems = [torch.randint(5, model.config.vocab_size, (1, length)) for length in lengths]
    packing = packing_of(lengths)
    packed = model(torch.cat(poems, dim=1), packing)
    alone = torch.cat([model(poem) for poem in poems])
    assert relative(packed, alone) < 1e-5
    packed_gradient, alone_gradient = (
        torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (packed, alone)
    )
    for a, b in zip(packed_gradient, alone_gradient, strict=True):
        assert relative(a, b) < 1e-4


def test_folder_round_trip_and_transformers_reads_it(small_model, tmp_path):
    model = ours(small_model)
    config, raw = hub.read_config(small_model)
    config = dataclasses.replace(config, resid_pdrop=0.3)
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    files = [small_model / name for name in ("tokenizer.json", "tokenizer_config.json")]
    for _ in range(2):  # the second replaces the first
        hub.save_folder(tmp_path / "model", model.state_dict(), hub.saved_config(raw, config, special), files)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # and nothing is left beside it
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert theirs.config.resid_pdrop == 0.3
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "model")
    said = TextGenerationPipeline(theirs, tokenizer)("春", max_new_tokens=5)
    assert said[0]["generated_text"].startswith("春")
    for name, parameter in ours(tmp_path / "model").state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name])


def test_older_weights_are_read(small_model, tmp_path):
    """pytorch_model.bin; names without `transformer.`; the causal-mask buffers of old checkpoints."""
    shutil.copy(small_model / "config.json", tmp_path)
    state = GPT2LMHeadModel.from_pretrained(small_model).state_dict()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "pytorch_model.bin")
    for name, parameter in ours(tmp_path).state_dict().items():
        assert torch.equal(parameter, state[name])


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text("{"), "unreadable"),
    (lambda f: edit(f, model_type="bert"), "not a GPT-2"),
    (lambda f: edit(f, n_head=5), "no multiple"),
    (lambda f: edit(f, n_layer=3), "lack"),
    (lambda f: edit(f, n_layer=1), "2 layers in the weights"),
    (lambda f: edit(f, n_embd=64), "has shape"),
    (lambda f: edit(f, n_embd="many"), "n_embd"),
    (lambda f: edit(f, attn_pdrop=float("nan")), "attn_pdrop"),
    (lambda f: edit(f, activation_function="relu"), "relu"),
    (lambda f: edit(f, tie_word_embeddings=False), "tie_word_embeddings"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "unreadable weights"),
    (lambda f: ((f / "model.safetensors").unlink(), torch.save({"x": Malicious()}, f / "pytorch_model.bin")), "unreadable weights"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(small_model, tmp_path, damage, says):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    damage(folder)
    with pytest.raises(InputError, match=says) as error:
        ours(resolve_folder(str(folder)))
    assert str(tmp_path) in str(error.value)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name, says", [("/no/such", "no such folder"), ("./nothing", "no such folder"),
                                        ("nobody/nothing", "hub")])  # fmt: skip
def test_a_model_that_is_not_there(name, says):
    with pytest.raises(InputError, match=says):
        resolve_folder(name)


def test_gradients_written_in_place_are_autograds(small_model):
    """Every weight's, with nothing of an earlier step left in the buffer, padded and packed."""
    from fastpoem.engine.optim import FlatAdamW

    ids = torch.randint(5, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    packing = packing_of([12, 1, 47])
    for call in (lambda model: model(ids), lambda model: model(ids.view(1, -1), packing)):
        plain, written = ours(small_model), ours(small_model)
        flat = FlatAdamW(written, torch.device("cpu"), torch.float32, weight_decay=0.0, max_norm=1.0)
        flat.grad.fill_(math.nan)
        call(plain).square().mean().backward()
        call(written).square().mean().backward()
        for (name, parameter), (_, gradient) in zip(plain.named_parameters(), flat.named(flat.grad), strict=True):
            assert relative(gradient, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-3, 0.999])
def test_dropout_mask(p, dtype):
    """Drops the share it should, independently from element to element, and keeps the expectation exactly."""
    mask = ops.keep_mask([1000 * 1001], torch.tensor([0]), p, dtype).view(1000, 1001)
    n, kept = mask.numel(), mask != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 1e-5
    scale = mask[kept].unique()
    assert len(scale) == 1 and scale.item() == pytest.approx(
        1 / (1 - round(p * 65536) / 65536), rel=0.004 if dtype == torch.bfloat16 else 1e-6
    )
    flat = kept.flatten().float() - (1 - p)
    for lag in (1, 2, 3, 4, 1001):  # neighbours share a random word
        assert abs((flat[lag:] * flat[:-lag]).mean().item() / (p * (1 - p))) < 5 / math.sqrt(n)
    for lane in range(4):
        share = kept.flatten()[lane::4].float().mean().item()
        assert abs(share - (1 - p)) < 6 * math.sqrt(p * (1 - p) / (n / 4)) + 1e-5


def test_dropped_attention_against_autograd(monkeypatch):
    """With the mask it drew, values and gradients are those of the plain formula in float64 (test_kernels_native.py: the C's)."""
    monkeypatch.setattr(native, "_loaded", lambda *_: "taken out by a test")
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3 * 8, requires_grad=True)
    seeds = torch.tensor([-3, 5])
    out = ops.CausalAttention.apply(qkv, 2, 0.5, 0.3, seeds)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    mask = ops.keep_mask([2 * 9 * 9] * 2, seeds, 0.3, torch.float64).view(2, 2, 9, 9)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = (part.view(2, 9, 2, 4).transpose(1, 2) for part in exact.split(8, -1))
    scores = (q @ k.transpose(2, 3) * 0.5).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    reference = (scores.softmax(-1) * mask @ v).transpose(1, 2).reshape(2, 9, 8)
    (expected,) = torch.autograd.grad(reference, exact, upstream.double())
    assert relative(out.double(), reference) < 1e-6
    assert relative(gradient.double(), expected) < 1e-6
    assert (mask == 0).float().mean().item() > 0.2
