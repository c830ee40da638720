"""The coordinate check: does every layer's output move by as much at every size?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.curvature.loss_function import Loss, checked
from steepest.optim.family import record_of
from steepest.parametrize.dimensions import Build, growing_lists, pattern_of
from steepest.parametrize.parametrization import Parametrized, parametrize
from steepest.parametrize.rules import Rule
from steepest.results import Column, Result, ResultTable
from steepest.statistics import Interval, log_slope, slope_interval
from steepest.transfer.outcomes import Outcome, together, within
from steepest.transfer.runs import (
    Finished,
    ParametrizeOptions,
    batch_fingerprint,
    named,
    torch_seeded,
)

Measurements = dict[str, list[tuple[float, float]]]
THRESHOLD = 0.1
"""Of the slope, up to which a layer passes."""


class BlownUp(ValueError):
    """A run at the rate to be checked became infinite, so there is nothing to compare."""


@dataclass(frozen=True)
class LayerSlope:
    """How the output of one layer depends on the size, after some steps.

    Attributes:
        layer: name of the module, with a star for the index of a layer where the depth grows.
        step: after how many steps.
        slope: of log2 RMS(h_t - h_0) against log2 of the size; 0 where the layer moves alike at all
            sizes, NaN where it does not move.
        error: standard error of the slope over the seeds; NaN for one seed.
        size_slope: the slope of RMS(h_t) itself, for the reader.
        changes: RMS(h_t - h_0) at each size, the geometric mean over the seeds.
        interval: of the slope at 80%, by least squares through all sizes and seeds; None for a
            single seed at two sizes.
    """

    layer: str
    step: int
    slope: float
    error: float
    size_slope: float
    changes: tuple[float, ...]
    interval: Interval | None = None

    @property
    def passed(self) -> Outcome:
        """Whether |slope| is at most 0.1, as all of its interval says; None where it has both.

        A layer that does not move passes.
        """
        return math.isnan(self.slope) or within(self.interval, -THRESHOLD, THRESHOLD)


@dataclass(frozen=True, repr=False)
class CoordinateCheck(Result):
    """Slopes of all layers; prints as a table, with what is at fault first.

    Attributes:
        rule, optimizer, lr: what was checked.
        against: the size on the horizontal axis, with its `values`.
        seeds: how many runs each slope is from.
        rows: a `LayerSlope` for each layer and step.
        skipped: modules that were not called every time, or with outputs of changing shape, as
            experts have whose tokens are chosen; there is no change to speak of.
    """

    width = 140
    rule: str
    optimizer: str
    lr: float
    against: str
    values: tuple[float, ...]
    seeds: int
    rows: tuple[LayerSlope, ...]
    skipped: tuple[str, ...] = ()

    @property
    def passed(self) -> Outcome:
        """Whether every layer has |slope| of at most 0.1 at every step; None if it is not known."""
        return together(row.passed for row in self.rows)

    @property
    def worst(self) -> LayerSlope:
        """The layer and step with the steepest slope, of those that decide."""
        rows = [row for row in self.rows if row.passed is self.passed]
        return max(rows, key=lambda row: 0.0 if math.isnan(row.slope) else abs(row.slope))

    def __iter__(self) -> Iterator[LayerSlope]:
        return iter(self.rows)

    def __getitem__(self, key: tuple[str, int]) -> LayerSlope:
        """Return the row of a layer and a step."""
        for row in self.rows:
            if (row.layer, row.step) == key:
                return row
        raise KeyError(f"got {key!r}, expected a layer and one of the steps")

    @property
    def verdict(self) -> str:
        """One sentence: passed or not, and the layer at fault, or why it cannot be told."""
        worst = self.worst
        where = f"{worst.layer} after {worst.step} steps: slope {worst.slope:+.3f}"
        if not math.isnan(worst.error):
            where += f" ± {worst.error:.3f} (standard error, {self.seeds} seeds)"
        if worst.interval:
            where += f", 80% interval {worst.interval.low:+.3f} to {worst.interval.high:+.3f}"
        if self.skipped:
            where += f"; not compared, as it is not always called alike: {', '.join(self.skipped)}"
        if self.passed:
            return f"passed, every |slope| is at most {THRESHOLD:g}; largest in {where}"
        if self.passed is None:
            advice = "more seeds, or sizes of a wider range"
            if worst.interval is None:
                advice = "two seeds or more, as a single one has no interval at two sizes"
            return (
                f"cannot tell whether every |slope| is at most {THRESHOLD:g}; least known is "
                f"{where}; take {advice}"
            )
        return f"failed, expected |slope| of at most {THRESHOLD:g}; at fault is {where}"

    def table(self) -> ResultTable:
        """Return the slope of every layer after each number of steps, and its changes."""
        columns = (
            Column("layer"),
            Column("step"),
            Column("slope", form="+.3f"),
            Column("error", "± s.e.", ".3f"),
            Column("size_slope", "slope of size", "+.3f"),
            *(Column(f"{self.against} {value:g}", form=".3g") for value in self.values),
        )
        rows = tuple(
            (row.layer, row.step, row.slope, row.error, row.size_slope, *row.changes)
            for row in self.rows
        )
        styles = {True: "", False: "bold red", None: "yellow"}
        return ResultTable(
            columns,
            rows,
            f"coordinate check: {self.rule}, {self.optimizer}, lr {self.lr:g}",
            self.verdict,
            tuple(styles[row.passed] for row in self.rows),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the rows, the verdict and what was checked, as plain values."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed, "verdict": self.verdict}


def coordinate_check(
    build: Build,
    sizes: Sequence[Mapping[str, Any]],
    batch: Any,
    loss: Loss,
    *,
    lr: float,
    rule: Rule = "mup",
    optimizer: str | type[Optimizer] = "adamw",
    base: Mapping[str, Any] | None = None,
    steps: Sequence[int] = (5, 20),
    seeds: int = 3,
    path: str | Path | None = None,
    on_run: Callable[[str, float], None] = lambda said, done: None,
    **options: Unpack[ParametrizeOptions],
) -> CoordinateCheck:
    """Train a few steps at several sizes, and fit how each layer's change depends on the size.

    For every module with parameters of its own, and the model as a whole, RMS(h_t - h_0) of the
    output on `batch`, t steps after initialization, over the multiplier that was folded into it
    (attention scale, residual branch); dropout has the same masks each time. Under muP it is the
    same at every width: its slope on a log-log scale is 0 for every layer. Slopes below 0 are
    layers that freeze with the size (NTP's hidden ones), above 0 such that blow up (SP's logits).

    Over depth the layers of a growing list count as one, the residual stream shows in what follows
    them, and small depths are far from the limit: start at 8. On an accelerator, call it inside
    `with torch.device("cuda")`, with the batch there.

    A check that passes does not prove that the learning rate transfers; one that fails says which
    layer to look at. Take a rate near the best one of the base, and a size range of at least 8.

    Args:
        build: from sizes to a model, as for `parametrize`.
        sizes: at least two, in which one value grows, such as `[dict(width=64), dict(width=128)]`.
            Where several grow (heads with the width), the first that does is the horizontal axis.
        batch: one batch, on which every step is taken and every output is measured.
        loss: from model and batch to a scalar.
        lr: learning rate at the base.
        rule, optimizer: as for `parametrize`.
        base: the sizes of the base model; the first of `sizes` unless given.
        steps: after how many steps to measure.
        seeds: runs with seeds 0, 1, ... for each size.
        path, on_run: as for `rate_transfer`.
        options: for `parametrize`, such as `branches` or `settings` of the optimizer.

    Raises:
        ValueError: for fewer than two sizes, none that grows, outputs that are not finite, and
            a model in which nothing moves.
    """
    optimizer = record_of(optimizer).name
    base = dict(sizes[0] if base is None else base)
    against, values = axis_of(sizes)
    changes: dict[tuple[str, int], list[list[float]]] = defaultdict(list)  # of a seed, of a size
    plain: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    finished, skipped = Finished(path), dict[str, None]()
    for seed in range(seeds):
        runs: list[Measurements] = []
        for size in sizes:
            key = (rule, optimizer, list(steps), base, size, sorted(options.items()), lr, seed)

            def run(size: Mapping[str, Any] = size, seed: int = seed) -> Measurements:
                with torch_seeded(seed):
                    made = parametrize(
                        build, base, size, rule=rule, optimizer=optimizer,
                        example=lambda model: loss(model, batch), **options,
                    )  # fmt: skip
                    return _run(made, batch, loss, lr, steps)

            name = named("coordinates", *key, build, loss, batch_fingerprint(batch))
            runs.append(finished(name, run))
            done = seed * len(sizes) + len(runs)
            on_run(f"{against} {size[against]}", done / (seeds * len(sizes)))
        skipped |= {name: None for run in runs for name in run if not run[name]}
        runs = [{name: run[name] for name in run if name not in skipped} for run in runs]
        for name, of_sizes in _by_layer(runs).items():
            for t, step in enumerate(sorted(steps)):
                changes[name, step].append([measured[t][0] for measured in of_sizes])
                plain[name, step].append([measured[t][1] for measured in of_sizes])
    rows = tuple(
        _row(name, step, values, changes[name, step], plain[name, step]) for name, step in changes
    )
    if all(math.isnan(row.slope) for row in rows):
        raise ValueError(
            f"got a model of which no layer moves at all sizes with lr={lr:g} in "
            f"{max(steps)} steps, expected a rate that trains it"
        )
    return CoordinateCheck(rule, optimizer, lr, against, values, seeds, rows, tuple(skipped))


def axis_of(sizes: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[float, ...]]:
    """Return the first size that grows, with its values."""
    for key in sizes[0] if sizes else ():
        values = tuple(float(size[key]) for size in sizes if key in size)
        if len(set(values)) == len(sizes) > 1:
            return key, values
    raise ValueError(
        f"got the sizes {list(sizes)}, expected at least two, all with another value of one size, "
        "such as [dict(width=64), dict(width=128), dict(width=256)]"
    )


def _run(
    made: Parametrized,
    batch: Any,
    loss: Loss,
    lr: float,
    steps: Sequence[int],
) -> Measurements:
    """RMS of the change and of the output itself, for each layer, after each number of steps.

    Nothing for a layer that cannot be compared.
    """
    model, optimizer = made.model, made.optimizer(lr)
    folded = _folded(made)
    first = _outputs(model, batch, loss)
    measurements: Measurements = {name: [] for name in first}
    compared = set(measurements)
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        checked(loss(model, batch)).backward()
        optimizer.step()
        if step in steps:
            now = _outputs(model, batch, loss)
            for name in measurements:
                h, scale = now.get(name), folded.get(name, 1.0)
                if h is None or h.shape != first[name].shape:
                    compared.discard(name)
                elif name in compared:
                    measurements[name].append((_rms(h - first[name]) / scale, _rms(h) / scale))
            broken = next((n for n, h in now.items() if not bool(h.isfinite().all())), None)
            if broken is not None:
                raise BlownUp(
                    f"got an output of {broken} that is not finite after {step} steps at "
                    f"{made.target} with lr={lr:g}, expected a smaller learning rate"
                )
    return {name: rows if name in compared else [] for name, rows in measurements.items()}


def _folded(made: Parametrized) -> dict[str, float]:
    """What each layer's output is multiplied with."""
    multipliers = {row.name.rpartition(".")[0]: row.output for row in made.rows}
    for name, module in made.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # its weights are its own, its output that of
            multipliers[name] = made[f"{name}.out_proj.weight"].output
    return multipliers


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """The output of every module with parameters of its own, and of the model."""
    outputs: dict[str, Tensor] = {}
    with torch_seeded(0), _recording(model, outputs):  # the same masks of dropout every time
        loss(model, batch)
    return outputs


