"""The named configurations, and the command line that changes them."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from gpt2.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig
from gpt2.errors import UserError
from gpt2.files import read_json, user_path

P = TypeVar("P", DataConfig, RunConfig)


def _gpt2(name: str, n_layer: int, n_head: int, n_embd: int, micro_batch_size: int, **optim: float) -> Config:
    return Config(
        model=GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        data=DataConfig(micro_batch_size=micro_batch_size),
        optim=OptimConfig(**optim),  # type: ignore[arg-type]
        run=RunConfig(run_dir=Path("runs") / name),
    )


def _shakespeare_char(name: str, optim: OptimConfig, **model: Any) -> Config:
    return Config(
        model=GPTConfig(n_layer=6, n_head=4, n_embd=256, block_size=128, vocab_size=65, **model),
        data=DataConfig(
            data=Path("data/shakespeare_char"),
            micro_batch_size=32,
            total_batch_tokens=4096,
            val_tokens=200_000,  # the whole split
        ),
        optim=optim,
        run=RunConfig(
            run_dir=Path("runs") / name,
            max_steps=750,
            eval_every=150,
            hellaswag_limit=0,
            num_samples=1,
            sample_tokens=200,
            sample_prompt="ROMEO:",
            checkpoint_every=300,
        ),
    )


def _gpt2_3_28() -> Config:
    """modded-nanogpt's optimization track as of 2026-06-11: 3,250 steps, mean validation loss 3.2787 over ten runs."""
    return Config(
        model=GPTConfig(
            n_layer=12,
            n_head=6,  # of 128
            n_embd=768,
            activation="relu2",
            norm="rmsnorm",
            norm_eps=None,
            embedding_norm=True,
            qk_norm=True,
            attention_scale=0.12,
            position="rope",
            rope_theta=1024 ** (32 / 31),  # 32 of a head's 64 pairs turn, pair j by position × 1024^(-j / 31)
            rope_fraction=0.5,
            rope_clockwise=True,
            tie_embeddings=False,
            head_bias=True,
            logit_softcap=15.0,
            logit_softcap_form="algebraic",
            softmax_over_padding=True,
            bf16_embedding=True,
            init_embedding_std=1.0,
            init_head_std=0.0,
            init_fan_in_variance=0.33,
            zero_init_projections=True,
        ),
        data=DataConfig(data=Path("data/fineweb_10B"), shuffle=False, drop_shard_tails=True),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=0.015,
            embedding_learning_rate=0.7,
            head_learning_rate=0.004,
            vector_learning_rate=0.015,
            muon_learning_rate=0.025,
            weight_decay=0.001,
            vector_weight_decay=0.001,
            muon_weight_decay=0.05,
            beta1=0.8,
            beta2=0.95,
            adam_eps=1e-10 / 524_288,  # of gradients of the summed loss
            muon_momentum=0.95,
            muon_qkv="apart",
            newton_schulz_steps=12,
            newton_schulz_coefficients=(2.0, -1.5, 0.5),
            schedule="wsd",
            warmup_steps=0,
            decay_fraction=0.7,
            min_lr_ratio=0.0,
            grad_clip=0.0,
        ),
        run=RunConfig(run_dir=Path("runs/gpt2-3.28"), max_steps=3250, eval_every=125),
    )


