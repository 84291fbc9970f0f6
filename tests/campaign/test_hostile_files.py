"""Files that are damaged, hostile or not files at all, before every command that reads them.

A small run with its data is made once. A case copies it, spoils one file in one way, and calls one command in this
process. The command has to end by itself, within limits of processor time and memory, with exit code 0, 2 or 3; where
it refuses, in one line that names the place; and what was finished stays as it was. Which cases there are depends on
nothing but their number. The whole: `pytest tests/campaign -m slow`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import call
from small_runs import flags, small, train

from gpt2.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.tokens.tokenizer import gpt2_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs, links and timers of Unix")

MEMORY_KIB = 1 << 20  # that a case may add to the most this process ever held

VALUES: dict[str, Any] = {
    "null": None, "true": True, "text": "x", "list": [1], "object": {"a": {}}, "negative": -1, "zero": 0, "half": 0.5,
    "NaN": float("nan"), "infinite": float("inf"), "400 digits": 10**400, "large": 2**62, "tiny": 1e-320,
    "escape": "\x1b[2J", "surrogate": "\ud800", "TeX": "$x_{$", "outside": "../../outside", "long": "y" * 100_000,
}  # fmt: skip
"""What a field of JSON is made."""

MAKERS: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, old: path.write_bytes(b""),
    "one byte": lambda path, old: path.write_bytes(old[:1]),
    "half": lambda path, old: path.write_bytes(old[: len(old) // 2]),
    "short": lambda path, old: path.write_bytes(old[:-1]),
    "longer": lambda path, old: path.write_bytes(old + b"\x00tail"),
    "noise": lambda path, old: path.write_bytes(random.Random(1).randbytes(300)),
    "escapes": lambda path, old: path.write_bytes(b"\x1b[2J\x1b]0;owned\x07" * 9),
    "brackets": lambda path, old: path.write_bytes(b"[" * 5000 + b"]" * 5000),
    "digits": lambda path, old: path.write_bytes(b'{"step": ' + b"9" * 5000 + b"}"),
    "gone": lambda path, old: path.unlink(),
    "directory": lambda path, old: (path.unlink(), path.mkdir()),
    "loop": lambda path, old: (path.unlink(), path.symlink_to(path.name)),
    "dangling": lambda path, old: (path.unlink(), path.symlink_to("nothing-there")),
    "endless": lambda path, old: (path.unlink(), path.symlink_to("/dev/zero")),
    "FIFO": lambda path, old: (path.unlink(), os.mkfifo(path)),
    **{
        f"bit {place}/8": lambda path, old, place=place: path.write_bytes(  # type: ignore[misc]
            old[: (at := len(old) * place // 8)] + bytes([old[at] ^ 0x41]) + old[at + 1 :]
        )
        for place in range(8)
    },
}
"""What a file is made, from its content."""

CHECKPOINT = "run/checkpoints/step_00000004"
READERS: dict[str, tuple[str, ...]] = {
    "data/manifest.json": ("train", "verify"),
    "data/tokens_train_000001.npy": ("train", "verify"),
    "data/tokens_val_000000.npy": ("train", "verify"),
    "run/config.json": ("train", "again"),
    "run/metrics.jsonl": ("train", "runs", "report", "compare"),
    f"{CHECKPOINT}/config.json": ("train", "sample", "attention"),
    f"{CHECKPOINT}/training.json": ("train",),
    f"{CHECKPOINT}/model.safetensors": ("train", "sample"),
    f"{CHECKPOINT}/optimizer.safetensors": ("train",),
    f"{CHECKPOINT}/tokenizer.json": ("sample",),
    "run/checkpoints/latest": ("train", "sample"),
    "gpt2/config.json": ("hellaswag",),
    "hellaswag.jsonl": ("hellaswag",),
    "source/a.jsonl": ("tokenize",),
    "source/b.txt.gz": ("tokenize",),
    "prompt.txt": ("sample",),
    "text.txt": ("bigram",),
}
"""Each file, and the commands that read it."""


def commands(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Each command's name, its script, and the words behind it."""
    settings = {"max_steps": 6, "checkpoint_every": 2, "eval_every": 3, "keep": 9, "val_tokens": 128}
    config = small(root / "data", root / "run", allow_config_change=True, **settings)
    out = str(root / "made")
    model = ["-m", str(root / "run"), "--device", "cpu"]
    return {
        "train": ("train_gpt2.py", flags(config)),
        "again": (
            "train_gpt2.py",
            ["--config", str(root / "run" / "config.json"), "--run-dir", out, "--max-steps", "1"],
        ),
        "verify": ("data/fineweb.py", ["verify", str(root / "data")]),
        "runs": ("scripts/runs.py", [str(root)]),
        "report": ("scripts/report.py", [str(root / "run"), "--no-png", "--out", out + "/page.html", "--price", "2"]),
        "compare": ("scripts/compare.py", [str(root / "run"), "--json", out + "/compared.json"]),
        "sample": ("scripts/sample.py", [*model, "-f", str(root / "prompt.txt"), "--max-new-tokens", "3"]),
        "attention": ("scripts/attention.py", [*model, "--prompt", "The cat", "--out", out + "/attention.png"]),
        "hellaswag": (
            "hellaswag.py",
            ["-m", str(root / "gpt2"), "-d", "cpu", "--data", str(root / "hellaswag.jsonl"), "--json", out + "/h.json"],
        ),
        "tokenize": (
            "data/fineweb.py",
            ["--source", str(root / "source"), "--tokenizer", "char", "--out", out, "--workers", "1"],
        ),
        "bigram": ("scripts/bigram.py", [str(root / "text.txt"), "--steps", "2", "--out", out + "/bigram.png"]),
    }


