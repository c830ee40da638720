"""Text: embedded or the user's own, and how batches are drawn from it."""

from steepest.lab.data.sampler import Sampler, validation_batches
from steepest.lab.data.text import EMBEDDED, Corpus, load

__all__ = ["EMBEDDED", "Corpus", "Sampler", "load", "validation_batches"]
