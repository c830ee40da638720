"""The training loop: a page that goes from batch to parameter, and can be killed anywhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from steepest.curvature import SharpnessTracker
from steepest.diagnosis import LayerConditions
from steepest.lab.data import Corpus, Sampler, load, validation_batches
from steepest.lab.errors import Diverged, InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.interruption import deferred, raise_for
from steepest.lab.models import GPT
from steepest.lab.train import checkpoint
from steepest.lab.train.config import TrainConfig
from steepest.lab.train.cost import Clock, check_memory_of_gpt, peak_memory, state_bytes
from steepest.lab.train.optimizers import build
from steepest.lab.train.run_folder import (
    Metrics,
    opened,
    sentences_for_os_errors,
)
from steepest.lab.train.schedule import factor

OnStep = Callable[[int, dict[str, Any]], None]


def train(
    config: TrainConfig,
    out: Path,
    corpus: Corpus | None = None,
    on_step: OnStep = lambda step, values: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Train, or go on where an earlier call with the same settings was stopped.

    Args:
        config: the settings.
        out: the run's folder, see `run_folder`.
        corpus: the data, if it is loaded already.
        on_step: called after each update with its number and what is known of it.
        say: called with a sentence when something is worth knowing, such as a resumed run.

    Returns:
        The result, as in `result.json`.

    Raises:
        Diverged: if the loss, a gradient, a weight or the optimizer's memory is no longer finite.
        InputError: for data, sizes or folders that cannot work.
        KeyboardInterrupt: at Ctrl-C or SIGTERM (`Terminated`), once the step is finished and saved.
            A second signal ends the step too.
    """
    began = time.perf_counter()
    corpus = corpus or load(config.data)
    settings = {**asdict(config), "data_sha256": corpus.sha256}
    with sentences_for_os_errors(out), opened(out, settings) as check_folder, deferred() as signals:
        if (out / "result.json").exists():
            say(f"{out} is finished already; nothing to do")
            return read_json(out / "result.json")
        return _train(config, out, corpus, on_step, say, began, check_folder, signals)


