"""How fast a run is: units a second, and the share of the processor's arithmetic that it uses."""

from __future__ import annotations

from steepest.lab.train.flops import peak_flops
from steepest.lab.train.setup import RunSetup


class Speed:
    """Turns seconds a step into `units_per_second` and `mfu`, for one run.

    `mfu` is the model's floating-point operations a second over those that the processor can do;
    it is left out where one of the two is not known.
    """

    def __init__(self, setup: RunSetup):
        passes = setup.config.accumulate
        self._units = setup.per_pass * passes
        self._share = None
        dtype = setup.config.precision
        if setup.flops is not None:
            peak = peak_flops(setup.device, dtype)
            self._share = None if peak is None else setup.flops * passes / peak

    def __call__(self, step_seconds: float | None) -> dict[str, float]:
        """Return what a step of so many seconds comes to."""
        if not step_seconds:
            return {}
        speed = {"units_per_second": self._units / step_seconds}
        if self._share is not None:
            speed["mfu"] = self._share / step_seconds
        return speed
