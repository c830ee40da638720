"""Two forms of a function: of an operator, and of the (model, loss, batch) that it is made of.

A function is written for an operator, `sharpness(H)`. With a decorator of this file it also makes
the operator: `sharpness(model, loss, batch, dtype=torch.float64)` is
`sharpness(Hessian(model, loss, batch, dtype=torch.float64))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from torch import nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.linear_map import CurvatureOperator
from steepest.curvature.loss_function import Loss
from steepest.curvature.operators import NTK, Hessian, LossOperator

OperatorType = TypeVar("OperatorType", bound=CurvatureOperator)
Operator_contra = TypeVar("Operator_contra", bound=CurvatureOperator, contravariant=True)
Argument = TypeVar("Argument")
Argument_contra = TypeVar("Argument_contra", contravariant=True)
Options = ParamSpec("Options")
Answer = TypeVar("Answer")
Result_co = TypeVar("Result_co", covariant=True)


class OfParameters(Protocol[Operator_contra, Options, Result_co]):
    """`f(H, ...)`, and `f(model, loss, batch, parameters, ...)` with the settings of operators."""

    @overload
    def __call__(
        self, H: Operator_contra, /, *_: Options.args, **options: Options.kwargs
    ) -> Result_co: ...
    @overload
    def __call__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        parameters: Sequence[str] | str | None = ...,
        batch_norm: BatchNorm = ...,
        dtype: torch.dtype | None = ...,
        keep_graphs: bool | None = ...,
        *_: Options.args,
        **options: Options.kwargs,
    ) -> Result_co: ...


def of_parameters(
    build: Callable[..., LossOperator], operator: type[CurvatureOperator] = CurvatureOperator
) -> Callable[
    [Callable[Concatenate[OperatorType, Options], Answer]],
    OfParameters[OperatorType, Options, Answer],
]:
    """Let a function take what `build` makes an operator of in place of the operator.

    Args:
        build: an operator's class, or a function with the same arguments.
        operator: the class that the function needs; any by default.
    """

    def decorate(
        function: Callable[Concatenate[OperatorType, Options], Answer],
    ) -> OfParameters[OperatorType, Options, Answer]:
        of_operator: Callable[..., Answer] = function

        def of_model(
            model: nn.Module,
            loss: Loss,
            batch: Any,
            parameters: Sequence[str] | str | None = None,
            *,
            batch_norm: BatchNorm = "eval",
            dtype: torch.dtype | None = None,
            keep_graphs: bool | None = None,
            **options: object,
        ) -> Answer:
            settings = {"batch_norm": batch_norm, "dtype": dtype, "keep_graphs": keep_graphs}
            return of_operator(build(model, loss, batch, parameters, **settings), **options)

        return cast(
            OfParameters[OperatorType, Options, Answer], _either(of_operator, of_model, operator)
        )

    return decorate


class OfArgument(Protocol[Argument_contra, Options, Result_co]):
    """`f(H, argument, ...)`, and `f(model, loss, batch, argument, ...)` with those settings.

    The argument may be left out by functions that take None for it.
    """

    @overload
    def __call__(
        self, H: Hessian, argument: Argument_contra, /, *_: Options.args, **options: Options.kwargs
    ) -> Result_co: ...
    @overload
    def __call__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        argument: Argument_contra,
        /,
        batch_norm: BatchNorm = ...,
        dtype: torch.dtype | None = ...,
        keep_graphs: bool | None = ...,
        *_: Options.args,
        **options: Options.kwargs,
    ) -> Result_co: ...
    @overload
    def __call__(
        self: OfArgument[None, Options, Result_co],
        H: Hessian,
        /,
        *_: Options.args,
        **options: Options.kwargs,
    ) -> Result_co: ...
    @overload
    def __call__(
        self: OfArgument[None, Options, Result_co],
        model: nn.Module,
        loss: Loss,
        batch: Any,
        /,
        batch_norm: BatchNorm = ...,
        dtype: torch.dtype | None = ...,
        keep_graphs: bool | None = ...,
        *_: Options.args,
        **options: Options.kwargs,
    ) -> Result_co: ...


def of_argument(
    parameters: Callable[..., list[str]],
) -> Callable[
    [Callable[Concatenate[Hessian, Argument, Options], Answer]],
    OfArgument[Argument, Options, Answer],
]:
    """Let a function take (model, loss, batch) in place of a Hessian.

    Args:
        parameters: from the model, the argument and the options to the names that the Hessian is
            about.
    """

    def decorate(
        function: Callable[Concatenate[Hessian, Argument, Options], Answer],
    ) -> OfArgument[Argument, Options, Answer]:
        of_operator: Callable[..., Answer] = function

        def of_model(
            model: nn.Module,
            loss: Loss,
            batch: Any,
            *argument: object,
            batch_norm: BatchNorm = "eval",
            dtype: torch.dtype | None = None,
            keep_graphs: bool | None = None,
            **options: object,
        ) -> Answer:
            names = parameters(model, *argument, **options)
            H = Hessian(
                model,
                loss,
                batch,
                names,
                batch_norm=batch_norm,
                dtype=dtype,
                keep_graphs=keep_graphs,
            )
            return of_operator(H, *argument, **options)

        return cast(OfArgument[Argument, Options, Answer], _either(of_operator, of_model, Hessian))

    return decorate


def _either(
    of_operator: Callable[..., Answer],
    of_model: Callable[..., Answer],
    operator: type[CurvatureOperator],
) -> Callable[..., Answer]:
    name = of_operator.__name__
    _, *more = signature(of_operator).parameters.values()
    needed = "".join(f", {p.name}" for p in more if p.kind is p.POSITIONAL_OR_KEYWORD)
    kind = _KINDS.get(operator, "an operator")
    expected = (
        f"{name} takes {kind}, or a model, a loss and a batch in its place: "
        f"{name}(H{needed}, ...) or {name}(model, loss, batch{needed}, ...)"
    )

    @wraps(of_operator)
    def either(*arguments: object, **options: object) -> Answer:
        if arguments and isinstance(arguments[0], CurvatureOperator):
            if not isinstance(arguments[0], operator):
                raise TypeError(
                    f"got a {type(arguments[0]).__name__} for {name}, expected {kind}"
                    + _WHY.get(operator, "")
                )
            _bind(of_operator, arguments, options, expected)
            return of_operator(*arguments, **options)
        model = arguments[0] if arguments else options.get("model")
        if not isinstance(model, nn.Module):
            raise TypeError(f"got {_described(model)} first; {expected}")
        _bind(of_model, arguments, options, expected)
        own = signature(of_model).parameters
        others = {key: value for key, value in options.items() if key not in own}
        if "argument" in own:
            _bind(of_operator, (None, *arguments[3:]), others, expected)
        else:
            _bind(of_operator, (None,), others, expected)
        loss = arguments[1] if len(arguments) > 1 else options.get("loss")
        if not callable(loss):
            raise TypeError(f"got {_described(loss)} as loss; {expected}")
        return of_model(*arguments, **options)

    return either


_KINDS: dict[type[CurvatureOperator], str] = {Hessian: "a Hessian", NTK: "an NTK"}
_WHY: dict[type[CurvatureOperator], str] = {
    Hessian: ", whose loss has a gradient: Hessian(model, loss, batch), or a block of it",
    NTK: ": NTK(model, loss, batch)",
}


def _bind(
    function: Callable[..., object],
    arguments: Sequence[object],
    options: Mapping[str, object],
    expected: str,
) -> None:
    try:
        signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"{error}; {expected}") from None


def _described(value: object) -> str:
    return "nothing" if value is None else f"a value of the type {type(value).__name__}"
