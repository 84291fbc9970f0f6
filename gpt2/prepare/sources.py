"""Files of text: which ones a source means, what they are, and how they are told apart.

They are parquet, JSON lines or plain text, the latter two compressed or not; `gpt2.prepare.documents` reads them.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2.errors import UserError
from gpt2.files import whole_file
from gpt2.prepare.documents import parquet_text_bytes

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
_COMPRESSIONS = (".gz", ".zst")
# Bytes in a file for one GPT-2 token of English, roughly; decides only whether a corpus is small.
_BYTES_A_TOKEN = {"parquet": 2.5, "jsonl": 4.5, "text": 4.2}


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: relative to the files' common directory, or in the repository.
        size: bytes.
        identity: what tells it from another file of that name and size.
        kind: "parquet", "jsonl" or "text".
        compression: "", ".gz" or ".zst".
        path: where it is; None where it has to be fetched.
        text_bytes: size of the texts in it, where that is known without reading it.
    """

    name: str
    size: int
    identity: str
    kind: str
    compression: str
    path: Path | None = None
    text_bytes: int | None = None

    def estimated_tokens(self) -> float:
        """A guess, within a fifth for English where `text_bytes` is known, and rough where only the size is."""
        if self.text_bytes is not None:
            return self.text_bytes / _BYTES_A_TOKEN["text"]
        return self.size / _BYTES_A_TOKEN[self.kind] * (2.5 if self.compression else 1.0)


@dataclass(frozen=True)
class Source:
    """Files in the order in which they are read.

    Attributes:
        description: "local files", or the Hub's files as "hf://datasets/OWNER/NAME[@REVISION]/PATTERN".
        revision: the Hub's commit; None for local files.
        files: sorted by name.
    """

    description: str
    revision: str | None
    files: tuple[SourceFile, ...]

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Bytes before each file, and of all files at the end."""
        return tuple(itertools.accumulate((file.size for file in self.files), initial=0))

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "description": self.description,
            "revision": self.revision,
            "files": [{"name": f.name, "size": f.size, "id": f.identity} for f in self.files],
        }


class FileProblem(UserError):
    """A file of the source cannot be used.

    Args:
        number: the file's place in the source.
        message: what is wrong with it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) by a file's name; None where it is none of the known kinds."""
    stem, compression = name, ""
    if name.endswith(_COMPRESSIONS):
        stem, compression = os.path.splitext(name)
    kind = _KINDS.get(os.path.splitext(stem)[1])
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def local_source(patterns: Sequence[str]) -> Source:
    """Files, directories and glob patterns on this machine, as one source in order of name.

    Raises:
        UserError: nothing matches, a file is of no known kind, unreadable, or not what its name says.
    """
    paths: set[Path] = set()
    for pattern in patterns:
        found = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True)]
        if not found:
            raise UserError(f"--source {pattern}: no such file, directory or pattern")
        for path in found:
            if path.is_dir():
                inside = [p for p in path.rglob("*") if p.is_file() and kind_of(p.name)]
                if not inside:
                    raise UserError(f"--source {path}: no {_known_names()} file in this directory")
                paths.update(p.absolute() for p in inside)
            elif kind_of(path.name) is None:
                raise UserError(f"--source {path}: not a {_known_names()} file")
            else:
                paths.add(path.absolute())
    common = Path(os.path.commonpath([path.parent for path in paths]))
    files = []
    for name, path in sorted((p.relative_to(common).as_posix(), p) for p in paths):
        kind, compression = kind_of(name) or ("", "")
        try:
            size, identity = path.stat().st_size, _identity(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        # Opened here, so that a file that is not parquet is refused before anything is made.
        text_bytes = parquet_text_bytes(path) if kind == "parquet" else None
        files.append(SourceFile(name, size, identity, kind, compression, path, text_bytes))
    return Source("local files", None, tuple(files))


def _known_names() -> str:
    return ".parquet, .jsonl or .txt (also .gz, .zst)"


def _identity(path: Path) -> str:
    """SHA-256 of a file's first and last 64 KiB: cheap, and a parquet file's index is at its end."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        digest.update(file.read())
    return "ends-sha256:" + digest.hexdigest()


def decompress(path: Path, out: Path) -> None:
    """Write the content of a .gz or .zst file to `out`. UserError where it is damaged."""
    try:
        with whole_file(out, sync=False) as target:
            if path.suffix == ".gz":
                with gzip.open(path) as plain:
                    shutil.copyfileobj(plain, target, 1 << 20)
            else:
                import pyarrow

                with pyarrow.input_stream(str(path), compression="zstd") as plain:
                    while block := plain.read(1 << 20):
                        target.write(block)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename != str(path):
            raise  # the disk, not the file
        raise UserError(f"{path} is damaged ({error}); replace it") from error
