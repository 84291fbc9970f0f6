"""Everything a run can be told, as frozen dataclasses, with the presets.

A `Config` that exists is one that makes sense by itself: each part checks its own values when it is built. What
depends on the machine or the data (devices, shards, memory) is checked by `gpt2.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2.errors import UserError

Position = Literal["learned", "rope", "none"]
Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"]
Norm = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of the network. The defaults are GPT-2 124M (Radford et al. 2019)."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Query heads a block; divides n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    block_size: int = 1024
    """Context length, in tokens."""
    vocab_size: int = 50257
    """Tokens the model knows; GPT-2: 256 bytes + 50,000 merges + <|endoftext|>."""
    n_kv_head: int | None = None
    """Key-value heads; None: as many as n_head, 1: multi-query (Shazeer 2019), between: grouped-query
    (Ainslie et al. 2023)."""
    position: Position = "learned"
    """Learned absolute positions, rotary (RoPE, Su et al. 2021), or none (Haviv et al. 2022)."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    window: int | None = None
    """Keys each query sees, itself included (sliding-window attention, Beltagy et al. 2020); None: all."""
    full_attention_every: int | None = None
    """With a window: every k-th block attends to everything all the same (as in GPT-3: 2)."""
    activation: Activation = "gelu_tanh"
    """Non-linearity of the MLP; relu2 is ReLU squared (So et al. 2021), swiglu is gated (Shazeer 2020) and
    keeps the parameter count by a hidden width of 8/3."""
    norm: Norm = "layernorm"
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019)."""
    norm_position: NormPosition = "pre"
    """Normalise what enters a sub-layer (GPT-2) or the sum that leaves it (Vaswani et al. 2017)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys a head (Henry et al. 2020)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    dropout: float = 0.0
    """Probability of dropping an embedding, an attention weight, a residual update; GPT-2's own was 0.1."""
    tie_embeddings: bool = True
    """Share the token embedding with the output head (Press & Wolf 2017)."""
    logit_softcap: float | None = None
    """Squash logits to ±this by tanh (Gemma Team 2024); None: leave them."""
    zero_init_projections: bool = False
    """Start with every block an identity: projections into the residual stream are zero, not N(0, 0.02/√(2L))."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; change one of them",
        )
        kv = self.kv_heads
        _require(
            kv >= 1 and self.n_head % kv == 0,
            f"n_head {self.n_head} is not divisible by n_kv_head {kv}; choose a divisor of n_head",
        )
        _require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"RoPE rotates pairs, but the head dimension n_embd / n_head is {self.head_dim}, an odd number",
        )
        _require(self.rope_theta > 0, f"rope_theta is {self.rope_theta}; it must be positive")
        _require(
            self.window is None or self.window >= 1,
            f"window is {self.window}; each token must see at least itself (1)",
        )
        _require(
            self.full_attention_every is None or (self.window is not None and self.full_attention_every >= 1),
            f"full_attention_every is {self.full_attention_every}; it needs a window and must be at least 1",
        )
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be in [0, 1)")
        _require(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap is {self.logit_softcap}; it must be positive",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with None resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows the embedding has in memory: a multiple of 64, for which matrix products are fastest (50,304)."""
        return -(-self.vocab_size // 64) * 64

    @property
    def mlp_hidden(self) -> int:
        """Width inside the MLP: 4 C, or 8/3 C rounded up to a multiple of 64 for the gated swiglu."""
        if self.activation == "swiglu":
            return -(-8 * self.n_embd // (3 * 64)) * 64
        return 4 * self.n_embd

    def layer_window(self, layer: int) -> int | None:
        """Window of block `layer` (from 0); None where it attends to everything."""
        every = self.full_attention_every
        if self.window is None or self.window >= self.block_size or (every is not None and (layer + 1) % every == 0):
            return None
        return self.window


@dataclass(frozen=True)
class DataConfig:
    """Which tokens a run reads, and how many a step."""

    data: Path = Path("data/fineweb_edu_10B")
    """Directory of token shards, as data/*.py write them; build-nanogpt's and llm.c's load too."""
    micro_batch_size: int = 64
    """Sequences one device passes forward and backward at a time."""
    total_batch_tokens: int = 524_288
    """Tokens a step, over all devices and micro-batches; GPT-2's 0.5 M is 2**19."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split an evaluation reads, from its start; less if the split is smaller."""
    shuffle: bool = True
    """Draw the blocks of an epoch in a seeded random order instead of the file's."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "total_batch_tokens", "val_tokens"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are the 124M recipe."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon (Jordan 2024) for the hidden matrices and AdamW for the rest."""
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices, in units of an update whose root mean square is 0.2."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up; wsd: warm-up, stable, decay."""
    warmup_steps: int = 715
    """Steps of linear warm-up; 715 × 524,288 = 375 M tokens, as GPT-3."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Part of all steps that wsd spends decaying."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on tensors of two or more dimensions only."""
    beta1: float = 0.9
    """AdamW's decay of the first moment a step."""
    beta2: float = 0.95
    """AdamW's decay of the second moment a step."""
    adam_eps: float = 1e-8
    """AdamW's ε, added to the root of the second moment."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    grad_clip: float = 1.0
    """Largest global gradient norm; a longer gradient is scaled down. 0: no clipping."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "adam_eps"):
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be positive")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; it must not be negative")
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} is {value}; it must be in [0, 1)")
        for name in ("min_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; it must be in [0, 1]")
