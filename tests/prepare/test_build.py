"""A source to a finished data set with real worker processes, against tiktoken one document at a time."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from repository import SHARED_DATA
from small_sources import EOT, contents, documents, in_order, job, stream, write_parquet

from gpt2.errors import UserError
from gpt2.prepare.build import prepare
from gpt2.prepare.documents import count_units
from gpt2.prepare.workers import Part
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest
from gpt2.tokens.shard_file import ShardWriter
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.tokens.verify import check_manifest, merge_parts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SAMPLE = SHARED_DATA / "fineweb_schema_sample"


def test_parquet_to_shards_is_what_one_process_writes(tmp_path):
    texts = documents(60)
    source = write_parquet(tmp_path / "source", texts)
    said: list[str] = []
    manifest = prepare(job(tmp_path / "one", source), said.append)
    prepare(job(tmp_path / "three", source, workers=3), said.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    ordered = in_order(texts)
    val = round(60 * 0.05)  # a small corpus: 5 % of its documents
    dataset = open_dataset(tmp_path / "one")
    assert dataset.val.read(0, len(dataset.val)).tolist() == stream(ordered[:val])
    assert dataset.train.read(0, len(dataset.train)).tolist() == stream(ordered[val:])
    assert [e.tokens for e in manifest.shards[1:-1]] == [500] * (len(manifest.shards) - 2)
    statistics = manifest.statistics()
    assert statistics["documents"] == len(ordered) == 58
    assert statistics["skipped_documents"] == 2
    assert statistics["bytes"] == sum(len(text.encode()) for text in ordered)
    assert statistics["tokens"] == len(stream(ordered))
    assert not [check for check in check_manifest(tmp_path / "one", manifest) if check.problem]
    # Again: nothing to do. Then with damage: only the damaged is made again.
    before = contents(tmp_path / "one")
    victim, untouched = tmp_path / "one" / manifest.shards[2].file, tmp_path / "one" / manifest.shards[3].file
    age = untouched.stat().st_mtime_ns
    assert prepare(job(tmp_path / "one", source), said.append) == manifest
    assert "complete and verified" in said[-1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    (tmp_path / "one" / manifest.shards[-1].file).unlink()
    again = prepare(job(tmp_path / "one", source), said.append)
    assert any(f"{victim.name} is missing or damaged" in line for line in said)
    assert contents(tmp_path / "one") == before
    assert untouched.stat().st_mtime_ns == age
    assert [dataclasses.replace(e) for e in again.shards] == list(manifest.shards)


def test_other_formats_and_bin(tmp_path):
    """JSON lines, compressed and not, and plain text, in one source, into llm.c's format."""
    source = tmp_path / "source"
    source.mkdir()
    texts = in_order(documents(30))
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (source / "a.jsonl").write_bytes(b"".join(lines[:10]))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[10:20])))
    (source / "c.jsonl.zst").write_bytes(pa.compress(b"".join(lines[20:]), "zstd", asbytes=True))
    (source / "d.txt").write_text("one whole file,\n\nis one document")
    (source / "e.txt").write_bytes(b"latin-1: caf\xe9")
    out = tmp_path / "out"
    manifest = prepare(job(out, source, suffix=".bin", val_tokens=40), lambda line: None)
    everything = [*texts, "one whole file,\n\nis one document", "latin-1: caf\ufffd"]
    words, tokens = [], []
    for entry in manifest.shards:
        data = (out / entry.file).read_bytes()
        words.append(np.frombuffer(data[:1024], "<i4"))
        tokens.append(np.frombuffer(data[1024:], "<u2"))
        assert words[-1][:3].tolist() == [20240520, 1, entry.tokens]
        assert len(tokens[-1]) == entry.tokens
    assert np.concatenate(tokens).tolist() == stream(everything)
    assert len(tokens[0]) >= 40 > len(tokens[0]) - len(stream([texts[manifest.shards[0].documents - 1]]))
    assert tokens[1][0] == EOT
    assert manifest.statistics()["replaced_documents"] == 1
    assert not list(out.glob(".fetched*"))


