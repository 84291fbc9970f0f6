"""What a data set says of itself: `manifest.json`, beside its shards.

It names the source and its revision, the tokenizer, and every finished shard with its counts, its
checksum and the place in the source where the next shard begins, so a killed tokenization continues
after the last finished shard. It is replaced atomically, so it is always whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.errors import UserError
from gpt2.files import write_whole
from gpt2.tokens.tokenizer import Tokenizer, tokenizer_to_dict

MANIFEST_NAME = "manifest.json"
_VERSION = 1


class Position(NamedTuple):
    """A place in the source: `skip` tokens into unit `unit` of file number `file`."""

    file: int = 0
    unit: int = 0
    skip: int = 0


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard.

    Attributes:
        file: name in the data set's directory.
        split: "train" or "val".
        tokens: tokens in it.
        documents: documents that begin in it.
        bytes: UTF-8 bytes of those documents' text.
        sha256: checksum of the whole file.
        open_document: tokens so far of its last document, with which the next shard may go on; -1: none is open.
        lengths: histogram of the documents that end in it, in tokens without the end-of-text token,
            by the lower edge of their bin; see `length_bin`.
        skipped: documents left out because they were null or empty.
        replaced: documents whose invalid UTF-8 became U+FFFD.
        next: where in the source the next shard begins; None where there is no source to return to.
    """

    file: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    open_document: int = -1
    lengths: dict[int, int] = field(default_factory=dict)
    skipped: int = 0
    replaced: int = 0
    next: Position | None = None


@dataclass(frozen=True)
class Manifest:
    """A data set's description.

    Attributes:
        name: prefix of the shards' names.
        complete: False while shards are still being made.
        source: where the text is from: `description`, `revision`, and `files` with name, size, hash.
        tokenizer: see `tokenizer_to_dict`.
        dtype: "uint16" or "uint32".
        options: what else decides the shards' bytes, to be the same when a run is continued.
        shards: in the order of the source.
        part: (i, n) where this is the i-th of n parts, made one by one and merged later.
        failed_file: file of the source that stopped the last run; it may differ when the run is continued.
        seconds: time spent tokenizing, over all runs that made these shards.
    """

    name: str
    complete: bool
    source: dict[str, Any]
    tokenizer: dict[str, Any]
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    part: tuple[int, int] | None = None
    failed_file: str | None = None
    seconds: float = 0.0

    @property
    def eot_token(self) -> int | None:
        """The id that begins each document, or None."""
        token: int | None = self.tokenizer.get("eot_token")
        return token

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens: the tokenizer, and each shard's split, count and checksum."""
        shards = [[s.split, s.tokens, s.sha256] for s in self.shards]
        return _fingerprint([self.tokenizer.get("sha256"), self.dtype, shards])

    def statistics(self) -> dict[str, Any]:
        """Totals over the shards, and percentiles of the documents' lengths (to about 2 %)."""
        tokens = sum(s.tokens for s in self.shards)
        documents = sum(s.documents for s in self.shards)
        text_bytes = sum(s.bytes for s in self.shards)
        lengths = merge_lengths(s.lengths for s in self.shards)
        result: dict[str, Any] = {
            "documents": documents,
            "tokens": tokens,
            "train_tokens": sum(s.tokens for s in self.shards if s.split == "train"),
            "val_tokens": sum(s.tokens for s in self.shards if s.split == "val"),
            "bytes": text_bytes,
            "bytes_per_token": round(text_bytes / tokens, 4) if tokens else None,
            "skipped_documents": sum(s.skipped for s in self.shards),
            "replaced_documents": sum(s.replaced for s in self.shards),
            "document_tokens": {f"p{p}": percentile(lengths, p) for p in (1, 10, 50, 90, 99)},
        }
        if self.seconds > 0:
            result["tokens_per_second"] = round(tokens / self.seconds)
        return result


def describe_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """A manifest's `tokenizer` and `dtype`: the smallest that holds every id."""
    return tokenizer_to_dict(tokenizer), "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to `path`; whoever reads sees the old file or the new one, never a part."""
    content = {"format": "gpt2-shards", "version": _VERSION, **dataclasses.asdict(manifest)}
    if manifest.complete:
        content["statistics"] = manifest.statistics()
    data = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n"
    write_whole(path, data)


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. UserError where it is not one, or is of a later version."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        if content["format"] != "gpt2-shards":
            raise ValueError(f"format is {content['format']!r}")
        if content["version"] > _VERSION:
            raise UserError(
                f"{path} is of version {content['version']}; this program reads up to {_VERSION}: update it"
            )
        shards = tuple(_shard_from_dict(entry) for entry in content["shards"])
        fields = {f.name: content[f.name] for f in dataclasses.fields(Manifest)}
        part = tuple(content["part"]) if content["part"] else None
        return Manifest(**{**fields, "shards": shards, "part": part})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest of this program ({type(error).__name__}: {error}); "
            "restore it, or tokenize again into an empty directory"
        ) from error


def _shard_from_dict(entry: dict[str, Any]) -> ShardEntry:
    place = Position(*entry["next"]) if entry["next"] is not None else None
    lengths = {int(edge): int(count) for edge, count in entry["lengths"].items()}
    return ShardEntry(**{**entry, "next": place, "lengths": lengths})


def foreign_fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """Identity of a directory without a manifest: names and sizes of its shards."""
    return _fingerprint([list(item) for item in files])


def _fingerprint(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def length_bin(length: int) -> int:
    """Lower edge of the bin of a document of `length` tokens: exact below 64, then ≤ 1/32 wide."""
    drop = max(length.bit_length() - 6, 0)  # keep the six leading bits
    return length >> drop << drop


def merge_lengths(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Sum of histograms, in order of length."""
    total: dict[int, int] = {}
    for histogram in histograms:
        for edge, count in histogram.items():
            total[edge] = total.get(edge, 0) + count
    return dict(sorted(total.items()))


def percentile(lengths: Mapping[int, int], percent: float) -> int | None:
    """Middle of the bin that holds the given percentile of a histogram in order of length."""
    rank = sum(lengths.values()) * percent / 100
    for edge, count in lengths.items():
        rank -= count
        if rank <= 0:
            drop = max(edge.bit_length() - 6, 0)
            return edge + ((1 << drop) - 1) // 2
    return None
