"""A clock that tells training's time from what else a run does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["data", "eval", "save"]
PHASES: tuple[Phase, ...] = ("data", "eval", "save")
"""What is not training: waiting for data, evaluating, saving."""


class PhaseClock:
    """Wall time since it was last read, by what it went into."""

    def __init__(self) -> None:
        self.phase: Phase | None = None  # None: training
        self._mark = time.perf_counter()
        self._spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time inside as `phase`; of nested phases the outer one counts."""
        if self.phase is not None:
            yield
            return
        self.phase = phase
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phase = None
            self.bill(phase, time.perf_counter() - began)

    def bill(self, phase: Phase, seconds: float) -> None:
        """Count time that has passed outside of every phase as one all the same."""
        self._spent[phase] += seconds

    def read(self) -> dict[str, float]:
        """Seconds since the last reading (at first, since it was made): "train", and each of PHASES."""
        now = time.perf_counter()
        seconds: dict[str, float] = {"train": max(now - self._mark - sum(self._spent.values()), 0.0), **self._spent}
        self._mark = now
        self._spent = dict.fromkeys(PHASES, 0.0)
        return {name: round(value, 6) for name, value in seconds.items()}
