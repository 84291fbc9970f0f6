"""What a user can put right is told in one line; everything else keeps its traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right: what was wrong, with the value, and what to do about it.

    Args:
        message: one line.
        alone: only this one of torchrun's processes knows of it and must tell; otherwise they all do, and one tells.
    """

    def __init__(self, message: str, *, alone: bool = False):
        super().__init__(message)
        self.alone = alone


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the paragraphs behind it; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code.

    A `UserError` becomes one line on stderr and exit code 2, from one process only of those torchrun started on a
    machine. Ctrl-C exits with 130, a closed pipe (`... | head`) silently with 141. Characters that the terminal's
    encoding lacks are printed as "?".

    Args:
        main: returns the exit code; None counts as 0.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Python would complain again while closing stdout; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
