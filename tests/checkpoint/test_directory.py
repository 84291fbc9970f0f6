"""Checkpoints: whole or not at all, opened by transformers, checked before they are believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import TINY, TOKENIZER, damage, make

from gpt2.checkpoint import directory as checkpoint_module
from gpt2.checkpoint.directory import (
    Checkpoint,
    host_copy,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_training,
    step_directory,
    supersede_later,
    verify_checkpoint,
    write_checkpoint,
)
from gpt2.config import GPTConfig
from gpt2.errors import LaterVersion, UserError
from gpt2.model.gpt import GPT


def write(directory: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(directory, make(step), TINY, TOKENIZER) for step in steps]


def test_there_and_back(tmp_path: Path) -> None:
    before = make(3, sample=24, guard=[0.1, 1e-30, 0, 0, 0, 1])
    path = write_checkpoint(tmp_path, before, TINY, TOKENIZER)
    assert path == step_directory(tmp_path, 3) == tmp_path / "step_00000003"
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    verify_checkpoint(path)
    after = read_checkpoint(path, TINY)
    GPT(TINY).load_state_dict(after.model)
    for old, new in ((before.model, after.model), (before.optimizer, after.optimizer)):
        for name in old:
            assert torch.equal(old[name], new[name]), name
            assert old[name].dtype == new[name].dtype
    assert after.training["sample"] == 24
    assert after.training["guard"] == [0.1, 1e-30, 0, 0, 0, 1]
    on_disk = load_file(path / "optimizer.safetensors")
    assert on_disk["exp_avg.wte.weight"].shape == (5, 16)  # no padding
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000003"]


def test_transformers_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (path,) = write(tmp_path, 1)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(path).eval()
    ours = GPT(TINY)
    ours.load_state_dict(read_checkpoint(path, TINY).model)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.eval()(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_write_that_fails_anywhere_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    write(tmp_path, 1)
    calls = 0

    def failing_fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", failing_fsync)
    failed: list[str] = []
    try:
        write(tmp_path, 2)
    except OSError as error:
        failed.append(str(error))
    monkeypatch.undo()
    assert failed in ([], ["[Errno 28] No space left on device"])
    assert not list(tmp_path.glob(".writing-step*"))
    for path in list_checkpoints(tmp_path):
        verify_checkpoint(path)
    newest = newest_checkpoint(tmp_path, print)
    assert newest is not None
    # Only what follows the rename, bringing the pointer to disk, may fail with the checkpoint there.
    assert newest.name == "step_00000001" if failed and calls <= 7 else "step_00000002"


def test_errors_of_safetensors_count_as_the_disks(tmp_path: Path) -> None:
    broken = make(1)
    shared = torch.zeros(4)
    bad = Checkpoint(broken.model, {"exp_avg.a": shared, "exp_avg.b": shared}, broken.training)
    with pytest.raises(OSError, match="RuntimeError"):
        write_checkpoint(tmp_path, bad, TINY, TOKENIZER)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flipped", "its checksum differs"),
        ("short", "were written"),
        ("gone", "cannot be read"),
        ("no JSON", "is damaged"),
        ("other JSON", "is damaged"),
        ("another step", "its digest differs"),
        ("no digest, another step", "step is 9; the directory's name says"),
    ],
)
def test_damage_is_noticed_and_passed_over(tmp_path: Path, how: str, words: str) -> None:
    old, new = write(tmp_path, 1, 2)
    damage(new, how)
    with pytest.raises(UserError, match=words):
        verify_checkpoint(new)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == old
    assert len(said) == 1
    assert words in said[0]
    damage(old, how)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be resumed"):
        newest_checkpoint(tmp_path, said.append)


def test_a_later_format_is_no_damage(tmp_path: Path) -> None:
    _, new = write(tmp_path, 1, 2)
    damage(new, "future")
    said: list[str] = []
    with pytest.raises(LaterVersion, match="is of checkpoint format 99; this version reads 1: update it"):
        newest_checkpoint(tmp_path, said.append)
    assert not said


def test_what_cannot_be_listed_is_no_empty_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot read .*checkpoints"):
        list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["exp_avg_sq.wte.weight", "exp_avg.wte.weight", "step.wte.weight"])
def test_moments_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    for value in (float("nan"), -1.0) if name != "exp_avg.wte.weight" else (float("inf"),):
        before = make(3)
        wrong = {**before.optimizer, name: torch.full_like(before.optimizer.get(name, torch.ones(5, 16)), value)}
        path = write_checkpoint(tmp_path, Checkpoint(before.model, wrong, before.training), TINY, TOKENIZER)
        with pytest.raises(UserError, match=rf"optimizer\.safetensors: {name} holds"):
            read_checkpoint(path, TINY)


def test_none_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing", print) is None
    with pytest.raises(UserError, match=r"is not a checkpoint of a run: it holds no training\.json"):
        read_training(tmp_path)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    with pytest.raises(UserError):
        read_checkpoint(path, GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=5))


def test_what_is_left_behind_is_set_aside(tmp_path: Path) -> None:
    first, second, third = write(tmp_path, 1, 2, 3)
    assert supersede_later(third) == []
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    renamed = supersede_later(first)
    assert [path.name for path in renamed] == ["superseded_step_00000002", "superseded_step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert list_checkpoints(tmp_path) == [first]
    for path in renamed:
        verify_checkpoint(path)
    write(tmp_path, 2)
    assert supersede_later(first)[0].name == "superseded_step_00000002.2"
    write(tmp_path, 2, 2)  # over itself
    assert (tmp_path / "superseded_step_00000002.3").is_dir()
    assert list_checkpoints(tmp_path) == [first, second]


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_a_copy_is_safe_from_later_steps() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    copy = host_copy(tensor)
    with torch.no_grad():
        tensor += 1
    assert copy.tolist() == [0, 0, 0]
    assert not copy.requires_grad
