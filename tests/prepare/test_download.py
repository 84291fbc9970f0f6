"""Fetching from the Hub, with a server of our own in its place that fails as networks do."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from repository import ROOT

from gpt2.errors import UserError
from gpt2.prepare import download as hub
from gpt2.prepare.download import Fetcher, find_source, parse_hub
from gpt2.prepare.sources import local_source
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.tokenizer import gpt2_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("huggingface_hub")

SCRIPT = ROOT / "data" / "fineweb.py"
COMMIT = "c0ffee" + "0" * 34


class Hub(http.server.ThreadingHTTPServer):
    """The few answers of the Hub that a data set's reader asks for.

    Attributes:
        files: path → content.
        faults: path → what its next downloads suffer: "503", "cut" (half, then the line drops), "flip" (a wrong byte).
        downloads: how often the content of a path was asked for.
        revisions: those asked for; "" where none was.
        down: answer everything with 503.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults: dict[str, list[str]] = {}
        self.downloads: Counter[str] = Counter()
        self.revisions: list[str] = []
        self.down = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        files = self.server.files
        if self.server.down:
            return self.answer(503)
        if path == "/api/datasets/owner/name" or path.startswith("/api/datasets/owner/name/revision/"):
            self.server.revisions.append(path.partition("/revision/")[2])
            return self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        tree = f"/api/datasets/owner/name/tree/{COMMIT}"
        if path.startswith(tree):
            folder = path.removeprefix(tree).strip("/")
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": {
                    "oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                for name, data in files.items() if not folder or name.startswith(folder + "/")
            ]  # fmt: skip
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        name = path.removeprefix(f"/datasets/owner/name/resolve/{COMMIT}/")
        if name not in files:
            return self.answer(404, X_Error_Code="RepoNotFound" if name.startswith("/api") else "EntryNotFound")
        return self.send_file(name, files[name])

    def send_file(self, name: str, data: bytes) -> None:
        common = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, Content_Length=str(len(data)), **common)
        self.server.downloads[name] += 1
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault == "503":
            return self.answer(503)
        if fault == "flip":
            data = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
        begin = 0
        if "Range" in self.headers:
            begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            common["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        if fault == "cut":
            self.answer(206 if begin else 200, body[: len(body) // 2], Content_Length=str(len(body)), **common)
            self.close_connection = True
            return None
        return self.answer(206 if begin else 200, body, **common)


def texts_of(number: int) -> list[str]:
    generator = np.random.default_rng(number)
    return [f"document {number} {i} " + "word " * generator.integers(1, 200) for i in range(60)]


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def server():
    files = {f"sample/10BT/00{n}_00000.parquet": parquet(texts_of(n)) for n in range(4)}
    files["README.md"] = b"# a data set"
    files["data/other.parquet"] = parquet(["not of the sample"])
    made = Hub(files)
    yield made
    made.shutdown()
    made.server_close()


def environment(server: Hub, tmp_path: Path) -> dict[str, str]:
    """In which the Hub is `server`."""
    made = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    return made | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}


def run(server: Hub, tmp_path: Path, *arguments: object, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**environment(server, tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def stream() -> list[int]:
    return [t for n in range(4) for text in texts_of(n) for t in (50256, *gpt2_tokenizer().encode(text))]


def tokens_of(directory: Path) -> list[int]:
    dataset = open_dataset(directory)
    return [*dataset.val.read(0, len(dataset.val)), *dataset.train.read(0, len(dataset.train))]


def test_every_fault_is_overcome_and_the_disk_is_left_clean(server, tmp_path):
    """A 503, a connection cut in mid-file and a file damaged on the way: the shards are those of the true files."""
    names = sorted(name for name in server.files if name.startswith("sample"))
    server.faults = {names[0]: ["503"], names[1]: ["cut"], names[2]: ["flip"]}
    out = tmp_path / "out"
    address = "hf://datasets/owner/name/sample/10BT/*.parquet"
    command = ["--source", address, "--out", out, "--shard-tokens", 5000, "--val-tokens", 2000, "--workers", 1]
    code, printed, error = run(server, tmp_path, *command)
    assert code == 0, error
    assert tokens_of(out) == stream()
    assert f"{address}: 4 files" in printed
    assert [server.downloads[name] for name in names] == [2, 2, 2, 1]
    assert not list(out.glob(".fetched*"))
    manifest = open_dataset(out).manifest
    assert manifest.source["revision"] == COMMIT
    assert [file["name"] for file in manifest.source["files"]] == names
    # Complete: not even asked for.
    server.down = True
    code, printed, error = run(server, tmp_path, *command)
    assert code == 0, error
    assert "complete and verified" in printed


def test_hub_that_refuses_a_file_stops_it_and_it_continues(server, tmp_path, monkeypatch):
    """In the middle of a data set: what is finished stays, kept downloads are used again, the rest follows."""
    names = sorted(name for name in server.files if name.startswith("sample"))
    out = tmp_path / "out"
    command = ["--source", "hf://datasets/owner/name/sample/10BT", "--out", out, "--shard-tokens", 5000]
    command += ["--val-tokens", 2000, "--workers", 1, "--keep-downloads"]
    broken = Handler.send_file

    def gone(self, name, data):
        if name == names[3] and self.command == "GET":
            return self.answer(410)
        return broken(self, name, data)

    monkeypatch.setattr(Handler, "send_file", gone)
    code, _, error = run(server, tmp_path, *command)
    assert code == 2
    assert error.count("\n") == 1
    assert "finished shards are kept" in error
    assert names[3] in error
    kept = {p.name: p.read_bytes() for p in out.glob("*.npy")}
    assert kept
    monkeypatch.setattr(Handler, "send_file", broken)
    before = server.downloads.copy()
    code, _, error = run(server, tmp_path, *command)
    assert code == 0, error
    assert tokens_of(out) == stream()
    assert kept.items() <= {p.name: p.read_bytes() for p in out.glob("*.npy")}.items()
    assert server.downloads - before == Counter({names[3]: 1})
    assert (out / ".fetched" / names[0]).read_bytes() == server.files[names[0]]


def test_no_network_and_no_repository(server, tmp_path):
    out = tmp_path / "out"
    code, _, error = run(server, tmp_path, "--source", "owner/nothing", "--out", out)
    assert code == 2
    assert "it does not exist, or needs a token" in error
    code, _, error = run(server, tmp_path, "--out", out, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in error
    assert "--source" in error
    code, _, error = run(server, tmp_path, "--source", "hf://datasets/owner/name/none/*.parquet", "--out", out)
    assert code == 2
    assert "that matches none/*.parquet" in error
    assert not out.exists()


CARD = (
    b"---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en/train/*}\n  - {split: val, path: en/\
validation/*}\n- config_name: de\n  data_files: de/*/*\n---\n"
)


def text_of(directory: Path) -> tuple[str, str]:
    """What is validated on, and what is trained on."""
    dataset = open_dataset(directory)
    splits = (s.read(0, len(s)).tolist() for s in (dataset.val, dataset.train))
    val, train = (gpt2_tokenizer().decode(tokens).replace("<|endoftext|>", " ").strip() for tokens in splits)
    return val, train


def found_by(server: Hub, tmp_path: Path, *addresses: tuple[str, str | None]) -> list[list[list[str]] | str]:
    """For each (address, revision): files of validation, of training, and what is not read; or why it is refused."""
    program = """if True:
    import json, sys
    from gpt2.errors import UserError
    from gpt2.prepare.download import find_source
    for address, revision in json.loads(sys.argv[1]):
        try:
            s = find_source([address], None, revision=revision)
            names = [file.name for file in s.files]
            print(json.dumps([names[: s.validation], names[s.validation :], [": ".join(item) for item in s.unread]]))
        except UserError as error:
            print(json.dumps(str(error)))
    """
    command = [sys.executable, "-c", program, json.dumps(addresses)]
    done = subprocess.run(command, env=environment(server, tmp_path), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_configurations_and_splits_of_a_repository(server, tmp_path):
    """Only train is trained on, the validation split is the validation, and several configurations ask for a choice."""
    layout = [f"{c}/{s}/0.parquet" for c in ("en", "de") for s in ("train", "test", "validation")]
    server.files = {name: parquet([name.replace("/", " ")[:-10]]) for name in layout}
    folder, star = ("hf://datasets/owner/name/de", None), ("hf://datasets/owner/name/*/*.parquet", None)
    whole, folder, star = found_by(server, tmp_path, ("owner/name", None), folder, star)
    validation, train = ([f"{c}/{s}/0.parquet" for c in ("de", "en")] for s in ("validation", "train"))
    tests = [f"{c}/test/0.parquet: of the split test, which is not trained on" for c in ("de", "en")]
    assert whole == star == [validation, train, tests]
    assert folder == [validation[:1], train[:1], tests[:1]]
    server.files["README.md"] = CARD
    server.files["a.jsonl"] = b""
    refused, german, repository = found_by(
        server, tmp_path, ("owner/name", None), ("owner/name:de", None), ("owner/nothing:de", None)
    )
    assert "is 2 data sets: en, de; choose one, as in --source hf://datasets/owner/name:en" in refused
    assert german[:2] == [[], [name for name in sorted(layout) if name.startswith("de/")]]
    assert "a.jsonl: of no split" in german[2]
    assert "it does not exist" in repository
    chosen = ["--source", "owner/name:en", "--revision", "a/branch", "--out", tmp_path / "en", "--workers", 1]
    code, printed, error = run(server, tmp_path, *chosen)
    assert code == 0, error
    assert "not read, of no split: 5 (a.jsonl, de/test/0.parquet" in printed
    assert server.revisions[-1] == "a/branch"
    dataset = open_dataset(tmp_path / "en")
    assert dataset.manifest.source["description"] == "hf://datasets/owner/name@a%2Fbranch:en"
    for split, text in ((dataset.val, "en validation"), (dataset.train, "en train")):
        assert split.read(0, len(split)).tolist() == [50256, *gpt2_tokenizer().encode(text)]
    server.down = True  # what the manifest recorded is enough, splits included
    code, printed, error = run(server, tmp_path, *chosen)
    assert code == 0, error
    assert "complete and verified" in printed


def test_revisions(server, tmp_path):
    """Of the default data set, and those that cannot be."""
    handler = Handler.do_GET
    asked: list[str] = []

    def listen(self):
        asked.append(unquote(self.path))
        return handler(self)

    Handler.do_GET = listen
    try:
        code = run(server, tmp_path, "--revision", "v1.0.0", "--out", tmp_path / "out")[0]
    finally:
        Handler.do_GET = handler
    assert code == 2
    assert asked[0].startswith("/api/datasets/HuggingFaceFW/fineweb-edu/revision/v1.0.0")
    for source, revision, message in (
        ("owner/name@v1", "v2", "name two revisions"),
        (str(ROOT / "README.md"), "v2", "is of a data set on the Hub"),
    ):
        with pytest.raises(UserError, match=message):
            find_source([source], None, revision=revision)


def test_kinds_of_file_that_may_be_the_same_text_are_refused(server, tmp_path):
    server.files = {"a.parquet": parquet(["x"]), "a.jsonl": b'{"text": "x"}'}
    (refused,) = found_by(server, tmp_path, ("owner/name", None))
    assert "jsonl and parquet files, which may be the same text" in refused


def test_growing_waits_then_one_line(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    calls: list[int] = []

    def failing():
        calls.append(1)
        raise OSError("connection reset\nby peer")

    with pytest.raises(UserError, match=r"cannot fetch it \(connection reset\); check the network"):
        hub._with_retries(failing, "fetch it")
    assert len(calls) == 6
    assert all(0.5 * 2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(waits))
    assert len(waits) == 5

    def full_disk():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        hub._with_retries(full_disk, "fetch it")
    assert len(waits) == 5

    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hub._with_retries(bug, "fetch it")


def test_addresses():
    assert parse_hub("owner/name") == ("owner/name", None, None, "*")
    assert parse_hub("hf://datasets/o/n@v1.0/sample/10BT") == ("o/n", "v1.0", None, "sample/10BT/*")
    assert parse_hub("hf://datasets/o/n/x.parquet") == ("o/n", None, None, "x.parquet")
    for address in ("name", "a/b/c", "/absolute", "./a.parquet", "dir/a.parquet", "http://x/y", "*.parquet"):
        assert parse_hub(address) is None


def test_what_exists_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "x.txt").write_text("text")
    assert find_source(["owner/name"], None).description == "local files"


def test_fetched_ahead_and_removed_after_use(tmp_path):
    """Never more files on the disk than asked for ahead; a local file is never removed."""
    source_directory = tmp_path / "source"
    source_directory.mkdir()
    for number in range(6):
        (source_directory / f"{number}.txt.gz").write_bytes(gzip.compress(b"text %d" % number))
    source = local_source([str(source_directory)])
    scratch = tmp_path / "scratch"
    with Fetcher(source, scratch, keep=False, ahead=2) as fetcher:
        waiting = list(range(6))
        while waiting:
            fetcher.start(waiting)
            number = waiting.pop(0)
            path, units = fetcher.get(number)
            assert path.read_bytes() == b"text %d" % number
            assert units.units == 1
            assert len(list(scratch.glob("*.plain"))) <= 2
            fetcher.release(number)
            assert not path.exists()
    assert not scratch.exists()
    assert len(list(source_directory.iterdir())) == 6
