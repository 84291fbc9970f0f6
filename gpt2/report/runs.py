"""A run's directory, opened to be looked at: what it was told, what it recorded, how it fares."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gpt2.config import config_difference
from gpt2.errors import UserError
from gpt2.files import lock
from gpt2.metrics import reference
from gpt2.metrics.history import METRICS_FILE, History, read_metrics, time_spent
from gpt2.presets import presets

SILENCE_SECONDS = 600.0
"""A run on another machine that has written nothing for this long counts as crashed."""
MAX_CHANGES = 8
"""Changed settings up to which a run counts as a variant of a preset."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A run's directory, read once."""

    directory: Path
    history: History
    locked: bool
    """Whether a process of this machine is writing to it."""

    def records(self, kind: str) -> list[Record]:
        """The live lines of a kind, by step; of several at one step the last counts."""
        by_step = {record["step"]: record for record in self.history.live if record["kind"] == kind}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def starts(self) -> list[Record]:
        """Every start there was, in the file's order, superseded ones included."""
        return [record for record in self.history.everything if record["kind"] == "run_start"]

    @property
    def start(self) -> Record:
        """The last start, with the length that was fixed after it; empty if that line is lost."""
        start: Record = {}
        for record in self.history.live:
            if record["kind"] == "run_start":
                start = record
            elif record["kind"] == "length" and start:
                start = {**start, "total_steps": record["total_steps"]}
        return start

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """The configuration of the last start, as `Config.to_dict` gave it."""
        config: Mapping[str, Mapping[str, Any]] = self.start.get("config", {})
        return config

    @property
    def preset(self) -> str | None:
        """The preset nearest to its configuration, such as "gpt2" or, with two settings changed, "gpt2 +2".

        None where none is near.
        """
        if not self.config:
            return None
        changes = {}
        for name, (_, config) in presets().items():
            other = config.to_dict()
            changes[name] = len(config_difference(self.config, other).keys() - {"run.run_dir", "run.fitted_steps"})
        nearest = min(changes, key=lambda name: changes[name])
        if changes[nearest] > MAX_CHANGES:
            return None
        return f"{nearest} +{changes[nearest]}" if changes[nearest] else nearest

    @property
    def corpus(self) -> reference.Corpus | None:
        """The corpus whose published baselines apply; None: none."""
        return reference.corpus_of(str(self.start.get("dataset", "")))

    @property
    def size(self) -> reference.Size | None:
        """The GPT-2 size the model has; None: none of them."""
        model = self.config.get("model", {})
        return reference.size_of(*(model.get(name, 0) for name in ("n_layer", "n_head", "n_embd")))

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return max((int(r["tokens"]) for r in self.history.live if "tokens" in r), default=0)

    @property
    def step(self) -> int:
        """Steps finished."""
        return max((int(r["step"]) for r in self.history.live), default=0)

    @property
    def best_loss(self) -> float | None:
        """Lowest validation loss; None before the first."""
        losses = [record["loss"] for record in self.records("val")]
        return min((loss for loss in losses if loss == loss), default=None)

    @property
    def best_bits_per_byte(self) -> float | None:
        """Lowest validation loss in bits per byte of text; None before the first, and for runs that lack it."""
        values = [bits_per_byte(record) for record in self.records("val")]
        return min((value for value in values if value is not None), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed of training; the first line of a start, which has compilation in it, counts only alone."""
        return self._median("tokens_per_second")

    @property
    def mfu(self) -> float | None:
        """Median model FLOP/s utilisation, where the device's peak is known."""
        return self._median("mfu")

    def _median(self, name: str) -> float | None:
        warm, values, first = [], [], True
        for record in self.history.live:
            if record["kind"] == "run_start":
                first = True
            elif record["kind"] == "train":
                if record.get(name) is not None:
                    values.append(float(record[name]))
                    warm += [] if first else values[-1:]
                first = False
        return median(warm or values) if values else None

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by phase over all starts, what was later superseded included: it was spent."""
        return _add_seconds(self.history.everything)

    @property
    def device_seconds(self) -> float:
        """Wall time × processes, over all starts."""
        return time_spent(self.history.everything)[1]

    def status(self, now: float | None = None) -> str:
        """ "running", how it ended ("finished", "stopped", "nonfinite", "spike", "error"), or "crashed".

        Args:
            now: Unix seconds; None: the clock.
        """
        if self.locked:
            return "running"
        last = self.history.live[-1]
        if last["kind"] == "run_end":
            return str(last.get("reason", "finished"))
        silent = (time.time() if now is None else now) - float(last.get("time", 0.0))
        elsewhere = self.start.get("host") != platform.node()
        return "running" if elsewhere and silent < SILENCE_SECONDS else "crashed"

    @property
    def last_checkpoint(self) -> str | None:
        """Path of the newest complete checkpoint, within the directory; None: none yet."""
        paths = [str(record.get("path")) for record in self.history.everything if record["kind"] == "checkpoint"]
        return paths[-1] if paths else None

    @property
    def repeated(self) -> int:
        """Logged steps that a start from an older checkpoint made again."""
        return sum(record["kind"] == "train" for record in self.history.superseded)


def bits_per_byte(val: Record) -> float | None:
    """Bits per byte of a val line; None where it is not finite, and in files of earlier versions."""
    value = val.get("bits_per_byte")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _add_seconds(records: Sequence[Record]) -> dict[str, float]:
    total: dict[str, float] = {}
    for record in records:
        for phase, value in record.get("seconds", {}).items():
            total[phase] = total.get(phase, 0.0) + value
    return total


def open_run(directory: Path) -> RecordedRun:
    """Read a run's directory.

    Args:
        directory: that `train_gpt2.py` writes to.

    Raises:
        UserError: it is not a run's, or nothing has been recorded.
    """
    path = directory / METRICS_FILE
    try:
        history = read_metrics(path)
    except (FileNotFoundError, NotADirectoryError):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; give a run's, such as runs/gpt2") from None
        inside = [str(run) for run in find_runs(directory)]
        hint = f"runs in it: {', '.join(inside[:8])}" if inside else "give a run's directory, such as runs/gpt2"
        raise UserError(f"{directory} is not a run: it has no {METRICS_FILE}; {hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    if not history.live:
        what = "is empty" if path.stat().st_size == 0 else "has no line of ours"
        raise UserError(f"{path} {what}; give a run that has begun, written by train_gpt2.py")
    with path.open("rb", buffering=0) as file:
        locked = not lock(file, shared=True)
    return RecordedRun(directory, history, locked)


def find_runs(directory: Path) -> Iterator[Path]:
    """Directories of runs at or below `directory`, in order of name; does not look inside a run."""
    try:
        below = []
        if not (directory / METRICS_FILE).is_file():
            below = sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
            if not below:
                return
    except OSError:  # not ours to read: `open_run` says so
        below = []
    if not below:
        yield directory
    for path in below:
        yield from find_runs(path)


def distinct_names(directories: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart: "gpt2", or "monday/gpt2" and "tuesday/gpt2"."""
    parts = [path.resolve().parts for path in directories]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in directories]
