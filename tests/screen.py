"""A terminal for the tests: a pseudo-terminal of some width, and what would stand on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from typing import TextIO

from repository import ROOT

_TOKENS = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")


class Screen:
    """A pseudo-terminal whose output is drawn as a terminal draws it: rows that wrap at its width.

    Args:
        columns: its width; 0, as some have it, is drawn as 80.
        encoding: of the stream that writes to it.
    """

    def __init__(self, columns: int, encoding: str = "utf-8") -> None:
        self.width = columns or 80
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self.stream: TextIO = os.fdopen(self.slave, "w", encoding=encoding, errors="replace")
        self._received = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux: the other end was closed
            while data := os.read(self._master, 65536):
                self._received += data

    def run(self, words: list[str]) -> int:
        """Run a command on it; returns the exit code."""
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        env = kept | {"TERM": "xterm", "PYTHONIOENCODING": f"{self.stream.encoding}:replace", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            words, env=env, stdin=self.slave, stdout=self.slave, stderr=self.slave, cwd=ROOT
        ).returncode

    def rows(self) -> list[str]:
        """Close the stream; everything that stands on the screen and above it, without empty rows at the end."""
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        rows, row, column = [[" "] * self.width], 0, 0
        for argument, command, carriage_return, newline, character in _TOKENS.findall(
            self._received.decode(self.stream.encoding, "replace")
        ):
            if carriage_return:
                column = 0
            elif newline or (character and column == self.width):
                row, column = row + 1, column if newline else 0
                if row == len(rows):
                    rows.append([" "] * self.width)
            if character:
                rows[row][column] = character
                column += 1
            elif command == "A":
                row -= int(argument or 1)
            elif command == "K":
                first = 0 if argument == "2" else column
                rows[row][first:] = [" "] * (self.width - first)
        lines = ["".join(line).rstrip() for line in rows]
        while lines and not lines[-1]:
            lines.pop()
        return lines
