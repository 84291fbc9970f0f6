"""Make a finished data set of a source of text: plan, continue what an earlier run left, tokenize, sum up."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gpt2.errors import UserError
from gpt2.files import TEMPORARY, lock, make_directory, open_own
from gpt2.prepare.download import Fetcher
from gpt2.prepare.job import Job, continued_manifest, new_manifest
from gpt2.prepare.shard_builder import Layout, ShardBuilder
from gpt2.prepare.sources import FileProblem
from gpt2.prepare.workers import Part, Unit, Units, Workers, assemble_units
from gpt2.progress import TokenProgress
from gpt2.tokens.fast_bpe import FastEncoder
from gpt2.tokens.manifest import Manifest, SourcePosition, load_manifest, save_manifest
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.tokens.verify import check_manifest


def prepare(job: Job, say: Callable[[str], None]) -> Manifest:
    """Make the data set, or what is missing of it.

    Args:
        job: what to make.
        say: prints a line that the user should see.

    Returns:
        The finished manifest.

    Raises:
        UserError: the directory holds something else, the source is damaged or gone, the disk is full; what is
            finished by then is kept, and the same call continues.
    """
    make_directory(job.directory, "--out")
    try:
        with _only_one(job.manifest_path):
            return _prepare(job, say)
    except KeyboardInterrupt:
        say("interrupted; finished shards are kept, and the same command continues")
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full in {job.directory}; make room and run the same command again") from error
        if error.filename is not None:
            raise UserError(f"cannot write to {job.directory}: {error.strerror} ({error.filename})") from error
        raise


def _prepare(job: Job, say: Callable[[str], None]) -> Manifest:
    scratch = job.directory / (".fetched" if job.part is None else f".fetched-{job.part.number:04d}")
    ahead = 2 + job.workers // 8  # a file takes a worker minutes to tokenize
    earlier = load_manifest(job.manifest_path) if job.manifest_path.exists() else None
    if earlier is not None:
        job = replace(job, source=job.source.after(earlier.source))
    with Fetcher(job.source, scratch, job.keep_downloads, ahead) as fetcher:
        if earlier is not None:
            manifest, compare = continued_manifest(job, earlier, say)
            missing = sorted({*_damaged_shards(job.directory, manifest, say), *compare})
            if manifest.complete and not missing:
                say(f"{job.directory} is complete and verified: {totals(manifest)}")
                return manifest
            save_manifest(job.manifest_path, earlier)  # with the shards that a kill left in lines behind it
        else:
            _refuse_strangers(job)
            manifest, missing = new_manifest(job, fetcher, say), []
            save_manifest(job.manifest_path, manifest)
        for name in (f"{_prefix(job)}_", f"{job.manifest_path.name}."):  # what a kill left
            for stale in job.directory.glob(f".{name}*{TEMPORARY}"):
                stale.unlink()
        if job.tokenizer == "gpt2" and not isinstance(gpt2_tokenizer().encode_fast, FastEncoder):
            say("the fast encoder is not exact with this tiktoken; tokenizing with tiktoken's own, which is slower")
        say(f"tokenizing in {job.workers} process{'es' if job.workers > 1 else ''}")
        with Workers(job.workers, manifest.tokenizer) as workers:
            for first, stop in _gaps(len(manifest.shards), missing, manifest.complete):
                manifest = _make_shards(job, manifest, fetcher, workers, first, stop)
            # Not before: while a rewritten file is being compared, its old time must tell the next run to do so again.
            manifest = replace(manifest, source=job.source.to_dict(), failed_file=None)
            save_manifest(job.manifest_path, manifest)
            if not manifest.complete:
                manifest = _make_shards(job, manifest, fetcher, workers, len(manifest.shards), None)
    say(f"{job.directory}: {totals(manifest)}")
    return manifest


def _prefix(job: Job) -> str:
    """Start of the training shards' names: disjoint between parts, in the order of the source."""
    part = f"_p{job.part.number:04d}" if job.part is not None else ""
    return f"{job.name}_train{part}"


