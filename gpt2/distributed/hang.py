"""What is left behind when a process waits in vain for another: RUN/hang, with a few files a process.

    stack_rank0.txt      where the process's threads were, if a step took almost as long as it may, or it crashed
    collectives_rank0*   the last collectives it took part in: PyTorch's flight recorder

What an earlier start has left is moved to RUN/hang/earlier, each file under the time when it was written.

The process that hangs is the one whose stack is not inside a collective, or whose list of collectives is shorter.
Reading the recorder's nccl files: `torchfrtrace` of PyTorch's own tools.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from gpt2.distributed import world as distributed
from gpt2.files import create

RECORDED_COLLECTIVES = 2000
_TIMED_OUT = ("timed out", "timeout")  # gloo says the one or the other, by which of its threads noticed
STACK_AFTER = 0.8
"""Part of the step's time-out after which the stack is written: before anybody is killed for it."""


def enable_flight_recorder(directory: Path) -> None:
    """Make PyTorch remember this process's collectives; before the process group is made, which reads it.

    nccl writes them by itself when it gives up waiting.

    Args:
        directory: receives the files; need not exist yet.
    """
    # nccl's watchdog adds the rank to the name.
    prefix = str((directory / "collectives_rank").absolute())
    # PyTorch 2.9 renamed two of them, and later versions warn of the old names in every process.
    renamed = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    size, file = (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
        if renamed
        else ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    )
    for name, value in ((size, str(RECORDED_COLLECTIVES)), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"), (file, prefix)):
        os.environ.setdefault(name, value)


class HangWatch:
    """Writes this process's stacks down when a step takes almost as long as the others will wait for it.

    Args:
        directory: RUN/hang.
        rank: this process's.
    """

    def __init__(self, directory: Path, rank: int):
        self.directory, self.rank = directory, rank
        self.path = directory / f"stack_rank{rank}.txt"
        self._file: BinaryIO | None = None
        with contextlib.suppress(OSError):  # a machine that lacks the directory does without
            directory.mkdir(parents=True, exist_ok=True)
            self._keep_earlier()
            self._file = create(self.path)
            faulthandler.enable(self._file)  # for nccl's watchdog, too, which ends the process by a signal

    def _keep_earlier(self) -> None:
        """Move what this rank of an earlier start has left out of the way."""
        own = f"collectives_rank{self.rank}"  # nccl's watchdog writes the one, `explain` the other
        for path in (self.path, self.directory / own, self.directory / f"{own}.json"):
            if path.exists() and path.stat().st_size:
                written = time.strftime("%Y%m%d_%H%M%S", time.localtime(path.stat().st_mtime))
                earlier = self.directory / "earlier"
                earlier.mkdir(exist_ok=True)
                path.rename(earlier / f"{written}_{path.name}")

    def arm(self, starting: bool = False) -> None:
        """A step begins; the first one, when `starting`, for which the others wait longer."""
        if self._file is not None:
            timeout = distributed.STARTUP_TIMEOUT if starting else distributed.STEP_TIMEOUT
            faulthandler.dump_traceback_later(STACK_AFTER * timeout.total_seconds(), file=self._file)

    def disarm(self) -> None:
        """Something begins that may take its time."""
        faulthandler.cancel_dump_traceback_later()

    def explain(self, error: BaseException) -> str | None:
        """A line about an error if it is that another process did not come; writes down the collectives then."""
        if not dist.is_initialized() or not any(sign in str(error).lower() for sign in _TIMED_OUT):
            return None
        dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
        if dump is not None:
            with contextlib.suppress(OSError):
                (self.directory / f"collectives_rank{self.rank}.json").write_bytes(dump())
        return (
            f"rank {self.rank} waited in vain for another process; {self.directory} tells where each of them was "
            "(stack_rank*.txt) and what they had exchanged (collectives_rank*)"
        )

    def close(self) -> None:
        """Stop watching; leaves nothing behind where nothing happened."""
        self.disarm()
        if self._file is None:
            return
        faulthandler.disable()
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.directory.rmdir()  # by the last process to leave it empty
