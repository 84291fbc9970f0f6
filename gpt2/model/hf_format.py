"""GPT-2 in the names, layout and configuration of `transformers`, both ways; pure functions, no files.

GPT-2's published files differ from `GPT.state_dict()` in three things: names begin with `transformer.`, linear layers
are stored transposed (OpenAI wrote them as convolutions of width 1, y = x W + b), and the vocabulary is not padded.
Whatever `transformers`' GPT-2 can compute is written as model type "gpt2". Other variants are written with a type of
our own and an activation that does not exist, so that `transformers` refuses them instead of filling gaps at random.
What it has no words for is kept in `config.json` under the key `repro_gpt2`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.files import Count, Number, check
from gpt2.tokens.tokenizer import Tokenizer, tokenizer_to_dict

OUR_KEY = "repro_gpt2"
"""Key of config.json that holds what `transformers` has no words for; also the model type of our own variants."""

ACTIVATION_TO_HF = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
_ACTIVATION_FROM_HF = {
    **{hf: ours for ours, hf in ACTIVATION_TO_HF.items()},
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
}
# Fields that have a place of their own in transformers' config.json, whatever their value.
_IN_HF = {
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "vocab_size",
    "activation",
    "dropout",
    "tie_embeddings",
    "norm_eps",
}
# Fields that transformers need not know: how weights were drawn, and biases, which can be written as zeros.
_OURS_ALONE = {
    *("init_embedding_std", "init_head_std", "init_fan_in_variance", "zero_init_projections", "bias"),
    *("rope_theta", "full_attention_every"),  # say nothing without RoPE or a window, which are not for transformers
}
# Every other field, one that is yet to be invented included, makes a variant unless it is at its default.
# Fields of transformers' that this model computes with one value only.
_FIXED_IN_OURS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_BUFFERS = re.compile(r"^h\.\d+\.attn\.(masked_)?bias$")  # causal masks that old files carry


@dataclass(frozen=True)
class _Fields:
    """What is read of `transformers`' config.json, with its defaults."""

    n_layer: Count = 12
    n_head: Count = 12
    n_embd: Count = 768
    n_positions: Count = 1024
    vocab_size: Count = 50257
    n_inner: Count | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: Number = 0.1
    embd_pdrop: Number = 0.1
    attn_pdrop: Number = 0.1
    layer_norm_epsilon: Number = 1e-5
    tie_word_embeddings: Annotated[bool, Field(strict=True)] = True


def _defaults(config: GPTConfig) -> dict[str, Any]:
    return {field.name: field.default for field in fields(config)}


def not_in_transformers(config: GPTConfig) -> list[str]:
    """What of a variant `transformers`' GPT-2 cannot compute, as "name=value"; empty if it can open the model."""
    values, defaults = asdict(config), _defaults(config)
    if config.kv_heads == config.n_head:
        values["n_kv_head"] = None
    if all(config.layer_window(layer) is None for layer in range(config.n_layer)):
        values["window"] = None
    known = _IN_HF | _OURS_ALONE
    odd = [f"{name}={value}" for name, value in values.items() if name not in known and value != defaults[name]]
    if config.activation not in ACTIVATION_TO_HF:
        odd.append(f"activation={config.activation}")
    return odd


