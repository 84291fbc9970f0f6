"""The tokenizing benchmark end to end on a little text: every side does the same work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from repository import ROOT


@pytest.mark.slow
def test_sides_tokenize_the_same_text(tmp_path):
    pytest.importorskip("datasets")
    report = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "tokenize", "--megabytes", "4", "--repeats", "1"]
    done = subprocess.run([*command, "--workers", "2", "--json", str(report)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    tokens = {side: values["tokens"] for side, values in result["sides"].items() if side in ("ours", "baseline")}
    assert len(set(tokens.values())) == 1, tokens
    assert all(values["median"] > 0 for values in result["sides"].values())
    for side in tokens:
        assert side in done.stdout
