"""Two forms of a function: of an operator, and of the (model, loss, batch) that it is made of.

A function is written for an operator, `sharpness(H)`. With a decorator of this file it also makes
the operator: `sharpness(model, loss, batch, dtype=torch.float64)` is
`sharpness(Hessian(model, loss, batch, dtype=torch.float64))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from torch import nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.linear_map import CurvatureOperator
from steepest.curvature.loss_function import Loss
from steepest.curvature.operators import Hessian, LossOperator

Operator = TypeVar("Operator", bound=CurvatureOperator)
Operator_contra = TypeVar("Operator_contra", bound=CurvatureOperator, contravariant=True)
Argument = TypeVar("Argument")
Argument_contra = TypeVar("Argument_contra", contravariant=True)
Options = ParamSpec("Options")
Result = TypeVar("Result")
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
    build: Callable[..., LossOperator],
) -> Callable[
    [Callable[Concatenate[Operator, Options], Result]], OfParameters[Operator, Options, Result]
]:
    """Let a function take what `build` makes an operator of in place of the operator.

    Args:
        build: an operator's class, or a function with the same arguments.
    """

    def decorate(
        function: Callable[Concatenate[Operator, Options], Result],
    ) -> OfParameters[Operator, Options, Result]:
        of_operator: Callable[..., Result] = function

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
        ) -> Result:
            settings = {"batch_norm": batch_norm, "dtype": dtype, "keep_graphs": keep_graphs}
            return of_operator(build(model, loss, batch, parameters, **settings), **options)

        return cast(OfParameters[Operator, Options, Result], _either(of_operator, of_model))

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
    [Callable[Concatenate[Hessian, Argument, Options], Result]],
    OfArgument[Argument, Options, Result],
]:
    """Let a function take (model, loss, batch) in place of a Hessian.

    Args:
        parameters: from the model, the argument and the options to the names that the Hessian is
            about.
    """

    def decorate(
        function: Callable[Concatenate[Hessian, Argument, Options], Result],
    ) -> OfArgument[Argument, Options, Result]:
        of_operator: Callable[..., Result] = function

        def of_model(
            model: nn.Module,
            loss: Loss,
            batch: Any,
            *argument: object,
            batch_norm: BatchNorm = "eval",
            dtype: torch.dtype | None = None,
            keep_graphs: bool | None = None,
            **options: object,
        ) -> Result:
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

        return cast(OfArgument[Argument, Options, Result], _either(of_operator, of_model))

    return decorate


def _either(
    of_operator: Callable[..., Result], of_model: Callable[..., Result]
) -> Callable[..., Result]:
    @wraps(of_operator)
    def either(*arguments: object, **options: object) -> Result:
        is_operator = bool(arguments) and isinstance(arguments[0], CurvatureOperator)
        return (of_operator if is_operator else of_model)(*arguments, **options)

    return either
