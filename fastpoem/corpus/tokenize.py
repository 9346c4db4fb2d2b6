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
marks, which are never proven: so what holds between `a`s holds everywhere. A line with an UNPROVEN character or two
LOOSE ones in a row goes to the library whole, and so does all text where the pipeline is not BERT's.
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

CLS_MARK, SEP_MARK = "\ud800", "\udfff"  # surrogates: no text that can be encoded holds one
ID_BITS = 24
LOOSE, SILENT, UNPROVEN, UNSEEN, START, END = (1 << (ID_BITS + bit) for bit in range(6))
ASK_AT_ONCE = 4096


@dataclass(slots=True)
class EncodeStats:
    """What a person wants to know of the lines encoded: how many were cut, and which texts became [UNK]."""

    truncated: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    by_library: int = 0  # lines that the table could not prove

    def add(self, other: "EncodeStats") -> None:
        self.truncated += other.truncated
        self.unknown.update(other.unknown)
        self.by_library += other.by_library


class PoemTokenizer:
    """A tokenizer loaded without transformers. `fingerprint` names its vocabulary and rules, `files` what defines it."""

    def __init__(self, library: Tokenizer, special: SpecialIds, truncation_side: str, files: tuple[Path, ...]) -> None:
        self.library, self.files, self.truncation_side = library, files, truncation_side
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = special.pad, special.cls, special.sep, special.unk
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        library.no_truncation()
        library.no_padding()
        rules = json.loads(library.to_str())
        self.fingerprint = _fingerprint(rules, special, truncation_side)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)  # of token ids
        self._table = _Table(library, rules) if _is_bert(library, rules, special, self.vocab_size) else None

    @classmethod
    def load(cls, folder: Path) -> "PoemTokenizer":
        """The tokenizer of a Hugging Face folder, as transformers would build it. Raises InputError."""
        return cls(*load_pipeline(Path(folder)))

    def encode(self, lines: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
        """Ids of all lines one after another (uint16 or uint32), the number of each line's (int64), and statistics.

        The same ids as `BertTokenizer(lines, truncation=True, max_length=max_length)`, [CLS] and [SEP] included.
        """
        if self._table is None:
            return self._encode_by_library(lines, max_length)
        if not lines:
            return np.empty(0, self.dtype), np.empty(0, np.int64), EncodeStats()
        text = CLS_MARK + (SEP_MARK + CLS_MARK).join(lines) + SEP_MARK
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)  # (characters + 2 * lines,)
        codes = self._table.look_up(points)  # (characters + 2 * lines,) uint32: id and flags
        flagged = np.flatnonzero(codes >= 1 << ID_BITS)  # the line marks and the few special cases
        flags = codes[flagged]
        starts, ends = flagged[(flags & START) != 0], flagged[(flags & END) != 0] + 1
        if len(starts) != len(lines) or len(ends) != len(lines):
            raise ValueError("a line holds half of a surrogate pair, which is no text")
        line_of = np.cumsum((flags & START) != 0) - 1  # (flagged,)

        loose = (flags & LOOSE) != 0
        crowded = loose[1:] & loose[:-1] & (flagged[1:] == flagged[:-1] + 1)
        unproven = (flags & UNPROVEN) != 0
        unproven[1:] |= crowded
        left = np.zeros(len(lines), bool)  # lines left to the library
        left[line_of[unproven]] = True
        silent = np.bincount(line_of[(flags & SILENT) != 0], minlength=len(lines))
        lengths = ends - starts - silent

        stats = EncodeStats(by_library=int(left.sum()))
        if stats.by_library == 0 and not silent.any() and lengths.max() <= max_length:
            stats.unknown = self._unknown(points, codes)
            return codes.astype(self.dtype), lengths, stats
        return self._mend(lines, max_length, points, codes, starts, ends, left, silent, lengths, stats)

    def _mend(  # the general case of `encode`, in pieces between the lines that need something
        self,
        lines: Sequence[str],
        max_length: int,
        points: np.ndarray,
        codes: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        left: np.ndarray,
        silent: np.ndarray,
        lengths: np.ndarray,
        stats: EncodeStats,
    ) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
        lengths = lengths.copy()
        chosen = np.flatnonzero(left)
        ids, counts, by_library = self._encode_by_library([lines[line] for line in chosen], max_length)
        stats.add(EncodeStats(by_library.truncated, by_library.unknown))
        answers = dict(zip(chosen.tolist(), np.split(ids, np.cumsum(counts)[:-1]), strict=True)) if len(chosen) else {}
        lengths[chosen] = counts

        pieces: list[np.ndarray] = []
        done = 0  # position in `codes` up to which the pieces reach

        def keep(begin: int, end: int) -> None:
            if end > begin:
                pieces.append(codes[begin:end].astype(self.dtype))
                stats.unknown.update(self._unknown(points[begin:end], codes[begin:end]))

        for line in np.flatnonzero(left | (silent > 0) | (lengths > max_length)).tolist():
            begin, end = int(starts[line]), int(ends[line])
            keep(done, begin)
            done = end
            if line in answers:
                pieces.append(answers[line])
                continue
            sounding = np.flatnonzero((codes[begin:end] & SILENT) == 0) + begin
            if len(sounding) > max_length:
                stats.truncated += 1
                inner = sounding[1:-1]
                room = max_length - 2
                inner = inner[:room] if self.truncation_side == "right" else inner[len(inner) - room :]
                sounding = np.concatenate((sounding[:1], inner, sounding[-1:]))
                lengths[line] = max_length
            pieces.append(codes[sounding].astype(self.dtype))
            stats.unknown.update(self._unknown(points[sounding], codes[sounding]))
        keep(done, len(codes))
        return np.concatenate(pieces), lengths, stats

    def _unknown(self, points: np.ndarray, codes: np.ndarray) -> Counter[str]:
        found, counts = np.unique(points[(codes & ((1 << ID_BITS) - 1)) == self.unk_id], return_counts=True)
        return Counter({chr(point): count for point, count in zip(found.tolist(), counts.tolist(), strict=True)})

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
                    begin, end = encoding.offsets[token]
                    stats.unknown[line[begin:end]] += 1
        ids = np.concatenate(rows) if rows else np.empty(0, self.dtype)
        return ids, np.array([len(row) for row in rows], np.int64), stats


