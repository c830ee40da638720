"""Every mistake gets a sentence: what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import (
    NTK,
    Batches,
    GaussNewton,
    Hessian,
    blockwise_diagonal,
    directional_curvature,
    gauss_newton_split,
    muon_conditions,
    ntk_spectrum,
    preconditioned_sharpness,
    sharpness,
    stack_conditions,
    trace,
)

OPERATORS = [Hessian, GaussNewton, NTK]
every_operator = pytest.mark.parametrize("operator", OPERATORS)
Operator = type[Hessian]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _loss(model: Any, x: Any) -> Tensor:
    return model(x).square().mean()


X = torch.linspace(-1, 1, 15).view(5, 3)


def _use(operator: Operator, model: nn.Module, loss: Any, batch: Any = X, *given: Any) -> Tensor:
    found = operator(model, loss, batch, *given)
    return found @ found.vector()


# ---------------------------------------------------------------------------------------- the loss


@every_operator
@pytest.mark.parametrize(
    "loss",
    [
        lambda model, x: torch.no_grad()(model)(x).square().mean(),
        lambda model, x: model(x).square().mean().detach(),
        lambda model, x: torch.tensor(model(x).square().mean().item()),
        lambda model, x: model(x).argmax(-1).sum(),
    ],
)
def test_loss_without_a_graph(operator: Operator, loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss without a graph"):
        _use(operator, _model(), loss)


@every_operator
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite(operator: Operator, bad: float) -> None:
    with pytest.raises(FloatingPointError, match=rf"loss of {bad}"):
        _use(operator, _model(), lambda model, x: _loss(model, x) + bad)


@every_operator
@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, x: model(x).square().mean(-1), r"\(5,\)"),
        (lambda model, x: model(x), r"\(5, 2\)"),
        (lambda model, x: {"loss": _loss(model, x)}, "dict"),
        (lambda model, x: _loss(model, x).item(), "float"),
        (lambda model, x: None, "NoneType"),
    ],
)
def test_loss_that_is_no_scalar(operator: Operator, loss: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"loss of shape {got}"):
        _use(operator, _model(), loss)


def test_one_entry_is_a_scalar() -> None:
    """As losses of shape (1,) or (1, 1) from data parallel models are."""
    found = Hessian(_model(), lambda model, x: _loss(model, x).view(1, 1), X)
    assert (found @ found.vector()).shape == (26,)


@every_operator
def test_loss_of_another_model(operator: Operator) -> None:
    model = _model()
    other = deepcopy(model)
    with pytest.raises(ValueError, match=r"depend on|model 0 times"):
        _use(operator, model, lambda _, x: other(x).square().mean())


@pytest.mark.parametrize("operator", [GaussNewton, NTK])
@pytest.mark.parametrize("times", [0, 2])
def test_loss_that_does_not_call_the_model_once(operator: Operator, times: int) -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return penalty + sum(_loss(model, x) for _ in range(times))

    with pytest.raises(ValueError, match=rf"model {times} times"):
        _use(operator, _model(), loss)
    assert _use(Hessian, _model(), loss).shape == (26,)


@pytest.mark.parametrize("operator", [GaussNewton, NTK])
def test_loss_that_takes_two_outputs(operator: Operator) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return h, self.b(h)

    def loss(model: Any, x: Tensor) -> Tensor:
        a, b = model(x)
        return (a + b).square().mean()

    with pytest.raises(ValueError, match=r"takes 2 .* model returns"):
        _use(operator, Two(), loss)


@pytest.mark.parametrize("operator", [GaussNewton, NTK])
def test_model_whose_output_has_no_graph(operator: Operator) -> None:
    class Classes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).sum() + model.weight.square().sum()

    with pytest.raises(ValueError, match=r"no tensor with a graph"):
        _use(operator, Classes(3, 2), loss)


def test_loss_that_takes_nothing_of_the_output() -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).detach().sum() + model[0].weight.square().sum()

    with pytest.raises(ValueError, match=r"not through .* model"):
        _use(GaussNewton, _model(), loss)


# --------------------------------------------------------------------------------- the parameters


@every_operator
def test_model_without_parameters(operator: Operator) -> None:
    with pytest.raises(ValueError, match=r"Tanh without parameters"):
        _use(operator, nn.Tanh(), _loss)


@every_operator
def test_all_frozen(operator: Operator) -> None:
    with pytest.raises(ValueError, match=r"4 parameters .* frozen"):
        _use(operator, _model().requires_grad_(False), _loss)


@every_operator
@pytest.mark.parametrize("names", [["0.weight"], ["2.bias", "0.*"], ["*"]])
def test_frozen_by_name(operator: Operator, names: list[str]) -> None:
    model = _model()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen .* 0\.weight"):
        _use(operator, model, _loss, X, names)


@every_operator
@pytest.mark.parametrize("name", ["weight", "1.*", "0.weights"])
def test_unknown_name(operator: Operator, name: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'.*0\.bias"):
        _use(operator, _model(), _loss, X, ["0.weight", name])


def test_unknown_column() -> None:
    with pytest.raises(ValueError, match=r"'nothing'.* no parameter"):
        Hessian(_model(), _loss, X, ["0.weight"], columns=["nothing"])


def test_name_of_a_tied_parameter() -> None:
    model = _model()
    model.tied = nn.Linear(3, 4)
    model.tied.weight = model[0].weight
    with pytest.raises(ValueError, match=r"tied parameter .* name"):
        Hessian(model, _loss, X, ["tied.weight"])


@every_operator
def test_no_names(operator: Operator) -> None:
    with pytest.raises(ValueError, match=r"empty .* parameters"):
        _use(operator, _model(), _loss, X, [])


@every_operator
def test_parameters_that_the_loss_does_not_use(operator: Operator) -> None:
    model = _model()
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"depends on.*parameters"):
        _use(operator, model, _loss, X, ["spare"])


@every_operator
def test_complex_parameters(operator: Operator) -> None:
    model = _model()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"complex parameter phase"):
        _use(operator, model, _loss)
    assert _use(operator, model, _loss, X, ["0.*"]).ndim == 1  # others may be complex


@every_operator
def test_integer_parameters_are_frozen_ones(operator: Operator) -> None:
    """As quantised weights are: the model may have them, the map is not about them."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(-7, 8, (4, 3), dtype=torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.codes.T.to(x) / 7).tanh())

    model = Quantised()
    features = (X.double() @ model.codes.T.double() / 7).tanh()
    expected = operator(deepcopy(model.head), _loss, features, dtype=torch.float64).to_dense()
    found = operator(model, _loss, X, dtype=torch.float64).to_dense()
    assert model.codes.dtype == torch.int8
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"frozen parameter codes"):
        _use(operator, model, _loss, X, ["codes"])