def test_document_longer_than_shards_and_limit(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("first")
    (source / "b.txt").write_text("word " * 3000)
    (source / "c.txt").write_text("last")
    manifest = prepare(job(tmp_path / "out", source), lambda line: None)
    assert manifest.statistics()["documents"] == 4  # one is in both splits
    whole = stream(["first", "word " * 3000, "last"])
    dataset = open_dataset(tmp_path / "out")
    assert dataset.val.read(0, len(dataset.val)).tolist() == whole[:300]  # twice 5 %, for no line ends
    assert dataset.train.read(0, len(dataset.train)).tolist() == [EOT, *whole[300:]]
    limited = prepare(job(tmp_path / "limited", source, max_tokens=1000, val_tokens=1), lambda line: None)
    assert limited.statistics()["tokens"] == 1000
    assert open_dataset(tmp_path / "limited").train.read(0, 998).tolist() == whole[2:1000]


def test_characters_of_a_source(tmp_path):
    texts = documents(20)
    source = write_parquet(tmp_path / "source", texts)
    manifest = prepare(job(tmp_path / "out", source, tokenizer="char", val_tokens=50), lambda line: None)
    dataset = open_dataset(tmp_path / "out")
    ordered = in_order(texts)
    assert manifest.tokenizer["chars"] == "".join(sorted(set("".join(ordered))))
    tokens = [*dataset.val.read(0, len(dataset.val)), *dataset.train.read(0, len(dataset.train))]
    assert dataset.tokenizer().decode(tokens) == "".join(ordered)
    assert manifest.statistics()["documents"] == len(ordered)
    with pytest.raises(UserError, match="--part with --tokenizer char"):
        prepare(job(tmp_path / "part", source, tokenizer="char", part=Part(1, 2)), lambda line: None)


def test_parts_merge_into_the_whole(tmp_path):
    texts = documents(90)
    source = write_parquet(tmp_path / "source", texts)
    out = tmp_path / "out"
    for number in (3, 1, 2):
        prepare(job(out, source, part=Part(number, 3), val_tokens=100), lambda line: None)
        with pytest.raises(UserError, match="merge"):
            open_dataset(out)
        if number == 1:
            with pytest.raises(UserError, match=r"of 3 parts 1 are missing, 0 unfinished; run --part 2"):
                merge_parts(out)
    merged = merge_parts(out)
    dataset = open_dataset(out)
    assert dataset.val.read(0, len(dataset.val)).tolist() + dataset.train.read(
        0, len(dataset.train)
    ).tolist() == stream(in_order(texts))
    assert len({entry.file for entry in merged.shards}) == len(merged.shards)
    assert [p.name for p in dataset.train.paths] == sorted(p.name for p in dataset.train.paths)
    (out / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match="of another origin"):
        prepare(job(out, source), lambda line: None)


def test_more_parts_than_units(tmp_path):
    source = write_parquet(tmp_path / "source", documents(12), files=1, rows=6)
    out = tmp_path / "out"
    for number in range(1, 5):
        prepare(job(out, source, part=Part(number, 4), val_tokens=10), lambda line: None)
    assert [len(load_manifest(p).shards) > 0 for p in sorted(out.glob("manifest.part*"))].count(True) == 2
    assert not list(out.glob("*_val_*"))  # the first row group's middle is in part 2
    with pytest.raises(UserError, match="would have no val shard"):
        merge_parts(out)
    assert prepare(job(tmp_path / "two", source, part=Part(1, 2), val_tokens=10), lambda line: None).complete


def test_damaged_file_stops_and_its_repair_continues(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    texts = [text * 20 for text in in_order(documents(60))]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for number in range(3):
        (source / f"{number}.jsonl").write_bytes(b"".join(lines[number * 19 : (number + 1) * 19]))
    good = (source / "1.jsonl").read_bytes()
    (source / "1.jsonl").write_bytes(good[:-30])
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"1\.jsonl: the line at byte .* is not JSON .* finished shards are kept"
    ) as error:
        prepare(job(out, source, val_tokens=300), lambda line: None)
    assert "\n" not in str(error.value)
    kept = contents(out)
    assert len(kept) > 2
    (source / "1.jsonl").write_bytes(good)
    prepare(job(out, source, val_tokens=300), lambda line: None)
    assert kept.items() <= contents(out).items()
    dataset = open_dataset(out)
    assert len(dataset.val) + len(dataset.train) == len(stream(texts[:57]))


def test_wrong_requests_are_told_in_one_line(tmp_path):
    source = tmp_path / "source"
    source.mkdir()

    def message(out="out", **changes):
        with pytest.raises(UserError) as error:
            prepare(job(tmp_path / out, source, **changes), lambda line: None)
        assert "\n" not in str(error.value)
        return str(error.value)

    (source / "a.txt").write_text("only one document")
    assert "all 4 tokens went into validation" in message("a", val_tokens=10)
    (source / "a.txt").write_text("")
    (source / "b.jsonl").write_text('{"text": null}\n')
    assert "holds no text" in message("b", val_tokens=10)
    (source / "b.jsonl").write_text('{"text": "a b c"}\n' * 9)
    (tmp_path / "file").write_text("")
    assert "cannot write to" in message("file")
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    np.save(strangers / "edufineweb_train_000001.npy", np.ones(3, np.uint16))
    assert "edufineweb_train_000001.npy, which is of another origin" in message("strangers")
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root, and Windows, write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "cannot write to" in message("locked")


def test_two_at_once_are_refused(tmp_path):
    import fcntl

    source = write_parquet(tmp_path / "source", documents(9))
    out = tmp_path / "out"
    out.mkdir()
    with open(out / f".{MANIFEST_NAME}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work"):
            prepare(job(out, source), lambda line: None)
    prepare(job(out, source), lambda line: None)


def test_continuing_looks_at_sizes_and_reads_the_last_shard(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "source", documents(60))
    out, said = tmp_path / "out", []
    finish, written = ShardWriter.finish, []

    def die(writer, *wanted):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(writer.path)
        return finish(writer, *wanted)

    monkeypatch.setattr(ShardWriter, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(job(out, source), said.append)
    monkeypatch.undo()
    path, lines = out / MANIFEST_NAME, out / f"{MANIFEST_NAME}.shards"
    assert len(load_manifest(path).shards) == 5
    assert len(json.loads(path.read_text())["shards"]) == 0
    with open(lines, "ab") as file:
        file.write(b'{"number": 5, "sec')  # torn by the kill
    good = contents(out)
    for victim in (1, 4):  # an altered byte in one of many, and in the last
        data = bytearray(good[written[victim].name])
        data[-1] ^= 1
        written[victim].write_bytes(data)
    written[2].write_bytes(good[written[2].name][:-2])
    prepare(job(out, source), said.append)
    assert [line.split()[0] for line in said if "missing or damaged" in line] == [written[2].name, written[4].name]
    assert not lines.exists()
    problems = [check.path for check in check_manifest(out, load_manifest(path)) if check.problem]
    assert problems == [written[1]]  # `verify` reads all


def small_files(directory: Path, count: int) -> list[str]:
    """Parquet files of 1 to 11 row groups of one document each: they are fetched while others are read."""
    directory.mkdir()
    texts = []
    for number in range(count):
        own = [f"{number} {row} text" for row in range(1 + number % 11)]
        pq.write_table(pa.table({"text": own}), directory / f"{number:05d}.parquet", row_group_size=1)
        texts += own
    return texts


@pytest.mark.parametrize("runs", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_no_document_is_lost_among_many_small_files(tmp_path, runs):
    """Files that fetching threads open while this one reads others: each document is there, in order."""
    texts = small_files(tmp_path / "source", 400 if runs > 1 else 120)
    for number in range(runs):
        out = tmp_path / f"out{number}"
        manifest = prepare(job(out, tmp_path / "source", shard_tokens=10**6, val_tokens=50), lambda line: None)
        assert manifest.statistics()["documents"] == len(texts)
        dataset = open_dataset(out)
        tokens = [*dataset.val.read(0, len(dataset.val)), *dataset.train.read(0, len(dataset.train))]
        assert tokens == stream(texts)


def test_threads_open_files_of_their_own(tmp_path):
    """Eight threads ask for the units of files in turn: each is told those of the file it asked for."""
    small_files(tmp_path / "source", 22)
    paths = sorted((tmp_path / "source").iterdir()) * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: count_units(path, "parquet").units, paths))
    assert found == [1 + int(path.stem) % 11 for path in paths]


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"real documents in FineWeb's schema are not at {SAMPLE}")
def test_real_documents_against_their_own_token_counts(tmp_path):
    """One file of 1,192 real documents: the ids are tiktoken's, the lengths are the `token_count` column's."""
    file = SAMPLE / "000_00000.parquet"
    manifest = prepare(job(tmp_path / "out", file, shard_tokens=400_000, workers=2), lambda line: None)
    table = pq.read_table(file, columns=["text", "token_count"])
    dataset = open_dataset(tmp_path / "out")
    tokens = np.concatenate([dataset.val.read(0, len(dataset.val)), dataset.train.read(0, len(dataset.train))])
    starts = np.flatnonzero(tokens == EOT)
    assert (np.diff([*starts, len(tokens)]) - 1).tolist() == table["token_count"].to_pylist()
    for number in range(0, len(starts), 40):
        text = table["text"][number].as_py()
        begin = starts[number] + 1
        ids = gpt2_tokenizer().encode(text)
        assert tokens[begin : begin + len(ids)].tolist() == ids
    assert manifest.statistics()["documents"] == 1192


