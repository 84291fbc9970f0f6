"""Setting up .venv: for one process at a time, again where what is wanted has changed, refused in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT, load_script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of a project in a folder of its own, whose .venv has this test's interpreter."""
    module = load_script("scripts/environment.py")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name, value in {"ROOT": tmp_path, "VENV": tmp_path / ".venv", "PYTHON": Path(sys.executable)}.items():
        monkeypatch.setattr(module, name, value)
    module.VENV.mkdir()
    return module


@pytest.fixture
def installed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip was told to install; it is not run."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(script, "_pip", lambda *words, quiet=False: asked.append(words) or True)
    return asked


def test_it_is_installed_once_and_again_after_a_change_or_a_move(
    script: ModuleType, installed: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.main("full")
    assert ("--constraint", "constraints.txt", "--editable", ".[full]") in installed
    for change in (lambda: None, lambda: (tmp_path / "constraints.txt").write_text("other"), lambda: None):
        installed.clear()
        change()
        script.main("full")
    assert not installed
    moved = tmp_path.rename(tmp_path.parent / "moved here")
    for name, value in {"ROOT": moved, "VENV": moved / ".venv"}.items():
        monkeypatch.setattr(script, name, value)
    installed.clear()
    script.main("full,test")
    assert installed  # in place: it must know where
    installed.clear()
    script.main("full")
    assert not installed  # it is part of what is there


def test_one_process_at_a_time(script: ModuleType, installed: list[tuple[str, ...]]) -> None:
    with script._alone():
        second = threading.Thread(target=script.main, args=("full",))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert not installed
    second.join()
    assert installed


def test_a_python_that_is_too_old_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "PYTHON", tmp_path / "none")
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit) as error:
        script.main("full")
    assert error.value.code == 2
    expected = "error: this is Python 3.9.18; install Python 3.10 or later, or set PYTHON for the shell scripts\n"
    assert capsys.readouterr().err == expected


def test_packages_that_cannot_be_installed_are_an_error_and_tried_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_pip", lambda *words, quiet=False: "--editable" not in words)
    for _ in range(2):
        with pytest.raises(SystemExit, match="2"):
            script.main("full")


def test_exit_codes_come_back(script: ModuleType) -> None:
    assert script.run("-c", "import sys; sys.exit(3)") == 3
    assert script.run("-c", "import os; print(os.environ['MINE'])", MINE="x") == 0
    assert script.run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)") == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_the_program_has_ended(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM is passed on; Ctrl-C, which a terminal gives to both, is waited out while the program saves."""
    child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1, flush=True)\n"
    child += "time.sleep(600 if sys.argv[1] == 'SIGTERM' else 0.5)\nopen('saved', 'w').close()"
    code = (
        f"import environment as e, pathlib, sys\ne.PYTHON, e.ROOT = sys.executable, pathlib.Path({str(tmp_path)!r})\n"
    )
    code += f"e.run('-c', {child!r}, {number.name!r})\nprint('not reached')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(number)
    assert process.communicate(timeout=600)[0] == ""
    assert process.returncode == 128 + number
    assert (tmp_path / "saved").exists() == (number == signal.SIGINT)


@pytest.mark.parametrize("name", ["quickstart.py", "quickstart.sh"])
def test_a_wrong_argument_is_one_line(name: str) -> None:
    words = ["bash"] if name.endswith("sh") else [sys.executable]
    done = subprocess.run([*words, str(ROOT / "scripts" / name), "--smoke", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument --fast; the only one is --smoke\n"
