"""Metrics: what is measured, what is written, what is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import make_metrics

from gpt2.config import Config, DataConfig, GPTConfig, RunConfig
from gpt2.errors import UserError
from gpt2.metrics import recorder as metrics_module
from gpt2.metrics.history import read_metrics
from gpt2.metrics.recorder import Metrics, readable

CPU = torch.device("cpu")
RUN = RunConfig(max_steps=100, eval_every=20, wandb="disabled")
CONFIG = Config(model=GPTConfig(), data=DataConfig(total_batch_tokens=4096, micro_batch_size=4), run=RUN)


SCORES: dict[str, Any] = {
    "acc": 0.28,
    "acc_norm": 0.2900,
    "stderr": 0.0045,
    "examples": 10042,
    "convention": "completion",
}


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "perf_counter", clock)
    return clock


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Metrics]:
    def make(config: Config = CONFIG, **options: Any) -> Metrics:
        known = {"flops_per_token": 1e6, "device": CPU, "world_size": 1}
        return Metrics(tmp_path, config=config, **{**known, **options})

    return make


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl").live if record["kind"] == kind]


def test_speed_counts_training_only(tmp_path: Path, clock: Clock, start: Callable[..., Metrics]) -> None:
    """10 steps in 20 s, of which 3 s waiting for data, 6 s evaluating (a save inside counts as that), 1 s saving."""
    metrics = start(peak=2e8, world_size=2)
    clock.now += 10
    with metrics.phase("data"):
        clock.now += 3
    with metrics.phase("eval"):
        clock.now += 2
        with metrics.phase("save"):
            clock.now += 4
    with metrics.phase("save"):
        clock.now += 1
    metrics.train(10, loss=5.0, lr=1e-3, grad_norm=1.0)
    clock.now += 5
    metrics.train(20, loss=4.0, lr=1e-3, grad_norm=1.0)
    metrics.close("finished")
    first, second = records(tmp_path, "train")
    assert first["seconds"] == {"train": 10.0, "data": 3.0, "eval": 6.0, "save": 1.0}
    assert first["tokens_per_second"] == pytest.approx(10 * 4096 / 10)
    assert second["seconds"] == {"train": 5.0, "data": 0.0, "eval": 0.0, "save": 0.0}
    assert second["tokens_per_second"] == pytest.approx(10 * 4096 / 5)
    # FLOP/s over what two devices could do.
    assert second["mfu"] == pytest.approx(8192 * 1e6 / (2 * 2e8))
    assert second["tokens"] == 20 * 4096


def test_the_first_speed_after_a_restart_counts_its_own_steps_only(
    tmp_path: Path, clock: Clock, start: Callable[..., Metrics]
) -> None:
    metrics = start(start_step=50)
    clock.now += 2
    metrics.train(51, loss=5.0, lr=1e-3, grad_norm=1.0)
    metrics.close("stopped")
    assert records(tmp_path, "train")[0]["tokens_per_second"] == pytest.approx(4096 / 2)


def test_on_a_cpu_there_is_no_mfu_without_a_measured_peak(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    metrics = start()
    metrics.train(1, loss=5.0, lr=1e-3, grad_norm=1.0)
    metrics.close("finished")
    assert records(tmp_path, "train")[0]["mfu"] is None


def test_the_line_of_a_log(clock: Clock, start: Callable[..., Metrics], capsys: pytest.CaptureFixture[str]) -> None:
    metrics = start(peak=1e10)
    for step in (10, 20):
        with metrics.phase("eval"):
            clock.now += 2.5
        clock.now += 7.5
        metrics.train(step, loss=6.17123, lr=2.1e-4, grad_norm=0.931)
    metrics.close("finished")
    line = capsys.readouterr().out.splitlines()[1]
    figures = line.split(" | ")
    assert figures[0] == "step  20/100"
    assert figures[1:4] == ["loss 6.1712", "lr 2.10e-04", "norm 0.93"]
    assert figures[4:6] == ["5,461 tok/s", "mfu 54.6%"]
    assert figures[6].endswith(" GiB")
    # 80 steps at a second each, evaluation included: what the clock on the wall will show.
    assert figures[7:] == ["eval 25%", "1 min 20 s left"]


def test_evaluations_stand_out_with_the_distance_to_gpt2(
    start: Callable[..., Metrics], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = start(dataset="edufineweb")
    metrics.val(20, 3.5, 10_485_760, 48_000_000)
    metrics.val(40, 3.25, 16_384, 75_000)
    metrics.hellaswag(40, **SCORES)
    metrics.close("finished")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("=> step  20 | validation loss 3.5000 (1.1031 bits per byte) | GPT-2 124M on FineWeb-Edu ")
    assert first.endswith(" 3.2924: 0.2076 to go")
    assert "GPT-2 124M on FineWeb-Edu 3.2924: 0.0424 better (ours over 16,384 tokens" in second
    assert third.endswith("HellaSwag 29.00% (28.12% to 29.90%), 10,042 examples | GPT-2 124M 29.55%: 0.55 points to go")


@pytest.mark.parametrize(
    ("dataset", "n_layer", "expected"),
    [
        ("fineweb", 12, "FineWeb 3.4250"),
        ("edu_fineweb10B", 12, "FineWeb-Edu 3.2924"),
        ("pydocs", 12, None),
        ("", 12, None),
        ("fineweb", 11, None),
    ],
)
def test_a_baseline_is_only_given_for_its_own_data_and_size(
    start: Callable[..., Metrics], capsys: pytest.CaptureFixture[str], dataset: str, n_layer: int, expected: str | None
) -> None:
    metrics = start(replace(CONFIG, model=GPTConfig(n_layer=n_layer)), dataset=dataset)
    metrics.val(20, 3.5, 10_485_760, 48_000_000)
    metrics.close("finished")
    said = capsys.readouterr().out
    assert (expected in said) if expected else ("GPT-2" not in said)


def test_bits_per_byte_are_nats_over_bytes(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    metrics = start()
    metrics.val(20, 3.5, 1000, 4321)
    metrics.val(40, 3.5, 1000, 0)  # nothing but end-of-text
    metrics.close("finished")
    with_text, without = records(tmp_path, "val")
    assert with_text["bits_per_byte"] == pytest.approx(3500 / math.log(2) / 4321, rel=1e-12)
    assert math.isnan(float(without["bits_per_byte"]))


def test_harness_scores_are_not_held_against_completion_figures(
    start: Callable[..., Metrics], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = start()
    metrics.hellaswag(20, **{**SCORES, "convention": "harness"})
    metrics.close("finished")
    assert "GPT-2" not in capsys.readouterr().out


def test_every_kind_of_line_is_written_in_its_form(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    metrics = start(dataset="pydocs")
    metrics.val(0, 10.8, 100, 450)
    metrics.hellaswag(0, **SCORES)
    metrics.sample(0, "Hello,", " [bold]world\n")
    metrics.skip(7, "nonfinite", float("nan"), float("inf"))
    metrics.checkpoint(10, tmp_path / "checkpoints" / "step_000010")
    metrics.train(10, loss=float("nan"), lr=0.0, grad_norm=0.0)
    metrics.close("nonfinite")
    metrics.close("finished")  # says nothing more
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert history.torn == 0
    kinds = [record["kind"] for record in history.live]
    assert kinds == ["run_start", "val", "hellaswag", "sample", "skip", "checkpoint", "train", "run_end"]
    by_kind = dict(zip(kinds, history.live, strict=True))
    assert by_kind["sample"]["text"] == " [bold]world\n"
    assert by_kind["checkpoint"]["path"] == "checkpoints/step_000010"
    assert by_kind["hellaswag"]["stderr"] == 0.0045
    assert by_kind["run_end"]["reason"] == "nonfinite"
    assert by_kind["run_start"]["config"] == CONFIG.to_dict()
    assert by_kind["run_start"]["versions"]["torch"] == torch.__version__
    assert all({"step", "time"} <= record.keys() for record in history.live)


def test_a_restart_names_what_changed_and_supersedes(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    metrics = start()
    metrics.train(10, loss=5.0, lr=1e-3, grad_norm=1.0)
    position = metrics.position()
    metrics.train(20, loss=4.0, lr=1e-3, grad_norm=1.0)
    metrics.file.close()  # as a kill would
    changed = replace(CONFIG, run=replace(RUN, log_every=5))
    again = start(changed, start_step=10, position=position, world_size=4)
    again.train(20, loss=3.0, lr=1e-3, grad_norm=1.0)
    again.close("finished")
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in history.live if r["kind"] == "train"] == [(10, 5.0), (20, 3.0)]
    assert [(r["step"], r["loss"]) for r in history.superseded] == [(20, 4.0)]
    assert history.live[-1]["step"] == 20  # run_end's
    last = [record for record in history.live if record["kind"] == "run_start"][-1]
    assert last["config_changed"] == {"run.log_every": [10, 5]}
    assert last["world_size"] == 4


def test_a_start_from_nothing_supersedes_all(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    old = start()
    old.val(0, 10.5, 100, 450)
    old.train(10, loss=5.0, lr=1e-3, grad_norm=1.0)
    old.close("error")
    new = start(replace(CONFIG, run=replace(RUN, seed=2)))
    new.val(0, 10.25, 100, 450)
    new.checkpoint(7, tmp_path / "checkpoints" / "step_7")
    new.close("stopped")
    live = read_metrics(tmp_path / "metrics.jsonl").live
    assert [record["kind"] for record in live] == ["run_start", "val", "checkpoint", "run_end"]
    assert "config_changed" not in live[0]
    assert live[-1]["step"] == 7  # though nothing was logged at it


def test_a_directory_in_use_is_refused(tmp_path: Path, start: Callable[..., Metrics]) -> None:
    first = start()
    with pytest.raises(UserError, match="another process is training into"):
        start()
    first.close("finished")
    start().close("finished")


def test_a_sample_is_shown_as_a_person_can_read_it() -> None:
    assert readable("Hello,\n\n \n\t\nyou\x1b[2J \n\n") == "Hello,\nyou\\x1b[2J"
    assert readable("\n \n") == repr("\n \n")


def test_a_checkpoint_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics(tmp_path)
    metrics.checkpoint(5, tmp_path / "checkpoints" / "step_00000005")
    metrics.close("finished")
    assert f"step  5 | checkpoint {tmp_path}/checkpoints/step_00000005\n" in capsys.readouterr().out
