"""A loss is evaluated as training evaluates it, and with the same random numbers every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from steepest.curvature import (
    NTK,
    GaussNewton,
    Hessian,
    SharpnessTracker,
    blockwise_diagonal,
    directional_curvature,
    effective_rank,
    gauss_newton_split,
    muon_conditions,
    ntk_spectrum,
    preconditioned_sharpness,
    sharpness,
    spectrum,
    stack_conditions,
)
from steepest.curvature.loss_function import Batches, LossFunction
from steepest.diagnosis import audit, diagnose
from steepest.random_numbers import copied_generator, seed_of, seeded
from steepest.transfer import super_consistency

Loss = Callable[[Any, Any], Tensor]


class Autoencoder(nn.Module):
    """Variational: a sample of the latent code is drawn in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, log = self.encode(x).tanh().chunk(2, -1)
        return self.decode(mean + log.exp() * torch.randn_like(mean))


class StochasticDepth(nn.Module):
    """Branches that are dropped by hand, for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            kept = torch.rand(len(x), 1, dtype=x.dtype) < 0.6 if self.training else 1.0
            x = x + kept * torch.tanh(layer(x))
        return x


class Auxiliary(nn.Module):
    """A head that only training has, behind a slope that only training draws."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rrelu(self.body(x), training=self.training)
        return self.head(h) + (0.5 * self.aux(h) if self.training else 0)


class Codebook(nn.Module):
    """Running means in buffers that every forward pass of training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
                self.count = self.count + 1
        return torch.tanh(self.body(x - self.mean)) * (1 + self.count)


def _squares(model: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), x)


def _denoise(model: nn.Module, x: Tensor) -> Tensor:
    """A diffusion model's: noise, and how much of it, are drawn by the loss."""
    noise, time = torch.randn_like(x), torch.randint(1, 10, (len(x), 1)) / 10
    return F.mse_loss(model(x + time * noise), noise)


def _augment(model: nn.Module, x: Tensor) -> Tensor:
    """By NumPy and Python, as data loaders do."""
    shift = float(np.random.randn()) + random.gauss(0, 1)  # noqa: NPY002
    return F.mse_loss(model(x + shift), x)


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "autoencoder": (Autoencoder, _squares),
    "stochastic depth": (StochasticDepth, _squares),
    "auxiliary": (Auxiliary, _squares),
    "codebook": (Codebook, _squares),
    "denoising": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), _denoise),
    "augmentation": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), _augment),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()),
        _squares,
    ),
}


def _made(name: str) -> tuple[nn.Module, Loss, Tensor]:
    torch.manual_seed(0)
    build, loss = CASES[name]
    return build().double().train(), loss, torch.randn(6, 4, dtype=torch.float64)


def _dense(model: nn.Module, loss: Loss, x: Tensor) -> Tensor:
    """The Hessian by torch alone, for the draw that belongs to the batch."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in named.values()]
    sizes = [p.numel() for p in named.values()]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = deepcopy(model)

        def forward(self) -> Tensor:
            return loss(self.model, x)

    def flat(v: Tensor) -> Tensor:
        pieces = zip(named, v.split(sizes), shapes, strict=True)
        given = {f"model.{name}": piece.view(shape) for name, piece, shape in pieces}
        return functional_call(Called(), given, ())

    with seeded(seed_of(x)):
        found: Tensor = torch.autograd.functional.hessian(
            flat, torch.cat([p.flatten() for p in named.values()])
        )
    return found


def _states() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index] # noqa: NPY002
        random.getstate(),
    ]


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Generators, modes, weights and buffers."""

    def seen() -> Any:
        kept = {name: t.tolist() for name, t in model.state_dict().items()}
        return deepcopy((_states(), [module.training for module in model.modules()], kept))

    before = seen()
    yield
    assert seen() == before


# --------------------------------------------------------------------------------- one draw a batch


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_is_that_of_one_draw_in_the_mode_of_training(name: str) -> None:
    model, loss, x = _made(name)
    expected = _dense(model, loss, x)
    with _left_alone(model):
        for keep in (True, False):
            found = Hessian(model, loss, x, keep_graphs=keep).to_dense()
            torch.testing.assert_close(found, expected)
        top = sharpness(model, loss, x, tolerance=1e-6)
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-5)
    evaluated = _dense(deepcopy(model).eval(), loss, x)
    assert (name in ("autoencoder", "denoising", "augmentation")) == torch.allclose(
        evaluated, expected
    )


