"""The learning rate, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gpt2.config import OptimConfig, Schedule
from gpt2.train.schedule import lr_factor, plot_schedule


def factors(schedule: Schedule, steps: list[int], total: int = 110, **changes: float) -> list[float]:
    config = OptimConfig(schedule=schedule, **{"warmup_steps": 10, "min_lr_ratio": 0.1, **changes})  # type: ignore[arg-type]
    return [lr_factor(step, total, config) for step in steps]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_from_the_first_step_to_the_peak(schedule: Schedule) -> None:
    assert factors(schedule, [0, 4, 9]) == [0.1, 0.5, 1.0]
    assert factors(schedule, [0], warmup_steps=0) == [1.0]


def test_cosine() -> None:
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert factors("cosine", [10, 35, 60, 110, 500]) == pytest.approx([1, quarter, 0.55, 0.1, 0.1])


def test_linear() -> None:
    assert factors("linear", [10, 35, 60, 110, 500]) == pytest.approx([1, 0.775, 0.55, 0.1, 0.1])
    assert factors("linear", [110], min_lr_ratio=0) == [0]


def test_wsd() -> None:
    # The last 20 % of 110 steps: from step 88 down to 110.
    assert factors("wsd", [10, 50, 88, 99, 110, 500]) == pytest.approx([1, 1, 1, 0.55, 0.1, 0.1])
    assert factors("wsd", [10, 60], decay_fraction=1) == pytest.approx([1, 0.55])  # never into the warm-up
    assert factors("wsd", [109, 110], decay_fraction=0) == pytest.approx([1, 0.1])


def test_constant() -> None:
    assert factors("constant", [10, 60, 110, 500]) == [1, 1, 1, 1]


def test_the_124m_recipe() -> None:
    # build-nanogpt: 6e-4 peak, 715 steps of warm-up, cosine to 6e-5 at step 19,073.
    config = OptimConfig()
    assert [round(6e-4 * lr_factor(s, 19_073, config), 9) for s in (0, 714, 715, 19_073)] == [8.39e-7, 6e-4, 6e-4, 6e-5]


def test_no_more_steps_than_warmup() -> None:
    assert factors("cosine", [0, 9], total=5) == [0.1, 1.0]
    assert factors("wsd", [10], total=5) == pytest.approx([0.1])


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "schedule.png"
    plot_schedule(path, 1, OptimConfig())
    plot_schedule(path, 19_073, OptimConfig())
    assert path.read_bytes().startswith(b"\x89PNG")
