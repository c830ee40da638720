"""A summary is checked when it is read: field by field, and by name."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from steepest.lab.errors import InputError
from steepest.lab.files import write_json
from steepest.lab.report import find, write
from steepest.lab.studies.schemas import SCHEMAS, checked_summary

PATH = Path("runs/mine/summary.json")
RATIO = {"value": 0.1, "low": -0.1, "high": None}
EDGE = {
    "kind": "edge_of_stability",
    "edge": [0.9, 1.1],
    "entries": [
        {
            "name": "gd", "label": "GD", "lr": 0.1, "measure": None, "threshold": 20,
            "runs": [
                {
                    "ratio": 0.9, "low": 0.8, "high": 1.0, "verdict": "at the edge",
                    "steps": [0, 1], "loss": [1.0, math.nan], "sharpness": [2, None],
                    "ratios": [None, 0.9],
                }
            ],
        }
    ],
}  # fmt: skip
DIAGNOSIS = {
    "kind": "diagnosis",
    "level": "quick",
    "batches": 3,
    "rows": [
        {
            "matrix": "0.weight", "role": "hidden", "shape": [4, 4], "tokens": 8,
            "stable_rank": 2.0, "stable_rank_centred": None, "stable_rank_output": 1.0,
            "nuclear_rank": 3.0, "nuclear_rank_across": 2.0, "gradient": None,
            "momentum": {"leading": [1.0], "nuclear_rank": 1.0},
            "predictions": [{"geometry": "spectral", "log_ratio": RATIO}],
            "race": [{"geometry": "spectral", "log_ratio": None}],
            "verdict": "spectral", "reason": "",
        }
    ],
}  # fmt: skip
TRANSFER = {
    "kind": "transfer",
    "verdict": "transfers",
    "reasons": [],
    "retune": [],
    "advice": {"said": "0.02 for width 64"},
    "axes": [
        {
            "name": "width", "blown": [],
            "rates": {
                "rule": "mup", "optimizer": "adamw",
                "horizons": [
                    {
                        "steps": 12,
                        "rows": [
                            {
                                "size": {"width": 8}, "lr": 0.1, "octaves": -3.3, "interval": RATIO,
                                "score": 1, "scores": {"0.1": [1.0, None], "0.2": [2.0, 2]},
                            }
                        ],
                    }
                ],
            },
            "coordinates": {
                "rows": [{"layer": "0", "step": 5, "slope": 0.1, "error": None, "passed": None}]
            },
            "consistency": {
                "measure": "one step",
                "rows": [
                    {
                        "size": {"width": 8}, "steps": [0], "ratios": [0.1], "losses": [None],
                        "ending": [0.2], "movement": [0.1],
                    }
                ],
            },
        }
    ],
}  # fmt: skip
RUN = {
    "kind": "run", "status": "diverged", "reason": "NaN at step 3", "unit": "tokens",
    "model": "gpt, width 8", "optimizer": "muon", "label": "Muon", "lr": None, "steps": 4,
    "result": {"step": 2, "validation_loss": None, "tokens": 8},
    "metrics": [
        {
            "kind": "sharpness", "step": 2, "sharpness": 3, "loss": math.nan,
            "stability": [{"measure": "one step", "ratio": 0.5}],
        }
    ],
}  # fmt: skip


REPRODUCTION: dict[str, Any] = {
    "kind": "reproduction",
    "title": "A paper",
    "paper": {"name": "paper", "authors": "N. N.", "arxiv": "0"},
    "claims": [
        {
            "name": "small", "sentence": "It is small.", "place": "p. 1", "source": "ours",
            "checks": ["A1"], "experiment": "drawing", "kind": "theory", "quantity": "a number",
            "criterion": "a number: at most 1", "limits": "at most 1", "paper": "0.5",
            "values": [0.5, None], "interval": {"value": 0.5, "low": 0.4, "high": 0.6},
            "verdict": "reproduced", "reason": "the interval lies inside", "control": False,
        }
    ],
    "experiments": [
        {
            "name": "drawing", "title": "Drawing", "kind": "theory", "sizes": {"mean": 0.5},
            "data": None, "seeds": 1, "numbers": [{"drawn": 0.5}],
        }
    ],
    "left_out": {"A2": "it needs more than there is"},
}  # fmt: skip


@pytest.fixture
def summaries(summary: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A summary of each kind."""
    return {
        "study": summary(2, 2, 2),
        "edge_of_stability": EDGE,
        "diagnosis": DIAGNOSIS,
        "transfer": TRANSFER,
        "run": RUN,
        "comparison": {
            "kind": "comparison",
            "runs": [{"name": name, "summary": RUN} for name in "ab"],
            "studies": [],
        },
        "reproduction": REPRODUCTION,
    }


