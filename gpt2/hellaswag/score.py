"""HellaSwag, scored exactly: which of four endings does the model find most likely?

Two conventions are in use, and their figures differ (GPT-2 124M: 29.55 or 31.14), so both are here. "completion" is
that of build-nanogpt and llm.c, "harness" that of EleutherAI's lm-evaluation-harness, task version 1.0.

The four endings of an example share its context, so they share one row, in which the context runs through the model
once:

    context             | ending 0    | ending 1 | ending 2     | ending 3   | padding
    positions 0 … c-1   | c …         | c …      | c …          | c …        |

Each ending sees the context and itself; its positions continue the context's, as if it stood there alone. A row's
last context token predicts the first token of all four, an ending's last token is predicted but never read. Rows of
similar length share a batch, and the head sees only what is scored: over the validation split 1.74 M tokens pass
through the model and 1.24 M through the head, where four padded rows an example would make it 3.66 M through both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.distributed.parallel import whole
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.hellaswag.examples import ENDINGS, Example
from gpt2.hellaswag.rows import Convention, Rows, make_batches, make_rows, pack
from gpt2.model.attention_kernels import varying_backends
from gpt2.model.cpu_inference import PackedLinear, can_pack, scoring_copy
from gpt2.model.gpt import GPT
from gpt2.tokens.tokenizer import GPT2Tokenizer, Tokenizer

CPU_TOKEN_BUDGET = 2048
"""Tokens of a batch. Larger ones are no faster on a CPU, but hold rows of more different lengths: more padding."""
GPU_TOKEN_BUDGET = 16_384
"""The same on a GPU: enough to fill it. Eight of them take 14 batches for the validation split."""


@dataclass(frozen=True)
class Result:
    """What a model made of the examples. Every process holds the same.

    Attributes:
        convention: "completion" or "harness".
        acc: part of the labelled examples whose right ending has the largest sum of log-probabilities.
        acc_norm: the same after dividing by the ending's length, in tokens (completion) or characters (harness). Both
            NaN where no example has a label.
        examples: examples scored.
        labelled: those of them that have a label.
        truncated: examples of which some ending did not fit behind its context, which lost its beginning.
        tokens: tokens through the model, padding included.
        scored: positions through the head.
        seconds: wall time of the evaluation, tokenizing included.
        log_probs: (examples, 4) sums of the endings' log-probabilities, nats.
        lengths: (examples, 4) tokens or characters, what acc_norm divides by.
        predictions: (examples,) the ending acc takes; the first of equals.
        predictions_norm: (examples,) the ending acc_norm takes.
    """

    convention: Convention
    acc: float
    acc_norm: float
    examples: int
    labelled: int
    truncated: int
    tokens: int
    scored: int
    seconds: float
    log_probs: np.ndarray
    lengths: np.ndarray
    predictions: np.ndarray
    predictions_norm: np.ndarray

    @property
    def acc_stderr(self) -> float:
        """Standard error of acc: of a mean of `labelled` draws that are 0 or 1."""
        return _standard_error(self.acc, self.labelled)

    @property
    def acc_norm_stderr(self) -> float:
        """Standard error of acc_norm."""
        return _standard_error(self.acc_norm, self.labelled)


def _standard_error(p: float, n: int) -> float:
    return (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else float("nan")


class Head:
    """Log-probabilities in fp32 from the model's last states, a chunk of positions at a time.

    A product of bf16 matrices comes out rounded to bf16, in steps of 0.5 where GPT-2's logits lie (about -100), though
    a softmax only feels their differences. So for bf16 the vocabulary's mean row is taken off the weight first: it
    shifts all logits of a position alike, and what is left is small and rounded finely.

    Args:
        model: sharded or not; every process must make its Head at the same time.
        dtype: precision of the product.
        chunk: positions at a time; the peak of memory is chunk · vocabulary logits in `dtype`.
        tile: positions at a time in fp32, twice; on a CPU few enough to stay in its cache.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, chunk: int, tile: int):
        weight = whole(model.lm_head.weight.detach())
        self.softmax_size, self.cap = model.config.softmax_size, model.softcap
        bias = model.lm_head.bias
        self.bias = None if bias is None else whole(bias.detach())[: self.softmax_size].float()  # (V,)
        self.chunk, self.tile = chunk, tile
        self.mean: Tensor | None = None
        if dtype != torch.float32:
            weight = weight.float()
            self.mean = weight[: self.softmax_size].mean(dim=0)  # (C,)
            weight = weight - self.mean
        head = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
        head.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # (V, C)
        self.linear = PackedLinear(head, chunk) if weight.device.type == "cpu" and can_pack(dtype) else head
        self.dtype = dtype

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(n, C) states and the (n, k) ids they predict, to (n, k) log-probabilities in nats, fp32."""
        result = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), self.chunk):
            h = hidden[start : start + self.chunk]
            logits = self.linear(h.to(self.dtype))[:, : self.softmax_size]  # (chunk, V)
            capped = self.cap.limit is not None
            shift = (h.float() @ self.mean)[:, None] if capped and self.mean is not None else None  # (chunk, 1)
            for first in range(0, len(h), self.tile):
                rows = slice(first, first + self.tile)
                tile = logits[rows].float()  # (tile, V)
                if self.bias is not None:
                    tile = tile + self.bias
                tile = self.cap(tile if shift is None else tile + shift[rows])
                after = slice(start + first, start + first + len(tile))
                result[after] = tile.log_softmax(dim=1).gather(1, targets[after])
        return result


@torch.no_grad()
def evaluate_hellaswag(
    model: GPT,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    world: World,
    convention: Convention = "completion",
    dtype: torch.dtype = torch.float32,
    token_budget: int | None = None,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Score every example; all processes of `world` must call this together.

    The result does not depend on the number of processes, the budget or the order of the examples. The model's mode
    (train or eval) is as before afterwards, and no random number is drawn.

    Args:
        model: in training or not, its blocks compiled or not, sharded (with `hidden` among FSDP's forward methods) or
            not.
        examples: `load_examples` returns them.
        tokenizer: the model's; must be GPT-2's.
        world: the processes; the model is on their devices.
        convention: "completion" or "harness".
        dtype: precision of matrix products. float32 is exact; bfloat16 rounds, which turns a few close calls. The
            softmax is in fp32 in either.
        token_budget: most tokens, padding included, that one process passes through the model at a time; bounds memory.
            None: CPU_TOKEN_BUDGET or GPU_TOKEN_BUDGET.
        compiled: whether to use the compiled form of blocks that have one, with batches of a few fixed shapes. Without
            it they run uncompiled: one evaluation is over before its shapes would have been compiled.
        progress: called with the number of rows done and their total.

    Raises:
        UserError: there are no examples, tokenizer or model are not of GPT-2's vocabulary, or its scores are NaN.
    """
    started = time.perf_counter()
    if not examples:
        raise UserError("there are no HellaSwag examples to evaluate; give at least one")
    if not isinstance(tokenizer, GPT2Tokenizer) or model.config.vocab_size != tokenizer.n_vocab:
        raise UserError(
            f"HellaSwag needs GPT-2's vocabulary of 50257 tokens, but the model has {model.config.vocab_size} and its "
            f"tokenizer is {tokenizer.name!r}; evaluate a model trained on GPT-2's tokens"
        )
    device = world.device
    on_cpu = device.type == "cpu"
    if token_budget is None:
        token_budget = CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET
    prepared = make_rows(tuple(examples), tokenizer, convention, model.config.block_size)
    rows = prepared.rows
    # Few shapes for the compiler, and rows of masks aligned for a GPU's kernels. On a CPU each shape leaves products
    # that oneDNN has compiled, and holes in the heap that fit no other: 66 shapes in place of 218 take 1 % of padding.
    multiple = 64 if compiled else 4 if on_cpu else 8
    batches = make_batches(np.array([row.length for row in rows]), world.size, token_budget, multiple)

    was_training = model.training
    model.eval()
    try:
        head = Head(model, dtype, chunk=1024 if on_cpu else 2048, tile=16 if on_cpu else 2048)
        # Packing is for the uncompiled; and weights are packed anew for each evaluation, in less than a batch takes.
        scorer = model if compiled else scoring_copy(model, dtype, token_budget)
        own = [[rows[i] for i in batch.members[world.rank :: world.size]] for batch in batches]
        scores = _Scores(head, sum(row.predicting for mine in own for row in mine), device)
        packed: list[tuple[np.ndarray, np.ndarray]] = []  # of each batch: which scores, and of which of its endings
        done = 0
        with (
            torch.compiler.set_stance("default" if compiled else "force_eager"),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            varying_backends(device),
        ):
            for batch, mine in zip(batches, own, strict=True):
                arrays = pack(mine, batch.rows, batch.length)
                packed.append((scores.added * ENDINGS + arrays["scored"], arrays["ending"]))
                moved = {
                    name: torch.from_numpy(arrays[name]).to(device) for name in arrays.keys() - {"scored", "ending"}
                }
                scores.add(_states(scorer, moved), moved["targets"])
                done += len(batch.members)
                if progress is not None:
                    progress(done, len(rows))
            log_probs = scores.finish().flatten().double().cpu().numpy()
    finally:
        model.train(was_training)

    sums = np.zeros(len(examples) * ENDINGS)
    for mine, (places, ending) in zip(own, packed, strict=True):
        slots = [slots for row in mine for slots in row.slots]
        totals = np.bincount(ending, log_probs[places], len(slots))
        for slot, total in zip(slots, totals, strict=True):
            sums[list(slot)] = total
    scored = scores.added
    if world.size > 1:
        sums = world.sum_(torch.from_numpy(sums).to(device)).cpu().numpy()
        scored = int(world.sum_(torch.tensor(scored, device=device)).item())
    if not np.isfinite(sums).all():
        raise UserError("the model's log-probabilities are not finite; its weights are damaged or training diverged")
    return _result(
        examples,
        prepared,
        convention,
        sums.reshape(-1, ENDINGS),
        tokens=sum(batch.rows * batch.length for batch in batches) * world.size,
        scored=scored,
        started=started,
    )


