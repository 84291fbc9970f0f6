"""The PNG pictures."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from fake_runs import encode, lines, tiny, write_restarted_run, write_run

from gpt2.errors import UserError
from gpt2.report.content import report
from gpt2.report.plots import save_plots, short
from gpt2.report.runs import open_run

pytest.importorskip("matplotlib")


def names(*pictures: str) -> list[str]:
    return [f"page-{picture}.png" for picture in pictures]


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
    check_pictures(save_plots(report(runs), tmp_path / "page.html"), names("loss", "hellaswag", "training"))


@pytest.mark.parametrize("log_tokens", [False, True])
def test_no_evaluation_or_not_even_a_step(tmp_path: Path, log_tokens: bool) -> None:
    run = open_run(write_run(tmp_path / "run", **tiny(eval_every=0)))
    check_pictures(save_plots(report([run]), tmp_path / "page.html", log_tokens=log_tokens), names("loss", "training"))
    (tmp_path / "metrics.jsonl").write_bytes(encode(lines(**tiny())[:1]))
    run = open_run(tmp_path)
    check_pictures(save_plots(report([run]), tmp_path / "page.html", log_tokens=log_tokens), names("loss", "training"))
    assert not list(tmp_path.glob(".*"))


def test_pictures_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    content = report([open_run(write_run(tmp_path / "run", **tiny()))])
    first = save_plots(content, tmp_path / "a.html")
    before = {path: path.read_bytes() for path in first}
    (tmp_path / "loss.png").write_bytes(b"the user's")
    second = save_plots(content, tmp_path / "b.html")
    assert not set(first) & set(second)
    assert {path: path.read_bytes() for path in first} == before
    assert (tmp_path / "loss.png").read_bytes() == b"the user's"
    save_plots(content, tmp_path / "b.html")  # its own are drawn again
    second[0].write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"b-loss\.png is not a report's picture and is left as it is"):
        save_plots(content, tmp_path / "b.html")
    assert second[0].read_bytes() == b"the user's"


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    odd = ["$x_{$", "_hidden", "a" * 300, "\x1b[31m", "half\ud800"]
    content = report([open_run(write_run(tmp_path / str(i), **tiny())) for i in range(len(odd))])
    for run, name in zip(content["runs"], odd, strict=True):
        run["name"] = name
    drawn = save_plots(content, tmp_path / "page.html")
    assert drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_numbers_read_well() -> None:
    assert [short(value) for value in (0, 950, 1e3, 1234567, 2.5e9)] == ["0", "950", "1 k", "1.23 M", "2.5 B"]
