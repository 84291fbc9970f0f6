"""Units to shards against a plain oracle: any cut of the source, any shard size, resumed at any shard."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_sources import histogram

from gpt2.errors import UserError
from gpt2.prepare.shard_builder import Layout, ShardBuilder, UnitTokens
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourcePosition,
    load_manifest,
    merge_lengths,
    save_manifest,
)
from gpt2.tokens.tokenizer import tokenizer_to_dict

EOT = 50256


class _GPT2:  # what a manifest needs of the tokenizer
    name, n_vocab, eot_token = "gpt2", 50257, EOT


def make_units(documents: list[list[int]], units: list[list[int]]) -> list[UnitTokens]:
    """Units that hold the given numbers of documents each; a document is its body of tokens, 3 bytes a token."""
    made = []
    for numbers in units:
        bodies = [documents[n] for n in numbers]
        tokens = [t for body in bodies for t in (EOT, *body)]
        starts = np.cumsum([0] + [len(body) + 1 for body in bodies])[:-1]
        sizes = np.array([3 * len(body) for body in bodies], np.int64)
        made.append(UnitTokens(np.array(tokens, np.uint16), starts.astype(np.int64), sizes, 1, 0))
    return made


def assemble(directory: Path, units: list[UnitTokens], first: int = 0, stop: int | None = None, **options) -> Manifest:
    """Run the builder from shard `first`, as `prepare` does."""
    layout = Layout(
        directory,
        "x_train",
        "x_val",
        ".npy",
        **{"val_tokens": None, "val_documents": None, "max_tokens": None, **options},
    )
    path = directory / MANIFEST_NAME
    if not path.exists():
        save_manifest(path, Manifest("x", False, {}, tokenizer_to_dict(_GPT2()), "uint16"))
    manifest = load_manifest(path)
    start = manifest.shards[first - 1].next if first else SourcePosition()
    with ShardBuilder(layout, manifest, path, first, stop) as builder:
        for number in range(start.unit, len(units)):
            skip = start.skip if number == start.unit else 0
            builder.feed(units[number], SourcePosition(0, number, skip))
            if builder.done:
                break
        builder.finish()
    return builder.manifest


def contents(manifest: Manifest, directory: Path) -> list[list[int]]:
    return [np.load(directory / entry.file).tolist() for entry in manifest.shards]


def oracle(documents, shard_tokens, val_tokens=None, val_documents=None, max_tokens=None) -> list[list[int]]:
    """The same by one list of all tokens."""
    val: list[int] = []
    taken = 0
    for body in documents:
        if len(val) >= val_tokens if val_tokens is not None else taken >= val_documents:
            break
        val += [EOT, *body]
        taken += 1
    train = [t for body in documents[taken:] for t in (EOT, *body)]
    if max_tokens is not None:
        val, train = val[:max_tokens], train[: max(max_tokens - len(val), 0)]
    return [val] + [train[i : i + shard_tokens] for i in range(0, len(train), shard_tokens)]


@pytest.fixture(scope="module")
def no_sync():
    """Hundreds of data sets need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


bodies = st.lists(st.lists(st.integers(0, 50255), min_size=1, max_size=30), min_size=2, max_size=25)


@settings(max_examples=150)
@given(
    documents=bodies,
    per_unit=st.integers(1, 9),
    shard_tokens=st.integers(3, 120),
    val=st.one_of(
        st.fixed_dictionaries({"val_tokens": st.integers(1, 60)}),
        st.fixed_dictionaries({"val_documents": st.integers(1, 5)}),
    ),
    max_tokens=st.none() | st.integers(1, 400),
    data=st.data(),
)
@example([[1], [2, 3]], 1, 3, {"val_tokens": 2}, None, None)  # shards that end with a unit
@example([[1]] * 6, 2, 4, {"val_documents": 2}, 8, None)  # the limit falls on a shard's end
@pytest.mark.usefixtures("no_sync")
def test_shards_are_the_oracles_and_so_after_a_restart(documents, per_unit, shard_tokens, val, max_tokens, data):
    numbers = list(range(len(documents)))
    units = make_units(documents, [numbers[i : i + per_unit] for i in range(0, len(numbers), per_unit)])
    options = {"shard_tokens": shard_tokens, "max_tokens": max_tokens, **val}
    expected = oracle(documents, **options)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if len(expected) == 1:
            with pytest.raises(UserError, match="went into validation"):
                assemble(directory, units, **options)
            return
        manifest = assemble(directory, units, **options)
        assert contents(manifest, directory) == expected
        check_counts(manifest, documents, expected, max_tokens)
        # As after a kill: only the first shards are known.
        keep = data.draw(st.integers(0, len(expected))) if data else 1
        before = dataclasses.replace(manifest, complete=False, shards=manifest.shards[:keep])
        if keep == len(expected):  # the kill came between the last shard and the end, which changes its entry
            return
        save_manifest(directory / MANIFEST_NAME, before)
        again = assemble(directory, units, first=keep, **options)
        assert again == manifest
        # As after damage: one shard in the middle is made again.
        damaged = data.draw(st.integers(0, len(expected) - 1)) if data else 0
        (directory / manifest.shards[damaged].file).unlink()
        stop = damaged + 1 if damaged + 1 < len(expected) else None
        again = assemble(directory, units, first=damaged, stop=stop, **options)
        assert again == manifest
        assert contents(again, directory) == expected


