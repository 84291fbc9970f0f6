"""The pages that teach: every Python snippet runs, in order, and every picture they show is there and small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_runs import write_run
from repository import ROOT

DOCS = ROOT / "docs"
SNIPPETS = {"attention.md": 8, "block.md": 10, "library.md": 9, "metrics.md": 1}
PICTURES = {"attention.md": 2, "block.md": 0, "library.md": 0}


@pytest.mark.parametrize("name", SNIPPETS)
def test_every_snippet_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) == page.count("```python") == SNIPPETS[name]
    monkeypatch.chdir(tmp_path)  # some write files
    write_run(tmp_path / "runs" / "gpt2", steps=30)  # and some read a run's
    names: dict[str, object] = {"__name__": "snippet"}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"docs/{name}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_there_and_small(name: str) -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (DOCS / name).read_text(encoding="utf-8"))
    assert len(pictures) == PICTURES[name]
    for picture in pictures:
        data = (DOCS / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 100_000


def test_the_first_snippet_of_the_library_is_twenty_lines() -> None:
    first = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in first.splitlines() if line]) <= 20
