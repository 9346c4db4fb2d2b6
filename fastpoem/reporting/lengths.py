"""How long a text's poems are, and the buckets they were sorted into, as HTML: from the manifests of the runs' token stores."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastpoem.reporting import svg
from fastpoem.reporting.told import Told
from fastpoem.reporting.words import Say

SHOWN = 0.97  # of the poems: the longest few would press all others together

BATCHES = {
    "pack": "packed, without padding",
    "bucket": "of like length, padded to their bucket",
    "pad": "random, padded to their longest poem",
}


def lengths(runs: Sequence[Told], say: Say) -> str:
    """A chart and a table of each text that the runs were trained on."""
    texts = dict[str, list[Told]]()
    for run in runs:
        if run.manifest is not None:
            texts.setdefault(run.manifest["checksum"], []).append(run)
    if not texts:
        gone = "The token store of these runs is gone, or its manifest is damaged: nothing is known of the lengths."
        return f'<p class="empty">{say(gone)}</p>'
    return "".join(_text(some, index, say, alone=len(texts) == 1) for index, some in enumerate(texts.values()))


def _text(runs: Sequence[Told], index: int, say: Say, *, alone: bool) -> str:
    manifest = runs[0].manifest
    assert manifest is not None
    edges, rows = [length for length, _ in manifest["buckets"]], manifest["counts"]["rows"]
    counts = [(length, poems, bisect_left(edges, length)) for length, poems in sorted(manifest["histogram"])]
    shown, seen = list[tuple[int, int, int]](), 0
    for one in counts:
        if seen >= SHOWN * rows:
            break
        shown.append(one)
        seen += one[1]
    names = "" if alone else ", ".join(escape(run.name) for run in runs)
    source = escape(str(manifest["source"].get("name")))
    x_label = say("tokens in a poem, [CLS] and [SEP] counted")
    picture = svg.bars(source, f"lengths-{index}", shown, rows, x_label=x_label, y_label=say("poems"))
    notes = [say("The two shades tell neighbouring buckets apart.")]
    if seen < rows:
        longer = say("{share} of the poems are longer, up to {most} tokens, and not shown.")
        notes.append(longer.format(share=f"{(rows - seen) / rows:.1%}", most=counts[-1][0]))
    tokens, positions = manifest["counts"]["tokens"], sum(length * poems for length, poems in manifest["buckets"])
    padding = f"{1 - tokens / positions:.1%}"
    notes.append(
        say("{buckets} buckets leave {padding} of their positions to padding.").format(
            buckets=len(edges), padding=padding
        )
    )
    batches = dict[str, list[str]]()
    for run in runs:
        batches.setdefault(BATCHES.get(str(run.config.get("batching")), ""), []).append(run.name)
    for kind, mine in batches.items():
        name = ", ".join(mine) if len(runs) > 1 else say("Batches")
        notes.append(f"{escape(name)}: {say(kind)}" if kind else "")
    return (
        f'<div class="half"><figure><figcaption><b>{source}</b><span>{names}</span></figcaption>{picture}</figure>'
        f"<div><p>{'<br>'.join(filter(None, notes))}</p><details><summary>{say('Each bucket')}</summary>{_table(manifest, say)}</details></div></div>"
    )


def _table(manifest: Mapping[str, Any], say: Say) -> str:
    rows, most = manifest["counts"]["rows"], max(poems for _, poems in manifest["buckets"])
    edges = [length for length, _ in manifest["buckets"]]
    tokens = [0] * len(edges)
    for length, poems in manifest["histogram"]:
        tokens[bisect_left(edges, length)] += length * poems
    lines = "".join(
        f"<tr><td>{length}</td><td>{poems:,}</td><td>{poems / rows:.1%}</td><td>{1 - mine / (length * poems):.1%}</td>"
        f'<td class="meter"><i style="width:{100 * poems / most:.1f}%"></i></td></tr>'
        for (length, poems), mine in zip(manifest["buckets"], tokens, strict=True)
    )
    head = "".join(f"<th>{say(name)}</th>" for name in ("up to", "poems", "of all poems", "padding"))
    return f'<div class="wide"><table class="buckets"><thead><tr>{head}<th></th></tr></thead><tbody>{lines}</tbody></table></div>'
