"""wandb and TensorBoard: what reaches them, and that their failures never reach training."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_metrics as make
from repository import ROOT

from gpt2.metrics import recorder as metrics_module
from gpt2.metrics import trackers
from gpt2.metrics.history import read_metrics

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def read_wandb(path: Path) -> list[dict[str, Any]]:
    """Records of a wandb log, read by wandb's own reader."""
    result = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)], capture_output=True, text=True
    )
    if result.returncode != 0:
        pytest.skip(f"this wandb has no reader of its own logs: {result.stderr.strip()[:120]}")
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_wandb
def test_an_offline_run_reads_back_with_wandbs_own_reader_and_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    metrics = make(tmp_path, wandb="offline", wandb_project="some-project")
    metrics.train(5, loss=5.5, lr=1e-3, grad_norm=1.25)
    metrics.val(5, 5.75, 100, 450)
    metrics.sample(5, "Hello,", " first")
    metrics.checkpoint(5, tmp_path / "checkpoints" / "step_5")
    metrics.close("stopped")
    again = make(tmp_path, start_step=5, wandb="offline", wandb_project="some-project")
    again.sample(10, "Hello,", " second")
    again.close("finished")

    logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(logs) == 2
    assert logs[0].name == logs[1].name  # one id
    first = read_wandb(logs[0])
    assert next(record["run"]["project"] for record in first if record["type"] == "run") == "some-project"
    text = json.dumps(first)
    assert '"learning_rate"' in text  # the configuration
    rows = [r["history"] for r in first if r["type"] == "history"]
    flat = json.dumps(rows)
    for figure in ("train/loss", "5.5", "val/loss", "5.75", "train/grad_norm", "1.25"):
        assert figure in flat
    assert any(r["type"] == "artifact" or "artifact" in json.dumps(r) for r in first)
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda p: p.stat().st_mtime_ns)
    assert json.loads(tables[-1].read_text())["data"] == [[5, "Hello,", " first"], [10, "Hello,", " second"]]


UNREACHABLE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from gpt2.metrics import trackers
from fake_runs import make_metrics as make
trackers.INIT_SECONDS = 1
metrics = make(Path(sys.argv[1]), wandb="auto")
metrics.train(10, loss=5.0, lr=1e-3, grad_norm=1.0)
metrics.close("finished")
"""


@needs_wandb
@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
def test_an_unreachable_server_leaves_an_offline_record_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    # In a process of its own: wandb reads its settings once in each.
    result = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(tmp_path), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wandb: no connection") == 1
    assert "failed" not in result.stdout.replace("Failed to get", "")
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert history.live[-1]["reason"] == "finished"
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "train/loss" in json.dumps(read_wandb(log))


@pytest.mark.usefixtures("no_key")
def test_auto_looks_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert trackers.resolve_wandb_mode("auto", said.append) == "disabled"
    assert len(said) == (importlib.util.find_spec("wandb") is not None)
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password key\n")
    assert trackers.wandb_key_configured()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not trackers.wandb_key_configured()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert trackers.wandb_key_configured()
    assert trackers.resolve_wandb_mode("offline", said.append) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")  # wandb's own variable wins over auto, not over a flag
    assert trackers.resolve_wandb_mode("auto", said.append) == "offline"
    assert trackers.resolve_wandb_mode("disabled", said.append) == "disabled"


def test_a_failing_tracker_is_said_once_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        def scalars(self, step: int, values: Any) -> None:
            raise RuntimeError("the network\nis gone")

        sample = checkpoint = close = scalars

    monkeypatch.setattr(metrics_module, "Wandb", Failing)
    metrics = make(tmp_path, wandb="offline")
    for step in range(1, 4):
        metrics.train(step, loss=5.0, lr=1e-3, grad_norm=1.0)
    metrics.close("finished")
    assert capsys.readouterr().out.count("wandb failed and is off for the rest of this run: the network") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl").live) == 5


def test_a_tracker_that_cannot_start_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr(metrics_module, "TensorBoard", broken)
    metrics = make(tmp_path, wandb="disabled", tensorboard=True)
    metrics.train(1, loss=5.0, lr=1e-3, grad_norm=1.0)
    metrics.close("finished")
    assert "TensorBoard failed and is off for the rest of this run: No module" in capsys.readouterr().out


@needs_tensorboard
def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = make(tmp_path, wandb="disabled", tensorboard=True)
    metrics.train(5, loss=5.5, lr=1e-3, grad_norm=1.0)
    metrics.train(6, loss=9.9, lr=1e-3, grad_norm=1.0)
    metrics.sample(5, "Hello,", " world")
    metrics.close("stopped")
    again = make(tmp_path, start_step=5, wandb="disabled", tensorboard=True)
    again.train(6, loss=5.25, lr=1e-3, grad_norm=1.0)
    again.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(5, 5.5), (6, 5.25)]


def test_disabled_writes_nothing_but_the_file(tmp_path: Path) -> None:
    metrics = make(tmp_path, wandb="disabled")
    metrics.close("finished")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
