"""TEON: the spectral geometry of matrices stacked over layers, with momentum."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, Unpack

from steepest.geometry import Spectral, StackedSpectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.model.matrix_view import matrix_label
from steepest.model.parameter_roles import RoleTable
from steepest.model.stacks import find_stacks
from steepest.optim.checks import Count, Fraction, PolarSteps, Precision, Rate, check_setting
from steepest.optim.momentum import Momentum
from steepest.optim.record import SPECTRAL, Record, Update, need
from steepest.optim.scales import Scale
from steepest.optim.settings import Settings, checks_of
from steepest.optim.steepest_descent import Parameters, SteepestDescent


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    need(settings, "scale", "spectral", "spectral", "teon", free)
    return Update("teon", SPECTRAL._replace(source="derived here: TEON"))


class TEON(SteepestDescent):
    """Muon, with the queries, keys and values of K consecutive layers orthogonalized together.

    Of each kind, Z = [N₁ | ... | N_K] (mode 1, `(out, K in)`), Q = polar(Z), and
    W_k <- (1 - lr λ) W_k - lr s Q_k with s by the shape of one layer. All other matrices take
    Muon's step, also the layers that are left over at the end.

    Zhang et al., "TEON" (arXiv 2601.23261), algorithm 1, with K = 2, mode 1 and s = sqrt(out/in) as
    there. For square layers Q_k has 1/sqrt(K) of the Frobenius norm of Muon's direction, so at the
    same rate a stacked layer takes a smaller step. That is the paper's form and the default;
    `length="muon"` gives a stack the Frobenius norm it has under Muon, sqrt(K min(out, in)), for
    comparisons at equal length.

    Args:
        params: a model or a role table, in which the stacks are found; or groups with a key
            "stacks": for each parameter the number of the stack of each of its matrices, or `None`.
        lr: spectral norm of the step, times s.
        stack: K, the number of consecutive layers in a stack.
        mode: 1 to stack along the inputs, 2 along the outputs.
        length: of the update of a stack: its "own", or as far as its layers go under "muon".
        momentum, nesterov, scale, method, steps, dtype: as for `Muon`.
        settings: what all optimizers take, see `Settings`.

    Warns if nothing was stacked. `stacks` says which stacks were made.
    """

    records = (
        Record(
            name="teon",
            label="TEON",
            geometry="spectral, stacked",
            memory="momentum",
            rates=(0.01, 0.02, 0.04),
            update=_update,
        ),
    )

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        stack: Count = 2,
        mode: Literal[1, 2] = 1,
        length: Literal["own", "muon"] = "own",
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        scale: Scale = "spectral",
        method: PolarMethod = "auto",
        steps: PolarSteps = None,
        dtype: Precision = None,
        **settings: Unpack[Settings],
    ):
        check_setting("stack", stack, checks_of(type(self)))
        super().__init__(
            params,
            lr,
            geometry=StackedSpectral(mode, Spectral(method, steps, dtype)),
            memory=Momentum(momentum, nesterov),
            scale=scale,
            length=length,
            marked={"stack": stack},
            **settings,
        )
        if stack > 1 and not self.stacks:
            warnings.warn(
                "TEON found nothing to stack, so it is Muon here: no queries, keys or values of "
                f"{stack} layers were found. Print steepest.roles(model) for what was found, or "
                'pass groups with "stacks"',
                UserWarning,
                stacklevel=2,
            )

    @property
    def stacks(self) -> list[tuple[str, ...]]:
        """The stacks: names of the parameters in each, with the matrix's number where several."""
        stacks: dict[tuple[int, int], list[str]] = defaultdict(list)
        for g, group in enumerate(self.param_groups):
            labels = group.get("stacks") or []
            names = group.get("param_names") or [str(i) for i in range(len(labels))]
            for name, label in zip(names, labels, strict=False):
                for i, number in enumerate(label or ()):
                    if number is not None:
                        stacks[g, number].append(matrix_label(name, i, len(label)))
        return [tuple(stack) for stack in stacks.values()]

    @classmethod
    def marks(
        cls, table: RoleTable, settings: Mapping[str, Any]
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return the stacks that are found in a model, by the names of their parameters."""
        return {"stacks": find_stacks(table, settings.get("stack", 2))}
