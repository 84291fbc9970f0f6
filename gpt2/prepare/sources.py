"""Files of text: which ones a source means, what they are, and how they are told apart.

They are parquet, JSON lines or plain text, the latter two compressed or not; `gpt2.prepare.documents` reads them.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from gpt2.errors import UserError
from gpt2.files import whole_file
from gpt2.prepare.documents import parquet_text_bytes
from gpt2.prepare.splits import Splits, resolve_splits

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
KINDS |= {".text": "text"}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# Written beside the texts by the tools that make data sets.
METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SAMPLE_BYTES = 1 << 16
_MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PK\x03\x04", b"PAR1", b"%PDF")  # gzip, zstd, xz, zip, ...
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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
        mtime_ns: when it was last written, in nanoseconds; None where the Hub says what it is.
    """

    name: str
    size: int
    identity: str
    kind: str
    compression: str
    path: Path | None = None
    text_bytes: int | None = None
    mtime_ns: int | None = None

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
        files: those of validation, then those to train on, each sorted by name.
        unread: what was found beside them and is not read, each with the reason.
        validation: how many files are the validation split that the source names; 0 where it names none.
        column: the name of the texts in parquet and JSON.
        split_on: what divides documents in plain text; "": each file is one.
    """

    description: str
    revision: str | None
    files: tuple[SourceFile, ...]
    unread: tuple[tuple[str, str], ...] = ()
    validation: int = 0
    column: str = "text"
    split_on: str = ""

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Bytes to train on before each file, and of all files at the end."""
        sizes = (0 if number < self.validation else file.size for number, file in enumerate(self.files))
        return tuple(itertools.accumulate(sizes, initial=0))

    def after(self, recorded: dict[str, Any]) -> Source:
        """The same files, those that an earlier run recorded first and in its order, so that new ones extend it."""
        numbers = {file["name"]: number for number, file in enumerate(recorded.get("files", []))}
        files = sorted(self.files, key=lambda file: numbers.get(file.name, len(numbers)))
        return replace(self, files=tuple(files))

    def split(self, text: str) -> Source:
        """The same, with plain text divided into documents at `text`; what is divided is read as JSON lines."""
        files = (replace(file, kind="jsonl") if file.kind == "text" and text else file for file in self.files)
        return replace(self, split_on=text, files=tuple(files))

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "description": self.description,
            "revision": self.revision,
            "files": [
                {"name": f.name, "size": f.size, "id": f.identity}
                | ({"mtime_ns": f.mtime_ns} if f.mtime_ns is not None else {})
                for f in self.files
            ],
            **({"validation": self.validation} if self.validation else {}),
            **({"column": self.column} if self.column != "text" else {}),
            **({"split_on": self.split_on} if self.split_on else {}),
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


def kind_of(name: str, kinds: Mapping[str, str] = KINDS) -> tuple[str, str] | None:
    """(kind, compression) by a file's name; None where its ending is none of `kinds`."""
    name = name.lower()
    stem, compression = name, ""
    if name.endswith(_COMPRESSIONS):
        stem, compression = os.path.splitext(name)
    kind = kinds.get(os.path.splitext(stem)[1])
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def kinds_of(names: Sequence[str]) -> list[str]:
    """The different kinds of files, sorted."""
    return sorted({(kind_of(name) or ("",))[0] for name in names})


