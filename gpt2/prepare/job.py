"""What a user asks of a tokenization, the manifest it begins with, and whether an earlier one was asked the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2.errors import UserError
from gpt2.prepare.documents import count_documents
from gpt2.prepare.download import Fetcher
from gpt2.prepare.sources import Source
from gpt2.prepare.workers import Part, Units, Workers, characters_of_unit
from gpt2.tokens.manifest import MANIFEST_NAME, Manifest, SourcePosition, describe_tokenizer
from gpt2.tokens.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer
from gpt2.tokens.verify import part_manifest_name

_SMALL_SHARDS = 10  # a corpus of fewer shards gives 5 % of its documents, not a shard, to validation
_SMALL_PERCENT = 5


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        directory: directory that receives the shards.
        name: prefix of their names.
        source: the text.
        tokenizer: "gpt2" or "char".
        suffix: ".npy" or ".bin".
        shard_tokens: tokens a training shard.
        val_tokens: tokens of validation at least, by whole documents; None: see `_validation`.
        max_tokens: most tokens of all shards together; None: no limit.
        workers: processes.
        part: None for the whole source.
        keep_downloads: leave fetched files in the scratch directory.
    """

    directory: Path
    name: str
    source: Source
    tokenizer: str
    suffix: str
    shard_tokens: int
    val_tokens: int | None
    max_tokens: int | None
    workers: int
    part: Part | None
    keep_downloads: bool = False

    @property
    def manifest_path(self) -> Path:
        """The manifest of what this job makes."""
        return manifest_path(self.directory, self.part)

    def options(self) -> dict[str, Any]:
        """What decides the shards' bytes beside source and tokenizer."""
        return {
            "suffix": self.suffix,
            "shard_tokens": self.shard_tokens,
            "val_tokens": self.val_tokens,
            "max_tokens": self.max_tokens,
        }


def manifest_path(directory: Path, part: Part | None) -> Path:
    """The path of the manifest of a data set, or of one part of it."""
    return directory / (MANIFEST_NAME if part is None else part_manifest_name(part.number, part.of))


def new_manifest(job: Job, fetcher: Fetcher, say: Callable[[str], None]) -> Manifest:
    """The manifest of a data set of which nothing is made."""
    validation = _validation(job, fetcher)
    tokenizer: Tokenizer = gpt2_tokenizer() if job.tokenizer == "gpt2" else _characters(job, fetcher, say)
    described, dtype = describe_tokenizer(tokenizer)
    return Manifest(
        name=job.name,
        complete=False,
        source=job.source.to_dict(),
        tokenizer=described,
        dtype=dtype,
        options={**job.options(), "validation": validation},
        part=(job.part.number, job.part.of) if job.part is not None else None,
    )


def _validation(job: Job, fetcher: Fetcher) -> dict[str, int]:
    """How much of the source's beginning is for validation: {"tokens": n}, {"documents": n} or {"files": n}.

    The validation split that the source names, of which --val-tokens may take a part; else what was asked for; else
    one shard; else, of a corpus that its files' sizes show to be smaller than ten shards, 5 % of its documents, or of
    `max_tokens`.
    """
    if job.source.validation:
        tokens = job.val_tokens
        if tokens is None and job.max_tokens is not None:
            tokens = max(1, job.max_tokens * _SMALL_PERCENT // 100)
        return {"files": job.source.validation, **({"tokens": tokens} if tokens is not None else {})}
    if job.val_tokens is not None:
        return {"tokens": job.val_tokens}
    expected = sum(file.estimated_tokens() for file in job.source.files)
    if min(expected, job.max_tokens or expected) >= _SMALL_SHARDS * job.shard_tokens:
        return {"tokens": job.shard_tokens}
    if job.max_tokens is not None and job.max_tokens < expected:
        return {"tokens": max(1, job.max_tokens * _SMALL_PERCENT // 100)}
    documents = 0
    for number, file in enumerate(job.source.files):
        fetcher.start(range(number, len(job.source.files)))
        documents += count_documents(fetcher.get(number)[0], file.kind)
    if documents < 2:
        raise UserError(
            f"the source holds {documents} document(s), of which none can be set aside for validation; a plain-text "
            "file is one document, so cut it into several files, or give JSON lines with one document each"
        )
    return {"documents": max(1, round(documents * _SMALL_PERCENT / 100))}


def _characters(job: Job, fetcher: Fetcher, say: Callable[[str], None]) -> CharTokenizer:
    """The vocabulary of all characters of the source, read once for the purpose."""
    if job.part is not None:
        raise UserError("--part with --tokenizer char: parts would not know each other's characters; make it in one")
    characters: set[str] = set()
    with Workers(job.workers, None) as workers:
        units = Units(job.source, Part(), fetcher, SourcePosition())
        for unit, found in workers.run(units, characters_of_unit):
            characters |= found
            if unit.last:
                fetcher.release(unit.place.file)
    if not characters:
        raise UserError("the source holds no text; look at its files and their 'text' columns")
    say(f"{len(characters):,} distinct characters")
    return CharTokenizer("".join(sorted(characters)))


def continued_manifest(job: Job, manifest: Manifest) -> Manifest:
    """The manifest of an earlier run of the same job. UserError naming what differs."""
    old = {k: v for k, v in manifest.options.items() if k != "validation"}
    now: dict[str, Any] = job.options()
    differences = [f"{k} was {old.get(k)}, now {now[k]}" for k in now if old.get(k) != now[k]]
    if manifest.name != job.name:
        differences.append(f"name was {manifest.name}, now {job.name}")
    if manifest.tokenizer["name"] != job.tokenizer:
        differences.append(f"tokenizer was {manifest.tokenizer['name']}, now {job.tokenizer}")
    source = job.source.to_dict()
    differences += [
        f"{k} was {manifest.source.get(k)}, now {source.get(k)}"
        for k in ("description", "revision", "validation")
        if manifest.source.get(k) != source.get(k)
    ]
    before = {file["name"]: file for file in manifest.source.get("files", [])}
    after = {file["name"]: file for file in source["files"]}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and (name != manifest.failed_file or name not in after):
            change = "is gone" if name not in after else "is new" if name not in before else "has changed"
            differences.append(f"source file {name} {change}")
    if differences:
        more = f", and {len(differences) - 5} more differences" if len(differences) > 5 else ""
        raise UserError(
            f"{job.directory} was begun otherwise: {'; '.join(differences[:5])}{more}; run it as it was begun, "
            "or choose another --out"
        )
    return replace(manifest, source=source, failed_file=None)
