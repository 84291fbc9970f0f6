"""Tokens per second from parquet to finished shards: this pipeline against build-nanogpt's loop, and against the limit.

The limit is as many processes as there are workers, all at once, each tokenizing text that it has in memory already and
dropping the ids: with tiktoken's fastest function, and with this project's way to the same ids. The baseline is written
here as build-nanogpt writes it: `Pool.imap` over the rows of a `datasets` data set, one task per document, the parent
filling the shard. It is given a data set whose Arrow files are ready, which `load_dataset` would first have to make.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.errors import UserError

_SHARD_TOKENS = 10_000_000
_IN_MEMORY_BYTES = 40_000_000  # of text for each process of the limit: seconds
_IN_MEMORY_SIDES = ("tiktoken", "our encoder")
_MIB = 2**20
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, else KiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--source", nargs="+", metavar="PATH", help="parquet files [Python's own library]")
    parser.add_argument("--megabytes", type=int, default=600, help="text to tokenize; the source is repeated to it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes on each side")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the sides take turns in each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return medians, spread and ratios."""
    if args.workers < 1 or args.repeats < 1 or args.megabytes < 1:
        raise UserError("--workers, --repeats and --megabytes must be at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as name:
        scratch = Path(name)
        sources, text_bytes = _write_source(args, scratch / "source")
        arrow = scratch / "arrow"
        _in_fresh_process(_prepare_arrow, sources, arrow)
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "tiktoken": partial(_in_fresh_process, _in_memory, sources, args.workers, "encode_array"),
            "our encoder": partial(_in_fresh_process, _in_memory, sources, args.workers, "encode_fast"),
            "ours": partial(_in_fresh_process, _ours, sources, scratch / "ours", args.workers),
            "baseline": partial(_in_fresh_process, _baseline, sources, arrow, scratch / "baseline", args.workers),
        }
        measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side, measure in sides.items():
                measured[side].append(measure())
    return _summary(args, measured, text_bytes)


def _summary(args: argparse.Namespace, measured: dict[str, list[dict[str, float]]], text_bytes: int) -> dict[str, Any]:
    rates = {side: [m["tokens"] / m["seconds"] / 1e6 for m in rounds] for side, rounds in measured.items()}
    result: dict[str, Any] = {
        "configuration": {"workers": args.workers, "repeats": args.repeats, "text_bytes": text_bytes},
        "sides": {},
        "ratios": {},
    }
    print(f"{args.workers} workers, {text_bytes / 1e6:.0f} MB of text, {args.repeats} rounds")
    print(f"{'':<17}{'M tokens per second':>26}{'processor':>12}{'parent':>11}{'peak MiB':>16}")
    print(f"{'':<17}{'median':>10}{'low':>8}{'high':>8}{'ns/token':>12}{'ns/token':>11}{'parent':>9}{'worker':>7}")
    for side, rounds in measured.items():
        summary = {
            "tokens": rounds[0]["tokens"],
            "median": statistics.median(rates[side]),
            "low": min(rates[side]),
            "high": max(rates[side]),
            "cpu_ns_per_token": statistics.median(m["cpu"] / m["tokens"] * 1e9 for m in rounds),
        }
        if side not in _IN_MEMORY_SIDES:
            summary |= {
                "parent_cpu_ns_per_token": statistics.median(m["parent_cpu"] / m["tokens"] * 1e9 for m in rounds),
                "parent_bytes": max(m["parent_bytes"] for m in rounds),  # the baseline's with its mapped Arrow files
                "worker_bytes": max(m["worker_bytes"] for m in rounds),
            }
        result["sides"][side] = summary
        line = f"{side:<17}{summary['median']:>10.2f}{summary['low']:>8.2f}{summary['high']:>8.2f}"
        line += f"{summary['cpu_ns_per_token']:>12.0f}"
        if side not in _IN_MEMORY_SIDES:
            line += f"{summary['parent_cpu_ns_per_token']:>11.1f}"
            line += f"{summary['parent_bytes'] / _MIB:>9.0f}{summary['worker_bytes'] / _MIB:>7.0f}"
        print(line)
    for other in ("tiktoken", "our encoder", "baseline"):
        # Ratios within a round, so that what else the machine does meanwhile weighs on both sides. Processor time
        # weighs the sides without that: what the speed comes to on cores that do nothing else.
        in_memory = " in memory" if other in _IN_MEMORY_SIDES else ""
        ratios = {
            f"{other}{in_memory}": [o / b for o, b in zip(rates["ours"], rates[other], strict=True)],
            f"{other}{in_memory} by processor time": _cpu_ratios(measured[other], measured["ours"]),
        }
        for what, values in ratios.items():
            median = statistics.median(values)
            result["ratios"][what] = {"median": median, "rounds": values}
            print(f"ours: {median:.2f} × {what}  ({min(values):.2f} to {max(values):.2f})")
    return result


