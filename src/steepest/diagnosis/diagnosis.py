"""Which norm each matrix of a model wants, with the evidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from steepest.diagnosis.advice import planned
from steepest.diagnosis.evidence import GeometryName, SingularSpectrum
from steepest.diagnosis.plan import Plan, PlanRow
from steepest.diagnosis.race import RaceResult
from steepest.diagnosis.stacks import StackDiagnosis
from steepest.diagnosis.warmup import WarmUp
from steepest.files import read_json
from steepest.model.parameter_roles import Role
from steepest.printing import sentence
from steepest.results import Column, Result, ResultTable
from steepest.statistics import Interval

Level = Literal["quick", "standard", "thorough"]
Verdict = Literal["spectral", "euclidean", "sign", "adamw", "cannot tell"]


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
        over_spectral: the same over spectral steps, with its 95% interval, which plans follow; None
            at the level "quick".
    """

    geometry: GeometryName
    gain: float
    curvature: float | None
    best_step: float | None
    decrease: float | None
    log_ratio: Interval | None
    over_spectral: Interval | None = None


@dataclass(frozen=True, repr=False)
class MatrixDiagnosis(Result):
    """One matrix: what it is, what was measured, what follows.

    A matrix whose gradient is zero on some batch has no numbers; its reason says so.

    Attributes:
        matrix: parameter name; behind it `[query]`, `[key]` or `[value]` of a fused one, or `[i]`,
            which counts the matrices of another.
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
            left of it without the noise, min(m, n) at most, which noise may exceed; None where the
            batches have no common direction.
        gradient, momentum: nuclear rank, stable rank and largest singular values (over the
            Frobenius norm) of the first batch's gradient, and of the mean of all as in momentum.
        predictions: for each geometry that was looked at.
        race: what K real steps gave, at the level "thorough".
        verdict: the answer.
        reason: in a sentence.
        bound: the natural logarithm of nr(G) across batches over st(A), what the theory guarantees
            of spectral steps over Euclidean ones, with its 95% interval; None where not known.
    """

    matrix: str
    parameter: str
    role: Role
    shape: tuple[int, int]
    tokens: int
    stable_rank: float | None
    stable_rank_centred: float | None
    stable_rank_output: float | None
    nuclear_rank: float | None
    nuclear_rank_across: float | None
    gradient: SingularSpectrum | None
    momentum: SingularSpectrum | None
    predictions: tuple[Prediction, ...]
    race: tuple[RaceResult, ...]
    verdict: Verdict
    reason: str
    bound: Interval | None = None

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
        if self.nuclear_rank_across is None or not self.stable_rank or self.gradient is None:
            return None
        over = 1 + alpha / self.gradient.stable_rank
        return self.nuclear_rank_across * over / (self.stable_rank + alpha)

    def table(self) -> ResultTable:
        """Return the predictions of its geometries, and the verdict."""
        columns = (
            Column("geometry"),
            Column("ratio", "decrease over Euclidean", ".2g"),
            Column("low", "80% interval from", ".2g"),
            Column("high", "to", ".2g"),
        )
        rows = []
        for prediction in self.predictions:
            ends = prediction.log_ratio
            ratios = (None,) * 3 if ends is None else (ends.value, ends.low, ends.high)
            rows.append(
                (prediction.geometry, *(None if x is None else math.exp(x) for x in ratios))
            )
        title = f"{self.matrix}, {self.role} {self.shape[0]} x {self.shape[1]}"
        caption = sentence(f"{self.verdict}: {self.reason}")
        return ResultTable(columns, tuple(rows), title, caption)

    def prediction(self, geometry: GeometryName) -> Prediction | None:
        """Return the prediction for a geometry, if there is one."""
        return next(
            (prediction for prediction in self.predictions if prediction.geometry == geometry), None
        )


