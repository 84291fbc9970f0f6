"""Let a model write on, behind a prompt or, where none is given, behind what you type.

python scripts/sample.py -m runs/gpt2 --prompt "Hello, I'm a language model," -n 4
python scripts/sample.py -m gpt2 -f story.txt --temperature 0.8 --top-p 0.95 --stream
python scripts/sample.py -m runs/shakespeare-char
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.distributed.world import pick_device
from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.files import open_plain, user_path
from gpt2.generation.generate import stream
from gpt2.generation.prompt import prompt_tokens
from gpt2.generation.text_stream import TextStream
from gpt2.model.cpu_inference import decoding_copy
from gpt2.model.gpt import GPT, load_pretrained
from gpt2.model.sampling import Sampling, seed_number
from gpt2.precision import resolve_dtype, set_matmul_precision
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.train.memory import device_memory

KEPT = "\n\t"
"""Control characters that a text keeps on its way to the terminal."""

MAX_TEXTS = 10_000
"""They are written side by side, each with keys and values of its own."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="a run, a checkpoint, a transformers directory, or a name on the Hub")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be repeated; all are continued at once; '' begins a document",
    )
    add("-f", "--file", type=user_path, help="read the prompt from a file (- for standard input)")
    add("--special", action="store_true", help="take <|endoftext|> in a prompt as the token, not as characters")
    add("-n", "--num-samples", type=int, default=1, help="texts a prompt [1]")
    add("--max-new-tokens", type=int, default=64, help="[64]")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token [1.0]")
    add("--top-k", type=int, help="only the k likeliest tokens [all]")
    add("--top-p", type=float, help="only the likeliest tokens that together have probability p [all]")
    add("--min-p", type=float, help="only tokens at least so many times as likely as the likeliest [all]")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens already in the text get rarer [1.0]")
    add("--seed", type=seed_number, default=0, help="the same seed gives the same texts [0]")
    add("--stream", action="store_true", help="show the text while it is written; one text only")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    add("--dtype", default="auto", choices=["auto", "bf16", "tf32", "fp32"], help="[auto]")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise UserError(f"--num-samples is {args.num_samples}; it must be at least 1")
    if args.num_samples * len(args.prompt or [""]) > MAX_TEXTS:
        raise UserError(f"--num-samples is {args.num_samples}; one call writes at most {MAX_TEXTS:,} texts")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.prompt is not None and args.file:
        raise UserError("give --prompt or --file, not both")
    if args.num_samples > 1 and args.prompt is None and not args.file:
        raise UserError(f"--num-samples {args.num_samples} needs a --prompt or a --file; a conversation has one answer")
    if args.stream and args.num_samples * len(args.prompt or [""]) > 1:
        raise UserError("--stream shows one text; leave out -n, give one --prompt")
    if "" in args.stop:
        raise UserError("--stop is empty, which every text begins with; give the text to stop at")
    return args


def read_prompt(path: Path) -> str:
    """A file's text, without the newline editors put at its end."""
    try:
        text = sys.stdin.read() if str(path) == "-" else io.TextIOWrapper(open_plain(path), "utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt from {path}: {error}") from None
    return text.removesuffix("\n")


def write(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, args: argparse.Namespace, live: bool
) -> list[str]:
    """Continue each prompt; returns the new texts.

    Args:
        live: print the first one while it comes.
    """
    rows = [prompt_tokens(tokenizer, prompt, args.special) for prompt in prompts]
    config, device = model.config, model.wte.weight.device
    longest, context = max(map(len, rows)), config.block_size
    if longest > context:
        raise UserError(
            f"a prompt has {longest:,} tokens, the model's context {context:,}; give the prompt's end alone"
        )
    held = (
        8 * len(rows) * min(context, longest + args.max_new_tokens) * config.n_layer * config.kv_heads * config.head_dim
    )
    memory = device_memory(device)
    if memory is not None and held > memory:
        raise UserError(
            f"the keys and values of {len(rows):,} texts take {held / 2**30:.1f} GiB, but there are "
            f"{memory / 2**30:.1f} GiB; use a smaller --num-samples or --max-new-tokens"
        )
    texts = [TextStream(tokenizer, args.stop) for _ in rows]

    def stop(row: int, token: int) -> bool:
        shown = texts[row].feed(token)
        if live and row == 0:
            print(visible(shown, KEPT), end="", flush=True)
        return texts[row].stopped

    steps = stream(
        model,
        rows,
        sampling,
        max_new_tokens=args.max_new_tokens,
        eot_token=tokenizer.eot_token,
        seed=args.seed,
        stop=stop,
    )
    for _ in steps:
        pass
    for text in texts:
        rest = text.finish()
        if live and text is texts[0]:
            print(visible(rest, KEPT), flush=True)
    return [text.text for text in texts]


def converse(model: GPT, tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Continue every line that is typed, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a text for the model to continue; Ctrl-D ends.", file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.removesuffix("\n")
        if not prompt:
            continue
        try:
            print(visible(prompt, KEPT), end="", flush=True)
            write(model, tokenizer, [prompt], sampling, args, live=True)
        except UserError as error:  # such as a character the model does not know: the next line may do better
            print(f"\nerror: {visible(str(error))}", file=sys.stderr)


def main() -> int:
    """Sample as the command line says."""
    args = parse(sys.argv[1:])
    sampling = Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)
    prompts = [read_prompt(args.file)] if args.file else args.prompt
    device = pick_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    set_matmul_precision(dtype)
    model, tokenizer = load_pretrained(args.model, device)
    if args.file:
        try:
            prompt_tokens(tokenizer, prompts[0], args.special)
        except UserError as error:
            raise UserError(f"{args.file}: {error}") from None
    count = args.num_samples * len(prompts or [""])
    model = decoding_copy(model, torch.bfloat16 if dtype == "bf16" else torch.float32, count)

    if prompts is None:
        converse(model, tokenizer, sampling, args)
        return 0
    wanted = [prompt for prompt in prompts for _ in range(args.num_samples)]
    if args.stream:
        print(visible(wanted[0], KEPT), end="", flush=True)
        write(model, tokenizer, wanted, sampling, args, live=True)
        return 0
    for number, (prompt, text) in enumerate(
        zip(wanted, write(model, tokenizer, wanted, sampling, args, live=False), strict=True)
    ):
        if len(wanted) > 1:
            width = math.ceil(math.log10(len(wanted) + 1))
            print(f"--- {number + 1:>{width}} of {len(wanted)} ---")
        print(visible(prompt + text, KEPT))
    return 0


if __name__ == "__main__":
    run_cli(main, when_full="use fewer prompts or --num-samples at a time, or a smaller model")
