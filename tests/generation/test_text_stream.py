"""Tokens to text as they come, held to the whole text that the tokens decode to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpt2.generation.text_stream import TextStream
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

CHARS = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz")


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = gpt2_tokenizer()
    text = "naïve 👩‍👩‍👧 你好"
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == stream.text == text
    assert "" in pieces  # some tokens end inside a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_marked() -> None:
    tokenizer = gpt2_tokenizer()
    half = tokenizer.encode("👍")[:1]
    stream = TextStream(tokenizer)
    assert stream.feed(half[0]) == ""
    assert stream.feed(tokenizer.encode("a")[0]) == "\ufffda"
    assert stream.feed(half[0]) == ""
    assert stream.finish() == "\ufffd"


def test_end_of_text_ends_a_row_and_is_not_shown() -> None:
    tokenizer = gpt2_tokenizer()
    stream = TextStream(tokenizer)
    shown = [stream.feed(token) for token in [*tokenizer.encode("one"), tokenizer.eot_token, *tokenizer.encode("two")]]
    assert "".join(shown) == stream.text == "one"
    assert stream.stopped


@given(st.text("abc \n", max_size=30), st.lists(st.text("abc \n", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_where_str_find_would(text: str, stops: list[str]) -> None:
    stream = TextStream(CHARS, stops)
    shown = []
    for end, token in enumerate(CHARS.encode(text), start=1):
        shown.append(stream.feed(token))
        complete = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        assert stream.stopped == bool(complete)
        if stream.stopped:
            assert stream.text == text[: min(complete)]
            break
    else:
        shown.append(stream.finish())
        assert stream.text == text
    assert "".join(shown) == stream.text
