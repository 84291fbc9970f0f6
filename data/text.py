"""Turn text of your own into token shards: each file's beginning is trained on, its last 5 % validated on.

    python data/text.py novel.txt                          # GPT-2's BPE, into data/novel
    python data/text.py notes/ letters.md --out data/mine  # .txt, .text and .md, compressed or not
    python data/text.py novel.txt --tokenizer char         # one id per character, into data/novel_char
    python data/text.py src/ --endings .py .rst            # source code, on request

All of it is held in memory; for more than that, parquet or JSON lines use data/fineweb.py --source.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import user_path
from gpt2.tokens.tokenizer import Tokenizer

_VAL_SHARE = 0.05
_ENDINGS = (".txt", ".text", ".md")
_ROWS = 20  # files that are listed one by one


def make_parser() -> ArgumentParser:
    """Options of this script."""
    parser = ArgumentParser(description="Text of your own as token shards; a finished data set is reused.")
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_DIR", help="text files, directories or patterns")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="[data/NAME of the first path; with _char behind it]"
    )
    parser.add_argument("--tokenizer", choices=("gpt2", "char"), default="gpt2", help="GPT-2's BPE, or characters")
    parser.add_argument("--endings", nargs="+", default=[], metavar=".EXT", help="further endings to read, as .py .c")
    parser.add_argument("--format", choices=("npy", "bin"), default="npy", help="NumPy's format, or llm.c's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data set, or say that it is there."""
    from gpt2.prepare.build import totals
    from gpt2.prepare.small_dataset import reusable, write_dataset
    from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

    args = make_parser().parse_args(argv)
    name = re.sub(r"[^\w.-]", "_", Path(args.paths[0]).resolve().name.split(".")[0]) or "text"
    out = args.out or Path(__file__).parent / (f"{name}_char" if args.tokenizer == "char" else name)
    texts = read_texts(args.paths, [f".{ending.lstrip('.').lower()}" for ending in args.endings], out)
    files = [{"name": n, "id": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"} for n, text in texts.items()]
    digest = hashlib.sha256("".join(file["id"] for file in files).encode()).hexdigest()[:16]
    source = {"description": f"{len(files)} files of text, {digest}", "revision": None, "files": files}
    found = reusable(out, source, args.tokenizer, f".{args.format}")
    if found is not None:
        print(f"{out} is complete and verified: {totals(found)}")
        return 0
    characters = "".join(sorted(set().union(*texts.values())))
    if not characters:
        raise UserError(f"no text in {' '.join(args.paths)}")
    tokenizer: Tokenizer = CharTokenizer(characters) if args.tokenizer == "char" else gpt2_tokenizer()
    halves = {name: halve(tokenizer.encode_array(text), tokenizer) for name, text in texts.items()}
    print(f"{'file':<40} {'tokens':>12} {'training':>9} {'validation':>11}")
    for name, (train, val) in [*halves.items()][:_ROWS]:
        print(_row(name, len(train), len(val)))
    if len(halves) > _ROWS:
        print(f"and {len(halves) - _ROWS} more")
    print(_row("all", *(sum(len(half[i]) for half in halves.values()) for i in (0, 1))))
    eot = np.array([] if tokenizer.eot_token is None else [tokenizer.eot_token], np.uint32)
    train, val = (
        np.concatenate([part for half in halves.values() if len(half[i]) for part in (eot, half[i])] or [eot[:0]])
        for i in (0, 1)
    )
    dataset = write_dataset(out, train, val, tokenizer, name="text", source=source, suffix=f".{args.format}")
    assert dataset.manifest is not None
    preset = "shakespeare-char" if args.tokenizer == "char" else "quickstart"
    print(f"{out}: {totals(dataset.manifest)}; train on it: python train_gpt2.py {preset} --data {out}")
    return 0


def read_texts(paths: Sequence[str], endings: Sequence[str], out: Path) -> dict[str, str]:
    """Text of each file by its name, in order of name; says what is not read."""
    from gpt2.prepare.download import Fetcher
    from gpt2.prepare.sources import local_source

    kinds = dict.fromkeys((*_ENDINGS, *endings), "text")
    try:
        source = local_source(paths, out, kinds=kinds, splits_apart=False)
    except UserError as error:
        raise UserError(str(error).removeprefix("--source ")) from error
    reasons: dict[str, list[str]] = {}
    for path, reason in source.unread:
        reasons.setdefault(reason, []).append(path)
    for reason, names in reasons.items():
        print(f"not read, {reason}: {len(names)} ({', '.join(names[:_ROWS])}{', ...' if names[_ROWS:] else ''})")
    texts = {}
    with tempfile.TemporaryDirectory() as scratch, Fetcher(source, Path(scratch) / "plain", keep=False) as fetcher:
        for number, file in enumerate(source.files):
            with open(fetcher.get(number)[0], encoding="utf-8-sig", errors="replace", newline="") as opened:
                texts[file.name] = opened.read()
            fetcher.release(number)
    return texts


def halve(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A file's tokens to train on and to validate on, (n,) to (t,) and (n - t,), where the line ends that is nearest.

    Where no line ends within 5 % of the tokens around the place, it is after a character; of fewer than 20 tokens none
    is validated on.
    """
    from gpt2.tokens.tokenizer import line_ends

    wanted = len(tokens) * (1 - _VAL_SHARE)
    if len(tokens) * _VAL_SHARE < 1:
        return tokens, tokens[:0]
    ends_line, in_character = line_ends(tokenizer)
    for places in (np.flatnonzero(ends_line[tokens]) + 1, np.flatnonzero(~in_character[tokens])):
        nearest = places[np.abs(places - wanted).argmin()] if len(places) else 0
        if 0 < nearest < len(tokens) and abs(nearest - wanted) < len(tokens) * _VAL_SHARE:
            break
    return tokens[:nearest], tokens[nearest:]


def _row(name: str, train: int, val: int) -> str:
    total = max(train + val, 1)
    return f"{name[-40:]:<40} {train + val:>12,} {train / total:>9.1%} {val / total:>11.1%}"


if __name__ == "__main__":
    run_cli(main)
