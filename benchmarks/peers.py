"""The optimizers that are compared, ours and everybody's, one small factory each.

Every factory takes parameters and a rate, and sets what makes the optimizers comparable: momentum
0.95 with Nesterov's look ahead, five Newton-Schulz steps with the coefficients the library chose,
the factor sqrt(max(1, out / in)), no weight decay, no compilation. The second-order ones renew
their roots or bases every `INTERVAL` steps. Libraries are imported by their factories alone, so
that none of them has to be there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

import steepest

Make = Callable[[list[nn.Parameter], float], Optimizer]
INTERVAL = 10
BF16, FP32 = torch.bfloat16, torch.float32
FLOAT32_MUON = "torch.optim.Muon (in float32)"


@dataclass(frozen=True)
class Peer:
    """An optimizer, where it comes from, and in the second order what it is and computes."""

    name: str
    make: Make
    package: str
    orthogonal: bool = False
    """Whether its direction is a polar factor."""
    family: str = ""
    sides: str = ""
    """Which factors are decomposed."""
    roots: str = ""
    """The exponent of inverse roots, or that it is an eigenbasis; by which decomposition."""
    not_on_cpu: str = ""
    """Why it is measured on accelerators alone."""


def first_order(compiled: bool = False, emulated: bool = False) -> list[Peer]:
    """The peers of one momentum.

    Args:
        compiled: whether to add HeavyBall as it is by default, compiled.
        emulated: whether the processor has no instructions for bfloat16: this adds the algorithm of
            `torch.optim.Muon` in float32.
    """

    def muon(name: str, make: Make, package: str) -> Peer:
        return Peer(name, make, package, orthogonal=True)

    adamw, ours = torch.optim.AdamW, "steepest"
    peers = [
        Peer("torch.optim.AdamW (fused)", lambda p, lr: adamw(p, lr, fused=True), "torch"),
        Peer("torch.optim.AdamW (foreach)", lambda p, lr: adamw(p, lr, foreach=True), "torch"),
        muon("torch.optim.Muon", lambda p, lr: torch.optim.Muon(p, lr, weight_decay=0), "torch"),
        muon("steepest.Muon", steepest_muon, ours),
        muon("steepest.Muon (jordan, bf16)", steepest_muon_jordan, ours),
        muon("steepest.Muon (polar-express, bf16)", steepest_muon_express, ours),
        muon("steepest.Muon (polar-express, fp32)", steepest_muon_fp32, ours),
        Peer("steepest.Signum", lambda p, lr: steepest.Signum(p, lr), ours),
        muon("Keller Jordan's Muon", keller_jordan, "muon-optimizer"),
        muon("pytorch_optimizer.Muon", kozistr_muon, "pytorch_optimizer"),
        Peer(
            "pytorch_optimizer.Muon (gram)",
            kozistr_gram,
            "pytorch_optimizer",
            orthogonal=True,
            not_on_cpu="always in float16, in which a CPU takes about 40 times as long",
        ),
        muon("timm.optim.Muon", timm_muon, "timm"),
        muon("heavyball.Muon", lambda p, lr: heavyball_muon(p, lr), "heavyball"),
        muon("optimuon.Muon", lambda p, lr: optimuon(p, lr, gram=False), "optimuon"),
        muon("optimuon.Muon (gram)", lambda p, lr: optimuon(p, lr, gram=True), "optimuon"),
        muon("emerging_optimizers.Muon", emerging_muon, "emerging-optimizers"),
    ]
    if emulated:
        peers.insert(3, muon(FLOAT32_MUON, torch_muon_fp32, "torch"))
    if compiled:
        mode = "max-autotune-no-cudagraphs"  # its default
        make: Make = lambda p, lr: heavyball_muon(p, lr, mode)  # noqa: E731
        peers.append(Peer("heavyball.Muon (compiled)", make, "heavyball"))
    return peers


def second_order() -> list[Peer]:
    def peer(name: str, make: Make, package: str, family: str, sides: str, roots: str) -> Peer:
        return Peer(name, make, package, family=family, sides=sides, roots=roots)

    own = (("Shampoo", "Shampoo", "1/2, eigh"), ("KLShampoo", "KL", "1/2, eigh"))
    kozistr, heavyball = "pytorch_optimizer", "heavyball"
    shampoo, kl, soap = "Shampoo", "KL", "SOAP"
    capped, kl_roots = "whole, 3072 not", "1/2, QR"
    return [
        *(
            peer(
                f"steepest.{n} ({block or sides})",
                ours(n, block=block),
                "steepest",
                family,
                sides,
                roots,
            )
            for n, family, roots in own
            for sides, block in (("whole", None), ("blocks 1024", 1024), ("blocks 512", 512))
        ),
        peer("steepest.SOAP", ours("SOAP", max_side=1024), "steepest", soap, capped, "basis, QR"),
        peer(
            "steepest.SOAP (whole)",
            ours("SOAP", max_side=None),
            "steepest",
            soap,
            "whole",
            "basis, QR",
        ),
        peer("pytorch_optimizer.Shampoo", kozistr_shampoo, kozistr, shampoo, "whole", "1/4, SVD"),
        *(
            peer(f"pytorch_optimizer.ScalableShampoo ({b})", scalable(b), kozistr, shampoo, s, r)
            for b, s, r in (
                (1024, "blocks 1024", "1/4, Newton"),
                (512, "blocks 512", "1/4, Newton"),
            )
        ),
        peer("pytorch_optimizer.SOAP", kozistr_soap, kozistr, soap, "whole", "basis, QR"),
        peer(
            "heavyball.KLShampoo (4096)", heavy("KLShampoo", 4096), heavyball, kl, "whole", kl_roots
        ),
        peer("heavyball.KLShampoo", heavy("KLShampoo", 2048), heavyball, kl, capped, kl_roots),
        peer("heavyball.SOAP (4096)", heavy("SOAP", 4096), heavyball, soap, "whole", "basis, QR"),
        peer("heavyball.SOAP", heavy("SOAP", 2048), heavyball, soap, capped, "basis, QR"),
        peer(
            "emerging_optimizers.SOAP",
            emerging_soap,
            "emerging-optimizers",
            soap,
            "whole",
            "basis, QR, each step",
        ),
    ]


def present(peers: Iterable[Peer], device: str) -> tuple[list[Peer], dict[str, str]]:
    """Split peers into those that can take a step here, and the reasons why others cannot."""
    here, missing = [], {}
    for peer in peers:
        if peer.not_on_cpu and device == "cpu":
            missing[peer.name] = peer.not_on_cpu
            continue
        weight = nn.Parameter(torch.zeros(8, 8))
        weight.grad = torch.eye(8)
        try:
            optimizer = peer.make([weight], 1e-3)
            if "(compiled)" not in peer.name:
                optimizer.step()
            here.append(peer)
        except ImportError as error:
            missing[peer.name] = f"not installed ({error})"
        except Exception as error:
            missing[peer.name] = f"{type(error).__name__}: {error}"
    return here, missing


def versions(peers: Iterable[Peer]) -> dict[str, str]:
    found = {}
    for package in sorted({peer.package for peer in peers}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# Ours.


def steepest_muon(params: list[nn.Parameter], lr: float) -> Optimizer:
    return steepest.Muon(params, lr, scale="original")


def steepest_muon_jordan(params: list[nn.Parameter], lr: float) -> Optimizer:
    return steepest.Muon(params, lr, scale="original", method="jordan", dtype=BF16)


def steepest_muon_express(params: list[nn.Parameter], lr: float) -> Optimizer:
    return steepest.Muon(params, lr, scale="original", method="polar-express", dtype=BF16)


def steepest_muon_fp32(params: list[nn.Parameter], lr: float) -> Optimizer:
    return steepest.Muon(params, lr, scale="original", method="polar-express", dtype=FP32)


def ours(name: str, **own: int | None) -> Make:
    return lambda p, lr: getattr(steepest, name)(p, lr, interval=INTERVAL, **own)


# Everybody's.


def torch_muon_fp32(params: list[nn.Parameter], lr: float) -> Optimizer:
    """`torch.optim.Muon`, whose Newton-Schulz steps are in float32 and not in bfloat16."""
    module = importlib.import_module("torch.optim._muon")
    optimizer = torch.optim.Muon(params, lr, weight_decay=0)
    plain, theirs = optimizer.step, module._zeropower_via_newtonschulz

    def step() -> None:
        module._zeropower_via_newtonschulz = newton_schulz_fp32
        try:
            plain()
        finally:
            module._zeropower_via_newtonschulz = theirs

    optimizer.step = step
    return optimizer


def newton_schulz_fp32(
    G: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    a, b, c = coefficients
    X = G.float() if len(G) <= G.shape[1] else G.float().T
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if len(G) <= G.shape[1] else X.T


def keller_jordan(params: list[nn.Parameter], lr: float) -> Optimizer:
    return importlib.import_module("muon").SingleDeviceMuon(params, lr)


def kozistr_muon(params: list[nn.Parameter], lr: float, **more: object) -> Optimizer:
    groups = [{"params": params, "use_muon": True}]
    return importlib.import_module("pytorch_optimizer").Muon(groups, lr, **more)


def kozistr_gram(params: list[nn.Parameter], lr: float) -> Optimizer:
    return kozistr_muon(params, lr, ns_method="gram_newton_schulz")


def kozistr_shampoo(params: list[nn.Parameter], lr: float) -> Optimizer:
    make = importlib.import_module("pytorch_optimizer").Shampoo
    return make(params, lr, preconditioning_compute_steps=INTERVAL)


def scalable(block: int) -> Make:
    def make(params: list[nn.Parameter], lr: float) -> Optimizer:
        return importlib.import_module("pytorch_optimizer").ScalableShampoo(
            params,
            lr,
            block_size=block,
            start_preconditioning_step=1,
            preconditioning_compute_steps=INTERVAL,
        )

    return make


def kozistr_soap(params: list[nn.Parameter], lr: float) -> Optimizer:
    make = importlib.import_module("pytorch_optimizer").SOAP
    return make(params, lr, weight_decay=0.0, precondition_frequency=INTERVAL)


def timm_muon(params: list[nn.Parameter], lr: float) -> Optimizer:
    # All of timm imports torchvision, which the package index has for CUDA alone; this module of
    # it does not, so it is imported without what is around it.
    for name in ("timm", "timm.optim"):
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = list(spec.submodule_search_locations or ())
    make = importlib.import_module("timm.optim.muon").Muon
    return make(params, lr, nesterov=True, adjust_lr_fn="original")


def heavyball_muon(params: list[nn.Parameter], lr: float, mode: str | None = None) -> Optimizer:
    return _heavyball("Muon", mode, params, lr, betas=(0.95, 0.99))


def heavy(name: str, largest: int) -> Make:
    settings = {"precondition_frequency": INTERVAL, "max_precond_dim": largest, "weight_decay": 0.0}
    return lambda p, lr: _heavyball(name, None, p, lr, **settings)


def _heavyball(
    name: str, mode: str | None, params: list[nn.Parameter], lr: float, **settings: object
) -> Optimizer:
    heavyball = importlib.import_module("heavyball")
    heavyball.utils.compile_mode = mode  # a global, read at every step
    optimizer = getattr(heavyball, name)(params, lr=lr, **settings)
    plain = optimizer.step

    def step() -> None:
        heavyball.utils.compile_mode = mode
        plain()

    optimizer.step = step
    return optimizer


def optimuon(params: list[nn.Parameter], lr: float, gram: bool) -> Optimizer:
    make = importlib.import_module("optimuon").Muon  # whose Gram form takes float16 by default
    return make(params, lr, gram_ns=gram, ns_dtype=BF16, normuon=False)


def emerging_muon(params: list[nn.Parameter], lr: float) -> Optimizer:
    make = _emerging("orthogonalized_optimizers").Muon
    return make(params, lr, weight_decay=0.0, nesterov=True, scale_mode="shape_scaling")


def emerging_soap(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _emerging("soap").SOAP(params, lr, weight_decay=0.0)  # a new basis at every step


def _emerging(module: str) -> ModuleType:
    if not hasattr(typing, "override"):  # all it needs of Python 3.12
        typing.override = lambda method: method
    if not importlib.util.find_spec("triton"):  # for products on a GPU that are not asked for
        kernels = "emerging_optimizers.triton_kernels"
        sys.modules.setdefault(kernels, ModuleType(kernels))
    return importlib.import_module(f"emerging_optimizers.{module}")
