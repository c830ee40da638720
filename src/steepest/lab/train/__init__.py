"""One training run: the loop, its optimizers and schedule, its folder and checkpoints."""

from steepest.lab.train.config import TrainConfig
from steepest.lab.train.loop import train
from steepest.lab.train.optimizers import FAMILIES, OPTIMIZERS, OptimizerName

__all__ = ["FAMILIES", "OPTIMIZERS", "OptimizerName", "TrainConfig", "train"]
