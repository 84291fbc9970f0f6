"""Files that have to be fetched before they are read: from the Hugging Face Hub, or decompressed.

Fetching runs ahead of reading by a few files, so workers do not wait and the disk holds no more than
those; a file goes when its last unit has been read. Every download is checked against the size and
the SHA-256 that the Hub has on record.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import itertools
import logging
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from gpt2.errors import UserError
from gpt2.files import sha256_file
from gpt2.prepare.documents import Contents, count_units
from gpt2.prepare.sources import (
    METADATA,
    Source,
    SourceFile,
    as_utf8_lines,
    decompress,
    kind_of,
    kinds_of,
    local_source,
    named_here,
    refuse_binary,
)
from gpt2.prepare.splits import resolve_splits

_ATTEMPTS = 6
RETRY_SECONDS = 1.0  # the first wait, on average; each is twice the one before
_REMEDY = "check the network and run the same command again, or give local files with --source"


class Address(NamedTuple):
    """What a user wrote for files on the Hub.

    Attributes:
        repo: "OWNER/NAME".
        revision: a branch, tag or commit; None: the repository's default branch.
        config: a configuration of its card; None: none was chosen.
        pattern: a glob, in which "*" also matches "/"; "*" and what ends in "/*" mean a whole data set.
    """

    repo: str
    revision: str | None
    config: str | None
    pattern: str

    def __str__(self) -> str:
        """As `parse_hub` reads it."""
        plain = self.revision and re.fullmatch(_REVISION, self.revision)
        revision = f"@{self.revision if plain else quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://datasets/{self.repo}{revision}" + (f":{self.config}" if self.config else f"/{self.pattern}")


_REVISION = r"refs/convert/\w+|refs/pr/\d+|[^/:@]+"


def parse_hub(address: str) -> Address | None:
    """Address of "OWNER/NAME[@REVISION][:CONFIG]", or "hf://datasets/" and that, or that and /PATH; None for others.

    A revision with a slash is written with %2F, except for the Hub's own refs/convert/... and refs/pr/N.
    """
    match = re.fullmatch(
        rf"(hf://datasets/)?(\w[\w.-]*/\w[\w.-]*)(?:@({_REVISION}))?(?::([^/]+)|/(.+))?", address.rstrip("/")
    )
    if match is None or (match[1] is None and (match[5] or kind_of(match[2]))):
        return None  # with no hf:// before it, anything longer, or named as a file, is a path
    pattern = match[5] or "*"
    if not re.search(r"[*?\[]", pattern) and kind_of(pattern) is None:
        pattern += "/*"  # a folder
    return Address(match[2], unquote(match[3]) if match[3] else None, match[4], pattern)


def find_source(
    addresses: Sequence[str],
    recorded: dict[str, Any] | None,
    out: Path | None = None,
    revision: str | None = None,
    column: str = "text",
    split_on: str = "",
) -> Source:
    """The files that the user named: paths on this machine, or one address on the Hub.

    Args:
        addresses: paths, globs, or one of what `parse_hub` takes. What exists here is a path.
        recorded: `source` of the manifest of an earlier run; spares the Hub the same question.
        out: directory of the shards, which are no source.
        revision: branch, tag or commit on the Hub, where the address gives none.
        column: the name of the texts in parquet and JSON.
        split_on: what divides documents in plain text; "": each file is one.
    """
    first = addresses[0]
    here = not first.startswith("hf://") and (
        len(addresses) > 1 or os.path.lexists(named_here(first)[0]) or bool(glob.glob(os.path.expanduser(first)))
    )
    address = None if here else parse_hub(first)
    if address is None:
        if revision is not None:
            raise UserError(f"--revision {revision} is of a data set on the Hub; {first} is none")
        return local_source(addresses, out, column).split(split_on)
    if len(addresses) > 1:
        raise UserError("--source: one address on the Hub at a time; a glob may name many of its files")
    if revision is not None:
        if address.revision not in (None, revision):
            raise UserError(f"--revision {revision} and {first} name two revisions; give one")
        address = address._replace(revision=revision)
    source = (hub_source_again(address, recorded) if recorded else None) or hub_source(address)
    return replace(source, column=column).split(split_on)


def hub_source(address: Address) -> Source:
    """Files of a data set on the Hub, pinned to the commit that its revision names now.

    Raises:
        UserError: no network, no such repository, no file that matches, or none to train on.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repo, pattern = address.repo, address.pattern
    # List only the folder that the pattern begins with: a repository may hold 100,000 files.
    folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]

    def listing() -> tuple[str, list[Any]]:
        api = HfApi()
        commit = str(api.dataset_info(repo, revision=address.revision).sha)
        found = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        return commit, [entry for entry in found if hasattr(entry, "size")]

    commit, entries = _with_retries(listing, f"list the files of {repo} on the Hugging Face Hub")
    found = {str(entry.path): entry for entry in entries if fnmatch.fnmatchcase(entry.path, pattern)}
    train = sorted(name for name in found if kind_of(name) is not None)
    unread = [(name, "not .parquet, .jsonl or .txt") for name in sorted(found.keys() - set(train))]
    prefix = folder + "/" if folder else ""
    if train and pattern == prefix + "*":  # a whole data set
        odd = [name for name in train if re.search(r"(^|/)[._]", name) or PurePosixPath(name).name in METADATA]
        unread += [(name, "hidden, or metadata") for name in odd]
        card = None
        if "README.md" in found:
            fetch = partial(hf_hub_download, repo, "README.md", repo_type="dataset", revision=commit)
            card = Path(_with_retries(fetch, f"read the card of {repo}")).read_text("utf-8", "replace")
        names = [name.removeprefix(prefix) for name in train if name not in odd]
        splits = resolve_splits(names, card, address.config, str(address).removesuffix("/*"))
    else:
        splits = resolve_splits([name.removeprefix(prefix) for name in train], None, None, str(address), named=True)
    train, validation = ([prefix + name for name in part] for part in splits[:2])
    unread += [(prefix + name, reason) for name, reason in splits.unread]
    if pattern == prefix + "*" and len(kinds := kinds_of(train)) > 1:
        raise UserError(
            f"{repo} holds {' and '.join(kinds)} files, which may be the same text; name those to read, as in "
            f"hf://datasets/{repo}/*{PurePosixPath(train[0]).suffix}"
        )
    if not train:
        raise UserError(f"{repo} at {commit[:12]} has no .parquet, .jsonl or .txt file that matches {pattern}")
    files = []
    for name in validation + train:
        entry = found[name]
        identity = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        files.append(SourceFile(name, entry.size, identity, *(kind_of(name) or ("", ""))))
    return Source(str(address), commit, tuple(files), tuple(unread), len(validation))