@every_operator
def test_sparse_gradients_are_taken_dense(operator: Operator) -> None:
    tokens = torch.tensor([[0, 1, 1], [4, 0, 2]])
    dense = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 2))
    sparse = deepcopy(dense)
    sparse[0].sparse = True
    expected = operator(dense, _loss, tokens).to_dense()
    assert torch.equal(operator(sparse, _loss, tokens).to_dense(), expected)
    assert sparse[0].sparse


# ------------------------------------------------------------------------------------ the batches


@every_operator
def test_no_batches(operator: Operator) -> None:
    empty = iter([X])
    next(empty)
    for batches in ([], empty):
        with pytest.raises(ValueError, match=r"no batches.*generator"):
            _use(operator, _model(), _loss, Batches(batches))


@every_operator
def test_generator_as_a_batch(operator: Operator) -> None:
    with pytest.raises(ValueError, match=r"generator as a batch"):
        _use(operator, _model(), _loss, (x for x in X))
    assert _use(operator, _model(), _loss, Batches(x for x in X)).ndim == 1


@pytest.mark.parametrize("batch", ["text", {"x": 3}, torch.tensor(1.0), None])
def test_batch_without_a_size(batch: Any) -> None:
    kind = type(batch).__name__
    with pytest.raises(ValueError, match=rf"{kind} without .*size="):
        Batches([X, batch])


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_sizes_that_cannot_be(size: float) -> None:
    with pytest.raises(ValueError, match=r"sizes .* positive"):
        Batches([X, X], size=lambda _: size)
    with pytest.raises(ValueError, match=r"sizes \[5\.0, 0\.0\]"):
        Batches([X, X[:0]])


