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
from typing import Any, Literal, NamedTuple, get_args

from steepest.model.matrix_view import MatrixView

Rule = Literal["sp", "ntp", "mup", "depth-mup", "completep", "spectral"]
OptimizerName = Literal["sgd", "adam", "signum", "muon", "teon", "shampoo", "kl-shampoo", "soap"]
Kind = Literal["input", "hidden", "output", "vector", "fixed"]


class Power(NamedTuple):
    """in^fan_in out^fan_out.

    >>> Power(-1, 1)(4.0, 2.0)
    0.5
    """

    fan_in: float
    fan_out: float

    def __call__(self, fan_in: float, fan_out: float) -> float:
        """Return its value."""
        return fan_in**self.fan_in * fan_out**self.fan_out


ONE = Power(0, 0)
OUT = Power(0, 1)
PER_OUT = Power(0, -1)
PER_IN = Power(-1, 0)
PER_ROOT_IN = Power(-1 / 2, 0)
OUT_PER_IN = Power(-1, 1)


class Row(NamedTuple):
    """A row of a table: a power for each kind of parameter, and where it is from.

    Vectors (biases, gains) are inputs whose fan-in is the number 1, which does not grow.
    """

    input: Power
    hidden: Power
    output: Power
    source: str

    def of(self, kind: Kind, fan_in: float, fan_out: float) -> float:
        """Return the factor for a kind of parameter."""
        powers = {"hidden": self.hidden, "output": self.output}
        return powers.get(kind, self.input)(fan_in, fan_out)


# Standard deviation of the initialization. Rules that add depth to muP share its row.
INIT = {
    #                 input and vector  hidden       output
    "sp":         Row(ONE,              PER_ROOT_IN, PER_ROOT_IN, "SP: 1/fan_in variance"),
    "ntp":        Row(ONE,              PER_ROOT_IN, PER_ROOT_IN, "NTP: 1/sqrt(fan_in) multiplier"),
    "mup":        Row(ONE,              PER_ROOT_IN, PER_IN,      "TP-V Table 3"),
}  # fmt: skip

# Learning rate under muP. Matrix optimizers have a column for each way to set the update's length.
RATE = {
    #                      input and vector  hidden      output
    "sgd":             Row(OUT,              OUT_PER_IN, PER_IN, "TP-V Table 3"),
    "adam":            Row(ONE,              PER_IN,     PER_IN, "TP-V Table 3"),
    "signum":          Row(ONE,              PER_IN,     PER_IN, "derived here: Signum"),
    # The scale of these, sqrt(out/in), is all that QIU Table 1 asks for.
    "muon":            Row(ONE,              ONE,        ONE,    "QIU Table 1"),
    "teon":            Row(ONE,              ONE,        ONE,    "derived here: TEON"),
    # After the slash, what the update takes its length from: length="adam" or length="muon".
    "shampoo/adam":    Row(ONE,              PER_IN,     PER_IN, "QIU Table 2: grafting"),
    "shampoo/muon":    Row(ONE,              ONE,        ONE,    "derived here: grafting"),
    "kl-shampoo/adam": Row(ONE,              PER_IN,     PER_IN, "derived here: KL-Shampoo"),
    "kl-shampoo/muon": Row(ONE,              ONE,        ONE,    "derived here: grafting"),
    "soap":            Row(ONE,              PER_IN,     PER_IN, "derived here: SOAP"),
    # With length="spectral".
    "soap/spectral":   Row(ONE,              ONE,        ONE,    "QIU: spectral normalization"),
}  # fmt: skip

# Epsilon of Adam, or of the Adam that a length is taken from, under muP: entries of gradients.
EPSILON = Row(PER_OUT, PER_OUT, PER_OUT, "QIU Table 1")

# The residual branches are multiplied by L^-alpha, and every branch moves the stream by 1/L.
ALPHA = {"depth-mup": 1 / 2, "completep": 1.0}
DEPTH_SOURCE = {
    ("depth-mup", "adam"): "TP-VI",
    ("depth-mup", "sgd"): "TP-VI",
    ("completep", "adam"): "CompleteP Table 1",
    ("completep", "sgd"): "QIU Table 1",
    ("completep", "muon"): "QIU Table 1",
    ("completep", "shampoo"): "QIU Table 1",
}


