"""HellaSwag's examples, and the JSON lines they are published as.

Zellers et al. 2019, https://rowanzellers.com/hellaswag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gpt2.errors import UserError, first_line
from gpt2.files import check, parse_json, read_plain

ENDINGS = 4
"""Endings an example offers; one is right."""


def _label(value: Any) -> Any:
    """GitHub's files have integers, the Hub's strings, pandas' floats; the test split "", and other copies of it -1."""
    if value in ("", -1, "-1") or value != value:
        return None
    return repr(value) if isinstance(value, bool) else value


@dataclass(frozen=True)
class Example:
    """A beginning and four endings.

    Attributes:
        ind: the example's number in the data set.
        activity_label: what is being done, such as "Roof shingle removal".
        ctx_a: the beginning's complete sentences.
        ctx_b: the words that start the sentence to be continued; may be empty.
        ctx: both together, as the authors joined them.
        endings: the four continuations.
        label: index of the right one; None in the test split, whose labels are not public.
    """

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: Annotated[tuple[str, ...], Field(min_length=ENDINGS, max_length=ENDINGS)]
    label: Annotated[Annotated[int, Field(ge=0, lt=ENDINGS)] | None, BeforeValidator(_label)]


def parse_file(path: Path) -> tuple[Example, ...]:
    """Read JSON lines, or parquet as the Hub has it.

    Raises:
        UserError: the file cannot be read, is empty, or an example is malformed.
    """
    try:
        content = read_plain(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; give a HellaSwag .jsonl or .parquet file"
        ) from None
    if content.startswith(b"PAR1"):
        return _parse_parquet(path, content)
    examples = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            examples.append(parse_example(parse_json(line, where, nan=None), where))
    if not examples:
        raise UserError(f"{path} holds no HellaSwag example; each line must be one, as JSON")
    return tuple(examples)


def _parse_parquet(path: Path, content: bytes) -> tuple[Example, ...]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)})") from None
    if not rows:
        raise UserError(f"{path} holds no HellaSwag example")
    return tuple(parse_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1))


def parse_example(raw: Any, where: str) -> Example:
    """Check one decoded line and bring it into form.

    Args:
        raw: an object with the fields of `Example`; some copies leave ind and label out.
        where: what errors call it.

    Raises:
        UserError: a field is missing or of the wrong kind.
    """
    return check({"ind": -1, "label": None, **raw} if isinstance(raw, dict) else raw, Example, where)


def content_lines(examples: Iterable[Example]) -> Iterable[bytes]:
    """One canonical line of JSON an example, newline included."""
    for e in examples:
        raw = {
            "ind": e.ind,
            "activity_label": e.activity_label,
            "ctx_a": e.ctx_a,
            "ctx_b": e.ctx_b,
            "ctx": e.ctx,
            "endings": e.endings,
            "label": e.label,
        }
        yield json.dumps(raw).encode() + b"\n"  # ASCII, so that any text has exactly one spelling


def content_sha256(examples: Iterable[Example]) -> str:
    """Hash of what the examples say, however their file spelt it."""
    digest = hashlib.sha256()
    for line in content_lines(examples):
        digest.update(line)
    return digest.hexdigest()


def spread(examples: Sequence[Example], limit: int | None) -> tuple[Example, ...]:
    """At most `limit` examples, evenly spaced: the files start with one source and end with the other.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is None or limit >= len(examples):
        return tuple(examples)
    if limit < 1:
        raise UserError(f"a limit of {limit} HellaSwag examples leaves nothing to evaluate; give 1 or more")
    return tuple(examples[i * len(examples) // limit] for i in range(limit))
