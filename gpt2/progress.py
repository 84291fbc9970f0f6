"""How far a long job over tokens has come, as a bar or as lines of a log; and text that fits into a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
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


def columns_of(stream: TextIO | None) -> int | None:
    """How many columns the terminal behind a stream has; None where there is no terminal."""
    return (shutil.get_terminal_size().columns or None) if stream is not None and stream.isatty() else None


def wrapped(line: str, indent: int, columns: int | None) -> str:
    """A line broken between words where it is longer than a terminal, what follows indented; None: as it is."""
    if columns is None or len(line) <= columns:
        return line
    width, rest = max(columns, indent + 20), " " * indent
    return textwrap.fill(line, width, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]], columns: int | None = None, left: int = 10**6) -> str:
    """Rows below a head, in columns; where a terminal is too narrow for them, each row as lines of name and cell.

    Args:
        rows: the head first.
        columns: the terminal's; None: any number.
        left: columns from the first one that are flush left; the others are flush right.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    if columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns:
        head = max(map(len, rows[0]))
        named = [[f"{name:<{head}}  {cell}" for name, cell in zip(rows[0], row, strict=True)] for row in rows[1:]]
        return "\n\n".join("\n".join(lines) for lines in named)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


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
            line = f"{self._label} {bar} {fraction:4.0%} · " + " · ".join(parts)
            columns = columns_of(self._stream) or len(line) + 1
            self._stream.write(f"\r\x1b[K{line[: columns - 1]}")  # one that wraps could not be wiped
            self._drawn = True
        else:
            self._stream.write(f"{self._label} {fraction:.0%}: " + ", ".join(parts) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the bar; what follows begins on a fresh line."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
