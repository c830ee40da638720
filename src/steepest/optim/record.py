"""What the house has to know of an optimizer; each says it in its own file, and nowhere else.

Names, the place in the table of norms and the rates of a study are in `Record`; how the learning
rate follows the size of a matrix is its `Update`. Steps and their linearization are methods of the
class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from torch.optim.optimizer import Optimizer

Kind = Literal["input", "hidden", "output", "vector", "fixed"]
"""Which fans of a parameter grow with the model."""


ADAMW: Final = "adamw"
"""The optimizer of everything that is no matrix, and the geometry of its groups."""


def acts_on_entries(group: Mapping[str, Any]) -> bool:
    """Return whether a group is that of AdamW, which knows no matrices."""
    return bool(group.get("geometry") == ADAMW)


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


class Update(NamedTuple):
    """How the learning rate of an update follows the size of a matrix, under muP.

    Attributes:
        name: of the optimizer.
        row: factors on the rate; `None` for Shampoo of its own length, which has a formula.
        degree: h, where gradients times c give an update times c^h.
        exponent: for that formula, of both sides together.
        block: longest side of a block, where the rate depends on it; `None` if nothing is cut.
        eps: key of the setting that is Adam's ε, which meets entries of gradients; "" without one.
        depth: source of what depth adds, for each rule that has one.
    """

    name: str
    row: Row | None
    degree: float = 0.0
    exponent: float = 0.0
    block: int | None = None
    eps: str = ""
    depth: Mapping[str, str] = {}


ENTRIES = Row(ONE, PER_IN, PER_IN, "derived here: steps of Adam's length")
"""Of updates whose entries are as large at any size, as those of a sign are."""
SPECTRAL = Row(ONE, ONE, ONE, "derived here: steps of spectral norm sqrt(out/in)")
"""Of updates of this norm, which is all that muP asks for (QIU Table 1)."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """An optimizer as the house knows it.

    Attributes:
        name: on command lines, in files and in plans, such as "kl-shampoo".
        label: in text and tables, such as "KL-Shampoo".
        geometry, memory: its place in the table of norms.
        rates: learning rates that a study starts from, ascending; none if it takes no part.
        kind: the class; filled in where the class lists its records.
        settings: those in which it differs from other records of the class.
        update: from settings, and whether any will do, to how the rate follows the size.
    """

    name: str
    label: str
    geometry: str
    memory: str
    rates: tuple[float, ...] = ()
    kind: type[Optimizer] = Optimizer
    settings: Mapping[str, Any] = field(default_factory=dict)
    update: Callable[[Mapping[str, Any], bool], Update] | None = None

    def __post_init__(self) -> None:
        numbers = isinstance(self.rates, tuple | list) and all(
            isinstance(rate, int | float) and 0 < rate < math.inf for rate in self.rates
        )
        if not numbers or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(
                f"got rates={self.rates!r} in the record of {self.name!r}, expected a tuple of "
                "finite numbers above 0, ascending, such as rates=(0.01, 0.02, 0.04)"
            )


def need(
    settings: Mapping[str, Any], key: str, default: Any, wanted: Any, name: str, free: bool
) -> None:
    """Raise a `ValueError` unless a setting is what a column of the tables is about.

    Args:
        settings: of the optimizer, where they are not its defaults.
        key, default, wanted: the setting, its default, and what it has to be.
        name: of the optimizer.
        free: whether any value will do.
    """
    value = settings.get(key, default)
    if not free and value != wanted:
        length = f" with length={settings['length']!r}" if "length" in settings else ""
        raise ValueError(
            f"got {key}={value!r} for {name}{length}, for which no rule gives the rate of a larger "
            f"model; expected {key}={wanted!r}. Pass settings={{{key!r}: {wanted!r}}}"
        )
