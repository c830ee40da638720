"""The training loop: a page that goes from batch to parameter, and can be killed anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

from steepest.curvature import SharpnessTracker
from steepest.diagnosis import LayerConditions
from steepest.lab.data import Data
from steepest.lab.errors import Diverged
from steepest.lab.files import read_json, write_json
from steepest.lab.interruption import deferred, raise_for
from steepest.lab.train import checkpoint
from steepest.lab.train.config import TrainConfig, reasons
from steepest.lab.train.cost import Clock, peak_memory, state_bytes
from steepest.lab.train.evaluation import evaluator, text_samples
from steepest.lab.train.longer import FREE, checked_to_go_on, kept_step
from steepest.lab.train.optimizers import build
from steepest.lab.train.profiling import profiler
from steepest.lab.train.run_folder import Metrics, opened, sentences_for_os_errors
from steepest.lab.train.schedule import factor
from steepest.lab.train.settings_file import write_settings
from steepest.lab.train.setup import RunSetup, data_of, set_up
from steepest.lab.train.sinks import Sink, sink
from steepest.lab.train.speed import Speed
from steepest.lab.user_code import sentences_for_errors

OnStep = Callable[[int, dict[str, Any]], None]


def train(
    config: TrainConfig,
    out: Path,
    data: Data | None = None,
    on_step: OnStep = lambda step, values: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Train, or go on where an earlier call with the same settings was stopped.

    Args:
        config: the settings.
        out: the run's folder, see `run_folder`.
        data: the data, if they are loaded already.
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
    data = data or data_of(config)
    settings = {**asdict(config), "data_sha256": data.sha256, "unit": data.unit}
    defaults = {**asdict(TrainConfig()), "unit": "tokens"}
    folder = opened(out, settings, defaults, free=FREE)
    with sentences_for_os_errors(out), folder as check_folder, deferred() as signals:
        go_on = checked_to_go_on(config, settings, out)
        if (out / "result.json").exists() and not go_on:
            result = read_json(out / "result.json")
            if result["status"] == "finished":
                say(f"{out} is finished already; nothing to do")
            return result
        with sentences_for_errors():
            setup = set_up(config, data)
        longer = go_on(setup) if go_on else None
        if longer:
            say(longer.said)
        with sentences_for_errors():
            training = Training(setup, out, say, began, longer.last if longer else None)
        if longer:
            longer.begin()
        write_settings(out, "train", config)
        try:
            return training.to_its_end(on_step, check_folder, signals)
        except Diverged as error:
            result = {"status": "diverged", "validation_loss": None, "reason": str(error)}
            write_json(out / "result.json", result)
            raise


class Training:
    """A run under way: what it trains, where it writes, and what it has measured."""

    def __init__(
        self,
        setup: RunSetup,
        out: Path,
        say: Callable[[str], None],
        began: float,
        last: int | None = None,
    ):
        """Make the optimizer, and load the newest checkpoint, not later than the step `last`."""
        config, model = setup.config, setup.model
        self.setup, self.config, self.out, self.say, self.began = setup, config, out, say, began
        self.optimizer = optimizer_of(setup)
        self.average = None
        if config.ema is not None:
            moving = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(model, multi_avg_fn=moving, use_buffers=True)
        self.judged = model if self.average is None else self.average.module
        self.loss_of = torch.compile(setup.loss) if config.compile else setup.loss
        self.evaluate = evaluator(setup)
        say(f"data: {setup.data}")
        for sentence in reasons(config, setup.data.unit, setup.per_pass):
            say(sentence)
        self.tracker = None
        if config.sharpness_every:
            self.tracker = SharpnessTracker(
                model, setup.loss, setup.first, self.optimizer, every=config.sharpness_every
            )
        self.state = checkpoint.RunState(
            model, self.optimizer, setup.batches, self.tracker, self.average
        )
        self.start, progress, damaged = checkpoint.load_latest(
            out / "checkpoints", self.state, last
        )
        for sentence in damaged:
            say(f"{sentence}; going on from step {self.start}")
        if self.start:
            say(f"going on from step {self.start} of {config.steps}")
        self.clock, self.speed = Clock(setup.device, **progress), Speed(setup)
        self.per_step = setup.per_pass * config.accumulate
        self.kept = kept_step(config)
        self.loss_now = math.nan

    def to_its_end(
        self, on_step: OnStep, check_folder: Callable[[], None], signals: list[int]
    ) -> dict[str, Any]:
        """Train, and return the result, which is in the folder then."""
        config, out = self.config, self.out
        start_seconds = time.perf_counter() - self.began
        metrics = Metrics(out, self.start, self.trackers())
        try:
            with profiler(config, out, self.say) as profile:
                for step in range(self.start, config.steps):
                    with _sentences(out, step + 1):
                        loss, rows = self.update(step)
                    profile.step()
                    done = step + 1
                    if done == self.start + 1:
                        checkpoint.check_loadable(self.optimizer, config.optimizer)
                    if self.logged(done) or self.shown(done):
                        self.loss_now = loss.item()
                        _check_finite(self.loss_now, done, out)
                    if self.logged(done):
                        check_folder()
                    with _sentences(out, done):
                        values = self.measure(done, rows, metrics)
                    stops = bool(signals) and done < config.steps
                    if stops or self.saves(done):
                        self.save(done)
                    on_step(done, values)
                    if stops:
                        self.say(
                            f"stopped after step {done} of {config.steps}, which is saved in {out}"
                        )
                        raise_for(signals)
        finally:
            metrics.close()
        result = self.result(start_seconds)
        write_json(out / "result.json", result)
        return result

    def trackers(self) -> list[Sink]:
        """Begin the trackers that were asked for, or go on with them."""
        made = [sink(name, self.out, self.say) for name in self.config.track]
        for tracker in made:
            tracker.start(self.out.name, asdict(self.config))
        return made

    def update(self, step: int) -> tuple[Tensor, list[Any]]:
        """Go from batches to parameters; return the loss, and the layerwise condition if due."""
        setup, config, clock = self.setup, self.config, self.clock
        clock.start()
        share = factor(step, config.steps, config.warmup_steps, config.schedule, config.final)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        loss = torch.zeros((), device=setup.device)
        with _probe(config, setup.model, step) as probe:
            run = self.loss_of if probe is None else setup.loss  # hooks need the model as it is
            for part in range(config.accumulate):
                batch = setup.batch(step, part)
                with setup.autocast():
                    part_loss = run(setup.model, batch) / config.accumulate
                part_loss.backward()
                loss += part_loss.detach()
            rows = probe.measure() if probe is not None and bool(loss.isfinite()) else []
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(setup.model.parameters(), config.clip)
        clock.optimizer_starts()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(setup.model)
        clock.stop(count=probe is None)
        return loss, rows

    def logged(self, done: int) -> bool:
        """Whether the loss of this step is written down."""
        return done in (1, self.config.steps) or done % self.config.log_every == 0

    def shown(self, done: int) -> bool:
        """Whether the loss of this step is read to be shown: the first one, and every tenth."""
        return done == self.start + 1 or done % max(1, self.config.steps // 10) == 0

    def measure(self, done: int, rows: list[Any], metrics: Metrics) -> dict[str, Any]:
        """Measure and write down what is due; return what is known of the step."""
        config, out = self.config, self.out
        costs = self.clock.totals()
        costs |= self.speed(costs["step_seconds"])
        values = {"tokens": done * self.per_step, "loss": self.loss_now, **costs}
        if self.logged(done):
            metrics.write("train", done, lr=self.optimizer.param_groups[0]["lr"], **values)
        for row in rows:
            metrics.write("condition", done, **row.as_dict())
        if self.tracker and (record := self.tracker.step()):
            _check_finite(record["sharpness"], done, out, "sharpness")
            metrics.write(**record)
        if done in (1, config.steps) or done % config.validate_every == 0:
            scores = self.evaluate(self.judged)
            _check_finite(scores["loss"], done, out)
            metrics.write("validation", done, **{**values, **scores})
            if config.samples:
                for text in text_samples(self.setup, self.judged, done):
                    metrics.write("sample", done, text=text)
        memory = peak_memory(self.setup.device)
        return {**values, "steps": config.steps, "unit": self.setup.data.unit, "memory": memory}

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due."""
        return done in (self.kept, self.config.steps) or _due(done, self.config.checkpoint_every)

    def save(self, done: int) -> None:
        """Write a checkpoint of what is finite."""
        _check_state(self.state, done, self.out)
        progress = self.clock.state()
        checkpoint.save(self.out / "checkpoints", done, self.state, progress, keep=self.kept)

    def result(self, start_seconds: float) -> dict[str, Any]:
        """Judge the weights at the end, and sum up what the run took."""
        setup = self.setup
        validation_began = time.perf_counter()
        scores = self.evaluate(self.judged)
        judged = {f"validation_{k}": scores[k] for k in ("loss", "accuracy") if k in scores}
        judged |= {k: scores[k] for k in ("bits_per_byte",) if k in scores}
        costs = self.clock.totals()
        return {
            "status": "finished",
            **judged,
            "validation_seconds": time.perf_counter() - validation_began,
            "start_seconds": start_seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "steps": self.config.steps,
            "tokens": self.config.steps * self.per_step,
            "unit": setup.data.unit,
            "parameters": sum(p.numel() for p in setup.model.parameters()),
            "optimizer_state_bytes": state_bytes(self.optimizer),
            "peak_memory_bytes": peak_memory(setup.device),
            **costs,
            **self.speed(costs["step_seconds"]),
        }