def config_to_hf(config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`config.json` of a model: `transformers`' GPT-2 fields, and ours under the key `repro_gpt2`.

    Args:
        config: the model's.
        tokenizer: the one its tokens are of; None: unknown.
    """
    odd = not_in_transformers(config)
    defaults = _defaults(config)
    ours = {name: value for name, value in asdict(config).items() if name not in _IN_HF and value != defaults[name]}
    if config.norm_eps is None:
        ours["norm_eps"] = None  # transformers has no word for the machine's
    if odd:
        ours["activation"] = config.activation  # its place is taken by the refusal below
    if tokenizer is not None:
        ours["tokenizer"] = tokenizer_to_dict(tokenizer)
    eot = None if tokenizer is None else tokenizer.eot_token
    # GPT2LMHeadModel looks the activation up by name, whatever the model type says: this name makes it stop.
    refusal = f"not GPT-2 but a variant ({', '.join(odd)}): open it with gpt2.GPT.from_pretrained"
    return {
        "model_type": OUR_KEY if odd else "gpt2",
        "architectures": ["ReproGPT2Variant" if odd else "GPT2LMHeadModel"],
        "activation_function": refusal if odd else ACTIVATION_TO_HF[config.activation],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_inner": None if config.mlp_hidden == 4 * config.n_embd else config.mlp_hidden,
        "vocab_size": config.vocab_size,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5 if config.norm_eps is None else config.norm_eps,
        **_FIXED_IN_OURS,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
        OUR_KEY: ours,
    }


def config_from_hf(raw: Mapping[str, Any]) -> GPTConfig:
    """The model that a `config.json` describes.

    Args:
        raw: its contents; absent fields have `transformers`' defaults.

    Raises:
        UserError: another architecture, or a field this model has no counterpart for, by name.
    """
    kind = raw.get("model_type")
    ours = raw.get(OUR_KEY, {})
    if kind not in ("gpt2", OUR_KEY) or not isinstance(ours, Mapping):
        raise UserError(f"config.json describes a model of type {kind!r}; only GPT-2 ('gpt2') can be opened")
    for name, fixed in _FIXED_IN_OURS.items():
        if raw.get(name, fixed) != fixed:
            raise UserError(f"config.json sets {name} to {raw[name]!r}; this model only computes with {fixed!r}")
    own_names = {field.name for field in fields(GPTConfig)} - _IN_HF | {"activation", "norm_eps"}
    unknown = sorted(ours.keys() - own_names - {"tokenizer"})
    if unknown:
        raise UserError(
            f"config.json sets {', '.join(unknown)}, unknown to this version; update this project to open it"
        )
    values: dict[str, Any] = {name: ours[name] for name in own_names & ours.keys()}
    read = check(dict(raw), _Fields, "config.json")
    if "activation" not in ours:
        if read.activation_function not in _ACTIVATION_FROM_HF:
            raise UserError(
                f"config.json sets activation_function to {read.activation_function!r}; known are "
                f"{', '.join(_ACTIVATION_FROM_HF)}"
            )
        values["activation"] = _ACTIVATION_FROM_HF[read.activation_function]
    rates = [read.resid_pdrop, read.embd_pdrop, read.attn_pdrop]
    if len(set(rates)) > 1:
        warnings.warn(
            f"dropout is {rates} in residual, embedding, attention; training on would use the first", stacklevel=2
        )
    values = {
        "norm_eps": read.layer_norm_epsilon,
        **values,
        "n_layer": read.n_layer,
        "n_head": read.n_head,
        "n_embd": read.n_embd,
        "block_size": read.n_positions,
        "vocab_size": read.vocab_size,
        "dropout": read.resid_pdrop,
        "tie_embeddings": read.tie_word_embeddings,
    }
    try:
        config = GPTConfig(**values)
    except TypeError as error:
        raise UserError(f"config.json holds a value of the wrong type: {error}") from None
    if read.n_inner not in (None, config.mlp_hidden):
        raise UserError(f"config.json sets n_inner to {read.n_inner}; this model's MLP is {config.mlp_hidden} wide")
    return config


def state_dict_to_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Tensors of `GPT.state_dict()` in `transformers`' names and layout.

    Args:
        state: unsharded, on any device.
        config: the model's.

    Returns:
        Contiguous tensors on the CPU. Tied weights are there once; without biases, GPT-2's are there as zeros.
    """
    tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if not config.tie_embeddings:
                tensors[name] = tensor[: config.softmax_size]
        elif name == "lm_head.bias":
            tensors[name] = tensor[: config.softmax_size]
        elif name == "wte.weight":
            tensors[f"transformer.{name}"] = tensor[: config.softmax_size]
        else:
            tensors[f"transformer.{name}"] = tensor.t() if _TRANSPOSED.search(name) else tensor
    if not config.bias and not not_in_transformers(config):
        for name, tensor in list(tensors.items()):
            if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[-1])
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def state_dict_from_hf(
    tensors: Mapping[str, Tensor], config: GPTConfig, expected: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The inverse of `state_dict_to_hf`, in fp32, for `GPT.load_state_dict`.

    Old files are understood too: names without `transformer.`, a stored copy of the tied head, causal masks.

    Args:
        tensors: the file's tensors by name.
        config: the model's.
        expected: the model's own names and shapes, as `GPT.state_shapes` returns them.

    Raises:
        UserError: tensors missing, left over, of another shape or not floating-point, by name.
    """
    given = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in given.items() if not _BUFFERS.match(name)}
    if config.tie_embeddings and "wte.weight" in given:
        head = given.setdefault("lm_head.weight", given["wte.weight"])
        if head is not given["wte.weight"] and not torch.equal(head, given["wte.weight"]):
            raise UserError("tie_word_embeddings is true, yet lm_head.weight differs from wte.weight; set it to false")
    if not config.bias:
        for name in [name for name in given if name.endswith(".bias") and name not in expected]:
            if given[name].count_nonzero():
                raise UserError(f"config.json says the model has no biases, yet {name} is not zero")
            del given[name]
    for problem, names in (
        ("missing", sorted(expected.keys() - given.keys())),
        ("not part of this model", sorted(given.keys() - expected.keys())),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"the weights do not fit config.json: {problem}: {shown}")

    state: dict[str, Tensor] = {}
    for name, shape in expected.items():
        tensor = given[name]
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {tensor.dtype} numbers; weights must be floating-point")
        tensor = tensor.float()
        if _TRANSPOSED.search(name) and tensor.ndim == 2:
            tensor = tensor.t().contiguous()
        of_vocabulary = name in ("wte.weight", "lm_head.weight", "lm_head.bias")
        if of_vocabulary and tensor.ndim == len(shape) and tensor.size(0) == config.softmax_size:
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, shape[0] - config.softmax_size))
        if tensor.shape != shape:
            rows = config.softmax_size if of_vocabulary else shape[0]
            wanted = (rows, *shape[1:])
            if _TRANSPOSED.search(name):
                wanted = wanted[::-1]  # as it is in the file
            raise UserError(f"{name} has shape {tuple(given[name].shape)}; config.json asks for {wanted}")
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite numbers; give an earlier checkpoint")
        state[name] = tensor
    if config.tie_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    return state
