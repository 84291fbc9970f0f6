"""train_gpt2.py with a rank 1 that hangs in step 4, and others that soon lose patience: see test_train_kills.py."""

from __future__ import annotations

import datetime
import os
import signal
import time
from typing import Any

import train_gpt2
from gpt2.distributed import world as distributed
from gpt2.errors import run_cli

real_step = train_gpt2.train_step
steps = 0


def hang_in_the_data_centre() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun would wait 30 s for one that hangs and does not heed it
    time.sleep(600)


def step(*args: Any, **kwargs: Any) -> Any:
    global steps
    steps += 1
    if steps == 4 and os.environ["RANK"] == "1":
        hang_in_the_data_centre()
    return real_step(*args, **kwargs)


train_gpt2.train_step = step
distributed.STEP_TIMEOUT = datetime.timedelta(seconds=10)  # a busy machine is no hang

if __name__ == "__main__":
    run_cli(train_gpt2.main)
