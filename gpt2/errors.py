"""What a user can put right is told in one line; everything else keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right: what was wrong, with the value, and what to do about it."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code.

    A `UserError` becomes one line on stderr and exit code 2, from rank 0 only where torchrun started
    several processes. Ctrl-C exits with 130, a closed pipe (`... | head`) silently with 141.

    Args:
        main: returns the exit code; None counts as 0.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Python would complain again while closing stdout; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
