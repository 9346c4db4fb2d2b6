"""How many of the poems that a model writes are in a form, and rhyme: of any contender's model by the code that a run of fastpoem measures its own with.

A loss does not show that a loop has learned no end of a poem, or that its frame is wrong; these shares do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.tokenizer_files import never_ids
from fastpoem.model.gpt2 import GPT2
from fastpoem.run.samples import Writer

POEMS = 128  # in a second or two by the models of these benchmarks; a share is known to some 4%


def written(model: GPT2, folder: Path, poems: int = POEMS) -> dict[str, Any]:
    """{"written", "in_form", "rhyming"}: how many poems, and which share of them. folder: has the tokenizer."""
    tokenizer = PoemTokenizer.load(folder)
    never = sorted(never_ids(tokenizer, model.config.vocab_size))
    found = Writer(model, tokenizer, "", never, ids=None, seed=0).shares(poems)
    return {"written": found.poems, "in_form": found.in_form, "rhyming": found.rhyming}
