"""What a job asks, how much it validates on, and what an earlier run of it may leave to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.prepare.build import prepare
from gpt2.prepare.job import Job, manifest_path
from gpt2.prepare.sources import local_source
from gpt2.prepare.workers import Part
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.tokens.verify import check_manifest

pytestmark = pytest.mark.usefixtures("same_process")

POEM = "".join(f"line {n} of the poem, {'la ' * (n % 17)}\n" for n in range(400))


def make(out: Path, *source: Path, **changes: object) -> list[str]:
    """Make a data set as the command does; what it says."""
    options = {"name": "x", "tokenizer": "gpt2", "suffix": ".npy", "shard_tokens": 900, "val_tokens": None}
    options |= {"max_tokens": None, "workers": 1, "part": None, "source": local_source([str(s) for s in source], out)}
    said: list[str] = []
    prepare(Job(directory=out, **{**options, **changes}), said.append)
    return said


def text_of(directory: Path) -> tuple[str, str]:
    """What is validated on, and what is trained on, without the end-of-text tokens."""
    dataset = open_dataset(directory)
    parts = [s.read(0, len(s)) for s in (dataset.val, dataset.train)]
    val, train = (dataset.tokenizer().decode(part[part != 50256].tolist()) for part in parts)
    return val, train


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.npy")}


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "words", "crlf", "chinese"])
def test_few_documents_are_split_by_tokens(tmp_path, kind, tokenizer):
    """95/5 at a line's end, or a word's where there are none; each half is a document of its own."""
    text = {"words": POEM.replace("\n", " "), "crlf": POEM.replace("\n", "\r\n"), "chinese": "詩歌" * 4000}.get(
        kind, POEM
    )
    path = tmp_path / f"mine.{'jsonl' if kind == 'jsonl' else 'txt'}"
    path.write_bytes(json.dumps({"text": text}).encode() if kind == "jsonl" else text.encode())
    out = tmp_path / "out"
    make(out, path, tokenizer=tokenizer)
    val, train = text_of(out)
    assert val + train == text
    assert val.endswith("\n") or kind in ("words", "chinese")
    dataset = open_dataset(out)
    share = len(dataset.val) / (len(dataset.val) + len(dataset.train))
    assert 0.05 <= share <= (0.055 if val.endswith("\n") else 0.101)
    manifest = dataset.manifest
    assert [check.problem for check in check_manifest(out, manifest)] == [""] * len(manifest.shards)
    assert manifest.statistics()["documents"] == 2
    assert manifest.statistics()["bytes"] == len(text.encode())
    if tokenizer == "gpt2":
        assert dataset.val.read(0, 1) == dataset.train.read(0, 1) == 50256
        assert dataset.val.read(1, 21).tolist() == gpt2_tokenizer().encode(text)[:20]
    before = files(out)
    for name in before:  # one by one, and all after the validation
        (out / name).unlink()
        make(out, path, tokenizer=tokenizer)
        assert files(out) == before


def test_a_few_documents_are_split_where_one_ends(tmp_path):
    texts = [f"{n} " + "word " * 30 for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make(tmp_path / "out", tmp_path / "a.jsonl")
    assert text_of(tmp_path / "out")[0] == texts[0]
    assert open_dataset(tmp_path / "out").manifest.options["validation"] == {"lines": 20}


def test_validation_of_one_text_has_as_many_tokens_as_are_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    make(tmp_path / "out", tmp_path / "a.txt", val_tokens=700, max_tokens=2000)
    dataset = open_dataset(tmp_path / "out")
    assert 700 <= len(dataset.val) < 740
    assert len(dataset.val) + len(dataset.train) == 2000


def rewrite(path: Path, data: bytes) -> None:
    """With the same size, and another time whatever the clock's resolution."""
    assert len(data) == path.stat().st_size
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("finished", [True, False])
def test_a_source_that_changed_in_its_middle_is_noticed(tmp_path, finished):
    """Same size, same ends: shards made of it are compared, are kept as they are, and the change is told."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        text = "".join(f"{name} {n} {'word ' * (n % 40)}\n" for n in range(4000))
        (source / f"{name}.txt").write_text(text)
    good = (source / "b.txt").read_bytes()
    if finished:
        make(out, source, shard_tokens=20_000)
    else:
        path = source / "c.txt"
        whole = path.read_bytes()
        path.write_bytes(b"")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpt2.prepare.documents._read_text", _fails_on_empty)
            path.write_bytes(whole[:-9] + b"\xffbroken\xff\n")
            with pytest.raises(UserError, match="finished shards are kept"):
                make(out, source, shard_tokens=20_000)
        path.write_bytes(whole)
        assert not load_manifest(out / MANIFEST_NAME).complete
    before = files(out)
    bad = good[: len(good) // 2] + b"Z" + good[len(good) // 2 + 1 :]
    rewrite(source / "b.txt", bad)
    with pytest.raises(UserError, match=r"made again is not what it was: the source has changed"):
        make(out, source, shard_tokens=20_000)
    assert files(out) == before
    with pytest.raises(UserError, match=r"made again is not what it was"):  # and again, until it is what it was
        make(out, source, shard_tokens=20_000)
    rewrite(source / "b.txt", good)
    said = make(out, source, shard_tokens=20_000)
    assert any(line.startswith("written since: ") and "b.txt" in line for line in said)
    assert before.items() <= files(out).items()
    assert any("complete and verified" in line for line in make(out, source, shard_tokens=20_000))


def _fails_on_empty(path: Path, unit: int):
    from gpt2.prepare.documents import Document

    data = path.read_bytes()
    if b"\xffbroken\xff" in data:
        raise UserError(f"{path} is damaged")
    yield Document(data.decode())


def test_files_of_an_earlier_versions_manifest_have_no_time(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    make(tmp_path / "out", tmp_path / "a.txt")
    path = tmp_path / "out" / MANIFEST_NAME
    content = json.loads(path.read_text())
    assert content["source"]["files"][0].pop("mtime_ns") == (tmp_path / "a.txt").stat().st_mtime_ns
    path.write_text(json.dumps(content))
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert any("complete and verified" in line for line in make(tmp_path / "out", tmp_path / "a.txt"))


def test_new_files_extend_a_finished_data_set(tmp_path):
    """New shards behind the old ones, which keep their bytes; wherever the new names would have stood."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    texts = {name: f"{name} " + "word " * 1500 for name in ("b", "d", "a", "c")}
    for name in "bd":
        (source / f"{name}.txt").write_text(texts[name])
    make(out, source)
    before, val = files(out), text_of(out)[0]
    for name in "ac":
        (source / f"{name}.txt").write_text(texts[name])
    said = make(out, source)
    assert any("2 new files follow those" in line and "a.txt, c.txt" in line for line in said)
    assert before.items() < files(out).items()
    assert "".join(text_of(out)) == "".join(texts.values())
    assert text_of(out)[0] == val
    manifest = load_manifest(out / MANIFEST_NAME)
    assert [check.problem for check in check_manifest(out, manifest)] == [""] * len(manifest.shards)
    whole = files(out)
    for name in list(whole):
        (out / name).unlink()
        make(out, source)
        assert files(out) == whole
    assert any("complete and verified" in line for line in make(out, source))
    (source / "e.txt").write_text("")  # nothing in it
    make(out, source)
    assert files(out) == whole
    (source / "b.txt").unlink()
    with pytest.raises(UserError, match=r"source file b\.txt is gone"):
        make(out, source)


