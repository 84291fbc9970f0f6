"""Tokenize a source with many processes into the shards one process would write.

The unit of work is a parquet row group, or a slice of another file. A worker reads its unit, tokenizes it and hands
back one buffer of ids; this process never touches text: it puts the buffers in order and writes them. At most
`_WINDOW` units a worker are under way, which bounds memory whatever the speed of the disk.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2.errors import UserError
from gpt2.prepare.documents import read_unit
from gpt2.prepare.download import Fetcher
from gpt2.prepare.shard_builder import ShardBuilder, UnitTokens
from gpt2.prepare.sources import FileProblem, Source
from gpt2.tokens.manifest import SourcePosition
from gpt2.tokens.tokenizer import GPT2Tokenizer, tokenizer_from_dict

_WINDOW = 4


class Part(NamedTuple):
    """Part `number` (from 1) `of` so many parts of a source: units whose middle byte is in that part of its bytes."""

    number: int = 1
    of: int = 1


class Unit(NamedTuple):
    """A piece of work: where it is in the source, and on this machine."""

    place: SourcePosition
    path: Path
    kind: str
    last: bool  # of its file
    done: float  # fraction of the part's source that ends with it
    documents: int | None  # in it, as its file's own index counts them; None where there is no index
    column: str  # of texts


def files_of_part(source: Source, part: Part) -> list[int]:
    """Numbers of the files that may have a unit in `part`; those of validation are in the first."""
    numbers, total = list(range(source.validation if part.number == 1 else 0)), source.begins[-1]
    for number, (begin, end) in enumerate(itertools.pairwise(source.begins)):
        # [begin, end) of the source's bytes meets [(number - 1) / of, number / of) of them
        if begin < end and begin * part.of < total * part.number and end * part.of > total * (part.number - 1):
            numbers.append(number)
    return numbers


def units_of_file(source: Source, number: int, units: int, part: Part) -> range:
    """Units of file `number`, which has `units`, that belong to `part`. A plain text belongs to one part whole."""
    if number < source.validation:
        return range(units if part.number == 1 else 0)
    begin, size, total = source.begins[number], source.files[number].size, source.begins[-1]
    pieces = 1 if source.files[number].kind == "text" else units
    # Piece p of the file has its middle at begin + size·(2p + 1) / (2·pieces); exact in integers.
    owners = [(begin * 2 * pieces + size * (2 * p + 1)) * part.of // (2 * pieces * total) + 1 for p in range(pieces)]
    mine = [p for p, owner in enumerate(owners) if owner == part.number]
    if not mine:
        return range(0)
    return range(units) if pieces < units else range(mine[0], mine[-1] + 1)


class Units:
    """The units of a part of a source from `start` on, in order, as their files arrive. Iterable once."""

    def __init__(self, source: Source, part: Part, fetcher: Fetcher, start: SourcePosition) -> None:
        self._fetcher = fetcher
        self._source = source
        self._part = part
        self._start = start
        self._files = deque(n for n in files_of_part(source, part) if n >= start.file)
        self._ready: deque[Unit] = deque()
        fetcher.start(self._files)

    def available(self) -> bool:
        """Whether `next` returns at once: a unit, or that there is none left."""
        return bool(self._ready) or not self._files or self._fetcher.ready(self._files[0])

    def next(self) -> Unit | None:
        """The next unit, when its file is there; None after the last."""
        while not self._ready and self._files:
            number = self._files[0]
            try:
                path, contents = self._fetcher.get(number)
            except UserError as error:
                raise FileProblem(number, str(error)) from error
            self._files.popleft()
            self._fetcher.start(self._files)
            count = contents.units
            units = units_of_file(self._source, number, count, self._part)
            if number == self._start.file:
                units = range(max(units.start, self._start.unit), max(units.stop, self._start.unit))
            file, column = self._source.files[number], self._source.column
            for unit in units:
                skip = self._start.skip if (number, unit) == self._start[:2] else 0
                begin, end = self._source.begins[number : number + 2]
                done = (begin + (end - begin) * (unit + 1) / count) / max(self._source.begins[-1], 1)
                done = min(max(done * self._part.of - (self._part.number - 1), 0.0), 1.0)
                documents = contents.documents[unit] if contents.documents is not None else None
                place = SourcePosition(number, unit, skip)
                self._ready.append(Unit(place, path, file.kind, unit == units.stop - 1, done, documents, column))
            if not units:
                self._fetcher.release(number)
        return self._ready.popleft() if self._ready else None


class Workers:
    """A pool of processes that read and tokenize units. Use in a `with` block.

    Args:
        count: processes.
        tokenizer: described as in a manifest; None to collect characters only.
    """

    def __init__(self, count: int, tokenizer: dict[str, Any] | None) -> None:
        self.count = count
        self._pool = ProcessPoolExecutor(
            max_workers=count,
            # Not forked: this process has threads, and workers start with nothing of its memory.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer,),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)

    def run(self, units: Units, action: Callable[[Path, str, int, str], Any]) -> Iterator[tuple[Unit, Any]]:
        """Results of `action(path, kind, unit, column)` in the order of `units`. UserError for a file that is wrong."""
        pending: deque[tuple[Unit, Future[Any]]] = deque()
        more = True
        while more or pending:
            while more and len(pending) < _WINDOW * self.count and (units.available() or not pending):
                unit = units.next()
                if unit is None:
                    more = False
                else:
                    pending.append((unit, self._submit(action, unit)))
            if pending:
                unit, future = pending.popleft()
                yield unit, self._result(unit, future)

    def _submit(self, action: Callable[[Path, str, int, str], Any], unit: Unit) -> Future[Any]:
        try:
            return self._pool.submit(action, unit.path, unit.kind, unit.place.unit, unit.column)
        except BrokenProcessPool as error:
            raise _worker_died() from error

    def _result(self, unit: Unit, future: Future[Any]) -> Any:
        try:
            return future.result()
        except UserError as error:
            raise FileProblem(unit.place.file, str(error)) from error
        except OSError as error:  # workers only read
            raise FileProblem(unit.place.file, f"cannot read {unit.path}: {error.strerror or error}") from error
        except (BrokenProcessPool, MemoryError) as error:
            raise _worker_died() from error


def _worker_died() -> UserError:
    return UserError(
        "a worker process died or ran out of memory; run the same command again, with fewer --workers if so: "
        "finished shards are kept"
    )


def assemble_units(
    workers: Workers, units: Units, fetcher: Fetcher, builder: ShardBuilder, report: Callable[[Unit, int], None]
) -> None:
    """Tokenize `units` into the builder's shards; `report(unit, tokens so far)` is called after each."""
    with builder:
        for unit, result in workers.run(units, tokenize_unit):
            tokens = UnitTokens(*result)
            read = len(tokens.starts) + tokens.skipped
            if unit.documents is not None and read != unit.documents:
                raise FileProblem(
                    unit.place.file,
                    f"{unit.path}: row group {unit.place.unit} holds {unit.documents:,} rows by the file's index, and "
                    f"{read:,} were read; it has changed meanwhile",
                )
            builder.feed(tokens, unit.place)
            report(unit, builder.total)
            if unit.last:
                fetcher.release(unit.place.file)
            if builder.done:
                break
        builder.finish()


