"""The training loop: a page that goes from batch to parameter, and can be killed anywhere."""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.diagnosis import LayerConditions
from steepest.lab.data import Corpus, Sampler, load, validation_batches
from steepest.lab.errors import Diverged, InputError
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.train import checkpoint
from steepest.lab.train.optimizers import FAMILIES, OptimizerName, build
from steepest.lab.train.run_folder import (
    Metrics,
    locked,
    open_folder,
    read_json,
    sentences_for_os_errors,
)
from steepest.lab.train.schedule import Schedule, factor


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; equal settings give equal results, bit for bit, on the same machine."""

    optimizer: OptimizerName = "muon"
    """What updates the matrices; everything else gets AdamW."""
    lr: float | None = None
    """Learning rate of the matrices; by default the middle of the grid of `steepest study`."""
    adamw_lr: float = 4e-3
    """Learning rate of AdamW for embeddings, head and vectors, the same for every optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    data: str = "stdlib"
    """"stdlib", "reference", or a path to a text file, a folder or a .bin file of tokens."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """The model's sizes."""
    steps: int = 300
    """Number of updates."""
    batch: int = 8
    """Sequences in each forward pass."""
    accumulate: int = 1
    """Forward passes in each update."""
    warmup: int = 20
    """Updates over which the learning rate rises linearly."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up."""
    final_lr: float = 0.0
    """What it falls to, as a fraction of its peak."""
    clip: float | None = None
    """Largest norm of the raw gradient over all parameters; updates are never clipped."""
    seed: int = 0
    """Seed of initialization and data order."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast."""
    compile: bool = False
    """Whether to compile the model; the optimizer is not, so no step recompiles."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": the accelerator if there is one."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    validate_every: int = 50
    """Updates between two measurements of the validation loss."""
    validate_windows: int = 64
    """Windows of the validation text in each of them, always the same."""
    conditions_every: int = 0
    """Updates between two measurements of the layerwise condition; 0 for none."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; 0 for one at the end only."""
    log_every: int = 10
    """Updates between two lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "validate_every", "validate_windows"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 1")
        for name in ("warmup", "conditions_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 0")
        for name in ("lr", "adamw_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"got {name}={value}, expected a finite number of at least 0")
        if self.log_every < 1:
            raise InputError(f"got log_every={self.log_every}, expected at least 1")

    @property
    def rate(self) -> float:
        """The learning rate of the matrices."""
        rates = FAMILIES[self.optimizer].rates
        return rates[len(rates) // 2] if self.lr is None else self.lr

    @property
    def tokens_per_step(self) -> int:
        """Tokens in each update."""
        return self.batch * self.accumulate * self.model.context


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
        Diverged: if the loss or a gradient is no longer finite.
        InputError: for data, sizes or folders that cannot work.
    """
    corpus = corpus or load(config.data)
    with sentences_for_os_errors(out):
        open_folder(out, {**asdict(config), "data_sha256": corpus.sha256})
        with locked(out):
            if (out / "result.json").exists():
                say(f"{out} is finished already; nothing to do")
                return dict(read_json(out / "result.json"))
            return _train(config, out, corpus, on_step, say)


