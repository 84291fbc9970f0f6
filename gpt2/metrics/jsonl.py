"""Write `metrics.jsonl` so that nothing, a kill or a full disk, spoils what is already there.

A line is one unbuffered `write`, so a kill tears the last line at most. The file is only appended to. NaN and
infinities, which JSON lacks, become the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from gpt2.errors import UserError
from gpt2.files import lock, open_own, read_plain
from gpt2.metrics.history import MAX_BYTES, live_lines, parse_lines


def _strict(value: Any) -> Any:
    """The value with non-finite floats as strings, so that every JSON reader takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class MetricsFile:
    """Appends lines to a file, one unbuffered write each; when that fails it says so once and carries on.

    The file is locked while it is open, by the kernel, so a kill frees it: nobody else may train into this directory,
    and `gpt2.report.runs` sees that the run is alive.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.say = say
        self.path = path
        self.warned = False
        self.kept: list[dict[str, Any]] = []  # records of the history that this start resumes
        self.file: FileIO | None = None
        self.whole = True  # the file ends with a whole line
        with self._forgive():
            self.file = open_own(path)
            for _ in range(20):  # somebody who looks at the run holds it for an instant
                if lock(self.file):
                    break
                time.sleep(0.05)
            else:
                self.file.close()
                raise UserError(f"another process is training into {path.parent}; wait for it, or choose another --run")
            size = self.file.seek(0, os.SEEK_END)
            if size:
                self.file.seek(size - 1)  # what is written goes to the end all the same
                self.whole = self.file.read(1) == b"\n"

    @contextmanager
    def _forgive(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.warned:
                self.say(f"cannot write {self.path} ({error.strerror}); training continues without these lines")
            self.warned = True

    def resume(self, start_step: int, position: int | None) -> int:
        """Where, in bytes, the history ends that a start at `start_step` resumes; keeps its records."""
        content = b""
        with self._forgive():
            content = read_plain(self.path, MAX_BYTES)
        parsed = list(parse_lines(content))
        lines = [line for line in parsed if line is not None]
        if damaged := len(parsed) - len(lines):  # a kill tears one at most
            self.say(f"{self.path}: {damaged} damaged {'line is' if damaged == 1 else 'lines are'} passed over")
        live = live_lines(lines)
        if position is not None:
            end = min(position, len(content))
            live = live_lines([line for line in lines if line.offset < end])
        elif start_step == 0:
            end = 0
        else:
            end = next((line.offset for line in live if line.record["step"] > start_step), len(content))
        self.kept = [line.record for line in live if line.offset < end]
        return end

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        data = (json.dumps(_strict(record), ensure_ascii=False, allow_nan=False) + "\n").encode(
            "utf-8", "backslashreplace"
        )
        with self._forgive():
            if self.file is None:
                return
            line = data if self.whole else b"\n" + data  # after a torn line, start a new one
            self.whole = False
            self.whole = self.file.write(line) == len(line)

    def sync(self) -> int:
        """Bring everything to disk and return the file's size, 0 if there is no file."""
        size = 0
        with self._forgive():
            if self.file is not None:
                size = os.fstat(self.file.fileno()).st_size
                os.fsync(self.file.fileno())
        return size

    def close(self) -> None:
        """Let the file and its lock go."""
        if self.file is not None:
            self.file.close()
            self.file = None
