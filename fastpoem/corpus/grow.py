"""Characters that a text has and a vocabulary lacks, and the tokenizer with an id for each of them.

A character that the pipeline sets apart in any company (all of CJK) becomes a word of the vocabulary. A letter with a case or a digit
(Latin, Greek, Cyrillic) becomes two, `c` and the `##c` that WordPiece looks for inside a word, so that words stay whole. Any other (〇, □, an
emoji, kana) would be one only where it stands alone: it becomes an added token, which is found everywhere. All are one id for this package, for BertTokenizer and for AutoTokenizer, because the grown tokenizer *is* its files:
they are written first and loaded as any other folder is.
"""

import json
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastpoem.corpus.read import Block
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError

MOST_POINTS = 0x110000
CASED = ("Lu", "Ll", "Lt", "Nd")
BESIDE = "a"  # a letter, which would make a word with any character that is not set apart


def lacking(tokenizer: PoemTokenizer, blocks: Iterable[Block]) -> list[str]:
    """The characters of a text that become [UNK], the most frequent first, equally frequent ones in the order of Unicode."""
    counts: np.ndarray = np.zeros(MOST_POINTS, np.int64)
    for block in blocks:
        points = np.frombuffer("".join(block.lines).encode("utf-32-le"), np.uint32)
        counts += np.bincount(points, minlength=MOST_POINTS)
    if tokenizer.unk_id is None:
        return []
    found = np.flatnonzero(counts)
    chars = [chr(point) for point in found[np.argsort(-counts[found], kind="stable")].tolist()]
    encodings = tokenizer.library.encode_batch(chars, add_special_tokens=False)
    known, pieces = tokenizer.library.get_vocab(True), _Pieces(tokenizer.library)
    return [
        char
        for char, encoding in zip(chars, encodings, strict=True)
        if tokenizer.unk_id in encoding.ids or any(piece not in known for piece in pieces(char))
    ]


def grown(tokenizer: PoemTokenizer, chars: Iterable[str]) -> PoemTokenizer:
    """`tokenizer` with an id for each of `chars`, which it lacks: the ids that follow its last, in this order. Raises InputError."""
    library, files = tokenizer.library, dict(tokenizer.files)
    saved = json.loads(files["tokenizer.json"] if "tokenizer.json" in files else library.to_str())
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    by_words = saved["model"].get("type") in ("WordPiece", "WordLevel")
    words: dict[str, int] = {}
    pieces = _Pieces(library)
    for char in chars:
        if both := pieces(char):
            words |= {
                one: tokenizer.vocab_size + len(words) + place
                for place, one in enumerate(
                    one for one in both if one not in words and library.token_to_id(one) is None
                )
            }
            continue
        word = _set_apart(library, char) if by_words else None
        if word in words or (word is not None and library.token_to_id(word) is not None):
            continue  # two characters that are normalized to one
        words[word or char] = tokenizer.vocab_size + len(words)
        if word is None:
            token: dict[str, Any] = {"content": char, "single_word": False, "lstrip": False, "rstrip": False}
            token |= {"normalized": False, "special": False}
            saved["added_tokens"] = [*(saved.get("added_tokens") or []), {"id": words[char], **token}]
            if "added_tokens_decoder" in config:
                config["added_tokens_decoder"][str(words[char])] = token
    # The library numbers added tokens anew, by the size of the vocabulary, unless they are words of it too: so all are, without a gap.
    recorded = {index: token.content for index, token in library.get_added_tokens_decoder().items()}  # not normalized
    known = (recorded.get(index) or library.id_to_token(index) for index in range(tokenizer.vocab_size))
    names = [name or f"[unused-{index}]" for index, name in enumerate(known)]
    if by_words:
        vocab = saved["model"]["vocab"]
        taken = {*vocab.values()}
        saved["model"]["vocab"] = vocab | {names[i]: i for i in range(len(names)) if i not in taken} | words
    files["tokenizer.json"] = json.dumps(saved, ensure_ascii=False, indent=2).encode()
    files["tokenizer_config.json"] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    if "vocab.txt" in files:
        lines = files["vocab.txt"].decode().removesuffix("\n").split("\n")
        files["vocab.txt"] = ("\n".join([*lines, *names[len(lines) :], *words]) + "\n").encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        found = PoemTokenizer.load(Path(folder))
    if any(found.library.token_to_id(word) != index for word, index in words.items()):
        raise InputError("--grow-vocab", "the ids of this tokenizer have gaps", "save it anew with transformers first")
    return found


class _Pieces:
    """The words of WordPiece that a letter with a case or a digit is at the beginning of a word and inside it, () for any other character."""

    def __init__(self, library: Tokenizer) -> None:
        self.library, model = library, json.loads(library.to_str())["model"]
        self.added = {token.content for token in library.get_added_tokens_decoder().values()}
        # Where CJK is not set apart, a letter would make one word with it, of pieces that no vocabulary has.
        by_pieces = model.get("type") == "WordPiece" and _set_apart(library, "一") is not None
        self.prefix: str | None = model["continuing_subword_prefix"] if by_pieces else None

    def __call__(self, char: str) -> tuple[str, ...]:
        if self.prefix is None or unicodedata.category(char) not in CASED or self.library.pre_tokenizer is None:
            return ()
        word = (self.library.normalizer.normalize_str(char) if self.library.normalizer else char).strip()
        if len(word) != 1 or not {char, word}.isdisjoint(self.added) or unicodedata.category(word) not in CASED:
            return ()
        whole = [text for text, _ in self.library.pre_tokenizer.pre_tokenize_str(BESIDE + word + BESIDE)]
        return (word, self.prefix + word) if whole == [BESIDE + word + BESIDE] else ()


def _set_apart(library: Tokenizer, char: str) -> str | None:
    """The word that `char` is in any company, None where its neighbours decide."""
    if library.pre_tokenizer is None:
        return None
    normalize = library.normalizer.normalize_str if library.normalizer else str
    word = normalize(char).strip()
    words = [text for text, _ in library.pre_tokenizer.pre_tokenize_str(normalize(BESIDE + char + BESIDE))]
    return word if len(word) == 1 and words == [BESIDE, word, BESIDE] else None
