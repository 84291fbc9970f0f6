"""The fast encoder against tiktoken's own, on what is hard about white space and on any text at all."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.tokens import fast_bpe as fast_encode
from gpt2.tokens.fast_bpe import HARD_CASES, FastEncoder
from gpt2.tokens.tokenizer import GPT2Tokenizer, gpt2_tokenizer, gpt2_vocab_files

WHITE = "".join(map(chr, [*fast_encode._WHITE_SPACE, *range(0x1C, 0x20), 0x180E, 0x200B, 0x2060, 0xFEFF]))


def never(text: str) -> np.ndarray:
    raise AssertionError(f"the slow encoder was asked for {text!r}")


@pytest.fixture(scope="module")
def fast() -> FastEncoder:
    return FastEncoder(gpt2_tokenizer()._ranks, never)


def test_the_tokenizer_uses_it() -> None:
    assert isinstance(gpt2_tokenizer().encode_fast, FastEncoder)


@pytest.mark.parametrize("text", [text for text in HARD_CASES if fast_encode._MARKS[0] not in text])
def test_hard_cases(fast: FastEncoder, text: str) -> None:
    ids = fast(text)
    assert ids.tolist() == gpt2_tokenizer().encode(text)
    assert ids.dtype == np.uint16


@settings(max_examples=500)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters=fast_encode._MARKS[0]))
    | st.text(WHITE + "a1'é中👍.<", max_size=40)
    | st.text(" \n\t'sabé1.", max_size=80)
)
def test_any_text(fast: FastEncoder, text: str) -> None:
    assert fast(text).tolist() == gpt2_tokenizer().encode(text)


def test_real_text(fast: FastEncoder) -> None:
    files = sorted(Path(random.__file__).parent.glob("*.py"))[:40]
    for text in [file.read_text("utf-8", "replace") for file in files]:
        assert np.array_equal(fast(text), gpt2_tokenizer().encode_array(text))


def test_white_space_is_what_the_expression_means_by_it() -> None:
    """Every character there is, as one of two in front of a letter: cut apart if it is white space, else one piece."""
    mark = fast_encode._MARKS[0]
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000 and chr(i) != mark]
    fast = FastEncoder(gpt2_tokenizer()._ranks, never)
    for first in range(0, len(characters), 4096):
        text = "".join(f"{c}{c}b" for c in characters[first : first + 4096])
        assert np.array_equal(fast(text), gpt2_tokenizer().encode_array(text))


def test_text_that_holds_a_mark_or_half_a_character_is_marked_otherwise(fast: FastEncoder) -> None:
    for text in ["a  \ufdd0  b", "a  b \ud83d  c", "\ude00", "  \ufdd0 \ufdd1  \ud800  b"]:
        assert np.array_equal(fast(text), gpt2_tokenizer().encode_array(text))


def test_only_a_text_with_all_marks_goes_the_slow_way() -> None:
    asked: list[str] = []

    def slow(text: str) -> np.ndarray:
        asked.append(text)
        return gpt2_tokenizer().encode_array(text)

    text = "  b  ".join(fast_encode._MARKS)
    FastEncoder(gpt2_tokenizer()._ranks, slow)(text)
    assert asked == [text]


def test_one_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastEncoder, "mark", lambda self, text, mark: text)  # right but for runs of white space
    tokenizer = GPT2Tokenizer(gpt2_vocab_files()[1])
    assert tokenizer.encode_fast == tokenizer._encode_backtracking
