"""The bundled verses: classical forms, no two alike, no line of a known poem, and a vocabulary of just their characters."""

import re
from collections import Counter

from benchmarks.notebook import Poems
from fastpoem.model.hub import BUNDLED

CHARACTER = "[一-鿿]"
FORMS = {f"{lines} lines of {width}": re.compile(f"({CHARACTER}{{{width}}}，{CHARACTER}{{{width}}}[。？！]){{{lines // 2}}}")
         for width in (5, 7) for lines in (4, 8)}  # fmt: skip


def lines_of(poem):
    return re.split("[，。？！]", poem)[:-1]


def test_form_and_uniqueness(verses):
    poems = verses.read_text(encoding="utf-8").splitlines()
    forms = Counter(name for poem in poems for name, form in FORMS.items() if form.fullmatch(poem))
    assert sum(forms.values()) == len(poems) >= 400  # each has a form
    assert len(forms) == 4 and min(forms.values()) >= 50
    every_line = [line for poem in poems for line in lines_of(poem)]
    assert len(set(every_line)) == len(every_line)  # not even a line twice


def test_no_line_of_a_known_poem(verses, shared_poems):
    known = {line for poem in Poems(shared_poems).lines for line in re.split("[，。？！；：、]", poem)}
    assert not [line for poem in Poems(verses).lines for line in lines_of(poem) if line in known]


def test_the_vocabulary_is_their_characters(verses):
    vocabulary = (BUNDLED / "model/vocab.txt").read_text(encoding="utf-8").splitlines()
    characters = set(verses.read_text(encoding="utf-8")) - {"\n"}
    assert vocabulary == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(characters)]
