"""Weights that nobody has trained yet: how to see it, and a copy that is trained a little first.

At initialization the first steps of a network only learn what every batch says, such as which
tokens are frequent. Gradients have next to rank one, and a verdict is about those steps alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from statistics import fmean, median
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from steepest.curvature.loss_function import Loss, LossFunction, checked
from steepest.diagnosis.plan import Plan
from steepest.random_numbers import seeded

Steps = int | Literal["auto"]
WARMUP_STEPS = 60
"""Of a warm-up where the weights look fresh."""
LEARNING_RATES = (0.02, 0.005, 0.00125)
"""The default of Muon first; the next one where the loss did not fall."""
JUDGING = 8
"""Batches that judge where a warm-up takes the others; half of them where there are fewer."""
LEARNED = 3.0
"""Weights look fresh if their loss lies below that of shuffled ones by less than this."""
SHUFFLES = 16
"""Of the weights, to see whether they look fresh."""


@dataclass(frozen=True)
class WarmUp:
    """How a copy of the model was trained before it was judged.

    Attributes:
        optimizer: which.
        lr: its rate.
        steps: how many.
        batches: on how many batches, none of which judges; they are cycled over.
        loss_before, loss_after: the mean over the batches that judge.
    """

    optimizer: str
    lr: float
    steps: int
    batches: int
    loss_before: float
    loss_after: float

    def __str__(self) -> str:
        """Return for instance `60 steps of Muon at a rate of 0.02 on 8 batches ...`."""
        times = self.steps / self.batches
        cycled = f" ({times:.1f} times each)" if times > 1 else ""
        return (
            f"{self.steps} steps of {self.optimizer} at a rate of {self.lr:g} on {self.batches} "
            f"batches that judge nothing{cycled}; the loss of those that judge went from "
            f"{self.loss_before:.3g} to {self.loss_after:.3g}"
        )


def checked_steps(steps: Any) -> Steps:
    """Return `warmup_steps` if it can be one.

    Raises:
        ValueError: otherwise.
    """
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    if steps != "auto" and not whole:
        raise ValueError(
            f'got warmup_steps={steps!r}, expected "auto" or a whole number of at least 0'
        )
    return cast(Steps, steps)


def looks_fresh(function: LossFunction, batches: Sequence[Any]) -> bool:
    """Return whether weights do no better than their own entries in random order.

    Weights look fresh if `learned` is below `LEARNED`, for normal losses 5.3 standard deviations.

    Args:
        function, batches: as for `learned`.
    """
    return not learned(function, batches) >= LEARNED


def learned(function: LossFunction, batches: Sequence[Any]) -> float:
    """Return how far the loss lies below that of shuffled weights, over the spread of those.

    Independent entries of one distribution may as well be shuffled; what an optimizer has learned
    is lost, whichever it was. All trained matrices are shuffled `SHUFFLES` times. The result is the
    distance of the loss from the median over that of the lowest, in logarithms where losses are
    positive. Chance alone keeps it near 1 or below; it is 0 where shuffling changes nothing.

    Args:
        function: the loss of a model; its parameters move, and are put back.
        batches: losses are compared on the first one.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(8, 4)
    >>> x = torch.randn(100, 8)
    >>> loss = lambda model, batch: (model(batch) - batch[:, :4]).square().mean()
    >>> learned(LossFunction(model, loss), [x]) < LEARNED
    True
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.eye(4, 8))
    >>> learned(LossFunction(model, loss), [x]) < LEARNED
    False
    """
    with seeded(0), torch.no_grad():
        whole = _mean_loss(function, batches[:1])
        matrices = [p for p in function.parameters.values() if p.ndim > 1]
        before = [W.clone() for W in matrices]
        losses = []
        try:
            for _ in range(SHUFFLES):
                for W in matrices:
                    W.copy_(W.flatten()[torch.randperm(W.numel(), device=W.device)].view_as(W))
                losses.append(_mean_loss(function, batches[:1]))
        finally:
            for W, start in zip(matrices, before, strict=True):
                W.copy_(start)
    if min(whole, *losses) > 0:
        whole, losses = math.log(whole), [math.log(value) for value in losses]
    lowest, middle = min(losses), median(losses)
    if not math.isfinite(whole) or whole >= middle:
        return 0.0
    return (middle - whole) / (middle - lowest) if middle > lowest else math.inf


def divided(
    batches: Sequence[Any], others: Sequence[Any], fewest: int
) -> tuple[list[Any], list[Any]]:
    """Return the batches that judge and those of a warm-up, which share none.

    Args:
        batches: what judges, if there are enough others.
        others: what a copy is trained on then.
        fewest: that can judge.

    Raises:
        ValueError: where there are too few of both.
    """
    if len(others) >= fewest - 1:
        return list(batches), list(others)
    together = [*batches, *others]
    judging = max(fewest, min(JUDGING, len(together) - len(together) // 2))
    if len(together) < judging + fewest - 1:
        raise ValueError(
            f"got {len(together)} batches, expected at least {2 * fewest - 1} to warm up on some "
            "and to judge by the others; or pass warmup_steps=0"
        )
    return together[:judging], together[judging:]


def warmed_up(
    function: LossFunction,
    batches: Sequence[Any],
    judges: Sequence[Any],
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[LossFunction, WarmUp]:
    """Return the loss of a copy of the model that Muon has trained, and what was done.

    The copy has float32 or more. It is trained in training mode, and has the model's modes then.

    Args:
        function: the loss of the model, as a function of all trained parameters.
        batches: to train on, in turns.
        judges: batches of which the loss is told.
        steps: how many.
        tick: called after each gradient.

    Raises:
        ValueError: for a model that cannot be copied. Also for a loss that does not use the model
            that it gets, or that does not fall at any rate.
    """
    model, loss = function.model, function.loss
    dtype = function.chosen_dtype or reduce(
        torch.promote_types, (p.dtype for p in model.parameters()), torch.float32
    )
    with seeded(0):
        before = _mean_loss(function, judges)
        for lr in LEARNING_RATES:
            copy = _copied(model).to(dtype)
            if _train(copy, loss, [tree_map(_cast(dtype), b) for b in batches], lr, steps, tick):
                trained = function.of_model(copy)
                after = _mean_loss(trained, judges)
                if after < before:
                    for ours, theirs in zip(copy.modules(), model.modules(), strict=True):
                        ours.training = theirs.training
                    return trained, WarmUp("Muon", lr, steps, len(batches), before, after)
    tried = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    raise ValueError(
        f"got a loss of {before:.3g} that {steps} steps of Muon do not lower (rates {tried}), "
        "expected one that falls; train the model a little in your own way and diagnose it then, "
        "or take the weights as they are with warmup_steps=0"
    )


def _train(
    copy: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    lr: float,
    steps: int,
    tick: Callable[[], None],
) -> bool:
    """Whether the loss stayed finite."""
    if not copy.training:
        copy.train()
    for module in copy.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    weights = [p for p in copy.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is hardly a matrix is no matter here
        optimizer = Plan.default(copy).optimizer(copy, lr)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            value = checked(loss(copy, batches[step % len(batches)]))
            if not value.isfinite():
                return False
            gradients = torch.autograd.grad(value.sum(), weights, allow_unused=True)
            if all(g is None for g in gradients):
                raise ValueError(
                    "got a loss that does not use the model that it gets, so a copy cannot be "
                    "warmed up; compute it with its first argument, or pass warmup_steps=0"
                )
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            try:
                optimizer.step()
            except FloatingPointError:
                return False
            tick()
    optimizer.zero_grad()
    return True


def _mean_loss(function: LossFunction, batches: Sequence[Any]) -> float:
    """Infinite where it is not finite."""
    try:
        return fmean(function(batch).item() for batch in batches)
    except FloatingPointError:
        return math.inf


def _copied(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"got a {type(model).__name__} that cannot be copied for a warm-up "
            f"({type(error).__name__}: {error}); pass warmup_steps=0 to diagnose the weights as "
            "they are"
        ) from error


def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return cast
