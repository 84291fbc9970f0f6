"""A prompt's tokens: the empty one, and special tokens where they are asked for."""

from __future__ import annotations

import pytest

from gpt2.errors import UserError
from gpt2.generation.prompt import prompt_tokens
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

CHARS = CharTokenizer("b\na")


def test_an_empty_prompt_is_where_a_document_begins() -> None:
    assert prompt_tokens(gpt2_tokenizer(), "") == [50256]
    assert prompt_tokens(CHARS, "") == [1]
    assert prompt_tokens(CharTokenizer("xy"), "") == [0]


def test_end_of_text_is_a_token_only_where_that_is_asked_for() -> None:
    tokenizer = gpt2_tokenizer()
    a, b = tokenizer.encode("one"), tokenizer.encode(" two")
    text = "one<|endoftext|><|endoftext|> two"
    assert prompt_tokens(tokenizer, text, special=True) == [*a, 50256, 50256, *b]
    assert prompt_tokens(tokenizer, "<|endoftext|>", special=True) == [50256]
    plain = prompt_tokens(tokenizer, text)
    assert 50256 not in plain
    assert tokenizer.decode(plain) == text
    assert prompt_tokens(tokenizer, "one", special=True) == a


def test_what_a_vocabulary_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="'q' not among the 3 characters"):
        prompt_tokens(CHARS, "q")
    with pytest.raises(UserError, match=r"in the prompt: this vocabulary of 3 has no such token"):
        prompt_tokens(CHARS, "a<|endoftext|>", special=True)
