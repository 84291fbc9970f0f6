"""A run's second copy: kept in line with the disk, and what an empty disk resumes from."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from small_checkpoints import TINY, TOKENIZER, damage, make

from gpt2.checkpoint import mirror as mirrors
from gpt2.checkpoint.directory import list_checkpoints, verify_checkpoint, write_checkpoint
from gpt2.checkpoint.mirror import Mirror
from gpt2.checkpoint.writer import worth_keeping
from gpt2.errors import LaterVersion, UserError


def newest(keep: int) -> Any:
    def retained(trainings: Mapping[str, Any]) -> set[str]:
        return {*sorted(trainings)[-keep:], *worth_keeping(trainings, 0)}

    return retained


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "FIRST_DELAY", 0.01)


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place of each kind; S3 is moto's server on loopback."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        yield f"s3://bucket/{tmp_path.name}/run"
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}"
    else:
        yield (tmp_path / "mirror").as_uri()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdirs("bucket", exist_ok=True)
    return server


class Machine:
    """A run's directory on one machine, and what its mirror says."""

    def __init__(self, run: Path, url: str, keep: int = 10):
        self.run, self.said = run, list[str]()
        run.mkdir(exist_ok=True)
        self.mirror = Mirror(url, run, newest(keep), self.said.append)

    def train(self, *steps: int, start: int = 0, **training: Any) -> None:
        """Make checkpoints of these steps, and wait until they are copied."""
        self.mirror.start(start)
        for step in steps:
            with (self.run / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {step}}}\n')
            (self.run / "config.json").write_text(json.dumps({"of": step}))
            (self.run / "checkpoints").mkdir(exist_ok=True)
            write_checkpoint(self.run / "checkpoints", make(step, **training), TINY, TOKENIZER)
            self.mirror.wake()
        self.mirror.finish()

    def steps(self) -> list[int]:
        return [int(path.name[5:]) for path in list_checkpoints(self.run / "checkpoints")]

    def mirrored(self) -> list[int]:
        self.mirror._read_markers()
        return sorted(int(name[5:]) for name in self.mirror._markers)


def test_two_machines_take_turns(tmp_path: Path, url: str) -> None:
    a = Machine(tmp_path / "a", url)
    a.mirror.restore()  # nothing is there yet
    a.train(1, 2)
    assert a.mirrored() == [1, 2]
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert b.steps() == [2]
    verify_checkpoint(b.run / "checkpoints/step_00000002")
    assert (b.run / "metrics.jsonl").read_bytes() == (a.run / "metrics.jsonl").read_bytes()
    assert json.loads((b.run / "config.json").read_text()) == {"of": 2}
    b.train(3, 4, start=2)
    again = Machine(tmp_path / "a", url)
    again.mirror.restore()
    assert again.steps() == [1, 2, 4]
    assert again.mirrored() == [1, 2, 3, 4]
    assert (a.run / "metrics.jsonl").read_bytes() == (b.run / "metrics.jsonl").read_bytes()
    assert not [path for path in a.run.iterdir() if path.name.startswith("superseded")]
    again.train(5, start=4)
    assert again.mirrored() == [1, 2, 3, 4, 5]
    assert not [line for line in a.said + b.said + again.said if "warning" in line]


def test_retention_is_as_on_disk(tmp_path: Path, url: str) -> None:
    a = Machine(tmp_path / "a", url, keep=2)
    a.train(1, val_loss=1.0)
    b = Machine(tmp_path / "b", url, keep=2)
    b.mirror.restore()
    b.train(2, 3, 4, start=1, val_loss=2.0)  # the best, of the other machine, stays
    assert b.mirrored() == [1, 3, 4]
    left = b.mirror._fs.find(b.mirror.root)
    assert not [path for path in left if "step_00000002" in path]


