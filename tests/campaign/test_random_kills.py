"""SIGKILL at random moments of every command that writes: what is finished in the end is what was to be.

A command runs in a fork of this process, which has all libraries loaded, so that a kill costs a second and most of
them hit work, not imports. It is started and killed until it ends by itself; then its result is compared with that of
one that nothing disturbed, and the next life begins in a new directory, until there were enough kills.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from repository import load_script
from safetensors.torch import load_file
from small_runs import flags, small

from gpt2.errors import run_cli
from gpt2.tokens.manifest import load_manifest

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


def start(script: str, words: Sequence[str]) -> int:
    """Run a command in a fork, silently; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()  # a worker of its own dies with it
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(silent, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        sys.argv = [script, *words]
        try:
            run_cli(load_script(script).main)
        except SystemExit as end:
            code = int(end.code or 0)
    os._exit(code)


def live(script: str, words: Sequence[str], seconds: float | None) -> bool:
    """Run a command and kill it after so many seconds; False where it ended well before."""
    child = start(script, words)
    deadline = time.monotonic() + (600 if seconds is None else seconds)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # it has had no time to open a session
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seconds is not None, "it never ended"
    return True


def campaign(
    directory: Path,
    command: Callable[[Path], tuple[str, list[str]]],
    same: Callable[[Path, Path], None],
    kills: int,
    seed: int,
) -> int:
    """Kill a command so many times, and hold each result against the undisturbed one.

    Args:
        directory: for everything it makes.
        command: script and words that write into a directory.
        same: asserts that a directory holds what another does.
        kills: in all.
        seed: of the moments.
    """
    whole = directory / "whole"
    began = time.monotonic()
    assert not live(*command(whole), None)
    usual = time.monotonic() - began
    dice, killed, lives = random.Random(seed), 0, 0
    while killed < kills:
        place = directory / f"life{lives}"
        # Often enough early that a life sees several kills, and late enough that it gets on.
        while killed < kills and live(*command(place), dice.uniform(0, 1.1) * usual):
            killed += 1
        assert not live(*command(place), None)
        same(place, whole)
        shutil.rmtree(place)
        lives += 1
    print(f"{killed} kills in {lives} lives, {usual:.1f} s undisturbed")
    return killed


def same_weights(place: Path, whole: Path) -> None:
    ours, theirs = (load_file(run / "checkpoints" / "step_00000024" / "model.safetensors") for run in (place, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def same_shards(place: Path, whole: Path) -> None:
    names = sorted(path.name for path in whole.glob("*.npy"))
    assert sorted(path.name for path in place.glob("*.npy")) == names
    assert all((place / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert load_manifest(place / "manifest.json").shards == load_manifest(whole / "manifest.json").shards
    assert not list(place.glob(".*.tmp"))


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_tokenizing(tmp_path: Path, kills: int) -> None:
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=60_000)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(" ".join(words[number * 10_000 :][:10_000]))

    def command(out: Path) -> tuple[str, list[str]]:
        source = [str(tmp_path / f"{number}.txt") for number in range(6)]
        more = ["--tokenizer", "char", "--workers", "1", "--shard-tokens", "30000", "--val-tokens", "10000"]
        return "data/fineweb.py", ["--source", *source, "--out", str(out), *more]

    assert campaign(tmp_path / "made", command, same_shards, kills, seed=1) == kills


@pytest.mark.slow
@pytest.mark.parametrize("kills", [30])
def test_training_and_saving(char_data: Path, tmp_path: Path, kills: int) -> None:
    settings = {"max_steps": 24, "checkpoint_every": 3, "eval_every": 6, "val_tokens": 128, "micro_batch_size": 4}

    def command(run: Path) -> tuple[str, list[str]]:
        return "train_gpt2.py", flags(small(char_data, run, dropout=0.1, **settings))

    assert campaign(tmp_path, command, same_weights, kills, seed=2) == kills
