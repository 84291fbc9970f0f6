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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as their longest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows
    )


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    directory: Path = parser.parse_args().directory
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give one that holds runs")
    rows: list[tuple[str, ...]] = [HEAD]
    unreadable = []
    for path in find_runs(directory):
        try:
            name = "." if path == directory else visible(str(path.relative_to(directory)))
            rows.append(tuple(visible(cell) for cell in row(open_run(path), name)))
        except UserError as error:
            unreadable.append(str(error))
    if len(rows) == 1 and not unreadable:
        raise UserError(f"no run below {directory}; train one with train_gpt2.py, or give another directory")
    print(table(rows))
    for message in unreadable:
        print(visible(f"left out: {message}"))
    return 0


if __name__ == "__main__":
    run_cli(main)
