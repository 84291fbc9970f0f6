"""Turn a run into a clean folder for others: weights, configuration, tokenizer and a model card.

python scripts/export.py runs/gpt2 exported/gpt2
python scripts/export.py runs/gpt2@best exported/gpt2 --license mit --push OWNER/NAME

`transformers` opens the folder. A model that is plain GPT-2, Llama, Arcee or Qwen3 by its mathematics becomes one;
any other variant brings its code along and needs trust_remote_code=True. See docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from torch import Tensor

from gpt2.checkpoint.directory import TRAINING, read_training, verify_checkpoint
from gpt2.config import GPTConfig
from gpt2.errors import UserError, first_line, run_cli
from gpt2.files import user_path, write_whole
from gpt2.metrics import reference
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import config_to_hf, not_in_transformers, state_dict_to_hf
from gpt2.model.pretrained import load_tokenizer, resolve_model, save_tokenizer
from gpt2.report.content import report
from gpt2.report.runs import RecordedRun, bits_per_byte, open_run
from gpt2.tokens.tokenizer import Tokenizer, gpt2_vocab_files
from scripts.exported.llama_format import llama_config, llama_family, state_dict_to_llama

CODE = Path(__file__).resolve().parent / "exported" / "modeling_repro_gpt2.py"
IN_TRAINING_ONLY = {
    *("init_embedding_std", "init_head_std", "init_fan_in_variance", "zero_init_projections"),
    *("bf16_embedding", "softmax_over_padding"),
}
"""Settings of a model that say how it is trained, not what it computes."""
IN_OUR_CODE = {
    *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "tie_embeddings", "norm_eps"),
    *("n_kv_head", "position", "rope_theta", "rope_fraction", "rope_clockwise", "attention_scale", "window"),
    *("full_attention_every", "activation", "norm", "norm_position", "final_norm", "qk_norm", "embedding_norm"),
    *("bias", "head_bias", "logit_softcap", "logit_softcap_form"),
}
"""Settings that `scripts/exported/modeling_repro_gpt2.py` computes; one that is yet to be invented is refused."""
OPENAI = re.compile(r"^(openai-community/)?gpt2(-medium|-large|-xl)?$")


def export(checkpoint: Path, folder: Path, license_id: str) -> str:
    """Write the folder, whole or not at all; returns how `transformers` opens it.

    Args:
        checkpoint: RUN/checkpoints/step_...
        folder: not there yet, or empty.
        license_id: licence of the weights, as the Hub spells it.

    Raises:
        UserError: the checkpoint is damaged, or holds a variant that cannot be exported; the folder is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; give one that does not exist yet")
    verify_checkpoint(checkpoint)
    run = open_run(checkpoint.parent.parent)
    model = GPT.from_pretrained(checkpoint)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.exporting"
    try:
        temporary.mkdir(parents=True)
        architecture = write_model(temporary, model, tokenizer_of(checkpoint, model.config))
        pictures = draw_curves(run, temporary)
        step = read_training(checkpoint)["step"]
        card = model_card(folder.name, run, step, model, architecture, license_id, pictures, temporary)
        write_whole(temporary / "README.md", card)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or first_line(error)}; choose another DIR") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return architecture


def tokenizer_of(checkpoint: Path, config: GPTConfig) -> Tokenizer | None:
    """A checkpoint's tokenizer; None where nobody knows it."""
    tokenizer = load_tokenizer(checkpoint)
    # Shards without a manifest are taken for GPT-2's tokens; with a smaller vocabulary they cannot be.
    return None if tokenizer.n_vocab > config.vocab_size else tokenizer


def write_model(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> str:
    """Write weights, configuration, tokenizer and, where it is needed, code; returns the architecture's name."""
    from safetensors.torch import save_file

    defaults = {field.name: field.default for field in fields(GPTConfig)}
    config = replace(model.config, **{name: defaults[name] for name in IN_TRAINING_ONLY})  # type: ignore[arg-type]
    if all(config.layer_window(layer) is None for layer in range(config.n_layer)):
        config = replace(config, window=None, full_attention_every=None)  # wide enough to see everything
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    eot = None if tokenizer is None else tokenizer.eot_token
    family = llama_family(config)
    tensors: Mapping[str, Tensor]
    if family is not None:
        raw = llama_config(config, family, eot)
        tensors = state_dict_to_llama(state, config, family)
    else:
        raw = {**config_to_hf(config, tokenizer), "n_ctx": config.block_size}
        tensors = state_dict_to_hf(state, config)
        if odd := not_in_transformers(config):
            add_code(folder, config, raw, odd)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", raw)
    generation = {name: raw[name] for name in ("bos_token_id", "eos_token_id") if raw[name] is not None}
    write_json(folder / "generation_config.json", {"do_sample": True, **generation})
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer, config)
        if tokenizer.name == "gpt2":
            write_json(folder / "tokenizer.json", gpt2_tokenizer_json())
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors' are their owner's alone
    return str(raw["architectures"][0])


