"""How a command ends: one line and a code for what the user can put right, a traceback for what only we can."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from repository import ROOT
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


@pytest.mark.parametrize(
    ("body", "code"), [("return None", 0), ("return 3", 3), ("raise KeyboardInterrupt", -signal.SIGINT)]
)
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


def test_a_wrong_option_is_one_line() -> None:
    parser = (
        "from gpt2.errors import ArgumentParser; p = ArgumentParser(prog='it.py'); p.add_argument('-n', type=int); "
    )
    done = run(parser + "p.parse_args(['-n', '9' * 5000])")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: argument -n: invalid int value: '9+; it\.py --help lists the options\n", done.stderr)
    assert len(done.stderr) < 500


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


@pytest.mark.parametrize("path", ["/dev/full", "closed", "pipe"])
def test_work_outlives_its_output(path: str) -> None:
    work = "import sys\nfrom gpt2.errors import outliving_output, run_cli\n"
    work += "def main():\n with outliving_output():\n  for i in range(9999): print('x' * 99, flush=i % 2 == 0)\n"
    work += "  print('lost', file=sys.stderr, flush=True)\n open(sys.argv[1], 'w').write('done')\nrun_cli(main)\n"
    redirect = {"closed": ">&- 2>&-", "pipe": "2>&1 | true; exit ${PIPESTATUS[0]}"}.get(path, f">{path} 2>&1")
    with tempfile.TemporaryDirectory() as directory:
        command = shlex.join([sys.executable, "-c", work, f"{directory}/end"]) + " " + redirect
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=600)
        assert done.returncode == 0
        assert Path(f"{directory}/end").read_text() == "done"
