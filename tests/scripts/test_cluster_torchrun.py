"""scripts/cluster/torchrun.sh: a signal saves, and the exit code says that it did."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT
from small_runs import environment, flags, losses, records, small

from gpt2.checkpoint.directory import list_checkpoints

START = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
START += "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"  # as a terminal starts it


def start(words: list[str], output: Path) -> subprocess.Popen[bytes]:
    launcher = ["bash", str(ROOT / "scripts/cluster/torchrun.sh"), "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [sys.executable, "-c", START, *launcher, "--max-restarts=2", str(ROOT / "train_gpt2.py"), *words],
        cwd=ROOT,
        env=environment() | {"PYTHON": sys.executable},
        stdout=output.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGUSR1", 0),
        *(pytest.param(name, code, marks=pytest.mark.slow) for name, code in (("SIGTERM", 0), ("SIGHUP", 0))),
        pytest.param("SIGINT", -signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_exit_code_says_so(char_data: Path, tmp_path: Path, name: str, code: int) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    config = small(char_data, run, max_steps=100_000, micro_batch_size=4, warmup_steps=5)
    process = start(flags(config), output)
    try:
        deadline = time.monotonic() + 600
        while len(records(run)) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.Signals[name])
        assert process.wait(600) == code, output.read_text()
    finally:
        process.kill()
    (last,) = list_checkpoints(run / "checkpoints")
    assert int(last.name[5:]) == max(losses(run)) < 100_000
    assert "Traceback" not in output.read_text()
    assert len(records(run, "run_start")) == 1
