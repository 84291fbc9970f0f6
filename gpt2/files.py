"""Files that are written whole or not at all, and what else files need: sync, lock, hash, a cache directory.

Whoever opens a file that this module writes sees the old content or the new one, never a part: the content goes to a
temporary sibling, `.NAME.PID.tmp`, which is synced to disk and renamed. What a kill leaves behind is never read.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from gpt2.errors import UserError

T = TypeVar("T")

Count = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
"""A whole number of a file's schema, from 0 on."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number of a file's schema."""
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
"""A SHA-256 in a file's schema, in hexadecimal."""

MAX_JSON_BYTES = 1 << 28
"""No JSON file of ours or of a model comes near this size."""
_MAX_DEPTH = 32  # of brackets in brackets; our deepest file has 5
_MAX_DIGITS = 40  # of a whole number; more count as infinite

READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""With which a file is opened to be read as it is, by `os.open`: a FIFO in its place is not waited for."""

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
        temporary: the file's path until then.
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


def check_output(path: Path | None, flag: str) -> None:
    """Refuse, before the work, a file that could not be written after it; its folder is made.

    Args:
        path: a file to be written whole; None: nothing is.
        flag: the option that names it, for the message.

    Raises:
        UserError: there is something else of that name, or it cannot be written there.
    """
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{flag} {path} is a {'directory' if path.is_dir() else 'device or pipe'}; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_sibling(path)
        create(temporary).close()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror}; choose another file") from None


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file, or a link to one, for reading; anything else is refused at once, and never waited for.

    Raises:
        OSError: there is no such file, or it is a FIFO, a device, a directory.
    """
    return os.fdopen(_plain(os.open(path, READING), path), "rb")


def open_own(path: Path) -> FileIO:
    """Open a file of ours to append to, to read, or to lock; made where it is missing.

    Raises:
        OSError: it cannot be opened, or is a link, a FIFO, a device.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        return FileIO(_plain(os.open(path, flags, 0o666), path), "a+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a link, which is not followed"
        raise


def _plain(handle: int, path: Path) -> int:
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))


def read_plain(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A plain file's content.

    Args:
        path: the file, or a link to it.
        limit: bytes it may have.

    Raises:
        OSError: it is longer, not there, not a plain file, or cannot be read.
    """
    with open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def parse_json(content: bytes | str, where: str, nan: float | None = math.nan) -> Any:
    """JSON whose size, depth and numbers are bounded; lone surrogates are read as they are.

    Args:
        content: one JSON value.
        where: what errors call it.
        nan: what the words NaN and Infinity, which JSON lacks, are read as.

    Raises:
        UserError: it is not JSON, holds a number that is not finite, or brackets in brackets too deep.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8", "surrogatepass")
        value = json.loads(text, parse_int=_parse_int, parse_constant=lambda _: nan)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start:,})") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{where} is not JSON of ours: it nests brackets too deep") from None
    level = [("", value)]
    for _ in range(_MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, item in level:
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{where}: {name or 'it'} is not a finite number that fits into 64 bits")
            pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
            below += [(f"{name}.{key}" if name else str(key), child) for key, child in pairs]
        if not below:
            return value
        level = below
    raise UserError(f"{where} is not JSON of ours: it nests brackets too deep")


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def check(value: Any, schema: type[T], where: str) -> T:
    """The value as an object of `schema`.

    Args:
        value: what `parse_json` returned.
        schema: any type that pydantic knows, such as a dataclass; `__pydantic_config__ = FORBID` in it refuses fields
            it does not have.
        where: what errors call it, such as the file's path.

    Raises:
        UserError: naming the first field that is missing, unknown, or has a value it may not have.
    """
    try:
        checked: T = _adapter(schema).validate_python(value)  # type: ignore[arg-type]
        return checked
    except UserError as error:  # of a relation that a dataclass checks itself
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        field = ".".join(map(str, first["loc"])) or "it"
        rule = first["msg"].replace("Input should be", "it must be")
        problem = {"missing": f"{field} is missing", "extra_forbidden": f"{field} is unknown to this version"}.get(
            first["type"], f"{field} is {first['input']!r:.80}; {rule[:1].lower()}{rule[1:]}"
        )
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{where}: {problem}{more}") from None


FORBID: Any = {"extra": "forbid"}
"""`__pydantic_config__` of a schema that refuses fields it does not have."""


def read_json(path: Path, schema: type[T]) -> T:
    """What a JSON file holds, checked.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it cannot be read, or does not hold what it should; in one line with path, field and value.
    """
    try:
        content = read_plain(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return check(parse_json(content, str(path)), schema, str(path))


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


def lock(file: IO[Any] | FileIO, *, shared: bool = False) -> bool:
    """Claim an open file until it is closed or its process dies; False if another process holds it.

    True as well where the system or file system knows no locks.

    Args:
        file: to claim.
        shared: together with others who share it: readers, who only ask whether somebody writes.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock_on_windows(file: IO[Any] | FileIO) -> bool:
    """As `lock`; one reader excludes another, for the instant in which it asks."""
    import msvcrt

    handle = file.fileno()
    position = os.lseek(handle, 0, os.SEEK_CUR)
    # What is locked there cannot be read or written by others either: a byte far behind the content is.
    os.lseek(handle, 2**31 - 2, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except PermissionError:
        return False
    finally:
        os.lseek(handle, position, os.SEEK_SET)
    return True


def read_at(handle: int, view: memoryview, position: int) -> int:
    """Read from a place in a file into memory; returns how many bytes there were, which may be fewer than fit.

    Args:
        handle: an open file's descriptor; where it stands does not matter, and may change.
        view: to fill, of bytes.
        position: offset of the first byte to read.
    """
    if hasattr(os, "preadv"):  # leaves the descriptor's own position alone, which forked processes share
        return os.preadv(handle, [view], position)
    os.lseek(handle, position, os.SEEK_SET)
    content = os.read(handle, len(view))
    view[: len(content)] = content
    return len(content)


def hash_file(file: IO[bytes]) -> Any:
    """The SHA-256 object of an open file's content from where it stands to its end."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open_plain(path) as file:
        digest: str = hash_file(file).hexdigest()
    return digest


def user_path(text: str | Path) -> Path:
    """A path that a user gave: a leading ~ is the home directory, also in `--out=~/x`, where no shell looks for it."""
    return Path(os.path.expanduser(text))


def cache_directory() -> Path:
    """This user's directory for downloads and token caches."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "repro-gpt2"
