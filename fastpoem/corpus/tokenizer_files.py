"""The tokenizer's files of a trained model's folder: who loads the folder reads a prompt as training read the beginning of a poem.

A poem is trained on as `[CLS] … [SEP]`, and that is also what a `BertTokenizer` makes of a prompt, whatever its folder says: transformers
builds its frame anew. A model that has seen [SEP] has ended its poem, and goes on with another or with nothing that makes sense. So the
folder says that its tokenizer is its tokenizer.json, whose template begins a prompt and does not end it: `AutoTokenizer` and
`pipeline("text-generation", RUN/model)` obey. `BertTokenizer.from_pretrained` still loads the folder, and frames as it always does.

What training needs to know again (`fastpoem.corpus.pipeline`) stands under NOTES in tokenizer_config.json: the class and the frame that the
tokenizer came with, the conversion of the text, and the token for line breaks: a pipeline leaves special tokens out, so for transformers it
is none, and is decoded to a line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, processors

from fastpoem.corpus.pipeline import CONFIG, LINE_BREAK, NOTES, tokenizer_config
from fastpoem.corpus.tokenize import PoemTokenizer

NEVER = ("[UNK]", "[PAD]", "[CLS]", "[MASK]", "<unk>", "<pad>", "<s>", "<mask>")  # whatever a folder calls them
# Radicals to ideographs with their marks and kana, compatibility forms, full-width forms, the planes of rare characters; □ and its kin.
# Beside them no space stands, though BERT's decoder sets one between all tokens.
WIDE = "\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff\u25a0-\u25ff"
GAPS = (  # spaces that are none, for Python's regular expressions and the library's
    f"(?<=[{WIDE}]) +| +(?=[{WIDE}])",
    r"(?<=—) +(?=—)|(?<=…) +(?=…)|(?<=·) +(?=·)",  # one mark of two characters
)


def for_prompts(files: Mapping[str, bytes], tokenizer: PoemTokenizer, convert: str | None = None) -> dict[str, bytes]:
    """Of a model folder's files by name, those that are another's then: `tokenizer`, made to begin prompts as its poems begin. convert: the
    OpenCC conversion of the text, which prompts get too."""
    config = json.loads(files.get(CONFIG, b"{}"))
    library = json.loads(tokenizer.library.to_str())
    notes = {"tokenizer_class": config.get("tokenizer_class"), **config.get(NOTES, {}), "convert": convert}
    notes |= {"trained": {part: library[part] for part in ("post_processor", "decoder")}}
    notes.pop(LINE_BREAK, None)
    if tokenizer.line_break is not None and (library["decoder"] or {}).get("type") == "WordPiece":
        config.pop(LINE_BREAK, None)
        notes[LINE_BREAK] = tokenizer.line_break
        recorded = (config.get("added_tokens_decoder") or {}).values()
        for token in [*library["added_tokens"], *recorded]:
            token["special"] = token.get("special", False) and token["content"] != tokenizer.line_break
    config.pop("auto_map", None)  # code of a stranger's, which does not come along
    config |= {name: text for name, text in _names(tokenizer).items() if not config.get(name)}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", NOTES: notes}
    content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {CONFIG: content.encode(), "tokenizer.json": _beginning(tokenizer, library).encode()}


def conversion_of(folder: Path) -> str | None:
    """The OpenCC conversion of the text that a model folder was trained on. Raises InputError."""
    value = tokenizer_config(folder).get(NOTES, {}).get("convert")
    return value if isinstance(value, str) else None


def never_ids(tokenizer: PoemTokenizer, rows: int) -> set[int]:
    """Ids that are in no poem's text, of an embedding of `rows`: unknown, padding, first, mask, and those without a token. Not the one that
    ends a poem, whatever else it is."""
    ids = [tokenizer.library.token_to_id(text) for text in NEVER]
    ids += [tokenizer.unk_id, tokenizer.pad_id, tokenizer.cls_id]
    known = set(tokenizer.library.get_vocab(True).values())
    without = {one for one in range(rows) if one not in known}
    return ({one for one in ids if one is not None and one < rows} | without) - {tokenizer.sep_id}


def _names(tokenizer: PoemTokenizer) -> dict[str, str]:
    """The special tokens by the names that transformers has for them."""
    ids = {"pad_token": tokenizer.pad_id, "cls_token": tokenizer.cls_id, "sep_token": tokenizer.sep_id}
    ids |= {"bos_token": tokenizer.cls_id, "eos_token": tokenizer.sep_id}
    ids |= {} if tokenizer.unk_id is None else {"unk_token": tokenizer.unk_id}
    return {name: text for name, index in ids.items() if (text := tokenizer.library.id_to_token(index))}


def _beginning(tokenizer: PoemTokenizer, parts: dict[str, Any]) -> str:
    """tokenizer.json: as `tokenizer` is (`parts`), but that a text gets its first token and not its last, and that decoding sets no space
    beside CJK."""
    library = Tokenizer.from_str(json.dumps(parts))
    first = library.id_to_token(tokenizer.cls_id)
    library.post_processor = processors.TemplateProcessing(
        single=[first, "$A"], pair=[first, "$A", "$B:1"], special_tokens=[(first, tokenizer.cls_id)]
    )
    if (parts["decoder"] or {}).get("type") == "WordPiece":
        closed = [decoders.Replace(Regex(gap), "") for gap in GAPS]
        broken = []
        if tokenizer.line_break is not None:
            broken = [decoders.Replace(Regex(f" *{re.escape(tokenizer.line_break)} *"), "\n")]
        library.decoder = decoders.Sequence([library.decoder, decoders.Fuse(), *broken, *closed])
    return library.to_str()