# ------------------------------------------------------------------------------------ the vectors


@every_operator
@pytest.mark.parametrize("shape", [(3,), (), (3, 2), (3, 1, 1)])
def test_vector_of_the_wrong_shape(operator: Operator, shape: tuple[int, ...]) -> None:
    found = operator(_model(), _loss, X)
    n = found.shape[1]
    with pytest.raises(ValueError, match=rf"vector .* \({n},\)"):
        found @ torch.ones(shape)
    with pytest.raises(ValueError, match=rf"vector .*\({n}, 2\)"):
        found(torch.ones(n, 2))
    assert found.products == 0


def test_vector_for_a_cross_block() -> None:
    cross = Hessian(_model(), _loss, X, ["0.weight"], columns=["2.bias"])
    with pytest.raises(ValueError, match=r"vector .*\(12,\).*\(2,\)"):
        cross @ torch.ones(12)


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"batch_norm='train'"):
        Hessian(_model(), _loss, X, batch_norm="train")


# ------------------------------------------------------------ what cannot be differentiated twice


class Sine(torch.autograd.Function):
    """Differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Once(Sine):
    """Marked; torch raises for a backward pass to the leaves, but not to chosen inputs."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Sine.backward(ctx, g)


class Kernel(Sine):
    """Not marked, as fused kernels often are: the gradient does not know where it is from."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy((g * ctx.saved_tensors[0].cos()).detach().numpy())


class Within(nn.Module):
    """In a residual branch, so that a part of the derivatives stays."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h + self.function.apply(h))


