"""Data sets small enough to be tokenized in memory: written at once, found again by the script that made them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.errors import UserError
from gpt2.files import make_directory
from gpt2.tokens.dataset import SHARD_TOKENS, Dataset, open_dataset
from gpt2.tokens.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    describe_tokenizer,
    length_bin,
    load_manifest,
    save_manifest,
)
from gpt2.tokens.shard_file import ShardWriter
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.tokens.verify import check_manifest


def write_dataset(
    directory: Path | str,
    train_tokens: np.ndarray | list[int],
    val_tokens: np.ndarray | list[int],
    tokenizer: Tokenizer,
    *,
    name: str = "tokens",
    source: dict[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    suffix: str = ".npy",
) -> Dataset:
    """Write tokens held in memory as a complete data set, and open it.

    Args:
        directory: made where it is missing; must not hold another finished data set.
        train_tokens: 1-D, ids below `tokenizer.n_vocab`.
        val_tokens: 1-D, ids below `tokenizer.n_vocab`; becomes shard 0.
        tokenizer: goes into the manifest.
        name: prefix of the shards' names.
        source: the text's origin, for the manifest.
        shard_tokens: tokens a training shard.
        suffix: ".npy" or ".bin".

    Raises:
        UserError: the directory holds another data set, or a split is empty.
    """
    directory = Path(directory)
    path = _open_directory(directory)
    if path.exists() and load_manifest(path).complete:
        raise UserError(f"{directory} holds a finished data set; choose another directory or delete it")
    described, dtype = describe_tokenizer(tokenizer)
    manifest = Manifest(name, False, source or {}, described, dtype)
    save_manifest(path, manifest)  # unfinished: whoever opens the directory now is told so
    splits = {"val": np.asarray(val_tokens), "train": np.asarray(train_tokens)}
    places = [("val", 0), *(("train", start) for start in range(0, max(len(splits["train"]), 1), shard_tokens))]
    shards = []
    for index, (split, start) in enumerate(places):
        stop = start + shard_tokens if split == "train" else len(splits["val"])
        tokens = splits[split][start:stop]
        if tokens.ndim != 1 or not tokens.size:
            raise UserError(f"no {split} tokens to write to {directory}; give more text")
        if not 0 <= tokens.min() <= tokens.max() < tokenizer.n_vocab:
            raise ValueError(f"{split} tokens are not ids below {tokenizer.n_vocab}")
        shard_path = directory / f"{name}_{split}_{index:06d}{suffix}"
        with ShardWriter(shard_path, dtype, len(tokens)) as writer:
            writer.append(tokens)
            writer.finish()
        shards.append(_entry_in_memory(shard_path.name, split, splits[split], start, stop, tokenizer, writer.sha256))
    save_manifest(path, replace(manifest, complete=True, shards=tuple(shards)))
    return open_dataset(directory)


def _open_directory(directory: Path) -> Path:
    """Where the manifest of a directory, made where it is missing, is or will be."""
    make_directory(directory, "--out")
    path = directory / MANIFEST_NAME
    if not path.exists() and any(p.suffix in (".npy", ".bin") for p in directory.iterdir()):
        raise UserError(f"{directory} holds shards of another origin; choose an empty directory")
    return path


def _entry_in_memory(
    file: str, split: str, tokens: np.ndarray, start: int, stop: int, tokenizer: Tokenizer, sha256: str
) -> ShardEntry:
    """Counts of the shard of `write_dataset` that holds `tokens[start:stop]` of a split's tokens."""
    separator = tokenizer.eot_token is not None
    starts = np.flatnonzero(tokens == tokenizer.eot_token) if separator else np.zeros(1, dtype=np.int64)
    ends = np.append(starts[1:], len(tokens))[: len(starts)]
    lengths: dict[int, int] = {}
    for length in (ends - starts - separator)[(start < ends) & (ends <= stop)]:
        edge = length_bin(int(length))
        lengths[edge] = lengths.get(edge, 0) + 1
    own = tokens[start:stop]
    documents = int(((start <= starts) & (starts < stop)).sum())
    text_bytes = len(tokenizer.decode_bytes(own[own != tokenizer.eot_token]))
    return ShardEntry(file, split, len(own), documents, text_bytes, sha256, -1, dict(sorted(lengths.items())))


def reusable(directory: Path, source: dict[str, Any], tokenizer: str, suffix: str) -> Manifest | None:
    """The manifest of a small data set that an earlier run of the same script finished; None where there is none.

    Raises:
        UserError: the directory holds another data set, or a damaged one, or cannot be written to.
    """
    path = _open_directory(directory)
    if not path.exists():
        return None
    manifest = load_manifest(path)
    if not manifest.complete:
        return None
    same = manifest.source.get("description") == source["description"] and manifest.tokenizer["name"] == tokenizer
    if not same or any(not entry.file.endswith(suffix) for entry in manifest.shards):
        raise UserError(
            f"{directory} holds another data set ({manifest.source.get('description')}); choose another --out"
        )
    for check in check_manifest(directory, manifest):
        if check.problem:
            raise UserError(f"{check.path}: {check.problem}; delete {directory} and make it again")
    return manifest
