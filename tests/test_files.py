"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.files import cache_directory, check_output, create, lock, make_directory, sha256_file, whole_file, write_whole


def test_writing_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_whole(path, "neu: \u00fc\ud800")
    assert path.read_bytes() == b"neu: \xc3\xbc\xed\xa0\x80"


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_tested_before_the_work(tmp_path: Path) -> None:
    check_output(None, "--json")
    check_output(tmp_path / "new" / "a.json", "--json")
    assert list((tmp_path / "new").iterdir()) == []
    kept = tmp_path / "kept"
    kept.write_text("old")
    check_output(kept, "--json")
    assert kept.read_text() == "old"
    for path, message in (
        (tmp_path, r"--json .* is a directory"),
        (Path("/dev/null"), r"--json /dev/null is a device or pipe"),
        (kept / "a.json", r"cannot write --json .*kept/a\.json: .*; choose another file"),
        (tmp_path / ("n" * 300), "cannot write --json"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(path, "--json")


def test_what_is_written_has_the_usual_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """Where a temporary file is to be, somebody has put a link to a file of value."""
    (tmp_path / "valuable").write_text("kept")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "valuable")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "valuable").read_text() == "kept"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()


def test_create_replaces_a_link_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with create(tmp_path / "link") as file:
        file.write(b"x")
    assert not (tmp_path / "link").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_is_for_one_writer_or_many_readers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("a") as one, path.open("a") as two:
        assert lock(one)
        assert not lock(two)
        assert not lock(two, shared=True)
        one.close()
        assert lock(two, shared=True)
        with path.open("r") as three:
            assert lock(three, shared=True)


def test_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than is read at a time
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_directory_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file.*: .*; choose another --out"):
        make_directory(tmp_path / "file" / "below", "--out")
    make_directory(tmp_path / "a" / "b", "--out")
    assert (tmp_path / "a" / "b").is_dir()


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "repro-gpt2"
