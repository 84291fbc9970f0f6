"""Writing metrics.jsonl: kills, full disks, two writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.metrics.history import read_metrics
from gpt2.metrics.jsonl import MetricsFile

WRITER = """
import sys
from pathlib import Path
from gpt2.metrics.jsonl import MetricsFile
file = MetricsFile(Path(sys.argv[1]), print)
print("ready", flush=True)
step = 0
while True:
    step += 1
    file.write({"kind": "note", "step": step, "time": 0, "text": "x" * 500})
"""

SMALL_DISK = """
import resource, sys
from pathlib import Path
from gpt2.metrics.jsonl import MetricsFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1100, resource.RLIM_INFINITY))
file = MetricsFile(Path(sys.argv[1]), lambda text: print("said:", text))
for step in range(1, 9):
    file.write({"kind": "note", "step": step, "time": 0, "text": "x" * 200})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # somebody made room
file.write({"kind": "note", "step": 99, "time": 0, "text": "x" * 200})
print("done")
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills, limits and locks of Unix")


def start_writer(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_kill_tears_one_line_at_most_and_the_next_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = start_writer(path)
    time.sleep(0.02)
    with pytest.raises(UserError, match="another process is training into"):
        MetricsFile(path, print)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_metrics(path)
    assert before.torn <= 1
    assert [record["step"] for record in before.live] == list(range(1, len(before.live) + 1))
    # The kernel freed the lock; a line torn by hand does not spoil the next one.
    with path.open("ab") as file:
        file.write(b'{"kind": "note", "st')
    ours = MetricsFile(path, lambda text: pytest.fail(text))
    ours.write({"kind": "note", "step": 1_000_000, "time": 0})
    ours.close()
    after = read_metrics(path)
    assert after.live[-1]["step"] == 1_000_000
    assert len(after.live) == len(before.live) + 1


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(path)], capture_output=True, text=True, timeout=600, check=True
    )
    said = [line for line in result.stdout.splitlines() if line.startswith("said:")]
    assert len(said) == 1
    assert "File too large" in said[0]
    assert result.stdout.endswith("done\n")
    history = read_metrics(path)
    assert [record["step"] for record in history.live] == [1, 2, 3, 4, 99]
    assert history.torn == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.write({"kind": "note", "step": 1, "time": 0})
    assert len(said) == 1


def test_a_missing_directory_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "gone" / "metrics.jsonl", said.append)
    file.write({"kind": "note", "step": 1, "time": 0})
    assert file.resume(0, None) == 0
    assert file.sync() == 0
    file.close()
    assert len(said) == 1
    assert "No such file" in said[0]


def test_the_position_is_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, lambda text: pytest.fail(text))
    assert file.sync() == 0
    file.write({"kind": "note", "step": 1, "time": 0, "text": "ü"})
    assert file.sync() == path.stat().st_size > 0
    file.close()


def test_half_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ours = MetricsFile(path, lambda text: pytest.fail(text))
    ours.write({"kind": "note", "step": 1, "time": 0, "text": "é\ud800"})
    ours.close()
    assert path.read_text(encoding="utf-8") == '{"kind": "note", "step": 1, "time": 0, "text": "é\\ud800"}\n'
    assert read_metrics(path).live[0]["text"] == "é\ud800"