class _Scores:
    """Log-probabilities of all positions that predict something, which pass through the head in whole chunks.

    So the head and its logits, the largest of all, have one shape, whatever the batches': see `evaluate_hellaswag`.

    Args:
        head: the model's head.
        count: positions in all.
        device: the head's.
    """

    def __init__(self, head: Head, count: int, device: torch.device):
        self.head = head
        self.added = self._done = 0
        self._log_probs = torch.empty(count, ENDINGS, device=device)  # fp32
        self._hidden: list[Tensor] = []  # of the positions that wait
        self._targets: list[Tensor] = []

    def add(self, hidden: Tensor, targets: Tensor) -> None:
        """Take the (n, C) states of positions and the (n, 4) ids they predict."""
        self._hidden.append(hidden)
        self._targets.append(targets)
        self.added += len(targets)
        waiting = self.added - self._done
        if waiting >= self.head.chunk:
            self._score(waiting - waiting % self.head.chunk)

    def finish(self) -> Tensor:
        """All log-probabilities (count, 4), nats, in the order in which their positions were added."""
        if self.added > self._done:
            self._score(self.added - self._done)
        return self._log_probs

    def _score(self, n: int) -> None:
        hidden, targets = torch.cat(self._hidden), torch.cat(self._targets)
        with torch.autocast(hidden.device.type, enabled=False):
            self._log_probs[self._done : self._done + n] = self.head.log_probs(hidden[:n], targets[:n])
        self._done += n
        self._hidden, self._targets = [hidden[n:].clone()], [targets[n:].clone()]