def test_going_back_sets_aside_what_is_later(tmp_path: Path, url: str) -> None:
    a = Machine(tmp_path / "a", url)
    a.train(1, 2, 3)
    for step in (2, 3):
        shutil.rmtree(a.run / f"checkpoints/step_{step:08d}")
    back = Machine(tmp_path / "a", url)
    back.train(2, start=1, val_loss=7.0)  # another step 2 than before
    assert back.mirrored() == [1, 2]
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert json.loads((b.run / "checkpoints/step_00000002/training.json").read_text())["val_loss"] == 7.0
    assert back.mirror._fs.exists(f"{back.mirror.root}/checkpoints/step_00000003/superseded.json")


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_damaged_copy_is_passed_over(tmp_path: Path, name: str, how: str) -> None:
    url = str(tmp_path / "mirror")  # a plain path
    a = Machine(tmp_path / "a", url)
    a.train(1, 2)
    file = tmp_path / "mirror/checkpoints/step_00000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flipped" else content[:-9])
    if how == "gone":
        file.unlink()
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert b.steps() == [1]
    assert [line for line in b.said if "damaged" in line] or name == "training.json"
    file.unlink(missing_ok=True)
    (tmp_path / "mirror/checkpoints/step_00000001/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; choose another --mirror to start anew"):
        Machine(tmp_path / "c", url).mirror.restore()


class Failing:
    """A storage that fails in every `every`-th request, after it has been carried out or before."""

    def __init__(self, fs: Any, every: int):
        self.fs, self.every, self.calls, self.failures = fs, every, 0, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.fs, name)
        if not callable(real) or name == "invalidate_cache":
            return real

        def request(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls % self.every:
                return real(*args, **kwargs)
            self.failures += 1
            if self.failures % 2:
                real(*args, **kwargs)
            raise ConnectionResetError("cut")

        return request


@pytest.mark.parametrize("every", [11, 23])
def test_errors_are_told_and_tried_again(tmp_path: Path, url: str, every: int) -> None:
    a = Machine(tmp_path / "a", url, keep=2)
    a.mirror._fs = failing = Failing(a.mirror._fs, every)
    a.mirror.start(0)
    for step in range(1, 6):
        (a.run / "checkpoints").mkdir(exist_ok=True)
        write_checkpoint(a.run / "checkpoints", make(step), TINY, TOKENIZER)
        a.mirror.wake()
        time.sleep(0.05)
    deadline = time.monotonic() + 60
    while set(a.mirror._markers) != {"step_00000004", "step_00000005"} and time.monotonic() < deadline:
        time.sleep(0.01)
    failed, a.mirror._fs = failing.failures, failing.fs
    a.mirror.finish()
    assert failed
    assert "could not be brought up to date (cut); training continues, and the copy is tried again" in a.said[0]
    assert a.mirrored() == [4, 5]
    assert a.steps() == [1, 2, 3, 4, 5]  # the local copy has lost nothing
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert b.steps() == [5]


def test_a_storage_that_is_gone_delays_the_end_by_a_few_attempts(tmp_path: Path) -> None:
    a = Machine(tmp_path / "a", f"memory://{tmp_path.name}")
    a.mirror._fs = Failing(a.mirror._fs, 1)
    began = time.monotonic()
    a.train(1)
    assert time.monotonic() - began < 30
    assert len(a.said) == 2
    assert a.said[1].endswith("is behind " + str(a.run) + "; the next start makes up for it")
    Machine(tmp_path / "a", f"memory://{tmp_path.name}").train(start=1)
    assert a.steps() == [1]
    b = Machine(tmp_path / "b", f"memory://{tmp_path.name}")
    b.mirror.restore()
    assert b.steps() == [1]


@pytest.mark.parametrize("after", [4, 9])
def test_an_upload_that_is_cut_is_no_checkpoint(tmp_path: Path, url: str, after: int) -> None:
    class KilledError(BaseException):
        pass

    a = Machine(tmp_path / "a", url)
    a.train(1)
    again = Machine(tmp_path / "a", url)
    (a.run / "checkpoints").mkdir(exist_ok=True)
    write_checkpoint(a.run / "checkpoints", make(2), TINY, TOKENIZER)
    again.mirror._read_markers()
    real, calls = again.mirror._fs, 0

    class Dying:
        def __getattr__(self, name: str) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KilledError
            return getattr(real, name)

    again.mirror._fs = Dying()
    with pytest.raises(KilledError):
        again.mirror._copy()
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert b.steps() == [1]
    Machine(tmp_path / "a", url).train(start=2)  # the next start makes up for it
    c = Machine(tmp_path / "c", url)
    c.mirror.restore()
    assert c.steps() == [2]


def test_a_checkpoint_is_copied_whole_though_it_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "mirror")
    a = Machine(tmp_path / "a", url)
    real, gate, begun = a.mirror._fs.put_file, threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        begun.set()
        gate.wait(20)
        real(*args)

    monkeypatch.setattr(a.mirror._fs, "put_file", slow)
    (a.run / "checkpoints").mkdir()
    write_checkpoint(a.run / "checkpoints", make(1), TINY, TOKENIZER)
    a.mirror.start(0)
    assert begun.wait(20)
    shutil.rmtree(a.run / "checkpoints/step_00000001")  # as retention does
    gate.set()
    a.mirror.finish()
    b = Machine(tmp_path / "b", url)
    b.mirror.restore()
    assert b.steps() == [1]
    assert not list((a.run / "checkpoints").glob(".*"))