@pytest.mark.usefixtures("same_process")
def test_a_validation_split_that_is_named_is_the_validation(tmp_path):
    """Whole, or as much as was asked for, in one piece or in parts, and made again as it was; test is not read."""
    source, texts = tmp_path / "source", {}
    for number, split in enumerate(("train", "validation", "test")):
        texts[split] = in_order(documents(60 + number))
        source.mkdir(exist_ok=True)
        write_parquet(source / split, texts[split])
        texts[split] = in_order(texts[split])
    out = tmp_path / "out"
    manifest = prepare(job(out, source), lambda line: None)
    assert manifest.options["validation"] == {"files": 3}
    dataset = open_dataset(out)
    assert dataset.val.read(0, len(dataset.val)).tolist() == stream(texts["validation"])
    train = dataset.train.read(0, len(dataset.train)).tolist()
    assert train == stream(texts["train"])
    assert manifest.statistics()["documents"] == len(texts["train"]) + len(texts["validation"])
    assert [check.problem for check in check_manifest(out, manifest)] == [""] * len(manifest.shards)
    before = contents(out)
    (out / manifest.shards[0].file).unlink()
    prepare(job(out, source), lambda line: None)
    assert contents(out) == before
    for number in (2, 1, 3):
        prepare(job(tmp_path / "parts", source, part=Part(number, 3)), lambda line: None)
    merge_parts(tmp_path / "parts")
    parts = open_dataset(tmp_path / "parts")
    assert parts.val.read(0, len(parts.val)).tolist() == stream(texts["validation"])
    assert parts.train.read(0, len(parts.train)).tolist() == train
    few = tmp_path / "few"
    manifest = prepare(job(few, source, val_tokens=50), lambda line: None)
    assert 50 <= manifest.shards[0].tokens < 150
    assert open_dataset(few).train.read(0, len(train)).tolist() == train
    (few / manifest.shards[1].file).unlink()
    prepare(job(few, source, val_tokens=50), lambda line: None)
    assert open_dataset(few).train.read(0, len(train)).tolist() == train
    limited = prepare(job(tmp_path / "limited", source, max_tokens=1000), lambda line: None)
    assert limited.statistics()["tokens"] == 1000
    assert 50 <= limited.shards[0].tokens < 150
