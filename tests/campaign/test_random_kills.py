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
import socket
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


def start(script: str, words: Sequence[str], environment: dict[str, str]) -> int:
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
        os.environ.update(environment)
        sys.argv = [script, *words]
        try:
            run_cli(load_script(script).main)
        except SystemExit as end:
            code = int(end.code or 0)
    os._exit(code)


def processes(count: int) -> list[dict[str, str]]:
    """The variables by which torchrun makes `count` processes one run."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def live(script: str, words: Sequence[str], count: int, seconds: float | None) -> bool:
    """Run a command in `count` processes and kill them after so many seconds; False where all ended well before."""
    children = [start(script, words, environment) for environment in processes(count)]
    deadline = time.monotonic() + (600 if seconds is None else seconds)
    codes: list[int] = []
    while children and time.monotonic() < deadline:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.002)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seconds is not None or not children, "it never ended"
    assert set(codes) <= {0}, codes
    return bool(children)


def campaign(
    directory: Path,
    command: Callable[[Path], tuple[str, list[str]]],
    same: Callable[[Path, Path], None],
    kills: int,
    seed: int,
    count: int = 1,
) -> None:
    """Kill a command so many times, and hold each result against the undisturbed one.

    Args:
        directory: for everything it makes.
        command: script and words that write into a directory.
        same: asserts that a directory holds what another does.
        kills: in all.
        seed: of the moments.
        count: processes of the command.
    """
    whole = directory / "whole"
    began = time.monotonic()
    assert not live(*command(whole), count, None)
    usual = time.monotonic() - began
    dice, killed, lives = random.Random(seed), 0, 0
    while killed < kills:
        place = directory / f"life{lives}"
        # Often enough early that a life sees several kills, and late enough that it gets on.
        while killed < kills and live(*command(place), count, dice.uniform(0, 1.1) * usual):
            killed += 1
        assert not live(*command(place), count, None)
        same(place, whole)
        shutil.rmtree(place)
        lives += 1
    print(f"{killed} kills in {lives} lives, {usual:.1f} s undisturbed")


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

    campaign(tmp_path / "made", command, same_shards, kills, seed=1)


@pytest.mark.parametrize(
    ("kills", "count", "parallel"),
    [
        pytest.param(30, 1, "ddp", marks=pytest.mark.slow),
        pytest.param(10, 2, "ddp", marks=pytest.mark.slow),
        pytest.param(10, 2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_training_and_saving(char_data: Path, tmp_path: Path, kills: int, count: int, parallel: str) -> None:
    settings = {"max_steps": 24, "checkpoint_every": 3, "eval_every": 6, "val_tokens": 128, "micro_batch_size": 4}

    def command(run: Path) -> tuple[str, list[str]]:
        return "train_gpt2.py", flags(small(char_data, run, dropout=0.1, parallel=parallel, **settings))

    campaign(tmp_path, command, same_weights, kills, seed=2, count=count)


@pytest.mark.slow
def test_reporting(char_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not live("train_gpt2.py", flags(small(char_data, run, max_steps=6, eval_every=3)), 1, None)
    history = (run / "metrics.jsonl").read_bytes()

    def command(out: Path) -> tuple[str, list[str]]:
        return "scripts/report.py", [str(run), "--no-png", "--out", str(out / "page.html")]

    def same(place: Path, whole: Path) -> None:
        pages = [(where / "page.html").read_text() for where in (place, whole)]
        assert all(page.rstrip().endswith("</html>") for page in pages)
        assert len(pages[0]) == pytest.approx(len(pages[1]), abs=20)  # the time in it
        assert (run / "metrics.jsonl").read_bytes() == history

    campaign(tmp_path / "pages", command, same, 20, seed=3)
