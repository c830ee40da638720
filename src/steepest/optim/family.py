"""The family: every optimizer by its name, torch's SGD and AdamW among them.

A class that is defined elsewhere joins with its `records`, or with `register`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch.optim.optimizer import Optimizer

from steepest.optim import adamw
from steepest.optim.kl_shampoo import KLShampoo
from steepest.optim.muon import Muon
from steepest.optim.rates import callers_level
from steepest.optim.record import ADAMW, OUT, OUT_PER_IN, PER_IN, Record, Row, Update
from steepest.optim.shampoo import Shampoo
from steepest.optim.sign_sgd import SignSGD
from steepest.optim.signum import Signum
from steepest.optim.soap import SOAP
from steepest.optim.spectral_descent import SpectralDescent
from steepest.optim.steepest_descent import SteepestDescent
from steepest.optim.teon import TEON

SGD = Record(
    name="sgd",
    label="SGD",
    geometry="euclidean",
    memory="momentum",
    kind=torch.optim.SGD,
    update=lambda settings, free: Update(
        "sgd",
        Row(OUT, OUT_PER_IN, PER_IN, "TP-V Table 3"),
        degree=1.0,
        depth={"depth-mup": "TP-VI", "completep": "QIU Table 1"},
    ),
)
_FAMILY: dict[str, Record] = {record.name: record for record in (SGD, adamw.RECORD)}
FAMILY: Mapping[str, Record] = MappingProxyType(_FAMILY)
"""From a name to its record."""


def register(optimizer: type[SteepestDescent]) -> type[SteepestDescent]:
    """Add the records of a class to the family, also as a decorator; return the class.

    Raises:
        ValueError: for a name that another class has, and for `records` that are no tuple of them.
    """
    records = vars(optimizer).get("records", ())
    if not isinstance(records, tuple) or not all(isinstance(r, Record) for r in records):
        comma = "; a tuple of one needs a comma: (Record(...),)" * isinstance(records, Record)
        raise ValueError(
            f"got records={records!r} in {optimizer.__name__}, expected a tuple of Record{comma}"
        )
    for record in records:
        known = _FAMILY.get(record.name)
        if known is not None and known.kind.__qualname__ != optimizer.__qualname__:
            raise ValueError(
                f"got the name {record.name!r} for {optimizer.__name__}, which "
                f"{known.kind.__name__} has already; expected another name"
            )
        _FAMILY[record.name] = replace(record, kind=optimizer)
    return optimizer


for _kind in (SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP):
    register(_kind)


def record_of(optimizer: str | type[Optimizer]) -> Record:
    """Return the record of an optimizer, by its name or class.

    Raises:
        ValueError: for an unknown one.
        TypeError: for what is neither, such as an optimizer that is made already.

    >>> record_of("muon").label, record_of(Muon).geometry
    ('Muon', 'spectral')
    """
    if isinstance(optimizer, str):
        optimizer = modern_name(optimizer)
        if optimizer in _FAMILY:
            return _FAMILY[optimizer]
        close = difflib.get_close_matches(optimizer, _FAMILY, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"got optimizer={optimizer!r}, expected one of {', '.join(_FAMILY)}{hint}")
    if not isinstance(optimizer, type):
        raise TypeError(
            f"got optimizer={type(optimizer).__name__}(...), expected the name of an optimizer, "
            'such as "muon", or the class itself, such as Muon: the optimizer is made later'
        )
    for record in reversed(_FAMILY.values()):  # of several of a class the last is the plain one
        if record.kind is optimizer and not record.settings:
            return record
    if issubclass(optimizer, SteepestDescent) and vars(optimizer).get("records"):
        return record_of(register(optimizer).records[-1].name)
    name = optimizer.__name__
    hint = f"; {name} has only those that it inherits" if getattr(optimizer, "records", ()) else ""
    raise ValueError(
        f"got optimizer={name}, expected one of {', '.join(_FAMILY)}, or a subclass of "
        f"SteepestDescent with `records` of its own{hint}"
    )


def modern_name(name: str, warn: bool = True) -> str:
    """Return the name of this version; AdamW was "adam" in `parametrize` and `transfer` before."""
    if name != "adam":
        return name
    if warn:
        warnings.warn(
            'the optimizer "adam" is called "adamw" now; the old name goes with the next version',
            DeprecationWarning,
            stacklevel=callers_level(),
        )
    return ADAMW


def study_names() -> tuple[str, ...]:
    """Return the names of all that take part in studies."""
    return tuple(name for name, record in _FAMILY.items() if record.rates)
