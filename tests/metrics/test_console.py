"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.config import Config, DataConfig, GPTConfig, RunConfig
from gpt2.metrics.console import LiveBar, LogLines, Status, open_console, parts
from gpt2.metrics.recorder import Metrics

CPU = torch.device("cpu")
CONFIG = Config(
    model=GPTConfig(),
    data=DataConfig(total_batch_tokens=4096, micro_batch_size=4),
    run=RunConfig(max_steps=100, eval_every=20, wandb="disabled"),
)
STATUS = Status(
    step=7, total_steps=1000, loss=3.14159, smoothed_loss=3.25, lr=6e-4, grad_norm=1.234, tokens_per_second=12_345.6,
    mfu=None, memory_bytes=None, seconds_left=None, next_eval=None, shares={"data": 0.004, "eval": 0.25},
)  # fmt: skip


def test_unknown_figures_and_small_shares_are_left_out() -> None:
    assert parts(STATUS, smoothed=False) == ["loss 3.1416", "lr 6.00e-04", "norm 1.23", "12,346 tok/s", "eval 25%"]
    known = replace(STATUS, mfu=0.4567, memory_bytes=3 * 2**29)
    assert parts(known, smoothed=True) == [
        "loss 3.1416 (mean 3.2500)", "lr 6.00e-04", "norm 1.23", "12,346 tok/s", "mfu 45.7%", "1.5 GiB", "eval 25%",
    ]  # fmt: skip


def test_a_log_gets_one_line_per_step_and_strong_ones_stand_out() -> None:
    stream = io.StringIO()
    lines = LogLines(stream)
    lines.show(replace(STATUS, shares={}))
    lines.show(replace(STATUS, shares={}, step=1000, seconds_left=3599.0))
    lines.activity("eval")
    lines.say("validation loss 3.2", strong=True)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "step    7/1000 | loss 3.1416 | lr 6.00e-04 | norm 1.23 | 12,346 tok/s",
        "step 1000/1000 | loss 3.1416 | lr 6.00e-04 | norm 1.23 | 12,346 tok/s | 59 min 59 s left",
        "=> validation loss 3.2",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    metrics = Metrics(tmp_path, config=CONFIG, flops_per_token=1.0, device=CPU, world_size=1)
    assert isinstance(metrics.console, LiveBar)
    metrics.train(10, loss=6.0, lr=1e-3, grad_norm=1.0)
    metrics.train(11, loss=5.0, lr=1e-3, grad_norm=1.0)
    metrics.val(11, 5.25, 100, 450)
    metrics.sample(11, "Hello", " [red]x[/red]")
    with metrics.phase("eval"):
        metrics.console.live.refresh()
    metrics.close("stopped")
    shown = terminal.getvalue()
    assert "11/100" in shown
    assert "loss 5.0000 (mean 5.9000)" in shown
    assert "evaluation in 9" in shown
    assert "validation loss 5.2500" in shown
    assert "[red]x[/red]" in shown  # a model's text is not markup
    assert "evaluating" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back

    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(100, 0, terminal), LogLines)
    assert isinstance(open_console(100, 0, io.StringIO()), LogLines)


WORDS = "step 20 | validation loss 6.1234 (2.3456 bits per byte) | GPT-2 124M on FineWeb-Edu 3.2924: 2.8310 to go"
PATH = "/a/path/" + "that/is/longer/than/a/line/" * 8
SHOWING = f"""
from gpt2.metrics.console import LiveBar, Status, open_console
console = open_console(1000, 0)
assert isinstance(console, LiveBar)
for step in range(1, 31):
    console.show(Status(step, 1000, 3.14159, 3.25, 6e-4, 1.234, 12345.6, None, 2**31, 3599.0, 30 - step, {{}}))
    console.draw()
    if step % 10 == 0:
        console.activity("eval")
        console.say("{WORDS}", strong=True)
        console.say("saved in {PATH}")
        console.activity(None)
console.close()
"""


@pytest.mark.parametrize("columns", [0, 60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_bar_stays_behind_and_no_word_is_broken(columns: int, encoding: str) -> None:
    pytest.importorskip("rich")
    screen = pytest.importorskip("screen", reason="pseudo-terminals are not of this system").Screen(columns, encoding)
    assert screen.run([sys.executable, "-c", SHOWING]) == 0
    rows = screen.rows()
    bars = [number for number, row in enumerate(rows) if "/1000" in row]
    assert len(bars) == 1  # at the end, with its figures below
    assert "30/1000" in rows[bars[0]]
    assert " ".join(" ".join(rows[bars[0] + 1 :]).split()).startswith("loss 3.1416 (mean 3.2500) | lr 6.00e-04 | norm")
    above = rows[: bars[0]]
    assert " ".join(" ".join(above).split()).count(WORDS) == 3
    assert "".join(above).count(PATH) == 3
