"""Check shards against what their manifest says of them, and join the manifests of parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpt2.errors import UserError
from gpt2.files import open_plain
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.manifest import MANIFEST_NAME, Manifest, ShardEntry, load_manifest, save_manifest
from gpt2.tokens.shard_file import read_header

_BLOCK_TOKENS = 1 << 21
SHORTEST_SPLIT = 65
"""Tokens that the shortest sequence of any preset and its last target take; no preset can use a smaller split."""


@dataclass(frozen=True)
class ShardCheck:
    """What was found in a shard.

    Attributes:
        path: the shard.
        tokens: the file's tokens; 0 where it cannot be read.
        documents: end-of-text tokens in it, 0 for a tokenizer without one.
        largest: largest id, -1 where there is none.
        problem: "" where all is as it should be.
    """

    path: Path
    tokens: int = 0
    documents: int = 0
    largest: int = -1
    problem: str = ""


def part_manifest_name(number: int, of: int) -> str:
    """Name of the manifest of one part of a data set."""
    return f"manifest.part-{number:04d}-of-{of:04d}.json"


def manifests_of(directory: Path) -> list[Path]:
    """The manifest of a directory, or those of its unmerged parts."""
    whole = directory / MANIFEST_NAME
    return [whole] if whole.exists() else sorted(directory.glob("manifest.part-*.json"))


def check_shard(
    path: Path,
    entry: ShardEntry | None,
    n_vocab: int | None,
    eot: int | None,
    begins_document: bool = False,
    dtype: str | None = None,
    size_only: bool = False,
) -> ShardCheck:
    """Read a whole shard, or only its header and size, and compare it with its entry.

    Args:
        path: the shard.
        entry: None for a shard of another program, of which only header and ids are checked.
        n_vocab: ids must be below it; None for no limit.
        eot: id that begins a document; None where there is none.
        begins_document: its first token must be `eot`, because it begins a split.
        dtype: that its manifest gives; None: any.
        size_only: leave the content alone.
    """
    try:
        header = read_header(path)
    except UserError as error:
        return ShardCheck(path, problem=str(error).removeprefix(f"shard {path} "))
    if dtype is not None and header.dtype.name != dtype:
        return ShardCheck(path, header.tokens, problem=f"holds {header.dtype.name}, the manifest says {dtype}")
    if entry is not None and header.tokens != entry.tokens:
        return ShardCheck(path, header.tokens, problem=f"{header.tokens:,} tokens, the manifest says {entry.tokens:,}")
    if size_only:
        return ShardCheck(path, header.tokens)
    digest = hashlib.sha256()
    documents, largest, first = 0, -1, None
    try:
        with open_plain(path) as file:
            digest.update(file.read(header.offset))
            while data := file.read(_BLOCK_TOKENS * header.dtype.itemsize):
                digest.update(data)
                tokens = np.frombuffer(data, header.dtype)
                largest = max(largest, int(tokens.max()))
                first = int(tokens[0]) if first is None else first
                if eot is not None:
                    documents += int(np.count_nonzero(tokens == eot))
    except OSError as error:
        return ShardCheck(path, header.tokens, problem=f"cannot be read: {error.strerror}")
    found = ShardCheck(path, header.tokens, documents, largest)
    if entry is not None and digest.hexdigest() != entry.sha256:
        return replace(found, problem="checksum differs: the file was altered")
    if n_vocab is not None and largest >= n_vocab:
        return replace(found, problem=f"holds id {largest}, the vocabulary has {n_vocab}")
    if entry is not None and eot is not None and documents != entry.documents:
        return replace(found, problem=f"{documents:,} end-of-text tokens for {entry.documents:,} documents")
    if begins_document and eot is not None and first != eot:
        return replace(found, problem="a document straddles two splits: the shard begins inside one")
    return found


def check_manifest(directory: Path, manifest: Manifest, sizes_before_last: bool = False) -> Iterator[ShardCheck]:
    """Check all shards of a manifest, several at a time; results in the manifest's order.

    Args:
        directory: that holds them.
        manifest: that names them.
        sizes_before_last: only the last shard is read whole; of the others, header and size are looked at.
    """
    seen: set[str] = set()
    jobs: list[Callable[[], ShardCheck]] = []
    for entry in manifest.shards:
        begins = entry.split not in seen
        seen.add(entry.split)
        size_only = sizes_before_last and entry is not manifest.shards[-1]
        jobs.append(_shard_job(directory / entry.file, entry, manifest, begins, size_only))
    yield from _run_threads(jobs)


def check_foreign(paths: Sequence[Path], n_vocab: int | None, eot: int | None) -> Iterator[ShardCheck]:
    """Check headers and ids of shards that have no manifest."""
    yield from _run_threads([_foreign_job(path, n_vocab, eot) for path in paths])


def _shard_job(
    path: Path, entry: ShardEntry, manifest: Manifest, begins: bool, size_only: bool
) -> Callable[[], ShardCheck]:
    n_vocab, eot = manifest.tokenizer["n_vocab"], manifest.eot_token
    return lambda: check_shard(path, entry, n_vocab, eot, begins, manifest.dtype, size_only)


def _foreign_job(path: Path, n_vocab: int | None, eot: int | None) -> Callable[[], ShardCheck]:
    return lambda: check_shard(path, None, n_vocab, eot)


def _run_threads(jobs: Iterable[Callable[[], ShardCheck]]) -> Iterator[ShardCheck]:
    # Hashing and NumPy release the interpreter lock; more threads than this would only fight for the disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda job: job(), jobs)


def check_opens(directory: Path) -> str:
    """Why training would refuse a whole data set whose shards are sound; "" where it would not."""
    try:
        dataset = open_dataset(directory)
        dataset.tokenizer()
    except UserError as error:
        return str(error)
    for name, split in (("val", dataset.val), ("train", dataset.train)):
        if dataset.manifest is not None and len(split) < SHORTEST_SPLIT:
            return (
                f"the {name} split of {directory} has {len(split)} tokens, too few for one sequence; tokenize more text"
            )
    return ""


def merge_parts(directory: Path) -> Manifest:
    """Write the common manifest of a data set that was made in parts.

    Raises:
        UserError: a part is missing or unfinished, or parts are not of one data set.
    """
    paths = sorted(directory.glob("manifest.part-*.json"))
    if not paths:
        raise UserError(f"{directory} holds no manifest.part-*.json; make the parts first, with --part I/N")
    parts = [load_manifest(path) for path in paths]
    first = parts[0]
    count = first.part[1] if first.part else 0
    for path, part in zip(paths, parts, strict=True):
        for what in ("name", "source", "tokenizer", "dtype", "options"):
            values = [getattr(of, what) for of in (part, first)]
            if what == "source":  # a copy on another machine may have another time
                values = [{**v, "files": [{**f, "mtime_ns": None} for f in v.get("files", [])]} for v in values]
            if values[0] != values[1]:
                raise UserError(f"{path.name} and {paths[0].name} differ in their {what}; make the parts alike")
        if part.part is None or part.part[1] != count:
            raise UserError(f"{path.name} is not one of {count} parts; remove what is left of another division")
    missing = sorted(set(range(1, count + 1)) - {part.part[0] for part in parts if part.part})
    unfinished = [part.part[0] for part in parts if part.part and not part.complete]
    if missing or unfinished:
        numbers = ", ".join(map(str, (missing + unfinished)[:10]))
        raise UserError(
            f"{directory}: of {count} parts {len(missing)} are missing, {len(unfinished)} unfinished; "
            f"run --part {numbers}"
        )
    shards = tuple(entry for part in sorted(parts, key=lambda p: p.part or (0, 0)) for entry in part.shards)
    for entry in shards:
        if read_header(directory / entry.file).tokens != entry.tokens:
            raise UserError(f"{entry.file} is not what its part's manifest says; run that part again")
    for split in ("val", "train"):
        if not any(entry.split == split for entry in shards):
            raise UserError(
                f"{directory} would have no {split} shard: validation is the beginning of part 1, in whole documents; "
                "make it again in fewer parts, or with another --val-tokens"
            )
    merged = replace(first, part=None, shards=shards, complete=True, seconds=sum(part.seconds for part in parts))
    save_manifest(directory / MANIFEST_NAME, merged)
    return merged
