"""Where sharpness settles: full-batch training to the edge of stability, on digits."""

from __future__ import annotations

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.studies.edge_of_stability import EDGE, EdgeConfig, MethodName, trained

_RATES: dict[MethodName, float] = {"gd": 0.4, "adam": 0.004}


def edge_ratios(seed: int, width: int, steps: int, every: int) -> Numbers:
    """The ratio of sharpness to its threshold at the end, in each optimizer's own geometry."""
    config = EdgeConfig(width=width, steps=steps, every=every)
    runs = {name: trained(config, name, rate, seed) for name, rate in _RATES.items()}
    ratios = {
        name: [r["stability"][0]["ratio"] for r in run["records"] if "stability" in r]
        for name, run in runs.items()
    }
    count = min(map(len, ratios.values()))
    figure = curve(
        "Sharpness over its threshold", [float(every * (i + 1)) for i in range(count)],
        {name: line[-count:] for name, line in ratios.items()},
        across="step", up="ratio; 1 is the edge",
    )  # fmt: skip
    numbers: Numbers = {
        str(name): float("nan") if r["diverged"] else r["ratio"] for name, r in runs.items()
    }
    return {**numbers, "curves": [figure]}


EDGE_RATIOS = Experiment(
    name="edge-ratios",
    title="Where sharpness settles, on digits",
    kind="training",
    measure=edge_ratios,
    scales={
        "cpu": Setting(sizes={"width": 64, "steps": 3000, "every": 30}, seeds=3, minutes=2),
        "gpu": Setting(
            sizes={"width": 512, "steps": 6000, "every": 60}, seeds=5, minutes=10, on_gpu=True
        ),
        "paper": Setting(sizes={"width": 200, "steps": 10000, "every": 100}, seeds=5, minutes=30),
    },
)

_LOW, _HIGH = EDGE
_RATIO = "sharpness over its threshold, mean over the last fifth"

CLAIMS = (
    Claim(
        name="gradient-descent-at-edge",
        sentence="Gradient descent ends at the edge of stability: its sharpness is 2 / lr.",
        place="Section 2; Cohen et al., Fig. 1 (arXiv 2103.00065)",
        source="first-hand",
        experiment=EDGE_RATIOS,
        quantity=_RATIO,
        value=lambda numbers: float(numbers["gd"]),
        low=_LOW,
        high=_HIGH,
        paper="1",
        checks=("edge",),
    ),
    Claim(
        name="adam-at-edge",
        sentence="Adam ends at the edge of stability of its own geometry.",
        place="Cohen et al., Section 3 (arXiv 2207.14484)",
        source="first-hand",
        experiment=EDGE_RATIOS,
        quantity=_RATIO,
        value=lambda numbers: float(numbers["adam"]),
        low=_LOW,
        high=_HIGH,
        paper="1",
        checks=("edge",),
    ),
)