def _train(
    config: TrainConfig, out: Path, corpus: Corpus, on_step: OnStep, say: Callable[[str], None]
) -> dict[str, Any]:
    began = time.perf_counter()
    device = _prepare(config)
    torch.manual_seed(config.seed)
    model = GPT(config.model, corpus.vocabulary).to(device)
    optimizer = build(config.optimizer, model, config.rate, config.adamw_lr, config.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    forward = torch.compile(model.loss) if config.compile else model.loss
    sampler = Sampler(corpus.train, config.batch, config.model.context, config.seed)
    evaluate = _evaluator(config, model, corpus, device)

    start, progress, damaged = checkpoint.load_latest(out / "checkpoints", model, optimizer)
    for sentence in damaged:
        say(f"{sentence}; going on from step {start}")
    if start:
        say(f"going on from step {start} of {config.steps}")
    clock = _Clock(device, **progress)
    metrics = Metrics(out, start)
    loss_now = math.nan
    start_seconds = time.perf_counter() - began
    try:
        for step in range(start, config.steps):
            clock.start()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(
                    step, config.steps, config.warmup, config.schedule, config.final_lr
                )
            probe = LayerConditions(model) if _due(step, config.conditions_every) else None
            loss = torch.zeros((), device=device)
            if probe is not None:
                probe.__enter__()
            for part in range(config.accumulate):
                inputs, targets = (t.to(device) for t in sampler.batch(step, part))
                with _autocast(config, device):
                    part_loss = forward(inputs, targets) / config.accumulate
                part_loss.backward()
                loss += part_loss.detach()
            if probe is not None:
                rows = probe.measure() if bool(loss.isfinite()) else []
                probe.__exit__()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            clock.optimizer_starts()
            try:
                optimizer.step()
            except FloatingPointError as error:
                raise Diverged(f"step {step + 1} of {out.name}: {error}") from error
            optimizer.zero_grad()
            clock.stop(count=probe is None)

            done = step + 1
            last = done == config.steps
            tokens = done * config.tokens_per_step
            if last or done % config.log_every == 0 or done == 1:
                loss_now = loss.item()
                _check_finite(loss_now, done, out)
                lr = optimizer.param_groups[0]["lr"]
                metrics.write("train", done, tokens=tokens, loss=loss_now, lr=lr, **clock.totals())
            if probe is not None:
                for row in rows:
                    metrics.write("condition", done, **row.as_dict())
            if last or done % config.validate_every == 0 or done == 1:
                value = evaluate()
                _check_finite(value, done, out)
                metrics.write("validation", done, tokens=tokens, loss=value, **clock.totals())
            if last or _due(done, config.checkpoint_every):
                _check_finite(sum(p.sum().item() for p in model.parameters()), done, out, "weights")
                checkpoint.save(out / "checkpoints", done, model, optimizer, clock.state())
            on_step(done, {"loss": loss_now, "tokens": tokens, **clock.totals()})
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
        "optimizer_state_bytes": _state_bytes(optimizer),
        "peak_memory_bytes": _peak_memory(device),
        **clock.totals(),
    }
    checkpoint.write_json(out / "result.json", result)
    return result


def _prepare(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"got device {config.device!r}, which is not to be had here; expected cpu, cuda or auto"
        ) from error
    if config.threads:
        torch.set_num_threads(config.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    return device


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


def _check_finite(value: float, step: int, out: Path, what: str = "loss") -> None:
    if not math.isfinite(value):
        raise Diverged(
            f"{out.name}: NaN or infinite {what} at step {step}; the checkpoints are from before. "
            "Try a smaller --lr, a longer --warmup or --clip 1.0"
        )


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock:
    """Seconds spent on updates, without validation, measurements and checkpoints."""

    def __init__(self, device: torch.device, seconds: float = 0.0, **recent: Any):
        self.device = device
        self.seconds = seconds
        self.step_times: list[float] = list(recent.get("step_times", []))
        self.optimizer_times: list[float] = list(recent.get("optimizer_times", []))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self._started = self._now()

    def optimizer_starts(self) -> None:
        self._optimizer_started = self._now()

    def stop(self, count: bool) -> None:
        """End a step; one that also measured something counts as long as a usual one."""
        now = self._now()
        if count:
            self.step_times.append(now - self._started)
            self.optimizer_times.append(now - self._optimizer_started)
        self.seconds += self.step_times[-1] if self.step_times else now - self._started

    def totals(self) -> dict[str, float | None]:
        if not self.step_times:
            return {"seconds": self.seconds, "step_seconds": None, "optimizer_share": None}
        step = statistics.median(self.step_times)
        optimizer = statistics.median(self.optimizer_times)
        return {
            "seconds": self.seconds,
            "step_seconds": step,
            "optimizer_share": optimizer / step,
        }

    def state(self) -> dict[str, Any]:
        """What the clock needs to go on after a restart."""
        return {
            "seconds": self.seconds,
            "step_times": self.step_times[-500:],
            "optimizer_times": self.optimizer_times[-500:],
        }
