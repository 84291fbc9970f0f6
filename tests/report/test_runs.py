"""A run's directory opened to be looked at, and the table of runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from fake_runs import encode, lines, tiny, write_restarted_run, write_run
from repository import ROOT, load_script

from gpt2.errors import UserError
from gpt2.metrics.jsonl import MetricsFile
from gpt2.presets import presets
from gpt2.report import runs as runs_module
from gpt2.report.content import report
from gpt2.report.runs import SILENCE_SECONDS, bits_per_byte, distinct_names, find_runs, open_run


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", until=1000))
    assert (run.corpus, run.size, run.step) == ("fineweb-edu", "124M", 1000)
    assert run.tokens == 1000 * 524_288
    assert run.best_loss == min(record["loss"] for record in run.records("val"))
    assert run.tokens_per_second == pytest.approx(3.7e6, rel=0.01)
    assert run.mfu == pytest.approx(0.40, abs=0.01)
    assert run.status() == "finished"
    assert run.preset == "gpt2 +1"  # the fixture's wandb setting aside, nothing but max_steps may differ


def test_seconds_and_device_seconds_count_what_a_restart_threw_away(tmp_path: Path) -> None:
    run = open_run(write_restarted_run(tmp_path / "run"))
    every = [*run.history.live, *run.history.superseded]
    trained = sum(record["seconds"]["train"] for record in every if record["kind"] == "train")
    assert run.seconds["train"] == pytest.approx(trained + 0.5)
    on_8 = sum(sum(r["seconds"].values()) for r in every if r["kind"] == "train" and r["tokens_per_second"] > 2.5e6)
    assert run.device_seconds > 4 * sum(run.seconds.values())
    assert run.device_seconds == pytest.approx(8 * on_8 + 4 * (sum(run.seconds.values()) - on_8), rel=0.02)
    assert [start["step"] for start in run.starts] == [0, 500]
    # Half the devices, half the speed; the slow first line after each start does not count.
    assert run.tokens_per_second == pytest.approx(1.85e6, rel=0.02)


@pytest.mark.parametrize("reason", ["finished", "stopped", "nonfinite", "spike", "error"])
def test_an_ended_run_says_how(tmp_path: Path, reason: str) -> None:
    assert open_run(write_run(tmp_path / "run", **tiny(end=reason))).status() == reason


def test_a_run_is_running_while_its_process_holds_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **tiny(end=None))
    assert open_run(run).status() == "crashed"
    file = MetricsFile(run / "metrics.jsonl", print)
    assert open_run(run).status() == "running"
    file.close()
    assert open_run(run).status() == "crashed"


def test_a_run_of_another_machine_is_running_until_it_falls_silent(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", **tiny(end=None)))
    last = run.history.live[-1]["time"]
    assert run.start["host"] != platform.node()
    assert run.status(now=last + SILENCE_SECONDS - 1) == "running"
    assert run.status(now=last + SILENCE_SECONDS + 1) == "crashed"


def test_the_nearest_preset(tmp_path: Path) -> None:
    for name, (_, config) in presets().items():
        directory = tmp_path / name
        directory.mkdir()
        start = {"kind": "run_start", "step": 0, "time": 0.0, "config": config.to_dict()}
        (directory / "metrics.jsonl").write_bytes(encode([start]))
        assert open_run(directory).preset == name


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"it has no metrics\.jsonl"), (b"", "is empty"), (b"hello\n", "has no line of ours"), (b"{}\n", "no line")],
)
def test_a_directory_that_is_no_run(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_run(tmp_path)


def test_a_directory_of_runs_names_them(tmp_path: Path) -> None:
    write_run(tmp_path / "one", **tiny())
    with pytest.raises(UserError, match=r"runs in it: .*one"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        open_run(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a directory"):
        open_run(tmp_path / "one" / "metrics.jsonl")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(encode(lines(**tiny())[:1]))
    run = open_run(tmp_path)
    assert (run.step, run.tokens, run.best_loss, run.tokens_per_second, run.last_checkpoint) == (0, 0, None, None, None)
    assert run.device_seconds == 0


def test_a_history_without_its_first_line_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(encode(lines(**tiny())[1:]))
    run = open_run(tmp_path)
    assert run.step == 60
    assert (run.size, run.corpus, run.preset) == (None, None, None)


def test_names_that_tell_runs_apart() -> None:
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_the_table_lists_every_run_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", until=1000, end=None)
    checkpoints = [{"kind": "checkpoint", "step": s, "time": 0, "path": f"checkpoints/step_{s:08}"} for s in (800, 900)]
    end = {"kind": "run_end", "step": 1000, "time": 0, "reason": "finished", "seconds": {}}
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(encode([*checkpoints, end]))
    write_run(tmp_path / "deep" / "b", **tiny(end=None, hellaswag=False, eval_every=0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("torn")
    script = load_script("scripts/runs.py")
    monkeypatch.setattr(sys, "argv", ["runs.py", str(tmp_path)])
    assert script.main() == 0
    out = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in out]
    assert cells[0][:3] == ["run", "preset", "tokens"]
    assert cells[1][0] == "a"
    assert "finished" in cells[1]
    assert "524" in cells[1]
    assert cells[1][-1] == "checkpoints/step_00000900"
    assert cells[2][0] == "deep/b"
    assert "crashed" in cells[2]
    assert out[-1].startswith("left out:")
    assert ["setting", "a", "deep/b"] in cells  # and the settings in which they differ
    assert ["n_layer", "12", "2"] in cells
    assert not {"run_dir", "eval_every"} & {line[0] for line in cells if line}
    assert list(find_runs(tmp_path)) == [tmp_path / name for name in ("a", "broken", "deep/b")]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_line_is_longer_than_the_terminal(tmp_path: Path, columns: int) -> None:
    write_run(tmp_path / "baseline", **tiny())
    write_run(tmp_path / "a-longer-learning-rate", **tiny(learning_rate=1e-3))
    words = [sys.executable, str(ROOT / "scripts" / "runs.py"), str(tmp_path)]
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose other end is closed
            while block := os.read(ours, 1 << 16):
                shown += block
    os.close(ours)
    assert process.returncode == 0, shown
    printed = shown.decode().split("\r\n")
    assert max(map(len, printed)) <= columns
    assert any(line.split()[:1] == ["learning_rate"] or "learning_rate" in line.split() for line in printed)
    assert any("a-longer-learning-rate" in line.split() for line in printed)  # a word is never broken


def test_a_page_has_axes_an_interval_and_the_time_left(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", **tiny(end=None)))
    content = report([run], now=run.history.live[-1]["time"] + 1)["runs"][0]
    assert content["status"] == "running"
    pace = 0.14  # seconds per step, of fake_runs; evaluations come to 3.5 s
    assert content["seconds_left"] == 0
    assert content["train"]["step"] == list(range(5, 61, 5))
    assert content["train"]["hours"][-1] == pytest.approx(60 * pace / 3600, rel=0.02)
    assert content["val"]["hours"] == pytest.approx([0, *(step * pace / 3600 for step in (20, 40, 60))], rel=0.02)
    half = open_run(write_run(tmp_path / "half", **tiny(end=None, until=30, eval_every=0)))
    left = report([half], now=half.history.live[-1]["time"] + 1)["runs"][0]["seconds_left"]
    assert left == pytest.approx(30 * pace, rel=0.01)
    scores = content["hellaswag"]
    assert all(
        0 <= low < acc < high <= 1
        for low, acc, high in zip(scores["low"], scores["acc_norm"], scores["high"], strict=True)
    )


def test_the_commands_end_with_one_line_on_bad_input(tmp_path: Path) -> None:
    for command in (["runs.py", str(tmp_path)], ["report.py", str(tmp_path)], ["runs.py", str(tmp_path / "missing")]):
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]], capture_output=True, text=True
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_read_is_named_and_the_list_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a\x1b[31m", **tiny())
    (tmp_path / "b").mkdir()
    write_run(tmp_path / "c", **tiny())
    own_iterdir, own_open = Path.iterdir, runs_module.read_metrics

    def iterdir(path: Path) -> Any:
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return own_iterdir(path)

    def read(path: Path) -> Any:
        if path.parent.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return own_open(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(runs_module, "read_metrics", read)
    monkeypatch.setattr(sys, "argv", ["runs.py", str(tmp_path)])
    assert load_script("scripts/runs.py").main() == 0
    _, first, second, left_out = capsys.readouterr().out.splitlines()
    assert first.startswith(r"a\x1b[31m ")
    assert second.startswith("c ")
    assert left_out.startswith("left out: cannot read ")
    assert str(tmp_path / "b") in left_out


def test_a_line_with_a_field_of_the_wrong_kind_is_passed_over(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = lines(**tiny())
    records[1]["seconds"] = "long"
    records[2]["tokens"] = None
    records.insert(1, {**records[0], "resumes_at": "here"})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    run = open_run(tmp_path)
    assert run.history.torn == 3
    assert len(run.history.live) == len(records) - 3
    assert run.step == 60


def test_bits_per_byte_where_the_file_has_them(tmp_path: Path) -> None:
    """Files of earlier versions lack them; a diverged run's are not finite."""
    new = open_run(write_run(tmp_path / "new", **tiny()))
    assert new.best_loss is not None
    assert new.best_bits_per_byte == pytest.approx(new.best_loss / math.log(2) / 4.5)
    old = open_run(write_run(tmp_path / "old", **tiny(with_bits=False)))
    assert old.best_bits_per_byte is None
    for value in ("NaN", "Infinity", None, [], "word"):
        assert bits_per_byte({"bits_per_byte": value}) is None
    assert [run["val"]["bits_per_byte"] for run in report([old])["runs"]] == [[None] * 4]