class _Table:
    """What each code point becomes: `codes[point]` is its id with the flags LOOSE, SILENT, UNPROVEN, UNSEEN."""

    def __init__(self, library: Tokenizer, rules: dict) -> None:
        self.library = library
        self.codes = np.full(0x110000, UNSEEN, np.uint32)
        cls, sep = library.encode("").ids
        self.codes[ord(CLS_MARK)], self.codes[ord(SEP_MARK)] = cls | START, sep | END
        self.codes[0xD801:0xDFFF] = UNPROVEN
        raw = [token["content"] for token in rules["added_tokens"] if not token["normalized"]]
        normalized = [library.normalizer.normalize_str(t["content"]) for t in rules["added_tokens"] if t["normalized"]]
        # Normalizing sets CJK apart with spaces: these tell nothing of a token unless it has nothing else.
        self.added_chars = {char for text in normalized for char in ("".join(text.split()) or text)}
        # An added token cuts the text like punctuation would, so the guards must be part of none.
        self.letter, self.comma = (
            next(char for char in chars if char not in "".join(raw + normalized)) for chars in ("abcdefghijk", ",.;:!?")
        )
        self.letter_ids, self.comma_ids = self._ids([self.letter, self.comma])
        for text in filter(None, raw):
            self._ban(text)

    def look_up(self, points: np.ndarray) -> np.ndarray:
        """Codes of `points` (any shape, uint32), asking the tokenizer about those never seen before."""
        codes = self.codes.take(points)
        unseen = (codes & UNSEEN) != 0
        if unseen.any():
            fresh = np.unique(points[unseen])
            for begin in range(0, len(fresh), ASK_AT_ONCE):
                self._ask([chr(point) for point in fresh[begin : begin + ASK_AT_ONCE].tolist()])
            codes = self.codes.take(points)
        return codes

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
        """Make every line that holds the added token `text` unproven. Two LOOSE characters in a row do so already."""
        codes = self.look_up(np.array([ord(char) for char in text], np.uint32))
        loose = (codes & LOOSE) != 0
        if (loose[1:] & loose[:-1]).any() or ((codes & UNPROVEN) != 0).any():
            return
        # Any one character of it would do: the least usual is the one that costs the least.
        self.codes[max(map(ord, text))] = UNPROVEN


def _is_bert(library: Tokenizer, rules: dict, special: SpecialIds, vocab_size: int) -> bool:
    """Whether the table's proof applies: exactly BERT's normalizer, cuts, model and frame."""
    kinds = [(rules.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or vocab_size >= 1 << ID_BITS:
        return False
    if (rules["post_processor"] or {}).get("type") not in ("TemplateProcessing", "BertProcessing"):
        return False
    if len(set(library.get_vocab(True).values())) != vocab_size:
        return False  # two tokens with one id: an id no longer tells which token stood there
    frame = [special.cls, special.sep]
    inner = library.encode("a,", add_special_tokens=False).ids
    return library.encode("").ids == frame and library.encode("a,").ids == [special.cls, *inner, special.sep]


def _fingerprint(rules: dict, special: SpecialIds, truncation_side: str) -> str:
    text = json.dumps([rules, vars(special), truncation_side], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
