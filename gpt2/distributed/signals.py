"""Signals that ask a run to stop, as a flag that is read between steps."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag the loop reads between steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = signal.Signals(number).name
