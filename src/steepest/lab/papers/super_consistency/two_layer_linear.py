"""Two linear layers: the Hessian is a Gauss-Newton part and a part that couples the layers.

f(x) = E V x / (γ √(N D)) with standard normal V (N, D) and E (1, N). The loss is ½ (f - y)², the
mean over examples, and gradient descent has the rate η γ². γ is √N under muP and 1 in the NTK
parametrization. With residuals r the second part R has the largest eigenvalue
‖Σ r_i x_i‖ / (P γ √(N D)); times γ² it stays as the width grows under muP, and falls as 1 / √N
in the NTK parametrization. It makes the layers learn from each other, so that sharpness rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from steepest.curvature import Hessian, sharpness
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import LabelledBatch, spread_of
from steepest.statistics import log_slope

_INPUTS, _EXAMPLES, _RATE = 20, 40, 0.5
_GAMMAS: dict[str, Callable[[int], float]] = {"mup": math.sqrt, "ntp": lambda width: 1.0}
_RUNS = 3
_SETTLED = 40  # steps from which on the spread over widths counts


class TwoLayerLinear(nn.Module):
    """Map x `(P, D)` to E V x / (γ √(N D)) `(P,)`."""

    def __init__(self, width: int, gamma: float):
        super().__init__()
        self.V = nn.Parameter(torch.randn(width, _INPUTS, dtype=torch.float64))
        self.E = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.width, self.gamma = width, gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return f `(P,)` of x `(P, D)`."""
        outputs: Tensor = x @ self.V.T @ self.E
        return outputs / (self.gamma * math.sqrt(self.width * _INPUTS))

    def coupling(self, batch: LabelledBatch) -> float:
        """λ_max of R in closed form."""
        X, y = batch
        q = (self(X) - y).detach() @ X / len(X)
        return float(q.norm()) / (self.gamma * math.sqrt(self.width * _INPUTS))


def half_square(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """The loss ½ (f - y)², the mean over examples."""
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


@dataclass(frozen=True)
class TwoLayerRun:
    """Largest eigenvalues along one run, times γ².

    Attributes:
        total: of the Hessian, at each snapshot.
        coupling: of R at the start, by products with it.
        formula: the same in closed form.
    """

    total: list[float]
    coupling: float
    formula: float


def two_layer_run(
    width: int, gamma: float, batch: LabelledBatch, steps: int, every: int
) -> TwoLayerRun:
    """Train one network from random weights."""
    model = TwoLayerLinear(width, gamma)
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE * gamma**2)
    H = Hessian(model, half_square, batch)
    coupling = sharpness(H - H.gauss_newton(), tolerance=1e-9).value
    formula, total, top = model.coupling(batch), [], None
    for step in range(steps + 1):
        if step % every == 0:
            top = sharpness(Hessian(model, half_square, batch), start=top)
            total.append(gamma**2 * top.value)
        optimizer.zero_grad()
        half_square(model, batch).backward()
        optimizer.step()
    return TwoLayerRun(total, gamma**2 * coupling, gamma**2 * formula)


def two_layers(seed: int, widths: tuple[int, ...], steps: int, every: int, draws: int) -> Numbers:
    """Three runs of every width in both parametrizations, on the targets of one linear teacher.

    Sharpness is the mean over the three; R at the start that over so many draws of the weights, by
    its closed form.
    """
    X = torch.randn(_EXAMPLES, _INPUTS, dtype=torch.float64)
    batch = X, X @ torch.randn(_INPUTS, dtype=torch.float64) / math.sqrt(_INPUTS)
    numbers: Numbers = {}
    snapshots = list(range(0, steps + 1, every))
    for name, gamma in _GAMMAS.items():
        runs = [
            [two_layer_run(n, gamma(n), batch, steps, every) for _ in range(_RUNS)] for n in widths
        ]
        total = [[fmean(t) for t in zip(*(run.total for run in r), strict=True)] for r in runs]
        coupling = [
            fmean(TwoLayerLinear(n, gamma(n)).coupling(batch) for _ in range(draws)) * gamma(n) ** 2
            for n in widths
        ]
        late = [i for i, step in enumerate(snapshots) if step >= _SETTLED]
        numbers[name] = {
            "sharpness": total,
            "coupling": coupling,
            "coupling_slope": log_slope(widths, coupling),
            "late_spread": max(spread_of([line[i] for line in total]) for i in late),
            "growth": total[-1][-1] / total[-1][0],
            "formula_error": max(
                abs(run.coupling / run.formula - 1) for of_width in runs for run in of_width
            ),
        }
    lines = {
        f"{name}, width {width}": numbers[name]["sharpness"][i]
        for name in _GAMMAS
        for i, width in ((0, widths[0]), (-1, widths[-1]))
    }
    figure = curve(
        "Two linear layers: sharpness along training", [float(s) for s in snapshots], lines,
        across="step", up="sharpness times γ²",
    )  # fmt: skip
    return numbers | {"curves": [figure]}


