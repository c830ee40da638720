"""Names are nouns of the field, and a name at the top of a module means one thing."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}

NAMED = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.ExceptHandler,
    ast.MatchAs,
    ast.MatchStar,
)
FILLERS = {"found", "each", "what", "given", "told", "mine", "how"}
ALLOWED = 20

ONE_MEANING = {
    "CLAIMS",  # those that an experiment of a paper decides
    "PAPER",
    "adam_direction",  # in the reference of optimizers and, with memory in batches, for a length
    "main",  # of the command line, and the script that calls it
    "EXACT",  # up to how many rows a spectrum is taken whole
    "inverse_root",  # the reference of optimizers says in plain torch what linalg does fast
    "polar",
    "read_json",  # the lab's adds what to do about a damaged file
    "trace",  # of a map, and of a curvature operator
}
"""Functions of one name and one meaning in two modules."""


def _bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every assignment, loop, comprehension, argument, import and definition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name
        elif isinstance(node, NAMED) and node.name:
            yield node.lineno, node.name


def test_every_way_to_bind_a_name_counts() -> None:
    source = (
        "import a as found\n"
        "each = 1\n"
        "for what, _ in b: pass\n"
        "def given(told, *mine, **how): pass\n"
        "[x for found in c if (each := found)]\n"
        "try: pass\n"
        "except E as what: pass\n"
        "with d as given: pass\n"
        "found.each = how(what=told)\n"  # binds nothing
    )
    names = Counter(name for _, name in _bound(ast.parse(source)) if name in FILLERS)
    assert names == {"found": 2, "each": 2, "what": 2, "given": 2, "told": 1, "mine": 1, "how": 1}


def test_names_are_nouns_of_the_field() -> None:
    fillers = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path, tree in TREES.items()
        for line, name in _bound(tree)
        if name in FILLERS
    ]
    assert len(fillers) <= ALLOWED, f"{len(fillers)} names say nothing: {', '.join(fillers)}"


def _at_the_top(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes, types and constants that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_a_public_name_at_the_top_of_a_module_is_defined_once() -> None:
    modules = defaultdict(list)
    for path, tree in TREES.items():
        for name in _at_the_top(tree):
            if not name.startswith("_"):
                modules[name].append(str(path.relative_to(SOURCE)))
    twice = {name: paths for name, paths in modules.items() if len(paths) > 1}
    assert twice.keys() <= ONE_MEANING, {n: twice[n] for n in twice.keys() - ONE_MEANING}
    assert twice.keys() == ONE_MEANING, f"no longer defined twice: {ONE_MEANING - twice.keys()}"
