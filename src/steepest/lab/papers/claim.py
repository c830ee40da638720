"""A claim of a paper as data: its sentence, what is measured for it, and the criterion.

The criterion stands beside the claim, and so is fixed before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ScaleName = Literal["quick", "cpu", "gpu", "paper"]
"""How large: minutes or hours on two cores, hours on one GPU, or as in the paper."""

Numbers = dict[str, Any]
"""What an experiment measured with one seed: plain numbers, lists and texts by name.

"curves" is a list of `curve`s, which the report draws.
"""

Value = Callable[[Numbers], float]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large an experiment is at one scale.

    Attributes:
        sizes: arguments of the experiment.
        seeds: how often it is measured.
        data: the name of a data set in the user's folder of data; none by default.
        minutes: about how long all seeds take on one core of 2026.
        gigabytes: of memory at most, about.
        on_gpu: whether it needs a GPU; tensors are made there by default.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    data: str | None = None
    minutes: float = 0.1
    gigabytes: float = 0.5
    on_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Something to measure, once for every seed. Several claims can be about its numbers.

    Attributes:
        name: of one or a few words, with dashes.
        title: what it is, in a few words.
        kind: an identity or a theorem; a problem of the theory; networks in training; or networks
            on real data.
        measure: `measure(seed, **sizes) -> Numbers`, a function at the top of a module; with
            `data`, the path of the data set, where the setting names one. Torch's generators start
            from the seed, and it has one thread.
        scales: its setting at each scale at which it can be measured.
    """

    name: str
    title: str
    kind: Literal["identity", "theory", "training", "real data"]
    measure: Callable[..., Numbers]
    scales: Mapping[ScaleName, Setting]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Optimizers in a fair study, each at its own best rate; a fresh seed is a measurement.

    Its numbers are the validation loss of every optimizer by the name it has in `optimizers`, and
    of classifiers `accuracy`, a dictionary by the same names. A loss is infinite for a run that
    diverged, and not a number where the best rate lies at the edge of its grid.

    Attributes:
        name: of one or a few words, with dashes.
        title: what it is, in a few words.
        kind: whether the data are real.
        scales: at each scale the settings of `StudyConfig`, without seeds and data.
    """

    name: str
    title: str
    kind: Literal["training", "real data"]
    scales: Mapping[ScaleName, Setting]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of a paper with a measured criterion.

    Attributes:
        name: of one or a few words, with dashes.
        sentence: the claim, in our words.
        place: where it stands in the paper.
        source: "first-hand" if the place was read in the paper or its code, "second-hand" if in
            what others say of it, "ours" for what the papers leave open.
        experiment: what measures it.
        quantity: what the criterion is about, with its unit.
        value: from the numbers of one seed to the quantity.
        low: the least value that the claim allows.
        high: the largest.
        judged: "mean" if the mean over seeds has to lie between low and high, with its 95%
            interval; "every seed" if every value has to, as for theorems.
        paper: the figure of the paper, as text; empty without one.
        checks: the names of the paper's checks that the claim answers.
        control: whether the sentence is false on purpose, so that its verdict must be "not
            reproduced".
    """

    name: str
    sentence: str
    place: str
    source: Literal["first-hand", "second-hand", "ours"]
    experiment: Experiment | Comparison
    quantity: str
    value: Value
    low: float = -math.inf
    high: float = math.inf
    judged: Literal["mean", "every seed"] = "mean"
    paper: str = ""
    checks: tuple[str, ...] = ()
    control: bool = False

    @property
    def limits(self) -> str:
        """The values that the claim allows, in words.

        >>> from steepest.lab.papers import claim_of
        >>> claim_of("relu-features").limits
        'at most 3.299'
        """
        if self.low == -math.inf:
            return f"at most {self.high:.4g}"
        if self.high == math.inf:
            return f"at least {self.low:.4g}"
        return f"from {self.low:.4g} to {self.high:.4g}"

    @property
    def criterion(self) -> str:
        """The criterion as a sentence."""
        if self.judged == "every seed":
            return f"{self.quantity}: {self.limits}, with every seed"
        return f"{self.quantity}: {self.limits}, the mean over seeds with its 95% interval"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper and its claims.

    Attributes:
        name: what it is called on the command line.
        title: of the paper.
        authors: the first ones.
        arxiv: its number there.
        claims: in the order of the paper.
        checks: what can be checked of the paper, a sentence for each, by a short name.
        left_out: those checks that are no claim here, with the reason.
    """

    name: str
    title: str
    authors: str
    arxiv: str
    claims: tuple[Claim, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def curve(
    name: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    across: str,
    up: str,
    log: bool = False,
    log_across: bool = False,
) -> dict[str, Any]:
    """Return lines that the report draws in one figure, a figure for each name.

    Args:
        name: title of the figure.
        x: where the points lie.
        lines: the values of each line by its name, one for each x.
        across: title of the horizontal axis, with its unit.
        up: title of the vertical axis, with its unit.
        log: whether the vertical axis is logarithmic.
        log_across: whether the horizontal axis is.
    """
    axes = {"across": across, "up": up, "log": log, "log_across": log_across}
    points = {line: list(values) for line, values in lines.items()}
    return {"name": name, "x": list(x), "lines": points, **axes}
