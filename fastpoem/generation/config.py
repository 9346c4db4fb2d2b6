"""Every setting of generation once: default, help and check. The command line and `run.generate` are both made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastpoem.config import MANY, NO_POEM
from fastpoem.errors import InputError, brief
from fastpoem.poetry.forms import form_named
from fastpoem.poetry.rhyme import book_named

LINE_END = re.compile("[ \t]*\r?\n[ \t]*")  # inside a prompt, with the spaces beside it


@dataclass(frozen=True)
class GenerateConfig:
    """Write poems with a trained model."""

    model: str
    """A run's folder, the folder of a model, or a Hugging Face name."""
    prompt: tuple[str, ...] = ()
    """How the poem begins, its line breaks as they are. Several begin several poems."""
    count: int = 1
    """Poems to write, of each prompt."""
    max_length: int = 128
    """Longest poem in tokens, the prompt included."""
    temperature: float = 1.0
    """Below 1 is safer, above 1 bolder; 0 always takes the likeliest character."""
    top_k: int = 50
    """Choose among the k likeliest characters; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest characters that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes a character less likely that the poem has already."""
    form: str | None = None
    """五绝, 七绝, 五律 or 七律 (wujue, qijue, wulv, qilv): every poem is in it."""
    acrostic: str | None = None
    """藏头: the first character of each line, or of each couplet of a 律诗. Needs --form."""
    rhyme: str | None = None
    """平水韵 (pingshui) or 中华新韵 (xinyun): the ends of the couplets rhyme by it. Needs --form."""
    seed: int | None = None
    """Same seed, same poems."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> GenerateConfig:
        """This configuration. Raises InputError for what is out of range, no form or no book, or needs a form and has none."""
        for name in ("acrostic", "rhyme"):
            if (value := getattr(self, name)) is not None and self.form is None:
                raise InputError(f"--{name} {brief(value, 40)}", "needs a form", "add --form 七绝 or another")
        if self.form is not None and 3 <= self.max_length < (needed := 1 + (form := form_named(self.form)).length):
            reason = f"has {needed} tokens, and --max-length allows {self.max_length}"
            raise InputError(f"--form {form.name}", reason, "raise it")
        if self.rhyme is not None:
            book_named(self.rhyme)
        odd = next((prompt for prompt in self.prompt if NO_POEM.search(LINE_END.sub("", prompt))), None)
        rules = (
            ("count", 1 <= self.count <= MANY, "use 1 or more"),
            ("max_length", self.max_length >= 3, "use 3 or more"),
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < float("inf"),
                "use 0, or 0.001 and more",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "use 0 to 9223372036854775807"),
            ("prompt", odd is None, "use characters of UTF-8"),
            ("top_k", self.top_k >= 0, "use 0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "use more than 0, such as 1.1"),
            ("top_p", 0 < self.top_p <= 1, "use more than 0, at most 1"),
        )
        for name, fine, mend in rules:
            if not fine:
                value = odd if name == "prompt" else getattr(self, name)
                raise InputError(f"--{name.replace('_', '-')} {value}", "out of range", mend)
        return self
