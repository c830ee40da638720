"""Super consistency: is the sharpness along training the same at every size?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steepest.curvature import NTK, Hessian, Stability, ntk_drift, preconditioned_sharpness
from steepest.curvature.loss_function import Loss
from steepest.optim.family import record_of
from steepest.parametrize.dimensions import Build
from steepest.parametrize.parametrization import Parametrized, parametrize
from steepest.parametrize.rules import Rule
from steepest.results import Column, Result, ResultTable
from steepest.statistics import Interval, difference_interval, jackknife, log_slope
from steepest.transfer.coordinates import BlownUp, axis_of
from steepest.transfer.outcomes import Outcome, within
from steepest.transfer.runs import (
    Finished,
    ParametrizeOptions,
    named,
    torch_seeded,
    training,
    written,
)

SPREAD = 1.25
"""Largest over smallest sharpness of all sizes, up to which they count as one."""
SNAPSHOTS = 3
"""At the end, whose mean is compared: a single one may lie on a peak."""
LAZY = -0.4
"""Slope of the kernel's movement below which it is that of a lazy limit, -1/2."""
_ROWS = 32  # of the kernel


@dataclass(frozen=True)
class SizeCurve:
    """One size along training, means over the seeds.

    Attributes:
        size: as given.
        steps: taken before each snapshot.
        ratios: sharpness in the optimizer's own geometry over its threshold, see
            `steepest.curvature.preconditioned_sharpness`, that at the full rate also while the rate
            still rises: 1 is the edge of stability. Times 2 / lr it is, for SGD, the largest
            eigenvalue of the Hessian rescaled by the rule's rates.
        losses: of the fixed batch.
        ending: mean of the last three ratios, of each seed.
        movement: ‖Θ_t - Θ_0‖ / ‖Θ_0‖ of the tangent kernel at the end, of each seed.
    """

    size: dict[str, Any]
    steps: tuple[int, ...]
    ratios: tuple[float, ...]
    losses: tuple[float, ...]
    ending: tuple[float, ...]
    movement: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class SuperConsistency(Result):
    """Sharpness along training over sizes; prints as a table.

    Attributes:
        rule, optimizer, lr, measure: what was run, and what the sharpness is: a `Measure` of
            `steepest.curvature.Stability`, of the matrices where parameters have several.
        against: the size that grows, with its `values`.
        rows: a `SizeCurve` for each size.
        spread: largest over smallest mean of the last three snapshots.
        loss_spread: the same of the losses.
        spread_interval: its 80% interval over the seeds of all sizes; None for one seed, and where
            a sharpness is not positive.
        movement: slope of log2 of the kernel's movement against log2 of the size, with its 80%
            interval over the seeds (None for one): 0 where every size learns features, -1/2 in the
            lazy limit.
    """

    rule: str
    optimizer: str
    lr: float
    measure: str
    against: str
    values: tuple[float, ...]
    rows: tuple[SizeCurve, ...]
    spread: float
    loss_spread: float
    movement: float
    movement_interval: Interval | None
    spread_interval: Interval | None = None

    @property
    def passed(self) -> Outcome:
        """Whether the sharpness at the end differs by at most 25% over the sizes.

        None where its interval has both, or where there is none: it cannot be told.
        """
        return within(self.spread_interval, -math.inf, SPREAD)

    @property
    def is_lazy(self) -> Outcome:
        """Whether the tangent kernel stops moving as the size grows: no features are learned.

        None where it cannot be told.
        """
        return within(self.movement_interval, -math.inf, LAZY)

    @property
    def verdict(self) -> str:
        """One sentence with the numbers."""
        ending = fmean(fmean(row.ending) for row in self.rows)
        said = {True: "super consistent", False: "not super consistent", None: "cannot tell"}
        over = f"over {self.against} {self.values[0]:g} to {self.values[-1]:g}"
        if not math.isfinite(self.spread):
            return f"cannot tell: {over} the sharpness at the end is not positive at every size"
        factor = f"{self.spread:.2f} ("
        if ends := self.spread_interval:
            factor += f"80% interval {max(1.0, ends.low):.2f} to {ends.high:.2f}, "
        moved = f"'s movement has the slope {self.movement:+.2f}"
        if math.isnan(self.movement):
            moved = " does not move"
        elif ends := self.movement_interval:
            moved += f" ({ends.low:+.2f} to {ends.high:+.2f})"
        moved += ", as in the lazy limit" if self.is_lazy else ""
        sentence = (
            f"{said[self.passed]}: {over} the sharpness at the end differs by a factor of {factor}"
            f"at most {SPREAD:g}), the loss by {self.loss_spread:.2f}; it ends at {ending:.2f} of "
            f"the edge of stability; the tangent kernel{moved}"
        )
        if self.passed is None:
            alone = len(self.rows[0].ending) == 1
            sentence += "; a single seed has no interval: take two or more" if alone else ""
            sentence += "" if alone else "; take more seeds, or longer runs"
        return sentence

    def table(self) -> ResultTable:
        """Return sharpness over threshold, loss and movement of the kernel at every size."""
        shown = sorted({round(k * (len(self.rows[0].steps) - 1) / 3) for k in range(4)})
        steps = [self.rows[0].steps[k] for k in shown]
        columns = (
            Column("size"),
            *(Column(f"step {step}", f"step\n{step}", ".3g") for step in steps),
            Column("ending", "at the\nend", ".3g"),
            Column("loss", form=".3g"),
            Column("movement", "kernel\nmoved by", ".3g"),
        )
        rows = tuple(
            (
                written(row.size),
                *(row.ratios[k] for k in shown),
                fmean(row.ending),
                row.losses[-1],
                fmean(row.movement),
            )
            for row in self.rows
        )
        title = f"sharpness over threshold: {self.rule}, {self.optimizer}, lr {self.lr:g}"
        return ResultTable(columns, rows, title, self.verdict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}


