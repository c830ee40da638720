"""Thresholds by running optimizers on quadratics; measures against dense float64 references."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import steepest
from steepest.curvature.operators import Hessian
from steepest.curvature.preconditioned import Stability, preconditioned_sharpness
from steepest.curvature.preconditioners import inverse_threshold
from steepest.model.matrix_view import MatrixView

Build = Callable[[list[Tensor], float], Optimizer]
TINY = 1e-100  # what gradients are probed with: their squares leave second moments as they are


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _positive(n: int, seed: int = 0) -> Tensor:
    A = _random(n, n, seed=seed)
    return A @ A.T / n + 0.3 * torch.eye(n, dtype=torch.float64)


class Quadratic(nn.Module):
    """½ θᵀ H θ + gᵀ θ of all entries θ."""

    def __init__(self, H: Tensor, *shapes: tuple[int, ...]):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(s, dtype=torch.float64) for s in shapes)
        self.register_buffer("H", H)
        self.register_buffer("g", torch.zeros(len(H), dtype=torch.float64))

    def forward(self) -> Tensor:
        theta = torch.cat([W.flatten() for W in self.weights])
        return 0.5 * theta @ self.get_buffer("H") @ theta + self.get_buffer("g") @ theta

    @property
    def params(self) -> list[Tensor]:
        return list(self.weights)

    def at(self, theta: Tensor) -> Quadratic:
        torch.nn.utils.vector_to_parameters(theta.clone(), self.params)
        return self

    def theta(self) -> Tensor:
        return torch.nn.utils.parameters_to_vector(self.params).detach()


def _model(seed: int = 0) -> Quadratic:
    return Quadratic(_positive(18, seed), (3, 4), (2, 3))


def _loss(model: Any, batch: Any) -> Tensor:
    return model()


def _row(model: nn.Module, optimizer: Optimizer, **how: Any) -> Stability:
    how = {"tolerance": 1e-10, **how}
    [row] = preconditioned_sharpness(model, _loss, None, optimizer, **how)
    return row


def _backward(model: Quadratic, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()


def _warm_up(optimizer: Optimizer, steps: int = 40, seed: int = 0) -> None:
    """Take steps on random gradients, of which preconditioners are made."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(steps):
        for j, p in enumerate(params):
            scale = torch.linspace(0.3, 2, p.numel(), dtype=p.dtype).view(p.shape)
            p.grad = _random(*p.shape, seed=1000 * seed + 100 * i + j).to(p) * scale
        optimizer.step()


