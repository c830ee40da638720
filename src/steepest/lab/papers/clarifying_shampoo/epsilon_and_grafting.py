"""What ε decides, with Adam's length and with the length that Shampoo has itself."""

from __future__ import annotations

from steepest.lab.papers.claim import Claim, Comparison, Numbers
from steepest.lab.papers.clarifying_shampoo.token_efficiency import MUON, ahead, on_text

_GRAFTED = {eps: f"shampoo:eps={eps}" for eps in ("1e-06", "0.01", "10")}
_UNGRAFTED = {eps: f"shampoo:eps={eps},length=own,lr={lr}" for eps, lr in
              (("1e-06", "0.004"), ("0.01", "0.004"), ("1", "0.03"))}  # fmt: skip

EPSILON_AND_LENGTH = Comparison(
    name="epsilon",
    title="Shampoo 1/2 by ε, with the length of Adam's update and without",
    kind="real data",
    scales=on_text((MUON, *_GRAFTED.values(), *_UNGRAFTED.values()), minutes=6, steps=200),
)


def _turn(numbers: Numbers) -> float:
    """How clear the turn is: the lead at a small ε, or the lag at a large one, the lesser."""
    return min(
        ahead(_GRAFTED["0.01"], MUON)(numbers),
        ahead(MUON, _GRAFTED["10"])(numbers),
    )


def _best(specs: dict[str, str], numbers: Numbers) -> float:
    return min(float(numbers[spec]) for spec in specs.values())


CLAIMS = (
    Claim(
        name="epsilon-turns-the-order",
        sentence="The choice of ε turns the order of Shampoo 1/2 and Muon.",
        place="Appendix",
        source="second-hand",
        experiment=EPSILON_AND_LENGTH,
        quantity="lead on Muon with ε = 0.01, or lag with ε = 10, the lesser (nats)",
        value=_turn,
        low=0.0,
        checks=("D2.b",),
    ),
    Claim(
        name="epsilon-decides-without-grafting",
        sentence="Without grafting, a tiny ε makes Shampoo 1/2 worse than Muon.",
        place="Third-party runs",
        source="second-hand",
        experiment=EPSILON_AND_LENGTH,
        quantity="loss without grafting at ε = 1e-6 less that of Muon (nats per token)",
        value=ahead(MUON, _UNGRAFTED["1e-06"]),
        low=0.0,
        paper="diverges with ε = 1e-15",
        checks=("D2.b",),
    ),
    Claim(
        name="tuned-epsilon-replaces-grafting",
        sentence="With ε tuned, Shampoo 1/2 without grafting is as good as with it.",
        place="Third-party notes",
        source="second-hand",
        experiment=EPSILON_AND_LENGTH,
        quantity="best loss over ε without grafting less the best with it (nats per token)",
        value=lambda numbers: _best(_UNGRAFTED, numbers) - _best(_GRAFTED, numbers),
        high=0.02,
        checks=("D2.b",),
    ),
)
