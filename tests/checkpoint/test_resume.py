"""Which settings may change within a run; how a run starts is test_train_resume.py's matter."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gpt2.checkpoint.resume import CHANGEABLE, FIXED, check_config_change, find_start, write_config
from gpt2.config import Config, GPTConfig, RunConfig
from gpt2.errors import UserError

# Every setting of it can be changed by itself.
BASE = Config(model=GPTConfig(position="rope", tie_embeddings=False, logit_softcap=5.0), run=RunConfig(plan=True))


def changed(name: str) -> Config:
    """The default configuration with one setting at another value that is valid by itself."""
    part, field = name.split(".")
    config = BASE
    old = getattr(getattr(config, part), field)
    new = {
        "model.n_head": 6,
        "model.n_kv_head": 1,
        "model.position": "learned",
        "model.full_attention_every": None,
        "model.window": 7,
        "model.activation": "relu",
        "model.norm": "rmsnorm",
        "model.norm_position": "post",
        "model.logit_softcap": 3.0,
        "model.n_embd": 24,
        "model.block_size": 512,
        "data.total_batch_tokens": 1024,
        "optim.optimizer": "muon",
        "optim.schedule": "wsd",
        "optim.muon_qkv": "together",
        "optim.newton_schulz_coefficients": (2.0, -1.5, 0.5),
        "model.rope_fraction": 0.5,
        "model.logit_softcap_form": "algebraic",
        "run.dtype": "fp32",
        "run.parallel": "fsdp",
        "run.on_nonfinite": "skip",
        "run.wandb": "offline",
        "run.hellaswag_data": Path("x"),
        "run.plot_schedule": Path("x"),
        "run.resume": "never",
        "run.init_from": "gpt2",
        "run.device": "cpu",
        "run.mirror": "s3://bucket/run",
        "run.on": "8xH100",
    }.get(name)
    if new is None:
        if isinstance(old, bool):
            new = not old
        elif isinstance(old, float):
            new = old / 2 if old else 0.5
        elif isinstance(old, int):
            new = old + 1
        elif isinstance(old, str):
            new = old + "x"
        elif isinstance(old, Path):
            new = old / "x"
        else:
            new = 3
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: new})})


NAMES = [
    f"{part.name}.{field.name}"
    for part in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), part.name))
    if field.name not in ("full_attention_every", "final_norm")  # only valid with a window, behind post-norm blocks
]


def test_the_lists_name_settings_that_exist() -> None:
    assert set(NAMES) >= CHANGEABLE | FIXED
    assert not CHANGEABLE & FIXED


@pytest.mark.parametrize("name", NAMES)
def test_each_setting(name: str) -> None:
    old, new = BASE, changed(name)
    assert old != new
    allowed = dataclasses.replace(new, run=dataclasses.replace(new.run, allow_config_change=True))
    where = Path("runs/x")
    field = re.escape(name.split(".")[1])
    if name in FIXED or (name.startswith("model.") and name != "model.dropout"):
        for config in (new, allowed):
            with pytest.raises(UserError, match=f"{field} .* → .*; choose another --run for these"):
                check_config_change(old, config, where)
    elif name in CHANGEABLE or name.startswith("optim."):
        with pytest.raises(UserError, match=f"{field} .* → .*--allow-config-change"):
            check_config_change(old, new, where)
        check_config_change(old, allowed, where)
    else:
        check_config_change(old, new, where)
    check_config_change(new, new, where)


def test_the_tokens_of_a_step_are_fixed_where_they_decide_which_tails_are_dropped() -> None:
    old = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, drop_shard_tails=True))
    new = dataclasses.replace(
        old,
        data=dataclasses.replace(old.data, total_batch_tokens=2 * old.data.total_batch_tokens),
        run=dataclasses.replace(old.run, allow_config_change=True),
    )
    with pytest.raises(UserError, match=r"total_batch_tokens \d+ → \d+; choose another --run for these"):
        check_config_change(old, new, Path("runs/x"))


def test_a_configuration_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config in (Config(), changed("run.seed")):
        write_config(config, path)
        assert Config.load(path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("refused", [(tempfile, "TemporaryFile"), (os, "listdir")])
def test_checkpoints_that_cannot_be_kept_are_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[Any, str]
) -> None:
    config = dataclasses.replace(BASE, run=RunConfig(run_dir=tmp_path))
    write_config(config, tmp_path / "config.json")
    (tmp_path / "checkpoints").mkdir()
    assert find_start(config, "", print) is None

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*refused, refuse)  # as for users who are not root
    words = r"cannot keep checkpoints in .*/checkpoints: Permission denied; make it .* or choose another --run"
    with pytest.raises(UserError, match=words):
        find_start(config, "", print)
