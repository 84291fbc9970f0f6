"""Cut the ordered stream of tokenized units into shards, and keep the manifest in step with the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2.errors import UserError
from gpt2.tokens.manifest import Manifest, ShardEntry, SourcePosition, append_shard, length_bin, save_manifest
from gpt2.tokens.shard_file import ShardWriter
from gpt2.tokens.tokenizer import line_ends, tokenizer_from_dict


class UnitTokens(NamedTuple):
    """A tokenized unit, as a worker hands it back.

    Attributes:
        tokens: (n,) ids, each document's end-of-text token first.
        starts: (d,) where in `tokens` its documents begin.
        sizes: (d,) or (d + 1,) bytes of their text; one more, first, where the unit begins inside a document.
        skipped: documents left out, null or empty.
        replaced: documents whose invalid UTF-8 was replaced.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    skipped: int
    replaced: int


@dataclass(frozen=True)
class Layout:
    """Decides where shards end.

    Attributes:
        directory: directory that receives the shards.
        prefix: what the training shards' names begin with, as in `PREFIX_000001.npy`.
        val_prefix: what the validation shard's name begins with; None where this part of the data set has none.
        suffix: ".npy" or ".bin".
        shard_tokens: tokens a training shard.
        val_tokens: validation ends with the document that brings it to so many tokens, or
        val_documents: after so many documents; one of the two is None, or both.
        val_lines: after so many tokens and the end of a line or document, of few documents; the rest of a document is
            one of its own, trained on. Where twice as many tokens have no such end, after a character.
        val_files: the source's first files, of which nothing is trained on: validation ends with them at the latest.
        max_tokens: tokens in all shards together; None for no limit.
    """

    directory: Path
    prefix: str
    val_prefix: str | None
    suffix: str
    shard_tokens: int
    val_tokens: int | None
    val_documents: int | None
    max_tokens: int | None
    val_files: int = 0
    val_lines: int | None = None

    def split(self, index: int) -> str:
        """Split of shard number `index`."""
        return "val" if index == 0 and self.val_prefix is not None else "train"

    def path(self, index: int) -> Path:
        """File of shard number `index`."""
        prefix = self.val_prefix if self.split(index) == "val" else self.prefix
        return self.directory / f"{prefix}_{index:06d}{self.suffix}"


