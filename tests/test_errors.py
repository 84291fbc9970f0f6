"""How a command ends: one line and a code for what the user can put right, a traceback for what only we can."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_runs import environment

SCRIPT = """
from gpt2.errors import UserError, run_cli
def main():
    {body}
run_cli(main)
"""


def run(body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", SCRIPT.replace("{body}", body)]
    return subprocess.run(words, env=environment() | variables, capture_output=True, text=True)


@pytest.mark.parametrize(("body", "code"), [("return None", 0), ("return 3", 3), ("raise KeyboardInterrupt", 130)])
def test_exit_codes(body: str, code: int) -> None:
    done = run(body)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(
    ("error", "local_rank", "said"),
    [
        ("UserError('no such thing')", "0", "error: no such thing\n"),
        ("UserError('no such thing')", "1", ""),  # rank 0 tells
        ("UserError('only here', alone=True)", "1", "error: only here\n"),
    ],
)
def test_a_users_error_is_one_line_from_one_process(error: str, local_rank: str, said: str) -> None:
    done = run(f"raise {error}", LOCAL_RANK=local_rank)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_our_errors_keep_their_traceback() -> None:
    done = run("return {}['key']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_characters_the_terminal_lacks() -> None:
    done = run("print('2 × 3'); raise UserError('3 → 4')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (2, "2 ? 3\n", "error: 3 ? 4\n")


def test_a_reader_that_leaves() -> None:
    words = [sys.executable, "-c", SCRIPT.replace("{body}", "[print('line') for _ in range(100_000)]")]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
