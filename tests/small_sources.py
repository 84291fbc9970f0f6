"""Sources of a few documents, and what must come of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gpt2.prepare.job import Job
from gpt2.prepare.sources import local_source
from gpt2.tokens.manifest import length_bin
from gpt2.tokens.tokenizer import gpt2_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EOT = 50256


def documents(count: int) -> list[str | None]:
    generator = np.random.default_rng(count)
    words = ["the", "Quick", "brown's", "fox\n", "jumped", "<|endoftext|>", "naïve", "日本", "1234", "  over", "\n\n"]
    texts: list[str | None] = [" ".join(generator.choice(words, generator.integers(1, 60))) for _ in range(count)]
    texts[1], texts[2] = None, ""
    return texts


def write_parquet(directory: Path, texts, files: int = 3, rows: int = 7) -> Path:
    directory.mkdir()
    for number in range(files):
        table = pa.table({"id": [str(i) for i in range(len(texts[number::files]))], "text": texts[number::files]})
        pq.write_table(table, directory / f"{number:03d}.parquet", row_group_size=rows)
    return directory


def in_order(texts, files: int = 3) -> list[str]:
    return [text for number in range(files) for text in texts[number::files] if text]


def stream(texts: list[str]) -> list[int]:
    return [t for text in texts for t in (EOT, *gpt2_tokenizer().encode(text))]


def job(directory: Path, source: str | Path, **changes) -> Job:
    made = Job(
        directory=directory,
        name="x",
        source=local_source([str(source)]),
        tokenizer="gpt2",
        suffix=".npy",
        shard_tokens=500,
        val_tokens=None,
        max_tokens=None,
        workers=1,
        part=None,
    )
    return dataclasses.replace(made, **changes)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in (".npy", ".bin")}


def histogram(lengths) -> dict[int, int]:
    result: dict[int, int] = {}
    for length in lengths:
        edge = length_bin(int(length))
        result[edge] = result.get(edge, 0) + 1
    return dict(sorted(result.items()))
