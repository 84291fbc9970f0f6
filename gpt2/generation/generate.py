"""Writing on: the model's own tokens behind a prompt, many rows at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from gpt2.errors import UserError
from gpt2.model.attention import KVCache
from gpt2.model.attention_kernels import varying_backends
from gpt2.model.cpu_inference import decoding_copy
from gpt2.model.gpt import GPT
from gpt2.model.sampling import Sampling, check_prompts, choose, filter_logits, row_generators


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eot_token: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: left as it is: its mode, its weights, and every random generator in use elsewhere.
        prompts: token ids, one or more per row; rows may differ in length.
        max_new_tokens: most tokens that are added to a row.
        temperature, top_k, top_p, min_p, repetition_penalty: the fields of `gpt2.model.sampling.Sampling`;
            temperature 0 is greedy.
        eot_token: ends its row, as the row's last token; None: rows end by length only.
        seed: decides the draws; row i's depend on the seed and on i.
        dtype: to compute in, with a copy of the weights in it (see `gpt2.model.cpu_inference`); None: autocast's where
            it is on, else the weights' own.
        use_cache: keep keys and values instead of computing them anew for every token; the result is the same but
            for rounding.

    Returns:
        The new tokens of each row. Each depends on the last `block_size` tokens before it.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, a value out of range, logits that are not finite.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    rows: list[list[int]] = [[] for _ in prompts]
    # Every new token is another shape, which blocks compiled for training would be compiled for again.
    with torch.compiler.set_stance("force_eager"):
        for tokens in stream(
            model,
            prompts,
            sampling,
            max_new_tokens=max_new_tokens,
            eot_token=eot_token,
            seed=seed,
            dtype=dtype,
            use_cache=use_cache,
        ):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
    return rows


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eot_token: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    use_cache: bool = True,
    stop: Callable[[int, int], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, None for rows that have ended, until all have; see `generate`.

    Args:
        stop: called with a row's number and its new token; true ends the row behind that token.
    """
    check_prompts(prompts, model.config.vocab_size, max_new_tokens)
    if eot_token is not None and not 0 <= eot_token < model.config.vocab_size:
        raise UserError(f"eot_token {eot_token} is outside the model's vocabulary of {model.config.vocab_size}")
    device = model.wte.weight.device
    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    dtype = dtype or model.dtype
    sharded = isinstance(model, FSDPModule)
    if not sharded:
        model = decoding_copy(model, dtype, len(prompts))
    was_training = model.training
    model.eval()
    try:
        decoder = _Decoder(model, prompts, max_new_tokens, use_cache, dtype)
        generators = row_generators(seed, len(prompts), device)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(seen, prompts, strict=True):
                row[torch.tensor(prompt, device=device)] = True
        running = [True] * len(prompts)
        for _ in range(max_new_tokens):
            # The copy needs no casts; of weights that are spread over processes there is none.
            cast = torch.autocast(device.type, dtype=dtype, enabled=sharded and dtype != torch.float32)
            with cast, varying_backends(device):
                logits = decoder.logits()  # (B, V)
            chosen = choose(filter_logits(logits, sampling, seen), sampling, generators)  # (B,)
            bad = ~logits.sum(dtype=torch.float32).isfinite()  # one NaN or infinity makes it one
            if sharded:  # rounding may differ between processes, but all must end with the same token
                verdict = torch.cat((chosen, bad[None]))
                dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
                chosen, bad = verdict[:-1], verdict[-1]
            tokens: list[int] = chosen.tolist()
            if bad:
                raise UserError("the model's logits are not finite: its weights have diverged or are damaged")
            yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
            for row, token in enumerate(tokens):
                running[row] &= token != eot_token and not (stop is not None and running[row] and stop(row, token))
            if not any(running):
                return
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            decoder.append(chosen)
    finally:
        model.train(was_training)


class _Decoder:
    """The text so far and the keys and values of it.

    Rows of different lengths are padded on the left, so that all end in the same column; a padding column is seen
    by padding only. Once the longest row outgrows the context, its first tokens must go. That moves every position, so
    the cache is worthless from there on, and each step passes the last `block_size` tokens through the model.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        use_cache: bool,
        dtype: torch.dtype,
    ):
        self.model = model
        device = model.wte.weight.device
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)  # (B, width so far)
        lengths = [len(prompt) for prompt in prompts]
        self.padding: Tensor | None = None  # (B,) columns of padding; None where no row has any
        if min(lengths) < width:
            self.padding = torch.tensor([width - length for length in lengths], device=device)
        self.cache: KVCache | None = None
        block_size = model.config.block_size
        if use_cache and width <= block_size:
            room = min(block_size, width + max_new_tokens)
            # A CPU's kernel takes a query over keys and values in bf16 two to five times as long as over fp32, which is
            # worth twice the memory; but autocast, where a sharded model decodes, would turn them into bf16 each time.
            kept = torch.float32 if device.type == "cpu" and not isinstance(model, FSDPModule) else dtype
            self.cache = KVCache(model.config, len(prompts), room, device, kept)

    def append(self, tokens: Tensor) -> None:
        """Put one (B,) token behind each row."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)

    def logits(self) -> Tensor:
        """Logits (B, V) of the token behind each row."""
        if self.cache is not None and self.tokens.size(1) > self.model.config.block_size:
            self.cache = None
        end = self.tokens.size(1)
        start = max(0, end - self.model.config.block_size) if self.cache is None else self.cache.length
        fed = self.tokens[:, start:]  # (B, T)
        positions, mask = None, None
        if self.padding is not None:
            first = start if self.cache is None else 0  # column of the first key
            padding = (self.padding - first).clamp(min=0)[:, None]  # (B, 1) among the keys
            keys = torch.arange(end - first, device=fed.device)[None]  # (1, S)
            queries = keys[:, start - first :]  # (1, T)
            positions = (queries - padding).clamp(min=0)  # (B, T)
            mask = (keys >= padding)[:, None, :] | (queries < padding)[:, :, None]  # (B, T, S)
        hidden = self.model.hidden(fed, positions, mask, self.cache)  # (B, T, C)
        return self.model.logits(hidden[:, -1])
