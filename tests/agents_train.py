"""train_gpt2.py for tests/end_to_end/test_agents.py: slow enough to be hit, and quick to lose patience.

A process whose id is in the file that STALL names hangs in its next step, and heeds nothing but SIGKILL.
"""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path
from typing import Any

import train_gpt2
from gpt2.distributed import world as distributed
from gpt2.errors import run_cli

real_step = train_gpt2.train_step
stall = Path(os.environ["STALL"])


def slow_step(*args: Any, **kwargs: Any) -> Any:
    time.sleep(0.03)
    if stall.exists() and stall.read_text() == str(os.getpid()):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return real_step(*args, **kwargs)


train_gpt2.train_step = slow_step
distributed.STEP_TIMEOUT = datetime.timedelta(seconds=10)

if __name__ == "__main__":
    run_cli(train_gpt2.main)
