"""Saving in the background, and which checkpoints stay."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from small_checkpoints import TINY, TOKENIZER, damage, make

from gpt2.checkpoint import writer as checkpoint_writer
from gpt2.checkpoint.directory import list_checkpoints, write_checkpoint
from gpt2.checkpoint.mirror import NoMirror
from gpt2.checkpoint.writer import CheckpointWriter, prune_checkpoints


def steps(directory: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(directory)]


def writer(directory: Path, said: list[object], keep: int = 3, keep_every: int = 0) -> CheckpointWriter:
    return CheckpointWriter(
        directory,
        TINY,
        TOKENIZER,
        keep,
        keep_every,
        saved=lambda step, path: said.append((step, path.name, threading.current_thread().name)),
        warn=said.append,
        mirror=NoMirror(),
    )


def test_saving_goes_on_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(*args: object) -> Path:
        gate.wait(20)
        return write_checkpoint(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    said: list[object] = []
    w = writer(tmp_path, said)
    w.save(make(1))  # returns at once
    assert w.busy()
    assert w.busy(seconds=0.01)
    assert said == []
    gate.set()
    w.save(make(2))  # waits for the first, whose end is told by this thread
    assert said == [(1, "step_00000001", "MainThread")]
    w.wait()
    assert not w.busy()
    assert steps(tmp_path) == [1, 2]
    assert w.newest() == tmp_path / "step_00000002"


def test_a_failure_is_told_and_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    w = writer(tmp_path, said)

    def full(*args: object) -> Path:
        raise OSError(28, "No space left on device")

    for step, how in ((1, full), (2, write_checkpoint), (3, full), (4, write_checkpoint)):
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", how)
        w.save(make(step))
        w.wait()
        assert w.failed_step == (step if how is full else None)
    assert steps(tmp_path) == [2, 4]
    first, _, third, _ = map(str, said)
    assert (
        "checkpoint of step 1 could not be written ([Errno 28] No space left on device); there is no earlier" in first
    )
    assert third.endswith(f"the last good one is {tmp_path / 'step_00000002'}")


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".writing-step_00000009").mkdir(parents=True)
    (tmp_path / ".writing-step_00000009" / "model.safetensors").write_text("half")
    (tmp_path / ".writing-latest").write_text("st")
    writer(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def write(directory: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        write_checkpoint(directory, make(step, val_loss=loss), TINY, TOKENIZER)


def test_the_newest_the_best_and_the_milestones_stay(tmp_path: Path) -> None:
    write(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.0, 6: 5.0, 7: None, 8: None})
    prune_checkpoints(tmp_path, keep=2, keep_every=3)
    assert steps(tmp_path) == [2, 3, 6, 7, 8]
    prune_checkpoints(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [2, 8]
    prune_checkpoints(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [2, 8]


def test_nothing_goes_while_the_newest_is_not_sound(tmp_path: Path) -> None:
    write(tmp_path, {1: None, 2: None, 3: None})
    damage(tmp_path / "step_00000003", "flipped")
    prune_checkpoints(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [1, 2, 3]
    write(tmp_path, {4: None})
    damage(tmp_path / "step_00000002", "no JSON")
    prune_checkpoints(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [4]


def test_a_save_that_takes_longer_than_torchrun_waits_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    w = writer(tmp_path, said)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    w.save(make(1))
    w.wait()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    for step in (2, 3):
        w.save(make(step))
        w.wait()
    assert [line[0] for line in said if isinstance(line, tuple)] == [1, 2, 3]
    (line,) = [line for line in said if isinstance(line, str)]
    assert "but torchrun kills its processes 0 s after a signal" in line
