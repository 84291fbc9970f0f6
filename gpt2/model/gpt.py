"""GPT-2 and its variants: embeddings, blocks, the head, initialisation, parameter and FLOP counts.

Names of modules and parameters are those of OpenAI's checkpoints (wte, wpe, h.0.attn.c_attn, ..., ln_f), so that a
reader of either finds the same thing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.model.attention import CausalSelfAttention, KVCache, rotary_tables
from gpt2.model.attention_kernels import attention_mask, varying_backends
from gpt2.model.hf_format import state_dict_from_hf
from gpt2.model.loss import Softcap, Softmax, linear_cross_entropy, softmax_tiled_
from gpt2.model.pretrained import load_tokenizer, read_model, resolve_model, save_pretrained
from gpt2.model.sampling import Sampling, check_prompts, choose, filter_logits, row_generators
from gpt2.tokens.tokenizer import Tokenizer


def make_norm(config: GPTConfig) -> nn.Module:
    """The configured normalisation over the width."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    assert config.norm_eps is not None  # GPTConfig refuses it
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class MLP(nn.Module):
    """Two matrices with a non-linearity between; swiglu's first one makes the gate too."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        gates = 2 if config.activation == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.mlp_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def activate(self, x: Tensor) -> Tensor:
        """The non-linearity: (..., hidden) to the same, or for swiglu from (..., 2 hidden)."""
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.activation == "gelu":
            return F.gelu(x)
        if self.activation == "relu":
            return F.relu(x)
        if self.activation == "relu2":
            return F.relu(x).square()
        gate, up = x.chunk(2, dim=-1)  # swiglu
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.activate(self.c_fc(x))  # (B, T, hidden)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C); the other arguments are `CausalSelfAttention.forward`'s."""
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, rotary, mask, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rotary, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model.

    `forward` trains and scores; `hidden` and `logits` are its two halves, for those who need only some positions.
    The embedding has `padded_vocab_size` rows in memory. The rows past `vocab_size` are zero and stay zero: the loss
    gives them no probability, hence no gradient, and nothing outside this class sees them. With `softmax_over_padding`
    they take part in the loss; they are never sampled all the same.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block's activations in the backward pass
        self.softmax: Softmax = softmax_tiled_  # the form of it that the loss uses; gpt2.model.compile sets another
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.bf16_embedding:
            self.wte.to(torch.bfloat16)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ln_e = make_norm(config) if config.embedding_norm else nn.Identity()
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # After post-norm blocks the stream is already normalised.
        self.ln_f = make_norm(config) if config.norm_position == "pre" or config.final_norm else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.position == "rope":
            cos, sin = rotary_tables(config)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    @classmethod
    def from_pretrained(cls, spec: str | Path, device: torch.device | str = "cpu") -> GPT:
        """A trained model, in fp32 and evaluation mode.

        Args:
            spec: a run, a checkpoint, a directory of `transformers`' GPT-2, or a name on the Hugging Face Hub ("gpt2").
            device: device of its weights.

        Raises:
            UserError: no such model, or one this class cannot compute.
        """
        directory = resolve_model(spec)
        config, tensors = read_model(directory)
        try:  # before a model is made, which may be larger than the machine
            state = state_dict_from_hf(tensors, config, cls.state_shapes(config))
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None
        model = cls(config)
        model.load_state_dict(state)
        return model.to(device).eval()

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a directory that `from_pretrained` and `transformers` open; its folder is made."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_pretrained(Path(directory), self.state_dict(), self.config, tokenizer)

    @classmethod
    def state_shapes(cls, config: GPTConfig) -> dict[str, torch.Size]:
        """Names and shapes of `state_dict()` of a model that need not exist."""
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in cls(config).state_dict().items()}

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Draw the initial weights; GPT-2's are N(0, 0.02), into the stream N(0, 0.02/√(2L)), biases 0, norms 1.

        The draw depends on the seed and the shape alone, not on the device or on the generators in use elsewhere.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # norms' gains; every bias
                continue
            if name in ("wte.weight", "wpe.weight"):
                std = config.init_embedding_std
            elif name == "lm_head.weight":
                std = config.init_head_std
            else:
                variance = config.init_fan_in_variance
                std = 0.02 if variance is None else (variance / parameter.size(1)) ** 0.5
                if name.endswith("c_proj.weight"):  # 2 L of them add to the stream
                    std = 0.0 if config.zero_init_projections else std / (2 * config.n_layer) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        self.zero_padding_rows()
        return self

    @torch.no_grad()
    def zero_padding_rows(self) -> None:
        """Make the embedding's and the head's rows that mean nothing zero."""
        for parameter in (self.wte.weight, self.lm_head.weight, self.lm_head.bias):
            if parameter is not None:
                parameter[self.config.softmax_size :] = 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; the token embedding's may be smaller (`bf16_embedding`)."""
        return next(self.h[0].parameters()).dtype

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What the head reads: the normalised last state of the residual stream.

        Args:
            tokens: (B, T) ids; T plus what the cache holds is at most `block_size`.
            positions: (B or 1, T); None: consecutive, behind what the cache holds.
            mask: (B or 1, T, S) bool over the S keys, the cache's first: True where a query may look, for padded or
                packed rows. It narrows causality and windows, which then go by position; None: by place in the row.
            cache: earlier keys and values; this call's are appended.

        Returns:
            (B, T, C).
        """
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)[None]  # (1, T)
        key_positions = positions if cache is None else cache.append_positions(positions)  # (B or 1, S)

        x = self.wte(tokens).to(self.dtype)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.ln_e(x)
        x = F.dropout(x, self.config.dropout, self.training)

        rotary = None
        if self.config.position == "rope":
            rotary = (
                self.rotary_cos[positions][:, None],
                self.rotary_sin[positions][:, None],
            )  # (B or 1, 1, T, hs/2)
        windows = [self.config.layer_window(layer) for layer in range(self.config.n_layer)]
        masks: dict[int | None, Tensor | None] = dict.fromkeys(windows)
        if mask is not None:
            masks = {window: attention_mask(positions, key_positions, window, mask) for window in masks}
        for block, window in zip(self.h, windows, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, masks[window], use_reentrant=False)
            else:
                x = block(x, rotary, masks[window], cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) of `hidden` to logits over the real vocabulary, (..., vocab_size)."""
        return self.softcap(self.lm_head(hidden)[..., : self.config.vocab_size])

    @property
    def softcap(self) -> Softcap:
        """What squashes the logits."""
        return Softcap(self.config.logit_softcap, self.config.logit_softcap_form)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            tokens: (B, T) ids.
            targets: (B, T) ids that follow; `gpt2.model.loss.IGNORE` where none counts.

        Returns:
            Logits (B, T, vocab_size), or the *sum* of the negative log-likelihoods in nats over the targets that
            count, fp32: the caller knows over how many tokens, in all processes, it is to be averaged.
        """
        hidden = self.hidden(tokens)
        if targets is None:
            return self.logits(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            vocab_size=self.config.softmax_size,
            cap=self.softcap,
            softmax=self.softmax,
            bias=self.lm_head.bias,
        )

    @torch.inference_mode()
    def generate(
        self,
        start: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Append `max_new_tokens` tokens to each row of `start`, one after another.

        `gpt2.generate` draws the same tokens; it also takes rows of different lengths, ends them at end-of-text, and
        is faster on a CPU.

        Args:
            start: (B, T) ids, at least one per row; each new token depends on the last `block_size` before it.
            max_new_tokens: tokens to append.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only; None: from all.
            top_p: draw from the likeliest tokens that together reach this probability; None: from all.
            seed: seeds the draws; another seed gives another text.

        Returns:
            (B, T + max_new_tokens) ids, on the model's device.

        Raises:
            UserError: an empty start, an id outside the vocabulary, a value out of range, logits that are not finite.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        device, block_size, was_training = self.wte.weight.device, self.config.block_size, self.training
        tokens = torch.as_tensor(start, device=device)  # (B, T)
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise UserError(f"start is {tokens.dtype} of shape {tuple(tokens.shape)}; give whole numbers, (B, T)")
        check_prompts(tokens.tolist(), self.config.vocab_size, max_new_tokens)
        generators = row_generators(seed, len(tokens), device)
        cache: KVCache | None = KVCache(self.config, len(tokens), block_size, device, self.dtype)
        self.eval()
        try:
            # Every new token is another shape, which blocks compiled for training would be compiled for again.
            with torch.compiler.set_stance("force_eager"), varying_backends(device):
                for _ in range(max_new_tokens):
                    if tokens.size(1) > block_size:
                        cache = None  # dropping the oldest token moves every position
                    seen = 0 if cache is None else cache.length
                    hidden = self.hidden(tokens[:, -block_size:][:, seen:], cache=cache)  # (B, new tokens, C)
                    logits = self.logits(hidden[:, -1])  # (B, V)
                    if not logits.isfinite().all():
                        raise UserError("the model's logits are not finite: its weights have diverged or are damaged")
                    chosen = choose(filter_logits(logits, sampling), sampling, generators)  # (B,)
                    tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        finally:
            self.train(was_training)
        return tokens

    def num_parameters(self) -> int:
        """Parameters a checkpoint holds: tied ones once, the vocabulary's padding not at all."""
        return sum(self.size_of(name, parameter) for name, parameter in self.named_parameters())

    def size_of(self, name: str, parameter: Tensor) -> int:
        """Elements of a named parameter, without the vocabulary's padding."""
        if not name.startswith(("wte.", "lm_head.")):
            return parameter.numel()
        return parameter.numel() // self.config.padded_vocab_size * self.config.softmax_size

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations to train on one token: 6 N + 6 L C T, for causal attention counted once.

        N are the parameters that multiply something: all but embeddings that are only looked up. A window shortens T
        in its blocks. Kaplan et al. 2020 (section 2.1), with attention as in PaLM's appendix B, halved.

        Args:
            length: T, tokens a sequence; None: block_size.
        """
        config = self.config
        T = config.block_size if length is None else length
        n = self.num_parameters() - (self.wpe.weight.numel() if self.wpe is not None else 0)
        if not config.tie_embeddings:
            n -= config.softmax_size * config.n_embd
        attention = 0.0
        for layer in range(config.n_layer):
            window = min(config.layer_window(layer) or T, T)
            keys = window - window * window / (2 * T)  # mean keys that a query sees: T/2 without a window
            attention += 12 * config.n_embd * keys
        return 6 * n + attention


def load_pretrained(spec: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """A model and its tokenizer.

    Args:
        spec: a run, a checkpoint, a directory of `transformers`' GPT-2, or a name on the Hugging Face Hub ("gpt2").
        device: device of the weights, which are in fp32.

    Raises:
        UserError: no such model, one that does not fit this architecture, or one of an unknown vocabulary.
    """
    directory = resolve_model(spec)
    tokenizer = load_tokenizer(directory)
    model = GPT.from_pretrained(directory, device)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(
            f"{directory}: the model has {model.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}; "
            "GPT.from_pretrained opens such a model without a tokenizer"
        )
    return model, tokenizer
