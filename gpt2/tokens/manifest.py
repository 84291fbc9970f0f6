"""What a data set says of itself: `manifest.json`, beside its shards.

It names the source and its revision, the tokenizer, and every finished shard with its counts, its
checksum and the place in the source where the next shard begins, so a killed tokenization continues
after the last finished shard. It is replaced atomically, so it is always whole.

While shards are still being made, each is a line behind `manifest.json.shards` instead: to write all of thousands of
entries after each of them would take seconds. Whoever reads the manifest reads these, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from gpt2.errors import LaterVersion, UserError
from gpt2.files import (
    FORBID,
    MAX_JSON_BYTES,
    Count,
    Number,
    Sha256,
    check,
    open_own,
    parse_json,
    read_plain,
    write_whole,
)
from gpt2.tokens.tokenizer import Tokenizer, check_tokenizer, tokenizer_to_dict

MANIFEST_NAME = "manifest.json"
_VERSION = 1
MAX_PARTS = 9999
"""Parts a data set may be made in: their numbers have four digits in file names."""


class SourcePosition(NamedTuple):
    """A place in the source: `skip` tokens into unit `unit` of file number `file`."""

    file: Count = 0
    unit: Count = 0
    skip: Count = 0


@dataclass(frozen=True)
class _SourceFile:
    """What an entry of `source.files` holds; small data sets give no size, earlier versions no time."""

    name: str
    id: str | None = None
    size: Count = 0
    mtime_ns: int | None = None


@dataclass(frozen=True)
class _Source:
    """What `source` holds."""

    description: str = ""
    revision: str | None = None
    files: tuple[_SourceFile, ...] = ()
    validation: Count = 0
    column: str = "text"
    split_on: str = ""


@dataclass(frozen=True)
class _Options:
    """What `options` holds; see `gpt2.prepare.job`."""

    __pydantic_config__ = FORBID

    suffix: Literal[".npy", ".bin"] | None = None
    shard_tokens: Count | None = None
    val_tokens: Count | None = None
    max_tokens: Count | None = None
    validation: dict[Literal["tokens", "documents", "files", "lines"], Count] | None = None


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
        open_document: tokens so far of its last document, which the next shard may continue; -1: none is open.
        lengths: histogram of the documents that end in it, in tokens without the end-of-text token,
            by the lower edge of their bin; see `length_bin`.
        skipped: documents left out because they were null or empty.
        replaced: documents whose invalid UTF-8 became U+FFFD.
        next: where in the source the next shard begins; None where there is no source to return to.
    """

    __pydantic_config__ = FORBID

    file: Annotated[str, Field(pattern=r"\A[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,250}\.(npy|bin)\z")]
    split: Annotated[str, Field(pattern=r"\A(train|val)\z")]
    tokens: Count
    documents: Count
    bytes: Count
    sha256: Sha256
    open_document: Annotated[int, Field(strict=True, ge=-1)] = -1
    lengths: dict[int, Count] = field(default_factory=dict)
    skipped: Count = 0
    replaced: Count = 0
    next: SourcePosition | None = None