def test_new_files_that_cannot_extend_are_told(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text(POEM)
    make(tmp_path / "limited", source, max_tokens=2000)
    make(tmp_path / "char", source, tokenizer="char")
    (source / "part.txt").write_text(POEM)
    make(tmp_path / "part", source, part=Part(1, 1))
    (source / "z.txt").write_text("é")
    assert any(
        "2 new files are not read: --max-tokens" in s for s in make(tmp_path / "limited", source, max_tokens=2000)
    )
    with pytest.raises(UserError, match=r"'é' not among the \d+ characters"):
        make(tmp_path / "char", source, tokenizer="char")
    with pytest.raises(UserError, match=r"source file z\.txt is new"):
        make(tmp_path / "part", source, part=Part(1, 1))


def test_a_changed_job_or_source_is_refused_with_the_difference(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.txt").write_text(POEM)
    make(out, source)
    before = files(out)
    for changes, message in (
        ({"shard_tokens": 700}, "shard_tokens was 900, now 700"),
        ({"max_tokens": 700}, "max_tokens was None, now 700"),
        ({"suffix": ".bin"}, r"suffix was \.npy, now \.bin"),
        ({"tokenizer": "char"}, "tokenizer was gpt2, now char"),
        ({"name": "y"}, "name was x, now y"),
    ):
        with pytest.raises(UserError, match=message):
            make(out, source, **changes)
    (source / "a.txt").rename(source / "c.txt")
    with pytest.raises(UserError, match=r"source file a\.txt is gone; source file c\.txt is new"):
        make(out, source)
    (source / "c.txt").rename(source / "a.txt")
    (source / "a.txt").write_text("other")
    with pytest.raises(UserError, match=r"source file a\.txt has changed"):
        make(out, source)
    assert files(out) == before


def test_no_text_and_too_little_are_told_in_one_line(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("")
    for name, changes in (("gpt2", {}), ("char", {"tokenizer": "char"}), ("val", {"val_tokens": 10})):
        with pytest.raises(UserError, match="holds no text"):
            make(tmp_path / name, source, **changes)
    (source / "a.txt").write_text("only one document")
    with pytest.raises(UserError, match="all 4 tokens went into validation"):
        make(tmp_path / "much", source, val_tokens=10)
    assert manifest_path(tmp_path, Part(2, 3)).name == "manifest.part-0002-of-0003.json"
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    np.save(strangers / "edufineweb_train_000001.npy", np.ones(3, np.uint16))
    with pytest.raises(UserError, match=r"edufineweb_train_000001\.npy, which is of another origin"):
        make(strangers, source)
