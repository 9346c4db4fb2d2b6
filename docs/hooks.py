"""MkDocs hooks: the READMEs are the site's first pages, what lies outside docs/ is no link there, and a Chinese page is in Chinese around its text too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jieba
from mkdocs.structure.files import File

jieba.setLogLevel("WARNING")  # the search's: four lines in every build

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


def on_page_content(html: str, **_: Any) -> str:
    return html.replace(r"\|", "|")  # in a table's code, where Python-Markdown leaves the backslash


def on_page_context(context: Any, page: Any, config: Any, nav: Any, **_: Any) -> None:
    """The theme's own words, the language that a browser chooses glyphs by, and the Chinese pages first."""
    chinese = ".zh-CN" in page.file.src_uri
    config.theme["language"] = "zh" if chinese else "en"
    nav.items.sort(key=lambda item: (item.title == "中文") != chinese)
