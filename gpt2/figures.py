"""Pictures as files. Needs matplotlib, without its windows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.errors import UserError, visible
from gpt2.files import check_output, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def label(text: str) -> str:
    """A foreign text as matplotlib draws it letter by letter: no TeX, nothing invisible, in a legend in any case."""
    shown = visible(text[:60]).replace("$", r"\$")
    return " " + shown if shown.startswith("_") else shown


def check_picture(path: Path | None, flag: str) -> None:
    """As `check_output`, of a picture: in a format that can be drawn, too."""
    from matplotlib.backend_bases import FigureCanvasBase

    check_output(path, flag)
    known = FigureCanvasBase.get_supported_filetypes()
    if path is not None and path.suffix and path.suffix[1:].lower() not in known:
        raise UserError(f"{flag} {path} is not a picture's name; end it in one of {', '.join(sorted(known))}")


def save_figure(figure: Figure, path: Path, title: str = "") -> Path:
    """Write a figure whole or not at all, in the format its file's name ends in, PNG if that is none; returns the path.

    Args:
        figure: made as `matplotlib.figure.Figure`, not by pyplot, which would keep it.
        path: its folder is made.
        title: in the file's metadata.

    Raises:
        UserError: it cannot be written there, or not in that format.
    """
    if not path.name:
        raise UserError(f"cannot write a picture to {path}: that is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            metadata = {"Title": title} if title else None
            figure.savefig(file, format=path.suffix[1:].lower() or "png", metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    except ValueError as error:  # matplotlib's list of formats
        raise UserError(f"cannot draw {path}: {str(error).rstrip('.')}") from None
    return path