def local_source(
    patterns: Sequence[str],
    out: Path | None = None,
    column: str = "text",
    kinds: Mapping[str, str] = KINDS,
    splits_apart: bool = True,
) -> Source:
    """Files, directories and glob patterns on this machine, as one source in order of name.

    What exists by the very name given is meant by it; else "*", "?" and "[...]" are wild. A file is read once however
    often it is named. In a directory, links are followed, and hidden files and `out` are passed over. Splits are told
    apart by `resolve_splits`.

    Args:
        patterns: what the user named; DIR:CONFIG for one configuration of a directory that has a card.
        out: directory of the shards, which are no source.
        column: the name of the texts in parquet and JSON.
        kinds: ending to kind of the files to read.
        splits_apart: False: all files are trained on.

    Raises:
        UserError: nothing matches, a file is of no known kind, unreadable, or not what its name says.
    """
    paths: dict[str, Path] = {}  # by where links lead
    unread: dict[str, str] = {}
    named: list[Path] = []
    within: dict[Path, Path] = {}  # file to the directory it was found in
    config = None
    for pattern in patterns:
        plain, config = named_here(pattern)
        found = [plain] if os.path.lexists(plain) else sorted(glob.glob(plain, recursive=True))
        if not found:
            raise UserError(f"--source {pattern}: no such file, directory or pattern")
        for path in map(Path, found):
            named.append(path)
            if path.is_dir():
                inside = _inside(path, out, unread, column, kinds)
                if not inside:
                    only = "".join(f"; {name}: {why}" for name, why in unread.items() if "JSON" in why)[:300]
                    raise UserError(f"--source {path}: no {_known_names(kinds)} file in this directory{only}")
            elif not path.exists():
                raise UserError(f"--source {path}: a link to {os.path.realpath(path)}, which does not exist")
            elif kind_of(path.name, kinds) is None:
                raise UserError(f"--source {path}: not a {_known_names(kinds)} file")
            elif not path.is_file():
                raise UserError(f"--source {path}: neither a file nor a directory")
            elif why := _without_texts(path, column, kinds):
                raise UserError(f"--source {path}: {why}")
            else:
                inside = [path]
            for file in inside:
                full = Path(os.path.normpath(file.absolute())) if ".." not in file.parts else file.resolve()
                kept = paths.setdefault(os.path.realpath(file), full)
                if kept != full:
                    unread[str(full)] = f"is {kept}, read already"
                elif path.is_dir():
                    within[full] = path
    whole = named[0] if len(named) == 1 and named[0].is_dir() else None
    if config is not None and whole is None:
        raise UserError(f"--source {' '.join(patterns)}: a configuration is of one directory; name that alone")
    root = os.path.normpath(whole.absolute()) if whole else os.path.commonpath([p.parent for p in paths.values()])
    relative = {Path(os.path.relpath(path, root)).as_posix(): path for path in paths.values()}
    card = whole / "README.md" if whole else None
    text = card.read_text("utf-8", "replace") if card and card.is_file() else None
    splits = Splits(list(relative), [], [], None)
    if splits_apart:
        splits = resolve_splits(list(relative), text, config, str(whole) if whole else "--source", named=whole is None)
    unread |= {str(relative[name]): reason for name, reason in splits.unread}
    train, validation = ([relative[name] for name in names] for names in splits[:2])
    for directory in set(within.values()):
        mixed = kinds_of([path.name for path in train if within.get(path) == directory])
        if "parquet" in mixed and len(mixed) > 1:
            others = " and ".join(kind for kind in mixed if kind != "parquet")
            raise UserError(
                f"--source {directory}: parquet beside {others} files, which may hold the same text again; name the "
                f"ones to read, such as '{directory}/**/*.parquet'"
            )
    common = os.path.commonpath([path.parent for path in train + validation])
    files = [
        _local_file(name, path, column, kinds)
        for part in (validation, train)
        for name, path in sorted((Path(os.path.relpath(path, common)).as_posix(), path) for path in part)
    ]
    return Source("local files", None, tuple(files), tuple(sorted(unread.items())), len(validation), column)


def named_here(pattern: str) -> tuple[str, str | None]:
    """(path or glob, configuration) of what the user named: a directory that exists may be followed by :CONFIG."""
    named = os.path.expanduser(pattern)
    directory, colon, config = named.rpartition(":")
    return (directory, config) if colon and not os.path.lexists(named) and os.path.isdir(directory) else (named, None)


def _local_file(name: str, path: Path, column: str, kinds: Mapping[str, str]) -> SourceFile:
    kind, compression = kind_of(path.name, kinds) or ("", "")
    try:
        status, identity = path.stat(), _identity(path)
        if kind != "parquet" and not compression:
            refuse_binary(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # Opened here, so that a file that is not parquet is refused before anything is made.
    text_bytes = parquet_text_bytes(path, column) if kind == "parquet" else None
    return SourceFile(name, status.st_size, identity, kind, compression, path, text_bytes, status.st_mtime_ns)


def _inside(
    directory: Path, out: Path | None, unread: dict[str, str], column: str, kinds: Mapping[str, str]
) -> list[Path]:
    """The files to read below a directory; those passed over go into `unread`, each with the reason."""
    own = os.path.realpath(out) if out is not None else None
    found, seen = [], set()
    for root, folders, names in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(root))
        for folder in list(folders):
            path = Path(root, folder)
            real = os.path.realpath(path)
            why = "hidden" if folder.startswith(".") else "the directory of the shards" if real == own else ""
            if why or real in seen:  # a link to a folder above would never end
                folders.remove(folder)
                unread[str(path)] = why or "a link to a folder read already"
        for path in (Path(root, name) for name in names):
            if path.name.startswith("."):
                unread[str(path)] = "hidden"
            elif path.name in METADATA:
                unread[str(path)] = "metadata, not text"
            elif kind_of(path.name, kinds) is None:
                unread[str(path)] = f"not {_known_names(kinds)}"
            elif not path.exists():
                raise UserError(
                    f"{path} is a link to {os.path.realpath(path)}, which does not exist; remove or mend it"
                )
            elif path.suffix.lower() == ".json" and (why := _without_texts(path, column, kinds)):
                unread[str(path)] = why
            elif path.is_file():
                if why := _without_texts(path, column, kinds):
                    raise UserError(f"{path}: {why}")
                found.append(path)
            else:
                unread[str(path)] = "neither a file nor a directory"
    return found