class _Worker:
    """What a worker process keeps between units."""

    encode: Callable[[str], np.ndarray]
    eot: int | None
    dtype: type[np.uint16] | type[np.uint32]


def _start_worker(tokenizer: dict[str, Any] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if tokenizer is not None:
        made = tokenizer_from_dict(tokenizer)
        _Worker.encode = made.encode_array
        if isinstance(made, GPT2Tokenizer):
            _Worker.encode = made.encode_fast
        _Worker.eot = made.eot_token
        _Worker.dtype = np.uint16 if made.n_vocab <= 2**16 else np.uint32


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def tokenize_unit(path: Path, kind: str, unit: int, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """The fields of `UnitTokens` for one unit; runs in a worker."""
    pieces: list[np.ndarray] = []
    starts, sizes = [], []
    at = skipped = replaced = 0
    eot = [] if _Worker.eot is None else [np.array([_Worker.eot], _Worker.dtype)]
    for document in read_unit(path, kind, unit, column):
        text = document.text
        if not text and document.begins:
            skipped += 1
            continue
        replaced += document.replaced
        sizes.append(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")))
        if document.begins:
            starts.append(at)
            pieces += eot
            at += len(eot)
        tokens = _Worker.encode(text).astype(_Worker.dtype, copy=False)
        pieces.append(tokens)
        at += len(tokens)
    buffer = np.concatenate(pieces) if pieces else np.empty(0, _Worker.dtype)
    return buffer, np.array(starts, np.int64), np.array(sizes, np.int64), skipped, replaced


def characters_of_unit(path: Path, kind: str, unit: int, column: str) -> set[str]:
    """The distinct characters of one unit; runs in a worker."""
    characters: set[str] = set()
    for document in read_unit(path, kind, unit, column):
        characters.update(document.text)
    return characters
