"""RUN/model and the folders of others: complete without a word from anybody, and read whatever their weights are called."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, GPT2LMHeadModel, pipeline

import fastpoem
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.model import find, hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.run import given
from tests.runs import settings, tiny_data, tiny_model

POEM = "春江潮水连海平，Hello 海上明月共潮生。"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    tiny_data(folder / "poems.txt", hub.BUNDLED / "poems.txt")
    tiny_model(folder / "model", hub.BUNDLED / "model")
    return folder


def rewrite(path: Path, *drop: str, **add) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in drop} | add))


def config_less(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    rewrite(folder / "config.json", "model_type", "architectures", "tokenizer_class", "vocab_size")


INCOMPLETE = {
    "as it should be": lambda folder: None,
    "no class": lambda folder: rewrite(folder / "tokenizer_config.json", "tokenizer_class"),
    "a stranger's code": lambda folder: rewrite(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Theirs", None]}
    ),
    "GPT2-Chinese's": config_less,
}


@pytest.mark.parametrize("spoil", INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_trained_folder_and_its_checkpoints_load_without_an_argument(base, tmp_path, spoil):
    model = shutil.copytree(base / "model", tmp_path / "model")
    spoil(model)
    rewrite(model / "config.json", vocab_size=1901)
    run = fastpoem.fit(**settings(base, model=str(model), out=str(tmp_path / "run"), max_steps=1))
    wanted = PoemTokenizer.load(model).encode([POEM], 64)[0].tolist()
    for folder in (run.model, max((run.folder / "checkpoints").iterdir())):
        for kind in (AutoTokenizer, BertTokenizer):
            assert kind.from_pretrained(folder)(POEM, add_special_tokens=False).input_ids == wanted[1:-1]
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(theirs, GPT2LMHeadModel) and theirs.config.vocab_size == 1901
        assert pipeline("text-generation", str(folder))("春", max_new_tokens=4)[0]["generated_text"].startswith("春")
    again = PoemTokenizer.load(run.model)
    assert again.fingerprint == PoemTokenizer.load(model).fingerprint and "auto_map" not in str(again.files)


@pytest.mark.parametrize("content, says", [
    ({"n_embd": 16, "n_layer": 1}, 'add "model_type": "gpt2"'),
    ({}, 'add "model_type": "gpt2"'),
    ({"emb_size": 768, "layers_num": 6, "heads_num": 12}, "UER's description"),
    ({"model_type": "bert", "n_embd": 16, "n_layer": 1, "n_head": 2}, "not a GPT-2"),
])  # fmt: skip
def test_a_shape_that_is_no_gpt2_names_its_mend(tmp_path, content, says):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        hub.read_config(tmp_path)


# --- byte-level tokenizers -------------------------------------------------------------------------------------------


def byte_level(folder: Path, base: Path, tokens=("<|endoftext|>",), frame: str | None = None, **names) -> Path:
    """`base`'s model with a byte-level BPE of a few merges; `frame` is the template it comes with."""
    shutil.copytree(base / "model", folder, ignore=shutil.ignore_patterns("vocab.txt", "tokenizer_config.json"))
    from tokenizers.trainers import BpeTrainer

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, special_tokens=[*tokens], initial_alphabet=alphabet, show_progress=False)
    library.train([str(base / "poems.txt")], trainer)
    if frame:
        ids = [(token, library.token_to_id(token)) for token in tokens]
        library.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    library.save(str(folder / "tokenizer.json"))
    if names:
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    rewrite(folder / "config.json", "tokenizer_class", vocab_size=320)
    return folder


END = "<|endoftext|>"
BYTE_LEVEL = {
    "gpt2's, which names nothing": (dict(), (END, END)),
    "gpt2's": (dict(tokenizer_class="GPT2Tokenizer", bos_token=END, eos_token=END, unk_token=END), (END, END)),
    "bos and eos": (dict(tokens=("<s>", "</s>"), bos_token="<s>", eos_token="</s>"), ("<s>", "</s>")),
    "only eos": (dict(tokens=("</s>",), eos_token="</s>"), ("</s>", "</s>")),
    "only the first": (dict(tokens=("<s>", "</s>"), frame="<s> $A", bos_token="<s>", eos_token="</s>"), ("<s>", "</s>")),
    "both": (dict(tokens=("<s>", "</s>"), frame="<s> $A </s>", bos_token="<s>", eos_token="</s>"), ("<s>", "</s>")),
}  # fmt: skip


