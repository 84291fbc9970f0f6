"""The order of the data: every block once an epoch, the same for every split, after every restart."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.dataset import TokenStream, open_dataset
from gpt2.tokens.loader import READS_AT_ONCE, Blocks, Loader, on_host, permute, to_device
from gpt2.tokens.tokenizer import CharTokenizer

CPU = torch.device("cpu")
VOCABULARY = CharTokenizer("".join(map(chr, range(1000, 5000))))


def stream_in_shards(directory: Path, lengths: list[int]) -> TokenStream:
    """A stream whose every token is its own place in it, in .npy files of the given lengths."""
    start = 0
    for number, length in enumerate(lengths):
        np.save(directory / f"x_train_{number:06d}.npy", np.arange(start, start + length, dtype=np.uint16))
        start += length
    np.save(directory / "x_val_000000.npy", np.arange(100, dtype=np.uint16))
    return open_dataset(directory).train


@settings(max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


def test_permute_needs_no_table_and_depends_on_all_of_its_seed() -> None:
    size = 10**15
    places = np.array([0, 1, size - 1])
    first = permute(places, size, 5)
    assert len(set(first.tolist())) == 3
    assert ((first >= 0) & (first < size)).all()
    for seed in (6, 5 + (1 << 32), 5 + (1 << 60)):
        assert not np.array_equal(first, permute(places, size, seed))


def test_permute_looks_random() -> None:
    # Of a random permutation the mean distance between neighbours is a third of the range, and about one place stays.
    order = permute(np.arange(10_000), 10_000, 1337)
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.01
    assert (order == np.arange(10_000)).sum() < 6
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04


@pytest.mark.parametrize("lengths", [[1237], [500, 131, 700], [70 + (n * 37) % 61 for n in range(17)]])
@pytest.mark.parametrize("seed", [None, 3])
def test_each_block_once_an_epoch_over_shards_with_uneven_ends(
    tmp_path: Path, lengths: list[int], seed: int | None
) -> None:
    stream = stream_in_shards(tmp_path, lengths)
    blocks = Blocks(stream, block_size=16, vocab_size=50257, seed=seed)
    assert blocks.count == (sum(lengths) - 1) // 16
    assert blocks.leftover == sum(lengths) - 1 - 16 * blocks.count < 16
    sequences = 5  # a step; the number of blocks is no multiple of it
    orders = []
    for epoch in range(3):
        seen = blocks.read(blocks.order(np.arange(epoch * blocks.count, (epoch + 1) * blocks.count)))
        # Every token is its own place: each row is consecutive, across the ends of shards too.
        assert (np.diff(seen.astype(int), axis=1) == 1).all()
        targets = np.sort(seen[:, 1:].reshape(-1))
        assert np.array_equal(targets, np.arange(1, 16 * blocks.count + 1))
        orders.append(seen[:, 0].tolist())
    assert (orders[0] == orders[1]) == (seed is None)
    # Steps that span an epoch's end take the rest of one and the start of the next.
    steps = [blocks.order(np.arange(s, s + sequences)) for s in range(0, 2 * blocks.count, sequences)]
    firsts = np.concatenate(steps)[: 2 * blocks.count] * 16
    assert firsts.tolist() == orders[0] + orders[1]


def read_steps(blocks: Blocks, world: int, micro: int, start: int, steps: int) -> list[list[Any]]:
    """First tokens of each step's rows by micro-step, over all ranks."""
    result: list[list[Any]] = [[] for _ in range(steps)]
    loaders = [Loader(blocks, 8, start, rank, world, micro, CPU) for rank in range(world)]
    for loader in loaders:
        with loader:
            for step in range(steps):
                for tokens, targets in loader.next():
                    assert tokens.shape == targets.shape == (micro, blocks.block_size)
                    assert torch.equal(tokens[:, 1:], targets[:, :-1])
                    result[step] += tokens[:, 0].tolist()
    return result


def test_every_split_and_every_restart_sees_the_same_steps(tmp_path: Path) -> None:
    blocks = Blocks(stream_in_shards(tmp_path, [300, 400]), block_size=16, vocab_size=50257, seed=1)
    whole = read_steps(blocks, world=1, micro=8, start=0, steps=12)  # 96 sequences of 43 an epoch
    for world, micro in [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)]:
        split = read_steps(blocks, world, micro, 0, 12)
        assert [sorted(step) for step in split] == [sorted(step) for step in whole]
    assert read_steps(blocks, 1, 8, start=5 * 8, steps=7) == whole[5:]
    # Micro-steps are in the step's order as well: rank 0's first, rank 1's first, rank 0's second, …
    two = [Loader(blocks, 8, 0, rank, 2, 2, CPU) for rank in (0, 1)]
    with two[0], two[1]:
        firsts = [loader.next() for loader in two]
    order = [firsts[rank][number][0][:, 0].tolist() for number in (0, 1) for rank in (0, 1)]
    assert [first for part in order for first in part] == whole[0]