def gpt2_tokenizer_json() -> dict[str, Any]:
    """`tokenizer.json` of GPT-2, as the library `tokenizers` reads it, from the vocabulary's two files."""
    encoder, merges = gpt2_vocab_files()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 50256, "content": "<|endoftext|>", "special": True, "normalized": True}
    return {
        "version": "1.0",
        "added_tokens": [{**end, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": json.loads(encoder),
            "merges": merges.decode("utf-8").split("\n")[1:-1],  # first line: version; last: empty
        },
    }


def add_code(folder: Path, config: GPTConfig, raw: dict[str, Any], odd: Sequence[str]) -> None:
    """Bring the code along that computes a variant.

    Raises:
        UserError: it does not compute this one.
    """
    unknown = [
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if field.name not in IN_OUR_CODE | IN_TRAINING_ONLY and getattr(config, field.name) != field.default
    ]
    if unknown:
        raise UserError(f"a model with {', '.join(unknown)} cannot be exported: {CODE.name} does not compute that")
    shutil.copyfile(CODE, folder / CODE.name)
    name = "ReproGPT2ForCausalLM"
    raw["architectures"] = [name]
    raw["auto_map"] = {
        "AutoConfig": f"{CODE.stem}.ReproGPT2Config",
        "AutoModelForCausalLM": f"{CODE.stem}.{name}",
    }
    raw["activation_function"] = f"not GPT-2 but a variant ({', '.join(odd)}): open it with trust_remote_code=True"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file as `transformers` formats it."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def draw_curves(run: RecordedRun, folder: Path) -> list[str]:
    """Draw the run's curves into the folder, where matplotlib is installed; returns the pictures' names."""
    try:
        from gpt2.report.plots import save_plots

        return [path.name for path in save_plots(report([run]), folder / "curves.html")]
    except ImportError:
        print("no curves: matplotlib is not installed (pip install matplotlib)")
        return []


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines]


def model_card(
    name: str,
    run: RecordedRun,
    step: int,
    model: GPT,
    architecture: str,
    license_id: str,
    pictures: Sequence[str],
    folder: Path,
) -> str:
    """README.md of the folder: what a reader needs to use the weights and to make them again.

    Nothing in it names the machine or a place on it.

    Args:
        name: the model's name.
        run: that made it.
        step: the checkpoint's step.
        model: the checkpoint's.
        architecture: class that opens the model, as `write_model` returns it.
        license_id: licence of the weights.
        pictures: files in the folder.
        folder: where the other files are already.
    """
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    remote, tokenized = "auto_map" in known, (folder / "tokenizer.json").exists()
    tokens = max((int(r["tokens"]) for r in run.history.live if r["step"] <= step and "tokens" in r), default=0)
    front = {"license": license_id, "library_name": "transformers", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    if run.corpus is not None:
        lines += ["datasets:", f"- HuggingFaceFW/{run.corpus}"]
    lines += ["---", "", f"# {name}", ""]
    lines += [
        f"A language model of {model.num_parameters():,} parameters (`{architecture}`, "
        f"{model.config.n_layer} layers, width {model.config.n_embd}, context {model.config.block_size}), trained "
        f"for {step:,} steps on {tokens:,} tokens.",
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenized else ''}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{", trust_remote_code=True" if remote else ""})',
    ]
    if tokenized:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            'inputs = tokenizer("The", return_tensors="pt")',
            f"outputs = model.generate(**inputs, max_new_tokens={min(40, model.config.block_size // 2)}, top_k=50)",
            "print(tokenizer.decode(outputs[0]))",
        ]
    lines += ["```", ""]
    if not tokenized:
        lines += ["The tokenizer is not known: the shards it was trained on had no manifest that names it.", ""]
    if not known.get("tie_word_embeddings", True):
        lines += ["Input and output embeddings are two matrices.", ""]
    lines += [
        "It continues text. It is not made to follow instructions, may repeat what its data holds, and is as wrong as "
        "a model of this size is.",
        "",
    ]
    lines += ["## Data", "", data_line(run), ""]
    lines += ["## Recipe", "", *table(("setting", "value"), recipe(run)), ""]
    if run.seconds:
        hours = run.device_seconds / 3600
        lines += [f"Training took {hours:,.2f} device-hours on {run.start.get('device', 'an unknown device')}.", ""]
    if pictures:
        lines += ["## Curves", "", *(f"![{PurePath(file).stem}]({file})" for file in pictures), ""]
    lines += ["## Evaluation", "", *evaluation(run, step)]
    return "\n".join(lines) + "\n"


