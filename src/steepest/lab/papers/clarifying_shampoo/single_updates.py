"""What the optimizers make of one matrix: identities, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steepest import SOAP, KLShampoo, Muon, Shampoo, Signum, SpectralDescent
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.clarifying_shampoo.updates import (
    BARE,
    DOUBLE,
    NO_MEMORY,
    gaussian_gradient,
    relative_error,
    update_from,
    zero_weight,
)
from steepest.linalg import nuclear_norm, polar

Shapes = tuple[tuple[int, int], ...]
_EPS = (1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9)
_DECAYED: dict[str, Any] = {"eps": 1e-4, "momentum": 0.9, "beta2": 0.9}


def one_update(seed: int, shapes: Shapes) -> Numbers:
    """Errors of every identity, the largest over shapes (out, in)."""
    errors: dict[str, list[float]] = {}
    for shape in shapes:
        for name, error in (
            *_without_memory(shape).items(),
            ("decomposition", _decomposition_error(shape)),
            ("signum times scale", _adam_error(shape)),
            ("large eps", _distance_at_large_eps(shape)),
            ("kronecker product", _kronecker_error(shape)),
            ("vectors", _full_adam_error(shape[1])),
            ("grafted length", _grafting_error(shape)),
            ("Muon of PyTorch", _muon_parity(shape)),
            ("Adam of PyTorch", _soap_parity(shape)),
            ("dual length", _dual_length_error(shape)),
        ):
            errors.setdefault(name, []).append(error)
    largest: Numbers = {name: max(values) for name, values in errors.items()}
    turned = [_turned_errors(shape) for shape in shapes]
    return largest | {
        "turned matrices": max(error for one, _ in turned for error in one),
        "turned entries": min(error for _, one in turned for error in one),
    }


def _without_memory(shape: tuple[int, int]) -> Numbers:
    """Without memory and ε."""
    G = gaussian_gradient(*shape)

    def update(**settings: Any) -> Tensor:
        W = zero_weight(*shape)
        return update_from(Shampoo([W], 1.0, **NO_MEMORY, **settings), W, G)

    one_sided = (relative_error(update(sides=side), polar(G, "svd")) for side in ("left", "right"))
    return {
        "quarter": relative_error(update(exponent=1 / 4), polar(G, "svd")),
        "half": relative_error(update(exponent=1 / 2), torch.linalg.pinv(G).mT),
        "one-sided": max(one_sided),
    }


def _decomposition_error(shape: tuple[int, int]) -> float:
    """L^-p M R^-p against left adaptation, polar(M), right adaptation, after six gradients."""
    errors = []
    for exponent in (1 / 4, 1 / 2):
        W = zero_weight(*shape)
        optimizer = Shampoo([W], 1.0, exponent=exponent, **{**BARE, **_DECAYED})
        for _ in range(6):
            D = update_from(optimizer, W, gaussian_gradient(*shape))
        left, muon, right = optimizer.adaptation(W)
        M = optimizer.state[W]["momentum_buffer"]
        errors += [relative_error(left @ muon @ right, D), relative_error(muon, polar(M, "svd"))]
    return max(errors)


def _adam_error(shape: tuple[int, int]) -> float:
    """Adam's update against (|m| / sqrt(v)) sign(m); infinite where the scale is above 1."""
    W, beta = zero_weight(*shape), 0.9
    optimizer = torch.optim.Adam([W], 1.0, betas=(beta, beta), eps=0.0)
    m = v = torch.zeros(shape, dtype=DOUBLE)
    for t in range(1, 7):
        G = gaussian_gradient(*shape)
        D = update_from(optimizer, W, G)
        m, v = beta * m + (1 - beta) * G, beta * v + (1 - beta) * G**2
        scale = (m.abs() / (1 - beta**t)) / (v / (1 - beta**t)).sqrt()
    shrinks = float(scale.max()) <= 1 + 1e-12
    return relative_error(scale * m.sign(), D) if shrinks else math.inf


