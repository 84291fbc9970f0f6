"""Published figures that a run is held against, by model size and data set.

Sources: the released GPT-2 weights (Radford et al. 2019) scored on the first 10,485,760 validation tokens of each data
set; GPT-3's table H.1 (Brown et al. 2020); training logs of llm.c (FineWeb) and build-nanogpt (FineWeb-Edu).
FineWeb and FineWeb-Edu are different distributions: a loss on one says nothing about a baseline on the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gpt2.presets import presets

Corpus = Literal["fineweb", "fineweb-edu"]
Size = Literal["124M", "350M", "774M", "1558M"]

CORPUS_TITLES: Mapping[Corpus, str] = {"fineweb": "FineWeb", "fineweb-edu": "FineWeb-Edu"}

SHAPES: Mapping[tuple[int, int, int], Size] = {
    (12, 12, 768): "124M",
    (12, 6, 768): "124M",  # modded-nanogpt's, with heads of 128
    (24, 16, 1024): "350M",
    (36, 20, 1280): "774M",
    (48, 25, 1600): "1558M",
}
"""(n_layer, n_head, n_embd) to the size's name."""

BASELINE_VAL_TOKENS = 10_485_760
"""Validation tokens the baseline losses are means over."""

GPT2_VAL_LOSS: Mapping[Corpus, Mapping[Size, float]] = {
    "fineweb": {"124M": 3.4250, "350M": 3.0831, "774M": 3.0006, "1558M": 2.8313},
    "fineweb-edu": {"124M": 3.2924},
}
"""Mean next-token loss of the released GPT-2, nats."""

GPT2_HELLASWAG: Mapping[Size, float] = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4889}
"""acc_norm of the released GPT-2, completion convention (mean loss per token, raw context)."""

GPT2_HELLASWAG_HARNESS: Mapping[Size, tuple[float, float]] = {
    "124M": (0.2892, 0.3114),
    "350M": (0.333, 0.394),
    "774M": (0.364, 0.453),
    "1558M": (0.4004, 0.5089),
}
"""(acc, acc_norm) of the released GPT-2, harness convention (lm-evaluation-harness, task version 1.0)."""

GPT3_HELLASWAG: Mapping[Size, float] = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
"""Zero-shot accuracy of the GPT-3 model of about that size."""

HELLASWAG_CHANCE = 0.25
"""Accuracy of guessing: four endings."""


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a rate over n draws that are 0 or 1 (Wilson 1927, equation 4): within [0, 1].

    Args:
        rate: mean of the draws.
        n: how many; 0: nothing is known.
    """
    if n == 0:
        return 0.0, 1.0
    z2 = 1.959964**2 / n
    middle, reach = rate + z2 / 2, (z2 * (rate * (1 - rate) + z2 / 4)) ** 0.5
    return max((middle - reach) / (1 + z2), 0.0), min((middle + reach) / (1 + z2), 1.0)


RECIPE_TOKENS_PER_STEP = 524_288
"""Tokens per step of the runs that the milestones are from."""

MILESTONES: Mapping[Corpus, Mapping[Size, tuple[tuple[int, float], ...]]] = {
    "fineweb": {
        "124M": (
            (250, 6.171),
            (500, 5.374),
            (1000, 4.317),
            (2000, 3.859),
            (5000, 3.554),
            (10000, 3.392),
            (15000, 3.300),
            (18865, 3.272),
        )
    },
    "fineweb-edu": {"124M": ((250, 6.163), (1000, 4.153), (1250, 3.952))},
}
"""(step, validation loss) pairs that earlier reproductions logged, 524,288 tokens per step."""


RECIPE_3_28 = (
    (125, 4.586),
    (250, 4.098),
    (500, 3.828),
    (1000, 3.652),
    (2000, 3.454),
    (2500, 3.379),
    (3000, 3.304),
    (3250, 3.277),
)
"""The same of modded-nanogpt's optimization track, baseline result of 2026-06-11, on FineWeb; see docs/recipes.md."""


def corpus_of(dataset: str) -> Corpus | None:
    """Which corpus with published baselines a data set's name or source speaks of; None for any other.

    Understands Hub names (`HuggingFaceFW/fineweb-edu`) and the directories of peers (`edu_fineweb10B`, `fineweb10B`).
    """
    name = dataset.lower()
    if "fineweb" not in name or re.search(r"fineweb[-_]?2(?!\d)", name):  # FineWeb 2 is of other languages
        return None
    return "fineweb-edu" if re.search(r"edu[-_]?fineweb|fineweb[-_]?edu", name) else "fineweb"


