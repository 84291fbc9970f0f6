"""`train_gpt2.py gpt2-3.28` against a literal version of the recipe, and what each of its ingredients is worth."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe_oracle
import torch
from repository import ROOT
from small_runs import finish, losses

import train_gpt2
from gpt2.config import Config
from gpt2.model.gpt import GPT
from gpt2.presets import parse_args, presets
from gpt2.tokens.shard_file import ShardWriter
from gpt2.train.optim import describe_groups, make_optimizers

STEPS, BATCH, LENGTH, LAYERS, HEADS = 30, 256, 32, 2, 2
VOCABULARY, PADDED = 150, 192
# The first gradient of a token's bias is BATCH / PADDED less how often the token occurs. Were that 0 but for rounding,
# Adam's first step, which goes by the sign alone, would be a matter of luck. BATCH is a power of two, so that the
# gradients of the mean and of the summed loss, which the embedding has in bf16, are rounded alike.
TURNING = 8  # of a head's 16 pairs
SMALL = [
    *("--n-layer", str(LAYERS), "--n-head", str(HEADS), "--n-embd", "64", "--block-size", str(LENGTH)),
    *("--vocab-size", str(VOCABULARY), "--rope-theta", repr(1024 ** (TURNING / (TURNING - 1)))),
    *("--total-batch-tokens", str(BATCH), "--micro-batch-size", "8", "--adam-eps", repr(1e-10 / BATCH)),
    *("--max-steps", str(STEPS), "--dtype", "fp32", "--device", "cpu", "--no-compile", "--log-every", "1"),
    *("--eval-every", "0", "--hellaswag-limit", "0", "--num-samples", "0", "--checkpoint-every", "0"),
    *("--wandb", "disabled"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in llm.c's format, of lengths that leave tails: 11, 12, 1 and 11 steps."""
    directory = tmp_path_factory.mktemp("data") / "fineweb"
    directory.mkdir()
    random = np.random.default_rng(0)
    for number, size in enumerate([700, 3000, 3073, 300, 3000]):
        walk = np.cumsum(random.integers(0, 4, size)) % VOCABULARY
        name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        with ShardWriter(directory / name, "uint16", size) as writer:
            writer.append(walk.astype(np.uint16))
            writer.finish()
    return directory


def run_literally(data: Path, *changes: str, **options: Any) -> list[float]:
    config = parse_args(["gpt2-3.28", *SMALL, *changes])
    return recipe_oracle.train(
        GPT(config.model).init_weights(config.run.seed).state_dict(),
        sorted(data.glob("*_train_*.bin")),
        n_layer=LAYERS,
        n_head=HEADS,
        batch_tokens=BATCH,
        length=LENGTH,
        steps=STEPS,
        **options,
    )


@pytest.fixture(scope="module")
def literal(data: Path) -> list[float]:
    return run_literally(data)


@pytest.fixture(scope="module")
def exact(data: Path) -> list[float]:
    """The recipe with its embedding in fp32, where no rounding to bf16 hides a difference."""
    return run_literally(data, "--no-bf16-embedding", table=torch.float32)


