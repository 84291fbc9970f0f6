"""HellaSwag's examples as rows of tokens: texts by convention, tokenized once, packed, cut into batches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gpt2.files import cache_directory, read_plain, write_whole
from gpt2.hellaswag.examples import ENDINGS, Example, content_lines
from gpt2.tokens.tokenizer import GPT2Tokenizer

Convention = Literal["completion", "harness"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def preprocess(text: str) -> str:
    """The harness's cleaning: the WikiHow half carries the marks of its source, such as "[header] How to … [title]"."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def render(example: Example, convention: Convention) -> tuple[str, list[str]]:
    """The text of the context, and of each continuation with the white space before it."""
    if convention == "completion":
        return example.ctx, [" " + ending for ending in example.endings]
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    context = preprocess(context)
    kept = context.rstrip()  # the harness moves white space at the end to where GPT-2's tokens have it
    moved = context[len(kept) :]
    return kept, [f"{moved} {preprocess(ending)}" for ending in example.endings]


@dataclass(frozen=True)
class Tokenized:
    """The examples as token ids, in one flat array.

    Attributes:
        tokens: (n,) context, ending 0, …, ending 3 of the first example, then of the next.
        counts: (examples, 5) tokens of each of these parts.
        characters: (examples, 4) of the endings, without the space before them.
    """

    tokens: np.ndarray
    counts: np.ndarray
    characters: np.ndarray


def tokenize(examples: tuple[Example, ...], tokenizer: GPT2Tokenizer, convention: Convention) -> Tokenized:
    """Token ids of all examples, from the user's cache where they were tokenized before."""
    # The number is this code's version: raise it when render or tokenize change what they make.
    digest = hashlib.sha256(f"2 {tokenizer.name} {tokenizer.n_vocab} {convention}\n".encode())
    for line in content_lines(examples):
        digest.update(line)
    path = cache_directory() / "hellaswag_tokens" / f"{digest.hexdigest()}.npz"
    try:
        with np.load(io.BytesIO(read_plain(path)), allow_pickle=False) as file:
            kept = Tokenized(file["tokens"], file["counts"], file["characters"])
            if file["seal"].tobytes() == _seal(digest.digest(), kept):
                return kept
    except Exception:  # none there, or damaged in one of zipfile's and numpy's many ways
        pass
    parts: list[list[int]] = []
    characters = []
    for example in examples:
        context, continuations = render(example, convention)
        parts.append(tokenizer.encode(context) or [tokenizer.eot_token])  # something must predict the first token
        parts.extend(map(tokenizer.encode, continuations))
        clean = preprocess if convention == "harness" else str
        characters.append([len(clean(ending)) for ending in example.endings])
    tokenized = Tokenized(
        np.fromiter((token for part in parts for token in part), np.int32),
        np.array([len(part) for part in parts], np.int32).reshape(-1, 1 + ENDINGS),
        np.array(characters, np.int32).reshape(-1, ENDINGS),
    )
    buffer = io.BytesIO()
    seal = np.frombuffer(_seal(digest.digest(), tokenized), np.uint8)
    np.savez(buffer, tokens=tokenized.tokens, counts=tokenized.counts, characters=tokenized.characters, seal=seal)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
    return tokenized


def _seal(key: bytes, tokenized: Tokenized) -> bytes:
    """A hash of what a file of the cache holds, and of what it is for."""
    digest = hashlib.sha256(key)
    for array in (tokenized.tokens, tokenized.counts, tokenized.characters):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return digest.digest()


@dataclass(frozen=True)
class Row:
    """One context and the endings that continue it.

    Attributes:
        context: its tokens, at least one.
        endings: theirs.
        slots: for each ending, the places 4·example + ending its score goes to; several if endings are equal, which
            thereby tie exactly.
    """

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    slots: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens the row takes: the endings' last ones are not read."""
        return len(self.context) + self.predicting - 1

    @property
    def predicting(self) -> int:
        """Positions that predict something: the context's last one, and all of the endings' but their last ones."""
        return 1 + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Rows:
    """All examples as rows.

    Attributes:
        rows: one an example; of an example that does not fit into the model's context, one an ending.
        lengths: (examples, 4) what acc_norm divides by: tokens scored (completion), or characters (harness).
        truncated: how many examples did not fit.
    """

    rows: tuple[Row, ...]
    lengths: np.ndarray
    truncated: int