class ShardBuilder:
    """Takes units in order and writes shards `first` to `stop` - 1, or to the end of the source.

    Args:
        layout: decides where shards end.
        manifest: the data set so far; its entries before `first` say how much has been written.
        manifest_path: brought up to date with each finished shard.
        first: number of the first shard to write.
        stop: number of the next shard that exists already; None where none does.
    """

    def __init__(self, layout: Layout, manifest: Manifest, manifest_path: Path, first: int, stop: int | None) -> None:
        self.layout = layout
        self.manifest = manifest
        self.done = False
        self.clock: Callable[[], float] | None = None  # seconds spent, for the manifest
        self._manifest_path = manifest_path
        self._index = first
        self._stop = stop
        self._has_eot = manifest.eot_token is not None
        before = manifest.shards[:first]
        self.total = sum(entry.tokens for entry in before)  # tokens in shards before and in this one
        self._open = before[-1].open_document if before else -1  # -1: no document has begun
        self._writer: ShardWriter | None = None
        self._reset()

    def _reset(self) -> None:
        self._documents = self._bytes = self._skipped = self._replaced = 0
        self._lengths: dict[int, int] = {}

    def __enter__(self) -> ShardBuilder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)

    def feed(self, unit: UnitTokens, place: SourcePosition) -> None:
        """Write a unit, which is at `place` in the source and whose first `place.skip` tokens are written already."""
        if place.file < self.layout.val_files:
            if self.layout.split(self._index) == "train":
                return  # --val-tokens took what it needed of the validation split
        elif self._index == 0 and self.layout.val_files and self.layout.val_prefix is not None:
            if self._writer is None:
                raise UserError("the files of the validation split hold no text; name the files to read without them")
            self._close_document(0)
            self._finish_shard(place)
        limit = self.layout.max_tokens
        at_limit = limit is not None and self.total + len(unit.tokens) - place.skip >= limit
        if limit is not None and at_limit:
            unit = _truncated(unit, place.skip + limit - self.total)
        at, inserted = place.skip, 0
        while at < len(unit.tokens) and not self.done:
            if self._is_second_half(unit, at):
                unit, inserted, at = self._second_half(unit, at), self._has_eot - at, 0
            upto, full = self._cut(unit, at)
            halved = full and self._index == 0 and self.layout.val_lines is not None
            self._append(_truncated(unit, upto) if halved else unit, at, upto)
            at = upto
            if full:
                self._finish_shard(place._replace(skip=at - inserted))
                if place.file < self.layout.val_files:
                    return
        if not self.done:
            self._skipped += unit.skipped
            self._replaced += unit.replaced
            self.done = at_limit

    def finish(self) -> None:
        """The source, or what was asked of it, is at its end: write what is left and complete the manifest."""
        if self._stop is not None:
            self._require_filled(self._stop)
            return
        self._close_document(0)
        if self.total == 0 and self.manifest.part is None:
            raise UserError("the source holds no text; look at its files and their 'text' columns")
        if self.manifest.part is None and self._index <= 1 and (self._index == 0 or self._writer is None):
            raise UserError(
                f"all {self.total:,} tokens went into validation, which takes whole documents; "
                "give more text, or a smaller --val-tokens"
            )
        if self._writer is not None:
            self._finish_shard(None)
        elif self.manifest.shards:
            # What came after the last token belongs to the last shard.
            last = self.manifest.shards[-1]
            lengths = {edge: last.lengths.get(edge, 0) + count for edge, count in self._lengths.items()}
            last = replace(
                last,
                open_document=-1,
                lengths={**last.lengths, **lengths},
                skipped=last.skipped + self._skipped,
                replaced=last.replaced + self._replaced,
                next=None,
            )
            self.manifest = replace(self.manifest, shards=(*self.manifest.shards[:-1], last))
        self._require_filled(len(self.manifest.shards))
        self.manifest = replace(self.manifest, complete=True, seconds=self._seconds())
        save_manifest(self._manifest_path, self.manifest)

    def _require_filled(self, stop: int) -> None:
        """UserError where the source ended before shard `stop` - 1 was made again."""
        if self._index < stop and not self.done:
            raise UserError(
                f"{self.manifest.shards[self._index].file} cannot be made again: the source ends before it; restore "
                f"{self._manifest_path} or the shard, or tokenize into an empty directory"
            )

    def _is_second_half(self, unit: UnitTokens, at: int) -> bool:
        """Whether training begins with the token `at` of the unit, inside the document that validation ended in."""
        first = self._index == 1 and self._writer is None and self.layout.split(0) == "val"
        return first and self.layout.val_lines is not None and at not in unit.starts

    def _second_half(self, unit: UnitTokens, at: int) -> UnitTokens:
        """The unit from the token `at` on, with what is left of that token's document as one of its own."""
        before = int(np.searchsorted(unit.starts, at))  # documents that begin before it
        eot = int(self._has_eot)
        tokens = np.concatenate([np.full(eot, self.manifest.eot_token or 0, unit.tokens.dtype), unit.tokens[at:]])
        sizes = unit.sizes[before + len(unit.sizes) - len(unit.starts) - 1 :].copy()
        sizes[0] -= _truncated(unit, at).sizes[-1]
        half = UnitTokens(tokens, np.append(0, unit.starts[before:] - at + eot), sizes, unit.skipped, unit.replaced)
        limit = self.layout.max_tokens
        return half if limit is None else _truncated(half, limit - self.total)

    def _line_cut(self, unit: UnitTokens, at: int, least: int, most: int) -> int | None:
        """The first place from `least` on where a line or document ends, or from `most` on a character; None: later."""
        ends_line, in_character = line_ends(tokenizer_from_dict(self.manifest.tokenizer))
        ends = np.append(False, ends_line[unit.tokens])  # at place p, the token before it ends a line
        ends[unit.starts] = True
        after_character = np.append(~in_character[unit.tokens], False)
        after_character[: max(most, 0)] = False
        begin = max(least, at + (self._writer is None))
        places = np.flatnonzero((ends | after_character)[begin:])
        return begin + int(places[0]) if len(places) else None

    def _cut(self, unit: UnitTokens, at: int) -> tuple[int, bool]:
        """How far the unit goes into the current shard from `at` on, and whether that fills the shard."""
        layout, written = self.layout, self._writer.tokens if self._writer else 0
        end = len(unit.tokens)
        upto, full = end, False
        if layout.split(self._index) == "train":
            recorded = self._recorded()  # shorter where files were added behind it
            tokens = recorded.tokens if recorded is not None else layout.shard_tokens
            if written + (end - at) >= tokens:
                upto, full = at + tokens - written, True
        elif layout.val_lines is not None:
            least = at + layout.val_lines - written
            place = self._line_cut(unit, at, least, least + layout.val_lines)
            if place is not None:
                return place, True
        else:
            starts = unit.starts[np.searchsorted(unit.starts, at) :]
            if layout.val_tokens is not None:
                later = starts[starts - at + written >= max(layout.val_tokens, 1)]
            elif layout.val_documents is not None:
                later = starts[layout.val_documents - self._documents :]
            else:
                later = starts[:0]
            if len(later):
                upto, full = int(later[0]), True
        return upto, full

    def _append(self, unit: UnitTokens, at: int, upto: int) -> None:
        if upto == at:
            return
        if self._writer is None:
            split = self.layout.split(self._index)
            expected = self.layout.shard_tokens if split == "train" else self.layout.val_tokens or 0
            self._writer = ShardWriter(self.layout.path(self._index), self.manifest.dtype, expected)
        self._writer.append(unit.tokens[at:upto])
        self.total += upto - at
        first, last = np.searchsorted(unit.starts, [at, upto])
        starts = unit.starts[first:last]
        self._documents += len(starts)
        self._bytes += _text_bytes(unit, at, upto, first, last)
        if len(starts) == 0:
            self._open += upto - at
            return
        self._close_document(int(starts[0]) - at)
        lengths = np.diff(starts) - self._has_eot
        for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            self._count_length(int(length), int(count))
        self._open = upto - int(starts[-1]) - self._has_eot

    def _close_document(self, more: int) -> None:
        """The document that is open ends after `more` tokens."""
        if self._open >= 0:
            self._count_length(self._open + more, 1)
        self._open = -1

    def _count_length(self, length: int, count: int) -> None:
        edge = length_bin(length)
        self._lengths[edge] = self._lengths.get(edge, 0) + count

    def _recorded(self) -> ShardEntry | None:
        """The entry of the current shard where it is made again, and not to the source's end."""
        shards = self.manifest.shards
        return shards[self._index] if self._index < len(shards) - (self._stop is None) else None

    def _finish_shard(self, following: SourcePosition | None) -> None:
        assert self._writer is not None
        shards = list(self.manifest.shards)
        if not self._writer.finish(shards[self._index].sha256 if self._index < len(shards) else None):
            raise UserError(
                f"{self._writer.path.name} made again is not what it was: the source has changed under the same names; "
                "restore it, or tokenize it into an empty directory"
            )
        entry = ShardEntry(
            file=self._writer.path.name,
            split=self.layout.split(self._index),
            tokens=self._writer.tokens,
            documents=self._documents,
            bytes=self._bytes,
            sha256=self._writer.sha256,
            open_document=self._open,
            lengths=dict(sorted(self._lengths.items())),
            skipped=self._skipped,
            replaced=self._replaced,
            next=following,
        )
        if (recorded := self._recorded()) is not None:
            entry, self._open = recorded, recorded.open_document
        is_new = self._index == len(shards)
        shards[self._index : self._index + 1] = [entry]
        self._writer = None
        self._reset()
        self._index += 1
        self.done = self.done or self._index == self._stop
        self.manifest = replace(self.manifest, shards=tuple(shards), seconds=self._seconds())
        if is_new and following is not None:
            append_shard(self._manifest_path, self.manifest)
        elif self.done or following is not None:
            save_manifest(self._manifest_path, self.manifest)

    def _seconds(self) -> float:
        return self.clock() if self.clock is not None else self.manifest.seconds


def _text_bytes(unit: UnitTokens, at: int, upto: int, first: int, last: int) -> int:
    """Bytes of the texts that begin in tokens [at, upto), which hold document starts [first, last)."""
    continued = len(unit.sizes) - len(unit.starts)
    return int(unit.sizes[0 if at == 0 else first + continued : last + continued].sum())


def _truncated(unit: UnitTokens, tokens: int) -> UnitTokens:
    """The unit's first `tokens` tokens; the text they end in counts with its share of bytes."""
    documents = int(np.searchsorted(unit.starts, tokens))
    continued = len(unit.sizes) - len(unit.starts)
    sizes = unit.sizes[: documents + continued].copy()
    if len(sizes):
        begin = int(unit.starts[documents - 1]) if documents else 0
        end = int(unit.starts[documents]) if documents < len(unit.starts) else len(unit.tokens)
        sizes[-1] = round(int(sizes[-1]) * (tokens - begin) / max(end - begin, 1))
    return unit._replace(tokens=unit.tokens[:tokens], starts=unit.starts[:documents], sizes=sizes)
