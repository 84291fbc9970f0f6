"""A picture's file: whole, in the format of its name, or one line about why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.figures import check_picture, label, save_figure

Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c", b"\x89PNG")])
def test_format_and_folder(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / "new/folder" / name
    assert save_figure(Figure(figsize=(1, 1)), path) == path
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_a_picture_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    check_picture(tmp_path / "new" / "a.svg", "--out")
    assert list((tmp_path / "new").iterdir()) == []
    for name, message in (("a.txt", r"a\.txt is not a picture's name; end it in one of .*png"), ("", "is a directory")):
        with pytest.raises(UserError, match=message):
            check_picture(tmp_path / name, "--out")


def test_labels() -> None:
    assert [label(text) for text in ("a", "$x$", "_x", "\x1b")] == ["a", r"\$x\$", " _x", r"\x1b"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/a\.png: .*; choose another place"):
        save_figure(Figure(), tmp_path / "file/a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_figure(Figure(figsize=(1, 1)), tmp_path / "a.png")
    with pytest.raises(UserError, match="that is a folder"):
        save_figure(Figure(), Path("."))
    with pytest.raises(UserError, match=r"cannot draw .*a\.xyz: .*not supported") as error:
        save_figure(Figure(), tmp_path / "a.xyz")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file"]
