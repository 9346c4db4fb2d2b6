"""The tokenizer of a Hugging Face folder, built as transformers 5 builds it but without its seconds of import.

A `BertTokenizer` is *rebuilt* by transformers even where the folder holds a tokenizer.json: the vocabulary, the frame
([CLS] … [SEP]) and the added tokens come from that file, the normalizer from the flags of tokenizer_config.json
(`BertTokenizer.__init__`, `TokenizersBackend.convert_to_native_format`, `PreTrainedTokenizerBase._from_pretrained`).
A folder that names another class is taken as its tokenizer.json says, as `PreTrainedTokenizerFast` would, but for the frame: a poem
needs an end that the model can learn to write, so one that frames nothing (byte-level BPE) gets bos and eos round each poem.
A folder that training has left (`fastpoem.corpus.tokenizer_files`) says for transformers how prompts begin, and under NOTES how its poems
were framed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from fastpoem.errors import InputError
from fastpoem.paths import spelled

CONFIG, NOTES = "tokenizer_config.json", "fastpoem"
FILES = ("vocab.txt", "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json")
BERT = ("BertTokenizer", "BertTokenizerFast")
BERT_DEFAULTS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
GPT2_END = "<|endoftext|>"  # bos and eos of GPT2Tokenizer, where a folder names none
NAMED = ("bos_token", "eos_token", *BERT_DEFAULTS)  # in transformers' order, which gives new tokens their ids
# Of tokenizer_config.json: the token that stands for a line break inside a poem. The libraries make a special token of any value
# whose key ends in _token, so the key alone is all that a model folder needs.
LINE_BREAK = "line_break_token"
LARGEST_FILE = 1 << 28
MOST_IDS = 1 << 24


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. Where there is no [PAD], [CLS] or [SEP], its nearest kin: eos, bos (or eos), eos. `unk` is None where
    nothing becomes it, or where it ends poems too, as GPT-2's <|endoftext|> does."""

    pad: int
    cls: int
    sep: int
    unk: int | None


