"""Draw one or more training runs as a page that opens offline, with PNG pictures beside it.

python scripts/report.py runs/gpt2 --out report.html
python scripts/report.py runs/baseline runs/muon --out compare.html --price 2.50
python scripts/report.py runs/gpt2 --watch
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.files import check_output, read_plain, user_path, write_whole
from gpt2.metrics.history import METRICS_FILE
from gpt2.report.content import report
from gpt2.report.runs import RecordedRun, open_run

PAGE = Path(__file__).resolve().parent / "report_page"


def render(content: dict[str, Any], *, refresh: int | None = None) -> str:
    """The page as one HTML text that loads nothing.

    Args:
        content: what `gpt2.report.content.report` returned.
        refresh: seconds after which a browser reads the file again; None: never.
    """
    # "<" inside JSON could end the script element that holds it; half a character cannot be written.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    data = data.encode("utf-8", "replace").decode("utf-8")
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in ("chart.js", "page.js"))
    if refresh is not None:
        page = page.replace("<title>", f'<meta http-equiv="refresh" content="{refresh}">\n<title>')
    pieces = {"style": (PAGE / "page.css").read_text(encoding="utf-8"), "script": script, "data": data}
    for name, text in pieces.items():
        page = page.replace(f"/* {name} */", text, 1)
    return page


def write_report(
    runs: Sequence[RecordedRun],
    out: Path,
    *,
    price: float | None,
    png: bool,
    log_tokens: bool,
    refresh: int | None = None,
) -> list[Path]:
    """Write the page and its pictures; returns what was written.

    Args:
        runs: to overlay.
        out: the page; pictures go beside it.
        price: per device-hour; None: no cost is shown.
        png: draw the pictures too.
        log_tokens: draw tokens on a logarithmic axis in the pictures; the page has a switch.
        refresh: seconds after which a browser reads the file again; None: never.

    Raises:
        UserError: the place cannot be written to.
    """
    content = report(runs, price=price)
    try:
        write_whole(out, render(content, refresh=refresh))
        written = [out]
        if png:
            from gpt2.report.plots import save_plots

            try:
                written += save_plots(content, out, log_tokens=log_tokens)
            except ImportError:
                print("no pictures: matplotlib is not installed (pip install matplotlib, or --no-png)")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}; choose another --out") from None
    return written


def positive(text: str) -> float:
    """A command-line number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main() -> int:
    """Write the report; with --watch again and again while a run trains."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=user_path, help="the page (default: report.html in the first RUN)")
    parser.add_argument("--price", type=positive, help="of one device for one hour, for the cost estimate")
    parser.add_argument("--log-tokens", action="store_true", help="logarithmic token axis in the PNG pictures")
    parser.add_argument("--no-png", dest="png", action="store_false", help="write the page alone")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=30.0,
        type=positive,
        metavar="SECONDS",
        help="rewrite it every so often (30) until no run is going; the page reloads itself",
    )
    args = parser.parse_args()
    directories = list({path.resolve(): path for path in args.runs}.values())
    out: Path = args.out or directories[0] / "report.html"
    check_output(out, "--out")
    if out.exists() and not read_plain(out)[:99].lower().startswith(b"<!doctype html"):
        raise UserError(f"--out {out} is not a page and is left as it is; name another file, such as report.html")
    while True:
        runs = [open_run(path) for path in directories]
        going = args.watch is not None and any(run.status() == "running" for run in runs)
        refresh = max(round(args.watch), 1) if going else None
        written = write_report(runs, out, price=args.price, png=args.png, log_tokens=args.log_tokens, refresh=refresh)
        for run in runs:
            if run.history.torn:
                torn = f"{run.history.torn} unreadable lines of {run.directory / METRICS_FILE} are left out"
                print(visible(torn), flush=True)
        print(visible(f"wrote {', '.join(map(str, written))}"), flush=True)
        if not going:
            return 0
        time.sleep(args.watch)


if __name__ == "__main__":
    run_cli(main)
