"""From a diagnosis to a plan that trains no worse than Muon.

A verdict compares with Euclidean steps, one matrix at a time. A plan is compared with Muon, over a
whole training. So a hidden matrix leaves Muon on strong evidence only. The weights do not look
fresh. Real steps of another geometry are predicted to decrease the loss by 10% or more beyond
spectral ones, with a 95% interval above 1. Euclidean steps may have a wider interval
where the theory agrees: a layer with inputs of a high stable rank, as of white inputs, is where
Davis and Drusvyatskiy (arXiv 2512.04299) keep them. A quick diagnosis takes no steps. Its bound
alone is no evidence: of 31 matrices of trained networks for which it surely was below 1, spectral
steps won 18 races. So its plan is that of Muon.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from steepest.diagnosis.intervals import WORTH_IT, worth_it
from steepest.diagnosis.plan import Plan, Planned, PlanRow
from steepest.optim.record import ADAMW
from steepest.statistics import Interval

AGREED = 2.0
"""The theory speaks for Euclidean steps if it guarantees them this many times the decrease."""

if TYPE_CHECKING:
    from steepest.diagnosis.diagnosis import Diagnosis, MatrixDiagnosis


def planned(diagnosis: Diagnosis, default: Plan) -> Plan:
    """Return the plan of a diagnosis, with its notes."""
    matrices = defaultdict(list)
    for matrix in diagnosis:
        matrices[matrix.parameter].append(matrix)
    notes = list(diagnosis.notes)
    if diagnosis.fresh:
        notes.append("weights that look fresh say little of training, so the plan is Muon")
    elif diagnosis.level == "quick":
        notes.append("a quick diagnosis takes no steps, so its plan is Muon")
    if diagnosis.fresh or diagnosis.level == "quick":
        return Plan((_with_verdict(row, matrices[row.parameter]) for row in default), notes=notes)
    stacked = _stacked(diagnosis)
    rows = []
    for row in default:
        of_row = matrices[row.parameter]
        if row.geometry != "spectral" or not of_row:
            rows.append(_with_verdict(row, of_row))
        elif (leaving := _leaving(of_row)) is not None:
            rows.append(replace(row, geometry=leaving[0], reason=leaving[1]))
        elif stacked.get(row.parameter, 0) > 0.5:
            rows.append(replace(row, geometry="stacked", reason=f"{row.reason}; better as a stack"))
        else:
            reason = f"{row.reason}; no other geometry is surely better than spectral"
            rows.append(replace(row, reason=reason))
    return Plan(rows, notes=notes)


def better(matrix: MatrixDiagnosis) -> tuple[Planned, Interval] | None:
    """Return the geometry that is worth more than spectral steps by strong evidence, if any."""
    over = {p.geometry: p.over_spectral for p in matrix.predictions if p.over_spectral is not None}
    worth = {name: ratio for name, ratio in over.items() if worth_it(ratio)}
    if not worth and matrix.bound is not None and matrix.bound.high < -math.log(AGREED):
        likely = over.get("euclidean")
        if likely is not None and likely.value > math.log(WORTH_IT):
            worth = {"euclidean": likely}
    if not worth:
        return None
    best = max(worth, key=lambda name: worth[name].value)
    return best, worth[best]


def _leaving(matrices: Sequence[MatrixDiagnosis]) -> tuple[Planned, str] | None:
    """What more than half of the matrices of a parameter want in place of Muon, and why."""
    wanted = [choice for matrix in matrices if (choice := better(matrix))]
    if not wanted:
        return None
    [(geometry, count)] = Counter(name for name, _ in wanted).most_common(1)
    if count <= len(matrices) / 2:
        return None
    ratio = next(interval for name, interval in wanted if name == geometry)
    value, low, high = (math.exp(log) for log in (ratio.value, ratio.low, ratio.high))
    of = "" if len(matrices) == 1 else f"{count} of {len(matrices)}: "
    agrees = "" if worth_it(ratio) else f"; the theory agrees, with nr / st below 1/{AGREED:g}"
    return geometry, (
        f"{of}{geometry} steps are predicted to decrease the loss {value:.2g} times "
        f"({low:.2g} to {high:.2g}) as much as spectral ones{agrees}"
    )


def _with_verdict(row: PlanRow, matrices: Sequence[MatrixDiagnosis]) -> PlanRow:
    """The default row, with the verdict on what keeps AdamW."""
    verdicts = list(dict.fromkeys(m.verdict for m in matrices if m.verdict != "cannot tell"))
    if row.geometry != ADAMW or not verdicts:
        return row
    return replace(row, reason=f"{row.reason}; verdict: {', '.join(verdicts)}")


def _stacked(diagnosis: Diagnosis) -> dict[str, float]:
    """Of each parameter in stacks: the share of them that is better off as one."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for stack in diagnosis.stacks:
        for name in stack.matrices:
            verdicts[diagnosis[name].parameter].append(stack.verdict == "stacked")
    return {name: sum(votes) / len(votes) for name, votes in verdicts.items()}
