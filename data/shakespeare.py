"""TinyShakespeare as token shards: the first 90 % of its characters for training, the rest for validation.

python data/shakespeare.py                     # GPT-2's BPE, into data/shakespeare
python data/shakespeare.py --tokenizer char    # its 65 characters, into data/shakespeare_char
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import read_plain

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_ATTEMPTS = 4  # waits of 1, 2, 4 seconds between them
_TIMEOUT = 20.0  # seconds without an answer


def make_parser() -> ArgumentParser:
    """Options of this script."""
    parser = ArgumentParser(description="TinyShakespeare as token shards; a finished data set is reused.")
    parser.add_argument("--source", type=Path, metavar="FILE", help="a copy of the file, instead of a download")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[data/shakespeare, or data/shakespeare_char]")
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
    source = {"description": URL, "revision": None, "files": [{"name": "input.txt", "id": f"sha256:{SHA256}"}]}
    found = reusable(out, source, args.tokenizer, f".{args.format}")
    if found is not None:
        print(f"{out} is complete and verified: {totals(found)}")
        return 0
    text = read_text(args.source)
    tokenizer: Tokenizer = CharTokenizer("".join(sorted(set(text)))) if args.tokenizer == "char" else gpt2_tokenizer()
    border = len(text) * 9 // 10
    eot = [] if tokenizer.eot_token is None else [tokenizer.eot_token]
    train, val = (np.array(eot + tokenizer.encode(part)) for part in (text[:border], text[border:]))
    dataset = write_dataset(out, train, val, tokenizer, name="shakespeare", source=source, suffix=f".{args.format}")
    assert dataset.manifest is not None
    print(f"{out}: {totals(dataset.manifest)}")
    return 0


def read_text(path: Path | None) -> str:
    """TinyShakespeare from `path`, or downloaded where that is None. UserError where it is anything else."""
    if path is None:
        data, origin = download(URL), URL
    else:
        try:
            data, origin = read_plain(path), str(path)
        except OSError as error:
            raise UserError(f"cannot read --source {path}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{origin} is not TinyShakespeare: {len(data):,} bytes with SHA-256 {found[:12]}…, not 1,115,394 with "
            f"{SHA256[:12]}…; for other text use data/fineweb.py --source"
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
