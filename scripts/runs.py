"""List the runs below a directory: what each is, how far it got, whether it is alive.

python scripts/runs.py runs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.files import user_path
from gpt2.progress import columns_of, table
from gpt2.report.compare import INCIDENTAL
from gpt2.report.content import differences
from gpt2.report.plots import short
from gpt2.report.runs import RecordedRun, find_runs, open_run

HEAD = ("run", "preset", "tokens", "steps", "best loss", "bits/byte", "HellaSwag", "tok/s", "status", "last checkpoint")


def row(run: RecordedRun, name: str) -> tuple[str, ...]:
    """A run's cells under `HEAD`, "-" where nothing is known."""
    scores = run.records("hellaswag")
    total = run.start.get("total_steps")
    return (
        name,
        run.preset or "-",
        short(run.tokens),
        f"{run.step}/{total}" if total else str(run.step),
        "-" if run.best_loss is None else f"{run.best_loss:.4f}",
        "-" if run.best_bits_per_byte is None else f"{run.best_bits_per_byte:.4f}",
        f"{scores[-1]['acc_norm']:.2%}" if scores else "-",
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        run.status(),
        run.last_checkpoint or "-",
    )


def differing(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Sequence[str]]:
    """Rows of the settings in which runs differ, where they write and what they only show aside; empty: none."""
    if len(runs) < 2:
        return []
    rows = [row for row in differences([run.config for run in runs]) if row["name"].split(".")[1] not in INCIDENTAL]
    seeds = [str(run.config.get("run", {}).get("seed", "-")) for run in runs]
    found = [(row["name"].split(".")[1], *map(shown, row["values"])) for row in rows]
    found += [("seed", *seeds)] if len(set(seeds)) > 1 else []
    return [("setting", *names), *found] if found else []


def shown(value: object) -> str:
    """A setting's value in a cell."""
    return "-" if value is None else visible(str(value))


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", nargs="?", type=user_path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    directory: Path = parser.parse_args().directory
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give one that holds runs")
    rows: list[tuple[str, ...]] = [HEAD]
    unreadable, runs = [], []
    for path in find_runs(directory):
        try:
            run = open_run(path)
            name = "." if path == directory else visible(str(path.relative_to(directory)))
            rows.append(tuple(visible(cell) for cell in row(run, name)))
            runs.append(run)
        except UserError as error:
            unreadable.append(str(error))
    if len(rows) == 1 and not unreadable:
        raise UserError(f"no run below {directory}; train one with train_gpt2.py, or give another directory")
    columns = columns_of(sys.stdout)
    print(table(rows, columns))
    if different := differing(runs, [cells[0] for cells in rows[1:]]):
        print(f"\n{table(different, columns)}")
    for message in unreadable:
        print(visible(f"left out: {message}"))
    return 0


if __name__ == "__main__":
    run_cli(main)
