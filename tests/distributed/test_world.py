"""Devices and the world; what several processes do together is test_train_ranks.py's matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from repository import ROOT
from small_runs import ALONE, finish
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gpt2.distributed.parallel import place_like, whole
from gpt2.distributed.world import WholeErrorFile, joined_world, pick_device
from gpt2.errors import UserError


def test_alone() -> None:
    assert ALONE.is_main
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.on_main(lambda: 3) == ALONE.agree(lambda: 3) == 3
    tensor = torch.ones(2)
    assert ALONE.sum_(tensor) is tensor
    assert [name for name, _ in ALONE.share({"a": tensor})] == ["a"]
    assert list(ALONE.share(None)) == []
    with joined_world("cpu") as this:
        assert this == ALONE
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("mps", "expected"), [(False, "cpu"), (True, "mps")])
def test_auto_without_cuda(monkeypatch: pytest.MonkeyPatch, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected
    if not mps:
        with pytest.raises(UserError, match="device mps is not available here"):
            pick_device("mps")


def test_cuda_for_every_process_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [pick_device("auto", rank, 4).index for rank in range(4)] == [0, 1, 2, 3]
    assert pick_device("cuda:3").index == 3
    for rank in range(5):  # all five are told, not only the one that finds no device
        with pytest.raises(UserError, match=r"cuda:4 is not available: this machine shows 4 CUDA device\(s\)"):
            pick_device("cuda", rank, 5)
    with pytest.raises(UserError, match="2 processes cannot share device cuda:1"):
        pick_device("cuda:1", 0, 2)
    with pytest.raises(UserError, match="cuda:4 is not available"):
        pick_device("cuda:4")


def test_an_unknown_device() -> None:
    with pytest.raises(UserError, match="unknown device 'gpu'; choose auto, cuda, mps or cpu"):
        pick_device("gpu")


def test_a_copy_in_place() -> None:
    parameter, tensor = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    placed = place_like(tensor, parameter)
    tensor += 1
    assert placed.tolist() == [1, 1]
    assert whole(placed) is placed


def test_torchrun_reads_why_a_process_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    try:
        raise ValueError("five is not four")
    except ValueError as error:
        WholeErrorFile().record_exception(error)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.message["message"] == "ValueError: five is not four"  # type: ignore[index]
    assert "test_torchrun_reads_why" in failure.message["extraInfo"]["py_callstack"]  # type: ignore[index]
    assert failure.timestamp > 1.7e9
    assert list(tmp_path.iterdir()) == [path]


def test_without_torchrun_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    WholeErrorFile().record_exception(ValueError("five"))
    assert not list(tmp_path.iterdir())


def test_a_process_killed_while_it_tells_why_is_started_again() -> None:
    code, output = finish(ROOT / "tests/dying_script.py", [], 1, ("--max-restarts=1", "--monitor-interval=0.1"))
    assert code == 0, output
    assert "started again" in output
