"""Token shards: one-dimensional arrays of token ids in files, read as one long stream per split.

A directory with a `manifest.json` is checked against it; one without, as build-nanogpt, llm.c and
modded-nanogpt make them, is read by its files' names and headers.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.errors import UserError
from gpt2.files import READING, read_at, read_plain
from gpt2.tokens.manifest import (
    MANIFEST_NAME,
    Manifest,
    foreign_fingerprint,
    load_manifest,
)
from gpt2.tokens.shard_file import ShardHeader, read_header
from gpt2.tokens.tokenizer import Tokenizer, gpt2_tokenizer, tokenizer_from_dict

SHARD_TOKENS = 100_000_000


class _OpenFile:
    """A file open for reading, until the last thread that uses it lets it go."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, READING)  # a FIFO in its place is not waited for
        # Where `read_at` moves the descriptor's position, threads take turns.
        self.turn: AbstractContextManager[Any] = nullcontext() if hasattr(os, "preadv") else threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _may_stay_open() -> int:
    """Files that one stream keeps open: a quarter of what the process may have (`ulimit -n`, often 1,024), at most."""
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 512  # Windows' C library
    return limit // 4 if limit > 0 else 4096


class TokenStream:
    """All shards of one split as one long 1-D array that stays on disk; many threads may read it at the same time.

    Ranges are read with `pread`, not through memory maps: a map's touched pages count towards the
    resident memory of the process, and each map holds a file open.

    Args:
        paths: the shards, in order.
        headers: their headers.
    """

    def __init__(self, paths: Iterable[Path], headers: Iterable[ShardHeader]) -> None:
        self.paths = tuple(paths)
        self.headers = tuple(headers)
        self._starts = [0]
        for header in self.headers:
            self._starts.append(self._starts[-1] + header.tokens)
        self.dtype = self.headers[0].dtype if self.headers else np.dtype("uint16")
        self._open = lru_cache(_may_stay_open())(_OpenFile)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}  # descriptors do not travel to another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=lru_cache(_may_stay_open())(_OpenFile))

    @property
    def shard_starts(self) -> tuple[int, ...]:
        """The token each shard begins with, and the stream's length."""
        return tuple(self._starts)

    def locate(self, index: int) -> tuple[Path, int]:
        """Shard that holds token `index` of the stream, and the token's offset in that shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"token {index:,} of a stream of {len(self):,}")
        shard = bisect_right(self._starts, index) - 1
        return self.paths[shard], index - self._starts[shard]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy of tokens [start, stop), in the stored dtype; the range may span shards.

        Raises:
            IndexError: the range is not within the stream.
            UserError: a shard has vanished or shrunk since the data set was opened.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start:,}, {stop:,}) of a stream of {len(self):,}")
        result = np.empty(stop - start, self.dtype)
        done = 0
        while done < len(result):
            shard = bisect_right(self._starts, start + done) - 1
            offset = start + done - self._starts[shard]
            count = min(self.headers[shard].tokens - offset, len(result) - done)
            self._fill(shard, offset, result[done : done + count])
            done += count
        return result

    def _fill(self, shard: int, offset: int, out: np.ndarray) -> None:
        position = self.headers[shard].offset + offset * out.itemsize
        try:
            view = out.data.cast("B")
            file = self._open(self.paths[shard])
            while view:
                with file.turn:
                    read = read_at(file.descriptor, view, position)
                if read == 0:
                    raise OSError(errno.EIO, "it ends early")
                view, position = view[read:], position + read
        except OSError as error:
            raise UserError(
                f"cannot read shard {self.paths[shard]}: {error.strerror}; was it changed while in use?"
            ) from error


@dataclass(frozen=True)
class Dataset:
    """A directory of shards, opened by `open_dataset`.

    Attributes:
        directory: the data set's directory.
        train: training tokens.
        val: validation tokens; no document is in both.
        manifest: None for shards made by another program.
        fingerprint: identity of the tokens, wherever the directory is.
        vocab_size: ids are below it; None where nothing says so.
    """

    directory: Path
    train: TokenStream
    val: TokenStream
    manifest: Manifest | None
    fingerprint: str
    vocab_size: int | None

    def at(self, directory: Path) -> Dataset:
        """The same data set where another process has it, without a look at it."""
        streams = (TokenStream([directory / p.name for p in s.paths], s.headers) for s in (self.train, self.val))
        return replace(self, directory=directory, train=next(streams), val=next(streams))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards; GPT-2's where no manifest says so and ids are uint16."""
        if self.manifest is not None:
            return tokenizer_from_dict(self.manifest.tokenizer)
        if self.train.dtype.itemsize != 2:
            raise UserError(f"{self.directory} holds uint32 ids: not GPT-2's, and no manifest names whose")
        return gpt2_tokenizer()


