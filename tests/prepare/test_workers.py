"""Work is shared out whole and once, and what goes wrong with a worker or a file is told."""

from __future__ import annotations

import os

import numpy as np
import pytest
from small_sources import documents, job, write_parquet

from gpt2.errors import UserError
from gpt2.prepare.build import prepare
from gpt2.prepare.documents import Contents
from gpt2.prepare.sources import Source, SourceFile
from gpt2.prepare.workers import (
    Part,
    Workers,
    characters_of_unit,
    files_of_part,
    tokenize_unit,
    units_of_file,
)
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer, tokenizer_to_dict


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_every_unit_is_in_one_part(kind):
    generator = np.random.default_rng(7)
    for of in (1, 2, 3, 7, 50):
        sizes = generator.integers(0, 1000, 9).tolist()
        files = tuple(SourceFile(f"{i}", size, "", kind, "") for i, size in enumerate(sizes))
        source = Source("local files", None, files)
        units = generator.integers(1, 12, 9).tolist()
        owners: dict[tuple[int, int], list[int]] = {}
        for number in range(1, of + 1):
            for file in files_of_part(source, Part(number, of)):
                for unit in units_of_file(source, file, units[file], Part(number, of)):
                    owners.setdefault((file, unit), []).append(number)
        wanted = {(f, u) for f in range(9) if sizes[f] for u in range(units[f])}
        assert set(owners) == wanted
        assert all(len(parts) == 1 for parts in owners.values())
        ordered = [owners[key][0] for key in sorted(owners)]
        assert ordered == sorted(ordered)


def test_worker_that_dies_is_told_and_what_is_finished_stays(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "source", documents(9))
    monkeypatch.setattr("gpt2.prepare.workers.tokenize_unit", _die)
    with pytest.raises(UserError, match="a worker process died"):
        prepare(job(tmp_path / "out", source, val_tokens=10), lambda line: None)
    monkeypatch.undo()
    assert load_manifest(tmp_path / "out" / MANIFEST_NAME).complete is False
    assert prepare(job(tmp_path / "out", source, val_tokens=10), lambda line: None).complete


def _die(path, kind, unit, column):
    os._exit(9)  # as the kernel does to who takes too much memory


def test_source_that_vanishes_is_told(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "source", documents(9))
    made = job(tmp_path / "out", source, val_tokens=10)
    monkeypatch.setattr("gpt2.prepare.download.count_units", lambda path, kind, column: path.unlink() or Contents(1))
    with pytest.raises(UserError, match=r"00\d\.parquet.*replace the file"):
        prepare(made, lambda line: None)


def test_rows_read_are_held_against_the_files_own_count(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "source", documents(9))
    monkeypatch.setattr("gpt2.prepare.download.count_units", lambda path, kind, column: Contents(1, (4,)))
    with pytest.raises(UserError, match=r"row group 0 holds 4 rows by the file's index, and 3 were read"):
        prepare(job(tmp_path / "out", source, val_tokens=10), lambda line: None)


@pytest.mark.parametrize("of", [1, 2, 5])
def test_files_of_validation_are_in_the_first_part(of):
    files = tuple(SourceFile(f"{i}", size, "", "jsonl", "") for i, size in enumerate((5000, 7, 10, 20, 30)))
    source = Source("local files", None, files, validation=2)
    for number in range(1, of + 1):
        mine = files_of_part(source, Part(number, of))
        units = {file: list(units_of_file(source, file, 3, Part(number, of))) for file in (0, 1)}
        assert [file in mine for file in (0, 1)] == [number == 1] * 2
        assert units == ({0: [0, 1, 2], 1: [0, 1, 2]} if number == 1 else {0: [], 1: []})
    assert source.begins == (0, 0, 0, 10, 30, 60)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), CharTokenizer("ab é\ufffd")], ids=["gpt2", "char"])
def test_a_unit_is_tokenized_document_by_document(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "ab"}\n{"body": null}\n{"body": "é\\ud800"}\n')
    with Workers(1, tokenizer_to_dict(tokenizer)):
        tokens, starts, sizes, skipped, replaced = tokenize_unit(path, "jsonl", 0, "body")
    eot = [] if tokenizer.eot_token is None else [tokenizer.eot_token]
    first = [*eot, *tokenizer.encode("ab")]
    assert tokens.tolist() == [*first, *eot, *tokenizer.encode("é\ufffd")]
    assert tokens.dtype == np.uint16
    assert (starts.tolist(), sizes.tolist(), skipped, replaced) == ([0, len(first)], [2, 5], 1, 1)
    assert characters_of_unit(path, "jsonl", 0, "body") == set("abé\ufffd")
