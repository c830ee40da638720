"""`steepest train`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from steepest.commands.places import folder, page, report_room
from steepest.lab.errors import InputError
from steepest.lab.studies.run_summary import run_summary
from steepest.lab.terminal import bars, say, screen
from steepest.lab.train import TrainConfig
from steepest.lab.train import train as trained
from steepest.lab.train.dry_run import dry_run
from steepest.lab.train.optimizers import spec_slug
from steepest.printing import rough_duration

QUIET_SECONDS = 30
"""Seconds between two lines where there is no terminal to show a bar in."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Train a model once, and write its weights, measurements and report into a folder.

    A run that was stopped goes on with the same command. Ctrl-C and SIGTERM finish the step and
    save it first; a second one ends the run at once. For instance:
      steepest train --data my_texts/ --width 128 --optimizer muon --lr 0.02
      steepest train --model hf:vit --data cifar10 --batch 64 --steps 2000 --dry-run
      steepest train --model my_package:build --batches my_package:data --optimizer adamw
    """

    config: Path | None = None
    """A TOML file of settings, such as the config.toml of a run. Options that are typed take
    precedence over it."""
    dry_run: bool = False
    """Print parameters, rates, memory and time; time a few steps for that, and keep nothing."""
    out: Path | None = None
    """Folder of the run; by default one under runs/ whose name depends on all settings. A run
    that goes on with more steps needs it."""

    def run(self) -> None:
        """Run the command."""
        names = [field.name for field in fields(TrainConfig)]
        config = TrainConfig(**{name: getattr(self, name) for name in names})
        if self.dry_run:
            Console().print(dry_run(config, say))
            return
        out = self.out or folder(f"train-{spec_slug(config.optimizer)}", asdict(config))
        with bars() as shown:
            bar = shown.add_task("training", total=config.steps, detail="")
            began = time.monotonic()
            latest = 0.0

            def on_step(step: int, values: dict[str, Any]) -> None:
                nonlocal latest
                detail = _detail(values)
                shown.update(bar, completed=step, total=values["steps"], detail=detail)
                spent = time.monotonic() - began
                tenth = step % max(1, values["steps"] // 10) == 0 or step == 1
                if not screen.is_terminal and (tenth or spent - latest > QUIET_SECONDS):
                    latest = spent
                    screen.print(
                        f"step {step} of {values['steps']}  {detail}  {rough_duration(spent)}"
                    )

            result = trained(config, out, on_step=on_step, say=say)
        if result["status"] != "finished":
            raise InputError(f"{out} is a run that diverged: {result.get('reason')}")
        unit = result.get("unit", "tokens")
        loss = f"validation loss {result['validation_loss']:.4f} nats per {unit[:-1]}"
        print(f"{loss}{_scores(result)} after {result['tokens']:,} {unit}; run: {out}")
        try:
            report = report_room()
        except InputError as error:
            say(f"no report: {error}")
            return
        print(f"report: {page(report, run_summary(out), out).resolve().as_uri()}")


def _detail(values: dict[str, Any]) -> str:
    """Loss, speed, share of the processor's arithmetic, and memory."""
    parts = [f"loss {values['loss']:.3f}"]
    if speed := values.get("units_per_second"):
        parts.append(f"{speed:,.0f} {values['unit']}/s")
    if share := values.get("mfu"):
        parts.append(f"MFU {share:.0%}")
    parts.append(f"{values['memory'] / 1e9:.1f} GB")
    return "  ".join(parts)


def _scores(result: dict[str, Any]) -> str:
    bits, accuracy = result.get("bits_per_byte"), result.get("validation_accuracy")
    said = "" if bits is None else f", {bits:.4f} bits per byte"
    return said + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
