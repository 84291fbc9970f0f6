"""Measure this project's speed beside its baselines' on this machine.

python scripts/benchmark.py train --preset gpt2 --micro-batch-size 4
python scripts/benchmark.py loader --json loader.json

Each benchmark prints a table; --json also writes it with the hardware, versions and settings it depends on.
`python scripts/benchmark.py NAME --help` shows a benchmark's options.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.distributed.world import pick_device
from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import check_output, user_path, write_whole
from gpt2.hardware import environment

BENCHMARKS = {
    "train": "a training step: ours, the plain model and transformers, eager and compiled; AdamW, Muon",
    "tokenize": "text to token shards",
    "hellaswag": "the evaluator: ours, build-nanogpt's and lm-eval, eager and compiled",
    "loader": "start-up and tokens per second of the data loader",
    "generate": "sampling with a key-value cache: ours and transformers, eager and compiled",
    "ddp": "several processes against one",
    "memory": "whether memory stays bounded over HellaSwag, a run, sampling",
}


def load(name: str) -> Any:
    """The module of a benchmark: `add_arguments(parser)` and `run(args)`, which prints and returns JSON values.

    Raises:
        UserError: there is no such benchmark, or a package it needs is not installed.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}; --help describes them")
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        if error.name == "resource":
            raise UserError(
                f"benchmark {name} cannot run on Windows, which does not tell what a process has used"
            ) from None
        raise UserError(f"benchmark {name} needs the package {error.name}; pip install -e '.[full,test]'") from None


def main() -> int:
    """Run the benchmark the first word names."""
    names = "\n".join(f"  {name:<11}{what}" for name, what in BENCHMARKS.items())
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks:\n{names}")
        return 0
    module = load(name)
    parser = ArgumentParser(
        prog=f"benchmark.py {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the result there")
    module.add_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    check_output(args.json, "--json")
    start = time.time()
    # Before it, so that the commit is the one whose code runs.
    facts = environment(pick_device(getattr(args, "device", None) or "auto"), 1)
    result = module.run(args)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        document = {
            "benchmark": name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "seconds": time.time() - start,
            "arguments": settings,
            "environment": facts,
            **result,
        }
        write_whole(args.json, json.dumps(document, indent=1, default=str) + "\n")
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    run_cli(main)
