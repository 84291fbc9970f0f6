import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2.config import Config, DataConfig, GPTConfig, RunConfig
from gpt2.errors import UserError
from gpt2.prepare.small_dataset import write_dataset
from gpt2.presets import presets
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks
from gpt2.tokens.tokenizer import CharTokenizer
from gpt2.train.plan import make_plan, measure_data, with_datas_vocabulary

MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=4)


@pytest.fixture
def dataset(tmp_path):
    tokens = np.tile(np.arange(4, dtype=np.uint16), 100)
    return write_dataset(tmp_path / "data", tokens[:300], tokens[300:], CharTokenizer("abcd"))


def plan_of(dataset, config, world_size=1, memory=None):
    train, val = (Blocks(s, config.model.block_size, config.model.vocab_size) for s in (dataset.train, dataset.val))
    plan = make_plan(config, measure_data(config, dataset, train, val), world_size, "fp32", "cpu", memory)
    plan.refuse_what_does_not_fit(config)
    return plan


def config_of(model=MODEL, micro_batch_size=2, total_batch_tokens=64, val_tokens=1000, **run):
    data = DataConfig(micro_batch_size=micro_batch_size, total_batch_tokens=total_batch_tokens, val_tokens=val_tokens)
    return Config(model=model, data=data, run=RunConfig(**{"max_steps": 10, **run}))


def test_every_derived_number(dataset):
    plan = plan_of(dataset, config_of(), world_size=2)
    assert plan.parameters == 4 * 16 + 8 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert plan.grad_accum_steps == 2  # 64 tokens = 2 processes × 2 sequences × 8 tokens × 2
    assert (plan.sizes.blocks_per_epoch, plan.sizes.leftover_tokens) == (37, 3)  # 299 = 37 · 8 + 3
    assert plan.total_tokens == 640
    assert plan.epochs == pytest.approx(640 / (37 * 8))
    assert plan.sizes.val_tokens == 96  # the split's 99 targets, in whole blocks
    assert plan_of(dataset, config_of(val_tokens=20)).sizes.val_tokens == 16


def test_the_plan_is_told(dataset):
    config = config_of()
    text = "\n".join(plan_of(dataset, config).lines(config, 1, "some CPU", "fp32"))
    words = [
        "weights    drawn from seed 1337",
        "6,784 parameters",
        "64 tokens",
        "10 steps = 640 tokens = 2.16 epochs",
        "some CPU",
    ]
    for word in words:
        assert word in text
    begun = config_of(init_from="gpt2")
    assert "weights    of gpt2" in plan_of(dataset, begun).lines(begun, 1, "some CPU", "fp32")


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "remedy"),
    [(3, 1, "--total-batch-tokens 48 or --micro-batch-size 2"), (8, 2, "--micro-batch-size 4"), (1, 3, "48")],
)
def test_a_batch_that_cannot_be_cut_is_refused_with_one_that_can(dataset, micro_batch_size, world_size, remedy):
    with pytest.raises(UserError, match="total_batch_tokens 64 is not a multiple") as error:
        plan_of(dataset, config_of(micro_batch_size=micro_batch_size), world_size)
    assert remedy in str(error.value)
    # What is proposed works.
    total, micro = (
        re.search(rf"--{flag} (\d+)", str(error.value)) for flag in ("total-batch-tokens", "micro-batch-size")
    )
    assert total is not None
    plan_of(dataset, config_of(micro_batch_size=micro_batch_size, total_batch_tokens=int(total[1])), world_size)
    if micro is not None:
        plan_of(dataset, config_of(micro_batch_size=int(micro[1])), world_size)


def test_another_vocabulary_is_refused(dataset):
    model = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=5)
    with pytest.raises(UserError, match=r"vocabulary of 4, the model has 5; use --vocab-size 4"):
        plan_of(dataset, config_of(model=model))


def test_what_cannot_fit_is_refused_with_what_does(dataset):
    many = config_of(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=8, vocab_size=4), 512, 4096)
    plan = plan_of(dataset, many)
    enough = plan.memory.bytes(512)
    assert "may not suffice" not in "\n".join(plan_of(dataset, many, memory=1.1 * enough).lines(many, 1, "CPU", "fp32"))
    assert "may not suffice" in "\n".join(plan_of(dataset, many, memory=0.9 * enough).lines(many, 1, "CPU", "fp32"))
    with pytest.raises(UserError, match="use a smaller model"):
        plan_of(dataset, many, memory=0.5 * enough)  # most of it is the process itself


def test_the_micro_batch_that_is_advised_fits():
    config = Config(data=DataConfig(micro_batch_size=64))
    plan = make_plan(config, None, 1, "bf16", "cuda", 10 * 2**30)
    with pytest.raises(UserError, match="--micro-batch-size 16,") as error:
        plan.refuse_what_does_not_fit(config)
    assert "about 17" in str(error.value)
    assert plan.memory.bytes(16) <= 0.95 * 10 * 2**30 < plan.memory.bytes(32)


def test_epochs_by_the_thousand_are_warned_of(dataset):
    config = config_of(max_steps=10_000)
    lines = plan_of(dataset, config).lines(config, 1, "CPU", "fp32", Path("runs/a/checkpoints/step_00000003"))
    assert "weights    of runs/a/checkpoints/step_00000003" in lines
    assert any(line.startswith("warning: each token is read 2,162 times") for line in lines)
    steps = int(re.search(r"--max-steps (\d+)", lines[-1])[1])
    assert plan_of(dataset, config_of(max_steps=steps)).epochs == pytest.approx(40, rel=0.01)
    assert not plan_of(dataset, config_of(max_steps=steps)).warnings(0)


def test_a_plan_without_data():
    config = config_of()
    plan = make_plan(config, None, 1, "fp32", "cpu", None)
    assert "python data/fineweb.py` makes it" in "\n".join(plan.lines(config, 1, "CPU", "fp32"))
    assert plan.epochs is None


def test_the_vocabulary_follows_the_data_unless_another_was_asked_for(char_data: Path) -> None:
    said: list[str] = []
    dataset, presets_config = open_dataset(char_data), presets()["shakespeare-char"][1]
    assert with_datas_vocabulary(presets_config, dataset, said.append).model.vocab_size == 59
    assert said == [f"vocabulary 59 ids, as in {char_data}"]
    for part, changes in (("model", {"vocab_size": 60}), ("run", {"init_from": "gpt2"}), ("model", {"vocab_size": 59})):
        asked = replace(presets_config, **{part: replace(getattr(presets_config, part), **changes)})
        assert with_datas_vocabulary(asked, dataset, said.append) is asked
    assert len(said) == 1
