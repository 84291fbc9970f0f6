"""What a step's numbers mean for the run, told without one: a stand-in run records what is asked of it."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from small_runs import ALONE

from gpt2.config import GPTConfig, OptimConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train.divergence import MAX_SKIPS_IN_A_ROW, Diverged, PendingStep, digest
from gpt2.train.step import Flags, StepNumbers


def make_run(on_nonfinite: str = "stop", log_every: int = 5, grad_clip: float = 1.0, dtype: str = "fp32") -> Any:
    run = SimpleNamespace(
        on_nonfinite=on_nonfinite, log_every=log_every, total_steps=12, seed=0, compile=False, spike_zscore=4.0
    )
    return SimpleNamespace(
        config=SimpleNamespace(run=run, optim=OptimConfig(learning_rate=6e-4, grad_clip=grad_clip)),
        world=ALONE,
        dtype=dtype,
        model=GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9)).init_weights(0),
        metrics=MagicMock(),
        writer=MagicMock(),
        stopping=False,
        save_due=False,
        skips_in_a_row=0,
        last_norms=deque(maxlen=5),
        told_of_waiting=False,
        dataset=SimpleNamespace(directory="data/here"),
        say=MagicMock(),
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


def test_waiting_for_data_is_said_once() -> None:
    run = make_run()
    for step, waiting in enumerate([False, True, True], start=1):
        digest(run, pending(step, flags=Flags(waiting=waiting)), MagicMock())
        assert run.say.call_count == (step > 1)
    assert "more than 10% of the time; is data/here on slow storage?" in run.say.call_args.args[0]


def test_a_process_without_data_ends_the_run_by_its_own_error() -> None:
    loader = MagicMock(raise_failure=MagicMock(side_effect=UserError("the shard is gone")))
    with pytest.raises(UserError, match="the shard is gone"):
        digest(make_run(), pending(1, flags=Flags(failed=True), nonfinite=True, updated=False), loader)


def test_a_value_that_is_not_finite_stops_the_run_and_names_the_rank() -> None:
    with pytest.raises(Diverged, match=r"loss is not finite on rank 1, 3 in step 7; the weights") as caught:
        digest(make_run(), pending(7, loss=float("nan"), updated=False, nonfinite=True, bad_ranks=[1, 3]), MagicMock())
    assert caught.value.reason == "nonfinite"
    assert "--on-nonfinite skip --allow-config-change" in caught.value.flags


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
    assert any("--spike-zscore 8" in flag for flag in caught.value.flags) == (reason == "spike")
    assert not any("--on-nonfinite" in flag for flag in caught.value.flags)  # it was given, and did not help
    assert {call.args[1] for call in run.metrics.skip.call_args_list} == {reason}


def diverged(run: Any) -> Diverged:
    rows = torch.arange(9)[None]
    step = pending(7, grad_norm=float("nan"), updated=False, nonfinite=True)
    with pytest.raises(Diverged) as caught:
        digest(run, PendingStep(7, 3e-4, step.numbers, [(rows[:, :-1], rows[:, 1:])]), MagicMock())
    return caught.value


def test_it_is_said_where_and_at_which_learning_rate_and_what_may_help() -> None:
    run = make_run(grad_clip=0.0, dtype="bf16")
    for step, norm in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 60.0)):
        digest(run, pending(step + 1, grad_norm=norm), MagicMock())
    run.model.h[0].mlp.register_forward_hook(lambda *_: torch.full((1, 8, 8), torch.inf))
    failure = diverged(run)
    assert "the gradient is not finite on rank 0 in step 7" in str(failure)
    assert failure.circumstances[0] == (
        "learning rate 0.0003 in that step; gradient norms of the last updates: 0.2, 0.3, 0.4, 0.5, 60"
    )
    assert failure.circumstances[1] == "done again, the step is first not finite in the output of h.0.mlp (rank 0)"
    assert [flag.removesuffix(" --allow-config-change") for flag in failure.flags] == [
        *("--learning-rate 0.0003", "--grad-clip 1", "--dtype fp32", "--on-nonfinite skip")
    ]


def test_what_is_finite_when_done_again_is_said_to_be() -> None:
    assert "done again, the step is finite" in diverged(make_run()).circumstances[1]
    run = make_run()
    run.config.run.compile = True
    assert "--no-compile may help" in diverged(run).circumstances[1]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_skipping_is_never_offered_where_the_weights_are_not_finite(on_nonfinite: str) -> None:
    run = make_run(on_nonfinite)
    run.skips_in_a_row = MAX_SKIPS_IN_A_ROW - 1
    with torch.no_grad():
        run.model.h[0].attn.c_proj.weight[0, 0] = torch.nan
    failure = diverged(run)
    assert "the weight h.0.attn.c_proj.weight (rank 0)" in failure.circumstances[1]
    assert not failure.flags
    assert "start from earlier ones" in failure.hint
