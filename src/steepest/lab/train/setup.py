"""What a run begins with: device, data, model and loss, from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from steepest.lab.data import Data, Shape, TextShape, TrainingBatches, load, own_batches
from steepest.lab.errors import InputError
from steepest.lab.imports import imported_loss
from steepest.lab.losses import loss_of
from steepest.lab.models import build_model, load_start, recompute_activations, sizes_of
from steepest.lab.train.config import TrainConfig, settled
from steepest.lab.train.cost import check_memory
from steepest.lab.train.first_pass import check_first_pass
from steepest.lab.train.flops import flops_of
from steepest.lab.train.problem import Problem

_Loss = Callable[[Any, Any], Tensor]


@dataclass
class RunSetup:
    """A model, its loss and its batches, on the device where they are trained."""

    config: TrainConfig
    """The settings, with the steps that follow from tokens."""
    data: Data
    device: torch.device
    model: nn.Module
    loss: _Loss
    """`loss(model, batch) -> scalar`."""
    batches: TrainingBatches
    first: Any
    """The first training batch; it shows what parameters do, and sharpness is measured on it."""
    per_pass: int
    """Tokens, images or examples in a forward pass."""
    flops: int | None
    """Floating-point operations of a forward and a backward pass, where they can be counted."""

    def batch(self, step: int, part: int = 0) -> Any:
        """Return a training batch on the device."""
        return moved(self.batches.batch(step, part), self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass in the precision of the settings."""
        half = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


def data_of(problem: Problem) -> Data:
    """Load the data of a run or a study.

    Raises:
        InputError: for data that is missing, damaged or of another kind.
    """
    if problem.batches is not None:
        return own_batches(problem.batches, problem.validation)
    assert problem.data is not None
    return load(problem.data, tokenizer=problem.tokenizer, validation=problem.validation)


def set_up(config: TrainConfig, data: Data) -> RunSetup:
    """Make the model and its batches from the seed.

    Raises:
        InputError: for a device that is not there, and a model that does not fit data or memory.
    """
    device = check_run(config, data)
    if config.samples:
        if data.unit != "tokens":
            raise InputError(
                f"got samples={config.samples} with {data.unit}, expected 0 without text"
            )
        data.decode([])  # which tokens without a tokenizer refuse
    first = _first(config, data)
    per_pass = units_per_pass(config, data, first)
    config = settled(config, data.unit, per_pass)
    torch.manual_seed(config.seed)
    model = _model(config, data).to(device).train()
    loss = loss_of if config.loss is None else imported_loss(config.loss)
    first = moved(first, device)
    flops = flops_of(model, first, loss)  # before blocks are computed twice
    if config.recompute:
        recompute_activations(model)
    setup = RunSetup(
        config,
        data,
        device,
        model,
        loss,
        data.training(
            batch=config.sequences,
            context=config.context,
            seed=config.seed,
            parts=config.accumulate,
        ),
        first,
        per_pass,
        flops,
    )
    check_first_pass(model, first, loss, data.name, setup.autocast())
    return setup


def check_run(config: TrainConfig, data: Data) -> torch.device:
    """Return the device of a run; raise an `InputError` if it could not begin there.

    Neither the model nor a batch is made for that.
    """
    device = _prepared_device(config)
    data.training(batch=config.sequences, context=config.context, seed=config.seed)
    next(iter(data.validation(batch=1, context=config.context, count=1)))
    shape = data.shape(config.context)
    sizes = sizes_of(
        config.model, shape, width=config.width, depth=config.depth, options=config.model_options
    )
    if sizes is not None:
        _check_fits(config, sizes, shape, device)
    return device


def _check_fits(config: TrainConfig, sizes: Any, shape: Shape, device: torch.device) -> None:
    """Refuse a model of the lab that memory cannot hold, or whose batch it cannot.

    What is counted of a batch is less than what a run keeps: for text the logits, and eight numbers
    for each block, token and unit of width; for images their pixels.
    """
    parameters, constants = sizes.count(shape)
    number = 2 if config.precision == "bfloat16" else 4
    named = f"a model of width {sizes.width}"
    if depth := getattr(sizes, "depth", None):
        named += f", depth {depth}"
    if isinstance(shape, TextShape):
        named += f", context {shape.context} and a vocabulary of {shape.vocabulary}"
        count, tokens = f"{config.batch} x {shape.context} tokens", config.sequences * shape.context
        kept = (1 if config.recompute else 8) * sizes.width * sizes.depth
        activations = 8 * 2 * tokens + number * tokens * (kept + shape.vocabulary)
        remedy = "width, depth or context"
    else:
        assert shape is not None
        count, remedy = f"{config.batch} images", "width or depth"
        activations = 4 * config.sequences * shape.channels * shape.side**2
    check_memory(
        f"{named} ({parameters:,} parameters)",
        f"a batch of {count}",
        parameters=parameters,
        constants=constants,
        activations=activations,
        device=device,
        remedy=remedy,
    )


def units_per_pass(config: TrainConfig, data: Data, first: Any) -> int:
    """Return how many tokens, images or examples a forward pass has."""
    if data.unit == "tokens":
        assert config.context is not None
        return config.sequences * config.context
    tensors = [leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 1


def moved(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on the device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _first(config: TrainConfig, data: Data) -> Any:
    """The first batch of a source of its own, so that a stream stays at its beginning."""
    return data.training(batch=config.sequences, context=config.context, seed=config.seed).batch(0)


def _model(config: TrainConfig, data: Data) -> nn.Module:
    model = build_model(
        config.model,
        data.shape(config.context),
        width=config.width,
        depth=config.depth,
        options=config.model_options,
    )
    if config.weights is not None:
        load_start(model, config.weights)
    return model


def _prepared_device(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta" cannot
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"got device {config.device!r}, which is not to be had here; expected cpu, cuda or auto"
        ) from error
    if config.threads:
        torch.set_num_threads(config.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    return device
