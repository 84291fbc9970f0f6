"""What Windows and macOS lack is hidden, and everything still imports, tokenizes, verifies, trains and resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hides from Linux what others lack")

# Python imports it by itself as it starts: this reaches the processes that a hidden one starts, too.
HIDE = """
import errno, os, signal, struct, subprocess, sys, types  # subprocess, for it takes msvcrt as a sign of Windows

system = os.environ["HIDDEN"]
real_open, lseek = os.open, os.lseek


def hide(owner, *names):
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)


def no_links(*args, **kwargs):
    raise OSError(errno.EPERM, "a privilege is not held")


if system == "windows":
    import fcntl

    control, kinds = fcntl.fcntl, {os.O_RDONLY: fcntl.F_RDLCK}  # Linux wants a file open for writing, Windows does not

    def locking(handle, mode, count):  # of an open file, as on Windows: not of the process, as lockf's
        position = lseek(handle, 0, os.SEEK_CUR)
        try:
            kind = kinds.get(control(handle, fcntl.F_GETFL) & os.O_ACCMODE, fcntl.F_WRLCK)
            control(handle, 37, struct.pack("hhqqi4x", kind, 0, position, count, 0))  # F_OFD_SETLK
        except OSError as error:
            raise PermissionError(errno.EACCES, "locked") from error

    def no_directories(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a directory", path)
        return real_open(path, flags, *args, **kwargs)

    sys.modules.update(dict.fromkeys(("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog")))
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    sys.modules["msvcrt"].locking, sys.modules["msvcrt"].LK_NBLCK = locking, 2
    hide(os, "preadv", "pread", "readv", "pwrite", "writev", "fork", "forkpty", "killpg", "setsid", "getpgid")
    hide(os, "sysconf", "getuid", "geteuid", "getgid", "mkfifo", "chown", "statvfs", "posix_fadvise", "sendfile")
    hide(os, "sched_getaffinity", "sched_setaffinity", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY")
    hide(signal, "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGSTOP", "SIGTSTP", "SIGCONT")
    hide(signal, "alarm", "setitimer", "pthread_sigmask", "sigwait")
    os.open, os.symlink = no_directories, no_links
elif system == "macos":
    hide(os, "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "preadv")  # the last one before macOS 11
"""

USE = """
import contextlib, importlib, io, os, pkgutil, signal, sys
from pathlib import Path

if __name__ == "__main__":
    import gpt2
    from repository import ROOT, load_script

    for module in pkgutil.walk_packages(gpt2.__path__, "gpt2."):
        importlib.import_module(module.name)
    sys.path.insert(0, str(ROOT / "scripts"))
    scripts = [path for folder in (".", "data", "scripts") for path in sorted((ROOT / folder).glob("*.py"))]
    loaded = {path.stem: load_script(str(path.relative_to(ROOT))) for path in scripts}
    import bench.ddp, bench.generate, bench.hellaswag, bench.loader, bench.train

    here = Path(sys.argv[1])
    (here / "text.jsonl").write_text('{"text": "To be, or not to be."}\\n' * 2000, encoding="utf-8")
    fineweb, data = loaded["fineweb"], here / "tokens"
    words = ["--source", str(here / "text.jsonl"), "--out", str(data), "--workers", "1"]
    assert fineweb.main([*words, "--shard-tokens", "5k", "--val-tokens", "2k"]) == 0
    assert fineweb.main(["verify", str(data)]) == 0

    from gpt2.errors import UserError
    from gpt2.report.runs import open_run
    from gpt2.train.setup import lock_run
    from small_runs import losses, small, train

    settings = {"block_size": 16, "vocab_size": 50257, "n_embd": 8, "total_batch_tokens": 128, "val_tokens": 256}
    settings |= {"max_steps": 4, "checkpoint_every": 2, "eval_every": 2}

    def attempt(run):
        advance = run.advance
        def advance_and_look():
            advance()
            assert open_run(here / "run").locked
            with contextlib.suppress(UserError):
                lock_run(here / "run")
                raise AssertionError("a second process could train here")
        run.advance = advance_and_look

    train(small(data, here / "run", **settings), stop_after=3, prepare=attempt)
    assert not open_run(here / "run").locked
    train(small(data, here / "run", **settings))
    assert sorted(losses(here / "run")) == [1, 2, 3, 4]
    print("all done")
"""


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_everything_works_without_what_a_system_lacks(tmp_path: Path, system: str) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    script = tmp_path / "use.py"
    script.write_text(USE, encoding="utf-8")
    variables = environment()
    path = f"{hidden}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**variables, "HIDDEN": system, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all done\n")
