"""A run with `--max-minutes`: how many steps it takes, and that it keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT
from small_runs import finish, flags, losses, records, small, train

from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.report.runs import open_run
from gpt2.train import length
from gpt2.train.length import steps_that_fit
from gpt2.train.run import Run
from gpt2.train.schedule import lr_factor


@given(
    step=st.integers(0, 50),
    more=st.integers(0, 60),
    seconds=st.integers(-5, 200),
    every=st.integers(0, 9),
    evaluation=st.integers(0, 20),
)
def test_no_more_steps_fit(step: int, more: int, seconds: int, every: int, evaluation: int) -> None:
    """Against a run that is played through, step by step of 2 s each."""

    def played(total: int) -> int:
        due = [s for s in range(step, total + 1) if every and (s % every == 0 or s == total)]
        return 2 * (total - step) + evaluation * len(due)

    fitting = [total for total in range(step, step + more + 1) if played(total) <= seconds]
    assert steps_that_fit(step, step + more, seconds, 2.0, every, evaluation) == max(fitting, default=step)


class Clock:
    """In place of `time`: each step takes `seconds`, the first one of a start 100 s more."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.time = seconds, 0.0

    def monotonic(self) -> float:
        return self.time

    def prepare(self, run: Run) -> None:
        self.time = run.began = 0.0
        start, advance = run.step, run.advance

        def step() -> None:
            self.time += self.seconds + (100 if run.step == start else 0)
            advance()

        run.advance = step  # type: ignore[method-assign]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(seconds=2.0)
    monkeypatch.setattr(length, "time", clock)
    return clock


def stored(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "config.json").read_text())["run"])


def test_the_length_is_fixed_printed_and_stored_and_the_schedule_follows(
    char_data: Path, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(char_data, tmp_path / "run", max_minutes=2.3, checkpoint_every=10, warmup_steps=3)
    run = train(config, prepare=clock.prepare)
    # The first step ends at 102 s, the fifth, and fourth timed, at 110 s; of the 28 s left 26.6 hold 13 steps.
    assert run.step == 18 == run.config.run.total_steps
    assert stored(run.directory)["fitted_steps"] == 18
    assert stored(run.directory)["max_steps"] == 30
    out = capsys.readouterr().out
    assert "at most 30 steps = 15,360 tokens" in out
    assert "18 of 30 steps fit into 2.3 min (2 s per step)" in out
    rates = {line["step"]: line["lr"] for line in records(run.directory)}
    for step in (1, 5):  # before the length was known, and in step 5 itself
        assert rates[step] == pytest.approx(1e-2 * lr_factor(step - 1, 30, config.optim))
    for step in (6, 12, 18):
        assert rates[step] == pytest.approx(1e-2 * lr_factor(step - 1, 18, config.optim))
    assert open_run(run.directory).start["total_steps"] == 18


def test_a_run_that_was_stopped_keeps_its_length(char_data: Path, tmp_path: Path, clock: Clock) -> None:
    whole = train(small(char_data, tmp_path / "whole", max_minutes=2.3), prepare=clock.prepare)
    parts = small(char_data, tmp_path / "parts", max_minutes=2.3)
    train(parts, stop_after=10, prepare=clock.prepare)
    assert stored(tmp_path / "parts")["fitted_steps"] == 18
    clock.seconds = 50.0  # the machine has become slower
    again = train(parts, prepare=clock.prepare)
    assert again.step == whole.step == 18
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # The stored settings are those of the run, and repeat it in another place with the same length.
    assert Config.load(tmp_path / "parts/config.json").run.total_steps == 18


def test_a_run_that_was_stopped_before_its_length_was_known(char_data: Path, tmp_path: Path, clock: Clock) -> None:
    config = small(char_data, tmp_path / "run", max_minutes=2.3)
    train(config, stop_after=3, prepare=clock.prepare)
    assert stored(tmp_path / "run")["fitted_steps"] is None
    again = train(config, prepare=clock.prepare)
    assert again.step == 3 + 18  # as many as fit into a start of its own


def test_other_limits_are_a_change_and_fix_another_length(char_data: Path, tmp_path: Path, clock: Clock) -> None:
    train(small(char_data, tmp_path / "run", max_minutes=2.3), stop_after=10, prepare=clock.prepare)
    longer = small(char_data, tmp_path / "run", max_minutes=2.1)
    with pytest.raises(UserError, match=r"max_minutes 2\.3 → 2\.1"):
        train(longer, prepare=clock.prepare)
    longer = small(char_data, tmp_path / "run", max_minutes=2.1, allow_config_change=True)
    assert train(longer, prepare=clock.prepare).step == 22  # 126 s: 16 s are left at step 15
    assert stored(tmp_path / "run")["fitted_steps"] == 22


def test_a_run_that_was_begun_without_a_limit_keeps_its_length(
    char_data: Path, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the quickstart's of versions without --max-minutes."""
    train(small(char_data, tmp_path / "run"), stop_after=3)
    assert train(small(char_data, tmp_path / "run", max_minutes=2.3), prepare=clock.prepare).step == 30
    assert "begun without --max-minutes, and keeps its 30 steps" in capsys.readouterr().out


def test_evaluations_are_part_of_the_minutes(char_data: Path, tmp_path: Path, clock: Clock) -> None:
    def prepare(run: Run) -> None:
        clock.prepare(run)
        run.evaluator.seconds = Seconds()

    class Seconds(list[float]):
        """10 s for each evaluation, whatever it took."""

        def append(self, seconds: float) -> None:
            clock.time += 10.0
            super().append(10.0)

    run = train(small(char_data, tmp_path / "run", max_minutes=2.6, eval_every=4), prepare=prepare)
    # 10 s before the first step, which ends at 112 s; the fifth at 130 s, behind the evaluation at step 4.
    # Of the 26 s left 24.7 hold the evaluation at step 8, three steps until then and no second evaluation.
    assert run.step == 8


def test_a_run_that_is_out_of_time_ends(char_data: Path, tmp_path: Path, clock: Clock) -> None:
    run = train(small(char_data, tmp_path / "run", max_minutes=1), prepare=clock.prepare)
    assert run.step == 5
    assert (tmp_path / "run/checkpoints/step_00000005").is_dir()


def test_two_processes_agree(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path / "run", max_minutes=0.02, max_steps=1_000_000, micro_batch_size=4)
    code, output = finish(ROOT / "train_gpt2.py", flags(config), processes=2)
    assert code == 0, output
    steps = stored(tmp_path / "run")["fitted_steps"]
    assert 5 <= steps < 1_000_000
    assert f"{steps:,} of 1,000,000 steps fit" in output
    assert (tmp_path / f"run/checkpoints/step_{steps:08d}").is_dir()
