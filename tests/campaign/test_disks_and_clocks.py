"""Disks that are full at some write or cannot be written to, and clocks that are set: what was finished stays."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from in_process import call
from safetensors.torch import load_file
from small_runs import flags, small

SETTINGS = {"max_steps": 8, "checkpoint_every": 2, "eval_every": 4, "val_tokens": 128, "keep": 9}
WEIGHTS = "checkpoints/step_00000008/model.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory whose mount options can be changed, by root on Linux."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")

    def remount(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
        return place

    yield remount
    subprocess.run(["umount", str(place)], check=True)


def same_weights(run: Path, whole: Path) -> None:
    ours, theirs = load_file(run / WEIGHTS), load_file(whole / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(char_data: Path, tmp_path: Path, disk: Callable[[str], Path]) -> None:
    whole = tmp_path / "whole"
    assert call("train_gpt2.py", flags(small(char_data, whole, **SETTINGS)))[0] == 0
    used = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    codes = []
    for part in range(20):
        run = disk("size=64m") / f"run{part}"
        words = flags(small(char_data, run, **SETTINGS))
        disk(f"size={max(used * part // 19 // 1024, 4)}k")
        code, out, err = call("train_gpt2.py", words)
        assert code in (0, 2), (part, out, err)
        assert "Traceback" not in out + err
        assert code == 0 or "error: " in out + err, (part, out, err)
        codes.append(code)
        disk("size=64m")  # somebody made room
        code, out, err = call("train_gpt2.py", words)
        assert code == 0, (part, out, err)
        same_weights(run, whole)
        subprocess.run(["rm", "-r", str(run)], check=True)
    assert codes[0] == 2
    assert codes[-1] == 0


@pytest.mark.slow
def test_a_disk_that_became_read_only(char_data: Path, disk: Callable[[str], Path]) -> None:
    run = disk("size=64m") / "run"
    assert call("train_gpt2.py", flags(small(char_data, run, **SETTINGS)))[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    disk("ro")
    longer = flags(small(char_data, run, **{**SETTINGS, "max_steps": 10}, allow_config_change=True))
    code, out, err = call("train_gpt2.py", longer)
    disk("rw")
    assert (code, err.count("error: "), "Traceback" in out + err) == (2, 1, False), (out, err)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-1e9, 1e9])
def test_a_clock_that_is_set_between_two_starts(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    run = tmp_path / "run"
    shorter = flags(small(char_data, run, **{**SETTINGS, "max_steps": 4}))
    assert call("train_gpt2.py", shorter)[0] == 0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + shift)
    longer = flags(small(char_data, run, **SETTINGS, allow_config_change=True))
    code, _, err = call("train_gpt2.py", longer)
    assert code == 0, err
    for script, words in (("scripts/report.py", ["--no-png"]), ("scripts/runs.py", [])):
        code, out, err = call(script, [str(run), *words])
        assert (code, err) == (0, ""), out
