"""Data sets made without worker processes, for tests of what is made and not of who makes it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2.prepare import workers


class _Pool:
    """Does the work of a pool of processes at once, in this one."""

    def __init__(self, initializer: Callable[..., None], initargs: tuple[Any, ...], **options: object) -> None:
        initializer(*initargs)

    def submit(self, action: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(action(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options: object) -> None:
        pass


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", _Pool)
    nothing = SimpleNamespace(SIGINT=signal.SIGINT, SIG_IGN=signal.SIG_IGN, signal=lambda *arguments: None)
    monkeypatch.setattr(workers, "signal", nothing)
