"""The command `hellaswag.py`, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hellaswag_examples import SHAPES, make_examples, make_model
from repository import ROOT, load_script

from gpt2.config import GPTConfig
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.hellaswag.examples import content_lines
from gpt2.hellaswag.score import evaluate_hellaswag
from gpt2.metrics.reference import wilson
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import gpt2_tokenizer

command = load_script("hellaswag.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and examples."""
    directory = tmp_path_factory.mktemp("hellaswag")
    (directory / "model").mkdir()
    model = make_model(SHAPES["gpt2"])
    save_pretrained(directory / "model", model.state_dict(), model.config, gpt2_tokenizer())
    (directory / "data.jsonl").write_bytes(b"".join(content_lines(make_examples(6))))
    (directory / "bad.jsonl").write_text("{}\n")
    (directory / "empty").mkdir()
    return directory


def start(place: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(place / "cache")}
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "hellaswag.py"), "-d", "cpu", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        check=False,
        timeout=600,
    )


def test_two_processes_report_what_the_library_finds(place: Path) -> None:
    done = start(
        place,
        *("-m", "model", "--data", "data.jsonl", "--json", "out.json", "--per-example", "examples.jsonl"),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((place / "out.json").read_text())
    assert (summary["schema"], summary["processes"], summary["dtype"]) == (1, 2, "fp32")
    lines = [json.loads(line) for line in (place / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    model = make_model(SHAPES["gpt2"])
    alone = World(0, 0, 1, torch.device("cpu"))
    for entry, convention in zip(summary["results"], ("completion", "harness"), strict=True):
        result = evaluate_hellaswag(model, make_examples(6), gpt2_tokenizer(), world=alone, convention=convention)
        assert entry["convention"] == convention
        assert (entry["acc"], entry["acc_norm"]) == (result.acc, result.acc_norm)
        assert entry["acc_norm_stderr"] == pytest.approx(result.acc_norm_stderr)
        assert entry["reference"]["chance"] == 0.25
        low, high = wilson(result.acc_norm, result.labelled)
        assert f"{100 * result.acc_norm:.2f} ({100 * low:.2f} to {100 * high:.2f})" in done.stdout
        theirs = np.array([line[convention]["log_probs"] for line in lines])
        np.testing.assert_allclose(theirs, result.log_probs, rtol=0, atol=1e-4)
        assert [line[convention]["acc_norm_prediction"] for line in lines] == result.predictions_norm.tolist()
    assert done.stdout.count("HellaSwag data.jsonl") == 1  # rank 0 alone speaks


def test_what_a_user_got_wrong_is_one_line(place: Path) -> None:
    done = start(place, "-m", "model", "--data", "bad.jsonl")
    assert done.returncode == 2
    assert done.stderr == "error: bad.jsonl, line 1: activity_label is missing (and 4 more)\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "empty"), "empty"),
        (("-m", "model", "--json", "data.jsonl/out.json"), "cannot write --json data.jsonl/out.json"),
        (("-m", "model", "--per-example", "empty"), "--per-example empty is a directory"),
        (("-m", "model", "--token-budget", "0"), "--token-budget is 0"),
        (("-m", "model", "--limit", "0"), "limit of 0"),
    ],
)
def test_other_mistakes(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "-d", "cpu", "--data", "data.jsonl", *arguments])
    with pytest.raises(UserError, match=message):
        command.main()


def test_figures_stand_beside_the_published_ones_of_their_size() -> None:
    alone = World(0, 0, 1, torch.device("cpu"))
    small = make_model(SHAPES["gpt2"])
    results = {
        convention: evaluate_hellaswag(small, make_examples(3), gpt2_tokenizer(), world=alone, convention=convention)
        for convention in ("completion", "harness")
    }
    with torch.device("meta"):
        shape124 = type(small)(GPTConfig())
    entries = [
        command.entry("a", Path("a"), model, result) for model in (small, shape124) for result in results.values()
    ]
    assert [e["reference"]["gpt2_acc_norm"] for e in entries] == [None, None, 0.2955, 0.3114]
    assert [e["reference"]["gpt2_acc"] for e in entries] == [None, None, None, 0.2892]
    assert [e["reference"]["gpt3"] for e in entries] == [None, None, 0.337, 0.337]
    text = command.results_table(entries)
    assert "31.14" in text
    assert "124.4 M" in text
    assert len({len(line) for line in text.splitlines()}) == 1  # columns
    assert "guessing gives 25.00" in command.notes(entries)[0]

    truncated = entries[0] | {"truncated": 2, "labelled": 1, "acc": None, "acc_norm": None}
    assert "–" in command.results_table([truncated])
    assert "2 examples are longer" in " ".join(command.notes([truncated]))
    assert "2 examples have no label" in " ".join(command.notes([truncated]))
