"""Signals that ask a run to stop, as a flag that is read between steps and between an evaluation's batches."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows lacks the last two


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into a flag, and says so at once; a second SIGINT stops at once.

    SIGHUP, which a closed terminal sends, stays ignored where it was when the process started: `nohup` asks for that.

    Attributes:
        received: name of the last signal.
        interrupted: whether SIGINT was among them.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        interrupt = number == signal.SIGINT
        if interrupt and self.interrupted:
            raise KeyboardInterrupt
        if (interrupt or self.received is None) and os.environ.get("LOCAL_RANK", "0") == "0":
            line = "\nstopping after this step; again to stop now\n" if interrupt else "stopping after this step\n"
            with contextlib.suppress(OSError):  # print() could meet itself here, where the loop is printing
                os.write(2, line.encode())
        self.interrupted |= interrupt
        self.received = signal.Signals(number).name


def seconds_to_stop() -> float | None:
    """How long torchrun waits for its processes after a signal before it kills them; None without torchrun.

    Its option --shutdown-timeout, which takes precedence, is not told to the processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""))
    except ValueError:
        return 30.0
