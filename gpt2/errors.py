"""What a user can put right is told in one line; everything else keeps its traceback."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from typing import Any, NoReturn, TextIO, cast

_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, that turn its direction, or that it cannot show."""


class UserError(Exception):
    """Something the user can put right: what was wrong, with the value, and what to do about it.

    Args:
        message: one line.
        alone: only this one of torchrun's processes knows of it and must tell; otherwise they all do, and one tells.
    """

    def __init__(self, message: str, *, alone: bool = False):
        super().__init__(message)
        self.alone = alone


class LaterVersion(UserError):
    """A later version of this program wrote a file: it is whole, and to be read by an update, not to be set aside."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a word that is wrong is told in one line, like any other `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message[:300]}; {self.prog} --help lists the options")


def visible(text: str, keep: str = "") -> str:
    """A foreign text with its control characters written out, so that no terminal obeys them: "\\x1b[2J".

    Args:
        text: a name, a sample, a reason, from a file or a model.
        keep: characters to leave, such as "\\n\\t".
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the paragraphs behind it; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that a device, or the host, has no memory left: of CUDA, MPS, a CPU on Linux or Windows."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


@cache
def warn(message: str) -> None:
    """Say what works, but not well: one line on stderr, once, by one of a machine's processes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError, ValueError, AttributeError):  # a stderr that is full, closed or missing
            print(f"warning: {visible(message)}", file=sys.stderr, flush=True)


class OutlivingStream:
    """A text stream whose reader may go away: from then on what is written is dropped, and nothing fails.

    Args:
        stream: to write to; None, as Python has it where the descriptor is closed, drops everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- as long as the process

    def write(self, text: str) -> int:
        """Write, or drop."""
        return self._attempt(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # what it still holds has somewhere to go when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outliving_output() -> Iterator[None]:
    """Within the block, work continues even if nobody can read stdout or stderr any more."""
    out, err = (cast("TextIO", OutlivingStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def run_cli(main: Callable[[], int | None], when_full: str = "use a smaller model") -> NoReturn:
    """Run an entry point and exit with its code.

    A `UserError` becomes one line on stderr and exit code 2, from one process only of those torchrun started on a
    machine; so does what the system says of a file: it is not there, or the disk is full. Ctrl-C ends the process by
    SIGINT, which a shell calls 130 and which stops a script, too; a closed pipe (`... | head`) exits silently with 141.
    Characters that the terminal's encoding lacks are printed as "?".

    Args:
        main: returns the exit code; None counts as 0.
        when_full: what helps where memory does not suffice; the error says it in its line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {visible(str(error))[:2000]}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
        if os.name == "posix":  # by the signal itself; Python's own way is undone by what torch runs at its end
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
    except BrokenPipeError:
        # Python would complain again while closing stdout; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # of a file that is not there, not ours to read, on a full disk
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {visible(name + (error.strerror or str(error)))}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({visible(first_line(error))}); {when_full}", file=sys.stderr)
        code = 2
    sys.exit(code)
