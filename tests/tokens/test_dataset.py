"""Shards in peers' layouts, streams over them, and every way a directory can be wrong."""

from __future__ import annotations

import dataclasses
import pickle
import resource
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.dataset import TokenStream, open_dataset
from gpt2.tokens.manifest import MANIFEST_NAME, load_manifest, save_manifest
from gpt2.tokens.shard_file import read_header
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)


def write_bin(path, tokens, magic=20240520, version=1, dtype="H"):
    """llm.c's layout by the reference's own words: 256 int32, then the ids, all little-endian."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{dtype}", *tokens))


def peers_directory(directory, kind):
    directory.mkdir(exist_ok=True)
    parts = {"edufineweb_val_000000": TOKENS[:100], "edufineweb_train_000001": TOKENS[100:400]}
    parts["edufineweb_train_000002"] = TOKENS[400:]
    for name, tokens in parts.items():
        if kind == "npy":
            np.save(directory / f"{name}.npy", tokens)
        else:
            write_bin(directory / f"{name}.bin", tokens.tolist())
    return directory


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_peers_directory_loads_as_it_is(tmp_path, kind):
    dataset = open_dataset(peers_directory(tmp_path, kind))
    assert (len(dataset.train), len(dataset.val)) == (900, 100)
    assert dataset.train.read(0, 900).tolist() == TOKENS[100:].tolist()
    assert dataset.train.read(250, 350).tolist() == TOKENS[350:450].tolist()
    assert dataset.train.read(5, 5).size == 0
    assert dataset.train.read(0, 1).dtype == np.uint16
    assert dataset.train.locate(299) == (tmp_path / f"edufineweb_train_000001.{kind}", 299)
    assert dataset.train.locate(300) == (tmp_path / f"edufineweb_train_000002.{kind}", 0)
    assert (dataset.manifest, dataset.vocab_size, dataset.tokenizer().name) == (None, None, "gpt2")


@pytest.mark.parametrize(
    "name", ["tiny_shakespeare_train.bin", "fineweb_train_000001.bin", "train.bin", "my-train-1.bin"]
)
def test_split_is_read_from_names(tmp_path, name):
    write_bin(tmp_path / name, [1, 2, 3])
    write_bin(tmp_path / name.replace("train", "val"), [4])
    (tmp_path / "readme.txt").write_text("not a shard")
    dataset = open_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.val)) == (3, 1)


def test_llama3_shards_are_uint32_and_of_no_tokenizer_of_ours(tmp_path):
    for split in ("train", "val"):
        write_bin(tmp_path / f"x_{split}_000000.bin", [128000, 7], 20240801, 7, "I")
    dataset = open_dataset(tmp_path)
    assert dataset.train.read(0, 2).tolist() == [128000, 7]
    with pytest.raises(UserError, match="not GPT-2's"):
        dataset.tokenizer()


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_written_files_are_the_peers_to_the_byte(tmp_path, suffix):
    dataset = write_dataset(
        tmp_path / "ours", TOKENS[100:], TOKENS[:100], gpt2_tokenizer(), shard_tokens=300, suffix=suffix
    )
    assert len(dataset.train.paths) == 3
    for path, tokens in zip(dataset.train.paths, (TOKENS[100:400], TOKENS[400:700], TOKENS[700:]), strict=True):
        theirs = tmp_path / f"theirs{suffix}"
        np.save(theirs, tokens) if suffix == ".npy" else write_bin(theirs, tokens.tolist())
        assert path.read_bytes() == theirs.read_bytes()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 320), st.integers(0, 320))
def test_ranges_over_any_shards(tmp_path_factory, sizes, a, b):
    directory = tmp_path_factory.mktemp("stream")
    paths, everything = [], []
    for number, size in enumerate(sizes):
        paths.append(directory / f"{number}.npy")
        everything += TOKENS[number * 40 : number * 40 + size].tolist()
        np.save(paths[-1], TOKENS[number * 40 : number * 40 + size])
    stream = TokenStream(paths, [read_header(p) for p in paths])
    start, stop = min(a, b, len(stream)), min(max(a, b), len(stream))
    assert len(stream) == len(everything)
    assert stream.read(start, stop).tolist() == everything[start:stop]


def test_range_outside_the_stream(tmp_path):
    stream = open_dataset(peers_directory(tmp_path, "npy")).train
    for start, stop in ((-1, 3), (0, 901), (5, 4)):
        with pytest.raises(IndexError):
            stream.read(start, stop)
    for index in (-1, 900):
        with pytest.raises(IndexError):
            stream.locate(index)


def open_shards(directory):
    """How many files below a directory this process has open."""
    return sum(Path(link).resolve().is_relative_to(directory) for link in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted by Linux's /proc")
def test_more_shards_than_a_process_may_have_open_threads_and_pickles(tmp_path):
    dataset = write_dataset(tmp_path, TOKENS, TOKENS[:10], gpt2_tokenizer(), shard_tokens=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        streams = [pickle.loads(pickle.dumps(dataset)).train]
        with ThreadPoolExecutor(8) as pool:
            starts = [(i * 37) % 900 for i in range(400)]
            for start, read in zip(starts, pool.map(lambda i: streams[0].read(i, i + 50), starts), strict=True):
                assert (read == TOKENS[start : start + 50]).all()
        assert open_shards(tmp_path) == 256 // 4
        streams.clear()
        assert open_shards(tmp_path) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_shard_that_shrinks_while_in_use(tmp_path):
    dataset = open_dataset(peers_directory(tmp_path, "npy"))
    path = tmp_path / "edufineweb_train_000002.npy"
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"edufineweb_train_000002.npy.*it ends early"):
        dataset.train.read(0, 900)


def test_fingerprint_is_of_the_content_not_the_place(tmp_path):
    first = write_dataset(tmp_path / "a", TOKENS, TOKENS[:10], gpt2_tokenizer())
    same = write_dataset(tmp_path / "b", TOKENS, TOKENS[:10], gpt2_tokenizer())
    other = write_dataset(tmp_path / "c", TOKENS[::-1], TOKENS[:10], gpt2_tokenizer())
    assert first.fingerprint == same.fingerprint != other.fingerprint
    foreign = open_dataset(peers_directory(tmp_path / "d", "npy"))
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert open_dataset(tmp_path / "e").fingerprint == foreign.fingerprint
    np.save(tmp_path / "e" / "edufineweb_train_000003.npy", TOKENS)
    assert open_dataset(tmp_path / "e").fingerprint != foreign.fingerprint


def test_manifest_of_characters_brings_its_tokenizer(tmp_path):
    tokenizer = CharTokenizer(" ab\ufffdé")  # half a character, which UTF-8 cannot hold, is encoded as U+FFFD
    dataset = write_dataset(tmp_path, tokenizer.encode("ab ba é"), tokenizer.encode("b\ud800"), tokenizer)
    assert dataset.vocab_size == 5
    assert dataset.tokenizer().decode(dataset.train.read(0, 7)) == "ab ba é"


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 2)


def test_wrong_directories_are_told_in_one_line(tmp_path):
    def message(directory):
        with pytest.raises(UserError) as error:
            open_dataset(directory)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "data/fineweb.py --source" in message(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no shard" in message(empty)
    for split, other in (("train", "val"), ("val", "train")):
        directory = tmp_path / f"only-{split}"
        directory.mkdir()
        np.save(directory / f"x_{split}_000000.npy", TOKENS)
        assert f"no {other} shard" in message(directory)
    for kind in ("npy", "bin"):
        directory = peers_directory(tmp_path / f"short-{kind}", kind)
        truncate(directory / f"edufineweb_train_000001.{kind}")
        assert "truncated or was altered" in message(directory)
    directory = peers_directory(tmp_path / "headerless", "bin")
    (directory / "edufineweb_train_000001.bin").write_bytes(TOKENS.tobytes())
    assert "expected llm.c's 20240520, 1" in message(directory)
    directory = peers_directory(tmp_path / "not-npy", "npy")
    (directory / "edufineweb_train_000001.npy").write_bytes(b"<html>")
    assert "is not a NumPy file" in message(directory)
    for name, array in (("float", np.ones(3)), ("2d", np.ones((3, 3), np.uint16)), ("signed", np.ones(3, np.int16))):
        directory = peers_directory(tmp_path / name, "npy")
        np.save(directory / "edufineweb_train_000001.npy", array)
        assert "expected one dimension of uint16 or uint32" in message(directory)
    directory = peers_directory(tmp_path / "mixed", "npy")
    np.save(directory / "edufineweb_train_000001.npy", TOKENS.astype(np.uint32))
    assert "mixes uint16 and uint32" in message(directory)
    peers_directory(peers_directory(tmp_path / "both", "npy"), "bin")
    assert "mixes .npy and .bin" in message(tmp_path / "both")
    directory = tmp_path / "nothing-in-it"
    directory.mkdir()
    np.save(directory / "x_train_000001.npy", TOKENS[:0])
    np.save(directory / "x_val_000000.npy", TOKENS)
    assert "hold no tokens" in message(directory)


def test_wrong_manifests_are_told_in_one_line(tmp_path):
    def damaged(name, change):
        directory = tmp_path / name
        write_dataset(directory, TOKENS, TOKENS[:10], gpt2_tokenizer())
        change(directory)
        with pytest.raises(UserError) as error:
            open_dataset(directory)
        assert "\n" not in str(error.value)
        return str(error.value)

    def unfinished(directory):
        manifest = load_manifest(directory / MANIFEST_NAME)
        save_manifest(directory / MANIFEST_NAME, dataclasses.replace(manifest, complete=False))

    def shorter(directory):
        np.save(directory / "tokens_train_000001.npy", TOKENS[:-1])

    assert "is unfinished" in damaged("a", unfinished)
    assert "cannot read shard" in damaged("b", lambda d: (d / "tokens_train_000001.npy").unlink())
    assert "holds 999 tokens, the manifest says 1,000" in damaged("c", shorter)
    assert "is not JSON" in damaged("d", lambda d: (d / MANIFEST_NAME).write_text("{"))
    assert "is not a manifest" in damaged("e", lambda d: (d / MANIFEST_NAME).write_text('{"format": "gpt2-shards"}'))
    assert "is not a manifest" in damaged("f", lambda d: (d / MANIFEST_NAME).write_text("[]"))
    later = '{"format": "gpt2-shards", "version": 2}'
    assert "update it" in damaged("g", lambda d: (d / MANIFEST_NAME).write_text(later))
    assert "merge" in damaged("h", lambda d: (d / MANIFEST_NAME).rename(d / "manifest.part-0001-of-0002.json"))


def test_a_hundred_large_shards_open_at_once(tmp_path):
    """100 shards of 100 M tokens each, as holes: opening must not read them."""
    for number in range(100):
        split = "train" if number else "val"
        path = tmp_path / f"edufineweb_{split}_{number:06d}.npy"
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u2", "fortran_order": False, "shape": (100_000_000,)}
            )
            file.truncate(file.tell() + 200_000_000)
    start = time.process_time()
    dataset = open_dataset(tmp_path)
    assert time.process_time() - start < 1.0  # of the processor: another program may have it meanwhile
    assert len(dataset.train) == 9_900_000_000
    assert dataset.train.read(9_899_999_999, 9_900_000_000).tolist() == [0]


@pytest.mark.parametrize(
    ("directory", "command"),
    [
        ("data/fineweb_edu_10B", "`python data/fineweb.py`"),
        ("data/fineweb_100B", "`python data/fineweb.py --dataset fineweb --size 100B`"),
        ("data/pydocs", "`python data/pydocs.py`"),
        ("data/shakespeare_char", "`python data/shakespeare.py --tokenizer char`"),
        ("big/shakespeare", "`python data/shakespeare.py --out big/shakespeare`"),
        ("mine", "`python data/fineweb.py --source FILES --out mine`"),
    ],
)
def test_a_missing_data_set_names_the_command_that_makes_it(tmp_path, monkeypatch, directory, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{directory} does not exist; ") as error:
        open_dataset(directory)
    assert command in str(error.value)
