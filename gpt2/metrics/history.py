"""Read `metrics.jsonl` back as one clean curve, whatever restarts the run has seen.

The file is only ever appended to. Each `run_start` line carries `resumes_at`: the size the file had when the checkpoint
was saved that the run resumed from. What stands between there and the `run_start` was written by a run that
went past its checkpoint and died: it is superseded. Following these pointers back from the end of the file gives the
one history that led to the current weights, also after a return to an older checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from gpt2.errors import UserError
from gpt2.files import Count, check, parse_json, read_plain

METRICS_FILE = "metrics.jsonl"

MAX_BYTES = 1 << 31
"""Of a metrics file; a million steps take a quarter of it."""

_NON_FINITE = ("NaN", "Infinity", "-Infinity")
Real = Annotated[
    float,
    Field(strict=True),
    BeforeValidator(lambda v: float(v) if v in _NON_FINITE else v),
    AfterValidator(lambda v: v if abs(v) < 1e30 else v * math.inf),
]
"""A number; `gpt2.metrics.jsonl` writes those that JSON lacks as strings. What reaches 1e30 counts as infinite."""
Spent = Annotated[float, Field(strict=True, ge=0, le=1e12)]
"""Seconds, also those since 1970."""


@dataclass(frozen=True)
class _Fields:
    """What a field may be, in lines of whichever kind; one of another name may be anything."""

    kind: str
    step: Count
    time: Spent
    tokens: Count = 0
    seconds: dict[str, Spent] = field(default_factory=dict)
    resumes_at: Count = 0
    world_size: Annotated[int, Field(strict=True, ge=1, le=1 << 31)] = 1
    total_steps: Count | None = None
    commit: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    config_changed: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]] = field(default_factory=dict)
    dataset: str = ""
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss: Real = 0.0
    lr: Real = 0.0
    grad_norm: Real = 0.0
    tokens_per_second: Real = 0.0
    mfu: Real | None = None
    val_tokens: Count = 0
    bits_per_byte: Real | None = None
    acc: Real = 0.0
    acc_norm: Real = 0.0
    stderr: Real = 0.0
    examples: Count = 0
    prompt: str = ""
    text: str = ""
    reason: str = ""


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "train": ("tokens", "loss", "lr", "grad_norm", "tokens_per_second"),
    "val": ("tokens", "loss", "val_tokens"),
    "hellaswag": ("tokens", "acc", "acc_norm", "stderr", "examples"),
    "sample": ("tokens",),
    "skip": ("loss", "grad_norm"),
    "length": ("total_steps",),
}
"""What a line of each kind must hold, beside kind, step and time."""


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
        record = parse_json(raw, "it")
        checked = vars(check(record, _Fields, "it"))
    except UserError:
        return None
    if any(name not in record for name in _NEEDED.get(checked["kind"], ())):
        return None
    return Line(offset, {**record, **{name: value for name, value in checked.items() if name in record}})


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
        end = min(record.get("resumes_at", 0), offset)
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
    parsed = list(parse_lines(read_plain(path, MAX_BYTES)))
    lines = [line for line in parsed if line is not None]
    live = live_lines(lines)
    kept = {line.offset for line in live}
    return History(
        live=tuple(line.record for line in live),
        superseded=tuple(line.record for line in lines if line.offset not in kept),
        everything=tuple(line.record for line in lines),
        torn=len(parsed) - len(lines),
    )


def time_spent(records: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Wall time of a run, and wall time × processes, in seconds.

    Args:
        records: all there are, in the file's order: what was later superseded was spent, too.
    """
    wall, devices, world_size = 0.0, 0.0, 1
    for record in records:
        if record["kind"] == "run_start":
            world_size = int(record.get("world_size", 1))
        seconds = record.get("seconds")
        if isinstance(seconds, dict):
            spent = sum(map(float, seconds.values()))
            wall, devices = wall + spent, devices + world_size * spent
    return wall, devices
