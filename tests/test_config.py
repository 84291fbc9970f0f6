import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest

from gpt2.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig
from gpt2.errors import UserError


def test_defaults_are_gpt2_124m_and_its_recipe():
    model, data, optim, run = GPTConfig(), DataConfig(), OptimConfig(), RunConfig()
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (12, 12, 768, 1024)
    assert (model.vocab_size, model.padded_vocab_size, model.head_dim) == (50257, 50304, 64)
    assert data.total_batch_tokens == 2**19
    assert (optim.learning_rate, optim.beta1, optim.beta2, optim.adam_eps) == (6e-4, 0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.grad_clip, optim.warmup_steps) == (0.1, 1.0, 715)
    assert optim.min_lr_ratio * optim.learning_rate == pytest.approx(6e-5)
    assert run.max_steps * data.total_batch_tokens == pytest.approx(10e9, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_embd": 100, "n_head": 12}, "n_embd 100 is not divisible by n_head 12"),
        ({"n_kv_head": 5}, "n_head 12 is not divisible by n_kv_head 5"),
        ({"n_kv_head": 0}, "n_kv_head"),
        ({"n_embd": 36, "position": "rope"}, "head dimension n_embd / n_head is 3"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"full_attention_every": 2}, "there is no window"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
    ],
)
def test_impossible_models_are_refused_with_the_value(settings, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DataConfig, {"micro_batch_size": 0}),
        (DataConfig, {"val_tokens": 0}),
        (OptimConfig, {"learning_rate": 0.0}),
        (OptimConfig, {"beta2": 1.0}),
        (OptimConfig, {"min_lr_ratio": 1.5}),
        (OptimConfig, {"grad_clip": -1.0}),
        (OptimConfig, {"warmup_steps": -1}),
        (RunConfig, {"max_steps": 0}),
        (RunConfig, {"keep": 0}),
        (RunConfig, {"eval_every": -1}),
        (RunConfig, {"spike_zscore": 0.0}),
    ],
)
def test_values_out_of_range_are_refused_by_name(kind, settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=rf"{name} is {value}"):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "name", "some"),
    [
        (GPTConfig, "position", "learned, rope, none"),
        (GPTConfig, "activation", "gelu_tanh, gelu, relu, relu2, swiglu"),
        (GPTConfig, "norm", "layernorm, rmsnorm"),
        (GPTConfig, "norm_position", "pre, post"),
        (GPTConfig, "logit_softcap_form", "tanh, algebraic"),
        (OptimConfig, "optimizer", "adamw, muon"),
        (OptimConfig, "muon_qkv", "auto, apart, together"),
        (OptimConfig, "schedule", "cosine, linear, wsd, constant"),
        (RunConfig, "dtype", "auto, bf16, tf32, fp32"),
        (RunConfig, "parallel", "ddp, fsdp"),
        (RunConfig, "on_nonfinite", "stop, skip"),
        (RunConfig, "wandb", "auto, online, offline, disabled"),
    ],
)
def test_misspelt_choices_are_refused_with_the_right_ones(kind, name, some):
    with pytest.raises(UserError, match=f"{name} is 'typo'; choose one of {some}"):
        kind(**{name: "typo"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GPTConfig, {"n_layer": "six"}),
        (GPTConfig, {"n_layer": 6.0}),
        (GPTConfig, {"bias": 1}),
        (GPTConfig, {"window": "all"}),
        (DataConfig, {"data": "here"}),
        (OptimConfig, {"learning_rate": True}),
        (OptimConfig, {"learning_rate": None}),
        (RunConfig, {"run_dir": None}),
    ],
)
def test_values_of_another_type_are_refused_by_name(kind, settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}; it must be of type"):
        kind(**settings)


def test_whole_numbers_are_floats_too():
    assert OptimConfig(learning_rate=1).learning_rate == 1


def test_every_choice_of_the_settings_is_tested_above():
    marks = test_misspelt_choices_are_refused_with_the_right_ones.pytestmark
    tested = {(kind, name) for kind, name, _ in marks[0].args[1]}
    kinds = (GPTConfig, DataConfig, OptimConfig, RunConfig)
    choices = {(k, n) for k in kinds for n, hint in get_type_hints(k).items() if get_origin(hint) is Literal}
    assert tested == choices


def test_a_batch_is_whole_sequences():
    with pytest.raises(UserError, match="total_batch_tokens 1500 is not a multiple of block_size 1024; choose 1024"):
        Config(data=DataConfig(total_batch_tokens=1500))


def test_layer_windows():
    assert GPTConfig(window=2000).layer_window(0) is None  # as long as the context: all of it
    banded = GPTConfig(window=256, full_attention_every=4)
    assert [banded.layer_window(layer) for layer in range(8)] == [256, 256, 256, None] * 2


def test_swiglu_keeps_the_mlps_parameter_count():
    plain, gated = GPTConfig(), GPTConfig(activation="swiglu")
    assert 3 * gated.mlp_hidden == pytest.approx(2 * plain.mlp_hidden, rel=0.03)


def test_round_trip_through_json():
    config = Config(
        model=GPTConfig(n_kv_head=4, window=128, position="rope"),
        data=DataConfig(data=Path("some/where")),
        run=RunConfig(hellaswag_data=Path("h.jsonl"), run_dir=Path("runs/x"), spike_zscore=6.0),
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no configuration at"):
        Config.load(tmp_path / "config.json")
    for content in ("{", "[1]", '{"model": {"n_layer": "many"}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json is not a run's configuration"):
            Config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model": {"n_lair": 3}}')
    with pytest.raises(UserError, match=r"config\.json is not .* n_lair"):
        Config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"optim": {"schedule": "cosin"}}')
    with pytest.raises(UserError, match="schedule is 'cosin'"):
        Config.load(tmp_path / "config.json")


def test_flags_are_flat_so_names_are_unique():
    names = [f.name for part in (GPTConfig, DataConfig, OptimConfig, RunConfig) for f in dataclasses.fields(part)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (GPTConfig, "n_layer", 10**6),
        (GPTConfig, "n_embd", 10**9),
        (GPTConfig, "n_head", 10**9),
        (GPTConfig, "block_size", 4 * 10**9),
        (GPTConfig, "vocab_size", 10**12),
        (DataConfig, "total_batch_tokens", 6 * 10**10),
        (DataConfig, "micro_batch_size", 10**10),
        (RunConfig, "num_samples", 10**9),
        (RunConfig, "sample_tokens", 10**9),
        (RunConfig, "max_steps", 10**15),
        (RunConfig, "keep", 10**400),
    ],
)
def test_small_numbers_that_ask_for_much_are_refused_at_once(kind: Any, name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} "):
        kind(**{name: value})