def hub_source_again(address: Address, recorded: dict[str, Any]) -> Source | None:
    """The files that a manifest recorded for `address`, without asking the Hub: a commit never changes.

    None where the manifest is of another source.
    """
    if recorded.get("description") != str(address):
        return None
    files = []
    for file in recorded["files"]:
        kind = kind_of(file["name"]) or ("", "")
        files.append(SourceFile(file["name"], file["size"], file["id"], *kind))
    return Source(str(address), recorded["revision"], tuple(files), validation=recorded.get("validation", 0))


class Fetcher:
    """Makes files of a source readable, a few ahead of the reader. Use in a `with` block.

    Args:
        source: the files' origin.
        scratch: directory for what is downloaded or decompressed.
        keep: leave downloads there after use.
        ahead: files fetched before they are asked for.
    """

    def __init__(self, source: Source, scratch: Path, keep: bool, ahead: int = 2) -> None:
        self._source = source
        self._scratch = scratch
        self._keep = keep
        self._ahead = ahead
        self._fetched: dict[int, Future[tuple[Path, Contents]]] = {}

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *error: object) -> None:
        # After a failure whole downloads stay, for the next run; what was decompressed is quickly made again.
        if error[0] is None and not self._keep:
            shutil.rmtree(self._scratch, ignore_errors=True)
        for plain in self._scratch.glob("*.plain*"):
            plain.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._scratch.rmdir()  # where nothing is left in it

    def start(self, indices: Iterable[int]) -> None:
        """Begin to fetch the first few files of `indices` that are not under way."""
        for index in itertools.islice(indices, self._ahead):
            if index not in self._fetched:
                future: Future[tuple[Path, Contents]] = Future()
                self._fetched[index] = future
                # A daemon, not a pool's thread: the program must be able to end in the middle of a download.
                threading.Thread(target=self._fulfil, args=(future, index), daemon=True).start()

    def ready(self, index: int) -> bool:
        """Whether `get` would return at once."""
        return index in self._fetched and self._fetched[index].done()

    def get(self, index: int) -> tuple[Path, Contents]:
        """An uncompressed local file with the content of file `index`, and its units."""
        self.start([index])
        return self._fetched[index].result()

    def release(self, index: int) -> None:
        """File `index` is not needed any more."""
        fetched = self._fetched.pop(index, None)
        if fetched is not None:
            path = fetched.result()[0]
            if path != self._source.files[index].path and not self._keep:
                path.unlink(missing_ok=True)

    def _fulfil(self, future: Future[tuple[Path, Contents]], index: int) -> None:
        try:
            future.set_result(self._fetch(index))
        except BaseException as error:
            future.set_exception(error)

    def _fetch(self, index: int) -> tuple[Path, Contents]:
        file = self._source.files[index]
        path = file.path or self._download(file)
        if file.compression:
            self._scratch.mkdir(parents=True, exist_ok=True)
            plain = self._scratch / f"{index:06d}.plain"
            decompress(path, plain)
            if file.path is None and not self._keep:
                path.unlink()
            path = plain
        if file.kind != "parquet":
            refuse_binary(path)
            plain = self._scratch / f"{index:06d}.plain.utf8"
            split_on = self._source.split_on if (kind_of(file.name) or ("",))[0] == "text" else ""
            if as_utf8_lines(path, file.kind, plain, split_on, self._source.column):
                if path != file.path and not (self._keep and not file.compression):
                    path.unlink()
                path = plain
        return path, count_units(path, file.kind, self._source.column)

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        address, revision = parse_hub(self._source.description), self._source.revision
        assert address is not None
        repo = address.repo
        cached = try_to_load_from_cache(repo, file.name, revision=revision, repo_type="dataset")
        path = self._scratch / file.name
        if isinstance(cached, str) and self._intact(file, Path(cached)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.symlink_to(Path(cached).absolute())  # `release` removes the link, not the file
            except FileExistsError:
                pass
            except OSError:  # a file system without links, or Windows, which reserves them
                shutil.copyfile(cached, path)
            return path
        if path.exists() and self._intact(file, path):
            return path  # kept from an earlier run

        def fetch() -> None:
            _quiet_hub()
            hf_hub_download(
                repo,
                file.name,
                repo_type="dataset",
                revision=revision,
                local_dir=self._scratch,
            )
            if not self._intact(file, path):
                path.unlink()
                raise OSError(f"{file.name} arrived damaged")

        _with_retries(fetch, f"download {file.name} of {repo}")
        return path

    @staticmethod
    def _intact(file: SourceFile, path: Path) -> bool:
        if path.stat().st_size != file.size:
            return False
        kind, _, digest = file.identity.partition(":")
        return kind != "sha256" or sha256_file(path) == digest


def _quiet_hub() -> None:
    """Keep the Hub's own bars and warnings off a console that shows ours."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _with_retries(action: Callable[[], Any], purpose: str) -> Any:
    """Do `action`, again after a growing wait where the network or the Hub failed, then give up."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise UserError(f"cannot {purpose}: HF_HUB_OFFLINE is set; {_REMEDY}") from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise UserError(f"cannot {purpose}: it does not exist, or needs a token (set HF_TOKEN)") from error
        except Exception as error:
            if not _is_networks(error):
                raise
            failure = error
        reason = str(failure).strip().split("\n")[0][:200] or type(failure).__name__
        status = getattr(getattr(failure, "response", None), "status_code", 500)
        if isinstance(failure, HfHubHTTPError) and status < 500 and status not in (408, 429):
            break  # what the Hub refuses now it will refuse again
        if attempt + 1 < _ATTEMPTS:
            wait = RETRY_SECONDS * 2**attempt * (0.5 + random.random())
            print(f"could not {purpose} ({reason}); trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise UserError(f"cannot {purpose} ({reason}); {_REMEDY}") from failure


def _is_networks(error: Exception) -> bool:
    """Whether an error is of the network or the Hub, not of the disk or the program."""
    if isinstance(error, OSError):
        disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        return not disk and error.filename is None
    # httpx's errors are no OSError, and of a class that changed from one version of the Hub's library to the next.
    return type(error).__module__.startswith(("httpx", "requests", "urllib3", "hf_xet"))
