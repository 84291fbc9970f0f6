"""Wall time told apart by phase."""

from __future__ import annotations

import time

import pytest

from gpt2.metrics.phase_clock import PhaseClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves when told to: its one element."""
    moment = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moment[0])
    return moment


def test_each_second_is_counted_once_and_nested_phases_as_the_outer_one(now: list[float]) -> None:
    clock = PhaseClock()
    now[0] += 1
    with clock.during("eval"):
        now[0] += 2
        with clock.during("save"):
            assert clock.phase == "eval"
            now[0] += 4
    assert clock.phase is None
    now[0] += 8
    clock.bill("data", 3)
    assert clock.read() == {"train": 6, "data": 3, "eval": 6, "save": 0}
    assert clock.read() == {"train": 0, "data": 0, "eval": 0, "save": 0}


def test_a_phase_that_fails_has_ended(now: list[float]) -> None:
    clock = PhaseClock()

    def save() -> None:
        with clock.during("save"):
            now[0] += 5
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        save()
    assert clock.phase is None
    now[0] += 1
    assert clock.read() == {"train": 1, "data": 0, "eval": 0, "save": 5}


def test_training_never_takes_less_than_no_time(now: list[float]) -> None:
    clock = PhaseClock()
    clock.bill("save", 2)  # more than has passed, as clocks are read one after the other
    assert clock.read()["train"] == 0