def outline(directory: Path) -> str:
    """What tells two copies of a data set apart without opening a shard: its manifest, or its files' names and sizes.

    Raises:
        UserError: they cannot be read.
    """
    try:
        if (directory / MANIFEST_NAME).exists():
            return hashlib.sha256(read_plain(directory / MANIFEST_NAME)).hexdigest()
        return foreign_fingerprint(sorted((file.name, file.stat().st_size) for file in directory.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read the data set {directory}: {error.strerror}") from None


def makers_command(directory: Path) -> str:
    """The command that makes a data set, which the name of its directory tells."""
    name = directory.name
    if match := re.fullmatch(r"(fineweb|fineweb_edu)_(10B|100B|350B)", name):
        dataset = "" if match[1] == "fineweb_edu" else " --dataset fineweb"
        command = f"data/fineweb.py{dataset}" + ("" if match[2] == "10B" else f" --size {match[2]}")
    elif name in ("shakespeare", "shakespeare_char"):
        command = "data/shakespeare.py" + (" --tokenizer char" if name.endswith("char") else "")
    elif name == "pydocs":
        command = "data/pydocs.py"
    else:
        return f"`python data/fineweb.py --source FILES --out {directory}`"
    beside = "" if directory.parent.name == "data" else f" --out {directory}"
    return f"`python {command}{beside}`"


def open_dataset(directory: Path | str) -> Dataset:
    """Open a directory of shards for training, checking names, headers and sizes, not contents.

    Raises:
        UserError: the directory is missing, empty, unfinished or damaged, or lacks a split.
    """
    directory = Path(directory)
    if directory.is_file():
        raise UserError(
            f"--data {directory} is a file, not a directory of token shards; tokenize it first: `python "
            f"data/fineweb.py --source {directory} --out {directory.with_suffix('')}_tokens`"
        )
    if not directory.is_dir():
        raise UserError(f"data directory {directory} does not exist; {makers_command(directory)} makes it")
    manifest = None
    if (directory / MANIFEST_NAME).exists():
        manifest = load_manifest(directory / MANIFEST_NAME)
        splits = _manifest_paths(directory, manifest)
    elif parts := sorted(directory.glob("manifest.part-*.json")):
        raise UserError(
            f"{directory} holds {len(parts)} unmerged part(s); when all are done, run "
            f"`python data/fineweb.py merge {directory}`"
        )
    else:
        splits = _foreign_paths(directory)
    for split, paths in splits.items():
        if not paths:
            raise UserError(f"{directory} has no {split} shard; tokenize it again, or copy the missing files")
    headers = {path: read_header(path) for paths in splits.values() for path in paths}
    if len({header.dtype for header in headers.values()}) > 1:
        raise UserError(f"{directory} mixes uint16 and uint32 shards; keep one data set a directory")
    if manifest is not None:
        for entry in manifest.shards:
            header, where = headers[directory / entry.file], directory / entry.file
            if header.tokens != entry.tokens:
                raise UserError(
                    f"shard {where} holds {header.tokens:,} tokens, the manifest says "
                    f"{entry.tokens:,}; copy or tokenize it again"
                )
            if header.dtype.name != manifest.dtype:
                raise UserError(
                    f"shard {where} holds {header.dtype}, {directory / MANIFEST_NAME} says {manifest.dtype}"
                )
    streams = {s: TokenStream(paths, [headers[p] for p in paths]) for s, paths in splits.items()}
    for split, stream in streams.items():
        if len(stream) == 0:
            raise UserError(f"the {split} shards of {directory} hold no tokens; tokenize it again")
    return Dataset(
        directory=directory,
        train=streams["train"],
        val=streams["val"],
        manifest=manifest,
        fingerprint=(
            manifest.fingerprint
            if manifest is not None
            else foreign_fingerprint((p.name, headers[p].tokens) for s in splits.values() for p in s)
        ),
        vocab_size=manifest.tokenizer["n_vocab"] if manifest is not None else None,
    )


def _manifest_paths(directory: Path, manifest: Manifest) -> dict[str, list[Path]]:
    if not manifest.complete:
        raise UserError(
            f"the data set in {directory} is unfinished ({len(manifest.shards)} shards so far); run the "
            "command that makes it again, it continues where it stopped"
        )
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for entry in manifest.shards:
        splits[entry.split].append(directory / entry.file)
    return splits


def _foreign_paths(directory: Path) -> dict[str, list[Path]]:
    """Shards of a directory without a manifest, by the `train` or `val` in their names."""
    files = sorted(p for p in directory.iterdir() if p.suffix in (".npy", ".bin"))
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for path in files:
        if match := re.search(r"(?:^|[_-])(train|val)(?=[._-])", path.name):
            splits[match[1]].append(path)
    if not any(splits.values()):
        raise UserError(
            f"{directory} holds no shard (*_train_*.npy, *_val_*.bin, …); if it holds text, tokenize it: `python "
            f"data/fineweb.py --source '{directory}/*' --out {directory}_tokens`"
        )
    if len({path.suffix for paths in splits.values() for path in paths}) > 1:
        raise UserError(f"{directory} mixes .npy and .bin shards; keep one data set a directory")
    return splits