def super_consistency(
    build: Build,
    sizes: Sequence[Mapping[str, Any]],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    lr: float,
    rule: Rule = "mup",
    optimizer: str | type[Optimizer] = "adamw",
    steps: int = 120,
    every: int | None = None,
    seeds: int = 2,
    base: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    on_run: Callable[[str, float], None] = lambda said, done: None,
    **options: Unpack[ParametrizeOptions],
) -> SuperConsistency:
    """Follow the sharpness of every size along training at one rate of the base.

    Under muP the sharpness of all widths, rescaled by the rates, goes the same way to the edge of
    stability, while losses differ: super consistency, which explains why the best rate stays (Noci
    et al., arXiv 2402.17457). In the lazy limit of NTP it does not rise, and falls with the width.

    The sharpness is the largest eigenvalue in the geometry of the optimizer over its threshold, so
    1 is the edge; for steps of fixed length (Muon, TEON, Signum) what the next step costs over what
    it gains. The kernel is that of at most 32 outputs of the first batch, its parameters weighted
    by the rule's rates for SGD, which makes it the same however multipliers are folded.

    Args:
        build, sizes, batches, loss, rule, optimizer, base, path, on_run, options: as for
            `rate_transfer`, with one more batch at the end. Sharpness and kernel are those of
            `batches(0)`.
        lr: of the base; near its best, as small ones do not reach the edge.
        steps: of each run.
        every: steps between two snapshots; a twelfth of the steps by default.
        seeds: runs for every size.

    Raises:
        ValueError: for fewer than two sizes, for fewer than three snapshots, and for a run that
            blows up, as then there is nothing to compare.

    >>> from torch import nn
    >>> def build(width):
    ...     return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> def loss(model, x):
    ...     return (model(x) - x[:, :1]).square().mean()
    >>> result = super_consistency(build, [dict(width=8), dict(width=16)], lambda i: x, loss,
    ...                            lr=0.1, optimizer="sgd", steps=12, seeds=1)
    >>> result.rows[0].steps[:3], result.measure
    ((0, 1, 2), 'preconditioned Hessian')
    """
    optimizer = record_of(optimizer).name
    against, values = axis_of(sizes)
    base = dict(base or sizes[0])
    every = max(1, steps // 12) if every is None else every
    if every < 1 or steps // every < SNAPSHOTS:
        raise ValueError(
            f"got steps={steps} with a snapshot every {every}, expected at least {SNAPSHOTS} "
            "snapshots"
        )
    finished, measure = Finished(path), ""
    rows: list[SizeCurve] = []
    for size in sizes:
        target, runs = {**base, **size}, []
        for seed in range(seeds):
            key = (rule, optimizer, steps, every, base, target, sorted(options.items()), lr, seed)

            def run(target: dict[str, Any] = target, seed: int = seed) -> dict[str, Any]:
                with torch_seeded(seed):
                    made = parametrize(
                        build, base, target, rule=rule, optimizer=optimizer,
                        example=lambda model: loss(model, batches(0)), **options,
                    )  # fmt: skip
                    kernel = _Kernel(made, build, batches(0), loss, options)
                    return _followed(made, kernel, lr, batches, loss, steps, every)

            runs.append(finished(named("sharpness", *key, build, batches, loss), run))
            done = (len(rows) * seeds + seed + 1) / (seeds * len(sizes))
            on_run(f"{written(size)}: {runs[-1]['ratios'][-1]:.2f} of the edge", done)
        rows.append(_curve(size, runs))
        measure = runs[0]["measure"]
    losses = [fmean(row.losses[-SNAPSHOTS:]) for row in rows]

    def slope(kept: Sequence[int]) -> float:
        return log_slope(values, [fmean(row.movement[i] for i in kept) for row in rows])

    return SuperConsistency(
        rule, optimizer, lr, measure, against, values, tuple(rows),
        _ratio([fmean(row.ending) for row in rows]), _ratio(losses), slope(range(seeds)),
        jackknife(slope, seeds) if seeds > 1 else None, _spread_interval(rows),
    )  # fmt: skip


def _spread_interval(rows: Sequence[SizeCurve]) -> Interval | None:
    """Of the largest over the smallest sharpness; the noise is that of all sizes together."""
    if min(ending for row in rows for ending in row.ending) <= 0:
        return None
    logs = [[math.log(ending) for ending in row.ending] for row in sorted(rows, key=_ending)]
    ends = difference_interval(logs[-1], logs[0], logs)
    return ends and Interval(*map(math.exp, (ends.value, ends.low, ends.high)))


def _ending(row: SizeCurve) -> float:
    return fmean(row.ending)


def _ratio(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else math.inf


class _Kernel:
    """The tangent kernel of some outputs, its parameters weighted by the rates of SGD."""

    def __init__(
        self, made: Parametrized, build: Build, batch: Any, loss: Loss, options: Mapping[str, Any]
    ):
        kept = {key: value for key, value in options.items() if key != "settings"}
        with torch_seeded(0):  # a model that is not looked at
            sgd = parametrize(
                build, made.base, made.target, rule=made.rule, optimizer="sgd",
                example=lambda model: loss(model, batch), **kept,
            )  # fmt: skip
        trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
        self._rates: dict[float, list[str]] = {}
        for row in sgd.rows:
            if row.name in trained:
                self._rates.setdefault(row.lr, []).append(row.name)
        self._given = made.model, loss, batch

    def matrix(self) -> Tensor:
        """The kernel `(outputs, outputs)` of the weights as they are now."""
        total: Any = 0.0
        for rate, names in self._rates.items():
            kernel = NTK(*self._given, names)
            size = kernel.shape[0]
            rows = torch.arange(min(size, _ROWS)) * size // min(size, _ROWS)
            total = total + rate * kernel.to_dense(rows)
        result: Tensor = total
        return result


def _followed(
    made: Parametrized,
    kernel: _Kernel,
    lr: float,
    batches: Callable[[int], Any],
    loss: Loss,
    steps: int,
    every: int,
) -> dict[str, Any]:
    """Train once; ratios, losses and the movement of the kernel."""
    first = kernel.matrix()
    rows: list[Stability] = []
    curve: dict[str, Any] = {"steps": [], "ratios": [], "losses": []}
    taken = 0
    for taken, (_, optimizer) in enumerate(training(made, lr, batches, loss, steps + 1)):
        if taken % every or (not taken and made.has_memory):
            continue  # before its first step a preconditioner is none
        H = Hessian(made.model, loss, batches(0))
        rows = preconditioned_sharpness(H, optimizer, start=rows, tolerance=0.01)
        largest = max(rows, key=lambda row: _entries(made, row))
        group = optimizer.param_groups[0]
        curve["steps"].append(taken)
        curve["ratios"].append(largest.ratio * group["initial_lr"] / group["lr"])
        curve["measure"] = largest.measure
        curve["losses"].append(H.loss())
    if taken < steps:
        raise BlownUp(
            f"got a run at {written(made.target)} that blew up after {taken} steps at lr={lr:g}, "
            "expected a smaller rate"
        )
    return curve | {"movement": ntk_drift(first, kernel.matrix()).distance}


def _entries(made: Parametrized, row: Stability) -> int:
    return sum(made.model.get_parameter(name).numel() for name in row.parameters)


def _curve(size: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> SizeCurve:
    def means(key: str) -> tuple[float, ...]:
        return tuple(fmean(values) for values in zip(*(run[key] for run in runs), strict=True))

    return SizeCurve(
        dict(size),
        tuple(runs[0]["steps"]),
        means("ratios"),
        means("losses"),
        tuple(fmean(run["ratios"][-SNAPSHOTS:]) for run in runs),
        tuple(run["movement"] for run in runs),
    )
