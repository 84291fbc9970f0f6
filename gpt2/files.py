"""Files that are written whole or not at all, and what else files need: sync, lock, hash, a cache directory.

Whoever opens a file that this module writes sees the old content or the new one, never a part: the content goes to a
temporary sibling, `.NAME.PID.tmp`, which is synced to disk and renamed. What a kill leaves behind is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from gpt2.errors import UserError

TEMPORARY = ".tmp"
"""Ending of a temporary file's name, which begins with a dot."""


def temporary_sibling(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def create(path: Path) -> BinaryIO:
    """Open a new file for writing and reading, in place of what is there; a link there is removed, not followed.

    Raises:
        OSError: it could not be created.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, flags, 0o666), "w+b")


def finish(file: IO[Any], temporary: Path, path: Path, *, sync: bool = True) -> None:
    """Close a file that `create` opened as `temporary`, and give it its name.

    Args:
        file: holds its whole content.
        temporary: where it was opened.
        path: its name from now on; another file of that name is replaced.
        sync: survive a power cut, too.
    """
    file.flush()
    if sync:
        os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)
    if sync:
        sync_directory(path.parent)


@contextlib.contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write in the block, which appears at `path` when the block ends without an error.

    Args:
        path: its folder exists.
        sync: survive a power cut, too.

    Raises:
        OSError: it could not be written; what was at `path` is as it was.
    """
    temporary = temporary_sibling(path)
    try:
        with create(temporary) as file:
            yield file
            finish(file, temporary, path, sync=sync)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a file, whole or not at all; a `str` is written as UTF-8, lone surrogates included.

    Args:
        path: its folder exists.
        content: all of it.
        sync: survive a power cut, too.

    Raises:
        OSError: it could not be written; what was at `path` is as it was.
    """
    with whole_file(path, sync=sync) as file:
        file.write(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def sync_file(path: Path) -> None:
    """Bring a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the system lets one sync a directory."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def make_directory(directory: Path, flag: str) -> None:
    """Make a directory where it is missing.

    Args:
        directory: to make, with those above it.
        flag: the option that chooses another one, for the message.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another {flag}") from error
    if not os.access(directory, os.W_OK):
        raise UserError(f"cannot write to {directory}: permission denied; choose another {flag}")


def lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Claim an open file until it is closed or its process dies; False if another process holds it.

    True as well where the system or file system knows no locks.

    Args:
        file: to claim.
        shared: together with others who share it: readers, who only ask whether somebody writes.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def hash_file(file: IO[bytes]) -> Any:
    """The SHA-256 object of an open file's content from where it stands to its end."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest: str = hash_file(file).hexdigest()
    return digest


def cache_directory() -> Path:
    """Where downloads and token caches of this user go."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "repro-gpt2"