def _without_texts(path: Path, column: str, kinds: Mapping[str, str]) -> str:
    """Why a JSON file is no text, by its beginning: its first record has none; "" where it may be text."""
    if kind_of(path.name, kinds) != ("jsonl", "") or not path.is_file():
        return ""
    with open(path, "rb") as file:
        data = file.read(_SAMPLE_BYTES)
    text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig", "replace").lstrip()
    try:
        record = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())[0]
    except (ValueError, RecursionError):
        if text.split("\n", 1)[0].strip() != "{":
            return ""  # damaged, or longer than was read
        record = {}  # the beginning of one object over many lines
    if isinstance(record, dict) and column in record:
        return ""
    keys = ", ".join(map(str, record))[:200] if isinstance(record, dict) else type(record).__name__
    return f"JSON without '{column}', only: {keys or 'an object'}; --text-column chooses another"


def refuse_binary(path: Path) -> None:
    """UserError where a third of the beginning of a text file or JSON is neither UTF-8 nor printable."""
    with open(path, "rb") as file:
        data = file.read(_SAMPLE_BYTES)
    if data.startswith(_UTF16):
        return
    text = data.decode("utf-8", "replace")
    odd = text.count("\ufffd") + sum(text.count(chr(c)) for c in range(32) if chr(c) not in "\t\n\v\f\r\b\x1b")
    if data.startswith(_MAGIC) or odd * 3 > len(text):
        raise UserError(
            f"{path} is not text in UTF-8 ({odd / max(len(text), 1):.0%} of its beginning cannot be read); give it the "
            "ending of what it is, such as .gz, or convert it: iconv -f ENCODING -t UTF-8"
        )


def as_utf8_lines(path: Path, kind: str, out: Path, split_on: str = "", column: str = "text") -> bool:
    """Write UTF-16 as UTF-8, an array or object over many lines, or divided text, as JSON lines; False: needless."""
    with open(path, "rb") as file:
        data = file.read(_SAMPLE_BYTES)
    utf16 = data.startswith(_UTF16)
    first_line = data.decode("utf-16" if utf16 else "utf-8-sig", "replace").lstrip().split("\n")[0].strip()
    array = kind == "jsonl" and not split_on and (first_line.startswith("[") or first_line == "{")
    if not (utf16 or array or split_on):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    encoding = "utf-16" if utf16 else "utf-8-sig"
    with open(path, encoding=encoding, errors="replace", newline="") as text, whole_file(out, sync=False) as target:
        if split_on:
            documents = ({column: document.strip("\r\n")} for document in _divided(text, split_on))
            target.writelines(json.dumps(document).encode() + b"\n" for document in documents)
            return True
        if not array:
            while block := text.read(1 << 20):
                target.write(block.encode())
            return True
        try:
            records = json.load(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} begins as a JSON array or object and is none ({error}); replace it") from error
        records = records if isinstance(records, list) else [records]
        target.writelines(json.dumps(record).encode() + b"\n" for record in records)
    return True


def _divided(text: TextIO, divider: str) -> Iterator[str]:
    """The documents of a plain text, in time linear in its length; what follows the last divider, if anything does."""
    begun: list[str] = []  # of a document whose end is not read yet
    tail = ""  # may hold the beginning of a divider
    while block := text.read(1 << 20):
        *whole, last = (tail + block).split(divider)
        for part in whole:
            yield "".join([*begun, part])
            begun = []
        at = max(len(last) - len(divider) + 1, 0)
        begun.append(last[:at])
        tail = last[at:]
    if (last := "".join([*begun, tail])).strip():
        yield last


def _known_names(kinds: Mapping[str, str]) -> str:
    """What is read, in words; of all kinds, their first endings."""
    endings = (".parquet", ".jsonl", ".txt") if kinds is KINDS else tuple(kinds)
    return f"{', '.join(endings[:-1])} or {endings[-1]} (also .gz, .zst, .bz2, .xz)"


def _identity(path: Path) -> str:
    """SHA-256 of a file's first and last 64 KiB: cheap, and a parquet file's index is at its end."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        digest.update(file.read())
    return "ends-sha256:" + digest.hexdigest()


MAX_EXPANSION = 200
"""English text becomes a third to a seventh of its size."""


def decompress(path: Path, out: Path) -> None:
    """Write the content of a compressed file to `out`. UserError where it is damaged."""
    opened: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with whole_file(out, sync=False) as target:
            if (suffix := path.suffix.lower()) in opened:
                plain = opened[suffix](path)
            else:
                import pyarrow

                plain = pyarrow.input_stream(str(path), compression="zstd")
            limit = max(MAX_EXPANSION * path.stat().st_size, 1 << 26)
            with plain:
                while block := plain.read(1 << 20):
                    target.write(block)
                    if target.tell() > limit:
                        raise UserError(f"{path} expands to more than {MAX_EXPANSION} times its size, as no text does")
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{path} was compressed with a window larger than is read here (zstd --long); recompress it: "
                f"zstd -d --long=31 -c {path.name} | zstd -o NEW.zst"
            ) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename != str(path):
            raise  # the disk, not the file
        raise UserError(f"{path} is damaged ({error}); replace it") from error