def load_pipeline(folder: Path, line_break: str | None = None) -> tuple[Tokenizer, SpecialIds, str, dict[str, bytes]]:
    """(tokenizer, special ids, truncation side, the files that define it by name, as a model folder should have them), with `line_break` as
    one of its special tokens. Raises InputError."""
    if not folder.is_dir():
        raise InputError(folder, "is not a folder", "name a model folder with vocab.txt or tokenizer.json")
    files = tuple(folder / name for name in FILES if (folder / name).is_file())
    for path in files:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(path, "is too large for a tokenizer's file", "fetch the model folder again")
    config = tokenizer_config(folder)
    trained = config.get(NOTES, {})
    noted = None if LINE_BREAK in config else trained.get(LINE_BREAK)
    if noted is not None:
        config[LINE_BREAK] = noted
    if line_break is not None:
        config[LINE_BREAK] = line_break
    has_json, has_vocab = (folder / "tokenizer.json").is_file(), (folder / "vocab.txt").is_file()
    if not has_json and not has_vocab:
        mend = "add the vocab.txt or tokenizer.json that the model was made with"
        if (folder / "merges.txt").is_file() or any(folder.glob("*.model")):
            mend = (
                "load it with transformers' AutoTokenizer and save_pretrained, which makes its files a tokenizer.json"
            )
        raise InputError(folder, "holds no tokenizer", mend)
    kind = (trained or config).get("tokenizer_class") or ("BertTokenizer" if has_vocab else None)
    side = config.get("truncation_side", "right")
    if side not in ("left", "right"):
        raise InputError(folder / "tokenizer_config.json", f"truncation_side is {side!r}", 'write "right" or "left"')
    try:
        saved = _object(folder / "tokenizer.json")
        _refuse_odd_ids(folder, config, saved)
        recorded = [*(saved.get("added_tokens") or []), *(config.get("added_tokens_decoder") or {}).values()]
        for token in recorded if noted is not None else []:
            token["special"] = token.get("special", False) or token["content"] == noted  # as it was in training
        if kind in BERT:
            library, names = _bert(folder, config, saved, has_json)
        elif has_json:
            library = Tokenizer.from_str(json.dumps(saved | trained.get("trained", {})))
            given, extra = _named(folder, config)
            names = _ends(library, kind) | given
            _add(library, {}, names, extra)
        else:
            mend = "use BertTokenizer, or save the tokenizer with save_pretrained as tokenizer.json"
            raise InputError(folder, f"tokenizer class {kind} has no tokenizer.json", mend)
        library.encode_special_tokens = bool(config.get("split_special_tokens", False))
        special = _special_ids(folder, library, names)
        _frame(library, special)
        kept = {path.name: path.read_bytes() for path in files}
        silent = {"do_lower_case": True} if kind in BERT else {}  # transformers 5.0 to 5.3 take silence for False
        complete = {"tokenizer_class": kind or "PreTrainedTokenizerFast"} | silent | _ends(library, kind) | config
        complete.pop("auto_map", None)  # code of a stranger's, which we did not run either
        if complete != config or line_break is not None:
            kept["tokenizer_config.json"] = (json.dumps(complete, indent=2, ensure_ascii=False) + "\n").encode()
        return library, special, side, {name: kept[name] for name in FILES if name in kept}
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception, of any wording, for files it cannot use
        raise InputError(folder, f"its tokenizer cannot be loaded ({error})", "fetch the model folder again") from None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder, {} where there is none. Raises InputError."""
    config = _object(folder / CONFIG)
    if not isinstance(config.get(NOTES, {}), dict):
        raise InputError(folder / CONFIG, f"its {NOTES} is no JSON object", "fetch the model folder again")
    return config


def line_break_of(folder: Path) -> str | None:
    """The token that stands for a line break in the poems of a model folder's tokenizer. Raises InputError."""
    config = tokenizer_config(folder)
    value = config.get(LINE_BREAK, config.get(NOTES, {}).get(LINE_BREAK))
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _refuse_odd_ids(folder: Path, config: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises InputError: the library takes memory for the largest id, and ends the process where there is too little."""
    vocab = saved["model"]["vocab"] if saved else {}
    ids: dict[str, list[Any]] = {
        "tokenizer.json": [token["id"] for token in saved.get("added_tokens") or []],
        "tokenizer_config.json": [int(index) for index in config.get("added_tokens_decoder") or {}],
        "added_tokens.json": list(_object(folder / "added_tokens.json").values()),
    }
    ids["tokenizer.json"] += vocab.values() if isinstance(vocab, dict) else []  # a list's places are its ids
    for name, found in ids.items():
        for index in found:
            if type(index) is not int or not 0 <= index < MOST_IDS:
                raise InputError(folder / name, f"has the id {index!r:.40}", "fetch the model folder again")


def _bert(
    folder: Path, config: dict[str, Any], saved: dict[str, Any], has_json: bool
) -> tuple[Tokenizer, dict[str, AddedToken | str]]:
    if has_json:
        vocab = saved["model"]["vocab"]
    else:
        with spelled(folder / "vocab.txt") as name:
            vocab = WordPiece.read_file(name)
    given, extra = _named(folder, config)
    names = BERT_DEFAULTS | given
    added = _added(folder, config, saved, names)
    by_text = {_text(token): token for token in added.values()}
    names = {name: by_text.get(_text(token), token) for name, token in names.items()}
    unk = _text(names["unk_token"])
    if unk not in vocab:
        raise InputError(folder, f"its vocabulary has no {unk}", "add it: characters outside the vocabulary need it")

    lower = config.get("do_lower_case", True)
    library = Tokenizer(WordPiece(vocab, unk_token=unk))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=lower,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    _add(library, added, names, extra)
    frame = [(text, library.token_to_id(text)) for text in (_text(names["cls_token"]), _text(names["sep_token"]))]
    (cls, _), (sep, _) = frame
    library.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", special_tokens=frame
    )
    return library, names


def _ends(library: Tokenizer, kind: str | None) -> dict[str, AddedToken | str]:
    """The names that GPT2Tokenizer has where its folder gives none."""
    if kind not in (None, "GPT2Tokenizer", "GPT2TokenizerFast") or library.token_to_id(GPT2_END) is None:
        return {}
    return {"bos_token": GPT2_END, "eos_token": GPT2_END}


def _frame(library: Tokenizer, special: SpecialIds) -> None:
    """Have the library put the first and the last token round a text, where it does not already."""
    ids = library.encode("").ids
    if len(ids) < 2 or (ids[0], ids[-1]) != (special.cls, special.sep):
        cls, sep = ((str(library.id_to_token(index)), index) for index in (special.cls, special.sep))
        library.post_processor = processors.BertProcessing(sep, cls)


def _add(library: Tokenizer, added: dict[int, AddedToken], names: dict[str, Any], extra: list[Any]) -> None:
    """Add what transformers adds, in its order: recorded tokens by id, then the named special ones, then the extra."""
    tokens = [added[index] for index in sorted(added)]
    present = {token.content for token in library.get_added_tokens_decoder().values()} | {_text(t) for t in tokens}
    ordered = [names[name] for name in NAMED if names.get(name)]
    for token in ordered + [token for name, token in names.items() if name not in NAMED] + extra:
        if _text(token) not in present:
            present.add(_text(token))
            tokens.append(token if isinstance(token, AddedToken) else AddedToken(_text(token), special=True))
    library.add_tokens(tokens)


def _named(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """({"cls_token": "[CLS]", …}, extra special tokens) that the folder's files give, as text or AddedToken."""
    legacy = {} if "added_tokens_decoder" in config else _object(folder / "special_tokens_map.json")
    both = config | legacy
    names = {name: both[name] for name in both if name.endswith("_token") and isinstance(both[name], str | dict)}
    extra: list[Any] = []
    for source in (config, legacy):
        more = source.get("extra_special_tokens") or source.get("additional_special_tokens") or []
        if isinstance(more, dict):
            names |= more
        else:
            extra += [token for token in more if token not in extra]
    cast = lambda token: _token(token, special=True) if isinstance(token, dict) else token
    return {name: cast(token) for name, token in names.items() if token}, list(map(cast, extra))


def _added(
    folder: Path, config: dict[str, Any], saved: dict[str, Any], names: dict[str, AddedToken | str]
) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in config:
        return {int(index): _token(token) for index, token in config["added_tokens_decoder"].items()}
    special = {_text(token) for token in names.values()}
    added = {
        index: AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in _object(folder / "added_tokens.json").items()
    }
    return added | {token["id"]: _token(token) for token in saved.get("added_tokens", [])}


def _token(fields: dict[str, Any], **more: bool) -> AddedToken:
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**({name: fields[name] for name in known if name in fields} | more))


def _text(token: AddedToken | str) -> str:
    return token.content if isinstance(token, AddedToken) else token


def _special_ids(folder: Path, library: Tokenizer, names: dict[str, Any]) -> SpecialIds:
    def first(*wanted: str) -> int | None:
        ids = (library.token_to_id(_text(names[name])) for name in wanted if names.get(name))
        return next((index for index in ids if index is not None), None)

    pad, cls = first("pad_token", "eos_token"), first("cls_token", "bos_token", "eos_token")
    sep, unk = first("sep_token", "eos_token"), first("unk_token")
    if pad is None or cls is None or sep is None:
        mend = "name pad_token, cls_token and sep_token (or bos_token and eos_token) in tokenizer_config.json"
        raise InputError(folder, "its tokenizer has no padding, first or last token", mend)
    return SpecialIds(pad, cls, sep, None if unk in (cls, sep) else unk)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(path, "is not JSON", "fetch the model folder again") from None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", "fetch the model folder again")
    return value
