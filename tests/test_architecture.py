"""The house is as ARCHITECTURE.md draws it: a room imports only from rooms above it."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "steepest"
DRAWING = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
FACE = "steepest"  # its `__init__` imports from every room of the library


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


WRITTEN = {_module(path): path for path in SOURCE.rglob("*.py")}


def _rooms() -> list[str]:
    """The modules and packages of the drawing in its order, for the lab those inside it."""
    rooms, inside_lab = [], False
    for line in DRAWING.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            inside_lab = line.startswith("  lab/")
        if (indent == 2 and not inside_lab) or (indent == 4 and inside_lab):
            head = re.split(r"\s{3,}", line.strip())[0].split()
            wing = f"{FACE}.lab" if inside_lab else FACE
            names = [name for name in head if re.fullmatch(r"\w+(\.py|/)", name)]
            rooms += [f"{wing}.{name.removesuffix('.py').strip('/')}" for name in names]
    return [room for room in rooms if room != f"{FACE}.__init__"]


ROOMS = _rooms()


def _imports(module: str, everywhere: bool = True) -> Iterator[str]:
    """The modules of this package that a module imports; those it needs to begin, or all."""
    tree = ast.parse(WRITTEN[module].read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in WRITTEN)
        elif isinstance(node, ast.ImportFrom) and node.module in WRITTEN:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in WRITTEN else node.module


def _room(module: str) -> str | None:
    return next((r for r in ROOMS if module == r or module.startswith(f"{r}.")), None)


def test_the_drawing_has_every_module_and_no_other() -> None:
    missing = {m for m in WRITTEN if _room(m) is None} - {FACE, f"{FACE}.lab"}
    assert not missing, f"missing in ARCHITECTURE.md: {sorted(missing)}"
    gone = set(ROOMS) - WRITTEN.keys()
    assert not gone, f"drawn in ARCHITECTURE.md, and not there: {gone}"


@pytest.mark.parametrize("module", sorted(m for m in WRITTEN if _room(m)))
def test_a_room_imports_only_from_rooms_above_it(module: str) -> None:
    own = _room(module)
    assert own is not None
    for target in _imports(module):
        room = _room(target)
        if target == FACE and ROOMS.index(own) > ROOMS.index(f"{FACE}.transfer"):
            continue  # the lab and the command line use the library as people do
        assert room is not None, f"{module} imports {target}, which is no room"
        assert ROOMS.index(room) <= ROOMS.index(own), f"{module} imports {target}, a room below it"


def test_no_module_needs_itself_to_begin() -> None:
    graph = {module: set(_imports(module, everywhere=False)) - {module} for module in WRITTEN}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises for a circle
