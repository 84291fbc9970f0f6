"""Evaluate a model on HellaSwag with EleutherAI's lm-evaluation-harness itself: the check on our own harness figures.

    python scripts/harness.py RUN_OR_CHECKPOINT --limit 100

A checkpoint is a directory that `transformers` opens, so `lm_eval` reads it as it is; the command is printed. This
script only finds a run's newest checkpoint and feeds the task our copy of the data, so that it also works where the
Hub is out of reach.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import user_path
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example, content_lines, spread
from gpt2.model.pretrained import resolve_model


def harness_samples(
    pretrained: Path, examples: Sequence[Example], *, device: str, dtype: str, batch_size: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What the harness's own `hf` model and `hellaswag` task (version 1.0) make of the examples.

    Args:
        pretrained: a directory `transformers` opens, tokenizer files included.
        examples: with labels.
        device: PyTorch's name.
        dtype: "float32" or "bfloat16"; of the weights.
        batch_size: rows at a time.

    Returns:
        acc and acc_norm with their standard errors, and one dictionary an example, in order: acc, acc_norm (0 or 1)
        and resps, the four (log-probability, is greedy).

    Raises:
        UserError: the harness is not installed, or the directory has no tokenizer.
    """
    if not any((pretrained / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{pretrained} has no tokenizer files, which the harness needs; our checkpoints have them")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # the task's data is local
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # type: ignore[import-untyped, unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise UserError("the harness is not installed; pip install 'lm_eval[hf]'") from None

    model = HFLM(pretrained=str(pretrained), device=device, dtype=dtype, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "examples.jsonl"
        data.write_bytes(b"".join(content_lines(examples)))
        task = Path(directory) / "hellaswag_local.yaml"  # JSON is YAML
        task.write_text(
            json.dumps(
                {
                    "include": str(Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"),
                    "task": task.stem,
                    "dataset_path": "json",
                    "dataset_kwargs": {
                        "data_files": {"train": str(data), "validation": str(data)},
                        "cache_dir": str(Path(directory) / "cache"),
                    },
                }
            )
        )
        answer = lm_eval.simple_evaluate(model, tasks=[str(task)], log_samples=True)
    scores = {name.split(",")[0]: value for name, value in answer["results"][task.stem].items() if "," in name}
    samples = sorted(answer["samples"][task.stem], key=lambda sample: sample["doc_id"])
    for sample in samples:
        sample["resps"] = [response[0] for response in sample["resps"]]
    return scores, samples


def main() -> None:
    """Entry point."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run, a checkpoint, a transformers GPT-2 directory, or a name on the Hub")
    parser.add_argument("--data", type=user_path, metavar="FILE", help="HellaSwag .jsonl [the published val split]")
    parser.add_argument("--limit", type=int, metavar="N", help="N examples, evenly spaced over the file [all]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … [cpu]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights [float32]")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time [8]")
    args = parser.parse_args()

    directory = resolve_model(args.model)
    examples = [e for e in spread(load_examples(args.data), args.limit) if e.label is not None]
    if not examples:
        raise UserError(f"no example of {args.data} has a label; the harness cannot score them")
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={directory},dtype={args.dtype}"]
    command += ["--tasks", "hellaswag", "--device", args.device, "--batch_size", str(args.batch_size)]
    print("the same with the harness's own command and download:", shlex.join(command))
    scores, _ = harness_samples(directory, examples, device=args.device, dtype=args.dtype, batch_size=args.batch_size)
    print(json.dumps({"examples": len(examples), **scores}))


if __name__ == "__main__":
    run_cli(main)
