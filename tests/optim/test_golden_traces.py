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
        [{"params": p, "stacks": [[0], [0]]}], 0.1, mode=2, compensate=True, **SVD
    ),
    "shampoo": lambda p: Shampoo(p, 0.1, interval=3),
    "shampoo, quarter": lambda p: Shampoo(p, 0.1, exponent=1 / 4, graft="none", interval=3),
    "shampoo, left": lambda p: Shampoo(p, 0.1, sides="left", block=4, interval=2),
    "kl-shampoo": lambda p: KLShampoo(p, 0.1, interval=3),
    "kl-shampoo, sequential": lambda p: KLShampoo(
        p, 0.1, sequential=True, graft="muon", interval=1
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
        86.98935415, 54.88710141, 53.17577503, 44.52432002, 45.19239064, 35.92985806,
        22.54527839, 18.1294378, 27.51628936, 50.70174813, 28.82019168, 7.616886181,
        25.45187366, 28.15430296, 22.95875582, 10.64756563, 14.95228448, 18.48558609,
        15.48427015, 11.99855099,
    ],
    "shampoo, quarter": [
        86.98935415, 63.04151457, 59.61273913, 55.83355925, 69.55398047, 51.54677485,
        35.69418296, 30.63357721, 41.31221616, 78.6969971, 57.0135875, 16.10893106, 58.81392977,
        60.04003508, 54.99540794, 25.81547511, 37.33046822, 46.54606307, 47.00108968,
        30.92404143,
    ],
    "shampoo, left": [
        86.98935415, 55.25972996, 53.32744351, 35.6016663, 34.01651039, 23.99302456,
        15.63124471, 11.17671116, 15.36242129, 25.93632852, 14.78021802, 4.102065098,
        8.105658254, 11.77888526, 7.458265534, 4.82145877, 5.87700397, 9.523270876, 6.556926962,
        6.69684403,
    ],
    "kl-shampoo": [
        86.98935415, 54.88710141, 53.17577503, 43.38241924, 43.86427329, 35.53024325,
        21.27375922, 18.29718711, 28.1929715, 50.33773751, 29.23768627, 7.858235762,
        19.89385221, 25.79213347, 17.97698711, 8.720975335, 12.65073032, 14.68683184,
        7.792971662, 10.04677746,
    ],
    "kl-shampoo, sequential": [
        86.98935415, 59.94151024, 58.52048138, 49.02944523, 54.25880176, 42.48619424,
        27.46418323, 21.15582616, 29.36540924, 50.57191811, 33.08272088, 9.278974786,
        32.83385959, 33.1563536, 28.25288705, 12.3627038, 15.59602013, 18.55003829, 19.28586138,
        12.46632156,
    ],
    "soap": [
        68.05295153, 105.1734707, 93.23530971, 76.97517041, 58.96766863, 56.96390641,
        83.3689424, 91.0549664, 44.33246743, 51.88376764, 32.92359903, 16.41595655, 21.27178139,
        30.69122302, 16.07800387, 18.46508359, 8.052556187, 18.01194025, 13.88868332,
        10.36381016,
    ],
}
# fmt: on


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_losses_are_what_they_were(name: str) -> None:
    assert losses(name) == pytest.approx(GOLDEN[name], rel=1e-7)


if __name__ == "__main__":
    for each in OPTIMIZERS:
        print(f"    {each!r}: [{', '.join(f'{loss:.10g}' for loss in losses(each))}],")
