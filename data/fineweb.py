"""Turn FineWeb, or text of your own, into GPT-2 token shards.

    python data/fineweb.py                                        # FineWeb-Edu, 10 B tokens, into data/fineweb_edu_10B
    python data/fineweb.py --source 'DIR/*.parquet' --out DIR     # parquet, .jsonl, .txt (.gz, .zst, .bz2, .xz)
    python data/fineweb.py verify DIR                             # re-hash and count all shards
    python data/fineweb.py show DIR                               # what its shards hold, token by token
    python data/fineweb.py show DIR --step 100 --run RUN          # what step 100 of a run learns from
    python data/fineweb.py --part 3/16 ... && ... merge DIR       # on many machines; see scripts/tokenize_slurm.sh

Kill it at any time; the same command continues where it stopped, and the shards are the same to the byte.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.files import user_path
from gpt2.prepare.sources import Source, SourceFile
from gpt2.tokens.dataset import TokenStream
from gpt2.tokens.tokenizer import Tokenizer

_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu", "fineweb": "HuggingFaceFW/fineweb"}
_SHOWN_TOKENS, _SHOWN_PIECES, _SHOWN_TEXT = 100_000, 40, 400
_SHARD_NAMES = {"fineweb-edu": "edufineweb", "fineweb": "fineweb"}  # as build-nanogpt and llm.c call them


def say(text: str) -> None:
    """Print a line with the names of other people's files in it."""
    print(visible(text))


def count(text: str) -> int:
    """A positive number of tokens, written plainly or as 100_000_000, 100M or 1.8B."""
    match = re.fullmatch(r"([\d_,]+(?:\.\d+)?)([kKMB]?)", text)
    unit = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]] if match else 1
    value = Fraction(re.sub("[_,]", "", match[1]) or 0) * unit if match else Fraction(0)
    if not 1 <= value < 2**63 or value.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 100000000, 100M or 1.8B")
    return int(value)


