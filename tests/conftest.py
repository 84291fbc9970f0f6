"""What the tests share. Set before torch is imported: one thread per process unless the user says more, no network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from gpt2.model.compile import cannot_compile
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.tokenizer import CharTokenizer

# How long an example takes is the machine's affair.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

CHARS = "".join(map(chr, range(ord("A"), ord("Z") + 1))) + "abcdefghijklmnopqrstuvwxyz .,!?\n'"
"""59 characters: a vocabulary that is no multiple of 64, so that its padding is in play."""


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are no part of a test's name: a compressor may write the time into them, and each worker of pytest-xdist
    must find the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(params=[False, True], ids=["numbers at once", "numbers late"])
def reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run that reads each step's numbers at once, as on a CPU, and one that reads them a step late, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_gpt2.reads_late", lambda device: request.param)
        yield


@pytest.fixture(scope="session")
def compiler() -> None:
    """A test that compiles is skipped where nothing can be, as in a slim image; a run continues uncompiled there."""
    obstacle = cannot_compile(torch.device("cpu"))
    if obstacle is not None:
        pytest.skip(obstacle)


@pytest.fixture(scope="session")
def char_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 13,007 learnable tokens in three shards and 1,500 to validate on; 203 blocks of 64 and 14 left."""
    random = np.random.default_rng(0)
    walk = np.cumsum(random.integers(0, 4, 14_507)) % len(CHARS)
    directory = tmp_path_factory.mktemp("data") / "chars"
    write_dataset(directory, walk[1500:], walk[:1500], CharTokenizer(CHARS), shard_tokens=5000)
    return directory
