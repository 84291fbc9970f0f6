"""What a run evaluates now and then: validation loss, HellaSwag, samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule

from gpt2.allocator import giving_back_memory
from gpt2.config import Config
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.generation.generate import generate
from gpt2.generation.prompt import prompt_tokens
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example, spread
from gpt2.hellaswag.score import evaluate_hellaswag
from gpt2.metrics.recorder import Metrics, NoMetrics
from gpt2.model.gpt import GPT
from gpt2.precision import autocast
from gpt2.tokens.loader import Blocks
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.train.validation import count_val_blocks, count_val_bytes, validation_loss


class _Stopped(Exception):
    pass


class Evaluator:
    """Evaluates the model a run trains; every process has one.

    Args:
        config: the run's.
        model: the GPT itself, compiled or sharded as `parallelize` left it.
        world: the run's processes.
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
        val_blocks: the validation split.
        tokenizer: the data's.
        say: prints a line, on rank 0 alone.

    Raises:
        UserError: the HellaSwag file that was asked for cannot be read, in every process.
    """

    def __init__(
        self,
        config: Config,
        model: GPT,
        world: World,
        dtype: str,
        val_blocks: Blocks,
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ):
        self.config, self.model, self.world, self.dtype = config, model, world, dtype
        self.val_blocks, self.tokenizer = val_blocks, tokenizer
        self.val_tokens = count_val_blocks(val_blocks, config.data.val_tokens) * val_blocks.block_size
        self.val_bytes = 0
        if config.run.eval_every:
            self.val_bytes = world.on_main(lambda: count_val_bytes(val_blocks, config.data.val_tokens, tokenizer))
        self.examples = self._load_examples(say)
        self.seconds: list[float] = []  # of each evaluation made

    def _load_examples(self, say: Callable[[str], None]) -> tuple[Example, ...]:
        """HellaSwag's examples; none if they are not wanted or could not be downloaded."""
        settings = self.config.run
        if settings.hellaswag_limit == 0 or settings.eval_every == 0:
            return ()
        if self.tokenizer.name != "gpt2":
            say(f"HellaSwag is left out: it needs GPT-2's tokens, and these are of {self.tokenizer.name!r}")
            return ()
        try:
            return spread(load_examples(settings.hellaswag_data, world=self.world), settings.hellaswag_limit)
        except UserError as error:
            if settings.hellaswag_data is not None:
                raise
            say(f"HellaSwag is left out: {error}")
            return ()

    def evaluate(
        self, step: int, metrics: Metrics | NoMetrics, must_stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Evaluate the model as it is now; all processes together.

        Args:
            step: steps finished.
            metrics: records what came out.
            must_stop: whether any process was told to stop; asked after each batch, by all of them together.

        Returns:
            Validation loss in nats per token, the same in every process; None if the evaluation was stopped.
        """

        def proceed() -> None:
            if must_stop():
                raise _Stopped

        with torch.no_grad(), giving_back_memory(on=self.world.device.type == "cpu"):
            try:
                began = time.monotonic()
                loss = self._evaluate(step, metrics, proceed)
                self.seconds.append(time.monotonic() - began)
                return loss
            except _Stopped:
                return None
            finally:
                if isinstance(self.model, FSDPModule):
                    self.model.reshard()  # evaluation gathered weights that the next update makes stale

    def _evaluate(self, step: int, metrics: Metrics | NoMetrics, proceed: Callable[[], None]) -> float:
        data = self.config.data
        loss = validation_loss(
            self.model,
            self.val_blocks,
            data.val_tokens,
            data.micro_batch_size,
            self.world,
            partial(autocast, self.world.device, self.dtype),
            proceed,
        )
        metrics.val(step, loss, self.val_tokens, self.val_bytes)
        if self.examples:
            self._score_hellaswag(step, metrics, proceed)
        sharded = isinstance(self.model, FSDPModule)
        if self.config.run.num_samples and (self.world.is_main or sharded):
            self._draw_samples(step, metrics)
        return loss

    def _score_hellaswag(self, step: int, metrics: Metrics | NoMetrics, proceed: Callable[[], None]) -> None:
        """Score HellaSwag's examples; a model without finite scores is only told."""
        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        try:
            result = evaluate_hellaswag(
                self.model,
                self.examples,
                self.tokenizer,
                world=self.world,
                dtype=dtype,
                progress=lambda done, total: proceed(),
            )
        except UserError as error:  # the same in every process
            metrics.message(f"HellaSwag is left out at step {step}: {error}")
            return
        metrics.hellaswag(
            step,
            convention=result.convention,
            acc=result.acc,
            acc_norm=result.acc_norm,
            stderr=result.acc_norm_stderr,
            examples=result.examples,
        )

    def _draw_samples(self, step: int, metrics: Metrics | NoMetrics) -> None:
        """Sample texts. A failure is only reported: rank 0 may be alone here, or all processes meet it together."""
        settings = self.config.run
        try:
            with autocast(self.world.device, self.dtype):
                texts = generate(
                    self.model,
                    [prompt_tokens(self.tokenizer, settings.sample_prompt)] * settings.num_samples,
                    max_new_tokens=settings.sample_tokens,
                    top_k=50,
                    eot_token=self.tokenizer.eot_token,
                    seed=settings.seed,
                )
        except UserError as error:
            metrics.message(f"no samples at step {step}: {error}")
            return
        for text in texts:
            metrics.sample(step, settings.sample_prompt, self.tokenizer.decode(text))
