"""Tokens to text as they come: characters that are complete, up to a text that ends them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpt2.tokens.tokenizer import Tokenizer


class TextStream:
    """One row's text, shown as early as it is certain.

    A token may end in the middle of a UTF-8 character, whose rest the next token brings; what may be the beginning of
    a stop text is held back until it is known not to be.

    Args:
        tokenizer: the tokens are of; its end-of-text token has no text.
        stops: texts that end the row, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text = ""
        """Everything shown so far."""
        self.stopped = False
        """Whether a stop text came, or end-of-text."""

    def feed(self, token: int) -> str:
        """Take the next token; returns the text that can now be shown."""
        if self.stopped:
            return ""
        if token == self._tokenizer.eot_token:
            return self.finish()
        return self._show(self._decoder.decode(self._tokenizer.decode_bytes([token])), last=False)

    def finish(self) -> str:
        """No token follows: the rest of the text, incomplete bytes as U+FFFD."""
        if self.stopped:
            return ""
        shown = self._show(self._decoder.decode(b"", final=True), last=True)
        self.stopped = True
        return shown

    def _show(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = text[: min(found)], "", True
        else:
            longest = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
            shown, self._held = text[: len(text) - longest], text[len(text) - longest :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
