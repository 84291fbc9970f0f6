"""Text of one's own: every file in both splits, cut at a line, whatever its ending."""

from __future__ import annotations

import gzip

import pytest
from repository import load_script

from gpt2.errors import UserError
from gpt2.tokens.dataset import open_dataset


@pytest.fixture(scope="module")
def text():
    return load_script("data/text.py")


def decoded(directory):
    """(training, validation)"""
    dataset = open_dataset(directory)
    return tuple(dataset.tokenizer().decode(s.read(0, len(s)).tolist()) for s in (dataset.train, dataset.val))


def lines(name: str, count: int) -> str:
    return "".join(f"{name} {n}\n" for n in range(count))


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_every_file_is_in_both_splits_in_the_proportions_that_are_said(tmp_path, text, capsys, tokenizer):
    source = tmp_path / "source"
    (source / "test").mkdir(parents=True)
    for name in ("a.txt", "b.md", "c.text", "test/d.TXT", "e.py"):
        (source / name).write_text(lines(name, 300))
    (source / "f.txt.gz").write_bytes(gzip.compress(lines("f.txt", 300).encode()))
    (source / "g.txt").write_text("short")
    (source / "h.jsonl").write_text('{"text": "a"}')
    command = [str(source), "--out", str(tmp_path / "out"), "--tokenizer", tokenizer]
    assert text.main(command) == 0
    printed = capsys.readouterr().out
    train, val = decoded(tmp_path / "out")
    for name in ("a.txt", "b.md", "c.text", "f.txt", "test/d.TXT"):
        row = next(line.split() for line in printed.splitlines() if line.startswith(name))
        assert float(row[-1].rstrip("%")) == pytest.approx(5, abs=0.3)
        own = lines(name, 300)
        kept = own[: own.index(f"{name} {val.split(f'{name} ')[1].split()[0]}\n")]
        assert kept in train
        assert own.removeprefix(kept) in val
    assert "short" in train
    assert "h.jsonl" in printed
    assert "e.py" not in train + val
    assert f"train on it: python train_gpt2.py {'quickstart' if tokenizer == 'gpt2' else 'shakespeare-char'}" in printed
    assert text.main(command) == 0
    assert "complete and verified" in capsys.readouterr().out
    assert text.main([*command[:2], str(tmp_path / "code"), *command[3:], "--endings", ".py"]) == 0
    assert "e.py 299" in decoded(tmp_path / "code")[1]
    (source / "a.txt").write_text(lines("other", 300))
    with pytest.raises(UserError, match="holds another data set"):
        text.main(command)


@pytest.mark.parametrize("content", ["one line of words " * 100, "一行" * 300])
def test_text_without_lines_is_cut_after_a_character(tmp_path, text, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    text.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])
    train, val = (part.removeprefix("<|endoftext|>") for part in decoded(tmp_path / "out"))
    assert train + val == content
    assert 0.03 < len(val) / len(content) < 0.07


def test_what_cannot_be_is_told_in_one_line(tmp_path, text):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.bin").write_text("text")
    (tmp_path / "c.txt").write_bytes(bytes(range(256)))
    for name, message in (
        ("a.txt", "no val tokens"),
        ("b.bin", r"b.bin: not a \.txt, \.text or \.md"),
        ("c.txt", "not text in UTF-8"),
        ("d.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            text.main([str(tmp_path / name), "--out", str(tmp_path / f"out-{name}")])
        assert "\n" not in str(error.value)
        assert "--source" not in str(error.value)