@pytest.fixture(scope="session")
def original(char_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with its data, and one file of every other kind that is read."""
    root = tmp_path_factory.mktemp("campaign") / "original"
    shutil.copytree(char_data, root / "data")
    train(small(root / "data", root / "run", max_steps=4, checkpoint_every=2, eval_every=2, keep=9, val_tokens=128))
    gpt2 = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=64)
    GPT(gpt2).init_weights(0).save_pretrained(root / "gpt2", gpt2_tokenizer())
    text = "The cat sat on the mat, and the dog ran after it.\n" * 20
    (root / "source").mkdir()
    (root / "source" / "a.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(20)))
    (root / "source" / "b.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (root / "prompt.txt").write_text("The cat sat")
    (root / "text.txt").write_text(text)
    example = {"ind": 1, "activity_label": "Cats", "ctx_a": "The cat", "ctx_b": "it", "ctx": "The cat sat and"}
    example |= {"endings": ["ran.", "sat.", "slept.", "sang."], "label": 2, "split": "val", "source_id": "a"}
    (root / "hellaswag.jsonl").write_text("".join(json.dumps({**example, "ind": i}) + "\n" for i in range(3)))
    for name in READERS:
        assert (root / name).is_file(), f"{name} is not here: {sorted(p.name for p in (root / name).parent.iterdir())}"
    return root


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value there is anything to change; of a list, its first item alone."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, child in items:
        yield from fields(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any, remove: bool) -> Any:
    """The JSON value with one place of it removed or another."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = changed(copy[path[0]], path[1:], new, remove)
    elif remove:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


Case = tuple[str, str, str]  # the file, what is done to it, the command


def every_case(root: Path) -> list[Case]:
    """All cases there are, in a fixed order."""
    found: list[Case] = []
    for name, readers in READERS.items():
        ways = list(MAKERS)
        if name.endswith((".json", ".jsonl")):
            line = (root / name).read_text().splitlines()[0] if name.endswith(".jsonl") else (root / name).read_text()
            for path in fields(json.loads(line)):
                ways += [f"{json.dumps(path)} {what}" for what in ("removed", *VALUES)]
        found += [(name, way, reader) for way, reader in itertools.product(ways, readers)]
    return found


def spoil(path: Path, way: str) -> None:
    """Do to a file what a case says."""
    old = path.read_bytes()
    if way in MAKERS:
        MAKERS[way](path, old)
        return
    place, end = json.JSONDecoder().raw_decode(way)
    what = way[end + 1 :]
    first, *others = old.decode().splitlines() if path.suffix == ".jsonl" else [old.decode()]
    value = changed(json.loads(first), tuple(place), VALUES.get(what), what == "removed")
    path.write_text("\n".join([json.dumps(value), *others]) + "\n")


def state(root: Path) -> dict[str, str]:
    """SHA-256 of every plain file, by its name."""
    names = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def problems(root: Path, case: Case) -> list[str]:
    """What a command does wrong in a case."""
    name, way, reader = case
    path = root / name
    spoil(path, way)
    before = state(root)
    start = (root / "run" / "metrics.jsonl").read_bytes() if "run/metrics.jsonl" in before else b""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, err = call(*commands(root)[reader])
    found = []
    if "Traceback" in out + err:
        found.append("traceback: " + err.strip().splitlines()[-1][:300])
    elif code not in (0, 2, 3) and not (reader == "verify" and code == 1):
        found.append(f"exit code {code}: {err[-300:]}")
    # What stops a run that trains is said among its other lines.
    said = [line for line in err.splitlines() if not line.startswith("warning: ")]
    said += [line for line in out.splitlines() if line.startswith("error: ")]
    if code == 2 and (len(said) != 1 or not said[0].startswith("error: ")):
        found.append(f"not one line: {said[-3:]}")
    if code == 2 and not re.search("|".join(map(re.escape, (str(root), path.name, path.parent.name))), "".join(said)):
        found.append(f"the place is not named: {said[:1]}")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err):
        found.append("control characters are printed")
    if len(err) > 4000:
        found.append(f"{len(err):,} characters on stderr")
    if grown := max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most - MEMORY_KIB, 0):
        found.append(f"{grown:,} KiB past the limit of memory")
    after = state(root)
    may_change = ("made/", "run/metrics.jsonl", "run/config.json", "run/environment.json", "run/checkpoints/latest")
    for file, digest in before.items():
        if after.get(file) != digest and not (file.startswith(may_change) or (reader == "train" and "/." in file)):
            moved = digest in after.values()  # a damaged checkpoint is set aside
            found += [] if moved else [f"{file} was {'changed' if file in after else 'removed'}"]
    if after.get("run/metrics.jsonl") and not (root / "run" / "metrics.jsonl").read_bytes().startswith(start):
        found.append("the run's history was changed")
    return found


