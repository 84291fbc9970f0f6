"""A prompt's text to the tokens that a model continues; an empty one begins a document."""

from __future__ import annotations

from gpt2.errors import UserError
from gpt2.tokens.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def prompt_tokens(tokenizer: Tokenizer, prompt: str, special: bool = False) -> list[int]:
    """Ids of a prompt, at least one.

    An empty prompt is end-of-text, behind which every document begins; where the vocabulary has none, as one of
    characters, a newline, or its first character.

    Args:
        tokenizer: the model's.
        prompt: what to continue.
        special: take `<|endoftext|>` in it as the token, and not as thirteen characters.

    Raises:
        UserError: a character the vocabulary lacks, or a special token where it has none.
    """
    eot = tokenizer.eot_token
    if not prompt:
        if eot is not None:
            return [eot]
        try:
            return tokenizer.encode("\n")
        except UserError:
            return [0]
    if not special or END_OF_TEXT not in prompt:
        return tokenizer.encode(prompt)
    if eot is None:
        raise UserError(f"{END_OF_TEXT} in the prompt: this vocabulary of {tokenizer.n_vocab} has no such token")
    first, *others = (tokenizer.encode(part) for part in prompt.split(END_OF_TEXT))
    return [*first, *(token for part in others for token in (eot, *part))]