class Frozen:
    """An optimizer whose preconditioner stays as it is: its own steps, on a state put back."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self._state = copy.deepcopy([optimizer.state.get(p, {}) for p in self.params])

    def forget(self) -> None:
        """Set the momentum to zero."""
        for p in self.params:
            for key in ("momentum_buffer", "exp_avg"):
                if self.optimizer.state.get(p, {}).get(key) is not None:
                    self.optimizer.state[p][key].zero_()

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            beta2 = group["betas"][1] if "betas" in group else group.get("beta2", 0.0)
            beta2 = group["graft_beta2"] if group.get("graft") == "adam" else beta2
            if "interval" in group:  # no root is renewed in such a step
                group.update(interval=30, step_count=59)
            for p in group["params"]:
                kept = next(s for q, s in zip(self.params, self._state, strict=True) if q is p)
                for key, value in kept.items():
                    new = value.clone() if isinstance(value, Tensor) else value
                    if key in ("momentum_buffer", "exp_avg"):
                        continue
                    if key == "exp_avg_sq":
                        new = new / beta2
                    if key == "step" or key.startswith("steps."):
                        new = new - 1
                    if "renewed" in key and new >= 0:
                        new = torch.tensor(59)
                    self.optimizer.state[p][key] = new
        self.optimizer.step()


def _step_for(frozen: Frozen, gradient: Tensor, forget: bool = True) -> Tensor:
    """The step on a tiny gradient, over its size, per unit of weight that it has in momentum."""
    if forget:
        frozen.forget()
    pieces = gradient.split([p.numel() for p in frozen.params])
    for p, G in zip(frozen.params, pieces, strict=True):
        p.data.zero_()
        p.grad = TINY * G.view(p.shape)
    frozen.step()
    return torch.cat([p.detach().flatten() for p in frozen.params])


def _inverse(optimizer: Optimizer) -> Tensor:
    """lr P⁻¹ of one group, dense, column by column by steps of a copy, times the weight w."""
    frozen = Frozen(copy.deepcopy(optimizer))
    n = sum(p.numel() for p in frozen.params)
    columns = [-_step_for(frozen, e) / TINY for e in torch.eye(n, dtype=torch.float64)]
    return torch.stack(columns, dim=1)


# Thresholds: what the optimizer itself does just below and just above


def _groups(params: list[Tensor], lr: float, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr, **own} for p, own in zip(params, settings, strict=True)]


OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p, lr: SGD(p, lr),
    "heavy ball": lambda p, lr: SGD(p, lr, momentum=0.9),
    "dampening": lambda p, lr: SGD(p, lr, momentum=0.9, dampening=0.9),
    "some dampening": lambda p, lr: SGD(p, lr, momentum=0.5, dampening=0.2),
    "dampening alone": lambda p, lr: SGD(p, lr, dampening=0.5),
    "nesterov": lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True),
    "coupled decay": lambda p, lr: SGD(p, lr, momentum=0.9, weight_decay=0.7),
    "ascent": lambda p, lr: SGD(p, lr, momentum=0.9, weight_decay=0.7, maximize=True),
    "tensor rate": lambda p, lr: SGD(p, torch.tensor(lr, dtype=torch.float64)),
    "sgd groups": lambda p, lr: SGD(
        _groups(
            p,
            lr,
            {"lr": 3 * lr, "momentum": 0.9, "weight_decay": 1.0},
            {"momentum": 0.5, "nesterov": True},
        ),
        lr,
    ),
    "a group at rest": lambda p, lr: SGD(_groups(p, lr, {"lr": 0.0}, {"momentum": 0.5}), lr),
    "adam": lambda p, lr: Adam(p, lr),
    "adam without momentum": lambda p, lr: Adam(p, lr, betas=(0.0, 0.99)),
    "adam with coupled decay": lambda p, lr: Adam(p, lr, weight_decay=0.7),
    "amsgrad": lambda p, lr: Adam(p, lr, betas=(0.8, 0.5), amsgrad=True),
    "adamw": lambda p, lr: AdamW(p, lr, weight_decay=0.4 / lr),
    "adam groups": lambda p, lr: AdamW(
        _groups(p, lr, {"betas": (0.5, 0.9), "weight_decay": 0.3 / lr}, {"betas": (0.95, 0.9)}), lr
    ),
    "fallback": lambda p, lr: steepest.SOAP(
        [
            {
                "params": p,
                "geometry": "adamw",
                "lr": lr,
                "betas": (0.9, 0.9),
                "weight_decay": 0.4 / lr,
                "fused": False,
            }
        ],
        lr,
    ),
    "shampoo": lambda p, lr: steepest.Shampoo(p, lr, length="own"),
    "shampoo, heavy ball": lambda p, lr: steepest.Shampoo(
        p, lr, length="own", heavy_ball=True, exponent=0.25, scale="spectral"
    ),
    "shampoo, blocks": lambda p, lr: steepest.Shampoo(
        p, lr, length="own", block=2, sides="left", weight_decay=0.4 / lr
    ),
    "kl-shampoo": lambda p, lr: steepest.KLShampoo(
        p, lr, length="own", weight_decay=0.4, decay="independent"
    ),
    "soap": lambda p, lr: steepest.SOAP(p, lr, momentum=0.9, weight_decay=0.4 / lr),
    "soap, one side": lambda p, lr: steepest.SOAP(
        p, lr, max_side=3, eps=0.3, scale="match-rms-adamw", heavy_ball=True
    ),
    "soap and fallback": lambda p, lr: steepest.SOAP(
        [{"params": p[:1]}, {"params": p[1:], "geometry": "adamw", "lr": 3 * lr}], lr
    ),
}


def _built(name: str, lr: float = 0.1) -> tuple[Quadratic, Optimizer]:
    """A quadratic, and an optimizer with the state that some steps leave."""
    model = _model()
    if name == "ascent":
        model.H.neg_()
    optimizer = OPTIMIZERS[name](model.params, lr)
    _warm_up(optimizer)
    return model, optimizer


def _rescale(optimizer: Optimizer, factor: float) -> None:
    """Multiply all rates; what decoupled decay takes off in a step stays the same."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "geometry" in group or group.get("decoupled_weight_decay"):
            group["weight_decay"] /= factor


