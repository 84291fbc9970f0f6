"""Train every combination of some settings with several seeds: a folder of runs for scripts/compare.py.

python scripts/sweep.py shakespeare-char --grid learning_rate=1e-3,3e-3 --seeds 3 --out runs/rates
python scripts/sweep.py debug --grid position=learned,rope --grid bias=true,false --seeds 2 --jobs 2 --max-steps 100

Flags that this script does not know go to train_gpt2.py. The same command again skips what is finished and resumes what
is not. Under a Slurm array each task takes its share of the runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.config import config_difference
from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.files import make_directory, user_path
from gpt2.metrics.history import METRICS_FILE
from gpt2.presets import parse_args
from gpt2.progress import duration
from gpt2.report.compare import INCIDENTAL
from gpt2.report.runs import RecordedRun, open_run

TRAINER = Path(__file__).resolve().parents[1] / "train_gpt2.py"
DONE = ("finished", "nonfinite", "spike")
"""How a run ends that is not started again: a diverged one would diverge again."""


@dataclass(frozen=True)
class Point:
    """One run of the sweep: its place in the grid with a seed."""

    name: str
    directory: Path
    words: tuple[str, ...]
    """The words of train_gpt2.py's command line."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the words that are train_gpt2.py's."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("preset", help="of train_gpt2.py")
    add("--grid", action="append", default=[], metavar="NAME=V1,V2", help="a setting's values; repeat for a product")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each combination, with seeds 0 to N - 1 [3]")
    add("--jobs", type=int, metavar="N", help="runs at a time, each on its own GPU [number of GPUs, 1 on a CPU]")
    add("--out", type=user_path, metavar="DIR", help="folder of the runs [runs/sweep-PRESET]")
    args, rest = parser.parse_known_args(argv)
    for name, value in (("--seeds", args.seeds), ("--jobs", args.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for word in rest:
        if word.split("=")[0] in ("--seed", "--run", "--run-dir", "--resume", "--config"):
            raise UserError(f"{word} cannot be given: a sweep chooses it for each run")
    return args, rest


def axes(grid: Sequence[str]) -> dict[str, list[str]]:
    """Settings and the values each takes: ["bias=true,false"] to {"bias": ["true", "false"]}."""
    found: dict[str, list[str]] = {}
    for word in grid:
        name, equals, values = word.partition("=")
        name, listed = name.strip().replace("-", "_"), [value.strip() for value in values.split(",")]
        if not name or not equals or "" in listed or len(set(listed)) < len(listed):
            raise UserError(f"--grid {word!r} is not NAME=V1,V2 with distinct values, such as learning_rate=1e-3,3e-3")
        if name in found or name in ("seed", "run_dir"):
            raise UserError(f"--grid {word!r}: {name} is {'given twice' if name in found else 'chosen by the sweep'}")
        found[name] = listed
    return found


def flag(name: str, value: str) -> list[str]:
    """A setting as words of train_gpt2.py's command line."""
    dashed = name.replace("_", "-")
    if value.lower() in ("true", "false"):
        return [f"--{dashed}" if value.lower() == "true" else f"--no-{dashed}"]
    return [f"--{dashed}", value]


def points(preset: str, grid: Sequence[str], seeds: int, out: Path, rest: Sequence[str]) -> Iterator[Point]:
    """Every run of the sweep, all combinations of a seed before the next seed: what is cut short can be compared."""
    names = axes(grid)
    for seed in range(seeds):
        for values in itertools.product(*names.values()):
            chosen = list(zip(names, values, strict=True))
            name = "/".join([",".join(f"{key}={value}" for key, value in chosen) or preset, f"seed={seed}"])
            words = [word for key, value in chosen for word in flag(key, value)]
            words = [preset, *rest, *words, "--seed", str(seed), "--run-dir", str(out / name)]
            yield Point(name, out / name, tuple(words))


def recorded(point: Point) -> RecordedRun | None:
    """The point's run as it is on disk; None where it has not begun.

    Raises:
        UserError: it was made with other settings.
    """
    if not (point.directory / METRICS_FILE).exists() or (point.directory / METRICS_FILE).stat().st_size == 0:
        return None
    run = open_run(point.directory)
    changed = config_difference(run.config, parse_args(point.words).to_dict()) if run.config else {}
    for name, (old, new) in changed.items():
        if name.split(".")[1] not in INCIDENTAL:
            raise UserError(f"{point.directory} was made with {name} {old}, this sweep has {new}; choose another --out")
    return run


class Sweep:
    """Trains the points, some at a time.

    Args:
        todo: what is left to train.
        jobs: processes at a time.
        gpus: to give one process each; none on a CPU.
    """

    def __init__(self, todo: Sequence[Point], jobs: int, gpus: int):
        self.todo, self.jobs, self.gpus = todo, jobs, gpus
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.failed: list[Path] = []

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on: the runs save and end, and no further one begins."""
        self.stopped = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)

    def run(self) -> None:
        """Train everything."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        with ThreadPoolExecutor(self.jobs) as pool:
            slots = list(range(self.jobs))
            list(pool.map(lambda item: self._train(*item, slots), enumerate(self.todo, start=1)))

    def _train(self, number: int, point: Point, slots: list[int]) -> None:
        if self.stopped:
            return
        slot = slots.pop()
        environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.jobs, 1)), **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpus(self.gpus)[slot % self.gpus]
        point.directory.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, so that runs/sweep/*/* names runs alone.
        log, began = point.directory.with_name(f".{point.directory.name}.log"), time.monotonic()
        with log.open("ab") as output:
            command = [sys.executable, str(TRAINER), *point.words]
            # In a session of its own: Ctrl-C reaches it as this script's SIGTERM, once.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self.running.add(process)
            if self.stopped:  # a signal between the test above and here
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self.running.discard(process)
        slots.append(slot)
        run = recorded(point)
        if run is None or code not in (0, 3):  # 3: it diverged, which is a result
            self.failed.append(log)
            last = (log.read_text(errors="replace").strip().splitlines() or ["without a word"])[-1]
            status = f"failed with exit code {code}: {last}"
        else:
            losses = run.records("val")
            status = run.status() + (f", validation loss {losses[-1]['loss']:.4f}" if losses else "")
        took = duration(time.monotonic() - began)
        print(visible(f"{number}/{len(self.todo)} {point.name}: {status}, {took}"), flush=True)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of this process's GPUs."""
    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return named or [str(index) for index in range(count)]


def share(items: Sequence[Point], environment: dict[str, str]) -> Sequence[Point]:
    """The part of a sweep that this task of a Slurm array takes; everything outside of one."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return items
    first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", "1")) for name in ("MIN", "STEP"))
    place = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
    return items[place :: int(environment["SLURM_ARRAY_TASK_COUNT"])]


def main() -> int:
    """Train what is not finished; 1 where a run failed."""
    import torch

    args, rest = parse(sys.argv[1:])
    out: Path = args.out or Path("runs") / f"sweep-{args.preset}"
    every = list(points(args.preset, args.grid, args.seeds, out, rest))
    for point in every:
        parse_args(point.words)  # refuses an impossible setting before anything is trained
    gpus = torch.cuda.device_count()
    make_directory(out, "--out")
    mine = share(every, dict(os.environ))
    todo = []
    for point in mine:
        run = recorded(point)
        if run is None or run.status() not in DONE:
            todo.append(point)
    of_all = "" if len(mine) == len(every) else f" of {len(every)} in the whole array"
    print(f"{len(mine)} runs{of_all} in {out}, {len(mine) - len(todo)} of them done", flush=True)
    sweep = Sweep(todo, min(args.jobs or gpus or 1, max(len(todo), 1)), gpus)
    sweep.run()
    if sweep.stopped:
        print("stopped; the same command continues")
    elif not sweep.failed:
        print(f"python scripts/compare.py {out}")
    for log in sweep.failed:
        print(f"failed: {log}", file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    run_cli(main)
