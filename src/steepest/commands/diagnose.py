"""`steepest diagnose`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from steepest.commands.places import folder, page, report_room
from steepest.diagnosis import Level
from steepest.diagnosis.warmup import WARMUP_STEPS
from steepest.lab.errors import InputError
from steepest.lab.imports import (
    imported_loss,
    imported_model,
    imported_optimizer,
    imported_stream,
    taken,
    that_fit,
    with_known_generators,
)
from steepest.lab.studies.diagnosis_study import diagnosis_study
from steepest.lab.terminal import Countdown, bars, say
from steepest.lab.train.problem import check_clip
from steepest.lab.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say for each matrix of your model which norm it wants to descend in, and write a report.

    What is yours is named by import path, module:name, as seen from the current folder.
    For instance:
      steepest diagnose my_package.models:build --batches my_package.data:batches

    Exit codes: 0 some matrix has a verdict, 3 none has, 4 the audit has warnings, 2 bad input.
    """

    model: tyro.conf.Positional[str]
    """A function that returns the model, or the model itself."""
    batches: str
    """A function that returns batches, or the batches; an iterable of what the loss takes."""
    loss: str | None = None
    """A function loss(model, batch) -> scalar. By default model(**batch).loss where a batch is a
    mapping, otherwise the cross entropy of model(inputs) for batches (inputs, classes)."""
    count: int = 8
    """Batches that judge: 3 at least, 4 for "standard", 8 for "thorough"; more make intervals
    narrower. A warm-up takes those after them, one for each step if there are so many."""
    checkpoint: Path | None = None
    """Weights to load first: a state dict, from torch.save or safetensors."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Steps of Muon that a copy is trained for before it is judged: auto is 60 where the weights
    look untrained. 0 takes the weights as they are."""
    level: Level = "standard"
    """quick: a gradient for each batch. standard: real steps in each geometry, and curvature.
    thorough: a race of more real steps too."""
    optimizer: str | None = None
    """A function of the model that returns your optimizer, or several: its first step is audited
    for what it does to each parameter, and for common mistakes."""
    clip: float | None = None
    """The norm that your loop clips gradients to, above 0; for the audit of --optimizer."""
    monitored: Path | None = None
    """A file that steepest.Monitor wrote during training: for a map over the steps."""
    parameters: tuple[str, ...] = ()
    """Names or patterns of the parameters to look at; by default all matrices."""
    json: bool = False
    """Print JSON in place of the table."""
    out: Path | None = None
    """Folder for diagnosis.json, plan.toml and report.html; by default one under runs/."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        check_clip(self.clip)
        if self.clip is not None and self.optimizer is None:
            raise InputError("got --clip without --optimizer, whose audit it is for; give both")
        with_known_generators()
        model, stream = imported_model(self.model), imported_stream(self.batches)
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint)
        settings = {key: value for key, value in asdict(self).items() if key not in ("out", "json")}
        for key in ("monitored", "checkpoint"):
            settings[key] = settings[key] and str(settings[key])
        out = self.out or folder("diagnosis", settings)
        steps = WARMUP_STEPS if self.warmup_steps == "auto" else self.warmup_steps
        with bars() as shown:
            diagnosis, audited, summary = diagnosis_study(
                model,
                imported_loss(self.loss),
                taken(self.batches, stream, self.count),
                others=that_fit(self.batches, stream, max(0, steps)),
                level=self.level,
                parameters=self.parameters or None,
                warmup_steps=self.warmup_steps,
                optimizer=imported_optimizer(self.optimizer),
                clip=self.clip,
                monitored=self.monitored,
                out=out,
                settings=settings,
                on_progress=Countdown(shown, "diagnosing", "gradients"),
                say=say,
            )
        path = page(room, summary, out)
        if self.json:
            print(json.dumps(summary))
        else:
            Console().print(diagnosis.table())
            for warning in () if audited is None else audited.warnings:
                print(f"audit: {warning}")
            print(f"plan: {out / 'plan.toml'}")
            print(f"report: {path.resolve().as_uri()}")
        if all(row.verdict == "cannot tell" for row in diagnosis):
            sys.exit(3)
        if audited is not None and not audited.ok:
            sys.exit(4)
