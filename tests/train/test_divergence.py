"""What a step's numbers mean for the run, told without one: a stand-in run records what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from small_runs import ALONE

from gpt2.errors import UserError
from gpt2.train.divergence import MAX_SKIPS_IN_A_ROW, Diverged, PendingStep, digest
from gpt2.train.step import Flags, StepNumbers


def make_run(on_nonfinite: str = "stop", log_every: int = 5) -> Any:
    settings = SimpleNamespace(on_nonfinite=on_nonfinite, log_every=log_every, max_steps=12, seed=0)
    return SimpleNamespace(
        config=SimpleNamespace(run=settings),
        world=ALONE,
        dtype="fp32",
        model=torch.nn.Linear(1, 1),
        metrics=MagicMock(),
        writer=MagicMock(),
        stopping=False,
        save_due=False,
        skips_in_a_row=0,
    )


def pending(step: int, **numbers: Any) -> PendingStep:
    found = StepNumbers(
        **{
            "loss": 2.0,
            "grad_norm": 0.5,
            "updated": True,
            "nonfinite": False,
            "flags": Flags(),
            "bad_ranks": [],
            **numbers,
        }
    )
    return PendingStep(step, 1e-3, MagicMock(read=lambda: found), [])


def test_only_every_so_many_steps_and_the_last_one_are_logged() -> None:
    run = make_run()
    for step in range(1, 13):
        digest(run, pending(step, loss=float(step)), MagicMock())
    logged = {call.args[0]: call.kwargs for call in run.metrics.train.call_args_list}
    assert list(logged) == [5, 10, 12]
    assert logged[10] == {"loss": 10.0, "lr": 1e-3, "grad_norm": 0.5}
    assert run.writer.busy.call_count == 12  # finished checkpoints are reported in every step


@pytest.mark.parametrize(
    ("flags", "stopping", "save_due"), [(Flags(stop=True), True, False), (Flags(save=True), False, True)]
)
def test_what_another_process_asked_for_is_taken_up(flags: Flags, stopping: bool, save_due: bool) -> None:
    run = make_run()
    digest(run, pending(1, flags=flags), MagicMock())
    assert (run.stopping, run.save_due) == (stopping, save_due)
    digest(run, pending(2), MagicMock())
    assert (run.stopping, run.save_due) == (stopping, save_due)  # and not forgotten in the next step


def test_a_process_without_data_ends_the_run_by_its_own_error() -> None:
    loader = MagicMock(raise_failure=MagicMock(side_effect=UserError("the shard is gone")))
    with pytest.raises(UserError, match="the shard is gone"):
        digest(make_run(), pending(1, flags=Flags(failed=True), nonfinite=True, updated=False), loader)


def test_a_value_that_is_not_finite_stops_the_run_and_names_the_rank() -> None:
    with pytest.raises(Diverged, match=r"loss is not finite on rank 1, 3 in step 7; the weights") as caught:
        digest(make_run(), pending(7, loss=float("nan"), updated=False, nonfinite=True, bad_ranks=[1, 3]), MagicMock())
    assert caught.value.reason == "nonfinite"
    assert "--on-nonfinite skip" in caught.value.hint


@pytest.mark.parametrize(("nonfinite", "reason"), [(True, "nonfinite"), (False, "spike")])
def test_skipped_updates_are_recorded_and_too_many_in_a_row_end_the_run(nonfinite: bool, reason: str) -> None:
    run = make_run(on_nonfinite="skip")
    for step in range(1, MAX_SKIPS_IN_A_ROW):
        digest(run, pending(step, updated=False, nonfinite=nonfinite), MagicMock())
    digest(run, pending(20), MagicMock())  # one that counts: the row is over
    assert run.skips_in_a_row == 0
    for step in range(30, 30 + MAX_SKIPS_IN_A_ROW - 1):
        digest(run, pending(step, updated=False, nonfinite=nonfinite), MagicMock())
    with pytest.raises(Diverged, match=rf"{MAX_SKIPS_IN_A_ROW} updates in a row .* at step 99") as caught:
        digest(run, pending(99, updated=False, nonfinite=nonfinite), MagicMock())
    assert caught.value.reason == reason
    assert ("--spike-zscore" in caught.value.hint) == (reason == "spike")
    assert {call.args[1] for call in run.metrics.skip.call_args_list} == {reason}