def _distance_at_large_eps(shape: tuple[int, int]) -> float:
    """The angle to the gradient at the largest ε; infinite unless it falls from ε to ε."""
    G, distances = gaussian_gradient(*shape), []
    for eps in _EPS:
        W = zero_weight(*shape)
        settings = {**NO_MEMORY, "eps": eps, "relative_eps": False}
        D = update_from(Shampoo([W], 1.0, exponent=1 / 4, **settings), W, G)
        distances.append(relative_error(D / D.norm(), G / G.norm()))
    falls = distances == sorted(distances, reverse=True)
    return distances[-1] if falls else math.inf


def _kronecker_error(shape: tuple[int, int]) -> float:
    """vec(L^-p M R^-p) against (R ⊗ L)^-p vec(M), where vec stacks columns."""
    W, p = zero_weight(*shape), 1 / 2
    optimizer = Shampoo([W], 1.0, exponent=p, **{**BARE, **_DECAYED, "relative_eps": False})
    L, R, M = (torch.zeros(n, k, dtype=DOUBLE) for n, k in _sides(*shape))
    steps = 4
    for _ in range(steps):
        G = gaussian_gradient(*shape)
        D = update_from(optimizer, W, G)
        L, R, M = 0.9 * L + 0.1 * G @ G.mT, 0.9 * R + 0.1 * G.mT @ G, 0.9 * M + 0.1 * G
    L, R = (A / (1 - 0.9**steps) + 1e-4 * torch.eye(len(A), dtype=DOUBLE) for A in (L, R))
    whole = _power(torch.kron(R, L), -p) @ (M / (1 - 0.9**steps)).mT.flatten()
    return relative_error(whole.reshape(shape[1], shape[0]).mT, D)


def _sides(out: int, in_: int) -> tuple[tuple[int, int], ...]:
    return (out, out), (in_, in_), (out, in_)


def _power(A: Tensor, p: float) -> Tensor:
    eigenvalues, Q = torch.linalg.eigh(A)
    return (Q * eigenvalues**p) @ Q.mT


def _full_adam_error(n: int) -> float:
    """Shampoo of a vector (1, n) with p = 1/2, right side alone, against full-matrix Adam."""
    w, beta = zero_weight(1, n), 0.9
    settings = {**BARE, **_DECAYED, "relative_eps": False, "sides": "right"}
    optimizer = Shampoo([w], 1.0, **settings)
    m, V = torch.zeros(n, dtype=DOUBLE), torch.zeros(n, n, dtype=DOUBLE)
    steps = n + 2
    for _ in range(steps):
        g = torch.randn(n, dtype=DOUBLE)
        D = update_from(optimizer, w, g[None])
        m, V = beta * m + (1 - beta) * g, beta * V + (1 - beta) * torch.outer(g, g)
    V = V / (1 - beta**steps) + 1e-4 * torch.eye(n, dtype=DOUBLE)
    return relative_error(_power(V, -1 / 2) @ m / (1 - beta**steps), D[0])


def _grafting_error(shape: tuple[int, int]) -> float:
    """Length against Adam's, and the sine of the angle to the update without grafting."""
    betas, errors = (0.9, 0.95), []
    settings: dict[str, Any] = {"momentum": betas[0], "beta2": 0.9, "eps": 1e-4, "interval": 1}
    gradients = [gaussian_gradient(*shape) for _ in range(5)]
    kinds: tuple[Callable[..., Any], ...] = (Shampoo, KLShampoo)
    for kind in kinds:
        W, V, A = (zero_weight(*shape) for _ in range(3))
        grafted = kind([W], 1.0, length="adam", graft_beta2=betas[1], **settings)
        own = kind([V], 1.0, length="own", **settings)
        adam = torch.optim.Adam([A], 1.0, betas=betas, eps=1e-8)
        for G in gradients:
            steps = update_from(grafted, W, G), update_from(own, V, G), update_from(adam, A, G)
        errors += [float(abs(steps[0].norm() / steps[2].norm() - 1))]
        errors += [relative_error(steps[0] / steps[0].norm(), steps[1] / steps[1].norm())]
    return max(errors)


