"""Where the tests find the project, its scripts, and the real data that lies beside it on some machines."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real text, HellaSwag and TinyShakespeare; tests that read it skip where it is absent."""


def load_script(path: str) -> ModuleType:
    """A script as a module.

    Args:
        path: within the project, such as "scripts/report.py".
    """
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
