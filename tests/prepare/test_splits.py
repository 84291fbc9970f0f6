"""Splits and configurations are told apart as the `datasets` library does; nothing of another split is trained on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.prepare.splits import _WORDS, resolve_splits

datasets = pytest.importorskip("datasets")

FOLDERS = [f"{folder}/{split}/{n}.jsonl" for folder in "ab" for split in ("train", "test", "validation") for n in "01"]
SHARDED = [f"data/{split}-0000{n}-of-00002.jsonl" for split in ("train", "test", "random") for n in (0, 1)]
CARD = """---
configs:
- config_name: one
  data_files: a/train/*
- config_name: two
  data_files:
  - split: train
    path: [./a/train/0.jsonl, "b/train/**"]
  - split: validation
    path: a/valid*/*
- config_name: three
  data_dir: b
---
# text
"""


def write(directory: Path, names: list[str], card: str | None) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    if card is not None:
        (directory / "README.md").write_text(card)


@pytest.mark.parametrize(
    ("names", "card", "config"),
    [
        (FOLDERS, None, None),
        (["train.jsonl", "my_val.jsonl", "other.jsonl", "test-1.jsonl"], None, None),
        ([*SHARDED, "elsewhere.jsonl"], None, None),
        (["x.jsonl", "deep/er/y.jsonl"], None, None),
        (["train/a.jsonl", "dev/a.jsonl", "x.jsonl"], "# no configurations", None),
        (FOLDERS, CARD, "one"),
        (FOLDERS, CARD, "two"),
        (FOLDERS, CARD, "three"),
        (FOLDERS, CARD.replace("config_name: three", "config_name: three\n  default: true"), None),
        (FOLDERS, CARD.replace("one", "default"), None),
    ],
    ids=["folders", "names", "sharded", "none", "card_without", "one", "two", "three", "default_true", "default"],
)
def test_as_the_library_reads_them(tmp_path, monkeypatch, names, card, config):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    write(data, names, card)
    files = datasets.load_dataset_builder(str(data), config, cache_dir=str(tmp_path / "cache")).config.data_files
    wanted = {
        str(split): sorted({Path(path).relative_to(data).as_posix() for path in paths})
        for split, paths in files.items()
    }
    splits = resolve_splits(names, card, config, "o/n")
    assert splits.train == wanted["train"]
    assert splits.validation == wanted.get("validation", [])
    unread = dict(splits.unread)
    assert sorted([*splits.train, *splits.validation, *unread]) == sorted(names)
    for name in wanted.get("test", []):
        assert unread[name] == "of the split test, which is not trained on"


def test_a_choice_is_asked_for():
    with pytest.raises(UserError, match=r"o/n is 3 data sets: one, two, three; choose one, as in --source o/n:one"):
        resolve_splits(FOLDERS, CARD, None, "o/n")
    with pytest.raises(UserError, match="o/n has no configuration four; it has one, two, three"):
        resolve_splits(FOLDERS, CARD, "four", "o/n")
    with pytest.raises(UserError, match=r"o/n has no configuration four$"):
        resolve_splits(FOLDERS, None, "four", "o/n")


def test_what_another_split_claims_is_not_trained_on():
    splits = resolve_splits(["train-test.jsonl", "train.jsonl"], None, None, "o/n")
    assert splits.train == ["train.jsonl"]
    assert resolve_splits(["val.jsonl", "data.jsonl"], None, None, "o/n")[:2] == (["data.jsonl"], ["val.jsonl"])
    with pytest.raises(UserError, match=r"no file to train on; its splits with files are: test;"):
        resolve_splits(["test/a.jsonl", "test/b.jsonl"], None, None, "o/n")


def test_named_files_are_held_out_only_beside_training_files():
    assert resolve_splits(["test.txt", "x.txt"], None, None, "--source", named=True).train == ["test.txt", "x.txt"]
    assert resolve_splits(["train.txt"], None, None, "--source", named=True).train == ["train.txt"]
    splits = resolve_splits(["test/0.txt", "train/0.txt", "val/0.txt", "x.txt"], None, None, "--source", named=True)
    assert splits[:2] == (["train/0.txt", "x.txt"], ["val/0.txt"])


@pytest.mark.parametrize(
    "card",
    ["---\nconfigs: 3\n---\n", "---\nconfigs:\n- data_files: a\n---\n", "---\na: [\n---\n"],
)
def test_a_card_that_is_wrong_is_told_in_one_line(card):
    with pytest.raises(UserError, match=r"the card of o/n, README\.md, cannot be understood") as error:
        resolve_splits(FOLDERS, card, None, "o/n")
    assert "\n" not in str(error.value)


def test_names_without_a_word_for_a_split_need_not_ask_the_library():
    """Its words are those that are looked for first."""
    from datasets.data_files import SPLIT_KEYWORDS

    assert all(re.search(_WORDS, word) for words in SPLIT_KEYWORDS.values() for word in words)
    assert resolve_splits(["b/1.txt", "a.txt"], None, None, "o/n") == (["a.txt", "b/1.txt"], [], [], None)
