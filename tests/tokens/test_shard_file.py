"""A shard file has its header's bytes and its name only when it is whole."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.tokens.shard_file import ShardWriter, read_header

TOKENS = np.arange(1000, dtype=np.uint16)


def test_expected_count_does_not_change_the_file(tmp_path):
    files = []
    for number, expected in enumerate((5, 0, 10**8)):
        path = tmp_path / f"{number}.npy"
        with ShardWriter(path, "uint16", expected) as writer:
            writer.append(TOKENS[:2])
            writer.append(TOKENS[2:5])
            writer.finish()
        files.append((path.read_bytes(), writer.sha256))
    assert files[0] == files[1] == files[2]
    assert np.load(tmp_path / "2.npy").tolist() == TOKENS[:5].tolist()


def test_abandoned_writer_leaves_nothing(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path / "x.npy", "uint16", 5) as writer:
            writer.append(TOKENS[:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_header_says_what_was_written(tmp_path, suffix, dtype):
    path = tmp_path / f"x{suffix}"
    with ShardWriter(path, dtype, 7) as writer:
        writer.append(TOKENS[:7])
        assert writer.finish()
    header = read_header(path)
    assert (header.tokens, header.dtype.name) == (7, dtype)
    assert np.frombuffer(path.read_bytes()[header.offset :], header.dtype).tolist() == TOKENS[:7].tolist()
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="its header promises"):
        read_header(path)


def test_a_shard_with_another_checksum_does_not_take_the_name(tmp_path):
    path = tmp_path / "x.npy"
    for tokens, expected, named in ((TOKENS[:5], None, True), (TOKENS[5:10], "0" * 64, False)):
        with ShardWriter(path, "uint16", 5) as writer:
            writer.append(tokens)
            assert writer.finish(expected) is named
    assert np.load(path).tolist() == TOKENS[:5].tolist()
    assert list(tmp_path.iterdir()) == [path]


def test_a_bin_shard_cannot_hold_more_than_its_header_can_count(tmp_path):
    with pytest.raises(UserError, match="fewer than 2\\^31 tokens"):
        ShardWriter(tmp_path / "x.bin", "uint16", 2**31)
