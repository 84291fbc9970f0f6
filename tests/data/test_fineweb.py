"""`data/fineweb.py` as a user runs it: killed and continued, verified, in parts, with wrong arguments."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT, load_script
from small_runs import SMALL

from gpt2.errors import UserError, visible
from gpt2.prepare.small_dataset import write_dataset
from gpt2.prepare.sources import local_source
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks, Loader
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest
from gpt2.tokens.tokenizer import gpt2_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SCRIPT = ROOT / "data" / "fineweb.py"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: object, script: Path = SCRIPT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell's background job, as these tests may be one, hands on an interrupt that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: object, script: Path = SCRIPT) -> tuple[int, str, str]:
    process = start(*arguments, script=script)
    out, error = process.communicate(timeout=600)
    return process.returncode, out, error


def write_source(directory: Path, count: int) -> tuple[Path, list[str]]:
    """Two files; `count` documents of English-like text, in row groups of 40."""
    generator = random.Random(0)
    words = gpt2_tokenizer().decode(list(range(1000, 3000))).split()
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 400))) for _ in range(count)]
    directory.mkdir()
    for name, half in (("a", texts[: count // 2]), ("b", texts[count // 2 :])):
        pq.write_table(pa.table({"text": half}), directory / f"{name}.parquet", row_group_size=40)
    return directory, texts


def stream(texts: list[str]) -> np.ndarray:
    return np.array([t for text in texts for t in (50256, *gpt2_tokenizer().encode(text))], np.uint16)


def shard_files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.npy")}


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts worker processes in /proc")
def test_killed_ten_times_at_random_and_continued(tmp_path):
    """kill -9 anywhere, each time continued with another number of workers: the shards are an unkilled run's."""
    source, texts = write_source(tmp_path / "source", 3000)
    whole = stream(texts)
    out = tmp_path / "out"
    command = ["--source", source, "--out", out, "--shard-tokens", 8000, "--val-tokens", 5000]
    generator = random.Random()
    seed = generator.randrange(10**6)
    generator.seed(seed)
    orphans: list[int] = []
    killed = attempts = 0
    while killed < 10:
        attempts += 1
        assert attempts < 100, f"seed {seed}: it is always done before it is killed"
        before = len(list(out.glob("*.npy")))
        process = start(*command, "--workers", 1 + killed % 3)
        more = generator.choice((0, 1, 1, 2, 4))  # shards to wait for before the kill; with 0, start-up is hit
        while len(list(out.glob("*.npy"))) < before + more and process.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.random() * (0.02 if more else 0.7))
        orphans += children(process.pid)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=600)
        if process.returncode == 0:  # this test was held up by other programs, and the kill came too late
            shutil.rmtree(out)
            continue
        assert process.returncode == -signal.SIGKILL, f"seed {seed}: {error}"
        killed += 1
    code, printed, error = run(*command, "--workers", 2)
    assert code == 0, error
    files = shard_files(out)
    dataset = open_dataset(out)
    assert np.array_equal(dataset.val.read(0, len(dataset.val)), whole[: len(dataset.val)]), f"seed {seed}"
    assert np.array_equal(dataset.train.read(0, len(dataset.train)), whole[len(dataset.val) :]), f"seed {seed}"
    assert len(files) > 60
    assert not list(out.glob(".*.tmp"))
    # To the byte, with the manifest, what three workers write without being killed.
    other = tmp_path / "unkilled"
    assert run(*command[:3], other, *command[4:], "--workers", 3)[0] == 0
    assert shard_files(other) == files
    mine, theirs = (json.loads((d / MANIFEST_NAME).read_text()) for d in (out, other))
    for manifest in (mine, theirs):
        del manifest["seconds"], manifest["statistics"]["tokens_per_second"]
    assert mine == theirs
    deadline = time.monotonic() + 600
    while any(map(alive, orphans)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert orphans
    assert not [pid for pid in orphans if alive(pid)], "workers outlived their parent"
    assert f"{dataset.manifest.statistics()['tokens']:,}" in printed


INTERRUPTED = """
import os, runpy, signal, sys
from gpt2.tokens.shard_file import ShardWriter

finish, calls = ShardWriter.finish, 0

def finish_and_interrupt(writer, *expected):
    global calls
    named = finish(writer, *expected)
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return named

ShardWriter.finish = finish_and_interrupt
if __name__ == "__main__":
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_interrupt_ends_it_and_it_continues(tmp_path):
    source, texts = write_source(tmp_path / "source", 1500)
    command = ["--source", source, "--out", tmp_path / "out", "--shard-tokens", 4000, "--val-tokens", 5000]
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    code, printed, error = run(SCRIPT, *command, "--workers", 1, script=script)
    assert code == -signal.SIGINT
    assert len(shard_files(tmp_path / "out")) == 3
    assert "Traceback" not in error
    assert "the same command continues" in printed
    assert run(*command)[0] == 0
    assert len(open_dataset(tmp_path / "out").train) + len(open_dataset(tmp_path / "out").val) == len(stream(texts))


def test_a_users_session(tmp_path):
    """Make, make again, verify, damage, verify, repair, change an option, plot."""
    source, _ = write_source(tmp_path / "source", 400)
    out = tmp_path / "out"
    command = ["--source", f"{source}/*.parquet", "--out", out, "--shard-tokens", "10k", "--workers", 1]
    code, printed, error = run(*command, "--plot")
    assert (code, error) == (0, "")
    assert "tokenizing in 1 process\n" in printed
    for expected in ("documents            400", "bytes per token", "tokens per second", "p50", "document_lengths.png"):
        assert expected in printed
    assert (out / "document_lengths.png").read_bytes()[:4] == b"\x89PNG"
    code, printed, error = run("verify", out)
    assert (code, error) == (0, "")
    assert printed.count(" ok\n") == len(shard_files(out))
    victim = out / load_manifest(out / MANIFEST_NAME).shards[3].file
    good = victim.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    victim.write_bytes(flipped)
    code, printed, error = run("verify", out)
    assert code == 1
    assert f"the first is {victim}" in error
    assert "checksum differs" in next(line for line in printed.splitlines() if line.startswith(victim.name))
    code, printed, error = run(*command)
    assert code == 0
    assert f"{victim.name} is missing or damaged" in printed
    assert victim.read_bytes() == good
    code, _, error = run(*command, "--max-tokens", "1M")
    assert code == 2
    assert "max_tokens was None, now 1000000" in error
    assert error.count("\n") == 1


def test_verify_of_peers_and_unfinished_directories(tmp_path):
    for name in ("edufineweb_val_000000", "edufineweb_train_000001"):
        np.save(tmp_path / f"{name}.npy", np.array([50256, 1, 2], np.uint16))
    assert run("verify", tmp_path)[0] == 0
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([50256, 1, 50300], np.uint16))
    code, printed, error = run("verify", tmp_path)
    assert code == 1
    assert "holds id 50300" in printed
    assert "edufineweb_train_000001.npy" in error
    code, _, error = run("verify", tmp_path / "nowhere")
    assert (code, error) == (2, f"error: {tmp_path / 'nowhere'} is not a directory\n")


def test_slurm_array_makes_parts_and_merges(tmp_path):
    """The script as Slurm runs it, task by task, the last one first."""
    source, texts = write_source(tmp_path / "source", 400)
    out = tmp_path / "out"
    script = ROOT / "scripts" / "tokenize_slurm.sh"
    copy = tmp_path / "slurm_script"  # sbatch runs a copy
    shutil.copy(script, copy)
    command = [
        "bash",
        str(copy),
        "--source",
        str(source),
        "--out",
        str(out),
        "--shard-tokens",
        "9k",
        "--val-tokens",
        "5k",
    ]
    for task in (2, 1):
        assert not (out / MANIFEST_NAME).exists()
        variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        variables |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}
        done = subprocess.run(command, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    dataset = open_dataset(out)
    tokens = [dataset.val.read(0, len(dataset.val)), dataset.train.read(0, len(dataset.train))]
    assert np.array_equal(np.concatenate(tokens), stream(texts))
    assert any("_p0002_" in path.name for path in dataset.train.paths)
    assert run("verify", out)[0] == 0
    bad = subprocess.run(["bash", str(copy)], env={**ENVIRONMENT, **variables}, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "give --out DIR" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere/*.parquet", "--out", "x"], "no such file, directory or pattern"),
        (["--source", "a.parquet"], "--source needs --out DIR"),
        (["--shard-tokens", "0"], "is not a positive number"),
        (["--shard-tokens", "-5"], "is not a positive number"),
        (["--part", "3/2"], "is not I/N"),
        (["--size", "20B"], "invalid choice"),
        (["merge", "."], "holds no manifest.part"),
        (["--out", "OUT"], "HF_HUB_OFFLINE is set"),
        (["--source", "owner/name", "hf://datasets/a/b", "--out", "OUT"], "no such file, directory or pattern"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, message, tmp_path):
    code, _, error = run(*[str(tmp_path / "out") if a == "OUT" else a for a in arguments])
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_complete():
    code, printed, _ = run("--help")
    assert code == 0
    for flag in ("dataset", "size", "source", "out", "shard-tokens", "val-tokens", "max-tokens", "workers", "format"):
        assert f"--{flag}" in printed
    for flag in ("tokenizer", "part", "plot", "keep-downloads", "revision", "text-column", "split-on"):
        assert f"--{flag}" in printed
    assert "verify DIR" in printed
    assert "show DIR" in printed


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="mounts a small file system")
def test_full_disk(tmp_path):
    """A file system of 1 MB: one line, finished shards kept, and it continues when there is room."""
    source, texts = write_source(tmp_path / "source", 3000)
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    command = ["--source", source, "--out", out, "--shard-tokens", 50000, "--val-tokens", 5000, "--workers", 1]
    try:
        code, _, error = run(*command)
        assert code == 2
        assert error.startswith("error: disk full")
        assert error.count("\n") == 1
        kept = shard_files(out)
        assert kept
        assert not list(out.glob(".*.npy.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20M", str(out)], check=True)
        assert run(*command)[0] == 0
        assert kept.items() <= shard_files(out).items()
        assert len(open_dataset(out).train) + len(open_dataset(out).val) == len(stream(texts))
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize(
    ("folder", "columns", "name"),
    [
        ("fineweb-edu/sample/10BT", {"dump": "CC-MAIN-2013-20", "int_score": 3}, "edufineweb"),
        ("datasets--HuggingFaceFW--fineweb/snapshots/0", {"dump": "CC-MAIN-2013-20"}, "fineweb"),
        ("fineweb", {"dump": "CC-MAIN-2013-20", "int_score": 3}, "corpus"),  # Edu, by its columns
        ("fineweb", {"dump": "my own"}, "corpus"),
        ("fineweb", {}, "corpus"),
        ("mine", {"dump": "CC-MAIN-2013-20"}, "corpus"),
    ],
)
def test_what_is_on_this_machine_is_known_by_path_and_content(tmp_path, folder, columns, name):
    (tmp_path / folder).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"text": "a", **columns}]), tmp_path / folder / "0.parquet")
    assert load_script("data/fineweb.py").name_of(local_source([str(tmp_path / folder)])) == name


def shown(capsys, *arguments: object) -> list[str]:
    assert load_script("data/fineweb.py").main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_show_prints_what_a_shard_holds(tmp_path, capsys):
    tokenizer = gpt2_tokenizer()
    texts = ["First text\x1b[2J", "Second one"]
    ids = [[50256, *tokenizer.encode(text)] for text in texts]
    write_dataset(tmp_path, ids[0] + ids[1], ids[1], tokenizer, shard_tokens=len(ids[0]))
    lines = shown(capsys, tmp_path, "--rows", 1)
    assert "tokens_val_000000.npy: 3 tokens of uint16, 100.0% of the split's 3 in 1 shards" in lines
    assert "  > <|endoftext|>First text\\x1b[2J" in lines
    assert "  tokens: <|endoftext|>|First| text|\\x1b|[|2|J" in lines
    row = next(line for line in lines if line.startswith("  <|endoftext|>First text "))
    assert row.split() == ["<|endoftext|>First", "text", str(ids[0][2]), "'\\x1b'", f"({ids[0][3]})"]
    assert not any("Second" in line for line in shown(capsys, tmp_path, "--shard", "tokens_train_000001.npy"))
    for arguments, message in (
        (["--shard", "x.npy"], "has no shard x.npy"),
        (["--shard", "x.npy", "--step", "1"], "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            shown(capsys, tmp_path, *arguments)
    with pytest.raises(UserError, match="show needs DIR"):
        shown(capsys)


@pytest.mark.parametrize("shuffle", [True, False])
def test_show_prints_the_sequences_of_a_runs_step(tmp_path, capsys, char_data, shuffle):
    """The step that the log calls the third learns from the loader's third batch."""
    config = replace(SMALL, data=replace(SMALL.data, data=char_data, shuffle=shuffle))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    lines = shown(capsys, "--run", tmp_path, "--step", 3, "--rows", 8)
    dataset = open_dataset(char_data)
    blocks = Blocks(dataset.train, 64, 59, seed=config.run.seed if shuffle else None)
    with Loader(blocks, 8, 16, 0, 1, 8, torch.device("cpu")) as loader:
        inputs = loader.next()[0][0]
    tokenizer = dataset.tokenizer()
    pieces = [line.removeprefix("  tokens: ") for line in lines if line.startswith("  tokens: ")]
    wanted = ["|".join(visible(tokenizer.decode([t])) for t in row[:40].tolist()) + " ..." for row in inputs]
    assert pieces == wanted
    assert lines[0].startswith(f"step 3 of {tmp_path}: 8 sequences of 64 tokens, 16 sequences read before, epoch 1, in")
    assert "sequence 8 of 8: " in "\n".join(lines)