def _muon_parity(shape: tuple[int, int]) -> float:
    """Ten steps of Muon against ten of PyTorch's, which computes in bfloat16."""
    W, V = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    own = Muon([W], 0.1, scale="original", method="jordan", dtype=torch.bfloat16)
    torchs = torch.optim.Muon([V], 0.1, weight_decay=0.0)
    for _ in range(10):
        G = torch.randn(shape)
        update_from(own, W, G)
        update_from(torchs, V, G)
    return relative_error(W.detach(), V.detach())


def _soap_parity(shape: tuple[int, int]) -> float:
    """Ten steps of SOAP in the basis of the weights against ten of Adam."""
    W, V = zero_weight(*shape), zero_weight(*shape)
    soap = SOAP([W], 0.1, momentum=0.9, beta2=0.95, eps=0.0, max_side=1)
    adam = torch.optim.Adam([V], 0.1, betas=(0.9, 0.95), eps=0.0)
    for _ in range(10):
        G = gaussian_gradient(*shape)
        update_from(soap, W, G)
        update_from(adam, V, G)
    return relative_error(W.detach(), V.detach())


def _dual_length_error(shape: tuple[int, int]) -> float:
    """Spectral descent with the dual length against ‖G‖_* polar(G), the step of PolarGrad."""
    W, G = zero_weight(*shape), gaussian_gradient(*shape)
    optimizer = SpectralDescent([W], 1.0, length="dual", scale="none", method="svd")
    return relative_error(update_from(optimizer, W, G), nuclear_norm(G) * polar(G, "svd"))


def _turned_errors(shape: tuple[int, int]) -> tuple[list[float], list[float]]:
    """‖D(Q G P) - Q D(G) P‖ over ‖D‖ with rotations Q and P: for matrices, and for entries."""
    Q, P = (polar(torch.randn(n, n, dtype=DOUBLE), "svd") for n in shape)
    gradients = [gaussian_gradient(*shape) for _ in range(4)]

    def error(build: Callable[[list[nn.Parameter]], Any]) -> float:
        last = []
        for turn in (lambda G: G, lambda G: Q @ G @ P):
            W = zero_weight(*shape)
            optimizer = build([W])
            for G in gradients:
                D = update_from(optimizer, W, turn(G))
            last.append(D)
        return relative_error(last[1], Q @ last[0] @ P)

    settings = {**BARE, **_DECAYED}
    matrices = (
        error(lambda params: Muon(params, 1.0, method="svd")),
        error(lambda params: Shampoo(params, 1.0, exponent=1 / 4, **settings)),
        error(lambda params: Shampoo(params, 1.0, exponent=1 / 2, **settings)),
        error(lambda params: KLShampoo(params, 1.0, **settings)),
    )
    entries = (
        error(lambda params: Signum(params, 1.0)),
        error(lambda params: torch.optim.Adam(params, 1.0)),
        error(lambda params: SOAP(params, 1.0, max_side=1)),
    )
    return list(matrices), list(entries)


ONE_UPDATE = Experiment(
    name="one-update",
    title="What the optimizers make of one matrix",
    kind="identity",
    measure=one_update,
    scales={
        "quick": Setting(sizes={"shapes": ((6, 6), (6, 10), (10, 6))}, seeds=2, minutes=0.05),
        "cpu": Setting(sizes={"shapes": ((12, 12), (12, 20), (20, 12))}, seeds=3, minutes=0.1),
        "gpu": Setting(sizes={"shapes": ((12, 12), (12, 20), (20, 12))}, seeds=3, minutes=0.1),
        "paper": Setting(sizes={"shapes": ((12, 12), (12, 20), (20, 12))}, seeds=3, minutes=0.1),
    },
)


def _largest(*names: str) -> Callable[[Numbers], float]:
    return lambda numbers: max(numbers[name] for name in names)