@contextmanager
def _recording(model: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            h = _tensor(output)
            if h is not None:
                outputs[name] = h.detach().float().clone()

        return hook

    modules = [
        (name or "output", module)
        for name, module in model.named_modules()
        if not name or any(True for _ in module.parameters(recurse=False))
    ]
    handles = [module.register_forward_hook(record(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> Tensor | None:
    """The tensor in what a module returns: itself, `logits`, or the first of several."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _by_layer(
    runs: list[Measurements],
) -> dict[str, list[list[tuple[float, float]]]]:
    """For each layer, what was measured at each size; the layers of a growing list as one."""
    lists = {name: None for run in runs for name in growing_lists(runs[0], run)}
    gathered = []
    for run in runs:
        groups: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
        for name, measured in run.items():
            groups[pattern_of(name, lists)].append(measured)
        gathered.append({name: _root_mean(many) for name, many in groups.items()})
    shared = [name for name in gathered[0] if all(name in layers for layers in gathered)]
    return {name: [layers[name] for layers in gathered] for name in shared}


def _root_mean(many: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The root of the mean square over layers."""
    return [
        (
            math.sqrt(fmean(change**2 for change, _ in at_step)),
            math.sqrt(fmean(size**2 for _, size in at_step)),
        )
        for at_step in zip(*many, strict=True)
    ]


def _rms(h: Tensor) -> float:
    return float(h.double().square().mean().sqrt())


def _row(
    name: str,
    step: int,
    values: Sequence[float],
    changes: list[list[float]],
    plain: list[list[float]],
) -> LayerSlope:
    slopes = [log_slope(values, run) for run in changes]
    n = len(slopes)
    known = n > 1 and not any(map(math.isnan, slopes))
    error = stdev(slopes) / math.sqrt(n) if known else math.nan
    means = tuple(
        math.exp(fmean(math.log(x) for x in at_size)) if min(at_size) > 0 else 0.0
        for at_size in zip(*changes, strict=True)
    )
    size_slope = fmean(log_slope(values, run) for run in plain)
    interval = None
    if not any(map(math.isnan, slopes)):
        logs = [[math.log2(change) for change in run] for run in changes]
        interval = slope_interval([math.log2(value) for value in values], logs)
    return LayerSlope(name, step, fmean(slopes), error, size_slope, means, interval)
