"""What is learned on the way while a corpus is read, to be told to a person: a line each, kept in the store's manifest."""

from collections import Counter
from dataclasses import dataclass, field

from fastpoem.corpus.look import Look
from fastpoem.corpus.source import Source, TextFile, spelled_out

NOTE_CHARS = 300


@dataclass
class Account:
    """Filled by `read_blocks` as it goes; complete when that has ended."""

    look: Look = field(default_factory=Look)
    encodings: dict[str, list[str]] = field(default_factory=dict)  # -> files that were not UTF-8
    columns: dict[str, list[str]] = field(default_factory=dict)  # -> files whose column of poems was guessed to be it
    passed: Counter[str] = field(default_factory=Counter)  # files and folders that are not read
    poemless: dict[str, int] = field(default_factory=dict)  # file -> items in it that are no poems
    keys: dict[str, None] = field(default_factory=dict)  # that those items have
    joined: int = 0  # poems whose line breaks were left out
    broken: int = 0  # poems whose line breaks were kept
    named: bool = False  # whether --field was met with

    def pass_by(self, file: TextFile, value: object) -> None:
        """An item of `file` that is no poem, in a folder, where that is no mistake."""
        self.poemless[str(file)] = self.poemless.get(str(file), 0) + 1
        if isinstance(value, dict) and len(self.keys) < 12:
            self.keys |= dict.fromkeys(map(str, value))

    def why_none(self) -> tuple[str, str]:
        """(reason, mend) of a corpus without a poem."""
        if self.poemless:
            keys = ", ".join(self.keys)[:80] or "no keys"
            reason = f"holds no poem: its {sum(self.poemless.values()):,} items have {keys}"
            return reason, "name the key that holds the poem with --field"
        return "holds no poem: it is empty or blank", "give a text with one poem a line"

    def notes(self, source: Source) -> list[str]:
        """What a person should know of how the text was taken, a line each."""
        lines = [f"read as {encoding}: {_some(files)}" for encoding, files in self.encodings.items()]
        lines += [f"the poems are taken from {column!r} of {_some(files)}" for column, files in self.columns.items()]
        if self.passed:
            lines.append(f"not read: {spelled_out(self.passed)}")
        if self.poemless:
            items = sum(self.poemless.values())
            files = [name.rsplit("/", 1)[-1] for name in self.poemless]
            lines.append(f"{items:,} items without a poem were passed over: {_some(files)}")
        if self.joined:
            lines.append(f"the lines of {self.joined:,} poems were joined (--line-break TOKEN keeps their line breaks)")
        if source.line_break is not None:
            lines.append(f"line breaks kept as {source.line_break} in {self.broken:,} poems")
        if source.field is not None and not self.named:
            lines.append(f"--field {source.field} was not used: no file has columns or keys")
        if removed := spelled_out(+self.look.removed):
            lines.append(f"removed by --clean: {removed}")
        return [_printable(line) for line in lines]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _printable(line: str) -> str:
    """Names of files may hold anything; a line on a terminal may not."""
    return "".join(char if char.isprintable() else "?" for char in line)[:NOTE_CHARS]