def _states(model: GPT, arrays: dict[str, Tensor]) -> Tensor:
    """Last states (n, C) of the positions that predict something, of what `pack` laid out."""
    segments = arrays["segments"]  # (B, T)
    mask = segments[:, None, :] == 0  # every token of the row sees the context
    mask = mask | (segments[:, :, None] == segments[:, None, :])  # (B, T, T)
    hidden = model.hidden(arrays["tokens"], arrays["positions"], mask)  # (B, T, C)
    return hidden.flatten(0, 1)[arrays["heads"]]


def _result(
    examples: Sequence[Example],
    prepared: Rows,
    convention: Convention,
    log_probs: np.ndarray,
    *,
    tokens: int,
    scored: int,
    started: float,
) -> Result:
    with np.errstate(divide="ignore"):  # an ending of no characters has -inf per character, as in the harness
        normalised = log_probs / prepared.lengths
    predictions, predictions_norm = log_probs.argmax(axis=1), normalised.argmax(axis=1)  # the first of equals
    labels = np.array([-1 if example.label is None else example.label for example in examples])
    known = labels >= 0
    labelled = int(known.sum())
    return Result(
        convention=convention,
        acc=float((predictions == labels)[known].mean()) if labelled else float("nan"),
        acc_norm=float((predictions_norm == labels)[known].mean()) if labelled else float("nan"),
        examples=len(examples),
        labelled=labelled,
        truncated=prepared.truncated,
        tokens=tokens,
        scored=scored,
        seconds=time.perf_counter() - started,
        log_probs=log_probs,
        lengths=prepared.lengths,
        predictions=predictions,
        predictions_norm=predictions_norm,
    )