@functools.lru_cache(maxsize=2)
def make_rows(examples: tuple[Example, ...], tokenizer: GPT2Tokenizer, convention: Convention, block_size: int) -> Rows:
    """Tokenize and arrange; kept in memory for the next evaluation of a run.

    As in the harness, an ending that does not fit behind its context makes the context lose its first tokens, so that
    each ending has a context of its own. Of an ending that is itself too long, the last `block_size` tokens are scored.
    """
    tokenized = tokenize(examples, tokenizer, convention)
    rows = []
    truncated = 0
    parts = np.split(tokenized.tokens, np.cumsum(tokenized.counts.ravel())[:-1])
    for i in range(len(examples)):
        context, *endings = parts[i * (1 + ENDINGS) : (i + 1) * (1 + ENDINGS)]
        distinct: dict[bytes, tuple[np.ndarray, list[int]]] = {}
        for j, ending in enumerate(endings):
            distinct.setdefault(ending.tobytes(), (ending, []))[1].append(i * ENDINGS + j)
        if len(context) + max(map(len, endings)) - 1 <= block_size:
            different, slots = zip(*distinct.values(), strict=True)
            rows.append(Row(context, different, tuple(map(tuple, slots))))
            continue
        truncated += 1
        for ending, places in distinct.values():
            kept = np.concatenate((context, ending))[-(block_size + 1) :]
            split = max(len(kept) - len(ending), 1)
            rows.append(Row(kept[:split], (kept[split:],), (tuple(places),)))
    lengths = tokenized.characters
    if convention == "completion":
        lengths = np.minimum(tokenized.counts[:, 1:], block_size)
    return Rows(tuple(rows), lengths, truncated)


@dataclass(frozen=True)
class Batch:
    """What all processes do at the same time, each with `rows` rows of `length` tokens.

    Attributes:
        members: indices of the rows, dealt out in turn; fewer than rows · processes in the last batch.
        rows: rows per process, filled up with empty ones.
        length: tokens per row.
    """

    members: np.ndarray
    rows: int
    length: int


def make_batches(lengths: np.ndarray, processes: int, token_budget: int, multiple: int) -> list[Batch]:
    """Cut rows into batches, longest first, so that what does not fit into memory fails at once.

    All processes run the same shapes in the same order, which collectives inside the model (FSDP) need.

    Args:
        lengths: (rows,) of all.
        processes: that share each batch.
        token_budget: most tokens of a batch on one process, padding included; a single row may exceed it.
        multiple: lengths are rounded up to a multiple of it.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        length = -(-int(lengths[order[start]]) // multiple) * multiple
        rows = max(1, token_budget // length)
        members = order[start : start + rows * processes]
        batches.append(Batch(members, min(rows, -(-len(members) // processes)), length))
        start += len(members)
    return batches


def pack(rows: Sequence[Row], batch: int, length: int) -> dict[str, np.ndarray]:
    """Lay rows out in arrays.

    Args:
        rows: at most `batch`; what is left is padding.
        batch: B.
        length: T.

    Returns:
        tokens, positions, segments: (B, T); segment 0 is the context, 1 to 4 the endings, -1 padding.
        heads: (n,) indices into B·T of the positions that predict something.
        targets: (n, 4) ids each of them predicts: four after a context, one (and three times 0) within an ending.
        scored: (m,) indices into n·4, one for each token of each ending.
        ending: (m,) which ending it belongs to, counted over `rows`.
    """
    tokens = np.zeros((batch, length), np.int64)
    positions = np.zeros((batch, length), np.int64)
    segments = np.full((batch, length), -1, np.int64)
    heads, targets, scored, owners = [], [], [], []
    n = ending_index = 0
    for b, row in enumerate(rows):
        c = len(row.context)
        end = row.length
        tokens[b, :end] = np.concatenate((row.context, *(ending[:-1] for ending in row.endings)))
        positions[b, :c] = np.arange(c)
        segments[b, :c] = 0
        heads.append(b * length + np.arange(c - 1, end))
        target = np.zeros((end - c + 1, ENDINGS), np.int64)
        at = 0  # how many of the endings' tokens stand before this ending
        for j, ending in enumerate(row.endings):
            m = len(ending)
            positions[b, c + at : c + at + m - 1] = c + np.arange(m - 1)
            segments[b, c + at : c + at + m - 1] = 1 + j
            target[0, j] = ending[0]
            target[1 + at : at + m, 0] = ending[1:]
            scored.append(np.append(n * ENDINGS + j, (n + 1 + at + np.arange(m - 1)) * ENDINGS))
            owners.append(np.full(m, ending_index))
            ending_index += 1
            at += m - 1
        targets.append(target)
        n += len(target)
    empty = np.zeros(0, np.int64)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "heads": np.concatenate((empty, *heads)),
        "targets": np.concatenate((empty.reshape(0, ENDINGS), *targets)),
        "scored": np.concatenate((empty, *scored)),
        "ending": np.concatenate((empty, *owners)),
    }
