import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from repository import ROOT

from gpt2.config import Config, GPTConfig
from gpt2.errors import UserError
from gpt2.files import user_path
from gpt2.model.gpt import GPT
from gpt2.presets import parse_args, presets


def test_no_words_is_the_124m_recipe():
    config = parse_args([])
    assert config == presets()["gpt2"][1]
    assert config.data.data == Path("data/fineweb_edu_10B")


@pytest.mark.parametrize(
    # Hand arithmetic: V·C + T·C + L·(12·C² + 13·C) + 2·C.
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        assert GPT(presets()[name][1].model).num_parameters() == parameters


def test_the_plain_preset_differs_in_the_recipe_alone():
    modern, plain = (presets()[name][1] for name in ("shakespeare-char", "shakespeare-char-plain"))
    shape = {name: getattr(modern.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    assert plain.model == GPTConfig(**shape)
    assert plain.optim.optimizer == "adamw"
    assert plain.data == modern.data
    assert replace(plain.run, run_dir=modern.run.run_dir) == modern.run


def test_any_field_is_a_flat_flag():
    words = "quickstart --data d --run r --max-steps 200 --micro-batch-size 8 --total-batch-tokens 16384 --seed 1"
    config = parse_args([*words.split(), "--deterministic", "--device", "cpu", "--no-compile"])
    quickstart = presets()["quickstart"][1]
    assert config == Config(
        model=quickstart.model,
        data=replace(quickstart.data, data=Path("d"), micro_batch_size=8, total_batch_tokens=16384),
        optim=quickstart.optim,
        run=replace(
            quickstart.run,
            run_dir=Path("r"),
            max_steps=200,
            seed=1,
            deterministic=True,
            device="cpu",
            compile=False,
        ),
    )


def test_run_is_short_for_run_dir():
    for words in (["--run", "x"], ["--run=x"], ["--run-dir", "x"], ["--run-dir=x"]):
        assert parse_args(["debug", *words]).run.run_dir == Path("x")


def test_config_repeats_a_run(tmp_path):
    import json

    path = tmp_path / "config.json"
    config = parse_args(["debug", "--learning-rate", "0.5"])
    path.write_text(json.dumps(config.to_dict()))
    assert parse_args(["--config", str(path)]) == config
    assert parse_args([f"--config={path}"]) == config
    assert parse_args(["--config", str(path), "--seed", "2"]).run == replace(config.run, seed=2)
    with pytest.raises(UserError, match="not both"):
        parse_args(["debug", "--config", str(path)])
    with pytest.raises(UserError, match="--config needs"):
        parse_args(["--config"])


def test_unknown_words_are_refused():
    with pytest.raises(UserError, match=r"unknown preset 'gpt3'; choose one of gpt2, .*debug"):
        parse_args(["gpt3"])
    with pytest.raises(UserError, match="n_layer is 0"):
        parse_args(["debug", "--n-layer", "0"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rat", "3"], r"--learning-rat, 3; did you mean .*--learning-rate.*\?"),
        (["--nonsense"], "--nonsense;"),
        (["--dtype", "fp8"], r"invalid choice 'fp8' for argument '--dtype'.*'bf16'.*;"),
        (["--max-steps", "abc"], "--max-steps: .*'abc';"),
        (["--max-steps", "9" * 5000], "--max-steps: .*;"),
        (["--run-dir"], "'--run-dir'.*;"),
        (["--run-dir", "/" + "long/" * 40, "--nonsense"], "--nonsense;"),
    ],
)
def test_what_the_command_line_does_not_know_is_one_line(words, said, capsys):
    with pytest.raises(UserError) as refused:
        parse_args(["debug", *words])
    message = str(refused.value)
    assert re.search(said + r" train_gpt2\.py debug --help lists the settings$", message), message
    assert len(message) < 500
    assert not re.search("[\n╭│─]", message)
    assert capsys.readouterr() == ("", "")  # it is told by run_cli, once


def test_only_rank_0_helps(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse_args(["debug", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr() == ("", "")


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["quickstart", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in Config().to_dict().values():
        for name in part:
            assert f"--{name.replace('_', '-')}" in text, name
    # A flag is followed by an explanation, not by the next flag or the end of its box.
    lines = [line.strip("│ ") for line in text.splitlines()]
    for line, following in itertools.pairwise(lines):
        if re.fullmatch(r"--[a-z][\w-]*(, --[\w-]+)?( \S+)?", line):
            assert following, line
            assert not following.startswith(("--", "╰")), line
    for name in presets():
        assert name in text


def test_a_bad_setting_ends_the_program_in_one_line():
    command = [sys.executable, "train_gpt2.py", "gpt2", "--n-head", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: n_embd 768 is not divisible by n_head 7[^\n]+\n", done.stderr), done.stderr


@pytest.mark.parametrize("flag", ["--n-layer 4", "--position=rope", "--n_head 2", "--no-bias", "--vocab-size 65"])
def test_init_from_refuses_a_shape_of_its_own(flag):
    with pytest.raises(UserError, match=r"cannot change; leave one") as error:
        parse_args(["debug", "--init-from", "gpt2", *flag.split()])
    assert flag.split()[0].split("=")[0].replace("_", "-").replace("--no-", "--") in str(error.value)
    assert parse_args(["debug", "--init-from=gpt2", "--block-size", "32", "--dropout", "0.1"]).model.block_size == 32
    assert parse_args(["debug", "--init-from", "None", *flag.split()]).run.init_from is None


def test_a_moved_runs_configuration_means_that_run(tmp_path: Path) -> None:
    stored = presets()["debug"][1]
    for name, is_run in (("moved", True), ("elsewhere", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(stored.to_dict()))
        if is_run:
            (tmp_path / name / "metrics.jsonl").write_text("")
        config = parse_args(["--config", str(tmp_path / name / "config.json")])
        assert config.run.run_dir == (tmp_path / name if is_run else stored.run.run_dir)
    assert parse_args(["--config", str(tmp_path / "moved"), "--run", "other"]).run.run_dir == Path("other")


def test_a_checkpoint_as_configuration_means_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = presets()["debug"][1]
    checkpoint = tmp_path / "run/checkpoints/step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training.json").write_text("{}")
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "run/metrics.jsonl").write_text("")
    (tmp_path / "run/config.json").write_text(json.dumps(stored.to_dict()))
    expected = replace(stored, run=replace(stored.run, run_dir=tmp_path / "run"))
    for path in (tmp_path / "run", checkpoint.parent, checkpoint):
        assert parse_args(["--config", str(path)]) == expected
        monkeypatch.chdir(path)
        assert parse_args(["--config", "."]).run.run_dir.resolve() == tmp_path / "run"
    with pytest.raises(UserError, match=r"step_00000010/config\.json is not .*: it describes a model"):
        parse_args(["--config", str(checkpoint / "config.json")])
    checkpoint.rename(tmp_path / "alone")
    with pytest.raises(UserError, match="there is no configuration at"):
        parse_args(["--config", str(tmp_path / "alone")])


@pytest.mark.parametrize("content", ["{}", '{"modle": {}}', '{"model": {"n_layer": 2}}', "[1]", "[" * 5000])
def test_a_configuration_that_is_not_whole_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a run's configuration: "):
        parse_args(["--config", str(tmp_path / "config.json")])


def test_home_stands_in_every_path_and_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    paths = {"data": "data", "run": "run_dir", "hellaswag-data": "hellaswag_data", "plot-schedule": "plot_schedule"}
    texts = {"init-from": "init_from", "resume": "resume"}
    words = [f"--{flag}=~/here" for flag in paths | texts]
    config = parse_args(["debug", *words, "--sample-prompt=~/here"])
    values = vars(config.data) | vars(config.run)
    for name in paths.values():
        assert values[name] == Path("/home/me/here")
    for name in texts.values():
        assert values[name] == str(Path("/home/me/here"))
    assert config.run.sample_prompt == "~/here"
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_a_run_finds_its_data_from_another_directory_and_after_both_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(at: Path) -> None:
        (at / "data/mine").mkdir(parents=True)
        (at / "runs/mine").mkdir(parents=True)
        (at / "runs/mine/metrics.jsonl").touch()
        config = parse_args(["debug", "--data", "data/mine", "--run", "runs/mine", "--hellaswag-data", "data/x.jsonl"])
        (at / "runs/mine/config.json").write_text(json.dumps(config.to_dict()))
        (at / "runs/mine/environment.json").write_text(json.dumps({"directory": str(at)}))

    make(tmp_path / "old")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = parse_args(["--config", "../old/runs/mine/config.json"])
    assert config.data.data == tmp_path / "old/data/mine"
    assert config.run.hellaswag_data == Path("data/x.jsonl")  # it is nowhere; the message names what was given
    assert config.run.run_dir.resolve() == tmp_path / "old/runs/mine"
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    config = parse_args(["--config", "runs/mine"])
    assert (config.data.data, config.run.run_dir) == (Path("data/mine"), Path("runs/mine"))
    (tmp_path / "new/runs/mine/environment.json").write_text("[]")
    assert parse_args(["--config", "runs/mine"]).data.data == Path("data/mine")
