"""The monitor in trainers of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steepest.diagnosis.monitor import Monitor


def hf_callback(every: int = 100, path: str | Path | None = None) -> Any:
    """Return a callback for Hugging Face's `Trainer`: `Trainer(..., callbacks=[hf_callback()])`.

    Its `monitor` is there once training has begun. `every` and `path` are those of `Monitor`.

    Raises:
        ModuleNotFoundError: without transformers.
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.monitor = Monitor(kwargs["model"], kwargs["optimizer"], every=every, path=path)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return MonitorCallback()


def lightning_callback(every: int = 100, path: str | Path | None = None) -> Any:
    """Return a callback for Lightning: `Trainer(callbacks=[lightning_callback()])`.

    It follows the first optimizer. Its `monitor` is there once training has begun, and goes on
    where a checkpoint was taken. `every` and `path` are those of `Monitor`.

    Raises:
        ModuleNotFoundError: without lightning.
    """
    from lightning import Callback

    class MonitorCallback(Callback):
        monitor: Monitor | None = None
        state: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.monitor = Monitor(pl_module, trainer.optimizers[0], every=every, path=path)
            if self.state is not None:
                self.monitor.load_state_dict(self.state)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.monitor is None else self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict or None

        def _close(self) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return MonitorCallback()
