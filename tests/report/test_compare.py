"""gpt2/report/compare.py against scipy's tests on fixed numbers, and scripts/compare.py as it is used."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import encode, lines, tiny, write_run
from repository import load_script
from scipy import stats

from gpt2.config import Config, RunConfig
from gpt2.errors import UserError
from gpt2.report.compare import (
    INCIDENTAL,
    bands,
    central,
    compared,
    differing,
    estimate,
    group_runs,
    names_of,
    reaches,
    value,
)
from gpt2.report.content import report
from gpt2.report.runs import open_run

A = {0: 2.2290, 1: 2.2164, 2: 2.2093, 3: 2.2201}
B = {0: 2.2059, 1: 2.1926, 2: 2.1995, 3: 2.2010}
C = {0: 2.21, 5: 2.24, 6: 2.19}


def write_group(folder: Path, offsets: dict[int, float], **options: object) -> list[Path]:
    return [
        write_run(folder / f"seed={seed}", **tiny(seed=seed, offset=offset, **options))
        for seed, offset in offsets.items()
    ]


def test_an_estimate_is_students() -> None:
    found = estimate(list(A.values()))
    expected = stats.ttest_1samp(list(A.values()), 0)
    assert (found.n, found.mean) == (4, pytest.approx(2.2187))
    assert found.stderr == pytest.approx(stats.sem(list(A.values())), rel=1e-12)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)
    assert (estimate([1.5]).stderr, estimate([1.5]).interval) == (None, None)


@pytest.mark.parametrize(("lower", "alternative"), [(True, "less"), (False, "greater")])
def test_p_values_and_intervals_are_scipys(lower: bool, alternative: str) -> None:
    a, b, c = (list(values.values()) for values in (A, B, C))
    for found, kind, expected in (
        (compared(A, 2.22, lower_is_better=lower), "target", lambda side: stats.ttest_1samp(a, 2.22, alternative=side)),
        (compared(B, A, lower_is_better=lower), "paired", lambda side: stats.ttest_rel(b, a, alternative=side)),
        (
            compared(C, A, lower_is_better=lower),
            "Welch",
            lambda side: stats.ttest_ind(c, a, equal_var=False, alternative=side),
        ),
    ):
        assert found.kind == kind
        assert found.p == pytest.approx(expected(alternative).pvalue, rel=1e-9)
        interval = tuple(expected("two-sided").confidence_interval(0.95))
        shift = 2.22 if kind == "target" else 0.0
        assert found.difference.interval == pytest.approx([end - shift for end in interval], abs=1e-12)


def test_the_smallest_difference_is_where_p_becomes_0_05() -> None:
    for other in (A, C):
        found = compared(B, other, lower_is_better=True)
        assert found.smallest is not None
        shifted = {seed: x - found.difference.mean - found.smallest for seed, x in B.items()}
        assert compared(shifted, other, lower_is_better=True).p == pytest.approx(0.05)


def test_too_few_or_equal_values_have_no_p() -> None:
    for few, other in (({0: 1.0}, {0: 2.0}), ({0: 1.0}, A), (A, {9: 2.0}), ({0: 1.0}, 2.0)):
        found = compared(few, other, lower_is_better=True)
        assert (found.p, found.smallest, found.difference.stderr) == (None, None, None)
        assert math.isfinite(found.difference.mean)
    same = compared({0: 1.0, 1: 1.5}, {0: 2.0, 1: 2.5}, lower_is_better=True)
    assert (same.p, same.difference.mean, same.difference.stderr) == (None, -1.0, 0.0)


def test_runs_are_grouped_by_everything_but_the_seed(tmp_path: Path) -> None:
    write_group(tmp_path / "a", {0: 0.0, 1: 0.1})
    write_group(tmp_path / "b", {0: 0.0, 1: 0.1}, learning_rate=1e-3)
    write_group(tmp_path / "c", {1: 0.0}, dataset="other")
    write_group(tmp_path / "again", {1: 0.0})
    runs = [open_run(path) for folder in "ab" for path in sorted((tmp_path / folder).iterdir())]
    runs += [open_run(tmp_path / "c" / "seed=1"), open_run(tmp_path / "again" / "seed=1")]
    groups, left_out = group_runs(runs)
    assert [sorted(group.runs) for group in groups] == [[0, 1], [0, 1], [1]]
    assert [run.directory for run in left_out] == [tmp_path / "again" / "seed=1"]
    assert differing(groups[1], groups[0]) == {"learning_rate": 1e-3}
    assert central(groups) is groups[0]
    assert names_of(groups, groups[0]) == ["baseline", "learning_rate=0.001", "dataset=other"]
    curve = bands(groups[:1], ["a"])[0]
    assert curve["tokens"] == [step * 524_288 for step in (0, 20, 40, 60)]
    ends = [run.records("val")[-1]["loss"] for run in runs[:2]]
    assert curve["loss"][-1] == pytest.approx(sum(ends) / 2)
    assert curve["stderr"][-1] == pytest.approx(0.1 / 2)
    assert [group["n"] for group in report(runs)["groups"]] == [2, 2, 1]
    assert report(runs[::2])["groups"] == []


def test_every_incidental_setting_exists() -> None:
    names = {name for part in Config().to_dict().values() for name in part}
    assert names >= INCIDENTAL
    assert not {"max_steps", "dtype", "compile", "init_from", "spike_zscore"} & INCIDENTAL
    assert set(RunConfig.__dataclass_fields__) >= INCIDENTAL


def test_values_at_a_place_and_the_way_to_a_target(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", **tiny()))
    losses = {record["step"]: record["loss"] for record in run.records("val")}
    assert value(run, "val") == losses[60]
    assert value(run, "val", 40 * 524_288) == value(run, "val", 50 * 524_288) == losses[40]
    assert value(run, "val", 61 * 524_288) is None
    assert value(run, "bits") == pytest.approx(losses[60] / math.log(2) / 4.5)
    assert value(run, "tok_s") == run.tokens_per_second
    step, seconds = reaches(run, losses[40], "val") or (0, 0.0)
    assert (step, seconds) == (40, pytest.approx(0.14 * 40))  # 0.14 s a step, of training alone
    assert reaches(run, losses[60] - 1e-9, "val") is None
    part = open_run(write_run(tmp_path / "part", **tiny(until=40, end="stopped")))
    assert value(part, "val") is None  # it has not come to its end
    assert value(part, "val", 40 * 524_288) == losses[40]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    script = load_script("scripts/compare.py")

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        assert script.main() == 0
        return capsys.readouterr().out

    return run


def test_the_command(tmp_path: Path, compare: Callable[..., str]) -> None:
    write_group(tmp_path / "runs" / "plain", {0: 0.0, 1: 0.1, 2: 0.05})
    write_group(tmp_path / "runs" / "fast", {0: -0.5, 1: -0.41, 2: -0.44}, learning_rate=1e-3)
    write_group(tmp_path / "runs" / "one", {0: 0.3}, learning_rate=1e-2)
    out = compare(tmp_path / "runs", "--baseline", tmp_path / "runs" / "plain", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    fast, plain, one = result["groups"]
    assert [group["name"] for group in result["groups"]] == ["learning_rate=0.001", "baseline", "learning_rate=0.01"]
    expected = stats.ttest_rel([-0.5, -0.41, -0.44], [0.0, 0.1, 0.05], alternative="less")
    assert fast["comparison"]["p"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert (fast["verdict"], plain["verdict"], one["verdict"]) == ("better", "-", "n is too small to say")
    assert "| learning_rate=0.001 | 3 |" in out
    assert "note: 1 of 3 groups are of one run" in out
    losses = fast["values"].values()
    target = compare(tmp_path / "runs" / "fast", "--target", max(losses), "--picture", tmp_path / "bands.png")
    assert "3 of 3" in target
    assert "(target)" in target
    assert (tmp_path / "bands.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(compare(tmp_path / "runs", "--metric", "tok_s", "--json", "-"))["lower_is_better"] is False
    assert "does not count" in compare(tmp_path / "runs", "--metric", "hellaswag", "--tokens", 10**12)
    assert "different data sets" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is neither a run nor a folder of runs"),
        (["runs", "--baseline", "elsewhere"], "none of the compared runs"),
        (["runs", "--tokens", "0"], "--tokens is 0"),
        (["runs", "--metric", "tok_s", "--target", "5"], "--target is not for"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: Callable[..., str]
) -> None:
    write_group(tmp_path / "runs", {0: 0.0})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        compare(*words)


@pytest.mark.parametrize(
    "damage", [{"config": None}, {"config": {"run": {"seed": []}, "model": {"vocab_size": []}}}, {}]
)
def test_a_damaged_first_line_does_not_stop_a_comparison(
    damage: dict[str, object], tmp_path: Path, compare: Callable[..., str]
) -> None:
    records = lines(**tiny())
    records[0] |= {"total_steps": "many", **damage}
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "metrics.jsonl").write_bytes(encode(records))
    write_group(tmp_path / "runs", {0: 0.0, 1: 0.1})
    out = compare(tmp_path / "runs")
    assert "baseline" in out
    assert "| 2 |" in out or "is left out" in out