def test_an_id_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    stream = stream_in_shards(tmp_path, [100, 100])
    blocks = Blocks(stream, block_size=9, vocab_size=150)
    assert blocks.read(np.array([15])).max() == 144
    with pytest.raises(UserError, match=r"x_train_000001.npy holds token id 153 at position 53, .*150"):
        blocks.read(np.array([3, 16]))
    with Loader(blocks, 2, 14, 0, 1, 1, CPU) as loader:
        loader.next()
        assert loader.failure is None
        for _ in range(2):  # a process that has no data takes part in the step all the same
            blank = loader.next()
            assert [(a.shape, b.shape) for a, b in blank] == [((1, 9), (1, 9))] * 2
            assert not any(tokens.any() for pair in blank for tokens in pair)
        with pytest.raises(UserError, match="token id 162"):
            loader.raise_failure()


@pytest.mark.parametrize("sizes", [[300, 64, 200, 65, 129, 128], [65]])
def test_dropped_tails_are_the_order_of_a_loop_over_shards(tmp_path: Path, sizes: list[int]) -> None:
    """build-nanogpt's, llm.c's and modded-nanogpt's: next shard where fewer than a step and one token are left."""
    stream, step, length = stream_in_shards(tmp_path, sizes), 64, 16
    literal, first = [], 0
    for size in sizes:
        position = 0
        while size - position >= step + 1:
            literal += [first + position + row * length for row in range(step // length)]
            position += step
        first += size
    blocks = Blocks(stream, block_size=length, vocab_size=50257, step_tokens=step)
    assert blocks.count == len(literal)
    assert blocks.leftover == sum(sizes) - 1 - len(literal) * length
    numbers = blocks.order(np.arange(2 * len(literal)))  # the second epoch repeats the first
    assert blocks.starts(numbers).tolist() == literal * 2
    everything = stream.read(0, len(stream))
    for row, start in zip(blocks.read(numbers), literal * 2, strict=True):
        np.testing.assert_array_equal(row, everything[start : start + length + 1])


def test_no_shard_long_enough_for_a_step(tmp_path: Path) -> None:
    stream = stream_in_shards(tmp_path, [64, 64])
    with pytest.raises(
        UserError, match=r"no shard of 65 tokens, one step and the last target; .*--no-drop-shard-tails"
    ):
        Blocks(stream, 16, 50257, step_tokens=64)


def test_the_reads_of_a_step_are_issued_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(stream_in_shards(tmp_path, [400] * 3), block_size=16, vocab_size=50257, seed=0)
    numbers = blocks.order(np.arange(2 * READS_AT_ONCE))
    expected = blocks.read(numbers)
    all_there, read = threading.Barrier(READS_AT_ONCE, timeout=100), blocks.stream.read

    def wait_for_the_others(start: int, stop: int) -> np.ndarray:
        all_there.wait()  # one after the other, they would wait for ever
        return read(start, stop)

    monkeypatch.setattr(blocks.stream, "read", wait_for_the_others)
    np.testing.assert_array_equal(blocks.read(numbers), expected)
    assert blocks.read(numbers[:0]).shape == (0, 17)


def test_steps_that_wait_for_their_data_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(stream_in_shards(tmp_path, [400]), block_size=16, vocab_size=50257)
    now, waits = [0.0], iter([5.0, 4.0, 0.5, 2.9, 0.0])
    monkeypatch.setattr("gpt2.tokens.loader.time.monotonic", lambda: now[0])
    loader = Loader(blocks, 8, 0, 0, 1, 8, CPU)

    def answer_late() -> torch.Tensor:
        now[0] += next(waits)
        return torch.zeros(8, 17, dtype=torch.int16)

    monkeypatch.setattr(loader._queue, "get", answer_late)
    seen = []
    for training in (10.0, 15.0, 29.0, 28.0, 1.0):  # seconds between two steps
        loader.next()
        now[0] += training
        seen.append(loader.waiting)
    # Of 34 s 9 were waited, which the third step finds; of the next 60, some 6 %.
    assert seen == [False, False, True, False, False]


def test_leaving_a_loader_that_is_ahead(tmp_path: Path) -> None:
    blocks = Blocks(stream_in_shards(tmp_path, [400]), block_size=16, vocab_size=50257)
    with Loader(blocks, 8, 0, 0, 1, 8, CPU) as loader:
        loader.next()
    assert not loader._thread.is_alive()


def test_too_short_a_split(tmp_path: Path) -> None:
    stream = stream_in_shards(tmp_path, [64])
    assert Blocks(stream, 63, 50257).count == 1
    with pytest.raises(UserError, match=r"64 tokens, but one block needs block_size . 1 = 65"):
        Blocks(stream, 64, 50257)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_survive_the_way_to_the_device(dtype: type[np.unsignedinteger[Any]]) -> None:
    ids = np.array([[0, 1, 32767, 32768, 50256, 65535]], dtype=dtype)
    sent = on_host(ids, CPU)
    assert sent.element_size() == ids.itemsize
    assert to_device(sent, CPU).tolist() == ids.tolist()
    assert to_device(sent, CPU).dtype == torch.int64


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    def peak(tokens: int) -> int:
        ids = np.arange(tokens) % 4000
        stream = write_dataset(tmp_path / str(tokens), ids, ids[:100], VOCABULARY, shard_tokens=50_000).train
        tracemalloc.start()
        try:
            blocks = Blocks(stream, 16, 4000, seed=1)
            for start in range(0, 256, 32):
                blocks.read(blocks.order(np.arange(start, start + 32)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(5_000)  # what only the first time costs
    few, many = peak(10_000), peak(400_000)  # 25,000 blocks, whose numbers alone would take 200 kB
    assert many < few + 50_000