def part(text: str) -> tuple[int, int]:
    """I/N with 1 ≤ I ≤ N."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N ≤ 9999, as in 3/16")
    return int(match[1]), int(match[2])


def make_parser() -> ArgumentParser:
    """Options of the default command."""
    parser = ArgumentParser(
        usage="%(prog)s [options] | %(prog)s verify DIR | %(prog)s show DIR | %(prog)s merge DIR",
        description="Turn FineWeb, or text of your own, into GPT-2 token shards. Run it again to continue.",
        epilog="further commands: `verify DIR` re-reads and checks all shards; `show DIR` prints what they hold; "
        "`merge DIR` joins what --part made. Each has its own --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=_DATASETS, default="fineweb-edu", help="which one, of HuggingFaceFW")
    add("--size", choices=("10B", "100B", "350B"), default="10B", help="its sample of so many tokens")
    add(
        "--source",
        nargs="+",
        metavar="PATHS_OR_REPO",
        help="instead: files, directories, globs (.parquet, .jsonl, .txt), OWNER/NAME[:CONFIG] on the Hugging Face "
        "Hub, or hf://datasets/OWNER/NAME[@REVISION]/GLOB. A line or row is a document, with a string 'text'; so is a "
        "whole plain-text file. Where folders or names tell splits apart, only train is trained on, and validation is "
        "the validation",
    )
    add("--text-column", default="text", metavar="NAME", help="of the texts in parquet and JSON")
    add(
        "--split-on",
        default="",
        metavar="TEXT",
        help="what divides documents in plain text, such as '<|endoftext|>' [each file is one document]",
    )
    add("--revision", metavar="REVISION", help="branch, tag or commit of the data set on the Hub [its default branch]")
    add(
        "--name",
        metavar="NAME",
        help="of the text given with --source; 'fineweb-edu' and 'fineweb' keep their baselines",
    )
    add(
        "--out", type=user_path, metavar="DIR", help="directory of the shards; needed with --source [data/DATASET_SIZE]"
    )
    add("--shard-tokens", type=count, default=100_000_000, metavar="N", help="tokens a training shard")
    add(
        "--val-tokens",
        type=count,
        metavar="N",
        help="tokens for validation, rounded up to whole documents [one shard; 5 %% of the documents where "
        "the corpus is smaller than ten shards]",
    )
    add("--max-tokens", type=count, metavar="N", help="stop after so many tokens in all [no limit]")
    add("--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="processes that tokenize")
    add("--format", choices=("npy", "bin"), default="npy", help="NumPy's format, or llm.c's")
    add("--tokenizer", choices=("gpt2", "char"), default="gpt2", help="GPT-2's BPE, or one id per character")
    add("--part", type=part, metavar="I/N", help="make only the I-th of N parts; when all are made, `merge DIR`")
    add("--keep-downloads", action="store_true", help="keep fetched files in DIR/.fetched after use")
    add("--plot", action="store_true", help="draw the histogram of document lengths into DIR/document_lengths.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 where `verify` finds a fault."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        return verify(_directory("verify", "Re-read and check every shard of a data set.", arguments[1:]))
    if arguments[:1] == ["show"]:
        return show(arguments[1:])
    if arguments[:1] == ["merge"]:
        return merge(_directory("merge", "Join the parts that --part made into one data set.", arguments[1:]))
    return tokenize(make_parser().parse_args(arguments))


def _directory(command: str, description: str, arguments: list[str]) -> Path:
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} {command}", description=description)
    parser.add_argument("directory", type=user_path, metavar="DIR", help="directory of the shards")
    directory: Path = parser.parse_args(arguments).directory
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    return directory


def tokenize(args: argparse.Namespace) -> int:
    """Make the data set, or what is missing of it."""
    from gpt2.prepare.build import prepare
    from gpt2.prepare.download import find_source
    from gpt2.prepare.job import Job, manifest_path
    from gpt2.prepare.workers import Part
    from gpt2.tokens.manifest import load_manifest

    if args.source is not None:
        if args.out is None:
            raise UserError("--source needs --out DIR, the directory for the shards")
        if not re.fullmatch(r"[\w.-]+", args.name or "corpus"):
            raise UserError(f"--name {args.name}: it begins the shards' names; use letters, digits, '.', '_' and '-'")
        addresses, out = args.source, args.out
    else:
        addresses = [f"hf://datasets/{_DATASETS[args.dataset]}/sample/{args.size}T/*.parquet"]
        out = args.out or Path(__file__).parent / f"{args.dataset.replace('-', '_')}_{args.size}"
    which = Part(*args.part) if args.part else None
    path = manifest_path(out, which)
    earlier = load_manifest(path) if path.exists() else None
    recorded = earlier.source if earlier else None
    source = find_source(addresses, recorded, out, args.revision, args.text_column, args.split_on)
    if not args.split_on and any(map(_has_dividers, source.files)):
        say("<|endoftext|> is spelt out in the text; --split-on '<|endoftext|>' makes documents of what it divides")
    name = args.name or (earlier.name if earlier else name_of(source))
    say(f"{source.description}: {len(source.files)} files, {sum(f.size for f in source.files) / 1e9:.3g} GB → {out}")
    if source.validation:
        names = [file.name for file in source.files[: source.validation]]
        say(f"validation is the split of that name: {_listed(names)}")
    for reason, names in groupby(sorted(source.unread, key=lambda item: item[::-1]), key=lambda item: item[1]):
        say(f"not read, {reason}: {_listed([name for name, _ in names])}")
    job = Job(
        directory=out,
        name=name,
        source=source,
        tokenizer=args.tokenizer,
        suffix=f".{args.format}",
        shard_tokens=args.shard_tokens,
        val_tokens=args.val_tokens,
        max_tokens=args.max_tokens,
        workers=args.workers,
        part=which,
        keep_downloads=args.keep_downloads,
    )
    manifest = prepare(job, say)
    _print_statistics(manifest.statistics())
    if args.plot:
        from gpt2.prepare.length_plot import plot_lengths

        say(f"drew {plot_lengths(manifest, out / 'document_lengths.png')}")
    return 0


def name_of(source: Source) -> str:
    """What shards of FineWeb are called, from the Hub, a mirror or parquet files on this machine; "corpus" for others.

    Files are FineWeb's where the path to each of them says so, and their columns and Common Crawl's dumps agree.
    """
    from gpt2.metrics.reference import corpus_of

    places = [f"{file.path} {file.path.resolve()}" if file.path else source.description for file in source.files]
    corpora = {corpus_of(place) for place in places}
    corpus = corpora.pop() if len(corpora) == 1 else None
    if corpus is not None and (first := source.files[0].path) is not None:
        import pyarrow.parquet

        if any(file.kind != "parquet" for file in source.files):
            return "corpus"
        file = pyarrow.parquet.ParquetFile(first)
        if "dump" not in file.schema_arrow.names or ("int_score" in file.schema_arrow.names) != (corpus != "fineweb"):
            return "corpus"
        dumps = next(file.iter_batches(100, columns=["dump"]), None)
        if dumps is None or not all(str(dump).startswith("CC-MAIN-") for dump in dumps.column(0).to_pylist()):
            return "corpus"
    return _SHARD_NAMES.get(corpus or "", "corpus")


def _has_dividers(file: SourceFile) -> bool:
    if file.path is None or file.kind != "text" or file.compression:
        return False
    with open(file.path, "rb") as opened:
        return b"<|endoftext|>\n" in opened.read(1 << 16)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{len(names)} ({', '.join(names[:20])}{more})"


def _print_statistics(statistics: dict[str, object]) -> None:
    for key, value in statistics.items():
        if isinstance(value, dict):
            text = "  ".join(f"{k} {v:,}" for k, v in value.items() if v is not None)
        else:
            text = f"{value:,}" if isinstance(value, int | float) else str(value)
        say(f"  {key.replace('_', ' '):<20} {text}")


def verify(directory: Path) -> int:
    """Check every shard of a data set, print a table, and return 1 where one is not as it should be."""
    from gpt2.tokens.dataset import open_dataset
    from gpt2.tokens.manifest import load_manifest
    from gpt2.tokens.tokenizer import GPT2Tokenizer
    from gpt2.tokens.verify import check_foreign, check_manifest, check_opens, manifests_of

    manifests = [load_manifest(path) for path in manifests_of(directory)]
    faults, shards = [], 0
    if manifests:
        checks = [check_manifest(directory, manifest) for manifest in manifests]
    else:
        dataset = open_dataset(directory)
        gpt2 = dataset.train.dtype.itemsize == 2  # 4-byte ids are of another vocabulary
        limits = (GPT2Tokenizer.n_vocab, GPT2Tokenizer.eot_token) if gpt2 else (None, None)
        checks = [check_foreign(dataset.val.paths + dataset.train.paths, *limits)]
    print(f"{'shard':<40} {'tokens':>13} {'documents':>11} {'largest id':>10}  result")
    for check in (check for group in checks for check in group):
        shards += 1
        result = check.problem or "ok"
        say(f"{check.path.name:<40} {check.tokens:>13,} {check.documents:>11,} {check.largest:>10,}  {result}")
        if check.problem:
            faults.append(check)
    if faults:
        print(f"{len(faults)} of {shards} shards are bad, the first is {faults[0].path}", file=sys.stderr)
        return 1
    unfinished = [manifest for manifest in manifests if not manifest.complete]
    if unfinished:
        print("what is there is good, but the data set is unfinished; run the command that makes it", file=sys.stderr)
        return 1
    problem = "" if any(manifest.part for manifest in manifests) else check_opens(directory)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    what = "their manifest" if manifests else "the format; no manifest says more"
    print(f"all {shards} shards agree with {what}")
    return 0


def show(arguments: Sequence[str]) -> int:
    """Print what shards, or the batch of a step, hold: text, where its tokens end, and what is learned of each."""
    parser = ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} show",
        description="Print what shards, or the sequences of a training step, hold: the text, its tokens, and which "
        "target belongs to which input.",
    )
    add = parser.add_argument
    add("directory", nargs="?", type=Path, metavar="DIR", help="directory of the shards [the run's]")
    add("--step", type=count, metavar="N", help="the N-th step of training, as the log counts [shards are shown]")
    add("--run", type=Path, metavar="RUN", help="whose settings and seed decide a step's sequences [the gpt2 preset]")
    add("--shard", metavar="FILE", help="one shard, by its name [the first of each split]")
    add("--rows", type=count, default=2, metavar="N", help="documents or sequences to show [2]")
    args = parser.parse_args(arguments)

    from gpt2.presets import parse_args
    from gpt2.tokens.dataset import open_dataset
    from gpt2.tokens.loader import Blocks

    if args.directory is None and args.run is None:
        raise UserError("show needs DIR, the directory of the shards, or --run RUN")
    if args.shard and args.step:
        raise UserError("--shard shows a shard, --step a step's sequences from wherever they are; give one of them")
    config = parse_args(["--config", str(args.run)] if args.run else [])
    dataset = open_dataset(args.directory or config.data.data)
    tokenizer = dataset.tokenizer()
    if args.step or args.run:
        step, sequences = args.step or 1, config.sequences_per_step
        blocks = Blocks(
            dataset.train,
            config.model.block_size,
            tokenizer.n_vocab,
            seed=config.run.seed if config.data.shuffle else None,
            step_tokens=config.data.total_batch_tokens if config.data.drop_shard_tails else None,
        )
        first = (step - 1) * sequences
        say(
            f"step {step:,} of {args.run or 'the gpt2 preset'}: {sequences:,} sequences of {config.model.block_size:,} "
            f"tokens, {first:,} sequences read before, epoch {first // blocks.count + 1}, "
            + (f"in the order of seed {config.run.seed}" if config.data.shuffle else "in the order of the shards")
        )
        chosen = blocks.order(np.arange(first, first + min(args.rows, sequences)))
        for number, (start, row) in enumerate(zip(blocks.starts(chosen).tolist(), blocks.read(chosen), strict=True)):
            path, offset = dataset.train.locate(start)
            print()
            say(f"sequence {number + 1} of {sequences:,}: {path.name} from token {offset:,} on")
            _show_tokens(row, tokenizer)
        return 0
    found = False
    for stream in (dataset.val, dataset.train):
        for path, start, end in zip(stream.paths, stream.shard_starts, stream.shard_starts[1:], strict=False):
            if path.name != (args.shard or stream.paths[0].name):
                continue
            found, size = True, min(end - start, _SHOWN_TOKENS)
            tokens = stream.read(start, start + size)
            starts = np.flatnonzero(tokens == tokenizer.eot_token) if tokenizer.eot_token is not None else []
            edges = [edge for edge in [0, *map(int, starts[: args.rows + 1]), size] if edge <= size]
            print()
            say(f"{path.name}: {end - start:,} tokens of {tokens.dtype}, {_percent(end - start, stream)}")
            for begin, stop in list(pairwise(sorted(set(edges))))[: args.rows]:
                whole = "" if stop < size or size == end - start else ", and more"
                say(f"tokens {begin:,} to {stop - 1:,}{whole}")
                _show_tokens(tokens[begin:stop], tokenizer)
    if not found:
        raise UserError(f"{dataset.directory} has no shard {args.shard}; its directory lists them")
    return 0


def _percent(tokens: int, stream: TokenStream) -> str:
    return f"{tokens / len(stream):.1%} of the split's {len(stream):,} in {len(stream.paths)} shards"


def _show_tokens(tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """Text of (n,) tokens, where each of the first ones ends, and what is the target of which input."""
    text = tokenizer.decode(tokens.tolist())
    cut = f" ... ({len(text) - _SHOWN_TEXT:,} more characters)" if len(text) > _SHOWN_TEXT else ""
    print(textwrap.indent(visible(text[:_SHOWN_TEXT], "\n") + cut, "  > ", lambda line: True))
    pieces = [visible(tokenizer.decode([token])) for token in tokens[:_SHOWN_PIECES].tolist()]
    print(f"  tokens: {'|'.join(pieces)}{' ...' if len(tokens) > _SHOWN_PIECES else ''}")
    print(f"  {'when the input ends with':<34} {'id':>6}   the target is")
    for at in range(min(len(tokens) - 1, 8)):
        before = "".join(pieces[max(0, at - 4) : at + 1])[-34:]
        print(f"  {before:<34} {tokens[at]:>6}   '{pieces[at + 1]}' ({tokens[at + 1]})")


def merge(directory: Path) -> int:
    """Write the common manifest of all parts."""
    from gpt2.prepare.build import totals
    from gpt2.tokens.verify import merge_parts

    manifest = merge_parts(directory)
    print(f"{directory}: {totals(manifest)}")
    _print_statistics(manifest.statistics())
    return 0


if __name__ == "__main__":
    run_cli(main)
