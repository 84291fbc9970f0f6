"""Every fault of a shard is found, and parts are joined only when all are there and alike."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from small_sources import EOT, documents, job, write_parquet

from gpt2.errors import UserError
from gpt2.prepare.build import prepare
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest, save_manifest
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.tokens.verify import check_foreign, check_opens, check_shard, manifests_of, merge_parts, part_manifest_name


def test_check_finds_every_kind_of_fault(tmp_path):
    source = write_parquet(tmp_path / "source", documents(30))
    out = tmp_path / "out"
    manifest = prepare(job(out, source), lambda line: None)
    entry = manifest.shards[1]
    path = out / entry.file
    good = path.read_bytes()

    def problem(data: bytes, **changes) -> str:
        path.write_bytes(data)
        found = check_shard(path, dataclasses.replace(entry, **changes), 50257, EOT, begins_document=True)
        return found.problem

    assert problem(good) == ""
    for position in (128, len(good) // 2, len(good) - 1):
        flipped = bytearray(good)
        flipped[position] ^= 1
        assert "checksum differs" in problem(bytes(flipped))
    assert "truncated" in problem(good[:-1])
    assert "the manifest says 7" in problem(good, tokens=7)
    assert "end-of-text tokens for 999 documents" in problem(good, documents=999)
    tokens = np.load(path).copy()
    tokens[5] = 50257
    np.save(path, tokens)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert "holds id 50257, the vocabulary has 50257" in problem(path.read_bytes(), sha256=sha256)
    path.unlink()
    assert "cannot read" in check_shard(path, entry, 50257, EOT).problem
    second = manifest.shards[2]
    assert "straddles" in check_shard(out / second.file, second, 50257, EOT, begins_document=True).problem


def test_shards_of_others_are_checked_by_format_and_ids(tmp_path):
    good, bad = tmp_path / "x_val_0.npy", tmp_path / "x_train_1.npy"
    np.save(good, np.array([EOT, 1, EOT], np.uint16))
    np.save(bad, np.array([EOT, 50_300], np.uint16))
    checks = list(check_foreign([good, bad], 50_257, EOT))
    assert [(c.tokens, c.documents, c.largest) for c in checks] == [(3, 2, EOT), (2, 1, 50_300)]
    assert [c.problem for c in checks] == ["", "holds id 50300, the vocabulary has 50257"]
    assert [c.problem for c in check_foreign([bad], None, None)] == [""]


def test_what_training_would_refuse_is_told(tmp_path):
    tokens = list(range(100))
    write_dataset(tmp_path / "good", tokens, tokens, gpt2_tokenizer())
    write_dataset(tmp_path / "short", tokens, tokens[:64], gpt2_tokenizer())
    assert check_opens(tmp_path / "good") == ""
    assert "has 64 tokens, too few for one sequence" in check_opens(tmp_path / "short")
    assert "does not exist" in check_opens(tmp_path / "none")


def parts_of(directory, **changes):
    """Three parts of a data set, by hand: validation in the first."""
    manifest = write_dataset(directory, range(90), range(30), gpt2_tokenizer(), shard_tokens=45).manifest
    (directory / MANIFEST_NAME).unlink()
    for number, entry in enumerate(manifest.shards, 1):
        own = {"part": (number, 3), "shards": (entry,), "seconds": float(number), **changes.get(str(number), {})}
        save_manifest(directory / part_manifest_name(number, 3), dataclasses.replace(manifest, **own))
    return manifest


def test_parts_are_joined(tmp_path):
    manifest = parts_of(tmp_path)
    assert [path.name for path in manifests_of(tmp_path)] == [part_manifest_name(n, 3) for n in (1, 2, 3)]
    merged = merge_parts(tmp_path)
    assert merged == dataclasses.replace(manifest, seconds=6.0)
    assert load_manifest(tmp_path / MANIFEST_NAME) == merged
    assert manifests_of(tmp_path) == [tmp_path / MANIFEST_NAME]


def test_a_copys_time_on_another_machine_is_no_difference_of_parts(tmp_path):
    sources = [{"description": "x", "files": [{"name": "a", "size": 1, "id": "b", "mtime_ns": n}]} for n in (1, 2)]
    parts_of(tmp_path, **{"1": {"source": sources[0]}, "2": {"source": sources[1]}, "3": {"source": sources[0]}})
    assert merge_parts(tmp_path).source == sources[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"2": {"complete": False}}, "of 3 parts 0 are missing, 1 unfinished; run --part 2"),
        ({"3": {"source": {"description": "another"}}}, "differ in their source"),
        ({"3": {"name": "y"}}, "differ in their name"),
        ({"3": {"part": (3, 4)}}, "is not one of 3 parts"),
        ({"1": {"shards": ()}}, "would have no val shard"),
    ],
)
def test_parts_that_cannot_be_joined_are_told(tmp_path, changes, message):
    parts_of(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        merge_parts(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / MANIFEST_NAME).exists()