@pytest.mark.parametrize("name", CASES)
def test_the_parts_see_the_draw_of_the_whole(name: str) -> None:
    """Where outputs are linear in the weights, H - G = 0; gradients are those of the loss."""
    model, loss, x = _made(name)
    batches = Batches([x, x + 1, 2 * x])
    H = Hessian(model, loss, batches, keep_graphs=False)
    G = GaussNewton(model, loss, batches, keep_graphs=True)
    linear = nn.Linear(4, 4).double().train()
    if loss is not _squares:
        split = gauss_newton_split(linear, loss, batches).functional
        assert max(abs(split.largest), abs(split.smallest)) < 1e-9
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert torch.equal(H @ v, H @ v)
    torch.testing.assert_close(G @ v, GaussNewton(model, loss, batches, keep_graphs=False) @ v)
    kernel = NTK(model, loss, x).to_dense()
    assert torch.equal(kernel, NTK(model, loss, x).to_dense())
    assert H.loss() == Hessian(model, loss, batches).loss()


def test_the_gains_of_a_direction_are_differences_of_the_loss_evaluated_again() -> None:
    model, loss, x = _made("autoencoder")
    D = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    row = directional_curvature(model, loss, x, D)
    function = LossFunction(model, loss)

    def along(t: float) -> float:
        with torch.no_grad():
            for name, p in function.parameters.items():
                p.add_(D[name], alpha=t)
            value = function(x).item()
            for name, p in function.parameters.items():
                p.sub_(D[name], alpha=t)
        return value

    t = 1e-4
    assert row.gain == pytest.approx((along(t) - along(-t)) / (2 * t), rel=1e-5)
    second = (along(t) - 2 * along(0) + along(-t)) / t**2
    assert row.curvature == pytest.approx(second, rel=1e-3)


def test_batches_see_draws_of_their_own() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.rand(3))
        return _squares(model, x)

    x = torch.randn(6, 4)
    function = LossFunction(nn.Linear(4, 4), loss)
    for batch in (x, x + 1, x.clone(), {"x": x}):
        function(batch["x"] if isinstance(batch, dict) else batch)
    first, _, second, again, _ = seen  # the first batch is evaluated twice
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_seeds_follow_what_is_in_a_batch(dtype: torch.dtype) -> None:
    x = torch.arange(1000).remainder(7).view(10, 100).to(dtype)
    assert seed_of(x) == seed_of(x.clone()) == seed_of(x.T.contiguous().T)
    assert seed_of(x) != seed_of(x.view(100, 10))
    assert seed_of((x, "a")) == seed_of([x, "a"]) != seed_of((x, "b"))
    assert seed_of({"x": x}) != seed_of({"x": ~x if dtype == torch.bool else x + 1})
    assert 0 <= seed_of(None) < 2**32
    assert isinstance(seed_of((x[:0], torch.tensor(1.0), x.bool().to_sparse())), int)


# ------------------------------------------------------------------------------ what is put aside