def optimizer_of(setup: RunSetup) -> Optimizer:
    """Return the optimizer of a run; each group remembers the rate that its schedule multiplies."""
    config = setup.config
    optimizer = build(
        config.optimizer,
        setup.model,
        config.rate,
        example=lambda model: setup.loss(model, setup.first),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adamw_lr=config.adamw_lr,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@contextmanager
def _sentences(out: Path, step: int) -> Iterator[None]:
    """Turn errors of batches, model, loss and optimizer into sentences; NaN is `Diverged`."""
    with sentences_for_errors():
        try:
            yield
        except FloatingPointError as error:  # from the optimizer or the probe
            raise Diverged(f"{out.name} at step {step}: {error}") from error


def _probe(
    config: TrainConfig, model: nn.Module, step: int
) -> AbstractContextManager[LayerConditions | None]:
    due = _due(step, config.conditions_every)
    return LayerConditions(model) if due else nullcontext()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_state(state: checkpoint.RunState, step: int, out: Path) -> None:
    """Raise `Diverged` unless all that a checkpoint would hold is finite."""
    names: dict[Tensor, str] = {p: name for name, p in state.model.named_parameters()}
    tensors: dict[str, Any] = {f"weights in {name}": p for p, name in names.items()}
    for key, memory in state.optimizer.state.items():
        owner = names.get(key, "other") if isinstance(key, Tensor) else str(key)
        for path, value in tree_leaves_with_path(memory):
            label = keystr(path).strip("[]'") or "all"
            tensors[f"memory of the optimizer ({label} of {owner})"] = value
    for i, value in enumerate(tree_leaves(state.tracker.state_dict() if state.tracker else {})):
        tensors[f"eigenvectors of the sharpness ({i})"] = value
    for label, value in tensors.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            _check_finite(math.nan, step, out, label)


def _check_finite(value: float, step: int, out: Path, name: str = "loss") -> None:
    if not math.isfinite(value):
        before = "; the checkpoints are from before" if (out / "checkpoints").exists() else ""
        raise Diverged(
            f"{out.name}: NaN or infinite {name} at step {step}{before}. Try a smaller --lr, a "
            "longer --warmup or --clip 1.0"
        )
