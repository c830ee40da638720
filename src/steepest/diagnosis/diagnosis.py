"""Which norm each matrix of a model wants, with the evidence."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from rich.box import SIMPLE_HEAD
from rich.table import Table

from steepest.diagnosis.evidence import GeometryName, Spectrum
from steepest.diagnosis.intervals import WORTH_IT, Interval, worth_it
from steepest.diagnosis.plan import Plan, Planned, PlanRow
from steepest.diagnosis.race import RaceResult
from steepest.diagnosis.stacks import StackDiagnosis
from steepest.files import read_json, write_json
from steepest.parameter_roles import Role
from steepest.printing import as_text

Level = Literal["quick", "standard", "thorough"]
Verdict = Literal["spectral", "euclidean", "sign", "adaptive", "cannot tell"]


@dataclass(frozen=True)
class Prediction:
    """One step in one geometry, on the quadratic model.

    Attributes:
        geometry: of the direction D.
        gain: ⟨G, D⟩, the mean over pairs of batches; D is scaled as the geometry does.
        curvature: ⟨D, H D⟩, the mean; None at the level "quick", and so the next two.
        best_step: gain / |curvature|.
        decrease: of the quadratic model at the best step, gain² / (2 |curvature|).
        log_ratio: the natural logarithm of the decrease of the loss by four real steps over that by
            Euclidean ones, with its interval: see `steepest.diagnosis.descent`; at the level
            "quick" that of nr(G) / st(A), the ratio of the bounds of the theory.
    """

    geometry: GeometryName
    gain: float
    curvature: float | None
    best_step: float | None
    decrease: float | None
    log_ratio: Interval | None


@dataclass(frozen=True)
class MatrixDiagnosis:
    """One matrix: what it is, what was measured, what follows.

    Attributes:
        matrix: parameter name; `[i]` behind it counts the matrices of a fused or batched one.
        parameter: the parameter.
        role: what the parameter is, see `steepest.roles`.
        shape: (out, in).
        tokens: columns of the activations of one batch; 0 where the layer is not covered.
        stable_rank: of what the matrix multiplies, uncentred, behind the previous nonlinearity;
            the mean over batches, None where the layer is not covered. So the next two. For more
            than 128 features by 6 Krylov iterations: an upper bound, mostly within 1%.
        stable_rank_centred: with the mean over tokens taken off; of the first batch.
        stable_rank_output: of what the layer gives, before the next nonlinearity; of the first.
        nuclear_rank: ‖G‖_*² / ‖G‖_F², the mean over batches. For sides above 128 singular values
            below 1e-2 of (Σσ⁴)^(1/4) are damped, which took up to 15% off; the next is within 7%.
        nuclear_rank_across: (⟨G', polar(G)⟩ / ⟨G', G / ‖G‖_F⟩)² with G' from other batches: what is
            left of it without the noise; None where the batches have no common direction.
        gradient, momentum: nuclear rank, stable rank and largest singular values (over the
            Frobenius norm) of the first batch's gradient, and of the mean of all as in momentum.
        predictions: for each geometry that was looked at.
        race: what K real steps gave, at the level "thorough".
        verdict: the answer.
        reason: in a sentence.
    """

    matrix: str
    parameter: str
    role: Role
    shape: tuple[int, int]
    tokens: int
    stable_rank: float | None
    stable_rank_centred: float | None
    stable_rank_output: float | None
    nuclear_rank: float
    nuclear_rank_across: float | None
    gradient: Spectrum
    momentum: Spectrum
    predictions: tuple[Prediction, ...]
    race: tuple[RaceResult, ...]
    verdict: Verdict
    reason: str

    def mixed_bound(self, alpha: float = 0.0) -> float | None:
        """Return the ratio of guaranteed decreases, spectral over Euclidean, in the mixed form.

        nr (1 + α / st(G)) / (st(A) + α): the bound of Davis and Drusvyatskiy for all layers moving
        at once (arXiv 2512.04299, section 4, condition 4.16), where α is the curvature that acts
        through the operator norm of a layer's step over that through its activations. α = 0 is the
        condition nr(G) / st(A); the larger α, the closer to nr(G) / st(G), which is at least 1. The
        nuclear rank is that across batches. None where a rank is not known.

        Args:
            alpha: at least 0; it depends on the network and is not measured here.
        """
        if self.nuclear_rank_across is None or not self.stable_rank:
            return None
        over = 1 + alpha / self.gradient.stable_rank
        return self.nuclear_rank_across * over / (self.stable_rank + alpha)

    def prediction(self, geometry: GeometryName) -> Prediction | None:
        """Return the prediction for a geometry, if there is one."""
        return next((each for each in self.predictions if each.geometry == geometry), None)


class Diagnosis(Sequence[MatrixDiagnosis]):
    """The rows of `diagnose`, one for each matrix, in the model's order; prints as a table."""

    def __init__(
        self,
        rows: Sequence[MatrixDiagnosis],
        level: Level,
        batches: int,
        default: Plan,
        stacks: Sequence[StackDiagnosis] = (),
    ):
        self._rows = tuple(rows)
        self._default = default
        self.level: Level = level
        """How much was measured."""
        self.batches = batches
        """On how many batches."""
        self.stacks = tuple(stacks)
        """Of matrices in neighbouring layers: whether to orthogonalize them as one."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            for row in self._rows:
                if row.matrix == key:
                    return row
            raise KeyError(f"got {key!r}, which no matrix is called")
        return self._rows[key]

    def __str__(self) -> str:
        return as_text(self.table(), 100)

    def plan(self) -> Plan:
        """Return a plan for all parameters: the verdicts for hidden matrices, else the default.

        A parameter of several matrices, such as a fused projection, gets what most of them want.
        Where no geometry is told to be worth more than Euclidean steps, a hidden matrix stays
        spectral unless that is predicted to be worse by 10%, and surely not worth it: verdicts
        change in training, and mostly to its favour.
        Embeddings and heads stay with AdamW, whatever was found; the reason says what was. What is
        spectral is stacked if most of its stacks are said to want it.
        """
        wanted = self._stacked()
        rows = []
        for row in self._default:
            found = [each for each in self._rows if each.parameter == row.parameter]
            told = [(verdict, each) for each in found if (verdict := _wanted(each, row))]
            if not told:
                even = any(each.verdict == "euclidean" for each in found)
                said = "no geometry is worth more" if even else "cannot tell"
                reason = f"{said}; {row.reason}" if found else row.reason
                rows.append(_stacked_row(replace(row, reason=reason), wanted))
                continue
            counts = Counter(verdict for verdict, _ in told)
            verdict, count = counts.most_common(1)[0]
            best = next(_why(verdict, each) for mine, each in told if mine == verdict)
            reason = best if len(found) == 1 else f"{count} of {len(found)}: {best}"
            if row.geometry == "adaptive":
                reason = f"{row.reason}; found {verdict}: {reason}"
                rows.append(replace(row, reason=reason))
            else:
                row = replace(row, geometry=cast(Planned, verdict), reason=reason)
                rows.append(_stacked_row(row, wanted))
        return Plan(rows)

    def _stacked(self) -> dict[str, float]:
        """Of each parameter in stacks: the share of them that is better off as one."""
        verdicts: dict[str, list[bool]] = defaultdict(list)
        for stack in self.stacks:
            for name in stack.matrices:
                verdicts[self[name].parameter].append(stack.verdict == "stacked")
        return {name: sum(each) / len(each) for name, each in verdicts.items()}

    def table(self) -> Table:
        """Return the rows as a table for a terminal."""
        said, told = "", "decrease by steps of the best size over that by Euclidean ones"
        if self.level == "quick":
            told = "their ratio, the bound of the theory for spectral steps over Euclidean ones"
        if self.stacks:
            counts = Counter(stack.verdict for stack in self.stacks)
            said = (
                f"{len(self.stacks)} stacks of neighbouring layers: {counts['stacked']} better as "
                f"one, {counts['spectral']} apart; "
            )
        table = Table(
            box=SIMPLE_HEAD,
            title=f"{self.level}, {self.batches} batches",
            padding=(0, 1, 0, 0),
            caption=f"{said}nr(G) across batches over st(A); {told}, with its 80% interval for the "
            "verdict",
        )
        table.add_column("matrix", overflow="fold")
        table.add_column("nr / st", justify="right", no_wrap=True)
        shown: tuple[GeometryName, ...] = ("spectral",)
        if self.level != "quick":
            shown = ("spectral", "sign", "adaptive")
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in self._rows:
            table.add_row(
                row.matrix.removesuffix(".weight"),
                f"{_number(row.nuclear_rank_across)} / {_number(row.stable_rank)}",
                *(_ratio(row.prediction(name)) for name in shown),
                row.verdict + _interval(row),
            )
        return table

    def to_dataframe(self) -> Any:
        """Return a pandas data frame, a row for each matrix.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        import pandas

        records = []
        for row in self._rows:
            record = {f.name: getattr(row, f.name) for f in fields(row)}
            del record["predictions"], record["race"]
            for name in ("gradient", "momentum"):
                for key, value in asdict(record.pop(name)).items():
                    record[f"{name}_{key}"] = value
            for each in row.predictions:
                if each.log_ratio is not None:
                    record[f"{each.geometry}_log_ratio"] = each.log_ratio.value
            records.append(record)
        return pandas.DataFrame(records)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON with a checksum, whole or not at all."""
        write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        rows = [asdict(row) for row in self._rows]
        return {
            "kind": "diagnosis",
            "level": self.level,
            "batches": self.batches,
            "rows": rows,
            "stacks": [asdict(stack) for stack in self.stacks],
            "default": [asdict(row) for row in self._default],
        }

    @classmethod
    def load(cls, path: str | Path) -> Diagnosis:
        """Read what `save` wrote.

        Raises:
            ValueError: for another file.
        """
        try:
            content = read_json(path)
            rows = [_row(each) for each in content["rows"]]
            default = [PlanRow(**{**r, "shape": tuple(r["shape"])}) for r in content["default"]]
            return cls(
                rows,
                content["level"],
                content["batches"],
                Plan(default),
                [
                    StackDiagnosis(
                        tuple(each["matrices"]), _loaded(each["log_ratio"]), each["verdict"]
                    )
                    for each in content["stacks"]
                ],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {path}, which holds no diagnosis ({error}); expected what `save` wrote"
            ) from error


def _wanted(found: MatrixDiagnosis, default: PlanRow) -> Verdict | None:
    """What a matrix wants in a plan, if that is to change it."""
    if default.geometry != "spectral" or found.verdict not in ("euclidean", "cannot tell"):
        return None if found.verdict == "cannot tell" else found.verdict
    spectral = found.prediction("spectral")
    if spectral is None or spectral.log_ratio is None or worth_it(spectral.log_ratio) is not False:
        return None
    return "euclidean" if spectral.log_ratio.value < -math.log(WORTH_IT) else None


def _why(verdict: Verdict, found: MatrixDiagnosis) -> str:
    if found.verdict == verdict:
        return found.reason
    return f"spectral steps are predicted at {_ratio(found.prediction('spectral'))} times Euclidean"


def _stacked_row(row: PlanRow, wanted: dict[str, float]) -> PlanRow:
    if row.geometry != "spectral" or wanted.get(row.parameter, 0) <= 0.5:
        return row
    return replace(row, geometry="stacked", reason=f"{row.reason}; better as a stack")


def _loaded(given: Any) -> Interval | None:
    return None if given is None else Interval(**given)


def _row(content: dict[str, Any]) -> MatrixDiagnosis:
    predictions = tuple(
        Prediction(**{**each, "log_ratio": _loaded(each["log_ratio"])})
        for each in content["predictions"]
    )
    raced = tuple(
        RaceResult(
            **{
                **each,
                "decreases": tuple(each["decreases"]),
                "log_ratio": _loaded(each["log_ratio"]),
            }
        )
        for each in content["race"]
    )
    spectra = {
        name: Spectrum(**{**content[name], "leading": tuple(content[name]["leading"])})
        for name in ("gradient", "momentum")
    }
    changed = {
        **spectra,
        "predictions": predictions,
        "race": raced,
        "shape": tuple(content["shape"]),
    }
    return MatrixDiagnosis(**{**content, **changed})


def _ratio(prediction: Prediction | None) -> str:
    if prediction is None or prediction.log_ratio is None:
        return "-"
    return f"{math.exp(prediction.log_ratio.value):.2g}"


def _interval(row: MatrixDiagnosis) -> str:
    """That of the verdict, or nothing."""
    if row.verdict == "cannot tell" or row.verdict == "euclidean":
        return ""
    found = row.prediction(row.verdict)
    if found is None or found.log_ratio is None:
        return ""
    return f" ({math.exp(found.log_ratio.low):.2g} to {math.exp(found.log_ratio.high):.2g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
