"""The pages: the files and commands they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MADE_LATER = re.compile(r"^(runs|data)/[\w.-]+(/.*)?$|^(before|after)\.json$")
"""Paths of what a command on the page makes."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # code may hold `](` too
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link}
    missing = [link for link in sorted(links) if not (page.parent / link).exists()]
    named = {path for path in re.findall(r"`((?:gpt2|tests|scripts|docs|data)/[\w./-]+\.(?:py|sh|md|json))`", text)}
    missing += [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that start one of our scripts, without comments and placeholders."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            words = line.split("#")[0].strip()
            if re.match(r"(torchrun .*|python )[\w/]*\.py", words):
                found.append(words)
    return sorted(set(found))


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in commands(page)], ids=lambda value: str(value)[-60:]
)
def test_every_flag_of_a_shown_command_exists(page: Path, line: str) -> None:
    """The script's own --help knows every flag that the page gives it."""
    words = shlex.split(line.replace("[", "").replace("]", ""))
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    arguments = words[words.index(script) + 1 :]
    flags = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    if not flags:
        return
    subcommand = arguments[:1] if arguments and re.fullmatch(r"[a-z][a-z-]*", arguments[0]) else []
    shown = subprocess.run(
        [sys.executable, script, *subcommand, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if script == "scripts/sweep.py":  # what it does not know goes to the trainer
        trainer = [sys.executable, "train_gpt2.py", "--help"]
        shown += subprocess.run(trainer, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown)) | {"--run"}
    assert flags <= known, f"{page.name}: {script} does not know {flags - known}"
