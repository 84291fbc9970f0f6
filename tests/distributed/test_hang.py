"""What a process that waits leaves behind."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from small_runs import environment

from gpt2.distributed import world as distributed
from gpt2.distributed.hang import HangWatch, enable_flight_recorder

WATCH = """
import datetime, sys, time
from pathlib import Path
from gpt2.distributed import world as distributed
from gpt2.distributed.hang import HangWatch
distributed.STEP_TIMEOUT = datetime.timedelta(seconds=0.25)
watch = HangWatch(Path(sys.argv[1]), 3)
def slow():
    watch.arm()
    while watch.path.stat().st_size == 0:
        time.sleep(0.01)
slow()
watch.close()
HangWatch(Path(sys.argv[2]), 3).close()
"""


def test_a_stack_is_written_in_a_step_that_takes_too_long(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WATCH, str(tmp_path / "hang"), str(tmp_path / "empty")]
    subprocess.run(words, env=environment(), check=True, timeout=600)
    assert "in slow" in (tmp_path / "hang/stack_rank3.txt").read_text()
    assert not (tmp_path / "empty").exists()  # nothing happened, nothing is left


def test_each_step_has_its_own_time_and_what_is_no_step_has_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, file: asked.append(seconds))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: asked.append(None))
    monkeypatch.setattr(distributed, "STARTUP_TIMEOUT", datetime.timedelta(seconds=1000))
    monkeypatch.setattr(distributed, "STEP_TIMEOUT", datetime.timedelta(seconds=100))
    watch = HangWatch(tmp_path / "hang", 3)
    watch.arm(starting=True)
    for _ in range(2):
        watch.arm()
    watch.disarm()
    assert asked == [800, 80, 80, None]
    watch.close()


def test_arming_costs_next_to_nothing(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path / "hang", 0)
    began = time.process_time()  # other programs may have the processor meanwhile
    for _ in range(200):
        watch.arm()
        watch.disarm()
    assert (time.process_time() - began) / 200 < 0.005
    watch.close()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watch = HangWatch(tmp_path / "file" / "hang", 0)
    watch.arm()
    watch.disarm()
    watch.close()
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "text", ["Timed out waiting 3000ms for recv operation to complete", "Application timeout caused pair closure"]
)
def test_only_time_outs_between_processes_are_explained(tmp_path: Path, text: str) -> None:
    watch = HangWatch(tmp_path / "hang", 0)
    error = RuntimeError(text)
    assert watch.explain(error) is None  # there are no processes to wait for
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert watch.explain(RuntimeError("shape mismatch")) is None
        line = watch.explain(error)
    finally:
        dist.destroy_process_group()
    assert line is not None
    assert line.startswith("rank 0 waited in vain for another process")
    watch.close()


def test_time_outs_reach_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=distributed.STARTUP_TIMEOUT)
    try:
        monkeypatch.setattr(distributed, "STEP_TIMEOUT", datetime.timedelta(seconds=7))
        distributed.shorten_timeout()
        group = dist.group.WORLD
        assert group is not None
        assert group._get_backend(distributed.torch.device("cpu")).options._timeout == datetime.timedelta(seconds=7)
    finally:
        dist.destroy_process_group()
    distributed.shorten_timeout()  # without a group: nothing to do


def test_the_recorder_keeps_what_the_user_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "5"})
    enable_flight_recorder(tmp_path / "hang")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "5"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "hang/collectives_rank")


def test_each_start_keeps_its_evidence(tmp_path: Path) -> None:
    left = {"stack_rank1.txt": "why", "collectives_rank1": "nccl's", "collectives_rank1.json": "ours"}
    for start in (1, 2):
        for name, text in left.items():
            (tmp_path / name).write_text(f"{text} {start}")
            os.utime(tmp_path / name, (0, 1e9 + start))
        (tmp_path / "stack_rank10.txt").write_text("another's")
        HangWatch(tmp_path, 1).close()
        assert not [name for name in left if (tmp_path / name).exists()]
    assert (tmp_path / "stack_rank10.txt").read_text() == "another's"
    kept = sorted((path.name[16:], path.read_text()) for path in (tmp_path / "earlier").iterdir())
    assert kept == sorted((name, f"{text} {start}") for name, text in left.items() for start in (1, 2))
    HangWatch(tmp_path, 1).close()  # nothing new has happened
    assert len(list((tmp_path / "earlier").iterdir())) == 6