class Functional(nn.Module):
    """Dropout in calls of functions, attention and recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.cells = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.alpha = nn.FeatureAlphaDropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.body(x), 0.5, self.training).unsqueeze(0)
        h = h + self.attention(h, h, h, need_weights=True)[0] + self.cells(h)[0]
        p = 0.5 if self.training else 0.0
        h = h + F.scaled_dot_product_attention(h, h, h, None, p)
        h = h + F.scaled_dot_product_attention(h, h, h, dropout_p=p)
        h = F.alpha_dropout(h, training=self.training) + torch.dropout(h, 0.5, self.training)
        return self.alpha(self.drop(h)).squeeze(0)


def test_dropout_is_off_in_modules_and_in_functions() -> None:
    torch.manual_seed(0)
    model, x = Functional().double().train(), torch.randn(6, 4, dtype=torch.float64)
    with _left_alone(model):
        found = Hessian(model, _squares, x, ["body.*"]).to_dense()
    evaluated = Hessian(deepcopy(model).eval(), _squares, x, ["body.*"]).to_dense()
    assert torch.equal(found, evaluated)
    assert model.attention.dropout == model.cells.dropout == 0.5


@pytest.mark.parametrize("norm", ["batch", "instance", "by hand"])
@pytest.mark.parametrize("how", ["eval", "batch"])
def test_normalization_with_running_statistics_takes_what_is_asked_for(norm: str, how: Any) -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.full((4,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            var = x.var((0, 2)) if self.training else self.running_var
            if self.training:
                self.running_var.lerp_(var.detach(), 0.5)
            return x / var[:, None].sqrt()

    torch.manual_seed(0)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm1d(4),
        "instance": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
        "by hand": ByHand,
    }
    model = nn.Sequential(nn.Conv1d(4, 4, 1), kinds[norm](), nn.Tanh()).double().train()
    x = 3 * torch.randn(5, 4, 6, dtype=torch.float64)
    with _left_alone(model):
        found = Hessian(model, _squares, x, batch_norm=how).to_dense()
    twin = deepcopy(model).train(how == "batch")
    torch.testing.assert_close(found, _dense(twin, _squares, x))


def test_modes_are_those_of_training_and_put_back_when_the_loss_raises() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.RReLU(), nn.Dropout1d(), Auxiliary()
    ).train()
    model[5].eval()
    modes: list[list[bool]] = []

    def loss(model: Any, x: Tensor) -> Tensor:
        modes.append([module.training for module in model])
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        raise KeyboardInterrupt

    for how in ("eval", "batch"):
        with _left_alone(model), pytest.raises(KeyboardInterrupt):
            Hessian(model, loss, torch.zeros(2, 4), batch_norm=how).loss()
    assert modes == [
        [True, False, False, True, False, False],
        [True, False, True, True, False, False],
    ]


def test_checkpointing_that_a_model_switches_by_itself_is_off() -> None:
    """As in Hugging Face's models while they train; it changes no value."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gradient_checkpointing = nn.Linear(4, 4), True

        def forward(self, x: Tensor) -> Any:
            if self.gradient_checkpointing and self.training:
                return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
            return self.body(x)

    model, x = Checkpointed().train(), torch.randn(6, 4)
    found = Hessian(model, _squares, x).to_dense()
    assert torch.equal(found, Hessian(deepcopy(model).eval(), _squares, x).to_dense())
    assert model.gradient_checkpointing


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["numpy", "python", "counter"])
def test_losses_that_are_not_the_same_twice_are_refused(kind: str) -> None:
    own, python, calls = np.random.default_rng(0), random.Random(0), [0]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        noise = {"numpy": own.random, "python": python.random, "counter": lambda: calls[0]}
        return _squares(model, x + float(noise[kind]()))

    model, x = nn.Linear(4, 4), torch.randn(6, 4)
    expected = r"loss of .* and then of "
    for run in (
        lambda: sharpness(model, loss, x),
        lambda: ntk_spectrum(model, loss, x),
        lambda: diagnose(model, loss, [x, x + 1, x + 2], level="quick"),
        lambda: audit(model, torch.optim.SGD(model.parameters(), 0.1), loss, [x]),
    ):
        with _left_alone(model), pytest.raises(ValueError, match=expected):
            run()


def test_generators_of_torch_in_a_loss_are_held_fixed_and_left_alone() -> None:
    own = torch.Generator().manual_seed(3)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=own) + torch.empty_like(x).uniform_(generator=own)
        return F.mse_loss(model(x + noise), noise)

    model, x = nn.Linear(4, 4), torch.randn(6, 4)
    before = own.get_state()
    split = gauss_newton_split(model, loss, x).functional
    assert max(abs(split.largest), abs(split.smallest)) < 1e-5
    assert torch.equal(own.get_state(), before)


def test_a_loss_that_seeds_itself_keeps_its_seed() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(3)
        torch.manual_seed(4)
        return _squares(model, x + torch.randn(x.shape, generator=own) + torch.randn(x.shape))

    model, x = nn.Linear(4, 4), torch.randn(6, 4)
    with _left_alone(model):
        value = Hessian(model, loss, x).loss()
    assert value == pytest.approx(loss(model, x).item())


# ------------------------------------------------------------------ the generators of the caller