def _cpu_ratios(others: list[dict[str, float]], ours: list[dict[str, float]]) -> list[float]:
    return [(b["cpu"] / b["tokens"]) / (o["cpu"] / o["tokens"]) for b, o in zip(others, ours, strict=True)]


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new interpreter, so that neither this one's imports nor another side's memory are counted with it."""
    scripts = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "bench.tokenize", json.dumps([function.__name__, *arguments], default=str)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([scripts, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{function.__name__} failed with code {done.returncode}; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def _write_source(args: argparse.Namespace, directory: Path) -> tuple[list[str], int]:
    """Parquet files with about the text that was asked for, in row groups of 1,000 documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gpt2.prepare.sources import local_source

    directory.mkdir()
    if args.source:
        files = local_source(args.source).files
        if any(file.kind != "parquet" for file in files):
            raise UserError("--source: this benchmark reads parquet files only")
        tables = [pq.read_table(file.path, columns=["text"]) for file in files]
    else:
        tables = [pa.table({"text": _library_source()})]
    sizes = [sum(len(text.encode()) for text in table["text"].to_pylist() if text) for table in tables]
    paths: list[str] = []
    total = 0
    while total < args.megabytes * 1e6:
        number = len(paths) % len(tables)
        path = directory / f"{len(paths):05d}.parquet"
        pq.write_table(tables[number], path, row_group_size=1000, compression="zstd")
        total += sizes[number]
        paths.append(str(path))
    return paths, total


def _library_source() -> list[str]:
    """The source of the standard library's modules in documents of a few thousand characters."""
    import sysconfig

    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n\n".join(p.read_text("utf-8", "replace") for p in sorted(library.glob("*.py")))
    return [text[i : i + 4000] for i in range(0, len(text), 4000)]


def _in_memory(sources: list[str], workers: int, encoder: str) -> dict[str, float]:
    """Processes that tokenize documents in memory, all at the same time, and drop the ids."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        alone = pool.starmap(_tokenize_in_memory, [(sources, encoder)] * workers, chunksize=1)
    tokens = alone[0]["tokens"]
    seconds = statistics.mean(result["seconds"] for result in alone)
    cpu = statistics.mean(result["cpu"] for result in alone)
    return {**alone[0], "tokens": tokens * workers, "seconds": seconds, "cpu": cpu * workers}


def _tokenize_in_memory(sources: list[str], encoder: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    from gpt2.tokens.tokenizer import gpt2_tokenizer

    texts: list[str] = []
    for path in sources:
        texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
        if sum(map(len, texts)) > _IN_MEMORY_BYTES:
            break
    encode = getattr(gpt2_tokenizer(), encoder)
    usage = _Usage()
    return usage.result(sum(len(encode(text)) for text in texts))


def _ours(sources: list[str], directory: str, workers: int) -> dict[str, float]:
    """The pipeline as `data/fineweb.py` calls it, worker processes' start included."""
    from gpt2.prepare.build import prepare
    from gpt2.prepare.job import Job
    from gpt2.prepare.sources import local_source

    out = Path(directory)
    shutil.rmtree(out, ignore_errors=True)
    usage = _Usage()
    job = Job(
        directory=out,
        name="bench",
        source=local_source(sources),
        tokenizer="gpt2",
        suffix=".npy",
        shard_tokens=_SHARD_TOKENS,
        val_tokens=1,  # one document
        max_tokens=None,
        workers=workers,
        part=None,
    )
    manifest = prepare(job, lambda line: None)
    return usage.result(sum(entry.tokens for entry in manifest.shards))


def _prepare_arrow(sources: list[str], cache: str) -> None:
    _load_rows(sources, cache)


def _load_rows(sources: list[str], cache: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=sources, split="train", cache_dir=cache)


_encoding: Any = None


def _start_baseline() -> None:
    global _encoding
    from gpt2.tokens.tokenizer import gpt2_tokenizer

    _encoding = gpt2_tokenizer()


def _tokenize_row(row: dict[str, str]) -> np.ndarray:
    tokens = np.array([_encoding.eot_token, *_encoding.encode(row["text"])])
    assert (tokens >= 0).all()
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def _baseline(sources: list[str], arrow: str, directory: str, workers: int) -> dict[str, float]:
    """build-nanogpt's loop: one task per document, the parent copies documents into the shard."""
    out = Path(directory)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    rows = _load_rows(sources, arrow)
    usage = _Usage()
    shard = np.empty(_SHARD_TOKENS, np.uint16)
    filled = shards = total = 0
    with multiprocessing.get_context("fork").Pool(workers, initializer=_start_baseline) as pool:
        for tokens in pool.imap(_tokenize_row, rows, chunksize=16):
            total += len(tokens)
            while len(tokens):
                count = min(_SHARD_TOKENS - filled, len(tokens))
                shard[filled : filled + count] = tokens[:count]
                tokens, filled = tokens[count:], filled + count
                if filled == _SHARD_TOKENS:
                    np.save(out / f"bench_{shards:06d}.npy", shard)
                    shards, filled = shards + 1, 0
        pool.close()
        pool.join()  # so that the workers' memory is counted
    if filled:
        np.save(out / f"bench_{shards:06d}.npy", shard[:filled])
    return usage.result(total)


class _Usage:
    """Time, processor time and peak memory of this process and its finished children from here on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own = time.process_time()
        self._children = _children_seconds()

    def result(self, tokens: int) -> dict[str, float]:
        """Seconds since the start; memory in bytes."""
        own = time.process_time() - self._own
        return {
            "tokens": tokens,
            "seconds": time.perf_counter() - self._start,
            "parent_cpu": own,
            "cpu": own + _children_seconds() - self._children,
            "parent_bytes": _own_peak_bytes(),
            "worker_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MAXRSS_UNIT,
        }


def _own_peak_bytes() -> int:
    """Peak resident memory; not `ru_maxrss` where there is better, for that starts with what the caller had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":  # one side, called by `_in_fresh_process`
    _name, *_arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[_name](*_arguments)))
