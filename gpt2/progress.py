"""How far a long job over tokens has come: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_BAR_WIDTH = 24


def duration(seconds: float) -> str:
    """A time span in its two largest units: "42 s", "5 min 3 s", "5 h 12 min", "2 d 3 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for small, large, small_name, large_name in ((1, 60, "s", "min"), (60, 3600, "min", "h")):
        if whole < large * (60 if large == 60 else 48):
            return f"{whole // large} {large_name} {whole % large // small} {small_name}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


class TokenProgress:
    """Show tokens done, their rate, and the time left.

    Args:
        label: what is being done.
        done: fraction of the job that an earlier run has done.
        stream: stderr by default.
        began: when the job began, by `now`; at once by default.
    """

    def __init__(self, label: str, done: float = 0.0, stream: TextIO | None = None, began: float | None = None) -> None:
        self._label = label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else 15.0  # seconds between two lines
        self._began = self.now() if began is None else began
        self._shown = self.now()
        self._done_before = done
        self._drawn = False

    @staticmethod
    def now() -> float:
        """Seconds by a clock that only goes forward."""
        return time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start of the job."""
        return self.now() - self._began

    def update(self, tokens: int, fraction: float, note: str = "") -> None:
        """Show the state where the last line is old enough.

        Args:
            tokens: processed by this run.
            fraction: how much of the whole job is done, 0 to 1.
            note: ends the line.
        """
        now = self.now()
        if now - self._shown < self._interval:
            return
        self._shown = now
        rate = tokens / max(self.seconds, 1e-9)
        parts = [f"{tokens / 1e6:,.1f} M tokens", f"{rate / 1e6:.2f} M/s"]
        if note:
            parts.append(note)
        gained = fraction - self._done_before
        if gained > 0:
            parts.append(f"{duration(self.seconds * (1 - fraction) / gained)} left")
        full = round(_BAR_WIDTH * fraction)
        if self._terminal:
            bar = "█" * full + "░" * (_BAR_WIDTH - full)
            self._stream.write(f"\r\x1b[K{self._label} {bar} {fraction:4.0%} · " + " · ".join(parts))
            self._drawn = True
        else:
            self._stream.write(f"{self._label} {fraction:.0%}: " + ", ".join(parts) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the bar; what follows begins on a fresh line."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