def _train(
    config: TrainConfig,
    out: Path,
    corpus: Corpus,
    on_step: OnStep,
    say: Callable[[str], None],
    began: float,
    check_folder: Callable[[], None],
    signals: list[int],
) -> dict[str, Any]:
    device = check_run(config, corpus)
    torch.manual_seed(config.seed)
    model = GPT(config.model, corpus.vocabulary).to(device)
    sampler = Sampler(corpus.train, config.batch, config.model.context, config.seed)
    first = tuple(t.to(device) for t in sampler.batch(0, 0))
    optimizer = build(
        config.optimizer,
        model,
        config.rate,
        example=lambda model: model.loss(*first),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adamw_lr=config.adamw_lr,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    forward = torch.compile(model.loss) if config.compile else model.loss
    evaluate = _evaluator(config, model, corpus, device)

    say(f"data: {corpus}")
    tracker = None
    if config.sharpness_every:
        tracker = SharpnessTracker(model, _loss_of, first, optimizer, every=config.sharpness_every)
    start, progress = _resumed(config, out, model, optimizer, tracker, say)
    clock = Clock(device, **progress)
    metrics = Metrics(out, start)
    loss_now = math.nan
    start_seconds = time.perf_counter() - began
    try:
        for step in range(start, config.steps):
            clock.start()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(
                    step, config.steps, config.warmup_steps, config.schedule, config.final_lr
                )
            loss = torch.zeros((), device=device)
            with _probe(config, model, step) as probe:
                run = forward if probe is None else model.loss  # hooks need the model as it is
                for part in range(config.accumulate):
                    inputs, targets = (t.to(device) for t in sampler.batch(step, part))
                    with _autocast(config, device):
                        part_loss = run(inputs, targets) / config.accumulate
                    part_loss.backward()
                    loss += part_loss.detach()
                rows = probe.measure() if probe is not None and bool(loss.isfinite()) else []
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            clock.optimizer_starts()
            optimizer.step()
            optimizer.zero_grad()
            clock.stop(count=probe is None)

            done = step + 1
            last = done == config.steps
            tokens = done * config.tokens_per_step
            logged = last or done % config.log_every == 0 or done == 1
            if logged or done == start + 1:  # a run that goes on has a loss to show at once
                loss_now = loss.item()
                _check_finite(loss_now, done, out)
            if logged:
                check_folder()
                lr = optimizer.param_groups[0]["lr"]
                metrics.write("train", done, tokens=tokens, loss=loss_now, lr=lr, **clock.totals())
            for row in rows:
                metrics.write("condition", done, **row.as_dict())
            if tracker and (record := tracker.step()):
                _check_finite(record["sharpness"], done, out, "sharpness")
                metrics.write(**record)
            if last or done % config.validate_every == 0 or done == 1:
                value = evaluate()
                _check_finite(value, done, out)
                metrics.write("validation", done, tokens=tokens, loss=value, **clock.totals())
            stops = bool(signals) and not last
            if last or stops or _due(done, config.checkpoint_every):
                _check_state(model, optimizer, tracker, done, out)
                checkpoint.save(out / "checkpoints", done, model, optimizer, clock.state(), tracker)
            on_step(done, {"loss": loss_now, "tokens": tokens, **clock.totals()})
            if stops:
                say(f"stopped after step {done} of {config.steps}, which is saved in {out}")
                raise_for(signals)
    except FloatingPointError as error:  # from the optimizer or the probe
        raise Diverged(f"{out.name} at step {step + 1}: {error}") from error
    finally:
        metrics.close()
    validation_began = time.perf_counter()
    result = {
        "status": "finished",
        "validation_loss": evaluate(),
        "validation_seconds": time.perf_counter() - validation_began,
        "start_seconds": start_seconds,
        "wall_seconds": time.perf_counter() - began,
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer_state_bytes": state_bytes(optimizer),
        "peak_memory_bytes": peak_memory(device),
        **clock.totals(),
    }
    write_json(out / "result.json", result)
    return result


def _resumed(
    config: TrainConfig,
    out: Path,
    model: GPT,
    optimizer: Optimizer,
    tracker: SharpnessTracker | None,
    say: Callable[[str], None],
) -> tuple[int, dict[str, Any]]:
    """Load the latest checkpoint that is whole; return its step and its clock."""
    start, progress, damaged = checkpoint.load_latest(
        out / "checkpoints", model, optimizer, tracker
    )
    for sentence in damaged:
        say(f"{sentence}; going on from step {start}")
    if start:
        say(f"going on from step {start} of {config.steps}")
    return start, progress


def check_run(config: TrainConfig, corpus: Corpus) -> torch.device:
    """Return the device of a run; raise an `InputError` if it could not begin there.

    Neither the model nor a batch is made for that.
    """
    device, context = _prepare(config), config.model.context
    Sampler(corpus.train, config.batch, context, config.seed)
    next(validation_batches(corpus.validation, 1, context, windows=1))
    check_memory_of_gpt(config, corpus.vocabulary, device)
    return device


def _prepare(config: TrainConfig) -> torch.device:
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
    torch.use_deterministic_algorithms(True)
    return device


def _loss_of(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model.loss(*batch)


def _probe(
    config: TrainConfig, model: GPT, step: int
) -> AbstractContextManager[LayerConditions | None]:
    due = _due(step, config.conditions_every)
    return LayerConditions(model) if due else nullcontext()


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _evaluator(
    config: TrainConfig, model: GPT, corpus: Corpus, device: torch.device
) -> Callable[[], float]:
    """Return a function that gives the mean loss over the fixed validation windows."""
    batches = [
        (inputs.to(device), targets.to(device))
        for inputs, targets in validation_batches(
            corpus.validation, config.batch, config.model.context, config.validate_windows
        )
    ]

    @torch.no_grad()
    def evaluate() -> float:
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        for inputs, targets in batches:
            with _autocast(config, device):
                total += model.loss(inputs, targets).double() * targets.numel()
            count += targets.numel()
        return float(total / count)

    return evaluate


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_state(
    model: GPT, optimizer: Optimizer, tracker: SharpnessTracker | None, step: int, out: Path
) -> None:
    """Raise `Diverged` unless all that a checkpoint would hold is finite."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors = {f"weights in {name}": parameter for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"memory of the optimizer ({key} of {names[parameter]})"] = value
    for i, value in enumerate(tree_leaves(tracker.state_dict() if tracker else {})):
        tensors[f"eigenvectors of the sharpness ({i})"] = value
    for label, value in tensors.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            _check_finite(math.nan, step, out, label)


def _check_finite(value: float, step: int, out: Path, name: str = "loss") -> None:
    if not math.isfinite(value):
        raise Diverged(
            f"{out.name}: NaN or infinite {name} at step {step}; the checkpoints are from before. "
            "Try a smaller --lr, a longer --warmup or --clip 1.0"
        )
