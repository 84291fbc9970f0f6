"""Reading parquet, JSON lines and text in units; the units' tokens are the file's."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import sources
from gpt2.errors import UserError
from gpt2.sources import count_documents, count_units, decompress, kind_of, local_source, read_unit
from gpt2.tokenizer import gpt2_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def all_units(path, kind):
    return [document for unit in range(count_units(path, kind)) for document in read_unit(path, kind, unit)]


def texts(path, kind):
    return [document.text for document in all_units(path, kind)]


def write_jsonl(path, records):
    path.write_bytes(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
    return path


def test_parquet_by_row_group_with_nulls(tmp_path):
    written = ["a", None, "", "d\n<|endoftext|>", "é😀", "f", "g"]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": range(7), "text": written}), path, row_group_size=3)
    assert count_units(path, "parquet") == 3
    assert [[d.text for d in read_unit(path, "parquet", u)] for u in range(3)] == [
        ["a", "", ""],
        ["d\n<|endoftext|>", "é😀", "f"],
        ["g"],
    ]
    assert count_documents(path, "parquet") == 7


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
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


def test_wrong_parquet_is_told_in_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    for data in (b"", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read as parquet") as error:
            local_source([str(path)])
        assert "\n" not in str(error.value)
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match="no column 'text', only body, id"):
        local_source([str(path)])
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="of type int64, not string"):
        local_source([str(path)])


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
        monkeypatch.setattr(sources, "SLICE_BYTES", size)
        assert texts(path, "jsonl") == whole
    assert count_documents(path, "jsonl") == 200


def test_json_lines_with_marks_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b\xff"}\n{"text": "c\\ud800"}')
    found = all_units(path, "jsonl")
    assert [d.text for d in found] == ["a", "b\ufffd", "c\ud800"]
    assert [d.replaced for d in found] == [False, True, False]


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


@settings(max_examples=200, deadline=None)
@given(st.text(" \n\t\r\u00a0\u3000ab'1é中😀.", max_size=80), st.integers(1, 9))
def test_slices_of_plain_text_have_the_whole_texts_tokens(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SLICE_BYTES", size)
        found = all_units(path, "text")
    assert "".join(d.text for d in found) == text
    assert [d.begins for d in found] == [True] + [False] * (len(found) - 1)
    encode = gpt2_tokenizer().encode
    assert [t for d in found for t in encode(d.text)] == encode(text)


def test_plain_text_is_cut_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 10)
    path = tmp_path / "x.txt"
    path.write_text("one two three four five six seven eight")
    assert texts(path, "text") == ["one two three", " four five", " six seven", " eight"]
    path.write_bytes(b"\xef\xbb\xbfwith a mark, and \xff\xfe bytes")
    assert "".join(texts(path, "text")) == "with a mark, and \ufffd\ufffd bytes"
    path.write_bytes(b"")
    assert texts(path, "text") == [""]


def test_files_in_order_of_name_wherever_they_are(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.jsonl", "b/10.jsonl", "a.jsonl", "c.txt", "notes.md"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = local_source([str(tmp_path)])
    assert [f.name for f in found.files] == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "c.txt"]
    by_patterns = local_source([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "b"), str(tmp_path)])
    assert by_patterns.to_dict() == found.to_dict()
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert local_source([str(moved)]).to_dict() == found.to_dict()


def test_wrong_sources(tmp_path):
    with pytest.raises(UserError, match="no such file, directory or pattern"):
        local_source([str(tmp_path / "*.parquet")])
    with pytest.raises(UserError, match=r"no \.parquet, \.jsonl or \.txt"):
        local_source([str(tmp_path)])
    (tmp_path / "x.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"x.csv: not a .parquet, .jsonl or .txt"):
        local_source([str(tmp_path / "x.csv")])


def test_kinds():
    assert kind_of("a/000_00000.parquet") == ("parquet", "")
    assert kind_of("c4-train.00000-of-01024.json.gz") == ("jsonl", ".gz")
    assert kind_of("x.txt.zst") == ("text", ".zst")
    assert kind_of("x.parquet.gz") is None
    assert kind_of("x.gz") is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(20000))
    path, out = tmp_path / f"x.jsonl{suffix}", tmp_path / "plain"
    if suffix == ".gz":
        data = gzip.compress(content[:1000]) + gzip.compress(content[1000:])  # members, as bgzip writes
    else:
        data = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(data)
    decompress(path, out)
    assert out.read_bytes() == content
    out.unlink()
    for damaged in (data[: len(data) // 2], data[:-3], data + b"rest", b"nothing of the kind"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged") as error:
            decompress(path, out)
        assert "\n" not in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
