"""MkDocs hooks: the READMEs are the site's first pages, and what lies outside docs/ is no link there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "index.zh-CN.md": "README.zh-CN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Any, config: Any, **_: Any) -> Any:
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").replace("](tests/", "](../tests/")
        for other, name in PAGES.items():
            text = text.replace(f"]({name})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    for name in [file.src_uri for file in files if file.src_uri.endswith(".py")]:
        files.remove(files.get_file_from_path(name))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
