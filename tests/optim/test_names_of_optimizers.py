"""No code decides by an optimizer's name: what the house knows of one stands in its own file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import steepest
from steepest.optim.family import FAMILY

SOURCE = Path(steepest.__file__).parent
CLASSES = {record.kind.__name__ for record in FAMILY.values()}
NAMES = set(FAMILY) | {"adam"}
OWN = {
    *(record.kind.__module__.split(".")[-1] for record in FAMILY.values()),
    *("family", "reference", "record", "adamw", "kronecker"),
}
EXCEPTIONS = {
    "lab/studies/edge_of_stability.py": "a study of these optimizers, as its paper lists them",
    "lab/studies/study_config.py": "what a study compares by default",
    "lab/train/config.py": "what is trained with by default",
    "lab/train/schedule.py": "a schedule has the name of the paper that it is from",
    "commands/transfer.py": "what is tuned for by default",
    "optim/settings.py": "values of `length`, which say whose length a step has",
    "optim/checks.py": "values of `length`",
    "optim/steepest_descent.py": "values of `length`",
    "optim/loading.py": "values of `length`",
    "lab/studies/schemas.py": "what version 0.1 wrote",
    "transfer/consistency.py": "the tangent kernel is that of SGD",
}


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of optimizers in code: not in docstrings, errors or defaults, nor of torch's own."""
    apart: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                apart.add(id(part.value))
        if isinstance(node, ast.arguments):
            apart |= {id(default) for default in (*node.defaults, *node.kw_defaults) if default}
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal":
            apart |= {id(part) for part in ast.walk(node)}
        if isinstance(node, ast.Raise):
            apart |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in apart:
            continue
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield node.lineno, str(node.value)
        if isinstance(node, ast.Name) and node.id in CLASSES:
            yield node.lineno, node.id
        if isinstance(node, ast.Attribute) and node.attr in CLASSES:
            owner = node.value
            if not (isinstance(owner, ast.Attribute) and owner.attr == "optim"):  # torch.optim.SGD
                yield node.lineno, node.attr


ABOUT_OPTIMIZERS = "lab/papers/"
"""The claims of papers are about the optimizers that they name."""


def files() -> list[str]:
    places = sorted(place.relative_to(SOURCE).as_posix() for place in SOURCE.rglob("*.py"))
    return [
        place
        for place in places
        if not place.endswith("__init__.py")
        and not place.startswith(ABOUT_OPTIMIZERS)
        and not (place.startswith("optim/") and Path(place).stem in OWN)
    ]


@pytest.mark.parametrize("place", files())
def test_no_code_decides_by_the_name_of_an_optimizer(place: str) -> None:
    found = list(named(ast.parse((SOURCE / place).read_text())))
    if place in EXCEPTIONS:
        assert found, f"{place} is no exception any more"
    else:
        assert not found


@pytest.mark.parametrize(
    "code",
    ['if name == "muon": pass', "isinstance(x, Shampoo)", "steepest.SOAP(p)", 'x = {"teon": 1}'],
)
def test_a_name_in_code_is_noticed(code: str) -> None:
    assert list(named(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        '"""About "muon"."""\n"muon"',
        'def f(x="muon"): pass',
        'raise ValueError("muon")',
        "torch.optim.SGD(p)",
    ],
)
def test_a_name_elsewhere_is_none(code: str) -> None:
    assert not list(named(ast.parse(code)))