def size_of(n_layer: int, n_head: int, n_embd: int) -> Size | None:
    """The GPT-2 size of this shape, None for any other shape."""
    return SHAPES.get((n_layer, n_head, n_embd))


def gpt2_val_loss(corpus: Corpus | None, size: Size | None) -> float | None:
    """Validation loss of the released GPT-2 of that size on that corpus; None where nobody published one."""
    if corpus is None or size is None:
        return None
    return GPT2_VAL_LOSS[corpus].get(size)


@dataclass(frozen=True)
class Published:
    """A published run that a run is held against while it trains.

    Attributes:
        label: whose, of what.
        points: (step, validation loss) pairs, RECIPE_TOKENS_PER_STEP tokens per step.
    """

    label: str
    points: tuple[tuple[int, float], ...]

    def beside(self, step: int, loss: float) -> str | None:
        """A validation loss beside the published one of the same step, in words; None where none was published."""
        expected = dict(self.points).get(step)
        if expected is None:
            return None
        return f"{self.label} {expected:.3f} at this step: {abs(loss - expected):.3f} " + (
            "lower" if loss < expected else "higher"
        )


def published(corpus: Corpus | None, config: Mapping[str, Mapping[str, Any]]) -> Published | None:
    """The published run of a run's own recipe, size and data; None where there is none.

    Args:
        corpus: the run's data set, if it has published figures.
        config: the run's settings, as `Config.to_dict` returns them.
    """
    model, data = config.get("model", {}), config.get("data", {})
    if corpus is None or data.get("total_batch_tokens") != RECIPE_TOKENS_PER_STEP:
        return None
    recipe = presets()["gpt2-3.28"][1].to_dict()
    optim, total_steps = config.get("optim", {}), config.get("run", {}).get("max_steps")
    if model == recipe["model"] and optim == recipe["optim"] and total_steps == recipe["run"]["max_steps"]:
        return Published("modded-nanogpt, 3.28 recipe", RECIPE_3_28) if corpus == "fineweb" else None
    if optim.get("optimizer") != "adamw":  # llm.c's and build-nanogpt's
        return None
    size = size_of(*(model.get(name, 0) for name in ("n_layer", "n_head", "n_embd")))
    points = MILESTONES[corpus].get(size, ()) if size is not None else ()
    whose = {"fineweb": "llm.c", "fineweb-edu": "build-nanogpt"}[corpus]
    return Published(f"{whose}, {size} on {CORPUS_TITLES[corpus]}", points) if points else None


def loss_beside_gpt2(corpus: Corpus | None, size: Size | None, loss: float, val_tokens: int) -> str | None:
    """How far a validation loss is from the released GPT-2's, in words; None where that is not known.

    Args:
        corpus: the data set, if it has published figures.
        size: the model's GPT-2 size, if it has one.
        loss: mean over `val_tokens` tokens, nats.
        val_tokens: said where it is not the baselines' number.
    """
    baseline = gpt2_val_loss(corpus, size)
    if baseline is None or corpus is None:
        return None
    text = f"GPT-2 {size} on {CORPUS_TITLES[corpus]} {baseline:.4f}: {_distance(baseline - loss, '.4f')}"
    if val_tokens != BASELINE_VAL_TOKENS:
        text += f" (ours over {val_tokens:,} tokens, not {BASELINE_VAL_TOKENS:,})"
    return text


def hellaswag_beside_gpt2(size: Size | None, acc_norm: float) -> str | None:
    """How far HellaSwag's acc_norm, completion convention, is from the released GPT-2's; None for no size of its."""
    if size is None:
        return None
    baseline = GPT2_HELLASWAG[size]
    return f"GPT-2 {size} {baseline:.2%}: {_distance(100 * (acc_norm - baseline), '.2f', ' points')}"


def _distance(better_by: float, form: str, unit: str = "") -> str:
    """How far from a baseline: "0.0123 better" or "0.0123 to go"."""
    return f"{better_by:{form}}{unit} better" if better_by >= 0 else f"{-better_by:{form}}{unit} to go"