def _adam(model: nn.Module, loss: Loss, x: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    loss(model, x).backward()
    optimizer.step()
    return optimizer


EVERYTHING: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sharpness": sharpness,
    "spectrum": lambda *given: spectrum(*given, probes=2, steps=3, count=1),
    "effective rank": lambda *given: effective_rank(*given, probes=2, steps=3),
    "split": gauss_newton_split,
    "ntk": ntk_spectrum,
    "large ntk": lambda model, loss, x: ntk_spectrum(model, loss, torch.cat([x] * 3), count=1),
    "muon": lambda model, loss, x: muon_conditions(model, loss, x, "*weight"),
    "shares": lambda model, loss, x: blockwise_diagonal(model, loss, x, "*weight"),
    "stacks": lambda model, loss, x: stack_conditions(
        model, loss, x, [("0.weight", "2.weight")], max_products=3
    ),
    "stability": lambda model, loss, x: preconditioned_sharpness(
        model, loss, x, torch.optim.SGD(model.parameters(), 0.1)
    ),
    "tracker": lambda model, loss, x: SharpnessTracker(
        model, loss, x, torch.optim.SGD(model.parameters(), 0.1), every=1
    ).step(),
    "audit": lambda model, loss, x: audit(
        model, torch.optim.AdamW(model.parameters(), 0.1), loss, [x]
    ),
    "gaussian audit": lambda model, loss, x: audit(
        model, torch.optim.AdamW(model.parameters(), 0.1)
    ),
    "diagnosis": lambda model, loss, x: diagnose(
        model, loss, [x, x + 1, x + 2, x + 3], parameters=["0.weight"]
    ),
    "race": lambda model, loss, x: diagnose(
        model, loss, [x + i for i in range(8)], level="thorough", parameters=["2.weight"]
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_generators_are_left_alone_and_a_result_can_be_had_again(name: str) -> None:
    """With noise and dropout; whatever the generators are at in the meantime."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).train()
    x = torch.randn(30, 4)
    with _left_alone(model):
        first = EVERYTHING[name](model, _denoise, x)
        again = EVERYTHING[name](model, _denoise, x)
    shown = [str(each) for each in (first, again)]
    if name == "tracker":
        shown = [str({**each, "seconds": 0}) for each in (first, again)]
    assert shown[0] == shown[1]


def test_the_order_of_a_data_loader_is_drawn_from_generators_that_stay() -> None:
    loader = DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4, shuffle=True)
    model = nn.Linear(4, 4)
    with _left_alone(model):
        Batches(loader)
        sharpness(model, _only, loader)
        diagnose(model, _only, loader, level="quick")


def _only(model: nn.Module, batch: Any) -> Tensor:
    return _squares(model, batch[0])


def test_a_copied_generator_draws_what_comes_next() -> None:
    generator = copied_generator()
    drawn = torch.randn(5, generator=generator)
    assert torch.equal(drawn, torch.randn(5))


def test_descents_and_audits_compare_what_one_draw_gives() -> None:
    """Of a loss that noise dominates, a step of almost nothing changes almost nothing."""
    from steepest.diagnosis.descent import Walk
    from steepest.diagnosis.evidence import gather

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).train()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return _denoise(model, x) + 10 * torch.randn(())

    batches = [torch.randn(6, 4) for _ in range(3)]
    [place, *_] = gather(LossFunction(model, loss), batches, None, curvature=True)
    walk = Walk(LossFunction(model, loss), [place], lambda: None)
    D = place.gradients[:1]
    [fall] = walk.falls(1e-3, 1, lambda _: D, batches[:1])
    assert fall == pytest.approx(1e-3 * float(D.square().sum()), rel=0.05, abs=2e-6)
    assert torch.equal(walk.gradient(batches[1])[0], place.gradients[1])


def test_snapshots_of_super_consistency_do_not_disturb_training() -> None:
    """However many there are, noise, masks and running statistics of training are the same."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def build(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 4)
        )

    def losses(every: int) -> list[float]:
        found = super_consistency(
            build, [{"width": 6}, {"width": 12}], lambda i: x, _denoise,
            lr=0.05, optimizer="sgd", steps=12, every=every, seeds=1,
        )  # fmt: skip
        return [row.losses[row.steps.index(12)] for row in found.rows]

    assert losses(3) == losses(4)
