"""Losses of twenty steps of every optimizer, which no refactoring may change.

A matrix problem in float64: ‖A W B - C‖² with another A for each step. `python
tests/optim/test_golden_traces.py` prints the losses anew, for a change that is meant.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent

SVD = {"method": "svd"}
OPTIMIZERS = {
    "signsgd": lambda p: SignSGD(p, 0.02),
    "signum": lambda p: Signum(p, 0.02, weight_decay=0.1),
    "spectral-descent": lambda p: SpectralDescent(p, 0.05, **SVD),
    "spectral-descent, dual": lambda p: SpectralDescent(p, 0.01, length="dual", **SVD),
    "muon": lambda p: Muon(p, 0.1, weight_decay=0.1, **SVD),
    "muon, heavy ball": lambda p: Muon(p, 0.1, heavy_ball=True, nesterov=False, **SVD),
    "teon": lambda p: TEON([{"params": p, "stacks": [[0], [0]]}], 0.1, **SVD),
    "teon, mode 2": lambda p: TEON(
        [{"params": p, "stacks": [[0], [0]]}], 0.1, mode=2, length="muon", **SVD
    ),
    "shampoo": lambda p: Shampoo(p, 0.1, interval=3),
    "shampoo, quarter": lambda p: Shampoo(p, 0.1, exponent=1 / 4, length="own", interval=3),
    "shampoo, left": lambda p: Shampoo(p, 0.1, sides="left", block=4, interval=2),
    "kl-shampoo": lambda p: KLShampoo(p, 0.1, interval=3),
    "kl-shampoo, sequential": lambda p: KLShampoo(
        p, 0.1, sequential=True, length="muon", interval=1
    ),
    "soap": lambda p: SOAP(p, 0.1, interval=3),
}


def losses(name: str) -> list[float]:
    """The loss before each of twenty steps."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = 6 if name == "soap" else 8  # a basis of a factor of low rank is for rounding to decide
    weights = [nn.Parameter(randn(6, n)) for _ in range(2)]
    B, C = randn(n, 9), randn(7, 9)
    optimizer = OPTIMIZERS[name](weights)
    found = []
    for _ in range(20):
        A = randn(7, 6)
        loss = sum((A @ W @ B - C).square().mean() for W in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# fmt: off
GOLDEN: dict[str, list[float]] = {
    "signsgd": [
        86.98935415, 61.50696524, 61.79899247, 55.01910001, 65.22219995, 50.18865067,
        32.56858616, 28.20493714, 39.48023599, 75.97227286, 53.85487887, 15.38836192, 58.024644,
        55.86398731, 52.47191178, 25.84262137, 37.92254727, 48.88918279, 48.36478847,
        34.48474516,
    ],
    "signum": [
        86.98935415, 61.27235787, 61.28150855, 53.75391122, 61.93335728, 48.58201987,
        31.05194369, 27.05960556, 37.40350239, 69.29147467, 51.61062326, 14.76657469,
        51.73301823, 55.62544105, 47.33711242, 22.45842206, 32.72878218, 36.41596747,
        37.94666613, 28.06310173,
    ],
    "spectral-descent": [
        86.98935415, 61.87520771, 61.90730958, 54.8834378, 66.3176788, 51.59344255, 34.88436154,
        29.94195535, 41.52386778, 79.14832719, 54.96159286, 15.97455647, 61.45227026,
        61.89035448, 59.18769208, 28.73674772, 41.86753309, 51.38758668, 56.79507593,
        37.76037888,
    ],
    "spectral-descent, dual": [
        86.98935415, 53.59075376, 51.95215148, 39.34944467, 42.55698626, 32.08008854,
        21.07446632, 16.15212954, 24.12025543, 42.488822, 25.01304448, 6.650701278, 27.30906126,
        25.6107524, 20.49259294, 9.814253659, 14.04488747, 18.03391086, 16.53383118, 13.0402688,
    ],
    "muon": [
        86.98935415, 59.23457114, 56.49383979, 46.9136119, 52.69116838, 39.06903438,
        25.14412602, 19.34963504, 26.37724796, 46.13228301, 30.49434225, 8.184365834,
        28.95136447, 28.28351133, 23.84943286, 10.72269719, 13.87473246, 16.66825125,
        16.5131099, 11.17603515,
    ],
    "muon, heavy ball": [
        86.98935415, 60.39247396, 59.02237847, 49.85459355, 57.17337492, 43.58010354,
        28.46931462, 22.49542372, 31.51605224, 57.00106371, 37.99736648, 10.43512075,
        38.41513867, 39.08730249, 34.10554234, 15.90351501, 21.09564617, 25.266056, 26.87129403,
        17.43569771,
    ],
    "teon": [
        86.98935415, 60.51485254, 58.14555306, 50.77390137, 60.39828467, 45.30079857,
        27.7020826, 23.37125274, 32.68725559, 61.74216146, 40.90070065, 10.7757094, 43.9853247,
        37.39482843, 36.00902098, 18.27695828, 24.13774989, 31.91690712, 32.66733486,
        20.36885626,
    ],
    "teon, mode 2": [
        86.98935415, 60.71648226, 59.23255973, 51.20890929, 58.5047539, 45.30584333, 28.9790731,
        22.98379006, 32.41380136, 58.97438918, 41.18594941, 11.31106295, 40.09148595,
        41.56196483, 36.83976776, 16.9813358, 22.14186716, 27.77335931, 29.58816514,
        19.31892043,
    ],
    "shampoo": [
        86.98935415, 54.88710141, 53.17577503, 42.91676631, 43.64903482, 34.19047378,
        21.49261256, 17.14230455, 26.22175388, 48.66721124, 27.31782576, 7.34706542,
        24.04237751, 26.57875384, 21.58353855, 10.0748432, 14.20696207, 17.76479427,
        14.41750732, 11.45485448,
    ],
    "shampoo, quarter": [
        86.98935415, 59.95891146, 59.24146813, 50.17787743, 57.50994145, 44.08592043,
        28.83293465, 24.08092917, 33.88485657, 63.47816634, 40.9237768, 11.17562812,
        41.35377604, 41.21930812, 35.6799637, 17.85733403, 24.8588769, 30.39090585, 28.62882217,
        20.04562179,
    ],
    "shampoo, left": [
        86.98935415, 55.25438898, 53.32963542, 35.60055114, 34.00026726, 23.99074801,
        15.62889102, 11.17588311, 15.36079742, 25.92963464, 14.77578445, 4.100478651,
        8.104284351, 11.77420721, 7.455749124, 4.821028733, 5.876369074, 9.521266298,
        6.556534766, 6.695867405,
    ],
    "kl-shampoo": [
        86.98935415, 54.88710141, 53.17577503, 41.73324072, 40.94689757, 32.74257918,
        20.59779317, 16.22491753, 23.52146461, 41.2813797, 20.84428416, 5.71814956, 16.33028372,
        18.14397842, 12.2800242, 5.55341655, 7.074604459, 10.64614916, 6.78683032, 6.810973124,
    ],
    "kl-shampoo, sequential": [
        86.98935415, 59.93881347, 58.03140377, 49.03262868, 54.87110457, 43.13695264,
        30.11240452, 22.44798683, 30.34083269, 52.41369131, 35.22086828, 9.775305245,
        38.19145602, 36.99354411, 31.67127421, 13.17156636, 18.09064157, 20.87452927,
        24.07978772, 14.39979732,
    ],
    "soap": [
        68.05295153, 105.1734707, 93.23530971, 76.97517041, 58.96766863, 56.95239388,
        82.99323411, 90.16587691, 43.3368747, 51.22739452, 32.39400227, 16.10579878,
        20.42937776, 28.84236094, 15.10320189, 17.25356344, 7.565719896, 16.86797811,
        12.67245259, 9.847326412,
    ],
}
# fmt: on


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_losses_are_what_they_were(name: str) -> None:
    assert losses(name) == pytest.approx(GOLDEN[name], rel=1e-7)


if __name__ == "__main__":
    for each in OPTIMIZERS:
        print(f"    {each!r}: [{', '.join(f'{loss:.10g}' for loss in losses(each))}],")
