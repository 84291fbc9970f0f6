"""A model in the names, layout and configuration of `transformers`, and back; test_pretrained.py does it with files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import (
    config_from_hf,
    config_to_hf,
    not_in_transformers,
    state_dict_from_hf,
    state_dict_to_hf,
)

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 70}


def test_every_field_of_the_model_survives_config_json() -> None:
    odd = GPTConfig(
        n_layer=4, n_head=6, n_embd=48, block_size=32, vocab_size=99, n_kv_head=3, position="rope", rope_theta=77.0,
        window=5, full_attention_every=2, activation="swiglu", norm="rmsnorm", norm_position="post", qk_norm=True,
        final_norm=True, bias=False, dropout=0.25, tie_embeddings=False, logit_softcap=9.0, zero_init_projections=True,
        rope_fraction=0.5, rope_clockwise=True, attention_scale=0.2, norm_eps=None, embedding_norm=True,
        head_bias=True, logit_softcap_form="algebraic", softmax_over_padding=True, init_embedding_std=0.1,
        init_head_std=0.3, init_fan_in_variance=0.5, bf16_embedding=True,
    )  # fmt: skip
    default = GPTConfig()
    assert [f for f in odd.__dataclass_fields__ if getattr(odd, f) == getattr(default, f)] == []  # none forgotten
    assert config_from_hf(json.loads(json.dumps(config_to_hf(odd, None)))) == odd
    assert config_from_hf(json.loads(json.dumps(config_to_hf(default, None)))) == default


def test_a_field_of_a_researchers_own_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that nothing here knows of is stored where it is not at its default, and is not for transformers."""

    @dataclass(frozen=True)
    class Config(GPTConfig):
        attn_sharpness: float = 1.0

    monkeypatch.setattr("gpt2.model.hf_format.GPTConfig", Config)
    assert not_in_transformers(Config(**TINY)) == []
    sharp = Config(**TINY, attn_sharpness=2.0)
    assert not_in_transformers(sharp) == ["attn_sharpness=2.0"]
    raw = json.loads(json.dumps(config_to_hf(sharp, None)))
    assert raw["model_type"] == "repro_gpt2"
    assert config_from_hf(raw) == sharp
    monkeypatch.undo()
    with pytest.raises(UserError, match="attn_sharpness, unknown to this version"):
        config_from_hf(raw)


def test_tensors_that_do_not_fit_are_named() -> None:
    model = GPT(GPTConfig(**TINY)).init_weights(0)
    good = state_dict_to_hf(model.state_dict(), model.config)
    state = state_dict_from_hf(good, model.config, GPT.state_shapes(model.config))
    assert torch.equal(state["wte.weight"], model.wte.weight)
    name = "transformer.h.1.mlp.c_fc.weight"
    for bad, words in (
        ({k: t for k, t in good.items() if k != name}, "missing: h.1.mlp.c_fc.weight"),
        ({**good, "transformer.h.9.extra": torch.zeros(1)}, "not part of this model: h.9.extra"),
        ({**good, name: good[name].t()}, "h.1.mlp.c_fc.weight has shape"),  # an unknown layout: nn.Linear's
        ({**good, name: good[name].to(torch.int8)}, "holds torch.int8 numbers"),
        ({**good, "lm_head.weight": good["transformer.wte.weight"] + 1}, "lm_head.weight differs from wte.weight"),
    ):
        with pytest.raises(UserError, match=words):
            state_dict_from_hf(bad, model.config, GPT.state_shapes(model.config))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"bias": False}, {"activation": "swiglu"}])
def test_the_layout_there_and_back(changes: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**{**TINY, **changes})).init_weights(0)
    config, state = model.config, model.state_dict()
    theirs = state_dict_to_hf(state, config)
    for name, tensor in theirs.items():  # literally: linear layers lie transposed, the vocabulary is not padded
        ours = state.get(name.removeprefix("transformer."))
        if ours is None:
            assert not config.bias
            assert name.endswith(".bias")
            assert not tensor.count_nonzero()
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert torch.equal(tensor, ours.T)
        else:
            assert torch.equal(tensor, ours[: tensor.size(0)])
    assert theirs["transformer.wte.weight"].shape == (70, 32)
    assert ("lm_head.weight" in theirs) == (not config.tie_embeddings)
    back = state_dict_from_hf(theirs, config, GPT.state_shapes(config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