@pytest.mark.parametrize("made, frame", BYTE_LEVEL.values(), ids=BYTE_LEVEL)
def test_a_poem_has_both_its_ends_under_every_tokenizer(base, tmp_path, made, frame):
    folder = byte_level(tmp_path / "model", base, **made)
    tokenizer = PoemTokenizer.load(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner = plain.encode(POEM, add_special_tokens=False).ids
    cls, sep = map(plain.token_to_id, frame)
    ids, _, stats = tokenizer.encode([POEM, "", POEM], 512)
    assert ids.tolist() == [cls, *inner, sep, cls, sep, cls, *inner, sep]
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id, stats.unknown_tokens) == (cls, sep, None, 0)
    cut, _, stats = tokenizer.encode([POEM], 9)
    assert cut.tolist() == [cls, *inner[:7], sep] and stats.truncated == 1


def test_a_tokenizer_without_an_end_is_refused_by_name(base, tmp_path):
    folder = byte_level(tmp_path / "model", base, tokens=())
    with pytest.raises(InputError, match=r"no padding, first or last token; name .*eos_token"):
        PoemTokenizer.load(folder)


def test_a_byte_level_model_learns_to_stop_and_loads_with_the_ids_it_had(base, tmp_path):
    folder = byte_level(tmp_path / "model", base)
    (tmp_path / "poems.txt").write_text("abcd\n" * 200)
    run = fastpoem.fit(
        **settings(base, data=str(tmp_path / "poems.txt"), model=str(folder), out=str(tmp_path / "run"), dropout=0.0)
    )
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    ours = PoemTokenizer.load(folder)
    assert tokenizer("abcd ef", add_special_tokens=False).input_ids == ours.encode(["abcd ef"], 64)[0].tolist()[1:-1]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == ours.sep_id
    model = AutoModelForCausalLM.from_pretrained(run.model)
    prompt = torch.tensor([[ours.cls_id, *tokenizer("ab", add_special_tokens=False).input_ids]])
    written = model.generate(prompt, do_sample=False, max_length=60)[0].tolist()
    assert written[-1] == ours.sep_id and tokenizer.decode(written, skip_special_tokens=True) == "abcd"


# --- weights ---------------------------------------------------------------------------------------------------------


def to_uer(state: dict[str, torch.Tensor], old: bool = False) -> dict[str, torch.Tensor]:
    """Written after UER-py's modules: uer/layers/transformer.py, multi_headed_attn.py, position_ffn.py, embeddings."""
    word, place = ("word_embedding", "position_embedding") if old else ("word.embedding", "pos.embedding")
    head = "target.output_layer.weight" if old else "target.lm.output_layer.weight"
    out = {
        f"embedding.{word}.weight": state["transformer.wte.weight"],
        f"embedding.{place}.weight": state["transformer.wpe.weight"],
        head: state["transformer.wte.weight"].clone(),
        "encoder.layer_norm.gamma": state["transformer.ln_f.weight"],
        "encoder.layer_norm.beta": state["transformer.ln_f.bias"],
    }
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.h."))
    for layer in range(layers):
        theirs, ours = f"encoder.transformer.{layer}", f"transformer.h.{layer}"
        for index in (1, 2):
            out[f"{theirs}.layer_norm_{index}.gamma"] = state[f"{ours}.ln_{index}.weight"]
            out[f"{theirs}.layer_norm_{index}.beta"] = state[f"{ours}.ln_{index}.bias"]
        for index in range(3):
            for kind in ("weight", "bias"):
                part = state[f"{ours}.attn.c_attn.{kind}"].chunk(3, dim=-1)[index]
                out[f"{theirs}.self_attn.linear_layers.{index}.{kind}"] = (
                    part.t().contiguous() if part.dim() == 2 else part
                )
        for goal, source in (("self_attn.final_linear", "attn.c_proj"), ("feed_forward.linear_1", "mlp.c_fc"),
                             ("feed_forward.linear_2", "mlp.c_proj")):  # fmt: skip
            out[f"{theirs}.{goal}.weight"] = state[f"{ours}.{source}.weight"].t().contiguous()
            out[f"{theirs}.{goal}.bias"] = state[f"{ours}.{source}.bias"]
    return out


def prefixed(prefix: str):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


