"""docs/attention.md: every snippet runs, in order, and every picture it shows is there and small."""

from __future__ import annotations

import re

from repository import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "attention.md").read_text(encoding="utf-8")


def test_every_snippet_runs() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) == PAGE.count("```python") == 7
    names: dict[str, object] = {"__name__": "snippet"}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"docs/attention.md, snippet {number}", "exec"), names)


def test_every_picture_is_there_and_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)
    assert len(pictures) == 2
    for picture in pictures:
        data = (DOCS / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 100_000