def curve(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> list[float]:
    """The losses of the real command line's run."""
    words = ["train_gpt2.py", "gpt2-3.28", *SMALL, "--data", str(data), "--run-dir", str(run), *changes]
    monkeypatch.setattr("sys.argv", words)
    assert train_gpt2.main() == 0
    return list(losses(run).values())


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_thirty_steps_are_the_literal_recipes(
    data: Path, tmp_path: Path, literal: list[float], exact: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert literal[0] == pytest.approx(math.log(PADDED), abs=1e-5)  # all columns, the padding's too, are equally likely
    assert literal[-1] < literal[0] - 1
    # In fp32 nothing but the order of sums differs.
    assert difference(curve(tmp_path / "fp32", data, monkeypatch, "--no-bf16-embedding"), exact) <= 1e-6
    # A table in bf16 is rounded in each step, and now and then the order of sums decides which way.
    found = curve(tmp_path / "bf16", data, monkeypatch)
    assert difference(found[:5], literal[:5]) <= 1e-6
    assert difference(found, literal) <= 5e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_follow_the_recipe(data: Path, tmp_path: Path, literal: list[float], parallel: str) -> None:
    words = ["gpt2-3.28", *SMALL, "--micro-batch-size", "2", "--data", str(data), "--run-dir", str(tmp_path)]
    code, output = finish(ROOT / "train_gpt2.py", [*words, "--parallel", parallel], processes=2)
    assert code == 0, output
    # Each process rounds the embedding's gradient to bf16 before they are added up.
    assert difference(list(losses(tmp_path).values()), literal) <= 2e-4


LEFT_OUT: dict[str, tuple[str, ...]] = {
    "head's learning rate": ("--head-learning-rate", "0.015"),
    "embedding's learning rate": ("--embedding-learning-rate", "0.015"),
    "vectors' learning rate": ("--vector-learning-rate", "0.004"),
    "vectors' decay": ("--vector-weight-decay", "0"),
    "head's and embedding's decay": ("--weight-decay", "0"),
    "Muon's decay": ("--muon-weight-decay", "0"),
    "Muon's learning rate": ("--muon-learning-rate", "0.02"),
    "Muon's momentum": ("--muon-momentum", "0.9"),
    "Muon": ("--optimizer", "adamw"),
    "q, k and v apart": ("--muon-qkv", "together"),
    "Newton-Schulz steps": ("--newton-schulz-steps", "5"),
    "Newton-Schulz coefficients": ("--newton-schulz-coefficients", "3.4445", "-4.775", "2.0315"),
    "beta1": ("--beta1", "0.9"),
    "beta2": ("--beta2", "0.99"),
    "epsilon of the summed loss": ("--adam-eps", "1e-8"),
    "schedule": ("--decay-fraction", "0.5"),
    "no warm-up": ("--warmup-steps", "3"),
    "no clipping": ("--grad-clip", "0.5"),
    "embedding norm": ("--no-embedding-norm",),
    "norm": ("--norm", "layernorm", "--norm-eps", "1e-5"),
    "epsilon of the norms": ("--norm-eps", "1e-5"),
    "QK-norm": ("--no-qk-norm",),
    "attention scale": ("--attention-scale", "None"),
    "part of RoPE": ("--rope-fraction", "1"),
    "RoPE's base": ("--rope-theta", "1024"),
    "direction of RoPE": ("--no-rope-clockwise",),
    "head bias": ("--no-head-bias",),
    "form of the softcap": ("--logit-softcap-form", "tanh"),
    "softcap": ("--logit-softcap", "None", "--logit-softcap-form", "tanh"),
    "padding in the softmax": ("--no-softmax-over-padding",),
    "initial embedding": ("--init-embedding-std", "0.02"),
    "initial head": ("--init-head-std", "0.02"),
    "initial matrices": ("--init-fan-in-variance", "None"),
    "initial projections": ("--no-zero-init-projections",),
    "activation": ("--activation", "gelu_tanh"),
    "dropped tails": ("--no-drop-shard-tails",),
    "file order": ("--shuffle",),
}
# Without a bias in the linear layers there is none to learn, and biases start at 0, so this one has a test of its own.


@pytest.mark.parametrize("ingredient", LEFT_OUT)
def test_no_ingredient_can_be_left_out(
    data: Path, tmp_path: Path, exact: list[float], monkeypatch: pytest.MonkeyPatch, ingredient: str
) -> None:
    found = curve(tmp_path, data, monkeypatch, "--no-bf16-embedding", *LEFT_OUT[ingredient])
    assert difference(found, exact) > 4e-6, f"{ingredient} makes no difference"


def test_the_embedding_in_bf16_cannot_be_left_out(literal: list[float], exact: list[float]) -> None:
    assert difference(literal, exact) > 2e-4


def test_the_full_size_is_the_published_one() -> None:
    config = presets()["gpt2-3.28"][1]
    with torch.device("meta"):
        model = GPT(config.model)
    rows, width, layers = 50_304, 768, 12
    per_layer = 4 * (width * width + width) + 2 * width + (4 * width * width + 4 * width) + (4 * width * width + width)
    assert model.num_parameters() == 2 * rows * width + rows + layers * per_layer + 2 * width
    groups = "\n".join(describe_groups(make_optimizers(model, config.optim, torch.device("meta"))))
    for line in (
        "AdamW embedding: 1 tensors, 38,633,472 parameters, peak lr 0.7, weight decay 0.001",
        "AdamW head: 1 tensors, 38,633,472 parameters, peak lr 0.004, weight decay 0.001",
        "peak lr 0.015, weight decay 0.001",
        "Muon matrices: 48 tensors in 72 matrices, 84,934,656 parameters, peak lr 0.025, weight decay 0.05",
    ):
        assert line in groups, groups


@pytest.mark.slow
def test_the_full_size_at_step_0() -> None:
    """Standard deviations of the initial tensors, and the loss of one short row."""
    config = presets()["gpt2-3.28"][1].model
    model = GPT(config).init_weights(1337)
    expected = {"wte.weight": 1.0, "lm_head.weight": 0.0, "c_proj.weight": 0.0, "bias": 0.0}
    for name, parameter in model.named_parameters():
        std = next((value for ending, value in expected.items() if name.endswith(ending)), math.sqrt(0.33 / 768))
        if parameter.ndim == 1 and name.endswith("weight"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.float().std().item() == pytest.approx(std, rel=2e-3), name
    tokens = torch.arange(65)[None] * 700
    loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
    assert loss.item() == pytest.approx(10.8258, abs=5e-4)


def test_the_preset_survives_its_file() -> None:
    config = presets()["gpt2-3.28"][1]
    assert Config.from_dict(config.to_dict()) == config
    for part in fields(Config):
        assert replace(config, **{part.name: getattr(config, part.name)}) == config


def test_a_variant_of_it_is_refused_by_name_for_transformers() -> None:
    from gpt2.model.hf_format import not_in_transformers

    odd: Any = not_in_transformers(presets()["gpt2-3.28"][1].model)
    named = {text.split("=")[0] for text in odd}
    assert {"embedding_norm", "head_bias", "attention_scale", "rope_fraction", "softmax_over_padding"} <= named
    assert {"logit_softcap", "logit_softcap_form", "bf16_embedding", "qk_norm", "norm", "position"} <= named
