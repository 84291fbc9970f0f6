"""Golden values of short deterministic runs: what a change that claims to alter nothing must leave equal.

    python scripts/golden.py before.json              # with the code as it is
    python scripts/golden.py after.json               # with the change, on the same machine
    python scripts/golden.py --compare before.json after.json

Each case is `train_gpt2.py debug --deterministic --dtype fp32` as a process of its own: with AdamW and Muon, resumed,
and over two processes with DDP and FSDP. Recorded are every step's loss and gradient norm, and the SHA-256 of each
tensor of the last checkpoint. The values depend on the machine, PyTorch and Python, so both files must come from the
same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, run_cli
from gpt2.files import check_output, user_path, write_whole

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 9
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FLAGS = [
    *("--deterministic", "--dtype", "fp32", "--max-steps", str(STEPS), "--checkpoint-every", "3", "--eval-every", "3"),
    *("--device", "cpu", "--keep", "9"),
]


def run(arguments: list[str]) -> None:
    """Run a command with this interpreter; SystemExit with its output where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")


def train(directory: Path, data: Path, launcher: list[str], flags: list[str]) -> None:
    """Train the debug preset in `directory`."""
    paths = ["--data", str(data), "--run-dir", str(directory)]
    run([*launcher, str(REPOSITORY / "train_gpt2.py"), "debug", *paths, *FLAGS, *flags])


def read(directory: Path) -> dict[str, Any]:
    """What is recorded of a run."""
    from safetensors.numpy import load_file

    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = directory / "checkpoints" / f"step_{STEPS:08d}"
    return {
        "train": [[r["step"], r["loss"], r["lr"], r["grad_norm"]] for r in records if r["kind"] == "train"],
        "val": [[r["step"], r["loss"]] for r in records if r["kind"] == "val"],
        "samples": [[r["step"], r["text"]] for r in records if r["kind"] == "sample"],
        "sha256": {
            f"{file}/{name}": hashlib.sha256(tensor.tobytes()).hexdigest()
            for file in ("model.safetensors", "optimizer.safetensors")
            for name, tensor in sorted(load_file(last / file).items())
        },
    }


def cases(scratch: Path, data: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each case's name, and what makes its values."""

    def plain(name: str, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
        train(scratch / name, data, list(launcher), list(flags))
        return read(scratch / name)

    def resumed(name: str, *flags: str) -> dict[str, Any]:
        """The run to its end, then again from its sixth step."""
        train(scratch / name, data, [], list(flags))
        shutil.rmtree(scratch / name / "checkpoints" / f"step_{STEPS:08d}")
        (scratch / name / "checkpoints" / "latest").write_text("step_00000006\n")
        train(scratch / name, data, [], list(flags))
        return read(scratch / name)

    modern = (
        "--position rope --n-kv-head 1 --window 16 --activation swiglu --norm rmsnorm --qk-norm --no-bias "
        "--no-tie-embeddings --logit-softcap 15 --dropout 0.1"
    )
    return {
        "adamw": lambda: plain("adamw"),
        "muon": lambda: plain("muon", "--optimizer", "muon"),
        "modern": lambda: plain("modern", *modern.split()),
        "resumed": lambda: resumed("resumed"),
        "ddp": lambda: plain("ddp", launcher=tuple(TORCHRUN)),
        "fsdp": lambda: plain("fsdp", "--parallel", "fsdp", launcher=tuple(TORCHRUN)),
    }


def make(out: Path) -> int:
    """Run every case and write the values."""
    check_output(out, "FILE")
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        run([str(REPOSITORY / "data" / "pydocs.py"), "--out", str(data)])
        for name, case in cases(Path(scratch), data).items():
            values[name] = case()
            print(f"{name}: last loss {values[name]['train'][-1][1]}", flush=True)
    write_whole(out, json.dumps(values, indent=1) + "\n")
    return 0


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each case and kind of value that is not the same."""
    lines = [f"{name}: in one file only" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        for kind, value in old[name].items():
            if kind == "sha256":
                found = new[name][kind]
                wrong = [key for key in sorted(value.keys() | found.keys()) if value.get(key) != found.get(key)]
                if wrong:
                    lines.append(f"{name}: {len(wrong)} of {len(value)} tensors differ, such as {wrong[0]}")
            elif value != new[name][kind]:
                lines.append(f"{name}: {kind} differs: {value} and {new[name][kind]}")
    return lines


def compare(old: Path, new: Path) -> int:
    """Print what differs; 1 if anything does."""
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    lines = differences(a, b)
    print("\n".join(lines) if lines else f"all {len(a)} cases are equal, byte for byte")
    return 1 if lines else 0


def main() -> int:
    """Make golden values, or compare two files of them."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=user_path, nargs="+", metavar="FILE", help="file to write; with --compare, two to read"
    )
    parser.add_argument("--compare", action="store_true", help="compare two files instead of making one")
    args = parser.parse_args()
    if len(args.files) != (2 if args.compare else 1):
        parser.error("give one FILE to write, or --compare and two")
    return compare(*args.files) if args.compare else make(args.files[0])


if __name__ == "__main__":
    run_cli(main)
