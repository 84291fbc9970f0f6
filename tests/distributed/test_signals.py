"""Signals become a flag, and are answered at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from gpt2.distributed.signals import StopSignals, seconds_to_stop


@pytest.fixture(autouse=True)
def as_a_terminal_starts_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No signal is ignored on entry, whatever started the tests."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_signal_is_a_flag_and_is_answered_at_once(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == name
        assert signals.interrupted == (name == "SIGINT")
        said = capfd.readouterr().err
        assert said.strip() == "stopping after this step" + ("; again to stop now" if name == "SIGINT" else "")
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # schedulers repeat themselves
            assert capfd.readouterr().err == ""
    assert signal.getsignal(number) == before


def test_the_second_interrupt_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err.endswith("stopping after this step; again to stop now\n")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_heeded() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_one_process_per_machine_answers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("given", "seconds"), [(None, 30), ("600", 600), ("", 30), ("soon", 30)])
def test_the_time_torchrun_leaves(monkeypatch: pytest.MonkeyPatch, given: str | None, seconds: float) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert seconds_to_stop() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    if given is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", given)
    assert seconds_to_stop() == seconds
