"""Read `metrics.jsonl` back as one clean curve, whatever restarts the run has seen.

The file is only ever appended to. Each `run_start` line carries `resumes_at`: the size the file had when the checkpoint
was saved that the run resumed from. What stands between there and the `run_start` was written by a run that
went past its checkpoint and died: it is superseded. Following these pointers back from the end of the file gives the
one history that led to the current weights, also after a return to an older checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

COUNTS = ("step", "tokens", "val_tokens", "examples")
"""Fields that are whole numbers wherever they stand."""

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "train": ("tokens", "loss", "lr", "grad_norm", "tokens_per_second"),
    "val": ("tokens", "loss", "val_tokens"),
    "hellaswag": ("tokens", "acc", "acc_norm", "stderr", "examples"),
    "sample": ("tokens",),
    "skip": ("loss", "grad_norm"),
}
"""What a line of each kind must hold as a number, beside step and time; NaN and infinities are stored as strings."""


@dataclass(frozen=True)
class Line:
    """One line of `metrics.jsonl`: its first byte in the file, and what it says."""

    offset: int
    record: dict[str, Any]


@dataclass(frozen=True)
class History:
    """A parsed `metrics.jsonl`."""

    live: tuple[dict[str, Any], ...]
    """Lines of the history that led to the current state, in file order."""
    superseded: tuple[dict[str, Any], ...]
    """Lines written after the checkpoint that a later start resumed from."""
    everything: tuple[dict[str, Any], ...]
    """Both, in file order."""
    torn: int
    """Lines that do not have the form of ours: a kill tears one at most."""


def parse_lines(content: bytes) -> Iterator[Line | None]:
    """The lines of a metrics file; None in place of a torn one.

    Args:
        content: the file, or its start.
    """
    offset = 0
    for raw in content.splitlines(keepends=True):
        if raw.strip():
            yield _parse(offset, raw)
        offset += len(raw)


def _parse(offset: int, raw: bytes) -> Line | None:
    try:
        record = json.loads(raw)
        if not isinstance(record["kind"], str) or any(type(record.get(name, 0)) is not int for name in COUNTS):
            return None
        for name in ("step", "time", *NUMBERS.get(record["kind"], ())):
            record[name] = record[name] if type(record[name]) is int else float(record[name])
    except (ValueError, KeyError, TypeError):
        return None
    return Line(offset, record)


def live_lines(lines: Iterable[Line]) -> list[Line]:
    """Those of `lines` that led to the state at the end of the file."""
    lines = list(lines)
    starts = [(line.offset, line.record) for line in lines if line.record["kind"] == "run_start"]
    end = lines[-1].offset + 1 if lines else 0
    ranges = []
    for offset, record in reversed(starts):
        if offset >= end:
            continue  # a start whose steps no later start resumed from
        ranges.append((offset, end))
        resumes_at = record.get("resumes_at", 0)
        end = min(resumes_at, offset) if type(resumes_at) is int else 0
    if not starts:
        ranges.append((0, end))
    return [line for line in lines if any(first <= line.offset < stop for first, stop in ranges)]


def read_metrics(path: Path) -> History:
    """Parse a metrics file; one that is being written is read up to its last whole line.

    Args:
        path: the `metrics.jsonl`.

    Raises:
        OSError: it cannot be read.
    """
    parsed = list(parse_lines(path.read_bytes()))
    lines = [line for line in parsed if line is not None]
    live = live_lines(lines)
    kept = {line.offset for line in live}
    return History(
        live=tuple(line.record for line in live),
        superseded=tuple(line.record for line in lines if line.offset not in kept),
        everything=tuple(line.record for line in lines),
        torn=len(parsed) - len(lines),
    )
