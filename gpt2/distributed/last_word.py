"""A user's error as the last line, behind what torchrun prints: `python last_word.py AGENT RESTARTS LINE`.

torchrun follows a process that fails by a table of 30 lines, and starts all processes again while it has restarts left,
though only the user can put right what a `UserError` tells. So the failing process leaves this one behind, which waits
for torchrun to end, makes it end where it would start again, and repeats the line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

_PATIENCE = 3.0  # seconds in which a torchrun without restarts has ended
_GIVE_UP = 900.0  # seconds


def leave_last_word(line: str) -> None:
    """Have a line printed to stderr once the torchrun that started this process has ended, without another restart."""
    words = [sys.executable, "-S", __file__, str(os.getppid()), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), line]
    with contextlib.suppress(OSError):  # the line has been printed once already
        subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _main(agent: int, restarts: int, line: str) -> None:
    began = time.monotonic()
    while _is_alive(agent) and time.monotonic() - began < _GIVE_UP:
        if restarts and time.monotonic() - began > _PATIENCE:
            os.kill(agent, signal.SIGQUIT)  # of the signals torchrun handles the one that torchrun.sh lets through
            restarts = 0
        time.sleep(0.02)
    print(line, file=sys.stderr)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
