"""A data set written at once is counted right, opens, and is found again."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.prepare.small_dataset import reusable, write_dataset
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)


def peers(directory):
    directory.mkdir()
    np.save(directory / "edufineweb_train_000001.npy", TOKENS)
    return directory


def test_a_document_over_several_shards_is_counted_where_it_begins_and_measured_where_it_ends(tmp_path):
    eot = gpt2_tokenizer().eot_token
    tokens = np.array([eot, *range(30), eot, *range(5)])
    dataset = write_dataset(tmp_path, tokens, tokens, gpt2_tokenizer(), shard_tokens=10)
    assert dataset.manifest is not None
    val, *train = dataset.manifest.shards
    assert [shard.documents for shard in train] == [1, 0, 0, 1]
    assert [shard.lengths for shard in train] == [{}, {}, {}, {5: 1, 30: 1}]
    assert (val.documents, val.lengths) == (2, {5: 1, 30: 1})


def test_statistics_of_tokens_in_memory(tmp_path):
    eot, body = 50256, gpt2_tokenizer().encode("Hello there, world")
    dataset = write_dataset(tmp_path, [eot, *body, eot, *body[:2]], [eot, *body], gpt2_tokenizer())
    statistics = dataset.manifest.statistics()
    assert statistics["documents"] == 3
    assert statistics["bytes"] == 2 * len("Hello there, world") + len("Hello there")
    assert statistics["document_tokens"]["p90"] == len(body)


def test_finished_data_set_is_not_overwritten(tmp_path):
    write_dataset(tmp_path / "a", TOKENS, TOKENS[:10], gpt2_tokenizer())
    with pytest.raises(UserError, match="finished data set"):
        write_dataset(tmp_path / "a", TOKENS, TOKENS[:10], gpt2_tokenizer())
    with pytest.raises(UserError, match="another origin"):
        write_dataset(peers(tmp_path / "b"), TOKENS, TOKENS[:10], gpt2_tokenizer())
    with pytest.raises(UserError, match="no val tokens"):
        write_dataset(tmp_path / "c", TOKENS, [], gpt2_tokenizer())
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(tmp_path / "c")  # the manifest came first, and says so
    with pytest.raises(ValueError, match="below 3"):
        write_dataset(tmp_path / "d", [3], [1], CharTokenizer("abc"))
    assert len(write_dataset(tmp_path / "c", TOKENS, TOKENS[:10], gpt2_tokenizer()).train) == 1000


def test_a_data_set_is_found_again_by_source_tokenizer_and_format(tmp_path):
    source = {"description": "a text", "revision": None}
    assert reusable(tmp_path, source, "gpt2", ".npy") is None
    made = write_dataset(tmp_path, [50256, *TOKENS], [50256, 1], gpt2_tokenizer(), source=source)
    assert reusable(tmp_path, source, "gpt2", ".npy") == made.manifest
    for other in (({**source, "description": "b"}, "gpt2", ".npy"), (source, "char", ".npy"), (source, "gpt2", ".bin")):
        with pytest.raises(UserError, match=r"holds another data set \(a text\)"):
            reusable(tmp_path, *other)
    with open(made.train.paths[0], "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff" if file.read(1) != b"\xff" else b"\x00")
    with pytest.raises(UserError, match=r"delete .* and make it again"):
        reusable(tmp_path, source, "gpt2", ".npy")
