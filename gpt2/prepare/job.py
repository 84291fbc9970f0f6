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
from gpt2.prepare.workers import Part, Units, Workers, characters_of_unit, tokenize_unit
from gpt2.tokens.manifest import MANIFEST_NAME, Manifest, SourcePosition, describe_tokenizer
from gpt2.tokens.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer
from gpt2.tokens.verify import part_manifest_name

_SMALL_SHARDS = 10  # a corpus of fewer shards gives 5 % of its documents, not a shard, to validation
_SMALL_PERCENT = 5
_FEW = 20  # documents: the fewest of which 5 % is one


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
    tokenizer: Tokenizer = gpt2_tokenizer() if job.tokenizer == "gpt2" else _characters(job, fetcher, say)
    described, dtype = describe_tokenizer(tokenizer)
    return Manifest(
        name=job.name,
        complete=False,
        source=job.source.to_dict(),
        tokenizer=described,
        dtype=dtype,
        options={**job.options(), "validation": _validation(job, fetcher, described)},
        part=(job.part.number, job.part.of) if job.part is not None else None,
    )


def _validation(job: Job, fetcher: Fetcher, tokenizer: dict[str, Any]) -> dict[str, int]:
    """How much of the source's beginning is for validation, as `Layout` takes it: {"tokens": n}, {"lines": n}, ...

    The validation split that the source names, of which --val-tokens may take a part; else what was asked for; else
    one shard; else, of a corpus that its files' sizes show to be smaller than ten shards, 5 % of its documents, or of
    `max_tokens`. Where documents are few, it is 5 % of their tokens, and may end within one.
    """
    files, tokens = job.source.files, job.val_tokens
    most = None if job.max_tokens is None else max(1, job.max_tokens * _SMALL_PERCENT // 100)
    if job.source.validation:
        tokens = most if tokens is None else tokens
        return {"files": job.source.validation, **({"tokens": tokens} if tokens is not None else {})}
    expected = sum(file.estimated_tokens() for file in files)
    if tokens is None and min(expected, job.max_tokens or expected) >= _SMALL_SHARDS * job.shard_tokens:
        tokens = job.shard_tokens
    if tokens is None and most is not None and job.max_tokens is not None and job.max_tokens < expected:
        tokens = most
    if len(files) < _FEW and all(file.kind == "text" for file in files):
        documents = len(files)
    elif tokens is not None:
        return {"tokens": tokens}  # by whole documents, without reading all to count them
    else:
        documents = 0
        for number, file in enumerate(files):
            fetcher.start(range(number, len(files)))
            documents += count_documents(fetcher.get(number)[0], file.kind, job.source.column)
    if documents >= _FEW:
        return {"documents": round(documents * _SMALL_PERCENT / 100)}
    if tokens is None:
        with Workers(job.workers, tokenizer) as workers:
            found = workers.run(Units(job.source, Part(), fetcher, SourcePosition()), tokenize_unit)
            tokens = round(sum(len(result[0]) for _, result in found) * _SMALL_PERCENT / 100)
    return {"lines": max(1, tokens)}


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


def continued_manifest(job: Job, manifest: Manifest, say: Callable[[str], None]) -> tuple[Manifest, list[int]]:
    """The manifest of an earlier run of the same job, and the shards that the source may not give any more.

    New files extend a data set: they follow those that it has been made of (`Source.after`), and its shards stay as
    they are. A file that was written since, though its size and ends are the same, has its shards compared.

    Returns:
        The manifest, unfinished where there are new files, and the numbers of shards to make again.

    Raises:
        UserError: what was asked for differs, naming it.
    """
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
        for k in ("description", "revision", "validation", "column", "split_on")
        if manifest.source.get(k) != source.get(k)
    ]
    before = {file["name"]: file for file in manifest.source.get("files", [])}
    after = {file["name"]: file for file in source["files"]}
    differences += [f"source file {name} is gone" for name in before if name not in after]
    added = [name for name in after if name not in before]
    if job.part is not None or differences:  # every part would have other files
        differences += [f"source file {name} is new" for name in added]
    rewritten = []
    for number, (name, file) in enumerate(before.items()):
        is_now = after.get(name, file)
        if name == manifest.failed_file or file.get("mtime_ns") not in (None, is_now.get("mtime_ns")):
            rewritten.append(number)
        if name != manifest.failed_file and [is_now[k] for k in ("size", "id")] != [file[k] for k in ("size", "id")]:
            differences.append(f"source file {name} has changed")
    if differences:
        more = f", and {len(differences) - 5} more differences" if len(differences) > 5 else ""
        raise UserError(
            f"{job.directory} was begun otherwise: {'; '.join(differences[:5])}{more}; run it as it was begun, "
            "or choose another --out"
        )
    compare = _shards_of(manifest, rewritten)
    if compare:
        names = ", ".join(list(before)[number] for number in rewritten[:5])
        say(f"written since: {len(rewritten)} files of the source ({names}); comparing {len(compare)} shards with them")
    shards = manifest.shards
    if added and manifest.complete and sum(entry.tokens for entry in shards) == job.max_tokens:
        say(f"{len(added)} new files are not read: --max-tokens is reached without them")
    elif added:
        say(f"{len(added)} new files follow those that {job.directory} was made of: {', '.join(added[:5])}")
        if manifest.complete:
            shards = (*shards[:-1], replace(shards[-1], next=SourcePosition(len(before))))
        manifest = replace(manifest, complete=False, shards=shards)
    return manifest, compare


def _shards_of(manifest: Manifest, files: list[int]) -> list[int]:
    """Numbers of the shards that hold tokens of the given files of the source."""
    found, start = [], SourcePosition()
    for number, entry in enumerate(manifest.shards):
        stop = entry.next or SourcePosition(len(manifest.source["files"]))
        if any(start.file <= file and SourcePosition(file) < stop for file in files):
            found.append(number)
        start = stop
    return found
