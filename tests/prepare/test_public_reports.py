"""Inputs of the kinds that users of such tools reported: each is read as they expect, or refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.prepare.documents import read_unit
from gpt2.prepare.download import Fetcher, parse_hub
from gpt2.prepare.sources import local_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def read(
    tmp_path: Path, *patterns: str, out: Path | None = None, column: str = "text", split_on: str = ""
) -> list[str]:
    """The documents of a source, in order, fetched as a tokenization fetches them."""
    source = local_source(patterns, out, column).split(split_on)
    found = []
    with Fetcher(source, tmp_path / "scratch", keep=False) as fetcher:
        for number, file in enumerate(source.files):
            path, contents = fetcher.get(number)
            found += [d.text for unit in range(contents.units) for d in read_unit(path, file.kind, unit, column)]
            fetcher.release(number)
    assert not (tmp_path / "scratch").exists()
    return found


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.JSONL", LINES, ["a", "b"]),
        ("x.ndjson", LINES, ["a", "b"]),
        ("x.jsonl.bz2", bz2.compress(LINES), ["a", "b"]),
        ("x.jsonl.xz", lzma.compress(LINES), ["a", "b"]),
        ("X.JSONL.GZ", gzip.compress(LINES), ["a", "b"]),
        ("x.json", b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        ("x.json.gz", gzip.compress(b' [{"text": "a"}]'), ["a"]),
        ("part[12].jsonl", LINES, ["a", "b"]),
        ("x.txt", b"\xef\xbb\xbfmark", ["mark"]),
        ("x.txt", "Ünï\r\n".encode("utf-16"), ["Ünï\r\n"]),
        ("x.txt", b"\xfe\xff" + "Ünï".encode("utf-16-be"), ["Ünï"]),
        ("x.jsonl", LINES.decode().encode("utf-16"), ["a", "b"]),
        ("x.jsonl", b'{"text": "c\\ud800"}', ["c\ufffd"]),
        ("x.text", b"plain", ["plain"]),
        ("x.json", b'{\n "title": "t",\n "text": "one object over lines"\n}\n', ["one object over lines"]),
    ],
)
def test_a_file_is_read(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path, str(tmp_path / name)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", gzip.compress(b"text"), r"x\.txt is not text in UTF-8"),
        ("x.txt", bytes(range(256)) * 9, r"x\.txt is not text in UTF-8"),
        ("x.jsonl", "Ünï".encode("utf-16-le") * 9, r"x\.jsonl is not text in UTF-8"),
        ("x.json", b'[{"text": "a"}', r"begins as a JSON array or object and is none"),
        ("x.txt.xz", b"no such thing", r"x\.txt\.xz is damaged"),
        ("x.jsonl", b'{"content": "a"}\n', r"JSON without 'text', only: content; --text-column chooses another"),
        ("x.json", b"[1, 2]", r"JSON without 'text', only: int"),
        ("x.json", b'{\n "name": "a data set' + b" " * 70_000 + b'"}', r"JSON without 'text', only: an object"),
    ],
)
def test_a_file_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary(), pa.large_binary(), pa.null()], ids=str)
def test_a_column_is_read(tmp_path, kind):
    texts = ["a", "é", None] if kind != pa.null() else [None] * 3
    values = [t.encode() if t is not None and "binary" in str(kind) else t for t in texts]
    pq.write_table(pa.table({"text": pa.array(values, kind)}), tmp_path / "x.parquet")
    assert read(tmp_path, str(tmp_path)) == [t or "" for t in texts]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.json"])
def test_texts_of_another_column(tmp_path, name):
    records = [{"text": "not this", "content": text} for text in ("a", "é")]
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / name)
    else:
        lines = [json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines) if name == "x.jsonl" else f"[{','.join(lines)}]")
    assert read(tmp_path, str(tmp_path / name), column="content") == ["a", "é"]
    with pytest.raises(UserError, match=r"'body', only.* text, content; --text-column chooses") as error:
        read(tmp_path, str(tmp_path / name), column="body")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a\n<|endoftext|>\nb\nc\n<|endoftext|>\n", ["a", "b\nc"]),
        (b"<|endoftext|>a<|endoftext|><|endoftext|>\r\nb", ["", "a", "", "b"]),
        ("é\n<|endoftext|>\nü".encode("utf-16"), ["é", "ü"]),
        (b"no divider", ["no divider"]),
        (b"a" * ((1 << 20) - 5) + b"<|endoftext|>b" + b"c" * (3 << 20), ["a" * ((1 << 20) - 5), "b" + "c" * (3 << 20)]),
    ],
    ids=["lines", "empty", "utf16", "none", "over_blocks"],
)
def test_plain_text_is_divided(tmp_path, content, texts):
    (tmp_path / "x.txt").write_bytes(content)
    (tmp_path / "y.jsonl").write_bytes(LINES)
    assert read(tmp_path, str(tmp_path / "x.txt"), split_on="<|endoftext|>") == texts
    assert read(tmp_path, str(tmp_path), split_on="<|endoftext|>") == [*texts, "a", "b"]


def test_two_columns_of_texts_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="2 columns are named 'text'"):
        local_source([str(tmp_path)])


def test_what_is_found_and_not_read_is_named(tmp_path, monkeypatch):
    data, elsewhere = tmp_path / "my [data]", tmp_path / "elsewhere"
    for folder in (data / ".ipynb_checkpoints", data / "out", data / "sub", elsewhere):
        folder.mkdir(parents=True)
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a.jsonl", "out/b.jsonl", "notes.md", "dataset_infos.json"):
        (data / name).write_bytes(LINES)
    (data / "package.json").write_text('{\n  "name": "x"\n}\n')
    (elsewhere / "c.jsonl").write_bytes(b'{"text": "c"}')
    (data / "link").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    os.link(data / "a.jsonl", tmp_path / "hard.jsonl")
    (data / "same.jsonl").symlink_to(data / "a.jsonl")
    source = local_source([str(data), str(data / "sub" / ".." / "a.jsonl")], data / "out")
    assert [file.name for file in source.files] == ["a.jsonl", "link/c.jsonl"]
    reasons = {Path(name).name: reason for name, reason in source.unread}
    assert reasons["._a.jsonl"] == reasons[".ipynb_checkpoints"] == "hidden"
    assert reasons["out"] == "the directory of the shards"
    assert reasons["dataset_infos.json"] == "metadata, not text"
    assert reasons["package.json"].startswith("JSON without 'text', only: name")
    assert reasons["notes.md"].startswith("not .parquet")
    assert reasons["loop"] == "a link to a folder read already"
    assert reasons["same.jsonl"].endswith("read already")
    assert read(tmp_path, str(data), out=data / "out") == ["a", "b", "c"]
    (data / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for pattern in (data, data / "gone.jsonl"):
        with pytest.raises(UserError, match=r"link to .*nowhere, which does not exist"):
            local_source([str(pattern)])


def test_parquet_beside_the_same_text_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="parquet beside text files, which may hold the same text again"):
        local_source([str(tmp_path)])
    assert read(tmp_path, str(tmp_path / "*.parquet")) == ["a", "b"]


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://datasets/o/n@refs/convert/parquet/en/*", ("o/n", "refs/convert/parquet", None, "en/*")),
        ("o/n@refs/pr/3", ("o/n", "refs/pr/3", None, "*")),
        ("hf://datasets/o/n@feature%2Fx/a.jsonl", ("o/n", "feature/x", None, "a.jsonl")),
        ("o/n:20220301.en", ("o/n", None, "20220301.en", "*")),
        ("o/n@v1:en", ("o/n", "v1", "en", "*")),
    ],
)
def test_an_address_on_the_hub(address, parts):
    found = parse_hub(address)
    assert found == parts
    assert parse_hub(str(found)) == found


@pytest.mark.parametrize(
    ("names", "named", "train", "validation"),
    [
        (("train/a.txt", "test/a.txt", "validation/a.txt"), ".", "train/a.txt", "validation/a.txt"),
        (("train/a.txt", "test/a.txt", "validation/a.txt"), "*", "train/a.txt", "validation/a.txt"),
        (("train-0.txt", "test-0.txt", "dev-0.txt"), ".", "train-0.txt", "dev-0.txt"),
        (("train-0.txt", "test-0.txt", "dev-0.txt"), "*.txt", "train-0.txt", "dev-0.txt"),
        (("val.txt", "mine.txt"), ".", "mine.txt", "val.txt"),
        (("train/a.txt", "test/b.txt"), "test", "b.txt", None),
    ],
)
def test_splits_on_disk_are_told_apart(tmp_path, names, named, train, validation):
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    source = local_source([str(tmp_path / "data" / named)])
    assert source.validation == (validation is not None)
    found = [file.path.relative_to(tmp_path / "data").as_posix() for file in source.files]
    assert found == [name if named != "test" else f"test/{name}" for name in (validation, train) if name]


def test_json_nested_too_deeply_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"text": "a"})[:-1] + ', "b": ' + "[" * 200_000 + "]" * 200_000 + "}\n"
    )
    with pytest.raises(UserError, match="nested"):
        read(tmp_path, str(tmp_path / "x.jsonl"))