def presets() -> dict[str, tuple[str, Config]]:
    """Every preset's name, with a line that describes it and its configuration."""
    return {
        "gpt2": (
            "GPT-2 124M on 10 B tokens of FineWeb-Edu",
            # Learning rates of the larger sizes are GPT-3's for models of their size (Brown et al. 2020, table 2.1).
            _gpt2("gpt2", 12, 12, 768, 64),
        ),
        "gpt2-medium": (
            "GPT-2 350M, the same data",
            _gpt2("gpt2-medium", 24, 16, 1024, 32, learning_rate=3e-4),
        ),
        "gpt2-large": (
            "GPT-2 774M, the same data",
            _gpt2("gpt2-large", 36, 20, 1280, 16, learning_rate=2.5e-4),
        ),
        "gpt2-xl": (
            "GPT-2 1558M, the same data; --parallel fsdp where 16 bytes per parameter do not fit",
            _gpt2("gpt2-xl", 48, 25, 1600, 8, learning_rate=2e-4),
        ),
        "gpt2-3.28": (
            "GPT-2's loss of 3.28 on FineWeb with 1.7 B tokens: modded-nanogpt's track 3, see docs/recipes.md",
            _gpt2_3_28(),
        ),
        "quickstart": (
            "a small GPT on the documentation in Python's own library: minutes on a laptop's CPU",
            Config(
                model=GPTConfig(n_layer=6, n_head=4, n_embd=256, block_size=256),
                data=DataConfig(
                    data=Path("data/pydocs"), micro_batch_size=8, total_batch_tokens=2048, val_tokens=16_384
                ),
                # In so few steps Muon comes half a nat further than AdamW.
                optim=OptimConfig(optimizer="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup_steps=20),
                run=RunConfig(
                    run_dir=Path("runs/quickstart"),
                    max_steps=220,
                    max_minutes=4.0,
                    eval_every=55,
                    log_every=5,
                    hellaswag_limit=20,
                    num_samples=2,
                    checkpoint_every=55,
                ),
            ),
        ),
        "shakespeare-char": (
            "TinyShakespeare character by character: minutes on a CPU, for studying what changes do",
            _shakespeare_char(
                "shakespeare-char",
                OptimConfig(
                    optimizer="muon",
                    learning_rate=3e-3,
                    muon_learning_rate=0.02,
                    schedule="linear",
                    min_lr_ratio=0.0,
                    warmup_steps=50,
                ),
                position="rope",
                qk_norm=True,
                activation="relu2",
                bias=False,
                zero_init_projections=True,
            ),
        ),
        "shakespeare-char-plain": (
            "the same size and data with nothing but the textbook: GPT-2's blocks, AdamW",
            # Learning rate and second beta are nanoGPT's for models of characters.
            _shakespeare_char("shakespeare-char-plain", OptimConfig(learning_rate=1e-3, beta2=0.99, warmup_steps=50)),
        ),
        "finetune": (
            "GPT-2's published weights on Shakespeare, as in nanoGPT's example; see docs/finetune.md",
            Config(
                data=DataConfig(
                    data=Path("data/shakespeare"),
                    micro_batch_size=4,
                    total_batch_tokens=32_768,  # 32 sequences
                    val_tokens=1_000_000,  # the whole split
                ),
                optim=OptimConfig(learning_rate=3e-5, schedule="constant", warmup_steps=0),
                run=RunConfig(
                    run_dir=Path("runs/finetune"),
                    init_from="openai-community/gpt2",
                    max_steps=20,
                    eval_every=5,
                    log_every=1,
                    hellaswag_limit=0,
                    num_samples=1,
                    sample_tokens=100,
                    sample_prompt="ROMEO:",
                    checkpoint_every=5,
                    keep=1,  # and the best
                ),
            ),
        ),
        "debug": (
            "a tiny GPT, seconds on anything: to see that all parts run",
            Config(
                model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64),
                data=DataConfig(data=Path("data/pydocs"), micro_batch_size=4, total_batch_tokens=1024, val_tokens=4096),
                optim=OptimConfig(learning_rate=1e-3, warmup_steps=5),
                run=RunConfig(
                    run_dir=Path("runs/debug"),
                    max_steps=20,
                    eval_every=10,
                    log_every=1,
                    hellaswag_limit=0,
                    num_samples=1,
                    sample_tokens=16,
                    checkpoint_every=10,
                    compile=False,
                    wandb="disabled",
                ),
            ),
        ),
    }


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration a command line asks for.

    The first word is a preset's name, `gpt2` if it is missing; every field is a flag that changes it. `--config PATH`
    starts from a run's config.json instead of a preset.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: an unknown flag or preset, an impossible value, an unreadable configuration.
        SystemExit: after --help.
    """
    import tyro  # a third of a second, which importing the library need not cost

    words = ["--run-dir" + word[len("--run") :] if word.split("=")[0] == "--run" else word for word in argv]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    named = presets()
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise UserError("--config needs the path of a run's config.json")
        path = user_path(words[at + 1])
        if path.is_dir():  # a run's, its `checkpoints`, or one of these
            path = path.resolve().parent if (path / "training.json").exists() else path
            path = (path.resolve().parent if path.resolve().name == "checkpoints" else path) / "config.json"
        del words[at : at + 2]
        if words and not words[0].startswith("-"):
            raise UserError(f"give either a preset ({words[0]}) or --config {path}, not both")
        default, program = Config.load(path), "train_gpt2.py --config CONFIG"
        if (path.parent / "metrics.jsonl").exists():  # a run, which may have been moved since it wrote that
            default = replace(default, run=replace(default.run, run_dir=path.parent))
            default = _from_where_it_was_started(default)
    else:
        name = words.pop(0) if words and not words[0].startswith("-") else "gpt2"
        if name not in named:
            raise UserError(f"unknown preset {name!r}; choose one of {', '.join(named)}")
        default, program = named[name][1], f"train_gpt2.py {name}"
    lines = "\n".join(f"  {name:<23}{description}" for name, (description, _) in named.items())
    description = (
        "Train a GPT-2. The first word names a preset (gpt2 if there is none):\n"
        f"{lines}\n"
        "--config RUN/config.json in its place resumes a run, or repeats it in another --run. Each setting "
        "below is a flag; the defaults shown are the preset's."
    )
    said = io.StringIO()
    try:
        # Help from rank 0 only: torchrun's other processes would say the same of the same words.
        out = sys.stdout if os.environ.get("RANK", "0") == "0" else io.StringIO()
        with redirect_stdout(out), redirect_stderr(said):
            config: Config = tyro.cli(
                Annotated[Config, tyro.conf.OmitArgPrefixes],
                default=default,
                args=words,
                prog=program,
                description=description,
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UserError(f"{_in_one_line(said.getvalue())} {program} --help lists the settings") from None
    config = replace(config, data=_at_home(config.data), run=_at_home(config.run))
    limits = (default.run.max_steps, default.run.max_minutes)
    if (config.run.max_steps, config.run.max_minutes) != limits and config.run.fitted_steps == default.run.fitted_steps:
        config = replace(config, run=replace(config.run, fitted_steps=None))  # it was fixed under other limits
    if config.run.init_from is not None:
        shape = {f"--{f.name}".replace("_", "-") for f in fields(GPTConfig)} - {"--block-size", "--dropout"}
        given = {word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in words if word.startswith("--")}
        if odd := ", ".join(sorted(shape & given)):
            raise UserError(
                f"--init-from {config.run.init_from} brings the model's shape, which {odd} cannot change; leave one out"
            )
    return config


def _from_where_it_was_started(config: Config) -> Config:
    """A run's settings, with data that is not found from here found from the directory in which the run was started."""
    try:
        started = Path(read_json(config.run.run_dir / "environment.json", dict).get("directory", ""))
    except (FileNotFoundError, UserError, TypeError):  # of a version that did not write it, or damaged
        return config

    def find(path: Path) -> Path:
        return started / path if not path.exists() and (started / path).exists() else path

    examples = config.run.hellaswag_data
    return replace(
        config,
        data=replace(config.data, data=find(config.data.data)),
        run=replace(config.run, hellaswag_data=None if examples is None else find(examples)),
    )


def _at_home(part: P) -> P:
    """Settings with ~ at the beginning of a path replaced."""
    paths = {
        f.name: getattr(part, f.name)
        for f in fields(part)
        if "Path" in str(f.type) or f.name in ("init_from", "resume")
    }
    changes = {name: type(path)(user_path(path)) for name, path in paths.items() if str(path).startswith("~")}
    return replace(part, **changes)


def _in_one_line(box: str) -> str:
    """What is wrong with a command line, out of the box in which tyro shows it: a title, the problem, hints."""
    _, problem, *hints = re.split("[─-]{8,}", re.sub("[╭╮╰╯│]", " ", box))
    similar = [hint for hint in hints if re.match(r"\s*(Perhaps|Arguments similar)", hint)]
    meant = [name for hint in similar for name in re.findall(r"^ *(--[\w-]+) \S", hint, re.M)][:3]
    problem = " ".join(problem.split()).rstrip(".")[:300]
    return problem + (f"; did you mean {' or '.join(meant)}?" if meant else ";")
