"""A plan for a machine that is not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.presets import parse_args
from gpt2.train.forecast import print_plan


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    print_plan(parse_args([*words, "--plan"]))
    lines = capsys.readouterr().out.splitlines()
    return {line[:11].strip(): line[11:] for line in lines if not line.startswith("warning")}


def test_gpt2_on_eight_h100(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = plan(capsys, "gpt2", "--on", "8xH100", "--price", "2.5", "--eval-every", "0", "--data", str(tmp_path / "no"))
    # llm.c: 38 % of 8 x 989 TFLOP/s; README: 10 B tokens in 45 minutes on eight, some $20 (at its own 2.5 + overhead).
    assert rows["device"].startswith("8 × H100, bf16")
    assert rows["speed"].startswith("3,7")
    assert rows["time"].startswith("44 min")
    assert rows["cost"].startswith("5.9 device-hours: 14.7")
    assert "is not here" in rows["data"]
    assert not Path("runs/gpt2").exists()


def test_mfu_scales_time(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("gpt2", "--on", "h200", "--eval-every", "0", "--data", "/no/where")
    half, quarter = (
        float(plan(capsys, *words, "--mfu", mfu)["speed"].split()[0].replace(",", "")) for mfu in ("0.5", "0.25")
    )
    assert half == pytest.approx(2 * quarter, rel=1e-4)


def test_what_does_not_fit_is_said_after_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--parallel fsdp"):
        plan(capsys, "gpt2-xl", "--on", "8xA100-40GB", "--no-compile", "--n-layer", "96", "--data", "/no/where")
    assert "device-hours" in capsys.readouterr().out


@pytest.mark.parametrize("on", ["8xH1000", "0xH100", "H100x8", "", "-1xH100"])
def test_an_unknown_machine(on: str) -> None:
    with pytest.raises(UserError, match="8xH100"):
        print_plan(parse_args(["gpt2", "--plan", f"--on={on}", "--data", "/no/where"]))


def test_a_machine_needs_a_plan() -> None:
    with pytest.raises(UserError, match="add --plan"):
        parse_args(["gpt2", "--on", "8xH100"])