def test_what_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    a = Machine(tmp_path / "a", url)
    a.train(1)
    with pytest.raises(UserError, match="holds a run, which --resume never would replace"):
        Machine(tmp_path / "b", url).mirror.restore(anew=True)
    other = Machine(tmp_path / "other", url)
    (other.run / "metrics.jsonl").write_text('{"step": 77}\n')
    with pytest.raises(UserError, match="holds another run than"):
        other.mirror.restore()
    with pytest.raises(UserError, match="--mirror nothing://x cannot be used: "):
        Machine(tmp_path / "c", "nothing://x")
    broken = Machine(tmp_path / "d", url)
    broken.mirror._fs = Failing(broken.mirror._fs, 1)
    with pytest.raises(UserError, match=r"cannot be read \(cut\), and .* holds no checkpoint"):
        broken.mirror.restore()
    a.mirror._fs = Failing(a.mirror._fs, 1)
    a.mirror.restore()
    assert "cannot be read (cut); resuming from" in a.said[-1]


def test_names_that_lead_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    a = Machine(tmp_path / "a", str(tmp_path / "mirror"))
    a.train(1)
    marker = tmp_path / "mirror/checkpoints/step_00000001/training.json"
    training = json.loads(marker.read_text())
    training["files"]["../../../escaped"] = training["files"]["config.json"]
    marker.write_text(json.dumps(training))
    with pytest.raises(UserError, match="every checkpoint in"):
        Machine(tmp_path / "b", str(tmp_path / "mirror")).mirror.restore()
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("how", ["flipped", "short", "gone", "no JSON"])
def test_a_checkpoint_that_is_damaged_on_the_disk_keeps_no_other_from_being_copied(tmp_path: Path, how: str) -> None:
    a = Machine(tmp_path / "a", str(tmp_path / "mirror"))
    (a.run / "checkpoints").mkdir()
    for step in (1, 2):
        write_checkpoint(a.run / "checkpoints", make(step), TINY, TOKENIZER)
    damage(a.run / "checkpoints/step_00000002", how)
    a.train()
    assert not a.said
    b = Machine(tmp_path / "b", str(tmp_path / "mirror"))
    b.mirror.restore()
    assert b.steps() == [1]


def test_a_later_versions_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    a = Machine(tmp_path / "a", str(tmp_path / "mirror"))
    a.train(1, 2)
    marker = tmp_path / "mirror/checkpoints/step_00000002/training.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    with pytest.raises(LaterVersion, match="update it"):
        Machine(tmp_path / "b", str(tmp_path / "mirror")).mirror.restore()
