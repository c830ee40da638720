"""Models to train and to study, a page of plain PyTorch each."""

from steepest.lab.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
