"""TinyShakespeare as token shards: the first 90 % of its characters for training, the rest for validation.

python data/shakespeare.py                     # GPT-2's BPE, into data/shakespeare
python data/shakespeare.py --tokenizer char    # its 65 characters, into data/shakespeare_char
python data/shakespeare.py --source mine.txt   # another text in its place, cut at a line's end
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import read_plain, user_path

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_ATTEMPTS = 4  # waits of 1, 2, 4 seconds between them
_TIMEOUT = 20.0  # seconds without an answer


def make_parser() -> ArgumentParser:
    """Options of this script."""
    parser = ArgumentParser(description="TinyShakespeare as token shards; a finished data set is reused.")
    parser.add_argument("--source", type=user_path, metavar="FILE", help="a copy of the file, or another text, instead")
    parser.add_argument("--out", type=user_path, metavar="DIR", help="[data/shakespeare, or data/shakespeare_char]")
    parser.add_argument("--tokenizer", choices=("gpt2", "char"), default="gpt2", help="GPT-2's BPE, or characters")
    parser.add_argument("--format", choices=("npy", "bin"), default="npy", help="NumPy's format, or llm.c's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data set, or say that it is there."""
    import numpy as np

    from gpt2.prepare.build import totals
    from gpt2.prepare.small_dataset import reusable, write_dataset
    from gpt2.tokens.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer

    args = make_parser().parse_args(argv)
    default = "shakespeare_char" if args.tokenizer == "char" else "shakespeare"
    out = args.out or Path(__file__).parent / default
    text = read_text(args.source) if args.source else None
    own = text is not None and (digest := hashlib.sha256(text.encode()).hexdigest()) != SHA256
    if own:
        name = re.sub(r"[^\w.-]", "_", args.source.name.split(".")[0]) or "text"
        source = {"description": f"{args.source.name}, {digest[:16]}", "revision": None, "files": []}
        print(f"{args.source} is not TinyShakespeare; it is tokenized in its place")
    else:
        name = "shakespeare"
        source = {"description": URL, "revision": None, "files": [{"name": "input.txt", "id": f"sha256:{SHA256}"}]}
    found = reusable(out, source, args.tokenizer, f".{args.format}")
    if found is not None:
        print(f"{out} is complete and verified: {totals(found)}")
        return 0
    text = read_text(None) if text is None else text
    if len(text) < 20:
        raise UserError(f"{args.source} holds {len(text)} characters, too few for two splits; give more text")
    tokenizer: Tokenizer = CharTokenizer("".join(sorted(set(text)))) if args.tokenizer == "char" else gpt2_tokenizer()
    border = len(text) * 9 // 10
    if own:  # a line's end near it, where there is one
        border = text.find("\n", border, len(text) * 19 // 20) + 1 or border
    eot = [] if tokenizer.eot_token is None else [tokenizer.eot_token]
    train, val = (np.array(eot + tokenizer.encode(part)) for part in (text[:border], text[border:]))
    dataset = write_dataset(out, train, val, tokenizer, name=name, source=source, suffix=f".{args.format}")
    assert dataset.manifest is not None
    print(f"{out}: {totals(dataset.manifest)}")
    return 0


def read_text(path: Path | None) -> str:
    """The text at `path`, or TinyShakespeare downloaded where that is None. UserError where it is no text."""
    if path is not None:
        from gpt2.prepare.sources import refuse_binary

        try:
            data = read_plain(path)
            refuse_binary(path)
            return data.decode("utf-8-sig", "replace")
        except OSError as error:
            raise UserError(f"cannot read --source {path}: {error.strerror}") from error
    data = download(URL)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(
            f"{URL} answered with {len(data):,} bytes that are not TinyShakespeare (their SHA-256 is not "
            f"{SHA256[:12]}…); get the file another way and give it with --source FILE"
        )
    return data.decode("ascii")


def download(url: str) -> bytes:
    """Content of `url`, tried a few times. UserError naming what to do without a network."""
    import requests

    for attempt in range(_ATTEMPTS):
        try:
            response = requests.get(url, timeout=_TIMEOUT)
            response.raise_for_status()
            content: bytes = response.content
            return content
        except requests.RequestException as error:
            failure = error
            if error.response is not None and error.response.status_code in (403, 404):
                break
            if attempt + 1 < _ATTEMPTS:
                time.sleep(2**attempt)
    raise UserError(
        f"cannot download {url} ({type(failure).__name__}); get the file another way and give it with --source FILE"
    ) from failure


if __name__ == "__main__":
    run_cli(main)
