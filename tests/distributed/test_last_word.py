"""A user's error stands last, and torchrun does not try again what only the user can put right."""

from __future__ import annotations

import time
from pathlib import Path

from repository import ROOT
from small_runs import Started, flags, small

DIFFERENT = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    sys.argv += ["--learning-rate", "0.5"]
else:
    sys.argv += ["--wandb-project", "another", "--log-every", "3"]  # which change nothing
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_that_differ_are_refused_by_name_once(char_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT.format(script=str(ROOT / "train_gpt2.py")))
    config = small(char_data, tmp_path / "run", micro_batch_size=4)
    with Started(script, flags(config), 2, ("--max-restarts=5", "--monitor-interval=0.1")) as started:
        code, output = started.finish(600)
        assert code == 1, output
        deadline = time.monotonic() + 300
        while not started.output().rstrip().endswith("start them alike") and time.monotonic() < deadline:
            time.sleep(0.05)
        output = started.output()
    lines = output.rstrip().splitlines()
    assert lines[-1].startswith("error: rank 0 on ")
    assert " has learning_rate 0.01; rank 1 on " in lines[-1]
    assert lines[-1].endswith(" has learning_rate 0.5: every process must have the same; start them alike")
    assert output.count("\nerror: rank 0 on") + output.startswith("error: rank 0 on") <= 4, output  # of 12
    assert not (tmp_path / "run").exists()
