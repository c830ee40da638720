"""One training run: the loop, its optimizers and schedule, its folder and checkpoints."""

from steepest.lab.train.loop import TrainConfig, train
from steepest.lab.train.optimizers import FAMILIES, OPTIMIZERS, OptimizerName

__all__ = ["FAMILIES", "OPTIMIZERS", "OptimizerName", "TrainConfig", "train"]
