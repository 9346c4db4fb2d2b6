"""RUN/model/README.md: what the model in a folder is, for who finds it without its run.

A function of what the run computed and of nothing else, neither of time nor of paths: the card of a resumed run is that of an untouched one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fastpoem.config import TrainConfig
from fastpoem.corpus.store import TokenStore
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.model.gpt2 import GPT2Config, count_parameters

TOLD = ("batch_size", "lr", "schedule", "seed", "precision")  # even where they are the defaults
UNTOLD = ("recipe",)  # a recipe is only other defaults

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- fastpoem
{base}---

# A GPT-2 trained on {name}

| | |
| --- | --- |
{table}

## To write a poem

```
python -m fastpoem.generate --model THIS_FOLDER --prompt 春
```

With transformers alone. A poem begins with `{cls}` and ends with `{sep}`; the tokenizer that `AutoTokenizer` loads here gives a prompt the
first and not the last. One that gives both (`BertTokenizer`) makes a poem of the prompt that has ended already: with it, write
`"{cls}春"` and `add_special_tokens=False`.

```python
from transformers import pipeline

write = pipeline("text-generation", model="THIS_FOLDER")
poem = write("春", do_sample=True, top_k=50)[0]["generated_text"]
print(poem)
```

Made with fastpoem.
"""


def model_card(
    config: TrainConfig,
    hub_name: str | None,
    settings: Mapping[str, Any],
    store: TokenStore,
    held: int,
    shape: GPT2Config,
    tokenizer: PoemTokenizer,
    rows: Iterable[Mapping[str, Any]],
) -> bytes:
    """README.md of a trained model. hub_name: of the model that training began with, where it came from the hub; settings: those that a
    resumed run must share; held: poems that are validated on; rows: of metrics.jsonl, up to the state that is saved."""
    steps = [row for row in rows if "event" not in row]
    epochs = [row for row in rows if row.get("event") == "epoch"]
    name = " ".join(str(store.manifest["source"].get("name")).split()).replace("|", "/")
    base = None if config.from_scratch else hub_name
    began = f"weights drawn from seed {config.seed}" if config.from_scratch else base or "trained weights"
    default = dataclasses.asdict(TrainConfig())
    told = {key: value for key, value in settings.items() if key not in UNTOLD}
    told = {key: value for key, value in told.items() if key in TOLD or value != default.get(key, value)}
    counts = store.manifest["counts"]
    parameters = count_parameters(shape) / 1e6
    table = {
        "text": f"{name}: {counts['rows']:,} poems, {counts['tokens']:,} tokens, {held:,} poems to validate on",
        "model": f"{shape.n_layer} layers, {shape.n_embd} wide, {shape.vocab_size:,} ids, {parameters:.1f} M parameters",
        "began with": began,
        "settings": ", ".join(f"{key} {value}" for key, value in told.items()),
    }
    if steps:
        table["steps"] = f"{steps[-1]['step']:,}"
        table["loss of the last step"] = _number(steps[-1]["loss"])
    if epochs:
        last = epochs[-1]
        table["last epoch"] = f"loss {_number(last['mean_loss'])}"
        if last["val_loss"] is not None:
            table["validation"] = f"loss {_number(last['val_loss'])}, accuracy {_number(last['val_accuracy'])}"
    text = lambda index: tokenizer.library.id_to_token(index)
    card = _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        name=name,
        table="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        cls=text(tokenizer.cls_id),
        sep=text(tokenizer.sep_id),
    )
    return card.encode("utf-8", "replace")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