class Diagnosis(Result, Sequence[MatrixDiagnosis]):
    """The rows of `diagnose`, one for each matrix, in the model's order; prints as a table."""

    width = 100

    def __init__(
        self,
        rows: Sequence[MatrixDiagnosis],
        level: Level,
        batches: int,
        default: Plan,
        stacks: Sequence[StackDiagnosis] = (),
        *,
        warm_up: WarmUp | None = None,
        fresh: bool = False,
        notes: Sequence[str] = (),
    ):
        self._rows = tuple(rows)
        self._default = default
        self.level: Level = level
        """How much was measured."""
        self.batches = batches
        """On how many batches, without those of a warm-up."""
        self.stacks = tuple(stacks)
        """Of matrices in neighbouring layers: whether to orthogonalize them as one."""
        self.warm_up = warm_up
        """How a copy was trained before it was judged; None if the model itself was."""
        self.fresh = fresh
        """Whether the weights that were judged look as if nobody had trained them."""
        self.notes = tuple(notes)
        """What to know of these weights, in sentences."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            for row in self._rows:
                if row.matrix == key:
                    return row
            raise KeyError(f"got {key!r}, which no matrix is called")
        return self._rows[key]

    def plan(self) -> Plan:
        """Return a plan for all parameters that is meant to train no worse than Muon.

        A hidden matrix leaves Muon for another geometry on strong evidence: steps of that one are
        predicted to decrease the loss by 10% or more beyond spectral ones, with a 95% interval
        above 1. For Euclidean steps the 10% will do where the theory says so too: nr(G) / st(A) is
        below 1/2, with its 95% interval. A parameter of several matrices leaves where more than
        half of them want the same geometry. What is spectral is stacked if most of its stacks are
        said to want it. Embeddings and heads keep AdamW. The plan is that of Muon at the level
        "quick", which takes no steps, and for weights that look fresh; `Plan.notes` say so.
        """
        return planned(self, self._default)

    def table(self) -> ResultTable:
        """Return ranks, predicted ratios and verdict of each matrix."""
        shown: tuple[GeometryName, ...] = ("spectral",)
        if self.level != "quick":
            shown = ("spectral", "sign", "adamw")
        columns = (
            Column("matrix"),
            Column("ranks", "nr / st", right=True),
            *(Column(name, form=".2g", right=True) for name in shown),
            Column("verdict"),
        )
        rows = tuple(
            (
                row.matrix.replace(".weight[", "[").removesuffix(".weight"),
                f"{_number(row.nuclear_rank_across)} / {_number(row.stable_rank)}",
                *(_ratio(row.prediction(name)) for name in shown),
                row.verdict + _interval(row),
            )
            for row in self._rows
        )
        title = f"{self.level}, {self.batches} batches"
        return ResultTable(columns, rows, title, "\n".join(self._caption()))

    def _caption(self) -> list[str]:
        """What the table shows, what was done before, and what follows, a sentence a line."""
        ratio = "decrease of the loss by four steps of the best size over that by Euclidean ones"
        if self.level == "quick":
            ratio = (
                "their ratio, by which the theory bounds the decrease of the loss over Euclidean"
            )
        lines = [
            "nr / st: nuclear rank of the gradient across batches over stable rank of the input.",
            f"spectral{', sign, adamw' if self.level != 'quick' else ''}: {ratio}.",
            "Behind a verdict: the 80% interval of its ratio.",
        ]
        if self.stacks:
            counts = Counter(stack.verdict for stack in self.stacks)
            lines.append(
                f"{len(self.stacks)} stacks of neighbouring layers: {counts['stacked']} better as "
                f"one, {counts['spectral']} apart, {counts['cannot tell']} cannot tell."
            )
        plan = self.plan()
        geometries = Counter(row.geometry for row in plan)
        total = ", ".join(f"{count} {name}" for name, count in geometries.most_common())
        return [*lines, *map(sentence, plan.notes), f"Plan of {len(plan)} parameters: {total}."]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The fields of every row, with the ratios of its predictions."""
        records = []
        for row in self._rows:
            record = {f.name: getattr(row, f.name) for f in fields(row)}
            del record["predictions"], record["race"]
            for name in ("gradient", "momentum"):
                spectrum = record.pop(name) or SingularSpectrum(math.nan, math.nan, ())
                for key, value in asdict(spectrum).items():
                    record[f"{name}_{key}"] = value
            for prediction in row.predictions:
                if prediction.log_ratio is not None:
                    record[f"{prediction.geometry}_log_ratio"] = prediction.log_ratio.value
            records.append(record)
        return records

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        rows = [asdict(row) for row in self._rows]
        plan = self.plan()
        return {
            "kind": "diagnosis",
            "level": self.level,
            "batches": self.batches,
            "rows": rows,
            "stacks": [asdict(stack) for stack in self.stacks],
            "warm_up": None if self.warm_up is None else asdict(self.warm_up),
            "fresh": self.fresh,
            "notes": list(self.notes),
            "advice": {"rows": [asdict(row) for row in plan], "notes": list(plan.notes)},
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
            rows = [_row(row) for row in content["rows"]]
            default = [PlanRow(**{**r, "shape": tuple(r["shape"])}) for r in content["default"]]
            return cls(
                rows,
                content["level"],
                content["batches"],
                Plan(default),
                [
                    StackDiagnosis(
                        tuple(stack["matrices"]), _loaded(stack["log_ratio"]), stack["verdict"]
                    )
                    for stack in content["stacks"]
                ],
                warm_up=WarmUp(**warm_up) if (warm_up := content.get("warm_up")) else None,
                fresh=content.get("fresh", False),
                notes=content.get("notes", ()),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {path}, which holds no diagnosis ({error}); expected what `save` wrote"
            ) from error


def _loaded(content: Any) -> Interval | None:
    return None if content is None else Interval(**content)


def _row(content: dict[str, Any]) -> MatrixDiagnosis:
    predictions = tuple(
        Prediction(
            **{
                **prediction,
                "log_ratio": _loaded(prediction["log_ratio"]),
                "over_spectral": _loaded(prediction.get("over_spectral")),
            }
        )
        for prediction in content["predictions"]
    )
    raced = tuple(
        RaceResult(
            **{
                **result,
                "decreases": tuple(result["decreases"]),
                "log_ratio": _loaded(result["log_ratio"]),
            }
        )
        for result in content["race"]
    )
    spectra = {
        name: SingularSpectrum(**{**content[name], "leading": tuple(content[name]["leading"])})
        for name in ("gradient", "momentum")
        if content[name] is not None
    }
    changed = {
        **spectra,
        "predictions": predictions,
        "race": raced,
        "shape": tuple(content["shape"]),
        "bound": _loaded(content.get("bound")),
    }
    return MatrixDiagnosis(**{**content, **changed})


def _ratio(prediction: Prediction | None) -> float | None:
    if prediction is None or prediction.log_ratio is None:
        return None
    return math.exp(prediction.log_ratio.value)


def _interval(row: MatrixDiagnosis) -> str:
    """That of the verdict, or nothing."""
    if row.gradient is None:
        return " (zero gradient)"
    if row.verdict == "cannot tell" or row.verdict == "euclidean":
        return ""
    chosen = row.prediction(row.verdict)
    if chosen is None or chosen.log_ratio is None:
        return ""
    return f" ({math.exp(chosen.log_ratio.low):.2g} to {math.exp(chosen.log_ratio.high):.2g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
