"""Commands run in this process, within limits of processor time and of waiting."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import pytest
from repository import load_script

from gpt2.errors import run_cli

CPU_SECONDS = 60.0
HANG_SECONDS = 300  # of the wall clock: only a command that waits for ever takes so long


class TooLong(BaseException):
    """A command took more than its time."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Within the block, processor time and waiting are bounded."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong("it takes too long" if number == signal.SIGPROF else "it waits for ever")

    old = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def call(script: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, or 1 with the traceback, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with (
        limited(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script, *words])
        try:
            run_cli(load_script(script).main)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
        except (Exception, TooLong):
            return 1, out.getvalue(), err.getvalue() + traceback.format_exc()
