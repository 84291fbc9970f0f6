"""How far a long job has come: on a terminal, in a log, and in words."""

from __future__ import annotations

import io

import pytest

from gpt2.progress import TokenProgress, duration, table, wrapped


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


ROWS = [("run", "tokens", "last checkpoint"), ("gpt2", "10 B", "checkpoints/step_00019073"), ("b", "-", "-")]


def test_a_table_in_columns() -> None:
    assert table(ROWS, left=1) == (
        "run   tokens            last checkpoint\n"
        "gpt2    10 B  checkpoints/step_00019073\n"
        "b          -                          -"
    )
    assert table(ROWS, columns=39) == table(ROWS)
    assert table(ROWS).splitlines()[2] == "b     -       -"  # nothing behind the last cell


def test_a_table_for_a_terminal_too_narrow_for_it() -> None:
    narrow = table(ROWS, columns=38)
    assert narrow == (
        "run              gpt2\ntokens           10 B\nlast checkpoint  checkpoints/step_00019073\n"
        "\nrun              b\ntokens           -\nlast checkpoint  -"
    )


def test_a_line_is_broken_between_words_alone() -> None:
    line = "data       data/my-very-long-name: 1,000 tokens to train on"
    assert wrapped(line, 11, None) == wrapped(line, 11, 80) == line
    assert wrapped(line, 11, 45) == "data       data/my-very-long-name: 1,000\n           tokens to train on"
    assert wrapped("x" * 50 + " y", 11, 40) == "x" * 50 + "\n" + " " * 11 + "y"


def test_a_bar_never_fills_the_terminals_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        clock.now, stream = 0.0, Terminal()
        progress = TokenProgress("tokenizing data/fineweb_edu_10B", stream=stream)
        clock.now = 1.0
        progress.update(5_000_000, 0.5, note="shard 12 of 103, 1.2 GB/s read")
        drawn = stream.getvalue().removeprefix("\r\x1b[K")
        assert 0 < len(drawn) < columns
        assert "\r" not in drawn
