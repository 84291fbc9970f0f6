"""Tracing some of a run's steps."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2.train.profile import WAIT, WARMUP, StepProfiler


def trace(directory: Path, steps: int, taken: int, first_step: int = 0) -> StepProfiler:
    profiler = StepProfiler(directory, steps, torch.device("cpu"), first_step)
    for _ in range(taken):
        torch.ones(4) @ torch.ones(4)
        profiler.step()
    profiler.close()
    return profiler


def test_it_is_written_once_its_steps_are_over_and_named_by_them(tmp_path: Path) -> None:
    profiler = trace(tmp_path, steps=2, taken=WAIT + WARMUP + 4, first_step=10)
    assert profiler.written
    assert profiler.path == tmp_path / f"steps_{10 + WAIT + WARMUP + 1}_to_{10 + WAIT + WARMUP + 2}.json"
    assert profiler.path.stat().st_size > 0


def test_a_run_that_ends_early_names_the_steps_that_were_traced(tmp_path: Path) -> None:
    profiler = trace(tmp_path, steps=6, taken=WAIT + WARMUP + 2)
    assert profiler.path.name == f"steps_{WAIT + WARMUP + 1}_to_{WAIT + WARMUP + 2}.json"
    assert [path.name for path in tmp_path.iterdir()] == [profiler.path.name]


def test_a_run_too_short_to_trace_leaves_nothing(tmp_path: Path) -> None:
    profiler = trace(tmp_path, steps=2, taken=WAIT)
    assert not profiler.written
    assert not list(tmp_path.glob("*.json"))
