"""A manifest comes back as it was written, and is refused by its path, field and value."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from small_sources import histogram

from gpt2.errors import LaterVersion, UserError
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.manifest import (
    MANIFEST_NAME,
    Manifest,
    append_shard,
    foreign_fingerprint,
    length_bin,
    load_manifest,
    percentile,
    save_manifest,
)
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

TOKENS = np.arange(1000)


def test_manifest_survives_writing_and_reading(tmp_path):
    manifest = write_dataset(tmp_path, TOKENS, TOKENS[:10], CharTokenizer("".join(map(chr, range(50257))))).manifest
    path = tmp_path / "copy.json"
    save_manifest(path, manifest)
    assert load_manifest(path) == manifest
    assert isinstance(manifest, Manifest)
    assert list(tmp_path.glob(".copy*")) == []


def test_length_bins_are_exact_then_three_percent():
    for length in (*range(64), 64, 65, 127, 1000, 12345, 10**6, 2**31 + 7):
        edge = length_bin(length)
        assert edge <= length
        assert length - edge <= max(edge / 32, 0 if length < 64 else 1)
    lengths = np.random.default_rng(0).lognormal(6, 1, 20000).astype(int)
    for percent in (1, 10, 50, 90, 99):
        assert percentile(histogram(lengths), percent) == pytest.approx(np.percentile(lengths, percent), rel=0.025)
    assert percentile({}, 50) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("shards"), "shards is missing"),
        (lambda c: c["shards"][0].update(sha256="x"), r"shards\.0\.sha256 is 'x'"),
        (lambda c: c["shards"][0].update(file="../x.npy"), r"shards\.0\.file is '\.\./x\.npy'"),
        (lambda c: c["shards"][1].update(file="tokens_val_000000.npy"), "as is an earlier one's"),
        (lambda c: [entry.update(next=[0, 5 - n, 0]) for n, entry in enumerate(c["shards"])], "shards.1.next is"),
        (lambda c: c["options"].update(validation={"some": 3}), r"options: validation\.some"),
        (lambda c: c["source"].update(validation=-1), r"source: validation is -1"),
        (lambda c: c["tokenizer"].update(eot_token=60_000), "tokenizer: eot_token is 60000"),
        (lambda c: c.update(part=[3, 2]), r"part is \[3, 2\]"),
        (lambda c: c.update(extra=1), "extra is 1; unexpected"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path, change, message):
    write_dataset(tmp_path, TOKENS, TOKENS[:10], gpt2_tokenizer())
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_manifest(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_later_version_is_told_apart(tmp_path):
    path = tmp_path / MANIFEST_NAME
    path.write_text('{"format": "gpt2-shards", "version": 99}')
    with pytest.raises(LaterVersion, match="update it"):
        load_manifest(path)


def test_fingerprints_are_of_the_tokens(tmp_path):
    manifest = write_dataset(tmp_path, TOKENS, TOKENS[:10], gpt2_tokenizer()).manifest
    assert dataclasses.replace(manifest, name="y", source={}, seconds=3.0).fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, dtype="uint32").fingerprint != manifest.fingerprint
    assert foreign_fingerprint([("a", 1)]) != foreign_fingerprint([("a", 2)])


def test_a_finished_shard_is_a_line_and_the_manifest_is_not_written_again(tmp_path):
    finished = write_dataset(tmp_path, TOKENS, TOKENS[:10], gpt2_tokenizer(), shard_tokens=300).manifest
    path, lines = tmp_path / MANIFEST_NAME, tmp_path / f"{MANIFEST_NAME}.shards"
    parts = [dataclasses.replace(finished, complete=False, shards=finished.shards[:n], seconds=n) for n in range(6)]
    save_manifest(path, parts[1])
    before = path.read_bytes()
    for number in (2, 3):
        append_shard(path, parts[number])
        assert load_manifest(path) == parts[number]
    assert path.read_bytes() == before
    assert len(lines.read_text().splitlines()) == 2

    kept = lines.read_bytes()
    append_shard(path, parts[4])
    torn = lines.read_bytes()
    for cut in (len(kept) + 1, len(torn) - 1):  # a kill while it was written: that shard is made again
        lines.write_bytes(torn[:cut])
        assert load_manifest(path) == parts[3]
    lines.write_bytes(kept.replace(b'"tokens"', b'"tonkes"'))
    with pytest.raises(UserError, match="restore it, or tokenize again"):
        load_manifest(path)
    lines.write_bytes(b"no JSON\n" + kept)
    with pytest.raises(UserError, match=r"manifest.json.shards is not JSON .*restore it, or tokenize again"):
        load_manifest(path)

    save_manifest(path, parts[4])
    assert not lines.exists()
    lines.write_bytes(torn)  # a kill before they were removed: the manifest holds them already
    assert load_manifest(path) == parts[4]
    append_shard(path, parts[5])
    assert load_manifest(path) == parts[5]
    save_manifest(path, finished)
    lines.write_bytes(torn)
    assert load_manifest(path) == finished