def check_counts(manifest: Manifest, documents, expected, max_tokens) -> None:
    stream = [t for shard in expected for t in shard]
    starts = [i for i, t in enumerate(stream) if t == EOT]
    lengths = np.diff([*starts, len(stream)]) - 1
    statistics = manifest.statistics()
    assert statistics["documents"] == len(starts)
    assert statistics["tokens"] == len(stream)
    assert [entry.documents for entry in manifest.shards] == [shard.count(EOT) for shard in expected]
    assert merge_lengths(entry.lengths for entry in manifest.shards) == histogram(lengths)
    if max_tokens is None:
        assert statistics["bytes"] == sum(3 * len(body) for body in documents)
    else:
        assert abs(statistics["bytes"] - 3 * sum(lengths)) <= 3  # the cut document counts by its share


def test_killed_between_last_shard_and_end(tmp_path):
    units = make_units([[1, 2, 3]] * 4, [[0, 1], [2, 3]])
    options = {"shard_tokens": 6, "val_documents": 1}
    finished = assemble(tmp_path, units, **options)
    assert [entry.tokens for entry in finished.shards] == [4, 6, 6]
    before_end = [dataclasses.replace(e) for e in finished.shards[:-1]]
    save_manifest(tmp_path / MANIFEST_NAME, dataclasses.replace(finished, complete=False, shards=tuple(before_end)))
    stopped = assemble(tmp_path, units, first=2, **options)
    assert stopped == finished


def test_document_over_units_and_longer_than_a_shard(tmp_path):
    """Slices of one plain text: the second and third continue the first's document."""
    slices = [
        UnitTokens(np.array([EOT, 1, 2], np.uint16), np.array([0]), np.array([9]), 0, 0),
        UnitTokens(np.array([EOT, *range(10)], np.uint16), np.array([0]), np.array([40]), 0, 0),
        UnitTokens(np.arange(10, 20, dtype=np.uint16), np.array([], np.int64), np.array([41]), 0, 0),
        UnitTokens(np.array([20, 21, EOT, 5], np.uint16), np.array([2]), np.array([8, 2]), 0, 0),
    ]
    manifest = assemble(tmp_path, slices, shard_tokens=8, val_tokens=1)
    assert [entry.tokens for entry in manifest.shards] == [3, 8, 8, 8, 1]
    assert [entry.documents for entry in manifest.shards] == [1, 1, 0, 1, 0]
    assert merge_lengths(entry.lengths for entry in manifest.shards) == {1: 1, 2: 1, 22: 1}
    assert manifest.statistics()["bytes"] == 9 + 40 + 41 + 8 + 2


def test_validation_waits_for_the_end_of_a_document_over_units(tmp_path):
    first = UnitTokens(np.array([EOT, 1, 2, 3], np.uint16), np.array([0]), np.array([9]), 0, 0)
    rest = UnitTokens(np.array([4, 5, EOT, 6, EOT, 7], np.uint16), np.array([2, 4]), np.array([6, 3, 3]), 0, 0)
    manifest = assemble(tmp_path, [first, rest], shard_tokens=100, val_tokens=2)
    assert contents(manifest, tmp_path) == [[EOT, 1, 2, 3, 4, 5], [EOT, 6, EOT, 7]]


def test_changed_source_is_noticed_when_a_shard_is_made_again(tmp_path):
    units = make_units([[1, 2, 3]] * 4, [[0, 1], [2, 3]])
    manifest = assemble(tmp_path, units, shard_tokens=6, val_documents=1)
    altered = make_units([[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2, 3]], [[0, 1], [2, 3]])
    save_manifest(tmp_path / MANIFEST_NAME, manifest)
    with pytest.raises(UserError, match=r"x_train_000001.npy made again is not what it was"):
        assemble(tmp_path, altered, first=1, stop=2, shard_tokens=6, val_documents=1)


