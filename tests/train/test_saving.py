"""When a checkpoint is due, and what goes into it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from small_runs import ALONE, small

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.distributed.world import World
from gpt2.train.ending import close
from gpt2.train.saving import minutes_are_up, save
from gpt2.train.setup import set_up


def test_minutes_are_counted_by_rank_0_alone(char_data: Path, tmp_path: Path) -> None:
    run = set_up(small(char_data, tmp_path, checkpoint_minutes=2.0), ALONE)
    try:
        assert not minutes_are_up(run)
        run.saved_at = time.monotonic() - 121
        assert minutes_are_up(run)
        run.world = World(1, 1, 2, torch.device("cpu"))
        assert not minutes_are_up(run)
    finally:
        close(run, "error")


@pytest.mark.parametrize(("loss", "stored"), [(2.5, 2.5), (math.nan, None), (None, None)])
def test_a_step_is_saved_once_with_what_resuming_needs(
    char_data: Path, tmp_path: Path, loss: float | None, stored: float | None
) -> None:
    run = set_up(small(char_data, tmp_path), ALONE)
    run.step, run.sequences_read, run.val_loss, run.save_due = 3, 24, loss, True
    try:
        save(run)
        assert not run.save_due
        run.writer.wait()
        (path,) = list_checkpoints(tmp_path / "checkpoints")
        before = path.stat().st_mtime_ns
        save(run)
        run.writer.wait()
        assert path.stat().st_mtime_ns == before
    finally:
        close(run, "error")
    training = json.loads((path / "training.json").read_text())
    assert (training["step"], training["sample"], training["tokens"], training["val_loss"]) == (3, 24, 24 * 64, stored)
    assert training["data_fingerprint"] == run.dataset.fingerprint
    assert training["config"] == run.config.to_dict()