CLAIMS = (
    Claim(
        name="shampoo-without-memory",
        sentence="Without memory, Shampoo 1/4 is spectral descent; so is one side with p = 1/2.",
        place="Fig. 1, section 2",
        source="second-hand",
        experiment=ONE_UPDATE,
        quantity="largest relative error of the update",
        value=_largest("quarter", "one-sided", "half"),
        high=1e-12,
        judged="every seed",
        paper="equal; p = 1/2 on both sides gives U S⁻¹ Vᵀ",
        checks=("D1.1",),
    ),
    Claim(
        name="shampoo-is-adapted-muon",
        sentence="Shampoo's update is Muon's between two adaptations, as Adam's is Signum's times "
        "a scale of at most 1.",
        place="Section 2",
        source="second-hand",
        experiment=ONE_UPDATE,
        quantity="largest relative error of the two decompositions",
        value=_largest("decomposition", "signum times scale"),
        high=1e-12,
        judged="every seed",
        paper="equal",
        checks=("D1.2",),
    ),
    Claim(
        name="large-epsilon-is-momentum",
        sentence="As ε grows, the direction of Shampoo goes to that of the momentum.",
        place="Section 2",
        source="ours",
        experiment=ONE_UPDATE,
        quantity="distance of directions at ε = 1e9, if it falls with ε",
        value=_largest("large eps"),
        high=1e-7,
        judged="every seed",
        checks=("D1.3",),
    ),
    Claim(
        name="rotations-commute",
        sentence="Muon, Shampoo and KL-Shampoo turn with the gradient; Adam, Signum and SOAP in a "
        "fixed basis do not.",
        place="Section 2",
        source="ours",
        experiment=ONE_UPDATE,
        quantity="largest relative error of the first three",
        value=lambda n: n["turned matrices"] if n["turned entries"] > 0.1 else math.inf,
        high=1e-9,
        judged="every seed",
        checks=("D1.8",),
    ),
    Claim(
        name="entries-commute",
        sentence="False on purpose: Adam, Signum and SOAP in a fixed basis turn with the gradient.",
        place="control",
        source="ours",
        experiment=ONE_UPDATE,
        quantity="least relative error of the three",
        value=lambda numbers: float(numbers["turned entries"]),
        high=0.01,
        judged="every seed",
        control=True,
    ),
    Claim(
        name="shampoo-is-a-kronecker-product",
        sentence="Shampoo preconditions the flat matrix by (R ⊗ L)^-p; of a vector it is "
        "full-matrix Adam.",
        place="Section 2",
        source="ours",
        experiment=ONE_UPDATE,
        quantity="largest relative error of the update",
        value=_largest("kronecker product", "vectors"),
        high=1e-9,
        judged="every seed",
        checks=("D1.9",),
    ),
    Claim(
        name="grafting-changes-length-alone",
        sentence="Grafting gives an update Adam's length and leaves its direction alone.",
        place="Section 3",
        source="second-hand",
        experiment=ONE_UPDATE,
        quantity="largest relative error of length and direction",
        value=_largest("grafted length"),
        high=1e-6,
        judged="every seed",
        paper="matched update sizes",
        checks=("D1.10",),
    ),
    Claim(
        name="updates-agree-with-torch",
        sentence="Our Muon takes PyTorch's steps, and SOAP without a rotation those of Adam.",
        place="Appendix",
        source="ours",
        experiment=ONE_UPDATE,
        quantity="largest relative error after ten steps",
        value=_largest("Muon of PyTorch", "Adam of PyTorch"),
        high=1e-2,
        judged="every seed",
        checks=("D1.16",),
    ),
    Claim(
        name="polar-grad-has-the-dual-length",
        sentence="Spectral descent of the dual length is PolarGrad: nuclear norm times polar "
        "factor.",
        place="Section 2",
        source="second-hand",
        experiment=ONE_UPDATE,
        quantity="largest relative error of the update",
        value=_largest("dual length"),
        high=1e-10,
        judged="every seed",
        checks=("D1.17",),
    ),
)
