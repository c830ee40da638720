"""Many runs: on this machine, one process each."""

from steepest.lab.sweep.runs import Run, run_all

__all__ = ["Run", "run_all"]