def run_cases(original: Path, directory: Path, cases: list[Case]) -> list[str]:
    """Everything that goes wrong in the cases, a line each."""
    wrong = []
    for case in cases:
        shutil.copytree(original, directory / "case", symlinks=True)
        wrong += [f"{' | '.join(case)}: {problem}" for problem in problems(directory / "case", case)]
        shutil.rmtree(directory / "case")
    return wrong


def test_whole_files_pass(original: Path, tmp_path: Path) -> None:
    """The ground that all cases stand on: nothing spoiled, every command works."""
    shutil.copytree(original, tmp_path / "case")
    for name, (script, words) in commands(tmp_path / "case").items():
        code, _, err = call(script, words)
        assert code == 0, (name, err)


@pytest.mark.parametrize("reader", sorted({reader for readers in READERS.values() for reader in readers}))
def test_a_few_spoiled_files(original: Path, tmp_path: Path, reader: str) -> None:
    cases = [case for case in every_case(original) if case[2] == reader]
    chosen = random.Random(reader).sample(cases, min(len(cases), 5))
    assert run_cases(original, tmp_path, chosen) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_spoiled_files(original: Path, tmp_path: Path, part: int) -> None:
    cases = every_case(original)
    of_files = [case for case in cases if case[1] in MAKERS]  # all of them; of JSON's fields, a sample
    of_fields = [case for case in cases if case[1] not in MAKERS]
    chosen = of_files + random.Random(0).sample(of_fields, 1000 - len(of_files))
    assert len(chosen) == len(set(chosen)) == 1000
    assert run_cases(original, tmp_path, chosen[part::10]) == []
