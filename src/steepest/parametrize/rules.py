"""The tables: how initialization, learning rate and epsilon follow the size of a model.

All factors are relative to a base model, where they are 1. `in` and `out` are the ratios of a
parameter's fans to those of the base, `L` the ratio of the numbers of blocks. Sources:

- TP-V: Yang et al., "Tensor Programs V" (arXiv 2203.03466), Table 3.
- TP-VI: Yang et al., "Tensor Programs VI" (arXiv 2310.02244).
- CompleteP: Dey et al. (arXiv 2505.01618), Table 1.
- QIU: Qiu et al. (arXiv 2512.05620), Tables 1 and 2.
- spectral condition: Yang, Simon and Bernstein (arXiv 2310.17813).
- "derived here": the derivations are in docs/transfer.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim.optimizer import Optimizer

from steepest.model.matrix_view import MatrixView
from steepest.optim.family import record_of
from steepest.optim.record import ONE, PER_IN, PER_OUT, PER_ROOT_IN, Kind, Row, Update
from steepest.optim.settings import modern

Rule = Literal["sp", "ntp", "mup", "depth-mup", "completep", "spectral"]


# Standard deviation of the initialization. Rules that add depth to muP share its row.
INIT = {
    #                 input and vector  hidden       output
    "sp":         Row(ONE,              PER_ROOT_IN, PER_ROOT_IN, "SP: 1/fan_in variance"),
    "ntp":        Row(ONE,              PER_ROOT_IN, PER_ROOT_IN, "NTP: 1/sqrt(fan_in) multiplier"),
    "mup":        Row(ONE,              PER_ROOT_IN, PER_IN,      "TP-V Table 3"),
}  # fmt: skip

# Epsilon of Adam, or of the Adam that a length is taken from, under muP: entries of gradients.
EPSILON = Row(PER_OUT, PER_OUT, PER_OUT, "QIU Table 1")

# The residual branches are multiplied by L^-alpha, and every branch moves the stream by 1/L.
ALPHA = {"depth-mup": 1 / 2, "completep": 1.0}


@dataclass(frozen=True)
class Size:
    """How large a parameter is, at the target and at the base.

    Attributes:
        kind: which of its fans grow.
        fans: `(in, out)` of the matrix at the target, with what is finite (kernels) inside.
        base_fans: the same at the base.
        fan_in, fan_out: the ratios by which its fans grow.
        blocks: the ratio by which the number of residual blocks grows, 1 outside of them.
        views: which matrices the parameter is, at the target and at the base, if that is known.
    """

    kind: Kind
    fans: tuple[int, int]
    base_fans: tuple[int, int]
    fan_in: float
    fan_out: float
    blocks: float = 1.0
    views: tuple[MatrixView, MatrixView] | None = None


@dataclass(frozen=True)
class Factors:
    """What a parameter gets, relative to the base model.

    Attributes:
        init: on the standard deviation of its initialization.
        lr: on the learning rate.
        eps: on Adam's epsilon.
        source: of these factors.
    """

    init: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    source: str = ""

    def fold(self, multiplier: float, degree: float) -> Factors:
        """Move a multiplier in front of a weight into the weight: the same function, exactly.

        w = a W starts a times as large; where gradients times c give an update times c^h, the
        update of w is a^(1 + h) times that of W; and Adam's epsilon meets gradients that are 1/a
        of what they were. The abc symmetry of TP-V, for any h.

        >>> Factors().fold(0.5, degree=1)  # SGD
        Factors(init=0.5, lr=0.25, eps=2.0, source='')
        """
        return Factors(
            self.init * multiplier,
            self.lr * multiplier ** (1 + degree),
            self.eps / multiplier,
            self.source,
        )


def update_of(
    optimizer: str | type[Optimizer], settings: Mapping[str, Any], rule: Rule | str
) -> Update:
    """Return how the rate of an optimizer with these settings follows the size of a matrix.

    Raises:
        ValueError: for an unknown optimizer, and settings that the rule has no rate for.
    """
    record = record_of(optimizer)
    if record.update is None:
        raise ValueError(f"got {record.name}, whose record has no `update`, which says its rates")
    free = rule in ("sp", "ntp")  # which take the optimizer as it is
    return record.update(modern(settings), free)


def factors_of(rule: Rule, update: Update, size: Size, embedding: bool = False) -> Factors:
    """Return what a parameter of this size gets under a rule, before anything is folded into it.

    Args:
        rule: the parametrization.
        update: of the optimizer.
        size: of the parameter.
        embedding: whether it is a table whose rows are looked up, so that its fan-in is one.
    """
    if rule in ("sp", "ntp"):
        row = INIT[rule]
        multiplier = row.of(size.kind, size.fan_in, size.fan_out)
        if rule == "sp":
            return Factors(init=multiplier, source=row.source)
        return Factors(source=row.source).fold(multiplier, update.degree)
    init, source = INIT["mup"].of(size.kind, size.fan_in, size.fan_out), INIT["mup"].source
    if rule == "spectral":
        init, source = 1.0, "spectral condition"
        if size.kind in ("input", "hidden", "output") and not embedding:
            init = spectral_std(*size.fans) / spectral_std(*size.base_fans)
    rate, of_rate = _rate(update, size)
    source = f"init: {source}; lr: {of_rate}"
    eps = 1.0
    if update.eps:
        eps = EPSILON.of(size.kind, size.fan_in, size.fan_out)
        source += f"; eps: {EPSILON.source}"
    if rule in ALPHA and size.blocks != 1:
        rate *= size.blocks ** (ALPHA[rule] * (1 + update.degree) - 1)
        eps *= size.blocks ** -ALPHA[rule] if update.eps else 1.0
        source += f"; depth: {update.depth.get(rule, 'derived here')}"
    return Factors(init, rate, eps, source)


def _rate(update: Update, size: Size) -> tuple[float, str]:
    """The rate under muP: of the table or, for Shampoo without grafting, of its formula."""
    if update.row:
        return update.row.of(size.kind, size.fan_in, size.fan_out), update.row.source
    views = size.views or tuple(
        MatrixView(1, fan_out, fan_in) for fan_in, fan_out in (size.fans, size.base_fans)
    )
    now, then = (_blocks(view, update.block) for view in views)
    blocks = now / then
    e = update.exponent
    return (size.fan_out / size.fan_in) ** (1 - e) * blocks**-e, "QIU Table 1"


def _blocks(view: MatrixView, block: int | None) -> float:
    """How many blocks a matrix is cut into, on average over those of a parameter."""
    return len(view.sizes(block)) / len(view.sizes())


def spectral_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation for which a Gaussian matrix has spectral norm sqrt(out/in).

    Its spectral norm is sigma (sqrt(out) + sqrt(in)); the spectral condition, arXiv 2310.17813,
    with the constant that it leaves open fixed to 1.

    >>> round(spectral_std(100, 100), 3)
    0.05
    """
    return math.sqrt(fan_out / fan_in) / (math.sqrt(fan_out) + math.sqrt(fan_in))


def readout_multiplier(rule: Rule, size: Size) -> float:
    """Return the factor on the input of a head that is tied to the embedding.

    The shared table keeps the embedding's row; what the head's own row would have made smaller
    stays as a multiplier (TP-V Table 8). Standard parametrization has none.
    """
    if rule == "sp":
        return 1.0
    row = INIT["ntp" if rule == "ntp" else "mup"]
    return row.output(size.fan_out, 1.0)  # the head's inputs are the embedding's outputs
