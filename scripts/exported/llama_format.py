"""Variants that `transformers` computes as Llama, Arcee or Qwen3, in their names and layout; pure functions, no files.

All three are blocks of RMSNorm, RoPE over whole heads and grouped queries. Llama (Touvron et al. 2023) has SwiGLU,
Arcee an MLP of two matrices, Qwen3 SwiGLU and normalised queries and keys. What they have no words for is folded into
the weights: a scale of the attention scores into the queries, RoPE's direction into the order of each head's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.model.hf_format import ACTIVATION_TO_HF, state_dict_to_hf

Family = Literal["llama", "arcee", "qwen3"]

_ARCHITECTURES: Mapping[Family, str] = {
    "llama": "LlamaForCausalLM",
    "arcee": "ArceeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields that may have any value; one that is yet to be invented must be at its default.
_FREE = {
    *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_kv_head", "position", "rope_theta"),
    *("rope_clockwise", "attention_scale", "activation", "norm", "norm_eps", "qk_norm", "bias", "dropout"),
    "tie_embeddings",
}
_EPS = torch.finfo(torch.float32).eps


def llama_family(config: GPTConfig) -> Family | None:
    """Which of the three computes what this model computes; None: none of them."""
    odd = {field.name for field in fields(config) if getattr(config, field.name) != field.default} - _FREE
    if odd or config.position != "rope" or config.norm != "rmsnorm":
        return None
    if config.qk_norm:
        return "qwen3" if config.activation == "swiglu" and not config.bias else None
    return "llama" if config.activation == "swiglu" else "arcee"


def llama_config(config: GPTConfig, family: Family, eot_token: int | None) -> dict[str, Any]:
    """`config.json` of a model of a family.

    Args:
        config: the model's.
        family: that `llama_family` returned.
        eot_token: begins and ends a document; None: no token does.
    """
    return {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if config.activation == "swiglu" else ACTIVATION_TO_HF[config.activation],
        "max_position_embeddings": config.block_size,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "rms_norm_eps": _EPS if config.norm_eps is None else config.norm_eps,
        "attention_bias": config.bias,
        "attention_dropout": config.dropout,
        **({} if family == "qwen3" else {"mlp_bias": config.bias}),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": eot_token,
        "eos_token_id": eot_token,
        "dtype": "float32",
    }


def state_dict_to_llama(state: Mapping[str, Tensor], config: GPTConfig, family: Family) -> dict[str, Tensor]:
    """Tensors of `GPT.state_dict()` in a family's names and layout, contiguous and on the CPU.

    Args:
        state: unsharded, on any device.
        config: the model's.
        family: that `llama_family` returned.
    """
    given = {name.removeprefix("transformer."): tensor for name, tensor in state_dict_to_hf(state, config).items()}
    scale = 1.0 if config.attention_scale is None else config.attention_scale * config.head_dim**0.5
    # Ours normalises with the machine's ε, Qwen3 with the model's: as much larger rows make up for it.
    eps = _EPS if config.norm_eps is None else config.norm_eps
    qk_gain = (eps / _EPS) ** 0.5 if config.qk_norm else 1.0
    names = {
        **{"wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight"},
        "lm_head.weight": "lm_head.weight",
    }
    tensors = {names[name]: tensor for name, tensor in given.items() if name in names}
    for layer in range(config.n_layer):
        theirs = f"model.layers.{layer}"
        tensors[f"{theirs}.input_layernorm.weight"] = given[f"h.{layer}.ln_1.weight"]
        tensors[f"{theirs}.post_attention_layernorm.weight"] = given[f"h.{layer}.ln_2.weight"]
        for kind in ("weight", "bias") if config.bias else ("weight",):

            def ours(name: str, layer: int = layer, kind: str = kind) -> Tensor:
                """By output row: a matrix as torch.nn.Linear has it, or a bias."""
                tensor = given[f"h.{layer}.{name}.{kind}"]
                return tensor.t() if kind == "weight" else tensor

            rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
            q, k, v = ours("attn.c_attn").split(rows)
            if config.rope_clockwise:
                q, k = _swap_halves(q, config.head_dim), _swap_halves(k, config.head_dim)
            tensors[f"{theirs}.self_attn.q_proj.{kind}"] = q * (qk_gain if config.qk_norm else scale)
            tensors[f"{theirs}.self_attn.k_proj.{kind}"] = k * qk_gain
            tensors[f"{theirs}.self_attn.v_proj.{kind}"] = v
            tensors[f"{theirs}.self_attn.o_proj.{kind}"] = ours("attn.c_proj")
            up = ours("mlp.c_fc")
            if config.activation == "swiglu":
                tensors[f"{theirs}.mlp.gate_proj.{kind}"], up = up.chunk(2)
            tensors[f"{theirs}.mlp.up_proj.{kind}"] = up
            tensors[f"{theirs}.mlp.down_proj.{kind}"] = ours("mlp.c_proj")
        if family == "qwen3":
            tensors[f"{theirs}.self_attn.q_norm.weight"] = torch.full((config.head_dim,), scale)
            tensors[f"{theirs}.self_attn.k_norm.weight"] = torch.ones(config.head_dim)
    return {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}


def _swap_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Each head's halves exchanged, which turns RoPE's direction."""
    return torch.cat([half for head in rows.split(head_dim) for half in head.chunk(2)[::-1]])
