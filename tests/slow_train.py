"""train_gpt2.py, slowed down so that tests/end_to_end/test_kills.py can hit a step, an evaluation or a save."""

from __future__ import annotations

import time
from typing import Any

import train_gpt2
from gpt2.checkpoint import directory as checkpoint
from gpt2.errors import run_cli

real_step, real_hash = train_gpt2.train_step, checkpoint.sha256_file


def slow_step(*args: Any, **kwargs: Any) -> Any:
    time.sleep(0.03)
    return real_step(*args, **kwargs)


def slow_hash(path: Any) -> str:
    time.sleep(0.05)  # seven files a checkpoint, while a dozen steps go by
    return real_hash(path)


train_gpt2.train_step = slow_step
checkpoint.sha256_file = slow_hash

if __name__ == "__main__":
    run_cli(train_gpt2.main)
