"""Identities of the papers, in float64, through the optimizers themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SpectralDescent
from steepest.geometry import LayerwiseSpectral, Spectral, StackedSpectral

BARE = {"momentum": 0.0, "beta2": 0.0, "eps": 0.0, "graft": "none", "interval": 1}
EXACT = {"method": "svd", "scale": "none"}
SHAPES = [(6, 6), (5, 9), (9, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def polar(G: Tensor) -> Tensor:
    return Spectral("svd").direction(G)


def distance(A: Tensor, B: Tensor) -> float:
    return float((A - B).norm() / B.norm())


def directions(make, gradients, **settings) -> list[Tensor]:
    """The direction of every step, from a rate of 1."""
    W = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = make([W], 1.0, **settings)
    found = []
    for G in gradients:
        before, W.grad = W.detach().clone(), G.clone()
        optimizer.step()
        found.append(before - W.detach())
    return found


def direction(make, G: Tensor, **settings) -> Tensor:
    return directions(make, [G], **settings)[0]


# ------------------------------------------------------------------------------------- Shampoo


@shapes
def test_without_memory_the_quarter_is_the_polar_factor(shape):
    G = randn(*shape)
    assert distance(direction(Shampoo, G, exponent=1 / 4, **BARE), polar(G)) < 1e-12


@shapes
def test_without_memory_the_half_inverts_the_spectrum(shape):
    G = randn(*shape)
    expected = torch.linalg.pinv(G).mT
    assert distance(direction(Shampoo, G, exponent=1 / 2, **BARE), expected) < 1e-11


@shapes
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_memory_the_half_of_one_side_is_the_polar_factor(shape, side):
    G = randn(*shape)
    found = direction(Shampoo, G, exponent=1 / 2, sides=side, **BARE)
    assert distance(found, polar(G)) < 1e-12


def test_shampoo_spectral_descent_and_muon_without_memory_walk_together():
    target = randn(6, 8, seed=1)
    makers = [
        lambda p: Shampoo(p, 0.05, exponent=1 / 4, **BARE),
        lambda p: SpectralDescent(p, 0.05, **EXACT),
        lambda p: Muon(p, 0.05, momentum=0.0, **EXACT),
    ]
    walks = []
    for make in makers:
        W = nn.Parameter(randn(6, 8, seed=2))
        optimizer = make([W])
        for _ in range(50):
            optimizer.zero_grad()
            (W - target).square().sum().backward()
            optimizer.step()
        walks.append(W.detach())
    assert distance(walks[1], walks[2]) < 1e-12
    assert distance(walks[0], walks[1]) < 1e-6


@shapes
@pytest.mark.parametrize("exponent", [1 / 4, 1 / 2])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_direction_is_muons_adapted_from_both_sides(shape, exponent, sides, momentum):
    W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    settings = {"graft": "none", "interval": 1, "momentum": momentum, "sides": sides}
    optimizer = Shampoo([W], 1.0, exponent=exponent, **settings)
    for seed in range(5):
        before, W.grad = W.detach().clone(), randn(*shape, seed=seed)
        optimizer.step()
    left, muon, right = optimizer.adaptation(W)
    assert distance(left @ muon @ right, before - W.detach()) < 1e-11
    M = optimizer.state[W].get("momentum_buffer", W.grad)
    assert distance(muon, polar(M)) < 1e-12
    with pytest.raises(ValueError, match="got matrix=1 of a parameter with 1"):
        optimizer.adaptation(W, matrix=1)
    with pytest.raises(ValueError, match="takes no Shampoo step"):
        optimizer.adaptation(nn.Parameter(torch.zeros(2, 2)))


def test_the_preconditioner_is_the_kronecker_product_of_its_factors():
    G = [randn(3, 4, seed=seed) for seed in range(6)]
    settings = {"momentum": 0.0, "beta2": 0.9, "eps": 0.0, "graft": "none", "interval": 1}
    found = directions(Shampoo, G, exponent=1 / 2, **settings)[-1]
    weights = torch.tensor([0.9 ** (5 - i) for i in range(6)], dtype=torch.float64)
    weights /= weights.sum()
    L = sum(w * g @ g.mT for w, g in zip(weights, G, strict=True))
    R = sum(w * g.mT @ g for w, g in zip(weights, G, strict=True))
    values, Q = torch.linalg.eigh(torch.kron(L, R))  # rows first, as `flatten` does
    expected = Q @ ((Q.mT @ G[-1].flatten()) * values**-0.5)
    assert distance(found.flatten(), expected) < 1e-10


@shapes
@pytest.mark.parametrize("make", [Shampoo, KLShampoo])
def test_grafting_takes_adams_length_and_leaves_the_direction(make, shape):
    gradients = [randn(*shape, seed=seed) for seed in range(6)]
    settings = {"momentum": 0.9, "beta2": 0.9, "interval": 1}
    grafted = directions(make, gradients, graft="adam", graft_beta2=0.95, **settings)
    muon = directions(make, gradients, graft="muon", **settings)
    W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    adam = torch.optim.AdamW([W], 1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for G, one, other in zip(gradients, grafted, muon, strict=True):
        before, W.grad = W.detach().clone(), G.clone()
        adam.step()
        assert float(one.norm()) == pytest.approx(float((before - W.detach()).norm()), rel=1e-9)
        assert float(other.norm()) == pytest.approx(min(shape) ** 0.5, rel=1e-12)
        assert float((one * other).sum() / one.norm() / other.norm()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("make", [Shampoo, KLShampoo])
def test_relative_eps_and_a_fixed_length_forget_the_scale(make, scale):
    gradients = [randn(5, 7, seed=seed) for seed in range(12)]
    small = directions(make, gradients, graft="muon", interval=3)
    large = directions(make, [scale * G for G in gradients], graft="muon", interval=3)
    for one, other in zip(small, large, strict=True):
        assert distance(one, other) < 1e-6


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Muon, {"method": "svd", "scale": "none"}),
        (Shampoo, {"graft": "muon", "interval": 1}),
        (Shampoo, {"graft": "none", "interval": 2, "exponent": 1 / 4}),
        (KLShampoo, {"graft": "muon", "interval": 1}),
        (KLShampoo, {"graft": "none", "interval": 1, "sequential": True}),
    ],
)
def test_rotating_gradients_rotates_the_steps(make, settings):
    U, V = (torch.linalg.qr(randn(n, n, seed=9)).Q for n in (6, 8))
    gradients = [randn(6, 8, seed=seed) for seed in range(6)]
    plain = directions(make, gradients, **settings)
    turned = directions(make, [U @ G @ V for G in gradients], **settings)
    for D, E in zip(plain, turned, strict=True):
        assert distance(U @ D @ V, E) < 1e-8


# ---------------------------------------------------------------------------------- KL-Shampoo


def _error_to_polar(D: Tensor, G: Tensor) -> float:
    P = polar(G)
    return distance(D * (P.norm() ** 2 / (D * P).sum()), P)


@pytest.mark.parametrize("beta", [0.25, 0.5, 0.75])
def test_one_gradient_repeated_becomes_its_polar_factor_at_the_rate_of_the_theory(beta):
    G = randn(6, 6)
    settings = BARE | {"beta2": beta, "bias_correction": False}
    errors = [_error_to_polar(D, G) for D in directions(KLShampoo, [G] * 24, **settings)]
    assert errors[-1] < 1e-4
    if beta != 0.5:  # where it is quadratic
        ratios = [b / a for a, b in itertools.pairwise(errors[12:19])]
        assert ratios == pytest.approx([abs(2 * beta - 1)] * 6, rel=0.1)
    else:
        assert errors[9] < 1e-9


def test_without_memory_both_factors_of_the_step_before_go_in_circles():
    G = torch.diag(torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64))
    found = directions(KLShampoo, [G] * 10, **BARE, bias_correction=False)
    assert distance(found[-1], found[-3]) < 1e-9
    assert distance(found[-1], found[-2]) > 0.1


@shapes
def test_one_sweep_with_the_new_factor_is_exact(shape):
    G = randn(*shape)
    assert _error_to_polar(direction(KLShampoo, G, sequential=True, **BARE), G) < 1e-12


def test_gradients_are_semi_orthogonal_on_average_for_kl_shampoo_alone():
    """Both-sided for its fixed point; one-sided for L^-1/2; neither for Shampoo."""
    A, B = torch.diag(randn(4, seed=98)), torch.diag(randn(6, seed=99))
    bag = torch.stack([A @ randn(4, 6, seed=seed) @ B for seed in range(40)])

    def excess(factors: dict[str, Tensor]) -> tuple[float, float]:
        U = factors.get("left", torch.eye(4).double()) @ bag
        U = U @ factors.get("right", torch.eye(6).double())
        sides = ((U @ U.mT).mean(0), (U.mT @ U).mean(0))
        return tuple(
            float((S * len(S) / S.trace() - torch.eye(len(S))).norm() / len(S) ** 0.5)
            for S in sides
        )

    def roots(make, **settings) -> dict[str, Tensor]:
        W = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        own = {"momentum": 0.0, "eps": 0.0, "graft": "none", "interval": 1}
        optimizer = make([W], 1.0, beta2=0.995, bias_correction=False, **own, **settings)
        for _ in range(40):  # the bag again and again: averages over it
            for G in bag:
                W.grad = G.clone()
                optimizer.step()
        state = optimizer.state[W]
        return {s: state[f"{s}_root.0"] for s in ("left", "right") if f"{s}_root.0" in state}

    left, right = excess(roots(KLShampoo))
    assert left < 0.03  # as far as averages of 200 gradients tell
    assert right < 0.03
    assert min(excess(roots(Shampoo, exponent=1 / 4))) > 0.1
    one_sided = excess(roots(Shampoo, exponent=1 / 2, sides="left"))
    assert one_sided[0] < 0.03 < 0.1 < one_sided[1]


# ---------------------------------------------------------------------------------------- SOAP


def _soap(gradients, beta1, beta2, eps, interval):
    """Algorithm 3 of Vyas et al., written out; V turns with the squares of the turn."""
    m, n = gradients[0].shape
    L, R = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    QL, QR = torch.eye(m).double(), torch.eye(n).double()
    M, V, out = torch.zeros(m, n).double(), torch.zeros(m, n).double(), []
    for t, G in enumerate(gradients, 1):
        M = beta1 * M + (1 - beta1) * G
        rotated = QL.mT @ G @ QR
        V = beta2 * V + (1 - beta2) * rotated**2
        step = (1 - beta2**t) ** 0.5 / (1 - beta1**t) * (QL.mT @ M @ QR) / (V.sqrt() + eps)
        out.append(QL @ step @ QR.mT)
        L, R = beta2 * L + (1 - beta2) * G @ G.mT, beta2 * R + (1 - beta2) * G.mT @ G
        for side, slot in (("left", 0), ("right", 1 % interval)):
            if (t - 1) % interval != slot:
                continue
            A, Q = (L, QL) if side == "left" else (R, QR)
            if t <= interval:
                new = torch.linalg.eigh(A).eigenvectors.flip(-1)
            else:
                order = (Q * (A @ Q)).sum(0).argsort(descending=True)
                new = torch.linalg.qr(A @ Q[:, order]).Q
            turn = (Q.mT @ new) ** 2
            V = turn.mT @ V if side == "left" else V @ turn
            QL, QR = (new, QR) if side == "left" else (QL, new)
    return out


@pytest.mark.parametrize("interval", [1, 5])
def test_soap_is_the_algorithm_of_its_paper(interval):
    # The first bases are of a factor of full rank, so nothing is arbitrary.
    gradients = [randn(5, 5, seed=seed) for seed in range(25)]
    settings = {"momentum": 0.9, "beta2": 0.95, "eps": 1e-8, "interval": interval}
    found = directions(SOAP, gradients, **settings)
    for D, expected in zip(found, _soap(gradients, 0.9, 0.95, 1e-8, interval), strict=True):
        assert distance(D, expected) < 1e-7


def test_soap_in_the_basis_of_the_weights_is_adam():
    gradients = [randn(5, 7, seed=seed) for seed in range(9)]
    found = directions(SOAP, gradients, momentum=0.9, beta2=0.95, eps=1e-12, max_side=4)
    W = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    adam = torch.optim.AdamW([W], 1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    for G, D in zip(gradients, found, strict=True):
        before, W.grad = W.detach().clone(), G.clone()
        adam.step()
        assert distance(D, before - W.detach()) < 1e-9


# ---------------------------------------------------------------------------------------- TEON


def teon(layers: list[Tensor], **settings) -> list[Tensor]:
    """The directions of the layers of one stack."""
    weights = [nn.Parameter(torch.zeros_like(G)) for G in layers]
    group = {"params": weights, "stacks": [[0]] * len(layers)}
    optimizer = TEON([group], 1.0, momentum=0.0, **EXACT, **settings)
    for W, G in zip(weights, layers, strict=True):
        W.grad = G.clone()
    optimizer.step()
    return [-W.detach() for W in weights]


@shapes
@pytest.mark.parametrize("K", [2, 3])
def test_a_stack_is_one_matrix(shape, K):
    m, n = shape
    layers = [randn(m, n, seed=seed) for seed in range(K)]
    found = teon(layers)
    whole = polar(torch.cat(layers, 1))
    for k, D in enumerate(found):
        assert distance(D, whole[:, k * n : (k + 1) * n]) < 1e-12
    total = sum(float(D.norm() ** 2) for D in found)
    assert total == pytest.approx(min(m, K * n))
    compensated = sum(float(D.norm() ** 2) for D in teon(layers, compensate=True))
    assert compensated == pytest.approx(K * min(m, n))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1)).tolist()
    for D, i in zip(teon([layers[i] for i in order]), order, strict=True):
        assert distance(D, found[i]) < 1e-12
    turned = [torch.linalg.qr(randn(n, n, seed=40 + k)).Q for k in range(K)]
    for D, P, before in zip(
        teon([G @ P for G, P in zip(layers, turned, strict=True)]), turned, found, strict=True
    ):
        assert distance(D, before @ P) < 1e-12
    for D, E in zip(teon([G.mT for G in layers], mode=2), found, strict=True):
        assert distance(D.mT, E) < 1e-12


def test_what_a_stack_does_to_equal_and_to_aligned_layers():
    G = randn(5, 5)
    for D in teon([G, G]):
        assert distance(D, polar(G) / 2**0.5) < 1e-12
    U = torch.linalg.qr(randn(5, 5, seed=3)).Q
    same = [U @ torch.diag(torch.arange(1.0, 6.0).double()) @ P for P in (U, U.mT)]
    for D, layer in zip(teon(same), same, strict=True):
        assert distance(D, polar(layer) / 2**0.5) < 1e-12
    v = randn(6, seed=4)
    aligned = [torch.outer(U[:, k], v) for k in (0, 1)]  # rank one, right vectors shared
    for D, layer in zip(teon(aligned), aligned, strict=True):
        assert distance(D, polar(layer)) < 1e-12


def test_stacks_of_one_are_muon_bit_for_bit():
    torch.manual_seed(0)
    model = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)}) for _ in range(3)
    )
    other = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)}) for _ in range(3)
    )
    other.load_state_dict(model.state_dict())
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    first, second = TEON(model, 0.02, stack=1), Muon(other, 0.02)
    for seed in range(10):
        for i, (p, q) in enumerate(pairs):
            p.grad = randn(*p.shape, seed=100 * seed + i).float()
            q.grad = p.grad.clone()
        first.step()
        second.step()
    assert all(torch.equal(p, q) for p, q in pairs)


def test_stacks_are_found_and_said():
    class Attention(nn.Module):
        def __init__(self, wide: int):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, wide)
            self.v_proj, self.o_proj = nn.Linear(8, wide), nn.Linear(8, 8)

    model = nn.Sequential(*(Attention(4) for _ in range(5)), nn.Linear(8, 3))
    optimizer = TEON(model)
    kinds = ("q_proj", "k_proj", "v_proj")
    expected = {
        tuple(f"{layer}.{kind}.weight" for layer in pair)
        for kind in kinds
        for pair in ((0, 1), (2, 3))
    }
    assert set(optimizer.stacks) == expected
    assert "stacks of 2" in str(optimizer)
    layers = [nn.ModuleDict({"qkv": nn.Linear(8, 24)}) for _ in range(2)]
    fused = nn.Sequential(*layers, nn.Linear(8, 3))
    assert TEON(fused).stacks == [(f"0.qkv.weight[{i}]", f"1.qkv.weight[{i}]") for i in range(3)]
    with pytest.warns(UserWarning, match="found nothing to stack"):
        TEON(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))


def test_a_frozen_layer_leaves_its_neighbour_to_muon():
    layers = [nn.ModuleDict({"q_proj": nn.Linear(5, 5)}) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(5, 2))
    optimizer = TEON(model.double(), 1.0, momentum=0.0, **EXACT)
    model[1].requires_grad_(False)
    before, G = model[0]["q_proj"].weight.detach().clone(), randn(5, 5)
    model[0]["q_proj"].weight.grad = G.clone()
    optimizer.step()
    assert distance(before - model[0]["q_proj"].weight.detach(), polar(G)) < 1e-12


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("K", [2, 4])
def test_the_norms_of_teons_theory(mode, K):
    layered, stacked = LayerwiseSpectral(Spectral("svd")), StackedSpectral(mode, Spectral("svd"))
    for seed in range(5):
        X = randn(K, 4, 6, seed=seed)
        low, high = float(layered.norm(X)), float(stacked.norm(X))
        assert low <= high * (1 + 1e-12) <= K**0.5 * low * (1 + 1e-9)
        low, high = float(layered.dual_norm(X)), float(stacked.dual_norm(X))
        assert low / K**0.5 <= high * (1 + 1e-12)
        assert high <= low * (1 + 1e-12)
        for geometry in (layered, stacked):
            D = geometry.direction(X)
            assert float((X * D).sum()) == pytest.approx(float(geometry.dual_norm(X)))
            assert float(geometry.norm(D)) == pytest.approx(1.0)


# ------------------------------------------------------------------------------ shared settings


def test_the_step_of_the_theory_falls_as_far_as_its_bound():
    """Davis and Drusvyatskiy, p. 6: by ‖G‖_*² / (2 L) on least squares, L = ‖A‖_F² / n."""
    A, Y = randn(6, 40, seed=1), randn(5, 40, seed=2)
    W = nn.Parameter(randn(5, 6, seed=3))
    L = float(A.square().sum()) / 40

    def loss() -> Tensor:
        return (W @ A - Y).square().sum() / 80

    optimizer = SpectralDescent([W], 1 / L, length="dual", **EXACT)
    for _ in range(5):
        before = loss()
        optimizer.zero_grad()
        before.backward()
        start = before.item()
        bound = float(torch.linalg.svdvals(W.grad).sum()) ** 2 / (2 * L)
        optimizer.step()
        assert start - loss().item() >= bound * (1 - 1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_sum_of_gradients_has_the_polar_factor_of_their_average(nesterov):
    gradients = [randn(5, 6, seed=seed) for seed in range(8)]
    average = directions(Muon, gradients, nesterov=nesterov, **EXACT)
    total = directions(Muon, gradients, nesterov=nesterov, heavy_ball=True, **EXACT)
    for A, B in zip(average, total, strict=True):
        assert distance(A, B) < 1e-10


@pytest.mark.parametrize("make", [Muon, Shampoo, KLShampoo, SOAP, SpectralDescent])
def test_maximizing_is_minimizing_the_negative(make):
    gradients = [randn(5, 6, seed=seed) for seed in range(6)]
    up = directions(make, gradients, maximize=True)
    down = directions(make, [-G for G in gradients])
    for A, B in zip(up, down, strict=True):
        assert torch.equal(A, B)


@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious"])
def test_weight_decay(decay):
    W = nn.Parameter(randn(4, 4, seed=1))
    optimizer = SpectralDescent([W], 0.1, weight_decay=0.3, decay=decay, **EXACT)
    optimizer.param_groups[0]["lr"] = 0.05  # as a schedule does
    before, G = W.detach().clone(), randn(4, 4)
    W.grad = G.clone()
    optimizer.step()
    D = polar(G)
    factor = {
        "decoupled": torch.full_like(D, 0.05 * 0.3),
        "independent": torch.full_like(D, 0.5 * 0.3),
        "cautious": 0.05 * 0.3 * (D * before > 0).double(),
    }[decay]
    assert distance(W.detach(), before - factor * before - 0.05 * D) < 1e-12


def test_roles_have_settings_of_their_own():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 4), nn.Linear(4, 2))
    own = {"conv": {"lr": 0.5}, "head": {"weight_decay": 0.1, "lr": 0.01}}
    groups = Muon(model, 0.02, roles=own).param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["0.weight"] == 0.5
    assert rates["1.weight"] == 0.02
    assert rates["2.weight"] == 0.01
    assert rates["1.bias"] == pytest.approx(0.003)
    with pytest.raises(ValueError, match="the role 'embedding', which no parameter has"):
        Muon(model, roles={"embedding": {"lr": 1.0}})
    with pytest.raises(ValueError, match="settings for the roles"):
        Muon(model, roles={"convolution": {"lr": 1.0}})
    with pytest.raises(ValueError, match="without a model"):
        Muon([nn.Parameter(torch.zeros(2, 2))], roles={"conv": {"lr": 1.0}})


def test_stochastic_rounding_moves_weights_that_nearest_rounding_leaves():
    settings = {"lr": 1e-4, "scale": "none"}  # 1 is followed by 1.0078 in bfloat16
    ends = {}
    for rounding in ("nearest", "stochastic"):
        W = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = SpectralDescent([W], rounding=rounding, **settings)
        G = torch.ones(64, 64)
        for _ in range(20):
            W.grad = G.bfloat16()
            optimizer.step()
        ends[rounding] = W.detach().float()
    assert torch.equal(ends["nearest"], torch.ones(64, 64))
    step = 1e-4 * float(Spectral("tuned").direction(torch.ones(64, 64)).mean())
    assert float(1 - ends["stochastic"].mean()) == pytest.approx(20 * step, rel=0.25)


def test_bfloat16_weights_with_float32_memory_follow_float32_weights():
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        W = nn.Parameter(randn(8, 8, seed=5).to(dtype))
        optimizer = Muon([W], 0.01, state_dtype=torch.float32, rounding="stochastic")
        for seed in range(20):
            W.grad = randn(8, 8, seed=seed).to(dtype)
            optimizer.step()
        state = optimizer.state_dict()
        assert state["state"][0]["momentum_buffer"].dtype == torch.float32
        optimizer.load_state_dict(state)
        assert optimizer.state[W]["momentum_buffer"].dtype == torch.float32
        runs[dtype] = W.detach().float()
    assert distance(runs[torch.bfloat16], runs[torch.float32]) < 0.05
