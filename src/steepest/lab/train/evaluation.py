"""How good a model is: its loss on fixed batches, bits per byte, accuracy, and texts it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab.data import examples_in
from steepest.lab.losses import cross_entropy, entry_of, logits_of, loss_of, own_loss
from steepest.lab.train.setup import RunSetup, moved

IMAGES_PER_WINDOW = 100
PROMPT, LENGTH = 16, 128
"""Tokens that a sample begins with, and that are drawn."""
IGNORED = -100
"""The class of tokens that no loss counts, as PyTorch has it."""


def evaluator(setup: RunSetup) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function of the model that gives its scores on the fixed validation batches.

    The scores are `loss` in nats a token, image or example; `accuracy` for classes of images; and
    `bits_per_byte` for text whose bytes are known.
    """
    config, data = setup.config, setup.data
    a_window = {"tokens": 1, "images": IMAGES_PER_WINDOW}.get(data.unit, config.sequences)
    count = config.validate_windows * a_window
    batches = [
        moved(batch, setup.device)
        for batch in data.validation(batch=config.sequences, context=config.context, count=count)
    ]

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        totals = torch.zeros(3, dtype=torch.float64, device=setup.device)
        with evaluating(model):
            for batch in batches:
                with setup.autocast():
                    totals += _scores(setup, model, batch)
        loss, correct, count = totals.tolist()
        scores = {"loss": loss / count}
        if not math.isnan(correct):
            scores["accuracy"] = correct / count
        if data.bytes_per_token is not None:
            scores["bits_per_byte"] = scores["loss"] / math.log(2) / data.bytes_per_token
        return scores

    return evaluate


def _scores(setup: RunSetup, model: nn.Module, batch: Any) -> Tensor:
    """Sum of the losses, number of right answers (NaN where there are none), number of examples.

    A loss of the user's own, or of the model's, is the mean over the examples of its batch.
    """
    none = torch.tensor(math.nan, dtype=torch.float64, device=setup.device)
    if setup.loss is loss_of and isinstance(batch, Mapping):
        outputs = model(**batch)
        return _with_count(own_loss(outputs, batch), _right_of_labels(outputs, batch, none), batch)
    if setup.loss is not loss_of or not _has_classes(batch):
        return _with_count(setup.loss(model, batch), none, batch)
    inputs, classes = batch
    logits = logits_of(model, inputs)
    counted = classes != IGNORED
    count = counted.sum().double()
    correct = none
    if classes.dim() == 1:
        correct = ((logits.argmax(dim=-1) == classes) & counted).sum().double()
    return torch.stack((cross_entropy(logits, classes).double() * count, correct, count))


def _with_count(loss: Tensor, correct: Tensor, batch: Any) -> Tensor:
    loss = loss.double()
    count = torch.full_like(loss, examples_in(batch))
    return torch.stack((loss * count, correct, count))


def _right_of_labels(outputs: Any, batch: Mapping[str, Any], none: Tensor) -> Tensor:
    """Right answers to a batch as Hugging Face has it: a class in `labels` for each example."""
    labels, logits = batch.get("labels"), entry_of(outputs, "logits", None)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
        return none
    if labels.is_floating_point() or labels.dim() != 1 or logits.dim() != 2:
        return none
    return (logits.argmax(dim=-1) == labels).sum().double()


def _has_classes(batch: Any) -> bool:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    return pair and isinstance(batch[1], Tensor) and not batch[1].is_floating_point()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and the modes of training back on afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def text_samples(setup: RunSetup, model: nn.Module, step: int) -> list[str]:
    """Return texts that go on where pieces of the validation text end, the prompt included.

    A token is drawn from the probabilities of the model, by a generator of its own: training draws
    the same numbers with samples as without.
    """
    config, data = setup.config, setup.data
    assert config.context is not None
    windows = data.validation(batch=1, context=config.context, count=config.samples)
    texts = []
    generator = torch.Generator().manual_seed(config.seed + step)
    with evaluating(model), setup.autocast():
        for inputs, _ in windows:
            tokens = inputs[0, :PROMPT].tolist()
            for _ in range(LENGTH):
                seen = torch.tensor([tokens[-config.context :]], device=setup.device)
                logits = logits_of(model, seen)[0, -1].float().cpu()
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens.append(int(drawn))
            texts.append(data.decode(tokens))
    return texts
