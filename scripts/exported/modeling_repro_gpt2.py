"""A variant of GPT-2 for `transformers`: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

`scripts/export.py` copies this file beside the weights of a model that no class of `transformers` computes. It needs
torch and transformers alone. What of GPT-2 a model changes stands in config.json under the key `repro_gpt2`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

# Every field this file computes, with GPT-2's value; config.json names those that differ.
GPT2 = {
    "n_kv_head": None,  # heads of keys and values; None: as many as of queries
    "position": "learned",  # or "rope", "none"
    "rope_theta": 10_000.0,
    "rope_fraction": 1.0,  # part of each head's pairs that turns
    "rope_clockwise": False,
    "attention_scale": None,  # of the scores; None: 1/sqrt(head dimension)
    "window": None,  # keys a query sees, itself included; None: all
    "full_attention_every": None,  # with a window, every k-th block sees everything
    "activation": "gelu_tanh",  # or "gelu", "relu", "relu2", "swiglu"
    "norm": "layernorm",  # or "rmsnorm"
    "norm_position": "pre",  # or "post"
    "final_norm": False,  # with post-norm: once more before the head
    "qk_norm": False,
    "embedding_norm": False,
    "bias": True,
    "head_bias": False,
    "logit_softcap": None,
    "logit_softcap_form": "tanh",  # or "algebraic"
}


class ReproGPT2Config(PretrainedConfig):
    """GPT-2's fields, and under `repro_gpt2` what differs from GPT-2."""

    model_type = "repro_gpt2"
    attribute_map = {  # noqa: RUF012 -- as transformers has it
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=None,
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        repro_gpt2=None,
        **kwargs,
    ):
        self.vocab_size, self.n_positions, self.n_embd = vocab_size, n_positions, n_embd
        self.n_layer, self.n_head, self.n_inner = n_layer, n_head, n_inner
        self.layer_norm_epsilon, self.resid_pdrop = layer_norm_epsilon, resid_pdrop
        self.repro_gpt2 = dict(repro_gpt2 or {})
        unknown = self.repro_gpt2.keys() - GPT2.keys() - {"tokenizer", "norm_eps"}
        if unknown:
            raise ValueError(f"config.json sets {', '.join(sorted(unknown))}, unknown to modeling_repro_gpt2.py")
        super().__init__(**kwargs)

    def variant(self, name):
        """A field of `GPT2`, as this model has it."""
        return self.repro_gpt2.get(name, GPT2[name])


def make_norm(config):
    """LayerNorm or RMSNorm over the width."""
    eps = None if "norm_eps" in config.repro_gpt2 else config.layer_norm_epsilon  # stored there where it is None
    if config.variant("norm") == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=eps)
    return nn.LayerNorm(config.n_embd, eps=eps, bias=config.variant("bias"))


def linear(config, outputs, inputs):
    """y = x W + b; Conv1D holds W as GPT-2's files do, (inputs, outputs)."""
    layer = Conv1D(outputs, inputs)
    if not config.variant("bias"):
        layer.register_parameter("bias", None)
        layer.forward = lambda x: x @ layer.weight
    return layer


class Attention(nn.Module):
    """Causal self-attention with grouped queries, RoPE and a sliding window."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.n_kv_head = config.variant("n_kv_head") or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.scale = config.variant("attention_scale") or self.head_dim**-0.5
        self.qk_norm, self.dropout = config.variant("qk_norm"), config.resid_pdrop
        every = config.variant("full_attention_every")
        self.window = None if every and (layer + 1) % every == 0 else config.variant("window")
        self.widths = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.c_attn = linear(config, sum(self.widths), config.n_embd)
        self.c_proj = linear(config, config.n_embd, config.n_embd)

    def forward(self, x, rotary, allowed, distance, cache):
        """(B, T, C) to (B, T, C); allowed (B or 1, 1, T, S) bool, distance (T, S) in tokens."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.c_attn(x).split(self.widths, dim=-1)
        )  # (B, heads, T, hs)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        k, v = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=self.scale)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + hs/2}) of (B, heads, T, hs) by angles (B or 1, 1, T, hs/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """Two matrices with a non-linearity between; swiglu's first one makes the gate too."""

    def __init__(self, config):
        super().__init__()
        self.activation, self.dropout = config.variant("activation"), config.resid_pdrop
        hidden = config.n_inner or 4 * config.n_embd
        self.c_fc = linear(config, hidden * (2 if self.activation == "swiglu" else 1), config.n_embd)
        self.c_proj = linear(config, config.n_embd, hidden)

    def forward(self, x):
        """(B, T, C) to (B, T, C)."""
        x = self.c_fc(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.activation == "relu2":
            x = F.relu(x).square()
        elif self.activation == "relu":
            x = F.relu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.post_norm = config.variant("norm_position") == "post"
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, *args):
        """(B, T, C) to (B, T, C)."""
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, *args))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), *args)
        return x + self.mlp(self.ln_2(x))


class ReproGPT2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; its tensors have GPT-2's names and layout."""

    config_class = ReproGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        learned = config.variant("position") == "learned"
        last_norm = config.variant("norm_position") == "pre" or config.variant("final_norm")
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({"wpe": nn.Embedding(config.n_positions, config.n_embd)} if learned else {}),
                **({"ln_e": make_norm(config)} if config.variant("embedding_norm") else {}),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                **({"ln_f": make_norm(config)} if last_norm else {}),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.variant("head_bias"))
        self.post_init()

    def get_input_embeddings(self):  # noqa: D102
        return self.transformer["wte"]

    def set_input_embeddings(self, value):  # noqa: D102
        self.transformer["wte"] = value

    def get_output_embeddings(self):  # noqa: D102
        return self.lm_head

    def set_output_embeddings(self, value):  # noqa: D102
        self.lm_head = value

    def rotary(self, positions):
        """cos and sin (B or 1, 1, T, hs/2) of the angles at (B or 1, T) positions; None without RoPE."""
        config = self.config
        if config.variant("position") != "rope":
            return None
        pairs = config.n_embd // config.n_head // 2
        turning = round(config.variant("rope_fraction") * pairs)
        frequencies = torch.zeros(pairs, dtype=torch.float64)
        frequencies[:turning] = config.variant("rope_theta") ** (-torch.arange(turning, dtype=torch.float64) / turning)
        if config.variant("rope_clockwise"):
            frequencies = -frequencies
        angles = positions.cpu().double()[:, None, :, None] * frequencies
        return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits (B, T, V); with labels (B, T) the mean loss of each label after the one before it, -100 left out."""
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        keys = torch.arange(start + x.size(1), device=x.device)  # (S,) slots; the queries are in the last T
        distance = keys[start:, None] - keys  # (T, S)
        allowed = (distance >= 0)[None, None]
        if attention_mask is not None:  # (B, S); padding sees itself, or its softmax would be over nothing
            allowed = allowed & attention_mask[:, None, None, : len(keys)].bool() | (distance == 0)
        if position_ids is None:
            position_ids = keys[None, start:]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start : len(keys)]
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"](position_ids)
        if "ln_e" in self.transformer:
            x = self.transformer["ln_e"](x)
        x = F.dropout(x, self.config.resid_pdrop, self.training)
        rotary = self.rotary(position_ids)
        for block in self.transformer["h"]:
            x = block(x, rotary, allowed, distance, past_key_values)
        if "ln_f" in self.transformer:
            x = self.transformer["ln_f"](x)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x).float()
        if cap := self.config.variant("logit_softcap"):
            algebraic = self.config.variant("logit_softcap_form") == "algebraic"
            logits = cap * logits / (logits**2 + cap**2).sqrt() if algebraic else cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
