"""Which files a source means, in which order, and what they are."""

from __future__ import annotations

import gzip

import pytest

from gpt2.errors import UserError
from gpt2.prepare.sources import decompress, kind_of, local_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


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


def test_what_expands_without_end_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(80):
            file.write(b"a" * (1 << 20))
    with pytest.raises(UserError, match="expands to more than 200 times its size"):
        decompress(path, tmp_path / "out.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt.gz"]
