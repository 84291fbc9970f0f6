"""Whether a step counts, signals, the lock."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gpt2.train.guard import SPIKE_WARMUP, StepGuard

CPU = torch.device("cpu")


def judge(guard: StepGuard, loss: float, norm: float = 1.0) -> tuple[float, float]:
    veto, nonfinite = guard.veto(torch.tensor(loss), torch.tensor(norm))
    return veto.item(), nonfinite.item()


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_not_finite_once(bad: tuple[float, float]) -> None:
    skip, stop = StepGuard(CPU, "skip"), StepGuard(CPU, "stop")
    for guard in (skip, stop):
        assert judge(guard, 2.0) == (0, 0)
        assert judge(guard, *bad) == (1, 1)
    assert judge(skip, 2.0) == (0, 0)
    assert judge(stop, 2.0) == (1, 1)  # no later update either, until the host has noticed


def test_spikes_are_measured_against_the_mean_and_deviation_of_what_counted() -> None:
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.standard_normal((SPIKE_WARMUP, 2))
    guard = StepGuard(CPU, "skip", spike_zscore=5.0)
    for number, (loss, norm) in enumerate(values):
        assert judge(guard, loss, norm) == (0, 0)
        # While fewer than 50 steps are known, they weigh the same: the plain mean and variance.
        known = values[: number + 1]
        expected = [number + 1, *np.stack([known.mean(0), known.var(0)], axis=1).reshape(-1), 0]
        np.testing.assert_allclose(guard.state.numpy(), expected, rtol=2e-4, atol=1e-6)
    mean, deviation = values.mean(0), values.std(0)
    state = guard.state.clone()
    assert judge(guard, mean[0] + 5.1 * deviation[0], mean[1]) == (1, 0)
    assert judge(guard, mean[0], mean[1] + 5.1 * deviation[1]) == (1, 0)
    assert judge(guard, math.nan, mean[1]) == (1, 1)
    assert torch.equal(guard.state, state)  # what did not count does not shift what counts
    assert judge(guard, mean[0] - 50 * deviation[0], mean[1]) == (0, 0)  # below is welcome
    assert not torch.equal(guard.state, state)


def test_spikes_are_not_looked_for_at_first() -> None:
    guard = StepGuard(CPU, "skip", spike_zscore=3.0)
    for step in range(SPIKE_WARMUP):
        assert judge(guard, 10.0 - step * 0.01 + (step % 2) * 0.1) == (0, 0)
        if step == 3:
            assert judge(StepGuard(CPU, "skip", 3.0), 1e9) == (0, 0)
    assert judge(guard, 30.0) == (1, 0)


def test_the_memory_of_old_steps_fades() -> None:
    guard = StepGuard(CPU, "skip", spike_zscore=100.0)
    for step in range(400):
        judge(guard, (10.0 if step < 100 else 2.0) + 0.1 * (step % 2))
    assert guard.state[1].item() == pytest.approx(2.05, abs=0.06)


def test_without_a_threshold_nothing_is_a_spike() -> None:
    guard = StepGuard(CPU, "skip")
    assert [judge(guard, loss)[0] for loss in [1.0] * 30 + [1e30]] == [0] * 31