def _inside(function: type[torch.autograd.Function]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return Within(function), _loss


def _last(function: type[torch.autograd.Function]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return _model(), lambda model, x: function.apply(model(x)).sum()


@every_operator
@pytest.mark.parametrize("function", [Once, Kernel])
def test_custom_functions_that_cut_the_graph(
    operator: Operator, function: type[torch.autograd.Function]
) -> None:
    """Autograd would leave out their part without a word: a Hessian that is wrong, not an error."""
    name = f"{function.__name__}Backward"
    with pytest.raises(NotImplementedError, match=rf"twice.*{name}"):
        _use(operator, *_inside(function))
    model, loss = _last(function)
    if operator is NTK:  # its products do not go through the loss
        assert torch.equal(NTK(model, loss, X).to_dense(), NTK(model, _loss, X).to_dense())
        return
    with pytest.raises(NotImplementedError, match=rf"twice.*{name}"):
        _use(operator, model, loss)


@every_operator
@pytest.mark.parametrize("build", [_inside, _last])
def test_custom_functions_that_are_fine(operator: Operator, build: Any) -> None:
    class Plain:
        apply = staticmethod(torch.sin)

    torch.manual_seed(0)
    ours = operator(*build(Sine), X).to_dense()
    torch.manual_seed(0)
    torch.testing.assert_close(ours, operator(*build(Plain), X).to_dense())


@every_operator
def test_custom_function_whose_gradient_is_zero(operator: Operator) -> None:
    """One that stops gradients is no cut: that is its derivative."""

    class Stop(Sine):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.zeros_like(g)

    class Detached:
        @staticmethod
        def apply(x: Tensor) -> Tensor:
            return x.sin().detach()

    torch.manual_seed(0)
    found = operator(*_inside(Stop), X).to_dense()
    torch.manual_seed(0)
    torch.testing.assert_close(found, operator(Within(Detached), _loss, X).to_dense())  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_operation_without_a_second_derivative(operator: Operator) -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        log_p = model(x).log_softmax(-1).unsqueeze(1)
        return F.ctc_loss(log_p, torch.ones(1, 2, dtype=torch.long), [5], [2])

    with pytest.raises(NotImplementedError, match=r"twice \(.*ctc_loss"):
        _use(operator, _model(), loss)


@every_operator
def test_embedding_bag(operator: Operator) -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match=r"twice \(.*embedding_bag"):
        _use(operator, model, _loss, torch.tensor([[0, 1], [2, 2]]))


@every_operator
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(operator: Operator, reentrant: bool) -> None:
    """They would compute again in every product, by then with dropout and other weights."""

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            again = torch.utils.checkpoint.checkpoint
            return self[2](again(self[1], self[0](x), use_reentrant=reentrant))

    expected = r"use_reentrant" if reentrant else r"activation checkpointing"
    with pytest.raises(RuntimeError, match=expected):
        _use(operator, Checkpointed(*_model()), _loss)


@every_operator
def test_errors_of_others_are_left_alone(operator: Operator) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be multiplied"):
        _use(operator, _model(), _loss, torch.ones(2, 7))


# ------------------------------------------------------------------ functions of two forms


LINEAR = nn.Linear(3, 2, bias=False)
ABOUT_HESSIANS = [
    (muon_conditions, ()),
    (blockwise_diagonal, ()),
    (gauss_newton_split, ()),
    (directional_curvature, ({"weight": torch.ones(2, 3)},)),
    (stack_conditions, ()),
    (preconditioned_sharpness, (torch.optim.SGD(LINEAR.parameters(), lr=0.1),)),
]


@pytest.mark.parametrize(("function", "more"), ABOUT_HESSIANS)
def test_functions_that_need_a_gradient_say_so(function: Any, more: Any) -> None:
    H, G = Hessian(LINEAR, _loss, X), GaussNewton(LINEAR, _loss, X)
    for other in (G, G.block("weight"), H - G, 2 * H):
        sentence = f"got a {type(other).__name__} for {function.__name__}, expected a Hessian"
        with pytest.raises(TypeError, match=sentence):
            function(other, *more)


def test_spectrum_of_a_kernel_needs_a_kernel() -> None:
    with pytest.raises(TypeError, match="got a Hessian for ntk_spectrum, expected an NTK"):
        ntk_spectrum(Hessian(LINEAR, _loss, X))


@pytest.mark.parametrize("function", [sharpness, trace, muon_conditions, ntk_spectrum])
def test_functions_name_themselves_and_what_they_take(function: Any) -> None:
    H, name = Hessian(LINEAR, _loss, X), function.__name__
    for arguments, options in (
        ((), {}),
        ((3,), {}),
        ((LINEAR,), {}),
        ((LINEAR, _loss), {}),
        ((_loss, LINEAR, X), {}),
        ((LINEAR, X, _loss), {}),
        ((LINEAR, _loss, X), {"tolerence": 1}),
        ((LINEAR,), {"loss": _loss}),
    ):
        with pytest.raises(TypeError, match=rf"{name}\(model, loss, batch") as refusal:
            function(*arguments, **options)
        assert "locals" not in str(refusal.value)
    if function is not ntk_spectrum:
        with pytest.raises(TypeError, match=rf"{name}\(H, "):
            function(H, _loss, X)


@pytest.mark.parametrize("function", [directional_curvature, preconditioned_sharpness])
def test_functions_name_the_argument_that_is_missing(function: Any) -> None:
    argument = "direction" if function is directional_curvature else "optimizer"
    for arguments in ((Hessian(LINEAR, _loss, X),), (LINEAR, _loss, X)):
        with pytest.raises(TypeError, match=rf"{argument}.*{function.__name__}\(H, {argument}"):
            function(*arguments)


def test_products_with_what_is_no_tensor() -> None:
    H = Hessian(LINEAR, _loss, X)
    for operator in (H, 2 * H, H + H):
        for vector in ([1, 2], 3.0, None):
            with pytest.raises(TypeError, match=r"expected a tensor \(6,\) or \(6, k\)"):
                operator @ vector  # type: ignore[operator]
