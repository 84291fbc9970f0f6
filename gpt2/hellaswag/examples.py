"""HellaSwag's examples, and the JSON lines they are published as.

Zellers et al. 2019, https://rowanzellers.com/hellaswag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.errors import UserError

ENDINGS = 4
"""Endings an example offers; one is right."""


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
    endings: tuple[str, ...]
    label: int | None


def parse_jsonl(path: Path) -> tuple[Example, ...]:
    """Read JSON lines.

    Raises:
        UserError: the file cannot be read, is empty, or a line is malformed.
    """
    examples = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    raw = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON ({error}); each line must be one HellaSwag example") from None
                examples.append(parse_example(raw, where))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a HellaSwag .jsonl file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not examples:
        raise UserError(f"{path} holds no HellaSwag example; each line must be one, as JSON")
    return tuple(examples)


def parse_example(raw: Any, where: str) -> Example:
    """Check one decoded line and bring it into form.

    Args:
        raw: an object with ind, activity_label, ctx_a, ctx_b, ctx, endings and, as an integer, a string, "" or
            not at all, label.
        where: what errors call it.

    Raises:
        UserError: a field is missing or of the wrong kind.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    for name in ("activity_label", "ctx_a", "ctx_b", "ctx"):
        if not isinstance(raw.get(name), str):
            raise UserError(f"{where}: field {name!r} is {raw.get(name)!r}; it must be a string")
    endings = raw.get("endings")
    if not isinstance(endings, (list, tuple)) or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"{where}: field 'endings' must be a list of strings")
    if len(endings) != ENDINGS:
        raise UserError(f"{where}: {len(endings)} endings; an example has {ENDINGS}")
    ind = raw.get("ind", -1)  # some copies leave the number out, or write it as a string
    if isinstance(ind, str) and ind.isascii() and ind.isdecimal():
        ind = int(ind)
    if not isinstance(ind, int):
        raise UserError(f"{where}: field 'ind' is {ind!r}; it must be an integer")
    return Example(
        ind, raw["activity_label"], raw["ctx_a"], raw["ctx_b"], raw["ctx"], tuple(endings), _label(raw, where)
    )


def _label(raw: dict[str, Any], where: str) -> int | None:
    """0 to 3, or None where there is none: GitHub's files have integers, the Hub's strings, "" in the test split."""
    label = raw.get("label")
    if label in (None, "", -1, "-1") or label != label:  # NaN, which pandas writes for a label that is not there
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # and so it writes the others of that column
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < ENDINGS:
        raise UserError(f"{where}: field 'label' is {raw['label']!r}; it must be 0 to {ENDINGS - 1}, or empty")
    return label


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
