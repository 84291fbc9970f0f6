"""TinyShakespeare: the counts nanoGPT has, checked content, characters that come back."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import threading

import pytest
from repository import ROOT, SHARED_DATA, load_script

from gpt2.errors import UserError
from gpt2.tokens.dataset import open_dataset

SCRIPT = ROOT / "data" / "shakespeare.py"
REAL = SHARED_DATA / "tinyshakespeare.txt"
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40


@pytest.fixture
def shakespeare():
    return load_script("data/shakespeare.py")


@pytest.fixture
def small(shakespeare, monkeypatch, tmp_path):
    """The script, for a text of our own."""
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    (tmp_path / "input.txt").write_text(TEXT)
    return shakespeare


@pytest.mark.skipif(not REAL.is_file(), reason=f"TinyShakespeare is not at {REAL}")
@pytest.mark.parametrize(
    ("tokenizer", "train", "val"),
    [("gpt2", 301_966 + 1, 36_059 + 1), ("char", 1_003_854, 111_540)],  # nanoGPT's; <|endoftext|> before each half
)
def test_real_text_has_nanogpts_counts(tmp_path, shakespeare, tokenizer, train, val, capsys):
    out = tmp_path / "out"
    command = ["--source", str(REAL), "--out", str(out), "--tokenizer", tokenizer]
    assert shakespeare.main(command) == 0
    dataset = open_dataset(out)
    assert (len(dataset.train), len(dataset.val)) == (train, val)
    assert dataset.vocab_size == (65 if tokenizer == "char" else 50257)
    text = dataset.tokenizer().decode([*dataset.train.read(0, train), *dataset.val.read(0, val)])
    assert text.replace("<|endoftext|>", "") == REAL.read_text()
    assert shakespeare.main(command) == 0
    assert "complete and verified" in capsys.readouterr().out.splitlines()[-1]


def test_download_is_checked_and_retried(tmp_path, small, monkeypatch):
    """From a server that fails at first, then sends the wrong file, then the right one."""
    answers = [(503, b""), (200, TEXT.encode())]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            code, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(small.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(small, "URL", f"http://127.0.0.1:{server.server_address[1]}/input.txt")
        assert small.main(["--out", str(tmp_path / "out")]) == 0
        answers[:] = [(200, b"<html>not found</html>")]
        with pytest.raises(UserError, match="are not TinyShakespeare"):
            small.main(["--out", str(tmp_path / "other")])
        server.shutdown()
    with pytest.raises(UserError, match="--source FILE"):
        small.main(["--out", str(tmp_path / "other")])
    assert not any((tmp_path / "other").glob("*"))
    assert len(open_dataset(tmp_path / "out").train) > 0


def test_wrong_source_and_directory(tmp_path, small):
    for data, message in ((b"short", "too few for two splits"), (bytes(range(256)), "is not text in UTF-8")):
        (tmp_path / "wrong.txt").write_bytes(data)
        with pytest.raises(UserError, match=message):
            small.main(["--source", str(tmp_path / "wrong.txt"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="cannot read --source"):
        small.main(["--source", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="it is not a plain file"):
        small.main(["--source", os.devnull, "--out", str(tmp_path / "out")])
    command = ["--source", str(tmp_path / "input.txt"), "--out", str(tmp_path / "out")]
    assert small.main([*command, "--tokenizer", "char", "--format", "bin"]) == 0
    assert open_dataset(tmp_path / "out").train.paths[0].suffix == ".bin"
    for other in ([], ["--tokenizer", "char"]):
        with pytest.raises(UserError, match="holds another data set"):
            small.main([*command, *other])
    shard = open_dataset(tmp_path / "out").train.paths[0]
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"checksum differs.*make it again"):
        small.main([*command, "--tokenizer", "char", "--format", "bin"])


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_another_text_is_tokenized_in_its_place(tmp_path, shakespeare, tokenizer, capsys):
    path = tmp_path / "my own.txt"
    path.write_text("\ufeff" + "".join(f"Ünique line {n}\n" for n in range(100)), encoding="utf-8")
    command = ["--source", str(path), "--out", str(tmp_path / "out"), "--tokenizer", tokenizer]
    assert shakespeare.main(command) == 0
    assert "my own.txt is not TinyShakespeare; it is tokenized in its place" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out")
    train, val = (dataset.tokenizer().decode(s.read(0, len(s)).tolist()) for s in (dataset.train, dataset.val))
    train, val = train.replace("<|endoftext|>", ""), val.replace("<|endoftext|>", "")
    assert "\ufeff" + train + val == path.read_text(encoding="utf-8")
    assert train.endswith("\n")
    assert 0.08 < len(val) / len(train + val) <= 0.1
    assert dataset.manifest.name == "my_own"
    assert shakespeare.main(command) == 0
    assert "complete and verified" in capsys.readouterr().out
    path.write_text("another text, of the same name and as many lines\n" * 20)
    with pytest.raises(UserError, match="holds another data set"):
        shakespeare.main(command)
