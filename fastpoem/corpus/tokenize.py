"""Token ids, identical to the library's BertTokenizer for every input, many times faster for Chinese.

BERT's pipeline (clean, set CJK apart, strip accents, lower-case; cut at spaces and punctuation; WordPiece in each word)
treats a character that stands apart the same whatever is beside it. So a table from code point to id, asked of the
tokenizer itself as code points are first seen, tokenizes whole blocks with one NumPy lookup. What the table knows of a
code point c, with an `a` and a `,` of the tokenizer's own:

    a c a → a, id, a    APART: a word of its own in any company         (CJK, punctuation)
    a c a → a, a        APART and SILENT: cuts, but is no token         (spaces)
    , c , → ,, id, ,    LOOSE: that id only between APART neighbours    (a lone letter, digit, symbol)
    , c , → ,, ,        LOOSE and SILENT                                (controls, zero width)
    anything else       UNPROVEN                                        (and all that combines or is unassigned)

Cuts are decided between neighbouring characters, and normalization works on each character alone but for combining
marks, which are never proven: so what holds between `a`s holds everywhere. LOOSE characters in a row are asked about as
the word they make, once. A line with an UNPROVEN character goes to the library whole, and so does all text where the
pipeline is not BERT's. Each token that the folder has added to BERT's (they match inside words and across them) has a
character made UNPROVEN.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastpoem.corpus.pipeline import SpecialIds, load_pipeline

CLS_MARK, SEP_MARK = "\ufdd0", "\ufdd1"  # code points that Unicode sets aside for use inside a program
ID_BITS = 24
ID_MASK = (1 << ID_BITS) - 1
LOOSE, SILENT, UNPROVEN, UNSEEN, START, END = (1 << (ID_BITS + bit) for bit in range(6))
ASK_AT_ONCE = 4096
GUARDS = "abcdefghijk", ",.;:!?"
MOST_WORDS, LONGEST_WORD = 1 << 16, 64  # kept in memory


@dataclass(slots=True)
class EncodeStats:
    """What a person wants to know of the lines encoded: how many were cut, and what became [UNK]."""

    truncated: int = 0
    unknown_tokens: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # of their first characters, mostly their only ones
    by_library: int = 0  # lines that the table could not prove

    def add(self, other: "EncodeStats") -> None:
        self.truncated += other.truncated
        self.unknown_tokens += other.unknown_tokens
        self.unknown.update(other.unknown)
        self.by_library += other.by_library


class PoemTokenizer:
    """A tokenizer loaded without transformers. `fingerprint` names its vocabulary and rules; `files` define it, in a model folder too."""

    def __init__(self, library: Tokenizer, special: SpecialIds, truncation_side: str, files: dict[str, bytes]) -> None:
        self.library, self.files, self.truncation_side = library, files, truncation_side
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = special.pad, special.cls, special.sep, special.unk
        self.vocab_size: int = 1 + max(library.get_vocab(True).values())
        library.no_truncation()
        library.no_padding()
        rules = json.loads(library.to_str())
        self.fingerprint = _fingerprint(rules, special, truncation_side, library.encode_special_tokens)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)  # of token ids
        self._table = _Table(library, rules) if _is_bert(library, rules, special) else None

    @classmethod
    def load(cls, folder: Path) -> "PoemTokenizer":
        """The tokenizer of a Hugging Face folder, as transformers would build it. Raises InputError."""
        return cls(*load_pipeline(Path(folder)))

    def encode(self, lines: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
        """Ids of all lines one after another (uint16 or uint32), the number of each line's (int64), and statistics.

        The same ids as `BertTokenizer(lines, truncation=True, max_length=max_length)`, [CLS] and [SEP] included.
        """
        text = CLS_MARK + (SEP_MARK + CLS_MARK).join(lines) + SEP_MARK
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)  # (characters + 2 * lines,)
        foreign = text.count(CLS_MARK) != len(lines) or text.count(SEP_MARK) != len(lines)  # a line holds a mark
        if self._table is None or foreign:
            return self._encode_by_library(lines, max_length)

        codes = self._table.look_up(points)  # (characters + 2 * lines,) uint32: id and flags
        flagged = np.flatnonzero(codes >= 1 << ID_BITS)  # the line marks and the few special cases
        self._table.join_words(text, codes, flagged)
        flags = codes[flagged]
        starts, ends = flagged[(flags & START) != 0], flagged[(flags & END) != 0] + 1  # (lines,) each
        line_of = np.cumsum((flags & START) != 0) - 1  # (flagged,)

        left: np.ndarray = np.zeros(len(lines), bool)  # lines left to the library
        left[line_of[(flags & UNPROVEN) != 0]] = True
        silent = flagged[(flags & SILENT) != 0]
        lengths = ends - starts - np.bincount(line_of[(flags & SILENT) != 0], minlength=len(lines))

        keep: np.ndarray = np.ones(len(codes), bool)
        keep[silent] = False
        stats = EncodeStats()
        for line in np.flatnonzero((lengths > max_length) & ~left).tolist():
            stats.truncated += 1
            inner = np.flatnonzero(keep[starts[line] + 1 : ends[line] - 1]) + starts[line] + 1
            surplus = lengths[line] - max_length
            keep[inner[:surplus] if self.truncation_side == "left" else inner[len(inner) - surplus :]] = False
        lengths = np.minimum(lengths, max_length)
        for line in np.flatnonzero(left).tolist():
            keep[starts[line] : ends[line]] = False

        ids: np.ndarray = (codes & ID_MASK).astype(self.dtype) if self.dtype.itemsize > 2 else codes.astype(np.uint16)
        is_unknown = keep & (ids == self.unk_id)
        unknown, counts = np.unique(points[is_unknown], return_counts=True)
        stats.unknown.update(dict(zip(map(chr, unknown.tolist()), counts.tolist(), strict=True)))
        stats.unknown_tokens = int(counts.sum())
        ids = ids if keep.all() else ids[keep]
        if left.any():
            ids, lengths = self._insert(ids, lengths, np.flatnonzero(left), lines, max_length, stats)
        return ids, lengths, stats

    def _insert(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        left: np.ndarray,
        lines: Sequence[str],
        max_length: int,
        stats: EncodeStats,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths with the library's for the lines `left`, of which `ids` holds nothing; adds to `stats`."""
        answers, counts, found = self._encode_by_library([lines[line] for line in left.tolist()], max_length)
        stats.add(found)
        lengths[left] = 0
        between = np.split(ids, np.cumsum(lengths)[left])  # the proven ids before, among and after them
        rows = np.split(answers, np.cumsum(counts)[:-1])
        lengths[left] = counts
        pieces = [piece for pair in zip(between, rows, strict=False) for piece in pair]
        return np.concatenate([*pieces, between[-1]]), lengths

    def _encode_by_library(self, lines: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
        self.library.enable_truncation(max_length, direction=self.truncation_side)
        try:
            encodings = self.library.encode_batch(list(lines))
        finally:
            self.library.no_truncation()
        stats = EncodeStats(by_library=len(lines))
        rows = []
        for line, encoding in zip(lines, encodings, strict=True):
            row = np.array(encoding.ids, self.dtype)
            rows.append(row)
            stats.truncated += bool(encoding.overflowing)
            if self.unk_id is not None:
                for token in np.flatnonzero(row == self.unk_id).tolist():
                    stats.unknown_tokens += 1
                    begin = encoding.offsets[token][0]
                    stats.unknown[line[begin : begin + 1]] += 1
        ids = np.concatenate(rows) if rows else np.empty(0, self.dtype)
        return ids, np.array([len(row) for row in rows], np.int64), stats


class _Table:
    """What each code point becomes: `codes[point]` is its id with the flags LOOSE, SILENT, UNPROVEN, UNSEEN."""

    def __init__(self, library: Tokenizer, rules: dict) -> None:
        self.library = library
        self.codes: np.ndarray = np.full(0x110000, UNSEEN, np.uint32)
        cls, sep = library.encode("").ids
        self.codes[ord(CLS_MARK)], self.codes[ord(SEP_MARK)] = cls | START, sep | END
        raw = [token["content"] for token in rules["added_tokens"] if not token["normalized"]]
        normalized = [library.normalizer.normalize_str(t["content"]) for t in rules["added_tokens"] if t["normalized"]]
        # Normalizing sets CJK apart with spaces: these tell nothing of a token unless it has nothing else.
        self.added_chars = {char for text in normalized for char in ("".join(text.split()) or text)}
        # An added token cuts the text like punctuation would, so the guards must be part of none.
        self.letter, self.comma = (
            next(char for char in chars if char not in "".join(raw + normalized)) for chars in GUARDS
        )
        self.words: dict[str, list[int] | None] = {}  # ids of words of LOOSE characters, None for UNPROVEN ones
        self.letter_ids, self.comma_ids = self._ids([self.letter, self.comma])
        for text in filter(None, raw):
            self._ban(text)

    def look_up(self, points: np.ndarray) -> np.ndarray:
        """Codes of `points` (any shape, uint32), asking the tokenizer about those never seen before."""
        codes: np.ndarray = self.codes.take(points)
        unseen = (codes & UNSEEN) != 0
        if unseen.any():
            fresh = np.unique(points[unseen])
            for begin in range(0, len(fresh), ASK_AT_ONCE):
                self._ask([chr(point) for point in fresh[begin : begin + ASK_AT_ONCE].tolist()])
            codes = self.codes.take(points)
        return codes

    def join_words(self, text: str, codes: np.ndarray, flagged: np.ndarray) -> None:
        """Put the ids of words of LOOSE characters into `codes` (n,) of `text`, one a character, the rest SILENT.

        `flagged` are the positions of all codes with flags. A word with more ids than characters becomes UNPROVEN.
        """
        loose = flagged[(codes[flagged] & LOOSE) != 0]
        first = np.flatnonzero(np.diff(loose, prepend=-2) != 1)  # where in `loose` a word begins
        sizes = np.diff(first, append=len(loose))
        begins, sizes = loose[first[sizes > 1]].tolist(), sizes[sizes > 1].tolist()
        words = [text[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
        fresh = [word for word in set(words) - self.words.keys() if len(word) <= LONGEST_WORD]
        if len(self.words) + len(fresh) > MOST_WORDS:
            self.words.clear()
            fresh = [word for word in set(words) if len(word) <= LONGEST_WORD]
        n = len(self.comma_ids)
        for word, ids in zip(fresh, self._ids([self.comma + word + self.comma for word in fresh]), strict=True):
            proven = ids[:n] == ids[-n:] == self.comma_ids and len(ids) - 2 * n <= len(word)
            self.words[word] = ids[n:-n] if proven else None
        for begin, size, word in zip(begins, sizes, words, strict=True):
            if (found := self.words.get(word)) is None:
                codes[begin] |= UNPROVEN
            else:
                codes[begin : begin + size] = SILENT
                codes[begin : begin + len(found)] = found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def _ask(self, chars: list[str]) -> None:
        doubtful = []
        for char, ids in zip(chars, self._ids([self.letter + char + self.letter for char in chars]), strict=True):
            code = self._surrounded(ids, self.letter_ids)
            if code is None:
                doubtful.append(char)
            self.codes[ord(char)] = UNPROVEN if code is None or self._unfit(char) else code
        for char, ids in zip(doubtful, self._ids([self.comma + char + self.comma for char in doubtful]), strict=True):
            code = self._surrounded(ids, self.comma_ids)
            self.codes[ord(char)] = UNPROVEN if code is None or self._unfit(char) else code | LOOSE

    @staticmethod
    def _surrounded(ids: list[int], guard: list[int]) -> int | None:
        """The one id between two guards, SILENT for none, or None where the guards were touched or there are more."""
        n = len(guard)
        if len(ids) not in (2 * n, 2 * n + 1) or ids[:n] != guard or ids[len(ids) - n :] != guard:
            return None
        return ids[n] if len(ids) > 2 * n else SILENT

    def _unfit(self, char: str) -> bool:
        """Whether `char` may act upon its neighbours, or be part of an added token, so that asking about it proves nothing."""
        parts = unicodedata.normalize("NFD", char)
        if unicodedata.category(char) in ("Cn", "Cs") or any(map(unicodedata.combining, parts)):
            return True
        return bool(self.added_chars) and not self.added_chars.isdisjoint(self.library.normalizer.normalize_str(char))

    def _ban(self, text: str) -> None:
        """Make every line that holds the added token `text` UNPROVEN, by one character of it that is little used."""
        points = np.array([ord(char) for char in text], np.uint32)
        codes = self.look_up(points)
        if not (codes & UNPROVEN).any():
            self.codes[points[np.lexsort((points, codes & LOOSE))[-1]]] = UNPROVEN  # a LOOSE one if there is one


def _is_bert(library: Tokenizer, rules: dict, special: SpecialIds) -> bool:
    """Whether the table's proof applies: exactly BERT's normalizer, cuts, model and frame."""
    kinds = [(rules.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    if kinds[:3] != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return False
    if kinds[3] not in ("TemplateProcessing", "BertProcessing"):
        return False
    ids = library.get_vocab(True).values()
    if len(set(ids)) != len(ids) or max(ids) >= 1 << ID_BITS:
        return False  # two tokens with one id: an id no longer tells which token stood there
    frame = [special.cls, special.sep]
    inner = library.encode("a,", add_special_tokens=False).ids
    texts = [token["content"] for token in rules["added_tokens"]]
    texts += [library.normalizer.normalize_str(text) for text in texts]
    if any(not set(chars) - set("".join(texts)) for chars in GUARDS):
        return False  # no character to ask beside: all are part of an added token
    return library.encode("").ids == frame and library.encode("a,").ids == [special.cls, *inner, special.sep]


def _fingerprint(rules: dict, *more: object) -> str:
    text = json.dumps([rules, *more], sort_keys=True, default=vars)
    return hashlib.sha256(text.encode()).hexdigest()