FORMS = {
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both, in a wrapper": prefixed("model.module._orig_mod."),
    "a wrapper without transformer.": lambda state: {
        "model." + name.removeprefix("transformer."): tensor for name, tensor in state.items()
    },
    "a training state": lambda state: {"state_dict": prefixed("model.")(state), "epoch": 3, "lr": 0.1},
    "UER": to_uer,
    "UER of old": lambda state: to_uer(state, old=True),
    "UER under DataParallel": lambda state: prefixed("module.")(to_uer(state)),
    "halves": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_every_name_and_kind(small_model, tmp_path, form):
    shape, _ = hub.read_config(small_model)
    state = GPT2LMHeadModel.from_pretrained(small_model).state_dict()
    saved = FORMS[form]({name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    torch.save(saved, tmp_path / "pytorch_model.bin")
    hub.check_weights(shape, tmp_path)
    model = GPT2(shape)
    hub.load_weights(model, tmp_path)
    kind = {"halves": torch.float16, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(kind).float()), name


def test_weights_in_pieces_of_either_kind(small_model, tmp_path):
    from safetensors.torch import save_file

    shape, _ = hub.read_config(small_model)
    state = {
        n: t for n, t in GPT2LMHeadModel.from_pretrained(small_model).state_dict().items() if n != "lm_head.weight"
    }
    for name, write in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        folder = tmp_path / name
        folder.mkdir()
        stem, _, suffix = name.rpartition(".")
        where = {key: f"{stem}-{1 + index % 2:05}-of-00002.{suffix}" for index, key in enumerate(state)}
        for piece in {*where.values()}:
            write({key: tensor for key, tensor in state.items() if where[key] == piece}, folder / piece)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
        hub.check_weights(shape, folder)
        model = GPT2(shape)
        hub.load_weights(model, folder)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def missing(model: Path, form: str, change) -> None:
    """`model`'s weights, changed, as that kind of file."""
    from safetensors.torch import load_file, save_file

    state = change(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, model / "pytorch_model.bin")
    else:
        save_file(state, model / "model.safetensors")


LACKING = {
    "a layer": (lambda state: {n: t for n, t in state.items() if ".h.1." not in n}, "its weights lack transformer.h.1"),
    "another width": (lambda state: {n: t[..., :8].contiguous() for n, t in state.items()}, "has shape"),
    "another model": (lambda state: {f"bert.{n}": t for n, t in state.items()}, "no GPT-2's: they hold bert"),
    "two of one name": (lambda state: state | {"module." + n: t.clone() for n, t in state.items()}, "but for a prefix"),
    "whole numbers": (lambda state: {n: t.long() for n, t in state.items()}, "is torch.int64"),
    "a head of its own": (
        lambda state: state | {"lm_head.weight": state["transformer.wte.weight"][:-1].clone()},
        "not tied",
    ),
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("change, says", LACKING.values(), ids=LACKING)
def test_weights_that_do_not_fit_are_found_before_the_text_is_read(
    base, small_model, tmp_path, monkeypatch, change, says, form
):
    model = shutil.copytree(small_model, tmp_path / "model")
    missing(model, form, change)
    for name in ("cached_store", "read_blocks"):
        monkeypatch.setattr(given, name, lambda *_, **__: pytest.fail("the text was read"))
    run = dict(model=str(model), from_scratch=False, grow_vocab=True, out=str(tmp_path / "run"))
    with pytest.raises(InputError, match=says):
        fastpoem.fit(**settings(base, **run))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, says", [
    ("gpt2_poem.bin", "rename it to pytorch_model.bin"),
    ("epoch3.pt", "rename it to pytorch_model.bin"),
    ("weights.safetensors", "rename it to model.safetensors"),
    ("adapter_model.safetensors", "merge it into its model"),
    ("tf_model.h5", "but tf_model.h5"),
    ("training_args.bin", "add them, or train with --from-scratch"),
    (None, "add them, or train with --from-scratch"),
])  # fmt: skip
def test_a_folder_without_weights_says_what_it_has_instead(base, tmp_path, name, says):
    if name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=says):
        hub.check_weights(hub.read_config(base / "model")[0], tmp_path)


@pytest.mark.parametrize("weights", [True, False])
def test_from_scratch_fetches_no_weights(base, tmp_path, monkeypatch, weights):
    """A hub of one repository, which hands out what is asked for."""
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        return str(base / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run = dict(model="owner/name", from_scratch=not weights, out=str(tmp_path / "run"), max_steps=1)
    if weights:
        with pytest.raises(InputError, match="no weights"):
            fastpoem.fit(**settings(base, **run))
    else:
        fastpoem.fit(**settings(base, **run))
    assert any("safetensors" in pattern or "bin" in pattern for pattern in asked[0]) == weights
    assert find.resolve_folder("owner/name") == base / "model"


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_model_is_and_its_call_works(base, tmp_path, monkeypatch):
    run = fastpoem.fit(
        **settings(base, out=str(tmp_path / "run"), epochs=2, val_poems=3, data=(str(base / "poems.txt"),))
    )
    card = (run.model / "README.md").read_text(encoding="utf-8")
    last = run.metrics[-1]
    for part in ("GPT-2 trained on poems.txt", "60 poems", "3 poems to validate on", "1 layers, 16 wide, 1,901 ids",
                 "drawn from seed 0", "batch_size 4", "lr 0.01", f"{last['step']:,}", f"{last['val_loss']:.4f}"):  # fmt: skip
        assert part in card, part
    assert str(tmp_path) not in card and "seconds" not in card
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(run.model))
    scope: dict = {}
    exec(code, scope)
    assert scope["poem"].startswith("春") and "[" not in scope["poem"] and len(scope["poem"]) > 1