TWO_LAYERS = Experiment(
    name="two-linear-layers",
    title="Two linear layers with muP and in the NTK parametrization",
    kind="theory",
    measure=two_layers,
    scales={
        "quick": Setting(
            sizes={"widths": (64, 512), "steps": 160, "every": 40, "draws": 64},
            seeds=4,
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={"widths": (32, 64, 128, 256, 512, 1024), "steps": 200, "every": 20, "draws": 64},
            seeds=5,
            minutes=1.5,
        ),
        "gpu": Setting(
            sizes={"widths": (32, 256, 2048, 16384), "steps": 400, "every": 40, "draws": 64},
            seeds=5,
            minutes=2,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 400, "every": 20, "draws": 64},
            seeds=5,
            minutes=3,
        ),
    },
)

_SLOPE = "slope of R's eigenvalue at the start against the width, both as logarithms"
_GROWTH = "sharpness at the end over that at the start, at the largest width"

CLAIMS = (
    Claim(
        name="coupling-formula",
        sentence="The part of the Hessian that couples two linear layers has a closed form.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity="relative error of its largest eigenvalue, the largest over widths",
        value=lambda numbers: max(numbers[name]["formula_error"] for name in _GAMMAS),
        high=1e-6,
        judged="every seed",
        checks=("C4",),
    ),
    Claim(
        name="coupling-stays-under-mup",
        sentence="Under muP the part that couples the layers is as large at every width.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity=_SLOPE,
        value=lambda numbers: float(numbers["mup"]["coupling_slope"]),
        low=-0.1,
        high=0.1,
        paper="0",
        checks=("C4",),
    ),
    Claim(
        name="coupling-fades-under-ntp",
        sentence="In the NTK parametrization that part falls as one over the root of the width.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity=_SLOPE,
        value=lambda numbers: float(numbers["ntp"]["coupling_slope"]),
        low=-0.65,
        high=-0.35,
        paper="-1/2",
        checks=("C4",),
    ),
    Claim(
        name="two-layers-consistent",
        sentence="Under muP two linear layers have the same sharpness at all widths late in "
        "training.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity="largest over smallest sharpness of all widths, at its worst from step 40 on",
        value=lambda numbers: float(numbers["mup"]["late_spread"]),
        high=1.1,
        checks=("C4",),
    ),
    Claim(
        name="two-layers-sharpen",
        sentence="Under muP the sharpness of two linear layers grows in training.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity=_GROWTH,
        value=lambda numbers: float(numbers["mup"]["growth"]),
        low=1.5,
        checks=("C4",),
    ),
    Claim(
        name="two-layers-lazy",
        sentence="In the NTK parametrization wide linear layers do not sharpen.",
        place="two linear layers, derived here",
        source="ours",
        experiment=TWO_LAYERS,
        quantity=_GROWTH,
        value=lambda numbers: float(numbers["ntp"]["growth"]),
        high=1.05,
        checks=("C4",),
    ),
    Claim(
        name="coupling-stays-under-ntp",
        sentence="False on purpose: in the NTK parametrization, too, the part that couples the "
        "layers is as large at every width.",
        place="control",
        source="ours",
        experiment=TWO_LAYERS,
        quantity=_SLOPE,
        value=lambda numbers: float(numbers["ntp"]["coupling_slope"]),
        low=-0.1,
        high=0.1,
        control=True,
    ),
)
