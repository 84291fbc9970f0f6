"""The report's content and its page, without a browser."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_runs import GPT2, TINY, encode, lines, tiny, write_restarted_run, write_run
from repository import load_script

from gpt2.errors import UserError
from gpt2.metrics.jsonl import MetricsFile
from gpt2.report.content import MAX_POINTS, MAX_SAMPLES, differences, report, thin
from gpt2.report.runs import RecordedRun, open_run


@pytest.fixture(scope="module")
def edu(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return open_run(write_run(tmp_path_factory.mktemp("edu") / "run"))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    directory = tmp_path_factory.mktemp("web") / "run"
    return open_run(write_run(directory, dataset="fineweb", until=1200, learning_rate=1e-3))


def test_content_is_strict_json_of_bounded_size(edu: RecordedRun) -> None:
    content = report([edu], price=2.0, now=0.0)
    assert len(json.dumps(content, allow_nan=False)) < 400_000
    (run,) = content["runs"]
    assert len(run["train"]["loss"]) == MAX_POINTS
    assert {len(values) for values in run["train"].values()} == {MAX_POINTS}
    assert run["train"]["tokens"][-1] == 19073 * 524_288
    assert len(run["samples"]) <= MAX_SAMPLES
    assert run["cost"] == pytest.approx(2.0 * edu.device_seconds / 3600, rel=1e-5)
    assert report([edu])["runs"][0]["cost"] is None


def test_baselines_are_each_for_their_own_runs(edu: RecordedRun, web: RecordedRun, tmp_path: Path) -> None:
    small = open_run(write_run(tmp_path / "small", **tiny(dataset="fineweb")))
    docs = open_run(write_run(tmp_path / "docs", **tiny(model=GPT2)))
    content = report([edu, web, small, docs, web])
    assert [(line["label"], line["value"], line["runs"]) for line in content["baselines"]] == [
        ("GPT-2 124M on FineWeb-Edu", 3.2924, [0]),
        ("GPT-2 124M on FineWeb", 3.4250, [1, 4]),
    ]
    assert content["mixed"]
    assert [(entry["label"].split(",")[0], entry["runs"]) for entry in content["milestones"]] == [
        ("build-nanogpt", [0]),
        ("llm.c", [1, 4]),
    ]
    assert not report([web, web])["mixed"]
    labels = [line["label"] for line in report([small])["hellaswag_lines"]]
    assert labels == ["chance"]  # of no published size
    labels = [line["label"] for line in content["hellaswag_lines"]]
    assert labels == ["GPT-2 124M", "GPT-3 124M", "chance"]


def test_harness_scores_have_baselines_of_their_own(tmp_path: Path) -> None:
    records = lines(until=500)
    for record in records:
        if record["kind"] == "hellaswag":
            record["convention"] = "harness"
    (tmp_path / "metrics.jsonl").write_bytes(encode(records))
    found = {line["label"]: line["value"] for line in report([open_run(tmp_path)])["hellaswag_lines"]}
    assert found == {"GPT-2 124M (harness)": 0.3114, "chance": 0.25}


def test_nothing_evaluated_yet(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", until=40, eval_every=0))
    content = report([run])
    assert content["hellaswag_lines"] == []
    assert content["runs"][0]["best_loss"] is None
    assert content["runs"][0]["samples"] == []


def test_restarts_and_skips_are_told(tmp_path: Path) -> None:
    (run,) = report([open_run(write_restarted_run(tmp_path / "run"))])["runs"]
    assert [(start["step"], start["world_size"]) for start in run["starts"]] == [(0, 8), (500, 4)]
    assert run["skips"] == [{"step": 503, "reason": "nonfinite", "loss": None, "grad_norm": None}]
    assert run["torn"] == 1
    assert run["repeated"] == len(range(510, 900, 10))
    assert run["train"]["step"] == list(range(10, 1501, 10))


def test_differences_name_settings_that_differ_and_not_the_directory(edu: RecordedRun, web: RecordedRun) -> None:
    assert differences([edu.config, web.config]) == [{"name": "optim.learning_rate", "values": [6e-4, 1e-3]}]
    assert differences([edu.config]) == []
    moved = {"run": {"run_dir": "elsewhere"}}
    assert differences([{"run": {"run_dir": "here"}}, moved]) == []
    assert differences([{"a": {"b": 1}}, {"a": {}}]) == [{"name": "a.b", "values": [1, None]}]


def test_thinning_keeps_means_and_peaks() -> None:
    assert thin([1.0, 2.0, 3.0], 3) == [1.0, 2.0, 3.0]
    assert thin([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert thin([1.0, 3.0, 5.0, 7.0], 2, largest=True) == [3.0, 7.0]
    assert thin([math.nan, 3.0, math.inf, 7.0], 2) == [3.0, 7.0]
    assert math.isnan(thin([math.nan, math.nan, 1.0, 1.0], 2)[0])
    values = [float(i) for i in range(1003)]
    parts = thin(values, 10)
    assert len(parts) == 10
    assert parts == sorted(parts)


def run_script(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    result: int = load_script("scripts/report.py").main()
    return result


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", until=1000)
    assert run_script(monkeypatch, run, "--no-png") == 0
    page = (run / "report.html").read_text()
    assert [path.name for path in sorted(run.iterdir())] == ["metrics.jsonl", "report.html"]
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<(img|link rel=.stylesheet|iframe|script src)", page)
    # The samples hold </script>; nothing but the page's own two ends may stand there.
    assert page.count("</script>") == 2
    data = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["runs"][0]["step"] == 1000


def test_the_same_run_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", **tiny())
    out = tmp_path / "sub" / "page.html"
    run_script(monkeypatch, run, run / ".." / "run", "--out", out, "--no-png")
    assert '"title": "run"' in out.read_text()


def test_watch_rewrites_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", **tiny(until=30, end=None))
    file = MetricsFile(run / "metrics.jsonl", print)
    seen: list[bool] = []

    def end() -> None:
        page = run / "report.html"
        while not page.exists():
            time.sleep(0.01)
        seen.append('http-equiv="refresh"' in page.read_text())
        file.write({"kind": "run_end", "step": 30, "time": 0.0, "reason": "stopped", "seconds": {}})
        file.close()

    thread = threading.Thread(target=end)
    thread.start()
    assert run_script(monkeypatch, run, "--watch", "0.05", "--no-png") == 0
    thread.join()
    assert seen == [True]
    page = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page  # a page that is final stays as it is
    assert '"status": "stopped"' in page
    assert capsys.readouterr().out.count("wrote") >= 2


def test_bad_places_and_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", **tiny())
    with pytest.raises(UserError, match="is a directory; name a file"):
        run_script(monkeypatch, run, "--out", tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        run_script(monkeypatch, run, "--out", run / "metrics.jsonl" / "page.html")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a page and is left as it is"):
        run_script(monkeypatch, run, "--out", run / "metrics.jsonl")
    assert (run / "metrics.jsonl").read_bytes() == before
    for price in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(UserError, match=r"argument --price: .*; .* --help lists the options"):
            run_script(monkeypatch, run, "--price", price)


ODD = (math.nan, math.inf, -math.inf, 10**400, 1e308, -1e308, 1e29, -1, 0, True, 2**62)
ODD += ("high", "NaN", "-Infinity", None, [], {}, {"a": [1]}, "\ud800", "\x1b[2J", "$x_{$")  # type: ignore[assignment]


@pytest.mark.parametrize("seed", range(10))
def test_odd_values_leave_a_whole_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)

    def spoiled(value: Any, depth: int = 0) -> Any:
        if not isinstance(value, dict) or not value or depth == 3 or rng.random() < 0.1:
            return rng.choice(ODD)
        key = rng.choice(list(value))
        return {**value, key: spoiled(value[key], depth + 1)}

    first, *others = lines(**tiny())
    written = [first, *(spoiled(line) if rng.random() < 0.5 else line for line in [*others, first])]
    run = tmp_path / rng.choice(("run", "$a$", "a_{b$", "_x", "\x1b[31mred"))
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, written)))
    png = ["--no-png"] if seed % 5 else []
    assert run_script(monkeypatch, run, write_run(tmp_path / "other", **tiny()), "--price", "2", *png) == 0
    page = (run / "report.html").read_text("utf-8")
    data = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "\x1b" not in page
    # A run that goes on from this file reads the same lines.
    file = MetricsFile(run / "metrics.jsonl", lambda text: None)
    file.resume(30, None)
    file.close()


def test_a_model_of_no_known_size_has_no_baseline(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", model=TINY, until=20))
    assert report([run])["baselines"] == []