def data_line(run: RecordedRun) -> str:
    """What the model was trained on, by name."""
    dataset = PurePath(str(run.start.get("dataset", ""))).name or "unknown"
    title = dataset if run.corpus is None else f"{reference.CORPUS_TITLES[run.corpus]} (`{dataset}`)"
    init = run.config.get("run", {}).get("init_from")
    began = (
        "" if init is None else f" It began from {init if OPENAI.match(str(init)) else 'the weights of another run'}."
    )
    return f"{title}. The licence of the data applies to what is made of it.{began}"


def recipe(run: RecordedRun) -> list[tuple[str, object]]:
    """Settings that make the run again: the optimizer's, and the others' where they say what was learnt."""
    config = run.config
    plain = asdict(GPTConfig())
    model = [(f"--{n}".replace("_", "-"), v) for n, v in config.get("model", {}).items() if v != plain.get(n)]
    optim = [(f"--{n}".replace("_", "-"), v) for n, v in config.get("optim", {}).items() if v is not None]
    data, settings = config.get("data", {}), config.get("run", {})
    names = ("total_batch_tokens", "micro_batch_size", "shuffle", "drop_shard_tails")
    rows: list[tuple[str, object]] = [("preset", run.preset or "-")]
    rows += [(f"--{n}".replace("_", "-"), data[n]) for n in names if n in data]
    rows += [(f"--{n}".replace("_", "-"), settings[n]) for n in ("max_steps", "seed", "dtype") if n in settings]
    return [*rows, *model, *optim]


def evaluation(run: RecordedRun, step: int) -> list[str]:
    """Validation losses up to a step, at most a dozen of them, and the last HellaSwag score."""
    val = [record for record in run.records("val") if record["step"] <= step]
    if not val:
        return ["The run was not evaluated."]
    shown = val if len(val) <= 12 else [val[round(i * (len(val) - 1) / 11)] for i in range(12)]
    rows = []
    for record in shown:
        bits = bits_per_byte(record)
        rows.append((f"{record['step']:,}", f"{record['loss']:.4f}", "-" if bits is None else f"{bits:.4f}"))
    lines = table(("step", "validation loss, nats per token", "bits per byte"), rows)
    lines += ["", f"The losses are means over {val[-1]['val_tokens']:,} validation tokens."]
    baseline = reference.gpt2_val_loss(run.corpus, run.size)
    if baseline is not None:
        lines += [f"The released GPT-2 of this size has {baseline:.4f} on this data."]
    if scores := [record for record in run.records("hellaswag") if record["step"] <= step]:
        last = scores[-1]
        low, high = reference.wilson(last["acc_norm"], int(last["examples"]))
        lines += [
            "",
            f"HellaSwag, {last.get('convention', 'completion')} style, step {last['step']:,}: acc_norm "
            f"{last['acc_norm']:.2%} ({low:.2%} to {high:.2%}) over {last['examples']:,} examples; guessing gives "
            "25 %.",
        ]
    return lines


def push(folder: Path, repository: str) -> str:
    """Upload the folder to the Hugging Face Hub; returns its address there. A new repository is private.

    Raises:
        UserError: that failed; the folder stays as it is.
    """
    later = f"the folder {folder} is written; push it later with `hf upload {repository} {folder}`"
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(f"--push needs huggingface_hub (`pip install huggingface_hub`); {later}") from None
    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export")
    except Exception as error:  # no network, offline mode, no or a wrong token, a name that belongs to somebody else
        raise UserError(
            f"{repository} could not be pushed to the Hugging Face Hub ({type(error).__name__}: {first_line(error)}); "
            f"is the network there, and does `hf auth whoami` name you? {later[0].upper()}{later[1:]}"
        ) from None
    return address


def main() -> int:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN[@best]", help="a run (its newest checkpoint, or its best) or a checkpoint")
    parser.add_argument("folder", type=user_path, metavar="DIR", help="to write: empty, or not there yet")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, such as mit [unknown]")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub; a new one is private")
    args = parser.parse_args()
    if args.push is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", args.push):
        raise UserError(f"--push {args.push} is no name on the Hugging Face Hub; write OWNER/NAME")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise UserError(f"--license {args.license} is no licence's identifier; write one of the Hub's, such as mit")
    run = Path(args.run.removesuffix("@best"))
    if not run.exists():
        raise UserError(f"{run} is not there; give the directory of a run, such as runs/gpt2")
    checkpoint = resolve_model(args.run)
    if checkpoint.parent.name != "checkpoints" or not (checkpoint / TRAINING).is_file():
        raise UserError(f"{args.run} is not a run of train_gpt2.py, nor one of its checkpoints")
    architecture = export(checkpoint, args.folder, args.license)
    print(f"wrote {args.folder}: {checkpoint.name} as {architecture}")
    if args.license == "unknown":
        print("the model card says license: unknown; --license ID names it")
    if not (args.folder / "tokenizer.json").exists():
        print("no tokenizer is written: nothing says whose tokens the run's shards hold")
    if args.push is not None:
        print(f"pushed to {push(args.folder, args.push)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
