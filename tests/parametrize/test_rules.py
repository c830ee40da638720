"""The table says what the papers say; what is in other forms there is folded first."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.parametrize.rules import (
    Factors,
    Size,
    factors_of,
    readout_multiplier,
    spectral_std,
    update_of,
)
from steepest.transfer import parametrize

R = 4  # how much wider
INPUT = Size("input", (10, 16 * R), (10, 16), 1, R)
VECTOR = Size("vector", (1, 16 * R), (1, 16), 1, R)
HIDDEN = Size("hidden", (16 * R, 16 * R), (16, 16), R, R)
OUTPUT = Size("output", (16 * R, 10), (16, 10), R, 1)
SGD, ADAM = update_of("sgd", {}, "mup"), update_of("adamw", {}, "mup")


def _numbers(factors: Factors) -> tuple[float, float]:
    return factors.init, factors.lr


# Columns: size, variance of the initialization, SGD's rate, Adam's rate.
TP5_TABLE_3 = [
    (INPUT, 1, R, 1),
    (VECTOR, 1, R, 1),
    (OUTPUT, R**-2, 1 / R, 1 / R),
    (HIDDEN, 1 / R, 1, 1 / R),
]


@pytest.mark.parametrize(("size", "variance", "sgd", "adam"), TP5_TABLE_3)
def test_mup_is_table_3(size: Size, variance: float, sgd: float, adam: float) -> None:
    assert _numbers(factors_of("mup", SGD, size)) == pytest.approx((math.sqrt(variance), sgd))
    assert _numbers(factors_of("mup", ADAM, size)) == pytest.approx((math.sqrt(variance), adam))


# Columns: size, variance, multiplier, SGD's rate, Adam's rate.
OTHER_FORMS = {
    "TP-V Table 8, which microsoft/mup implements": [
        (INPUT, 1, 1, R, 1),
        (OUTPUT, 1, 1 / R, R, 1),
        (HIDDEN, 1 / R, 1, 1, 1 / R),
    ],
    "TP-V Table 9": [
        (INPUT, 1 / R, math.sqrt(R), 1, 1 / math.sqrt(R)),
        (OUTPUT, 1 / R, 1 / math.sqrt(R), 1, 1 / math.sqrt(R)),
        (HIDDEN, 1 / R, 1, 1, 1 / R),
    ],
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_of_mup_are_the_same_once_folded(form: str) -> None:
    for size, variance, multiplier, sgd, adam in OTHER_FORMS[form]:
        for update, rate in ((SGD, sgd), (ADAM, adam)):
            theirs = Factors(math.sqrt(variance), rate).fold(multiplier, update.degree)
            ours = factors_of("mup", update, size)
            assert _numbers(ours) == pytest.approx(_numbers(theirs)), (size.kind, update.name)


@pytest.mark.parametrize(("rule", "alpha"), [("depth-mup", 0.5), ("completep", 1.0)])
def test_completep_table_1(rule: str, alpha: float) -> None:
    n, m = R, 3.0  # m_N and m_L of the table
    inside = Size("hidden", HIDDEN.fans, HIDDEN.base_fans, n, n, blocks=m)
    hidden = factors_of(rule, ADAM, inside)  # type: ignore[arg-type]
    assert hidden.init**2 == pytest.approx(1 / n)
    assert hidden.lr == pytest.approx(m ** (alpha - 1) / n)
    assert hidden.eps == pytest.approx(m**-alpha / n)
    gain = factors_of(rule, ADAM, Size("vector", (1, n), (1, 1), 1, n, blocks=m))  # type: ignore[arg-type]
    assert gain.lr == pytest.approx(m ** (alpha - 1))
    assert factors_of(rule, ADAM, INPUT).lr == 1  # type: ignore[arg-type]
    theirs = Factors().fold(1 / n, ADAM.degree)  # unembedding: rate 1, forward 1/m_N
    ours = factors_of(rule, ADAM, OUTPUT)  # type: ignore[arg-type]
    assert _numbers(ours) == pytest.approx(_numbers(theirs))
    if rule == "completep":  # there the decay m_N keeps rate times decay
        assert hidden.lr * n == pytest.approx(1)


QIU_TABLE_1 = {  # of ratios in, out and L, with the branches multiplied by 1/L
    "sgd": lambda i, o, L: o / i * L,
    "adamw": lambda i, o, L: 1 / i,
    "muon": lambda i, o, L: math.sqrt(o / i),
}


@pytest.mark.parametrize("optimizer", QIU_TABLE_1)
def test_qiu_table_1(optimizer: str) -> None:
    update = update_of(optimizer, {}, "completep")
    for i, o, blocks in itertools.product((1, 4), (1, 2), (1.0, 8.0)):
        kind = "hidden" if i > 1 and o > 1 else "output" if i > 1 else "input"
        size = Size(kind, (16 * i, 16 * o), (16, 16), i, o, blocks)  # type: ignore[arg-type]
        ours = factors_of("completep", update, size)
        contained = math.sqrt(o / i) if optimizer == "muon" else 1  # by scale="spectral"
        assert ours.lr * contained == pytest.approx(QIU_TABLE_1[optimizer](i, o, blocks))
        if optimizer == "adamw":
            assert ours.eps == pytest.approx(1 / (o * blocks))


@pytest.mark.parametrize("exponent", [1 / 4, 1 / 2])
@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("block", [None, 8])
def test_qiu_shampoo(exponent: float, sides: str, block: int | None) -> None:
    settings = {"length": "own", "exponent": exponent, "sides": sides, "block": block}
    update = update_of("shampoo", settings, "completep")
    e, i, o, blocks = exponent * (2 if sides == "both" else 1), 4, 2, 3.0
    ours = factors_of("completep", update, Size("hidden", (64, 32), (16, 16), i, o, blocks))
    cut = i * o if block else 1
    assert ours.lr == pytest.approx((o / i) ** (1 - e) * blocks ** (1 - 2 * e) * cut**-e)


def test_blocks_of_one_entry_make_shampoo_adam() -> None:
    settings = {"length": "own", "exponent": 1 / 4, "block": 1}
    assert factors_of("mup", update_of("shampoo", settings, "mup"), HIDDEN).lr == 1 / R


@pytest.mark.parametrize("optimizer", ["shampoo", "kl-shampoo"])
def test_a_grafted_update_takes_the_rate_of_its_length(optimizer: str) -> None:
    assert factors_of("mup", update_of(optimizer, {}, "mup"), HIDDEN).lr == 1 / R  # QIU Table 2
    muon = {"length": "muon", "scale": "spectral"}
    assert factors_of("mup", update_of(optimizer, muon, "mup"), HIDDEN).lr == 1


def test_a_spectral_norm_of_the_scale_is_all_that_is_asked_for() -> None:
    update = update_of("soap", {"length": "spectral", "scale": "spectral"}, "mup")
    for size in (INPUT, HIDDEN, OUTPUT):
        factors = factors_of("mup", update, size)
        assert factors.lr == 1
        assert factors.eps == 1 / size.fan_out  # it meets entries of gradients, as without


def test_ntp_is_a_multiplier_and_one_rate() -> None:
    for update in (SGD, ADAM, update_of("muon", {}, "mup")):
        for size, root in ((INPUT, 1), (HIDDEN, R**-0.5), (OUTPUT, R**-0.5)):
            expected = Factors().fold(root, update.degree)  # W ~ N(0, 1), rate 1
            ours = factors_of("ntp", update, size)
            assert _numbers(ours) == pytest.approx(_numbers(expected))
            assert ours.eps == pytest.approx(expected.eps)


def test_sp_is_one_rate() -> None:
    for size, std in ((INPUT, 1), (HIDDEN, R**-0.5), (OUTPUT, R**-0.5)):
        assert _numbers(factors_of("sp", ADAM, size)) == pytest.approx((std, 1))


def test_the_adam_rate_of_super_consistency_code_is_not_ours() -> None:
    """N(0, 1) weights behind 1/sqrt(fan_in): their Adam rate goes with N; it must with N^-1/2."""
    raw = R**-0.5  # of a hidden matrix of ours, as a rate of raw weights
    ours = factors_of("mup", ADAM, HIDDEN)
    assert ours.lr == pytest.approx(Factors(lr=raw).fold(R**-0.5, 0).lr)


def test_spectral_initialization_has_the_norm_it_says() -> None:
    for fan_in, fan_out in ((400, 100), (300, 300), (50, 800)):
        W = torch.randn(fan_out, fan_in) * spectral_std(fan_in, fan_out)
        norm = torch.linalg.matrix_norm(W, 2)
        assert norm == pytest.approx(math.sqrt(fan_out / fan_in), rel=0.05)
    wide = factors_of("spectral", ADAM, Size("hidden", (64, 64), (16, 16), R, R))
    assert wide.init == pytest.approx(R**-0.5)  # muP's power, where both fans grow alike
    huge = 2**20
    out = factors_of("spectral", ADAM, Size("output", (R * huge, 10), (huge, 10), R, 1))
    assert out.init == pytest.approx(1 / R, rel=1e-2)  # and in the limit for the others


def test_the_tied_readout_keeps_a_multiplier() -> None:
    assert readout_multiplier("mup", INPUT) == 1 / R  # TP-V Table 8
    assert readout_multiplier("ntp", INPUT) == pytest.approx(R**-0.5)
    assert readout_multiplier("sp", INPUT) == 1


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ("lion", {}, "optimizer='lion'"),
        ("muon", {"scale": "match-rms-adamw"}, "scale='match-rms-adamw'"),
        ("shampoo", {"length": "muon"}, "scale=.*'muon'"),
        ("shampoo", {"relative_eps": False}, "relative_eps"),
        ("kl-shampoo", {"length": "own"}, 'length="own"'),
        ("soap", {"scale": "spectral"}, "scale='spectral'"),
        ("soap", {"length": "spectral"}, "scale=.*'spectral'"),
    ],
)
def test_settings_without_a_rate(optimizer: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update_of(optimizer, settings, "mup")
    if optimizer != "lion":
        update_of(optimizer, settings, "sp")  # which takes the optimizer as it is


@pytest.mark.parametrize("kind", [steepest.Shampoo, steepest.KLShampoo])
@pytest.mark.parametrize("width", [16, 64])
def test_grafted_updates_are_as_long_as_the_derivations_say(kind: Any, width: int) -> None:
    """As long as Adam's, or as Muon's, whatever the width: why they take those rates."""
    for graft in ("adam", "muon"):
        W = torch.nn.Parameter(torch.zeros(2 * width, width))
        V = torch.nn.Parameter(torch.zeros(2 * width, width))
        ours = kind([W], lr=1.0, length=graft, interval=1)
        adam = torch.optim.Adam([V], lr=1.0, betas=(0.9, 0.95))
        for _ in range(4):
            before = W.detach().clone(), V.detach().clone()
            W.grad = V.grad = torch.randn(2 * width, width)
            ours.step()
            adam.step()
        length = torch.linalg.matrix_norm(W.detach() - before[0])
        adams = torch.linalg.matrix_norm(V.detach() - before[1])
        expected = float(adams) if graft == "adam" else math.sqrt(width)
        assert float(length) == pytest.approx(expected, rel=1e-4)


def test_soap_starts_as_adam() -> None:
    """So its first steps are as long as Adam's, which is why it takes Adam's rate."""
    W, V = (torch.nn.Parameter(torch.zeros(8, 4)) for _ in range(2))
    soap = steepest.SOAP([W], lr=1.0, momentum=0.9, interval=10)
    adam = torch.optim.Adam([V], lr=1.0, betas=(0.9, 0.95))
    W.grad = V.grad = torch.randn(8, 4)
    soap.step()
    adam.step()
    torch.testing.assert_close(W.detach(), V.detach())


def test_signum_has_the_spectral_norm_of_the_derivation() -> None:
    for fan_in, fan_out in ((16, 64), (64, 16)):
        W = torch.nn.Parameter(torch.zeros(fan_out, fan_in))
        W.grad = torch.outer(torch.randn(fan_out), torch.randn(fan_in))
        steepest.Signum([W], lr=1 / fan_in).step()
        norm = torch.linalg.matrix_norm(W.detach(), 2)
        assert float(norm) == pytest.approx(math.sqrt(fan_out / fan_in), rel=1e-4)


def test_bare_shampoo_cuts_each_matrix_of_a_fused_one() -> None:
    """At width 1536 query, key and value have 2 x 2 blocks of at most 1024 each, at 512 one."""

    def build(width: int) -> nn.Module:
        class Attention(nn.Module):
            head_dim = 16

            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Linear(width, 3 * width)
                self.proj = nn.Linear(width, width)

        return nn.Sequential(nn.Linear(8, width), Attention(), nn.Linear(width, 3))

    settings = {"length": "own"}
    made = parametrize(
        build, {"width": 512}, {"width": 1536}, optimizer="shampoo", settings=settings
    )
    assert made["1.qkv.weight"].lr == made["1.proj.weight"].lr == 1 / 4
