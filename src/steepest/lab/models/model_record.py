"""What the house has to know of a model; each says it in its own file, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from steepest.lab.data.shapes import ImageShape, TextShape
from steepest.lab.errors import InputError


class ModelSizes(Protocol):
    """The sizes and variants of a model: a frozen dataclass."""

    def count(self, shape: Any) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants, for data of a shape.

        The formula is closed: nothing is made for it. So the sizes may be those of a model that no
        memory can hold.
        """


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model as the house knows it; its class lists its records as `records`.

    Attributes:
        name: on command lines and in files, such as "residual-mlp".
        label: in text and tables, such as "residual MLP".
        sizes: the default ones.
        takes: the kind of data.
        build: from sizes and the shape of the data to the model.
    """

    name: str
    label: str
    sizes: Any
    takes: type[TextShape | ImageShape]
    build: Callable[[Any, Any], nn.Module]


def check_at_least_one(sizes: Any, *names: str) -> None:
    """Refuse numbers below 1.

    Raises:
        InputError: with the first such number.
    """
    for name in names:
        if getattr(sizes, name) < 1:
            raise InputError(f"got {name}={getattr(sizes, name)}, expected at least 1")
