"""Where a run stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import ALONE, small

from gpt2.train.ending import close
from gpt2.train.setup import set_up


def test_a_step_counts_its_sequences_and_tells_of_epochs(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = set_up(small(char_data, tmp_path), ALONE)  # 203 blocks, 8 per step
    run.val_loss = 3.0
    try:
        for _ in range(25):
            run.advance()
        assert (run.step, run.sequences_read, run.val_loss) == (25, 200, None)
        assert " ended in step " not in capsys.readouterr().out
        run.advance()
        assert "epoch 1 ended in step 26: each of 203 sequences was read once" in capsys.readouterr().out
    finally:
        close(run, "error")


def test_the_loader_begins_where_the_run_stands(char_data: Path, tmp_path: Path) -> None:
    run = set_up(small(char_data, tmp_path), ALONE)
    try:
        with run.open_loader() as loader:
            loader.next()
            second = loader.next()
        run.advance()
        with run.open_loader() as loader:
            again = loader.next()
        assert all(bool((a == b).all()) for a, b in zip(second[0], again[0], strict=True))
    finally:
        close(run, "error")


def test_a_checkpoint_is_due_where_an_evaluation_is_the_best(char_data: Path, tmp_path: Path) -> None:
    run = set_up(small(char_data, tmp_path, checkpoint_every=100), ALONE)
    try:
        run.evaluated(5.0)  # before the first step there is nothing to save
        assert not run.save_due
        for loss, due in ((4.0, True), (4.0, False), (None, False), (float("nan"), False), (3.9, True), (4.5, False)):
            run.advance()
            run.save_due = False
            run.evaluated(loss)
            assert run.save_due == due, loss
            assert run.val_loss is loss
        assert run.best_val_loss == 3.9
    finally:
        close(run, "error")