class Update(NamedTuple):
    """What a rule has to know of an optimizer's update of a parameter.

    Attributes:
        name: of the optimizer, "adam" for what gets AdamW inside a matrix optimizer.
        column: its row in `RATE`; empty for Shampoo without grafting, which has a formula.
        degree: h, where gradients times c give an update times c^h.
        exponent: for bare Shampoo, of both sides together.
        block: longest side of a block, where the rate depends on it; `None` if nothing is cut.
    """

    name: str
    column: str
    degree: float = 0.0
    exponent: float = 0.0
    block: int | None = None

    @property
    def has_epsilon(self) -> bool:
        """Whether Adam's epsilon is in it, which meets entries of gradients."""
        return self.name in ("adam", "soap") or self.column.endswith("/adam")


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


def update_of(optimizer: str, settings: Mapping[str, Any], rule: str) -> Update:
    """Return the column of the tables for an optimizer of this package with these settings.

    Raises:
        ValueError: for an unknown optimizer, and settings that the rule has no rate for.
    """
    if optimizer not in get_args(OptimizerName):
        raise ValueError(
            f"got optimizer={optimizer!r}, expected one of {', '.join(get_args(OptimizerName))}"
        )
    if optimizer in ("sgd", "adam", "signum"):
        return Update(optimizer, optimizer, degree=1.0 if optimizer == "sgd" else 0.0)
    free = rule in ("sp", "ntp")  # which take the optimizer as it is
    if optimizer in ("muon", "teon"):
        _need(settings, "scale", "spectral", "spectral", optimizer, free)
        return Update(optimizer, optimizer)
    if optimizer == "soap":
        normalized = settings.get("length") == "spectral"
        _need(settings, "scale", "none", "spectral" if normalized else "none", optimizer, free)
        return Update(optimizer, "soap/spectral" if normalized else "soap")
    length = settings.get("length", "adam")
    _need(settings, "scale", "none", "spectral" if length == "muon" else "none", optimizer, free)
    _need(settings, "relative_eps", True, True, optimizer, free)
    if length != "own":
        return Update(optimizer, f"{optimizer}/{length}")
    if optimizer == "kl-shampoo":  # its length is another one at the start than later
        if not free:
            raise ValueError(
                'got length="own" for kl-shampoo, for which the table has no learning rate; '
                'expected settings={"length": "adam"} or "muon" with scale="spectral"'
            )
        return Update(optimizer, "")
    sides = 2 if settings.get("sides", "both") == "both" else 1
    exponent, block = settings.get("exponent", 1 / 2) * sides, settings.get("block", 1024)
    return Update(optimizer, "", degree=1 - 2 * exponent, exponent=exponent, block=block)


def _need(
    settings: Mapping[str, Any], key: str, default: Any, wanted: Any, name: str, free: bool
) -> None:
    got = settings.get(key, default)
    if not free and got != wanted:
        given = (x for x in ("length",) if x in settings)
        other = "".join(f" with {x}={settings[x]!r}" for x in given)
        raise ValueError(
            f"got {key}={got!r} for {name}{other}, for which the table has no learning rate; "
            f"expected settings={{{key!r}: {wanted!r}}}"
        )


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
    if update.has_epsilon:
        eps = EPSILON.of(size.kind, size.fan_in, size.fan_out)
        source += f"; eps: {EPSILON.source}"
    if rule in ALPHA and size.blocks != 1:
        rate *= size.blocks ** (ALPHA[rule] * (1 + update.degree) - 1)
        eps *= size.blocks ** -ALPHA[rule] if update.has_epsilon else 1.0
        source += f"; depth: {DEPTH_SOURCE.get((rule, update.name), 'derived here')}"
    return Factors(init, rate, eps, source)


def _rate(update: Update, size: Size) -> tuple[float, str]:
    """The rate under muP: of the table or, for Shampoo without grafting, of its formula."""
    if update.column:
        row = RATE[update.column]
        return row.of(size.kind, size.fan_in, size.fan_out), row.source
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
