"""Fails at its first start, and is killed while it writes why: see test_distributed.py."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from gpt2.distributed.world import WholeErrorFile


def dump_and_die(value: Any, file: Any) -> None:
    file.write('{"mess')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("the peer is gone")
    print("started again")


if __name__ == "__main__":
    json.dump = dump_and_die
    record(main, error_handler=WholeErrorFile() if "PYTORCHS_OWN" not in os.environ else None)()