def _growth(model: Quadratic, optimizer: Optimizer, steps: int = 200) -> float:
    """What the second half of some steps from near the minimum multiplies the distance by."""
    frozen = Frozen(copy.deepcopy(optimizer))
    frozen.forget()
    theta = 1e-60 * _random(18, seed=5)  # so near that its gradients leave second moments alone
    torch.nn.utils.vector_to_parameters(theta, frozen.params)
    distance = []
    for _ in range(steps):
        theta = torch.nn.utils.parameters_to_vector(frozen.params).detach()
        distance.append(float(theta.norm()))
        for p, G in zip(frozen.params, (model.H @ theta).split([12, 6]), strict=True):
            p.grad = G.view(p.shape)
        frozen.step()
    return max(distance[-10:]) / max(distance[steps // 2 :][:10])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_grow_just_above_the_threshold(name: str) -> None:
    model, optimizer = _built(name)
    for ratio, grows in ((0.98, False), (1.02, True)):
        _rescale(optimizer, ratio / _row(model, optimizer).ratio)
        assert _row(model, optimizer).ratio == pytest.approx(ratio, rel=1e-8)
        growth = _growth(model, optimizer)
        assert growth > 2 if grows else growth < 1, growth


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_thresholds_are_where_an_eigenvalue_is_minus_one(
    beta: float, nesterov: bool, shrink: float
) -> None:
    """The iteration of (W, M), written out, has spectral radius 1 at the threshold."""
    group = {"lr": 0.3, "momentum": beta, "nesterov": nesterov, "weight_decay": shrink / 0.3}
    group |= {"geometry": "spectral", "decay": "decoupled"}
    weight, slope = 1 - beta, 1 / inverse_threshold(group)
    memory = torch.tensor([weight * slope, beta], dtype=torch.float64)
    gradient = torch.tensor([slope, 0.0], dtype=torch.float64)
    update = weight * gradient + beta * memory if nesterov else memory
    weights = torch.tensor([1 - shrink, 0.0], dtype=torch.float64) - 0.3 * update
    z = torch.linalg.eigvals(torch.stack([weights, memory]))
    assert float((z + 1).abs().min()) < 1e-9
    assert float(z.abs().max()) < 1 + 1e-9


def test_thresholds_of_the_papers() -> None:
    """38 / lr for β = 0.9 is the number of Cohen et al. (2022); the others are of 2021, eq. 1."""
    model = _model()
    for optimizer, threshold in (
        (SGD(model.params, 0.1), 2 / 0.1),
        (SGD(model.params, 0.1, momentum=0.9), 2 * 1.9 / 0.1),
        (SGD(model.params, 0.1, momentum=0.9, nesterov=True), 2 * 1.9 / (0.1 * 2.8)),
        (Adam(model.params, 0.1), 38 / 0.1),
    ):
        _warm_up(optimizer, 1)
        assert _row(model, optimizer).threshold == pytest.approx(threshold)


def test_cautious_decay_is_left_out() -> None:
    model = _model().at(_random(18))
    optimizer = _dual(model.params, 0.1, weight_decay=5.0, decay="cautious")
    assert _row(model, optimizer).threshold == pytest.approx(2 / 0.1)


def test_mixed_groups_have_one_threshold() -> None:
    """Of any mixture of momenta, rates and decays; eigenvalues leave the unit circle at -1."""
    for seed in range(8):
        model = Quadratic(_positive(18, seed), (3, 4), (2, 3))
        draw = _random(8, seed=seed).sigmoid().tolist()
        groups = _groups(
            model.params,
            0.1,
            {"lr": draw[0], "momentum": draw[1], "dampening": draw[2], "weight_decay": draw[3]},
            {"lr": draw[4], "momentum": draw[5], "nesterov": True, "weight_decay": draw[6]},
        )
        optimizer = SGD(groups, 0.1)
        _warm_up(optimizer, 1)
        _rescale(optimizer, 1 / _row(model, optimizer).ratio)
        radii = [_radius(model, optimizer, factor) for factor in (0.99, 1.0, 1.01)]
        assert radii[0] < 1 - 1e-4
        assert radii[1] == pytest.approx(1, abs=1e-8)
        assert radii[2] > 1 + 1e-4


def _radius(model: Quadratic, optimizer: Optimizer, factor: float) -> float:
    """Spectral radius of the iteration of weights and momenta, from steps on unit vectors."""
    optimizer = copy.deepcopy(optimizer)
    _rescale(optimizer, factor)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    images = []
    for e in torch.eye(36, dtype=torch.float64):
        torch.nn.utils.vector_to_parameters(e[:18].clone(), params)
        G = (model.H @ e[:18]).split([12, 6])
        for p, gradient, m in zip(params, G, e[18:].split([12, 6]), strict=True):
            p.grad = gradient.view(p.shape)
            optimizer.state[p]["momentum_buffer"] = m.clone().view(p.shape)
        optimizer.step()
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
        images.append(torch.cat([t.detach().flatten() for t in (*params, *momenta)]))
    return float(torch.linalg.eigvals(torch.stack(images, dim=1)).abs().max())


# The preconditioned Hessian


def _only_group(name: str) -> bool:
    return "groups" not in name and name != "soap and fallback" and name != "a group at rest"


@pytest.mark.parametrize("name", list(filter(_only_group, OPTIMIZERS)))
def test_value_is_the_largest_eigenvalue(name: str) -> None:
    model, optimizer = _built(name)
    [group] = optimizer.param_groups
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    weight = 1 - group["dampening"] if "dampening" in group and beta else 1 - beta
    weight *= 1 + beta if group.get("nesterov") else 1
    if "dampening" in group and not beta:
        weight = 1.0
    # Columns of lr P⁻¹, by steps on tiny gradients; decay is off as weights are zero there.
    P_inverse = _inverse(optimizer) / (weight * float(group["lr"]))
    H = model.H.clone()
    if name == "ascent":
        H, P_inverse = -H, -P_inverse
    if "geometry" not in group and not group.get("decoupled_weight_decay"):
        H += group["weight_decay"] * torch.eye(18, dtype=torch.float64)
    assert torch.allclose(P_inverse, P_inverse.T, rtol=0, atol=1e-9 * float(P_inverse.abs().max()))
    expected = float(torch.linalg.eigvals(P_inverse @ H).real.max())
    row = _row(model, optimizer)
    assert row.measure == "preconditioned Hessian"
    assert row.parameters == ("weights.0", "weights.1")
    assert row.value == pytest.approx(expected, rel=1e-8)
    assert row.error <= 1e-8 * row.value
    assert 0 < row.products <= 20


GRAFTED: dict[str, Build] = {
    "shampoo from adam": lambda p, lr: steepest.Shampoo(p, lr, length="adam"),
    "shampoo from adam, blocks": lambda p, lr: steepest.Shampoo(p, lr, length="adam", block=2),
    "shampoo from muon": lambda p, lr: steepest.Shampoo(p, lr, length="muon", scale="spectral"),
    "heavy ball from muon": lambda p, lr: steepest.Shampoo(p, lr, length="muon", heavy_ball=True),
    "heavy ball from adam": lambda p, lr: steepest.Shampoo(p, lr, length="adam", heavy_ball=True),
    "soap, norm 1": lambda p, lr: steepest.SOAP(p, lr, length="spectral", scale="spectral"),
    "soap, norm 1, heavy ball": lambda p, lr: steepest.SOAP(
        p, lr, length="spectral", heavy_ball=True
    ),
    "kl-shampoo from adam": lambda p, lr: steepest.KLShampoo(p, lr, length="adam"),
    "kl-shampoo from muon, blocks": lambda p, lr: steepest.KLShampoo(p, lr, length="muon", block=2),
}


@pytest.mark.parametrize("name", GRAFTED)
def test_grafting_is_the_factor_of_the_present_momentum(name: str) -> None:
    """P⁻¹ is that without grafting, times what makes the optimizer's own step as long as it is."""
    model = _model()
    optimizer = GRAFTED[name](model.params, 0.1)
    _warm_up(optimizer, 32)
    [group] = optimizer.param_groups
    twin = copy.deepcopy(optimizer)
    momenta = [state["momentum_buffer"] for state in twin.state.values()]
    M = torch.cat([_in_weights(group, state).flatten() for state in twin.state.values()])
    for m in momenta:
        m /= group["momentum"]  # which the step takes off again
    own = _step_for(Frozen(twin), torch.ones(18, dtype=torch.float64), forget=False)
    M = (1 - group["momentum"]) * M if group["heavy_ball"] else M
    plain = copy.deepcopy(optimizer)
    plain.param_groups[0].update(length="own")
    Q = _inverse(plain) / (1 - group["momentum"])
    expected = torch.zeros(18, 18, dtype=torch.float64)
    for block in _blocks(group):
        part = Q[block][:, block]
        factor = float(own[block].norm() / (part @ M[block]).norm())
        assert torch.allclose(-factor * part @ M[block], own[block], rtol=1e-8)
        expected[block.unsqueeze(1), block] = factor * part
    value = float(torch.linalg.eigvals(expected @ model.H).real.max()) / 0.1
    assert _row(model, optimizer).value == pytest.approx(value, rel=1e-7)


def _in_weights(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """The momentum, which SOAP keeps in its basis."""
    M: Tensor = state["momentum_buffer"]
    soap = group["geometry"] == "soap"
    return state["left_root.0"] @ M @ state["right_root.0"].mT if soap else M.clone()


def _blocks(group: dict[str, Any]) -> list[Tensor]:
    """Positions in the vector of all parameters of each block."""
    numbers = torch.arange(18).split([12, 6])
    views = [MatrixView(*view) for view in group["views"]]
    shapes = [p.shape for p in group["params"]]
    return [
        part.flatten()
        for n, view, shape in zip(numbers, views, shapes, strict=True)
        for part in view.matrices(n.view(shape), group["block"])
    ]


def test_grafting_without_momentum_takes_the_gradient() -> None:
    model = _model().at(_random(18, seed=3))
    optimizer = steepest.Shampoo(model.params, 0.1, momentum=0.0, length="muon", block=None)
    _warm_up(optimizer, 32)
    plain = copy.deepcopy(optimizer)
    plain.param_groups[0]["length"] = "own"
    Q, G = _inverse(plain), model.H @ model.theta()
    for block in _blocks(optimizer.param_groups[0]):  # (3, 4) and (2, 3)
        length = math.sqrt(3 if len(block) == 12 else 2)
        Q[block] *= length / (Q[block][:, block] @ G[block]).norm()
    expected = float(torch.linalg.eigvals(Q @ model.H).real.max())
    assert _row(model, optimizer).value == pytest.approx(expected, rel=1e-7)


def test_normalization_without_momentum_takes_the_gradient() -> None:
    model = _model().at(_random(18, seed=3))
    optimizer = steepest.SOAP(model.params, 0.1, momentum=0.0, length="spectral")
    _warm_up(optimizer, 32)
    plain = copy.deepcopy(optimizer)
    plain.param_groups[0]["length"] = "own"
    Q, G = _inverse(plain), model.H @ model.theta()
    for rows, shape in ((slice(12), (3, 4)), (slice(12, 18), (2, 3))):
        Q[rows] /= torch.linalg.matrix_norm((Q[rows, rows] @ G[rows]).view(shape), 2)
    expected = float(torch.linalg.eigvals(Q @ model.H).real.max())
    assert _row(model, optimizer).value == pytest.approx(expected, rel=1e-7)


def test_before_its_roots_shampoo_is_adam() -> None:
    model = _model()
    shampoo = steepest.Shampoo(model.params, 0.1, interval=1000, graft_beta2=0.99)
    adam = Adam(copy.deepcopy(model.params), 0.1, betas=(0.9, 0.99))
    for group in shampoo.param_groups:
        group["step_count"] = 500  # past the first renewals
    _warm_up(shampoo, 3)
    _warm_up(adam, 3)
    other = Quadratic(model.H, (3, 4), (2, 3))
    other.weights = nn.ParameterList(adam.param_groups[0]["params"])
    found, expected = _row(model, shampoo), _row(other, adam)
    assert found.value == pytest.approx(expected.value, rel=1e-8)


def test_before_its_roots_shampoo_with_muons_length_is_muon() -> None:
    model = _model()
    optimizer = steepest.Shampoo(model.params, 0.1, interval=1000, length="muon")
    optimizer.param_groups[0]["step_count"] = 500
    _warm_up(optimizer, 3)
    assert _row(model, optimizer).measure == "one step"


def test_what_had_no_gradient_is_held_fixed() -> None:
    for build in (
        lambda params: Adam(params, 0.1),
        lambda params: steepest.SOAP(params, 0.1),
        lambda params: steepest.SOAP([{"params": params, "geometry": "adamw"}], 0.1),
        lambda params: steepest.Shampoo(params, 0.1, length="muon", interval=1),
    ):
        model = _model()
        optimizer = build(model.params)
        for p in model.params:
            p.grad = torch.zeros_like(p)
        if not isinstance(optimizer, Adam):
            optimizer.step()  # leaves a state that has counted no step
        model.weights[0].grad = _random(3, 4)
        model.weights[1].grad = None
        optimizer.step()
        found = _row(model, optimizer).value
        alone = Quadratic(model.H[:12, :12], (3, 4))
        alone.weights[0] = model.weights[0]
        only = copy.copy(optimizer.param_groups[0])
        keep = {"params": only["params"][:1]}
        keep |= {"views": only["views"][:1]} if "views" in only else {}
        optimizer.param_groups[0].update(keep)
        assert found == pytest.approx(_row(alone, optimizer).value, rel=1e-8)


def test_blocks_of_a_convolution_and_of_experts() -> None:
    """Matrices inside a parameter are as parameters of their own."""
    H = _positive(48)
    together = Quadratic(H, (2, 4, 6))
    view = MatrixView.of((2, 4, 6), batch=2, splits=(1, 3))
    apart = Quadratic(H, (1, 6), (3, 6), (1, 6), (3, 6))
    for build in (
        lambda groups: steepest.SOAP(groups, 0.1),
        lambda groups: steepest.KLShampoo(groups, 0.1, interval=1),
    ):
        one = build([{"params": together.params, "views": [view]}])
        many = build([{"params": apart.params}])
        for i in range(5):
            G = _random(48, seed=i)
            together.weights[0].grad = G.view(2, 4, 6)
            for p, piece in zip(apart.params, G.split([6, 18, 6, 18]), strict=True):
                p.grad = piece.view(p.shape)
            one.step()
            many.step()
        found, expected = _row(together, one), _row(apart, many)
        assert found.value == pytest.approx(expected.value, rel=1e-8)


# A norm ball


def _ball_row(model: Quadratic, optimizer: Optimizer, **how: Any) -> Stability:
    row = _row(model, optimizer, **{"tolerance": 1e-8, **how})
    assert row.measure == "norm ball"
    assert math.isnan(row.error)
    return row


def _best(model: Quadratic, optimizer: Optimizer) -> Stability:
    rows = [
        _ball_row(model, optimizer, generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    return max(rows, key=lambda row: row.value)


def _dual(params: Any, lr: float = 0.1, **settings: Any) -> steepest.SpectralDescent:
    return steepest.SpectralDescent(params, lr=lr, length="dual", method="svd", **settings)


DUAL: dict[str, Build] = {
    "scaled": _dual,
    "plain": lambda p, lr: _dual(p, lr, scale="none"),
    "decay": lambda p, lr: _dual(p, lr, weight_decay=0.3 / lr),
    "independent decay": lambda p, lr: _dual(p, lr, weight_decay=0.3, decay="independent"),
    "groups": lambda p, lr: _dual(_groups(p, lr, {}, {"lr": 4 * lr}), lr),
    "sign": lambda p, lr: _dual([{"params": p, "geometry": "sign"}], lr),
}


@pytest.mark.parametrize("name", DUAL)
def test_steps_along_the_worst_direction_grow_above_the_threshold(name: str) -> None:
    model = _model().at(_random(18))
    row = _best(model, DUAL[name](model.params, 0.1))
    for ratio, grows in ((0.98, False), (1.02, True)):
        optimizer = DUAL[name](model.params, ratio * 0.1 / row.ratio)
        again = _ball_row(model, optimizer, start=[row])
        assert again.ratio == pytest.approx(ratio, rel=1e-4)
        model.at(again.vector)
        begin = float(model().detach())
        for _ in range(20):
            _backward(model, optimizer)
            optimizer.step()
        assert (float(model().detach()) > begin) == grows


def test_below_the_threshold_of_a_norm_every_step_lowers_the_loss() -> None:
    model = _model().at(_random(18))
    optimizer = _dual(model.params)
    _rescale(optimizer, 0.95 / _best(model, optimizer).ratio)
    for seed in range(20):
        model.at(_random(18, seed=seed))
        for _ in range(5):
            _backward(model, optimizer)
            before = model()
            optimizer.step()
            assert model() < before


def test_ascent_in_a_norm() -> None:
    model = _model().at(_random(18))
    expected = _ball_row(model, _dual(model.params))
    model.H.neg_()
    found = _ball_row(model, _dual(model.params, maximize=True))
    assert (found.value, found.threshold) == (expected.value, expected.threshold)
    assert _ball_row(model, _dual(model.params)).value == 0.0


def test_experts_and_convolutions_in_a_norm() -> None:
    H = _positive(24)
    experts, apart = Quadratic(H, (2, 3, 4)), Quadratic(H, (3, 4), (3, 4))
    kernel, matrix = Quadratic(H, (3, 2, 2, 2)), Quadratic(H, (3, 8))
    view = MatrixView.of((2, 3, 4), batch=2)
    start = _random(24)
    for one, optimizer, other in (
        (experts, _dual([{"params": experts.params, "views": [view]}]), apart),
        (kernel, _dual(kernel.params), matrix),
    ):
        found = _ball_row(one.at(start), optimizer)
        expected = _ball_row(other.at(start), _dual(other.params))
        assert found.value == pytest.approx(expected.value, rel=1e-6)


# One step


STEPS: dict[str, Build] = {
    "muon": lambda p, lr: steepest.Muon(p, lr),
    "muon without momentum": lambda p, lr: steepest.Muon(p, lr, momentum=0.0, weight_decay=0.5),
    "teon": lambda p, lr: steepest.TEON([{"params": p, "stacks": [[0], [0]]}], lr),
    "signum": lambda p, lr: steepest.Signum(p, lr, weight_decay=0.5),
    "signsgd": lambda p, lr: steepest.SignSGD(p, lr),
    "spectral descent": lambda p, lr: steepest.SpectralDescent(p, lr),
    "dual with momentum": lambda p, lr: _dual([{"params": p, "momentum": 0.5}], lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, weight_decay=0.5),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr),
    "torch's muon": lambda p, lr: torch.optim.Muon(p, lr),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr),
}


def _stepped(model: Quadratic, optimizer: Optimizer) -> tuple[Quadratic, Tensor]:
    """A copy after a step without decay, and the step."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = model.theta().clone()
    _backward(model, optimizer)
    optimizer.step()
    return model, model.theta() - before


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("lr", [1e-3, 3.0])
def test_one_step_is_the_price_of_the_step_over_its_gain(name: str, lr: float) -> None:
    equal = Quadratic(_positive(24), (3, 4), (3, 4))
    model = equal.at(_random(24)) if name == "teon" else _model().at(_random(18))
    model.g.copy_(_random(len(model.g), seed=9))
    optimizer = STEPS[name](model.params, lr)
    for i in range(2):  # before the first step, and with memory
        row = _row(model, optimizer)
        assert (row.measure, row.threshold, row.error, row.products) == ("one step", 1.0, 0.0, 1)
        after, step = _stepped(model, optimizer)
        change = float(after().detach() - model().detach())
        gain = -float((model.H @ model.theta() + model.g) @ step)
        price = 0.5 * float(step @ model.H @ step)
        assert change == pytest.approx(price - gain, abs=1e-9 * (price + abs(gain)))
        expected = price / gain if gain > 0 else math.inf
        assert row.value == pytest.approx(expected, rel=1e-7)
        assert (row.ratio < 1) == (change < 0)
        if i == 0:
            _backward(model, optimizer)
            optimizer.step()


def test_muon_without_momentum_is_the_condition_of_shen() -> None:
    """lr J / (2 ‖G‖_*), J the curvature along the polar factor."""
    model = Quadratic(_positive(12), (3, 4)).at(_random(12))
    G = (model.H @ model.theta()).view(3, 4)
    D = steepest.linalg.polar(G, "svd").flatten()
    expected = 0.2 * float(D @ model.H @ D) / (2 * float(torch.linalg.matrix_norm(G, "nuc")))
    optimizer = steepest.Muon(model.params, 0.2, momentum=0.0, scale="none", method="svd")
    assert _row(model, optimizer).ratio == pytest.approx(expected, rel=1e-8)


def test_a_step_uphill_has_no_gain() -> None:
    model = _model().at(_random(18))
    optimizer = steepest.Muon(model.params, 0.1, momentum=0.99, nesterov=False)
    for p, G in zip(model.params, (model.H @ model.theta()).split([12, 6]), strict=True):
        p.grad = -100 * G.view(p.shape)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert _row(model, optimizer).value == 0.0  # a rate of zero has no price
    optimizer.param_groups[0]["lr"] = 0.1
    assert _row(model, optimizer).ratio == math.inf


def test_one_step_of_ascent() -> None:
    model = _model().at(_random(18))
    expected = _row(model, steepest.Signum(model.params, 0.1))
    model.H.neg_()
    found = _row(model, steepest.Signum(model.params, 0.1, maximize=True))
    assert found.value == pytest.approx(expected.value)
    assert found.value < 1


def test_an_optimizer_with_attributes_of_its_own() -> None:
    class Scaled(Optimizer):
        def __init__(self, params: Any, scale: list[float]):
            super().__init__(params, {})
            self.scale = scale  # torch leaves it out of copies

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p -= self.scale[0] * p.grad + 0 * torch.rand(())
            self.scale[0] *= 2

    model = _model().at(_random(18))
    optimizer = Scaled(model.params, [0.1])
    scheduler = torch.optim.lr_scheduler.ConstantLR(SGD(model.params, 0.1))
    generator = torch.get_rng_state()
    row = _row(model, optimizer)
    assert torch.equal(torch.get_rng_state(), generator)
    G = model.H @ model.theta()
    assert row.value == pytest.approx(0.05 * float(G @ model.H @ G) / float(G @ G))
    assert optimizer.scale == [0.1]
    assert scheduler.optimizer is not optimizer


def test_gradients_at_hand_are_not_used() -> None:
    model = _network()
    optimizer = _trained("muon", model)
    [before, _] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    [after, _] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    assert after.value == before.value


def test_a_scheduler_sees_no_step() -> None:
    model = _model().at(_random(18))
    optimizer = steepest.Muon(model.params, 0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    theta = model.theta().clone()
    _row(model, optimizer)
    assert not steps
    assert torch.equal(model.theta(), theta)
    assert not getattr(optimizer, "_opt_called", False)
    assert scheduler.last_epoch == 0


# Whole models


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(12, 3),
    )


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _images() -> tuple[Tensor, Tensor]:
    return _random(8, 1, 4, 4).float(), torch.arange(8) % 3


WHOLE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), 0.1, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), 1e-3),
    "shampoo": lambda model: steepest.Shampoo(model),
    "kl-shampoo": lambda model: steepest.KLShampoo(model, length="muon", interval=2),
    "soap": lambda model: steepest.SOAP(model),
    "muon": lambda model: steepest.Muon(model),
    "spectral descent": lambda model: steepest.SpectralDescent(model, length="dual"),
    "signum": lambda model: steepest.Signum(model),
}


def _trained(name: str, model: nn.Module, steps: int = 3) -> Optimizer:
    optimizer = WHOLE[name](model)
    for _ in range(steps):
        optimizer.zero_grad()
        _cross_entropy(model, _images()).backward()
        optimizer.step()
    return optimizer


def _everything(model: nn.Module, optimizer: Optimizer) -> Any:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state())
    ), [module.training for module in model.modules()]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_changes(name: str) -> None:
    model = _network()
    optimizer = _trained(name, model)
    before = _everything(model, optimizer)
    rows = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    again = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    assert _same(before, _everything(model, optimizer))
    assert [row.value for row in rows] == [row.value for row in again]
    names = {n for row in rows for n in row.parameters}
    assert names == {n for n, _ in model.named_parameters()}
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows)


@pytest.mark.parametrize("name", WHOLE)
def test_training_goes_on_as_if_nothing_had_been_measured(name: str) -> None:
    weights = []
    for measured in (False, True):
        model = _network()
        optimizer = _trained(name, model)
        if measured:
            preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
        _cross_entropy(model, _images()).backward()
        optimizer.step()
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", WHOLE)
def test_half_precision(name: str) -> None:
    """What bfloat16 parameters and states give is what the same numbers give in float32."""
    model = _network()
    optimizer = _trained(name, model)
    half = copy.deepcopy(model).bfloat16()
    rounded = WHOLE[name](half)
    rounded.load_state_dict(optimizer.state_dict())
    images, classes = _images()
    given = (half, _cross_entropy, (images.bfloat16(), classes), rounded)
    found = [row.value for row in preconditioned_sharpness(*given)]
    exact = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    assert found == pytest.approx([row.value for row in exact], rel=0.1)


def test_each_measure_has_a_row() -> None:
    model = _network()
    rows = preconditioned_sharpness(model, _cross_entropy, _images(), _trained("muon", model))
    assert [row.measure for row in rows] == ["one step", "preconditioned Hessian"]
    assert rows[0].parameters == ("0.weight",)
    assert rows[1].parameters == ("0.bias", "1.weight", "1.bias", "5.weight", "5.bias")
    assert all(row.ratio == row.value / row.threshold for row in rows)


@pytest.mark.parametrize("name", ["adamw", "soap", "muon"])
def test_going_on_takes_fewer_products(name: str) -> None:
    model = _network()
    optimizer = _trained(name, model)
    first = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    again = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer, start=first)
    assert sum(row.products for row in again) < sum(row.products for row in first)
    for one, other in zip(first, again, strict=True):
        assert other.value == pytest.approx(one.value, rel=2e-3)


def test_a_start_of_other_parameters_is_not_used() -> None:
    model = _network()
    first = preconditioned_sharpness(model, _cross_entropy, _images(), _trained("adamw", model))
    optimizer = SGD(model[0].parameters(), 0.1)
    [found] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer, start=first)
    [expected] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    assert found.value == expected.value


def test_two_groups_with_equal_settings_are_as_one() -> None:
    model, optimizer = _built("adam")
    one = _row(model, optimizer)
    [group] = optimizer.param_groups
    rest = {**group, "params": group["params"][:1]}
    optimizer.param_groups[:] = [{**group, "params": group["params"][1:]}, rest]
    two = _row(model, optimizer)
    assert two.parameters == one.parameters[::-1]
    assert two.value == pytest.approx(one.value, rel=1e-9)
    assert two.threshold == pytest.approx(one.threshold)


def test_the_row_is_in_units_of_the_group_nearest_to_its_threshold() -> None:
    model = _model()
    groups = _groups(model.params, 0.1, {"lr": 0.1}, {"lr": 0.3})
    row = _row(model, SGD(groups, 0.1))
    weights = torch.tensor([0.1 / 0.3] * 12 + [1.0] * 6, dtype=torch.float64)
    expected = float(torch.linalg.eigvals(weights[:, None] * model.H).real.max())
    assert row.value == pytest.approx(expected)
    assert row.threshold == pytest.approx(2 / 0.3)


def test_a_rate_of_zero_is_stable() -> None:
    model = _model().at(_random(18))
    for optimizer in (SGD(model.params, 0.0), _dual(model.params, 0.0)):
        row = _row(model, optimizer)
        assert (row.threshold, row.ratio) == (math.inf, 0.0)
        assert row.value > 0
    assert _row(model, steepest.SignSGD(model.params, 0.0)).ratio == 0.0


def test_scale_of_the_loss() -> None:
    """SGD's ratio goes with it; Adam's, whose P goes with it too, stays as it is."""
    for build, expected in ((lambda p: SGD(p, 0.1), 7.0), (lambda p: Adam(p, 0.1, eps=0.0), 1.0)):
        values = []
        for scale in (1.0, 7.0):
            model = _model()
            model.H.mul_(scale)
            model.at(_random(18))
            optimizer = build(model.params)
            for _ in range(3):
                model.at(_random(18))
                _backward(model, optimizer)
                optimizer.step()
            values.append(_row(model, optimizer).value)
        assert values[1] / values[0] == pytest.approx(expected, rel=1e-8)


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Tied().double()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return 0.5 * (model(x) - 1).square().mean()

    x = _random(5, 3)
    for optimizer in (
        SGD(model.parameters(), 0.1),
        steepest.SignSGD(list(model.parameters()), 0.1),
    ):
        [row] = preconditioned_sharpness(model, loss, x, optimizer, tolerance=1e-10)
        assert row.parameters == ("first.weight",)
        H = Hessian(model, loss, x)
        if row.measure == "one step":
            D = H.gradient().sign()
            expected = float(0.05 * D @ H(D) / (D @ H.gradient()))
        else:
            expected = float(torch.linalg.eigvalsh(H.to_dense())[-1])
        assert row.value == pytest.approx(expected, rel=1e-8)


def test_frozen_parameters_are_left_out() -> None:
    for name in WHOLE:
        model = _network()
        optimizer = _trained(name, model)
        model[0].weight.requires_grad_(False)
        rows = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
        assert "0.weight" not in {n for row in rows for n in row.parameters}
        assert rows


def test_an_optimizer_of_some_parameters() -> None:
    model = _network()
    optimizer = SGD([model[5].weight], 0.1)
    [row] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer, tolerance=1e-6)
    block = Hessian(model, _cross_entropy, _images(), ["5.weight"]).to_dense()
    assert row.parameters == ("5.weight",)
    assert row.value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)


def test_behind_wrappers() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer):
            self.optimizer = optimizer

    model = _network()
    optimizer = _trained("adamw", model)
    [expected] = preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)
    wrapped = nn.DataParallel(model)
    [found] = preconditioned_sharpness(wrapped, _cross_entropy, _images(), Wrapper(optimizer))
    assert (found.value, found.parameters) == (expected.value, expected.parameters)


def test_dtype_of_the_computation() -> None:
    for name in WHOLE:
        model = _network()
        optimizer = _trained(name, model)
        given = (model, _cross_entropy, _images(), optimizer)
        double = preconditioned_sharpness(*given, dtype=torch.float64)
        single = preconditioned_sharpness(*given)
        assert [row.value for row in double] == pytest.approx(
            [row.value for row in single], rel=2e-3
        )


# Bad input


def test_parameters_of_another_model() -> None:
    model, other = _network(), _network()
    with pytest.raises(ValueError, match=r"\(3, 1, 3, 3\) .* none"):
        preconditioned_sharpness(model, _cross_entropy, _images(), _trained("adamw", other))


def test_nothing_trained() -> None:
    model = _network()
    optimizer = SGD([p.detach() for p in model.parameters()], 0.1)
    with pytest.raises(ValueError, match="without a trained"):
        preconditioned_sharpness(model, _cross_entropy, _images(), optimizer)


@pytest.mark.parametrize("name", ["adamw", "shampoo", "kl-shampoo", "soap", "muon"])
def test_before_the_first_step(name: str) -> None:
    model = _network()
    with pytest.raises(ValueError, match="before its first step"):
        preconditioned_sharpness(model, _cross_entropy, _images(), WHOLE[name](model))


def test_groups_that_pull_in_different_directions() -> None:
    model = _model()
    for groups in (
        SGD(_groups(model.params, 0.1, {}, {"maximize": True}), 0.1),
        _dual(_groups(model.params, 0.1, {}, {"maximize": True})),
        steepest.SignSGD(_groups(model.params, 0.1, {}, {"maximize": True}), 0.1),
    ):
        with pytest.raises(ValueError, match="some maximize"):
            _row(model, groups)


def test_decay_that_explodes() -> None:
    model = _model()
    optimizer = AdamW(model.params, 0.1, weight_decay=25)
    _warm_up(optimizer, 1)
    with pytest.raises(ValueError, match=r"weights by -1\.5 "):
        _row(model, optimizer)


def test_steps_that_need_a_closure() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"LBFGS, .* closure"):
        _row(model, torch.optim.LBFGS(model.params))


def test_a_loss_that_is_not_finite() -> None:
    model = _model()
    for optimizer in (SGD(model.params, 0.1), _dual(model.params), steepest.Muon(model.params)):
        with pytest.raises(FloatingPointError, match="loss of nan"):
            preconditioned_sharpness(model, lambda m, b: m() * math.nan, None, optimizer)
