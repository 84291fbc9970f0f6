"""Reading metrics.jsonl back: restarts, torn lines, foreign content."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fake_runs import encode, lines, tiny, write_restarted_run

from gpt2.config import config_difference
from gpt2.metrics.history import live_lines, parse_lines, read_metrics
from gpt2.metrics.jsonl import MetricsFile


def train(step: int, **values: Any) -> dict[str, Any]:
    numbers = {"tokens": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0}
    return {"kind": "train", "step": step, "time": 0.0, **numbers, **values}


def test_one_start_is_read_whole(tmp_path: Path) -> None:
    written = lines(**tiny())
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(written))
    history = read_metrics(path)
    assert [dict(record) for record in history.live] == written
    assert history.superseded == ()
    assert history.torn == 0


@pytest.mark.parametrize("cut", [1, 2, 17, 100])
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    written = lines(**tiny())
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(written)[:-cut])
    history = read_metrics(path)
    # Without its newline alone the last line is whole.
    assert len(history.live) == len(written) - (cut > 1)
    assert history.torn == (cut > 1)


def test_a_restart_supersedes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    run = write_restarted_run(tmp_path / "run")
    history = read_metrics(run / "metrics.jsonl")
    steps = [record["step"] for record in history.live if record["kind"] == "train"]
    assert steps == list(range(10, 1501, 10))
    lost = [record["step"] for record in history.superseded if record["kind"] == "train"]
    assert lost == list(range(510, 900, 10))  # step 900's line was torn
    assert history.torn == 1


def test_going_back_to_an_older_line_of_history_revives_it() -> None:
    """A run at 3 goes back to 1, reaches 2, and then returns to the first start's checkpoint of step 3."""
    out = encode([{"kind": "run_start", "step": 0, "time": 0.0, "resumes_at": 0}, train(1, loss=1.0)])
    at_1 = len(out)
    out += encode([train(2, loss=1.0), train(3, loss=1.0)])
    at_3 = len(out)
    out += encode([{"kind": "run_start", "step": 1, "time": 0.0, "resumes_at": at_1}, train(2, loss=2.0)])
    out += encode([{"kind": "run_start", "step": 3, "time": 0.0, "resumes_at": at_3}, train(4, loss=3.0)])
    live = live_lines([line for line in parse_lines(out) if line is not None])
    seen = [(line.record["step"], line.record["loss"]) for line in live if line.record["kind"] == "train"]
    assert seen == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("by_position", [True, False])
def test_random_lives_are_read_as_the_history_that_was_lived(tmp_path: Path, seed: int, by_position: bool) -> None:
    """Steps, checkpoints, kills and resumes at random, against a list that the simulated trainer carries along."""
    rng = random.Random(seed)
    path = tmp_path / "metrics.jsonl"
    checkpoints: list[tuple[int, int, list[float]]] = [(0, 0, [])]  # step, position, losses so far
    lived: list[float] = []
    said: list[str] = []
    for _ in range(6):
        # Without a position, only the newest line of history can be gone back to.
        step, position, lived = rng.choice(checkpoints) if by_position else checkpoints[-1]
        lived = list(lived)
        file = MetricsFile(path, said.append)
        resumes_at = file.resume(step, position if by_position else None)
        file.write({"kind": "run_start", "step": step, "time": 0.0, "resumes_at": resumes_at})
        for _ in range(rng.randrange(8)):
            step += 1
            lived.append(rng.random())
            file.write(train(step, loss=lived[-1]))
            if rng.random() < 0.3:
                checkpoints.append((step, file.sync(), list(lived)))
        file.close()
        if rng.random() < 0.5:  # killed in the middle of a line
            with path.open("ab") as torn:
                torn.write(b'{"kind": "train", "st')
    history = read_metrics(path)
    assert [record["loss"] for record in history.live if record["kind"] == "train"] == lived
    assert all("damaged" in text for text in said)


@pytest.mark.parametrize(
    "raw",
    [
        b"hello",
        b"[1, 2]",
        b"null",
        b'{"step": 1}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": 1, "loss": "high"}',
        b'{"kind": "train", "step": 1}',
        b'{"kind": 7, "step": 1}',
        b'{"kind": "val", "step": 1, "time": 1, "tokens": "NaN", "loss": 1, "val_tokens": 1}',
        b'{"kind": "note", "step": 1}',
        b"\xff\xfe{}",
        b"[" * 5000,
        b'{"kind": "note", "step": 1, "time": 1, "x": ' + b"9" * 5000 + b"}",
        b'{"kind": "note", "step": 1, "time": NaN}',
        b'{"kind": "note", "step": -1, "time": 1}',
        b'{"kind": "note", "step": true, "time": 1}',
        b'{"kind": "run_start", "step": 1, "time": 1, "resumes_at": "0"}',
        b'{"kind": "run_start", "step": 1, "time": 1, "config": null}',
        b'{"kind": "run_end", "step": 1, "time": 1, "seconds": {"train": "long"}}',
    ],
)
def test_what_is_not_ours_counts_as_torn(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(raw + b"\n" + encode([train(1)]))
    history = read_metrics(path)
    assert len(history.live) == 1
    assert history.torn == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
def test_what_is_no_plain_file_is_said_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "elsewhere").write_bytes(encode([train(5)]))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    said: list[str] = []
    file = MetricsFile(path, said.append)
    file.resume(0, None)
    file.write(train(1))
    file.close()
    assert len(said) == 1
    assert said[0].startswith(f"cannot write {path} (")
    assert (tmp_path / "elsewhere").read_bytes() == encode([train(5)])
    if kind != "link":
        with pytest.raises(OSError, match=r"plain file|directory"):
            read_metrics(path)


def test_a_damaged_line_is_said_when_a_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode([train(1)]) + b'{"kind": "train", "step": "two"}\n' + encode([train(3)]))
    said: list[str] = []
    file = MetricsFile(path, said.append)
    assert file.resume(3, None) == path.stat().st_size
    file.close()
    assert said == [f"{path}: 1 damaged line is passed over"]
    assert [record["step"] for record in file.kept] == [1, 3]


def test_values_that_json_lacks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, lambda text: pytest.fail(text))
    file.write(train(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))
    file.close()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(path).live
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["lr"] == -math.inf


def test_config_difference_names_what_changed() -> None:
    old = {"optim": {"lr": 1.0, "gone": 2}, "run": {"seed": 1}}
    new = {"optim": {"lr": 2.0}, "run": {"seed": 1, "new": True}}
    assert config_difference(old, new) == {"optim.lr": [1.0, 2.0], "optim.gone": [2, None], "run.new": [None, True]}
    assert config_difference(new, new) == {}
