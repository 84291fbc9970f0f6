"""The words and exit codes a run ends with; tests/end_to_end ends real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from fake_runs import tiny, write_run
from small_runs import ALONE

from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import World
from gpt2.metrics.history import read_metrics
from gpt2.train.ending import finish, resume_command


def make_run(directory: Path, failed_step: int | None = None, world: World = ALONE) -> Any:
    said: list[str] = []
    return SimpleNamespace(
        directory=directory,
        world=world,
        step=7,
        writer=MagicMock(failed_step=failed_step),
        metrics=MagicMock(),
        watch=MagicMock(),
        lock=MagicMock(),
        said=said,
        say=said.append,
    )


def test_a_finished_run_has_nothing_to_fix(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert finish(run, "finished", StopSignals()) == 0
    assert not [line for line in run.said if "error" in line or "stopped" in line]
    run.writer.wait.assert_called()
    run.metrics.close.assert_called_once_with("finished")
    run.lock.close.assert_called_once()


@pytest.mark.parametrize("received", ["SIGTERM", None])
def test_a_stopped_run_names_the_signal_and_the_command(tmp_path: Path, received: str | None) -> None:
    run, signals = make_run(tmp_path), StopSignals()
    signals.received = received
    assert finish(run, "stopped", signals) == 0
    line = next(line for line in run.said if line.startswith("stopped by"))
    assert line.startswith(f"stopped by {received or 'a signal to another process'} after step 7; resume with: python")


@pytest.mark.parametrize("reason", ["finished", "stopped"])
def test_a_last_step_that_is_not_saved_is_an_error(tmp_path: Path, reason: Any) -> None:
    run = make_run(tmp_path, failed_step=7)
    assert finish(run, reason, StopSignals()) == 2
    assert any(line.startswith("error: step 7 is not saved") for line in run.said)
    assert finish(make_run(tmp_path, failed_step=5), reason, StopSignals()) == 0  # an earlier one is no longer missed


def test_the_command_that_resumes_fits_how_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    path = tmp_path / "with a space"
    assert resume_command(make_run(path)).startswith("python ")
    assert f"'{path}/config.json'" in resume_command(make_run(path))
    eight = World(0, 0, 8, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "torchrun --standalone --nproc_per_node=8 " in resume_command(make_run(path, world=eight))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two machines
    assert "--standalone" not in resume_command(make_run(path, world=eight))


def test_a_finished_run_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(write_run(tmp_path / "run", **tiny(steps=60, world_size=2)))
    run.step, run.config = 60, SimpleNamespace(run=SimpleNamespace(price=3.0))
    for step in (30, 60):
        (tmp_path / f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/step_{step:08d}/training.json").write_text("{}")
    assert finish(run, "finished", StopSignals()) == 0
    said = capsys.readouterr().out.splitlines()
    history = read_metrics(tmp_path / "run/metrics.jsonl")
    val = {record["step"]: record["loss"] for record in history.live if record["kind"] == "val"}
    hours = sum(sum(record["seconds"].values()) for record in history.live if "seconds" in record) / 3600
    assert said[0].startswith("done       60 steps in 5 min ")
    assert said[0].endswith(f", {2 * hours:.2f} device-hours")
    assert said[1] == f"cost       {6 * hours:.2f} at 3 per device-hour"
    assert said[2] == f"loss       {val[60]:.4f} on the validation split at step 60; the best of all evaluations"
    assert said[3] == f"checkpoint {tmp_path}/run/checkpoints/step_00000060, the newest of 2"
    assert said[4] == f"next       python scripts/sample.py -m {tmp_path}/run"
    assert said[-1].endswith(f"python scripts/export.py {tmp_path}/run@best DIR")
