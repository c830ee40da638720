"""The condition of one block among others, as algebra (eq. 4.16).

The loss may curve along a block in both norms at once: by L = C_F ‖A‖_op² and by C_op. With
s = st(A), the spectral step has the guarantee ‖G‖_*² / (s L + C_op) over two. The Euclidean step
has ‖G‖_F² / (L + C_op / st(G)) over two.
"""

from __future__ import annotations

import torch

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.spectral_condition.least_squares import DTYPE
from steepest.linalg import nuclear_rank, stable_rank


def disagreements(seed: int, draws: int, rows: int) -> Numbers:
    """How often the condition and the comparison of guarantees disagree, over random blocks."""
    wrong = not_sufficient = wrong_for_gains = 0
    for _ in range(draws):
        size, falling, bound, share = torch.rand(4, dtype=DTYPE).tolist()
        n = 2 + int(size * (rows - 2))
        values = torch.rand(n, dtype=DTYPE) ** (8 * falling)
        G = torch.diag(values)
        s, alpha = 1 + bound * n, 10 ** (4 * share - 2)  # C_op / L
        nuclear, frobenius = float(values.sum()) ** 2, float(values.square().sum())
        spectral_gains = nuclear / (s + alpha) >= frobenius / (1 + alpha / float(stable_rank(G)))
        condition = nuclear_rank(G) >= (s + alpha) / (1 + alpha / float(stable_rank(G)))
        wrong += bool(spectral_gains != condition)
        not_sufficient += bool(nuclear_rank(G) >= s) and not spectral_gains
        # the gain of RMSNorm is a diagonal matrix: its steps are by the sign
        sign_gains = float(values.sum()) ** 2 / s >= frobenius
        wrong_for_gains += bool(sign_gains != (nuclear / frobenius >= s))
    return {"wrong": wrong + wrong_for_gains, "not_sufficient": not_sufficient}


ALGEBRA = Experiment(
    name="block-condition",
    title="The condition of one block among others",
    kind="identity",
    measure=disagreements,
    scales={
        "quick": Setting(sizes={"draws": 2000, "rows": 12}, seeds=2),
        "cpu": Setting(sizes={"draws": 20_000, "rows": 12}, seeds=2, minutes=0.5),
        "paper": Setting(sizes={"draws": 20_000, "rows": 12}, seeds=2, minutes=0.5),
    },
)

CLAIMS = (
    Claim(
        name="exact-block-condition",
        sentence="The exact condition of a block says which of the two guarantees is larger.",
        place="eq. 4.16",
        source="first-hand",
        experiment=ALGEBRA,
        quantity="number of counter-examples among random blocks",
        value=lambda numbers: float(numbers["wrong"]),
        high=0.5,
        judged="every seed",
        paper="0",
        checks=("A11",),
    ),
    Claim(
        name="condition-is-sufficient",
        sentence="It suffices that nr(G) is at least st(A), however strongly blocks interact.",
        place="Section 4, p. 65",
        source="first-hand",
        experiment=ALGEBRA,
        quantity="number of counter-examples among random blocks",
        value=lambda numbers: float(numbers["not_sufficient"]),
        high=0.5,
        judged="every seed",
        paper="0",
        checks=("A11",),
    ),
)
