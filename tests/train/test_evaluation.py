"""What a run evaluates: validation loss, HellaSwag where it can be scored, samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from small_runs import ALONE, small

from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.train.evaluation import Evaluator


def make(data: Path, run: Path, said: list[str], tokenizer: object = None, **changes: object) -> Evaluator:
    config = small(data, run, **{"eval_every": 1, **changes})
    dataset = open_dataset(data)
    model = GPT(config.model).init_weights(0)
    val = Blocks(dataset.val, config.model.block_size, config.model.vocab_size)
    return Evaluator(config, model, ALONE, "fp32", val, tokenizer or dataset.tokenizer(), said.append)


def test_the_loss_is_recorded_with_the_tokens_it_is_over(char_data: Path, tmp_path: Path) -> None:
    evaluator, metrics = make(char_data, tmp_path, []), MagicMock()
    evaluator.model.train()
    loss = evaluator.evaluate(4, metrics)
    assert metrics.val.call_args.args[:3] == (4, loss, 23 * 64)
    assert loss == pytest.approx(torch.log(torch.tensor(59.0)).item(), abs=0.1)  # of an untrained model
    assert evaluator.model.training
    metrics.hellaswag.assert_not_called()


def test_samples_are_told_one_by_one(char_data: Path, tmp_path: Path) -> None:
    evaluator, metrics = make(char_data, tmp_path, [], num_samples=3, sample_prompt="Ab", sample_tokens=5), MagicMock()
    evaluator.evaluate(4, metrics)
    assert len(metrics.sample.call_args_list) == 3
    step, prompt, text = metrics.sample.call_args.args
    assert (step, prompt, len(text)) == (4, "Ab", 5)


def test_hellaswag_is_left_out_with_a_reason(char_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    evaluator = make(char_data, tmp_path, said, hellaswag_limit=5)
    assert evaluator.examples == ()
    assert said == ["HellaSwag is left out: it needs GPT-2's tokens, and these are of 'char'"]


def test_a_hellaswag_file_that_was_asked_for_must_be_there(char_data: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        make(char_data, tmp_path, [], gpt2_tokenizer(), hellaswag_limit=5, hellaswag_data=missing)


def test_an_evaluation_stops_at_its_next_batch(char_data: Path, tmp_path: Path) -> None:
    evaluator, metrics = (
        make(char_data, tmp_path, [], micro_batch_size=4, num_samples=1, sample_prompt="Ab"),
        MagicMock(),
    )
    evaluator.model.train()
    asked: list[bool] = []

    def must_stop() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    assert evaluator.evaluate(4, metrics, must_stop) is None
    assert asked == [False, False, True]  # of 6 micro-batches
    assert evaluator.model.training
    metrics.val.assert_not_called()
    metrics.sample.assert_not_called()


def test_hellaswag_stops_at_its_next_batch(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, metrics = make(char_data, tmp_path, []), MagicMock()
    evaluator.examples = (MagicMock(),)
    seen: list[int] = []

    def score(*args: object, progress: Callable[[int, int], None], **kwargs: object) -> None:
        for done in range(10):
            seen.append(done)
            progress(done, 10)

    monkeypatch.setattr("gpt2.train.evaluation.evaluate_hellaswag", score)
    assert evaluator.evaluate(4, metrics, lambda: bool(seen)) is None
    assert seen == [0]
    metrics.val.assert_called_once()
    metrics.hellaswag.assert_not_called()
