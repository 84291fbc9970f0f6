"""Reading parquet, JSON lines and text in units; the units' tokens are the file's."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.prepare import documents as units
from gpt2.prepare.documents import count_documents, count_units, read_unit
from gpt2.tokens.tokenizer import gpt2_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def all_units(path, kind):
    return [document for unit in range(count_units(path, kind).units) for document in read_unit(path, kind, unit)]


def texts(path, kind):
    return [document.text for document in all_units(path, kind)]


def write_jsonl(path, records):
    path.write_bytes(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
    return path


def test_parquet_by_row_group_with_nulls(tmp_path):
    written = ["a", None, "", "d\n<|endoftext|>", "é😀", "f", "g"]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": range(7), "text": written}), path, row_group_size=3)
    assert count_units(path, "parquet") == (3, (3, 3, 1))
    assert [[d.text for d in read_unit(path, "parquet", u)] for u in range(3)] == [
        ["a", "", ""],
        ["d\n<|endoftext|>", "é😀", "f"],
        ["g"],
    ]
    assert count_documents(path, "parquet") == 7


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_parquet_string_types(tmp_path, kind):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), path)
    assert texts(path, "parquet") == ["a", "b", "a"]


def test_parquet_with_invalid_utf8(tmp_path):
    data = pa.array([b"good", b"caf\xe9", None], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": column}), path)
    found = all_units(path, "parquet")
    assert [d.text for d in found] == ["good", "caf\ufffd", ""]
    assert [d.replaced for d in found] == [False, True, False]


def test_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"{i} " * 500 for i in range(30)]}), path, row_group_size=10, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = group.dictionary_page_offset
    data[begin : begin + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(data)
    assert len(list(read_unit(path, "parquet", 0))) == 10
    with pytest.raises(UserError, match=r"x\.parquet: row group 1 is damaged") as error:
        list(read_unit(path, "parquet", 1))
    assert "\n" not in str(error.value)


def test_json_lines_in_slices(tmp_path, monkeypatch):
    records = [{"text": f"document {i} " + "é" * (i % 40), "n": i} for i in range(200)]
    records[3] = {"text": None}
    path = write_jsonl(tmp_path / "x.jsonl", records)
    whole = texts(path, "jsonl")
    assert whole == [r["text"] or "" for r in records]
    for size in (1, 7, 64, 1000, 10**6):
        monkeypatch.setattr(units, "SLICE_BYTES", size)
        assert texts(path, "jsonl") == whole
    assert count_documents(path, "jsonl") == 200


def test_json_lines_with_marks_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b\xff"}\n{"text": "c\\ud800"}')
    found = all_units(path, "jsonl")
    assert [d.text for d in found] == ["a", "b\ufffd", "c\ufffd"]
    assert [d.replaced for d in found] == [False, True, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line at byte 14 is not JSON"),
        (b'{"body": "a", "id": 3}', "has no 'text', only: body, id"),
        (b'["text"]', "has no 'text', only: list"),
        (b'{"text": 3}', "is of type int, not a string"),
    ],
)
def test_wrong_json_lines_are_told_with_their_place(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        all_units(path, "jsonl")


@settings(max_examples=200)
@given(st.text(" \n\t\r\u00a0\u3000ab'1é中😀.", max_size=80), st.integers(1, 9))
def test_slices_of_plain_text_have_the_whole_texts_tokens(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "SLICE_BYTES", size)
        found = all_units(path, "text")
    assert "".join(d.text for d in found) == text
    assert [d.begins for d in found] == [True] + [False] * (len(found) - 1)
    encode = gpt2_tokenizer().encode
    assert [t for d in found for t in encode(d.text)] == encode(text)


def test_plain_text_is_cut_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "SLICE_BYTES", 10)
    path = tmp_path / "x.txt"
    path.write_text("one two three four five six seven eight")
    assert texts(path, "text") == ["one two three", " four five", " six seven", " eight"]
    path.write_bytes(b"\xef\xbb\xbfwith a mark, and \xff\xfe bytes")
    assert "".join(texts(path, "text")) == "with a mark, and \ufffd\ufffd bytes"
    path.write_bytes(b"")
    assert texts(path, "text") == [""]


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_what_is_longer_than_a_slice_is_read_a_few_times_at_most(tmp_path, monkeypatch, kind):
    """One line, or one text without a place to cut, of 200 slices: the bytes read are no multiple of the slices."""
    monkeypatch.setattr(units, "SLICE_BYTES", 1 << 16)
    path = tmp_path / "x"
    body = "中" * (200 << 16) if kind == "text" else "x" * (200 << 16)
    path.write_text(body if kind == "text" else json.dumps({"text": body}) + "\n")
    size = path.stat().st_size
    took = [0]

    class Counted(io.FileIO):
        def read(self, count=-1):
            data = super().read(count)
            took[0] += len(data)
            return data

        def readline(self, count=-1):
            data = b"".join(iter(lambda: super(Counted, self).read(1 << 16), b"")) if count < 0 else self.read(count)
            took[0] += len(data) if count < 0 else 0
            return data[: data.find(b"\n") + 1 or len(data)]

    monkeypatch.setattr(units, "open", lambda path, mode: Counted(path), raising=False)
    assert [text for text in texts(path, kind) if text] == [body]
    assert took[0] < 5 * size


def test_a_line_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MAX_LINE_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + json.dumps({"text": "x" * 200}).encode() + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl: the line at byte 14 has more than 100 bytes"):
        all_units(path, "jsonl")
