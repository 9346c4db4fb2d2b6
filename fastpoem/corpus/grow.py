"""Characters that a text has and a vocabulary lacks, and the tokenizer with an id for each of them.

A character that the pipeline sets apart in any company (all of CJK) becomes a word of the vocabulary. Any other (〇, □, an emoji, a letter
of a foreign script) would be one only where it stands alone, as WordPiece looks for `##c` inside a word: it becomes an added token, which
is found everywhere. Both are one id for this package, for BertTokenizer and for AutoTokenizer, because the grown tokenizer *is* its files:
they are written first and loaded as any other folder is.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastpoem.corpus.read import Block
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError

MOST_POINTS = 0x110000
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
    return [char for char, encoding in zip(chars, encodings, strict=True) if tokenizer.unk_id in encoding.ids]


def grown(tokenizer: PoemTokenizer, chars: Iterable[str]) -> PoemTokenizer:
    """`tokenizer` with an id for each of `chars`, which it lacks: the ids that follow its last, in this order. Raises InputError."""
    library, files = tokenizer.library, dict(tokenizer.files)
    saved = json.loads(files["tokenizer.json"] if "tokenizer.json" in files else library.to_str())
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    by_words = saved["model"].get("type") in ("WordPiece", "WordLevel")
    words: dict[str, int] = {}
    for char in chars:
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


def _set_apart(library: Tokenizer, char: str) -> str | None:
    """The word that `char` is in any company, None where its neighbours decide."""
    if library.pre_tokenizer is None:
        return None
    normalize = library.normalizer.normalize_str if library.normalizer else str
    word = normalize(char).strip()
    words = [text for text, _ in library.pre_tokenizer.pre_tokenize_str(normalize(BESIDE + char + BESIDE))]
    return word if len(word) == 1 and words == [BESIDE, word, BESIDE] else None
