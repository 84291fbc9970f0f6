"""The PNG pictures."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from fake_runs import encode, lines, tiny, write_restarted_run, write_run

from gpt2.report.content import report
from gpt2.report.plots import save_plots, short
from gpt2.report.runs import open_run

pytest.importorskip("matplotlib")


def check_pictures(paths: list[Path], names: list[str]) -> None:
    assert [path.name for path in paths] == names
    for path in paths:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert width > 800
        assert height > 500
        assert path.stat().st_size < 200_000


def test_two_runs_of_different_data_sets(tmp_path: Path) -> None:
    runs = [
        open_run(write_run(tmp_path / "edu", until=1200)),
        open_run(write_run(tmp_path / "web", until=800, dataset="fineweb")),
        open_run(write_restarted_run(tmp_path / "restarted")),
    ]
    check_pictures(save_plots(report(runs), tmp_path), ["loss.png", "hellaswag.png", "training.png"])


@pytest.mark.parametrize("log_tokens", [False, True])
def test_no_evaluation_or_not_even_a_step(tmp_path: Path, log_tokens: bool) -> None:
    run = open_run(write_run(tmp_path / "run", **tiny(eval_every=0)))
    check_pictures(save_plots(report([run]), tmp_path, log_tokens=log_tokens), ["loss.png", "training.png"])
    (tmp_path / "metrics.jsonl").write_bytes(encode(lines(**tiny())[:1]))
    run = open_run(tmp_path)
    check_pictures(save_plots(report([run]), tmp_path, log_tokens=log_tokens), ["loss.png", "training.png"])
    assert not list(tmp_path.glob(".*"))


def test_numbers_read_well() -> None:
    assert [short(value) for value in (0, 950, 1e3, 1234567, 2.5e9)] == ["0", "950", "1 k", "1.23 M", "2.5 B"]
