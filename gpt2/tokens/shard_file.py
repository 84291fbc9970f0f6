"""One shard file: its header, read and checked, and a writer that leaves whole files or none.

Two formats, each as its makers write it: NumPy's `.npy` (build-nanogpt), and `.bin` (llm.c,
modded-nanogpt), a header of 256 little-endian int32 followed by the ids.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2.errors import UserError
from gpt2.files import create, finish, hash_file, open_plain, temporary_sibling

_BIN_HEADER_BYTES = 256 * 4
# dtype → (magic number, version) in words 0 and 1 of a `.bin` header; the token count is word 2.
_BIN_MAGIC = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


class ShardHeader(NamedTuple):
    """What a shard's header says."""

    tokens: int
    dtype: np.dtype[Any]
    offset: int  # bytes before the first token


def read_header(path: Path) -> ShardHeader:
    """Header of a shard, checked against the size of its file. UserError where they disagree."""
    try:
        with open_plain(path) as file:
            header = _npy_header(path, file) if path.suffix == ".npy" else _bin_header(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from error
    expected = header.offset + header.tokens * header.dtype.itemsize
    if size != expected:
        raise UserError(
            f"shard {path} has {size:,} bytes, its header promises {expected:,}: it is truncated or "
            "was altered; copy or tokenize it again"
        )
    return header


def _npy_header(path: Path, file: Any) -> ShardHeader:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise UserError(
            f"shard {path} is not a NumPy file ({type(error).__name__} in its header); copy or tokenize it again"
        ) from error
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise UserError(f"shard {path} holds {dtype} of shape {shape}; expected one dimension of uint16 or uint32")
    return ShardHeader(int(shape[0]), dtype, file.tell())


def _bin_header(path: Path, file: Any) -> ShardHeader:
    words = np.frombuffer(file.read(_BIN_HEADER_BYTES).ljust(_BIN_HEADER_BYTES, b"\0"), "<i4")
    for name, magic in _BIN_MAGIC.items():
        if (words[0], words[1]) == magic:
            return ShardHeader(int(words[2]), np.dtype(name).newbyteorder("<"), _BIN_HEADER_BYTES)
    raise UserError(
        f"shard {path} begins with {words[0]}, {words[1]}; expected llm.c's 20240520, 1 (GPT-2) or "
        "20240801, 7 (Llama 3): it has no header of that kind, or is damaged"
    )


def _header_bytes(suffix: str, tokens: int, dtype: np.dtype[Any]) -> bytes:
    """A header of 128 (`.npy`) or 1,024 (`.bin`) bytes; its size does not depend on `tokens`."""
    if suffix == ".bin":
        if tokens >= 2**31:
            raise UserError(f"a .bin shard holds fewer than 2^31 tokens, not {tokens:,}")
        words = np.zeros(256, "<i4")
        words[:2] = _BIN_MAGIC[dtype.name]
        words[2] = tokens
        return words.tobytes()
    text = f"{{'descr': '<u{dtype.itemsize}', 'fortran_order': False, 'shape': ({tokens},), }}"
    # Magic and version (8 bytes), length of the rest (2), the rest padded with spaces to a newline.
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


class ShardWriter:
    """Write one shard: under a temporary name, then synced, then renamed. Use in a `with` block.

    What is left when the block fails is removed; a kill leaves `.NAME.PID.tmp`, which is never read.

    Args:
        path: final name, ending in .npy or .bin.
        dtype: "uint16" or "uint32".
        expected_tokens: written into the header first; another number costs a second reading.
    """

    def __init__(self, path: Path, dtype: str, expected_tokens: int) -> None:
        self.path = path
        self.tokens = 0
        self.sha256 = ""
        self._dtype = np.dtype(dtype)
        self._expected = expected_tokens
        self._temporary = temporary_sibling(path)
        self._hash = hashlib.sha256()
        header = _header_bytes(path.suffix, expected_tokens, self._dtype)
        self._file = create(self._temporary)
        self._write(header)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        with contextlib.suppress(OSError):  # a full disk says so again
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens (1-D) to the shard."""
        self._write(np.ascontiguousarray(tokens, self._dtype.newbyteorder("<")).data.cast("B"))
        self.tokens += len(tokens)

    def finish(self, expected_sha256: str | None = None) -> bool:
        """Give the shard its name. `tokens` and `sha256` hold for the finished file.

        Args:
            expected_sha256: with another checksum it gets no name, and False is returned; None: any.
        """
        with _full_disk_told(self.path):
            if self.tokens != self._expected:
                self._file.seek(0)
                self._file.write(_header_bytes(self.path.suffix, self.tokens, self._dtype))
                self._file.seek(0)
                self._hash = hash_file(self._file)
            self.sha256 = self._hash.hexdigest()
            if expected_sha256 not in (None, self.sha256):
                return False
            finish(self._file, self._temporary, self.path)
        return True

    def _write(self, data: Any) -> None:
        with _full_disk_told(self.path):
            self._file.write(data)
        self._hash.update(data)


@contextlib.contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"disk full while writing {path}; make room and run the same command again: finished shards are kept"
        ) from error
