"""One training run: the loop, its optimizers and schedule, its folder and checkpoints."""

from steepest.lab.train.config import TrainConfig
from steepest.lab.train.loop import train
from steepest.lab.train.optimizers import named_optimizer

__all__ = ["TrainConfig", "named_optimizer", "train"]
