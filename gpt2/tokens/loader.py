"""Which tokens each step sees: a pure function of the seed and a global sequence index.

The train split is cut into blocks of `block_size + 1` tokens that overlap by one, so that every token but the first is
once a target. Sequence g of a run (g counts from the run's start) is block g mod n of epoch g div n, in that
epoch's seeded order. A step takes the next `sequences_per_step` of them, cut into processes and micro-batches, so the
same step sees the same tokens for any number of processes, micro-batch size and accumulation, and after any restart.
The loader's whole state is g.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.tokens.dataset import TokenStream

_ROUNDS = 6  # of the Feistel network; 4 suffice for a pseudo-random permutation (Luby & Rackoff 1988)
PREFETCH_STEPS = 8
"""Steps made ahead of use, so that a storage that stalls now and then holds up nothing."""
READS_AT_ONCE = 32
"""Storage across a network answers after milliseconds, however little is asked for, but answers many at a time."""
WATCH_SECONDS = 30.0
"""Over so long a time it is told whether training waits for its data,"""
WAITING = 0.1
"""which it does if that is more than this part of the time."""


def permute(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at some indices without a table of all.

    A Feistel network permutes the next power of four; what falls outside the range is permuted again until it falls
    inside (cycle walking: Black & Rogaway 2002).

    Args:
        index: integers in [0, size), any shape.
        size: how many numbers the range has.
        seed: chooses the permutation.

    Returns:
        Of index's shape, int64; distinct for distinct indices.
    """
    half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    low = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> half_bits, out[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        out[outside] = (left << half_bits) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread every input bit over 64 output bits: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blocks:
    """A stream of tokens cut into overlapping blocks, with an order for every epoch.

    Args:
        stream: the tokens.
        block_size: targets per block, so that it is block_size + 1 tokens long.
        vocab_size: every id must be below it.
        step_tokens: None: blocks follow one another through all shards. A number: a shard holds as many whole steps of
            so many tokens as leave one more token to be the last target, and its tail is dropped; without a seed, this
            is the order of build-nanogpt, llm.c and modded-nanogpt.
        seed: draws the order; None: the stream's own order.
        needed: a stream shorter than one block is refused; otherwise it has none.

    Raises:
        UserError: the stream is shorter than one block.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        vocab_size: int,
        seed: int | None = None,
        step_tokens: int | None = None,
        needed: bool = True,
    ):
        self.stream, self.block_size, self.vocab_size, self.seed = stream, block_size, vocab_size, seed
        self._threads = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read")
        # Runs of blocks that follow one another: the token each begins with, and the number of its first block.
        runs = np.array(stream.shard_starts if step_tokens is not None else (0, len(stream)))
        steps = 1 if step_tokens is None else step_tokens // block_size  # blocks that are kept or dropped together
        counts = (np.diff(runs) - 1) // (steps * block_size) * steps
        self._run_starts, self._run_blocks = runs[:-1], np.cumsum(counts) - counts
        self.count = int(counts.sum())
        if self.count < 1 and step_tokens is not None:
            raise UserError(
                f"{stream.paths[0].parent} has no shard of {step_tokens + 1:,} tokens, one step and the last target; "
                "use larger shards, a smaller --total-batch-tokens or --no-drop-shard-tails"
            )
        if self.count < 1 and needed:
            where = stream.paths[0].parent if stream.paths else "the split"
            raise UserError(
                f"{where} holds a split of {len(stream):,} tokens, but one block needs block_size + 1 = "
                f"{block_size + 1:,}; add data or make --block-size smaller"
            )

    @property
    def leftover(self) -> int:
        """Tokens that fill no block, and are a target in no epoch."""
        return len(self.stream) - 1 - self.count * self.block_size

    def starts(self, blocks: np.ndarray) -> np.ndarray:
        """The token of the stream that each block begins with, (n,) to (n,)."""
        runs = np.searchsorted(self._run_blocks, blocks, side="right") - 1
        return self._run_starts[runs] + (blocks - self._run_blocks[runs]) * self.block_size

    def order(self, sequences: np.ndarray) -> np.ndarray:
        """Blocks that the given sequences of a run are, (n,) to (n,)."""
        epochs, places = np.divmod(sequences, self.count)
        if self.seed is None:
            return places
        blocks = np.empty_like(places)
        for epoch in np.unique(epochs):  # one, or two where a batch spans an epoch's end
            this = epochs == epoch
            blocks[this] = permute(places[this], self.count, seed=(self.seed << 32) + int(epoch))
        return blocks

    def read(self, blocks: np.ndarray) -> np.ndarray:
        """Tokens of blocks (n,) as (n, block_size + 1), in the shards' type; many are read at the same time.

        Raises:
            UserError: an id the model has no embedding for.
        """
        out = np.empty((len(blocks), self.block_size + 1), dtype=self.stream.dtype)
        starts = self.starts(blocks).tolist()

        def read(first: int) -> None:
            for row in range(first, len(starts), READS_AT_ONCE):
                out[row] = self.stream.read(starts[row], starts[row] + self.block_size + 1)

        for done in [self._threads.submit(read, first) for first in range(min(READS_AT_ONCE, len(starts)))]:
            done.result()
        if out.size and int(out.max()) >= self.vocab_size:
            worst, column = divmod(int(out.argmax()), out.shape[1])
            path, offset = self.stream.locate(starts[worst] + column)
            raise UserError(
                f"{path} holds token id {int(out.max())} at position {offset:,}, but the model's vocabulary has "
                f"{self.vocab_size:,}; the shard is damaged or made with another tokenizer"
            )
        return out


def on_host(tokens: np.ndarray, device: torch.device) -> Tensor:
    """Token ids (n, T) as a tensor of the 2 or 4 bytes they have on disk, in memory that `device` copies fast from."""
    signed = torch.from_numpy(tokens.view(np.int16 if tokens.itemsize == 2 else np.int32))
    return signed.pin_memory() if device.type == "cuda" else signed


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Token ids of `on_host` on the device, as int64."""
    ids = tokens.to(device, non_blocking=True).long()
    return ids & 0xFFFF if tokens.dtype == torch.int16 else ids  # the sign bit is part of a uint16's number


class Loader:
    """This process's part of every step, cut in a background thread ahead of use.

    Args:
        blocks: the train split.
        sequences_per_step: over all processes.
        start: index of the sequence that the first step begins with.
        rank: this process's, of `world_size`.
        micro_batch_size: sequences a forward pass; sequences_per_step is a multiple of it times world_size.
        device: the tokens go to.
    """

    def __init__(
        self,
        blocks: Blocks,
        sequences_per_step: int,
        start: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        device: torch.device,
    ):
        self._blocks, self._device = blocks, device
        self._micro_batch_size, self._sequences_per_step = micro_batch_size, sequences_per_step
        # Micro-step k of rank r takes rows [(k W + r) B, (k W + r + 1) B) of the step's sequences.
        rows = np.arange(sequences_per_step).reshape(-1, world_size, micro_batch_size)
        self._rows = rows[:, rank].reshape(-1)
        self.failure: UserError | None = None
        """Why this process has no data; from then on `next` returns made-up batches."""
        self.waiting = False
        """Whether steps have waited for their data for more than WAITING of the last WATCH_SECONDS."""
        self._watched_since, self._waited = time.monotonic(), 0.0
        self._queue: queue.Queue[Tensor | Exception] = queue.Queue(maxsize=PREFETCH_STEPS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(start,), name="loader", daemon=True)

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def next(self) -> list[tuple[Tensor, Tensor]]:
        """The next step's micro-batches: inputs (B, T) and targets (B, T), int64, on the device.

        A process that cannot read its data must still take part in the step, or the others would wait for it: it gets
        batches of zeros, and `failure` says why.
        """
        if self.failure is None:
            began = time.monotonic()
            item = self._queue.get()
            self._watch(began, time.monotonic())
            if isinstance(item, UserError):
                self.failure = item
            elif isinstance(item, Exception):
                raise item
            else:
                return self._cut(to_device(item, self._device))
        shape = len(self._rows), self._blocks.block_size + 1
        return self._cut(torch.zeros(shape, dtype=torch.int64, device=self._device))

    @property
    def failed(self) -> bool:
        """Whether this process has no data."""
        return self.failure is not None

    def _watch(self, began: float, ended: float) -> None:
        """Count a wait, and judge those of the last WATCH_SECONDS."""
        self._waited += ended - began
        if (watched := ended - self._watched_since) >= WATCH_SECONDS:
            self.waiting = self._waited > WAITING * watched
            self._watched_since, self._waited = ended, 0.0

    def raise_failure(self) -> None:
        """Raise why this process has no data, if it has none."""
        if self.failure is not None:
            raise self.failure

    def _cut(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(rows[:, :-1], rows[:, 1:]) for rows in tokens.split(self._micro_batch_size)]

    def _produce(self, first: int) -> None:
        while not self._stop.is_set():
            item: Tensor | Exception
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a thread's own: pinning would wake GPU 0 in every process
                item = on_host(self._blocks.read(self._blocks.order(first + self._rows)), self._device)
            except Exception as error:  # raised again where the step asks for its data
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            first += self._sequences_per_step
