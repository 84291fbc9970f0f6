"""Pictures as files. Needs matplotlib, without its windows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.errors import UserError
from gpt2.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all, in the format its file's name ends in, PNG if that is none; returns the path.

    Args:
        figure: made as `matplotlib.figure.Figure`, not by pyplot, which would keep it.
        path: its folder is made.

    Raises:
        UserError: it cannot be written there, or not in that format.
    """
    if not path.name:
        raise UserError(f"cannot write a picture to {path}: that is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower() or "png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    except ValueError as error:  # matplotlib's list of formats
        raise UserError(f"cannot draw {path}: {str(error).rstrip('.')}") from None
    return path