def _make_shards(
    job: Job, manifest: Manifest, fetcher: Fetcher, workers: Workers, first: int, stop: int | None
) -> Manifest:
    """Write shards `first` to `stop` - 1, or to the end of the source."""
    with_val = job.part is None or job.part.number == 1
    validation = manifest.options.get("validation")
    if not validation:
        raise UserError(f"{job.manifest_path}: options.validation is missing; restore it, or choose another --out")
    layout = Layout(
        directory=job.directory,
        prefix=_prefix(job),
        val_prefix=f"{job.name}_val" if with_val else None,
        suffix=job.suffix,
        shard_tokens=job.shard_tokens,
        val_tokens=validation.get("tokens"),
        val_documents=validation.get("documents"),
        val_files=validation.get("files", 0),
        val_lines=validation.get("lines"),
        max_tokens=job.max_tokens,
    )
    start = manifest.shards[first - 1].next if first else SourcePosition()
    if start is None:  # the last shard of a finished data set, or one that was edited
        raise UserError(f"{job.manifest_path}: shards.{first - 1}.next is missing; restore it, or choose another --out")
    builder = ShardBuilder(layout, manifest, job.manifest_path, first, stop)
    part = job.part or Part()
    units = Units(job.source, part, fetcher, start)
    tokens_before, files = builder.total, len(job.source.files)
    progress: TokenProgress | None = None

    def report(unit: Unit, tokens: int) -> None:
        nonlocal progress
        if job.max_tokens is not None:
            unit = unit._replace(done=max(unit.done, tokens / job.max_tokens))
        if progress is None:
            progress = TokenProgress("tokenizing", unit.done, began=began)
        progress.update(tokens - tokens_before, unit.done, f"file {unit.place.file + 1} of {files}")

    began = TokenProgress.now()
    builder.clock = lambda: manifest.seconds + TokenProgress.now() - began
    try:
        assemble_units(workers, units, fetcher, builder, report)
    except FileProblem as error:
        file = job.source.files[error.number]
        kept = f"{len(builder.manifest.shards)} finished shards are kept"
        if file.path is None:
            raise UserError(f"{error}; {kept}") from error
        save_manifest(job.manifest_path, replace(builder.manifest, failed_file=file.name))
        raise UserError(f"{error}; replace the file and run the same command again: {kept}") from error
    finally:
        if progress is not None:
            progress.close()
    return builder.manifest


def _gaps(shards: int, missing: Sequence[int], complete: bool) -> Iterator[tuple[int, int | None]]:
    """Runs of shards to make again: (first, the next that is there, or None for to the end of the source)."""
    for first in missing:
        if first - 1 not in missing:
            stop = next(index for index in range(first, shards + 1) if index not in missing)
            yield first, None if complete and stop == shards else stop


def _damaged_shards(directory: Path, manifest: Manifest, say: Callable[[str], None]) -> list[int]:
    """Numbers of the manifest's shards that are missing or not what they should be.

    Of a finished data set all are read. Of one to be continued only the last is, which a crash may have left behind;
    the others' sizes are compared: reading terabytes again is left to `data/fineweb.py verify`.
    """
    damaged, done = [], 0
    progress = TokenProgress("verifying")
    total = max(sum(entry.tokens for entry in manifest.shards), 1)
    for index, check in enumerate(check_manifest(directory, manifest, sizes_before_last=not manifest.complete)):
        done += manifest.shards[index].tokens
        progress.update(done, done / total)
        if check.problem:
            damaged.append(index)
    progress.close()
    for index in damaged[:5]:
        say(f"{manifest.shards[index].file} is missing or damaged; making it again")
    return damaged


def _refuse_strangers(job: Job) -> None:
    """UserError where the directory holds shards of another origin."""
    directory = job.directory
    others = [p for p in directory.glob("manifest*.json") if job.part is None or ".part-" not in p.name]
    shards = [p for p in directory.iterdir() if p.suffix in (".npy", ".bin")]
    alone = not any(directory.glob("manifest.part-*.json"))
    if others or (shards and (job.part is None or alone)):
        found = (others or shards)[0].name
        raise UserError(f"{directory} holds {found}, which is of another origin; choose an empty directory with --out")


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock as long as this process makes what the manifest `path` describes."""
    with open_own(path.with_name(f".{path.name}.lock")) as file:
        if not lock(file):
            raise UserError(f"another process is at work in {path.parent}; wait for it, or end it")
        yield


def totals(manifest: Manifest) -> str:
    """One line: tokens and documents of a data set."""
    s = manifest.statistics()
    return (
        f"{s['train_tokens']:,} training and {s['val_tokens']:,} validation tokens, "
        f"{s['documents']:,} documents in {len(manifest.shards)} shards"
    )