def test_failure_leaves_finished_shards_and_no_temporary_file(tmp_path, monkeypatch):
    units = make_units([[1, 2, 3]] * 6, [[0, 1, 2], [3, 4, 5]])
    calls = []

    def full_disk(self, data):
        calls.append(data)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        self._file.write(data)
        self._hash.update(data)

    from gpt2.tokens.shard_file import ShardWriter

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full_disk)
        with pytest.raises(OSError, match="No space"):
            assemble(tmp_path, units, shard_tokens=6, val_documents=1)
    manifest_files = [MANIFEST_NAME, f"{MANIFEST_NAME}.shards"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*manifest_files, "x_train_000001.npy", "x_val_000000.npy"]
    saved = load_manifest(tmp_path / MANIFEST_NAME)
    assert [entry.tokens for entry in saved.shards] == [4, 6]
    assert not saved.complete
    assemble(tmp_path, units, first=2, shard_tokens=6, val_documents=1)
    assert len(open_dataset(tmp_path).train) == 20


def halves(documents: list[list[int]], val_lines: int) -> list[list[int]]:
    """Validation and training of few documents, by one list of all tokens; "a" is 0, a newline is 198."""
    everything = [t for body in documents for t in (EOT, *body)]
    for place in range(1, len(everything)):
        starts = everything[place] == EOT
        if place >= val_lines and (starts or everything[place - 1] == 198 or place >= 2 * val_lines):
            return [everything[:place], [] if starts else [EOT], everything[place:]]
    return [everything, [], []]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.sampled_from([64, 64, 64, 198]), min_size=1, max_size=40), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 150), max_size=6),
    val_lines=st.integers(1, 40),
    max_tokens=st.none() | st.integers(1, 150),
    shard_tokens=st.integers(3, 60),
    data=st.data(),
)
@example([[64] * 9], {4, 5}, 3, None, 4, None)  # no line ends: after a character
@example([[64, 198] * 9], {5}, 4, 9, 4, None)  # the limit falls behind the inserted end-of-text token
@pytest.mark.usefixtures("no_sync")
def test_few_documents_are_halved_at_a_line(documents, cuts, val_lines, max_tokens, shard_tokens, data):
    everything = [t for body in documents for t in (EOT, *body)]
    bounds = [0, *sorted(cut for cut in cuts if cut < len(everything)), len(everything)]
    units = []
    for begin, end in itertools.pairwise(bounds):  # slices, wherever they are cut
        tokens = everything[begin:end]
        starts = [i for i, token in enumerate(tokens) if token == EOT]
        edges = [*([0] if not starts or starts[0] else []), *starts, len(tokens)]
        sizes = [3 * (sum(t != EOT for t in tokens[a:b])) for a, b in itertools.pairwise(edges)]
        units.append(UnitTokens(*map(np.array, (tokens, starts, sizes)), 0, 0))
        units[-1] = units[-1]._replace(tokens=units[-1].tokens.astype(np.uint16), starts=np.array(starts, np.int64))
    val, inserted, rest = halves(documents, val_lines)
    train = inserted + rest
    if max_tokens is not None:
        val, train = val[:max_tokens], train[: max(max_tokens - len(val), 0)]
    options = {"shard_tokens": shard_tokens, "val_lines": val_lines, "max_tokens": max_tokens}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if not train:
            with pytest.raises(UserError, match="went into validation"):
                assemble(directory, units, **options)
            return
        manifest = assemble(directory, units, **options)
        wanted = [val] + [train[i : i + shard_tokens] for i in range(0, len(train), shard_tokens)]
        assert contents(manifest, directory) == wanted
        assert [entry.documents for entry in manifest.shards] == [tokens.count(EOT) for tokens in wanted]
        if max_tokens is None:
            assert sum(entry.bytes for entry in manifest.shards) == 3 * sum(map(len, documents))
        if data is None:
            return
        first = data.draw(st.integers(0, len(wanted) - 1))
        stop = data.draw(st.sampled_from([None, first + 1]))
        complete = load_manifest(directory / MANIFEST_NAME)
        again = assemble(directory, units, first, stop if stop != len(wanted) else None, **options)
        assert again == complete
        assert contents(again, directory) == wanted


def test_a_shard_made_again_otherwise_leaves_the_one_that_is_there(tmp_path):
    units = make_units([[1, 2, 3]] * 8, [[i] for i in range(8)])
    options = {"shard_tokens": 8, "val_documents": 1}
    manifest = assemble(tmp_path, units, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    units[4].tokens[2] = 9
    with pytest.raises(UserError, match=r"x_train_000002\.npy made again is not what it was: the source has changed"):
        assemble(tmp_path, units, 2, 3, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert manifest.complete
