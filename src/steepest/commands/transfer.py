"""`steepest transfer`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import TaskID

from steepest.commands.places import folder, page, report_room
from steepest.lab.errors import InputError
from steepest.lab.imports import imported_batches, imported_function, imported_loss
from steepest.lab.studies.transfer_study import transfer_study
from steepest.lab.terminal import bars, say, screen
from steepest.parametrize.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Say whether the learning rate of a small model is that of larger ones, why, and which to use.

    Your function from sizes to a model is parametrized by a rule; every size is trained at rates by
    factors of 2, every layer checked for outputs that grow or freeze with the size, and the
    sharpness followed along training. Stopped at any moment, the same command goes on where it was.
    For instance:
      steepest transfer my_package.models:build --batches my_package.data:batches
        --sizes width=64,depth=2 width=128 width=256 depth=8 depth=32 --optimizer muon --lr 0.02
        --target width=1024,depth=16

    Exit codes: 0 the rate transfers over all sizes, 4 it does not, 3 cannot tell, 2 bad input.
    """

    build: tyro.conf.Positional[str]
    """A function that takes the sizes by name and returns the model."""
    batches: str
    """A function that returns batches, or the batches; an iterable of what the loss takes."""
    sizes: tuple[str, ...]
    """The base first, which names every size, such as width=64,depth=2; then what to grow, each
    from the base on: width=128 width=256 depth=8, or together: width=128,heads=4."""
    target: str | None = None
    """What you want to train in the end, such as width=1024,depth=16; by default the largest of
    the sizes."""
    loss: str | None = None
    """A function loss(model, batch) -> scalar; by default as for steepest diagnose."""
    rule: Rule = "mup"
    """Parametrization: mup for the width, completep (or depth-mup, for blocks of one layer) for
    the depth too; sp and ntp are controls."""
    optimizer: str = "adamw"
    """Which one will train the model."""
    settings: tuple[str, ...] = ()
    """Of that optimizer, such as momentum=0.9; for shampoo and kl-shampoo block=32, the base width
    or less, as the rate depends on the size of their blocks; for soap length=spectral
    scale=spectral max_side=None, whose rate drifts least."""
    branches: tuple[str, ...] = ()
    """For rules of depth, the last layer of every residual branch, such as blocks.*.mlp.down; known
    for blocks of GPT-2, LLaMA, ViT and similar models."""
    lr: float = 0.01
    """Where to look first; the grid grows from there."""
    steps: int = 120
    """Of each run; best rates are compared after half of them too. As many batches are kept."""
    seeds: int = 2
    """Runs for each rate."""
    grid_only: bool = False
    """Train at rates by factors of 2 alone, for models so large that every run counts: fewer runs
    of the largest, and the advice is given, not tested."""
    json: bool = False
    """Print JSON in place of tables."""
    out: Path | None = None
    """Folder for summary.json, report.html and finished runs; by default one under runs/."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        build = imported_function(self.build, "build(width=...), which returns the model")
        batches = imported_batches(self.batches, self.steps)
        if len(batches) < self.steps:
            raise InputError(
                f"got {len(batches)} batches, expected one for each of {self.steps} steps"
            )
        loss = imported_loss(self.loss)
        settings = {key: value for key, value in asdict(self).items() if key not in ("out", "json")}
        out = self.out or folder("transfer", settings)
        if (earlier := out / "runs.jsonl").is_file():
            say(f"goes on with the runs in {earlier}; if your code has changed, take another --out")
        with bars(counted=False) as shown:
            tasks: dict[str, TaskID] = {}

            def on_run(phase: str, said: str, done: float) -> None:
                if phase not in tasks:
                    for ended in tasks.values():  # whose ends were estimates
                        shown.update(ended, completed=1.0)
                    tasks[phase] = shown.add_task(phase, total=1.0, detail="")
                    if not screen.is_terminal:
                        say(phase)
                shown.update(tasks[phase], completed=done, detail=said)

            check, summary = transfer_study(
                build, self.sizes, batches, loss, target=self.target, lr=self.lr,
                rule=self.rule, optimizer=self.optimizer, options=self.settings,
                branches=self.branches, seeds=self.seeds, grid_only=self.grid_only,
                out=out, settings=settings, on_run=on_run,
            )  # fmt: skip
        path = page(room, summary, out)
        if self.json:
            print(json.dumps(summary))
        else:
            Console().print(check)
            print(f"report: {path.resolve().as_uri()}")
        if check.passed is None:
            sys.exit(3)
        if not check.passed:
            sys.exit(4)