def fields(value: Any, wanted: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field in a summary that its schema names and needs."""
    parts = [part for part in (wanted, *get_args(wanted)) if is_typeddict(part)]
    if get_origin(wanted) is list and isinstance(value, list) and value:
        yield from fields(value[0], get_args(wanted)[0], (*path, 0))
    elif parts and isinstance(value, dict):
        for name, kind in get_type_hints(parts[0], include_extras=True).items():
            if name in value and get_origin(kind) is not NotRequired:
                yield (*path, name)
            if name in value:
                inner = get_args(kind)[0] if get_origin(kind) is NotRequired else kind
                yield from fields(value[name], inner, (*path, name))


def dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[1:]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_missing_and_every_wrong_field_is_named(
    kind: str, summaries: dict[str, dict[str, Any]]
) -> None:
    whole = summaries[kind]
    assert checked_summary(whole, PATH) == whole
    paths = [path for path in fields(whole, SCHEMAS[kind]) if path != ("kind",)]
    assert len(paths) > 10
    for path in paths:
        for change in ("without", "wrong"):
            changed = copy.deepcopy(whole)
            place: Any = changed
            for key in path[:-1]:
                place = place[key]
            if change == "without":
                del place[path[-1]]
            else:
                place[path[-1]] = {1, 2}
            name = re.escape(dotted(path))
            with pytest.raises(InputError, match=rf"with(out)? {name}\b"):
                checked_summary(changed, PATH)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_command_and_the_page_refuse_it_with_the_file(
    kind: str, summaries: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    whole = summaries[kind]
    page = write(whole, tmp_path / "report.html")
    assert find(page)[0].get("kind") == kind
    write_json(tmp_path / "summary.json", whole)
    assert find(tmp_path)[1] == page
    field = next(path[0] for path in fields(whole, SCHEMAS[kind]) if path != ("kind",))
    torn = {key: value for key, value in whole.items() if key != field}
    write_json(tmp_path / "summary.json", torn)
    with pytest.raises(InputError, match=rf"json without {field}"):
        find(tmp_path)
    block = f'<script type="application/json" id="steepest-summary">{json.dumps(torn)}</script>'
    page.write_text(block)
    with pytest.raises(InputError, match=rf"html without {field}"):
        find(page)


def test_numbers_are_told_from_texts_and_from_true(summaries: dict[str, dict[str, Any]]) -> None:
    for value in ("0.1", True, [0.1], {}):
        changed = copy.deepcopy(summaries["edge_of_stability"])
        changed["entries"][0]["lr"] = value
        with pytest.raises(InputError, match=r"\[0\]\.lr = .* a number"):
            checked_summary(changed, PATH)
        changed = copy.deepcopy(summaries["study"])
        changed["optimizers"][1]["curves"][0]["tokens"][2] = value
        with pytest.raises(InputError, match=r"\[1\]\..*\.tokens\[2\] "):
            checked_summary(changed, PATH)
    changed = copy.deepcopy(summaries["transfer"])
    changed["axes"][0]["rates"]["horizons"][0]["rows"][0]["scores"]["0.2"][1] = "none"
    with pytest.raises(InputError, match=r"scores\['0\.2'\]\[1\] "):
        checked_summary(changed, PATH)


def test_forms_of_version_0_1_are_read(summaries: dict[str, dict[str, Any]]) -> None:
    old = copy.deepcopy(summaries["study"])
    del old["kind"]  # the only kind there was
    for optimizer in old["optimizers"]:
        optimizer.pop("sharpness", None)
        del optimizer["conditions"]
    checked_summary(old, PATH)
    old = copy.deepcopy(summaries["diagnosis"])  # no stacks, no plan, no warm-up, no audit
    del old["rows"][0]["gradient"], old["rows"][0]["momentum"]
    checked_summary(old, PATH)
    old = copy.deepcopy(summaries["transfer"])  # slopes without a verdict, horizons without advice
    del old["axes"][0]["coordinates"]["rows"][0]["passed"]
    old["advice"] = None
    checked_summary(old, PATH)
    checked_summary(
        {**summaries["edge_of_stability"], "new": "fields of later versions stay"}, PATH
    )


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"summary\.json: .*'poem'"):
        checked_summary({"kind": "poem"}, PATH)
    with pytest.raises(InputError, match=r"json: .*\['study'\]"):
        checked_summary({"kind": ["study"]}, PATH)
