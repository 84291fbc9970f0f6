"""How far a long job has come: on a terminal, in a log, and in words."""

from __future__ import annotations

import io

import pytest

from gpt2.progress import TokenProgress, duration


class Clock:
    """Stands in for the clock of `TokenProgress`."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(TokenProgress, "now", staticmethod(lambda: clock.now))
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (18720, "5 h 12 min"),
        (200000, "2 d 7 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_every_15_seconds_with_rate_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    progress = TokenProgress("tokenizing", done=0.5, stream=stream)
    for clock.now, tokens, fraction in ((14.0, 28_000_000, 0.55), (20.0, 40_000_000, 0.6), (34.0, 60_000_000, 0.7)):
        progress.update(tokens, fraction, "file 3 of 9")
    clock.now = 40.0
    progress.update(80_000_000, 0.75)
    progress.close()
    assert progress.seconds == 40.0
    # What an earlier run did counts for the bar and not for the time left: 0.1 of the job took 20 s, 0.4 is left.
    assert stream.getvalue().splitlines() == [
        "tokenizing 60%: 40.0 M tokens, 2.00 M/s, file 3 of 9, 1 min 20 s left",
        "tokenizing 75%: 80.0 M tokens, 2.00 M/s, 40 s left",
    ]


def test_a_terminal_gets_a_bar_that_is_wiped_at_the_end(clock: Clock) -> None:
    stream = Terminal()
    progress = TokenProgress("tokenizing", stream=stream)
    clock.now = 0.1
    progress.update(1_000_000, 0.1)
    assert stream.getvalue() == ""  # drawn at most five times per second
    clock.now = 1.0
    progress.update(5_000_000, 0.5)
    assert stream.getvalue().count("█") == 12
    assert "50%" in stream.getvalue()
    progress.close()
    assert stream.getvalue().endswith("\r\x1b[K")
    quiet = Terminal()
    TokenProgress("tokenizing", stream=quiet).close()
    assert quiet.getvalue() == ""
