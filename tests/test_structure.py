"""The house: which module may import which, and what an import of the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

# Low to high: a room imports rooms to its left, never one to its right. Modules of gpt2/ itself come before all rooms.
ROOMS = (
    *("tokens", "prepare", "model", "distributed", "checkpoint"),
    *("hellaswag", "generation", "metrics", "train", "report"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gpt2").rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys()


def height(module: str) -> int:
    """0 for a module of gpt2/ itself, then by room."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) + 1 if len(parts) > 1 and parts[1] in ROOMS else 0


def test_every_folder_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / "gpt2").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "gpt2"])
def test_no_import_points_upwards(module: str) -> None:
    upwards = [name for name in imports(MODULES[module]) if height(name) > height(module)]
    assert not upwards, f"{module} imports {upwards}, which are rooms above it"


def test_no_two_modules_import_each_other() -> None:
    arrows = {name: imports(path) - {name, "gpt2"} for name, path in MODULES.items() if name != "gpt2"}
    while free := [name for name, below in arrows.items() if not below & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, f"a circle among {sorted(arrows)}"


def test_the_package_imports_no_entry_point() -> None:
    entry_points = {path.stem for path in ROOT.glob("*.py")} | {"data", "scripts", "tests"}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & entry_points, path


def test_the_training_script_is_two_screens_a_student_reads() -> None:
    assert len((ROOT / "train_gpt2.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, gpt2; print(*sorted(m for m in sys.modules if m in ('torch', 'numpy', 'tiktoken')), gpt2.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['CharTokenizer'")


def test_every_public_name_is_where_the_package_says() -> None:
    import gpt2

    for name in gpt2.__all__:
        assert getattr(gpt2, name).__name__ in (name, "Tokenizer")
    with pytest.raises(AttributeError, match="no attribute 'nanoGPT'; its names are CharTokenizer, "):
        gpt2.nanoGPT  # noqa: B018