@dataclass(frozen=True)
class Manifest:
    """A data set's description.

    Attributes:
        name: prefix of the shards' names.
        complete: False while shards are still being made.
        source: the text's origin: `description`, `revision`, and `files` with name, size, hash.
        tokenizer: see `tokenizer_to_dict`.
        dtype: "uint16" or "uint32".
        options: what else decides the shards' bytes, to be the same when a run is continued.
        shards: in the order of the source.
        part: (i, n) where this is the i-th of n parts, made one by one and merged later.
        failed_file: file of the source that stopped the last run; it may differ when the run is continued.
        seconds: time spent tokenizing, over all runs that made these shards.
    """

    __pydantic_config__ = FORBID

    name: Annotated[str, Field(pattern=r"\A[^/\\\x00-\x1f\x7f]{0,200}\z")]
    complete: Annotated[bool, Field(strict=True)]
    source: dict[str, Any]
    tokenizer: dict[str, Any]
    dtype: Annotated[str, Field(pattern=r"\Auint(16|32)\z")]
    options: dict[str, Any] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    part: tuple[Count, Count] | None = None
    failed_file: str | None = None
    seconds: Annotated[Number, Field(ge=0)] = 0.0

    def check(self, where: str) -> None:
        """Look at the parts that are plain dicts, and at what the fields say of each other.

        Args:
            where: the manifest's path, for the message.

        Raises:
            UserError: they are not what they should be.
        """

        def require(holds: bool, problem: str) -> None:
            if not holds:
                raise UserError(f"{where}: {problem}")

        ids = check_tokenizer(self.tokenizer, f"{where}: tokenizer").n_vocab
        source = check(self.source, _Source, f"{where}: source")
        check(self.options, _Options, f"{where}: options")
        require(ids <= 2**16 or self.dtype == "uint32", f"dtype is {self.dtype}; {ids} ids need uint32")
        part, of = self.part or (1, 1)
        require(1 <= part <= of <= MAX_PARTS, f"part is [{part}, {of}]; it must be [i, n], 1 ≤ i ≤ n ≤ {MAX_PARTS}")
        names: set[str] = set()
        place = SourcePosition()
        for number, shard in enumerate(self.shards):
            require(shard.file.lower() not in names, f"shards.{number}.file is {shard.file}, as is an earlier one's")
            names.add(shard.file.lower())
            if shard.next is not None:
                said = f"shards.{number}.next is {list(shard.next)}"
                require(shard.next >= place, f"{said}; the shard before it ends at {list(place)}")
                require(shard.next.file <= len(source.files), f"{said}; the source has {len(source.files)} files")
                place = shard.next

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


def _appended(path: Path) -> Path:
    """Where the shards are listed that were finished since a manifest was written."""
    return path.with_name(f"{path.name}.shards")


def append_shard(path: Path, manifest: Manifest) -> None:
    """Bring a manifest that `save_manifest` wrote up to date with its last shard, which is new."""
    number, entry = len(manifest.shards) - 1, dataclasses.asdict(manifest.shards[-1])
    line = json.dumps({"number": number, "seconds": manifest.seconds, "shard": entry}, ensure_ascii=False)
    with BufferedWriter(open_own(_appended(path))) as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _read_appended(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `append_shard`; a last one that a kill has torn is none, and its shard is made again."""
    try:
        text = read_plain(_appended(path), MAX_JSON_BYTES)
    except FileNotFoundError:
        return []
    where = str(_appended(path))
    return [check(parse_json(line, where), dict[str, Any], where) for line in text.split(b"\n")[:-1]]


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to `path`; whoever reads sees the old file or the new one, never a part."""
    content = {"format": "gpt2-shards", "version": _VERSION, **dataclasses.asdict(manifest)}
    if manifest.complete:
        content["statistics"] = manifest.statistics()
    data = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n"
    write_whole(path, data)
    _appended(path).unlink(missing_ok=True)  # after a kill in between, its lines are of shards that the file has, too


def load_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        LaterVersion: a later version of this program wrote it.
        UserError: it cannot be read, or does not hold what a manifest must.
    """
    try:
        content = parse_json(read_plain(path, MAX_JSON_BYTES), str(path))
        if not isinstance(content, dict) or content.get("format") != "gpt2-shards":
            raise UserError(f"{path} is not a manifest of this program: it has no format 'gpt2-shards'")
        version = check(content.get("version"), Count, f"{path} is not a manifest of this program: its version")
        if version > _VERSION:
            raise LaterVersion(f"{path} is of version {version}; this program reads up to {_VERSION}: update it")
        fields = {name: value for name, value in content.items() if name not in ("format", "version", "statistics")}
        missing = {f.name for f in dataclasses.fields(Manifest)} - fields.keys()
        if missing:
            raise UserError(f"{path}: {min(missing)} is missing")
        if not fields["complete"] and isinstance(fields["shards"], list):
            for line in _read_appended(path):
                if line.get("number") == len(fields["shards"]):
                    fields["shards"].append(line.get("shard"))
                    fields["seconds"] = line.get("seconds")
        manifest = check(fields, Manifest, str(path))
        manifest.check(str(path))
    except LaterVersion:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{error}; restore it, or tokenize again into an empty directory") from None
    return manifest


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
