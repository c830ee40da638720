"""Text and images: embedded, the user's own, or streamed; and how batches are drawn from them."""

from steepest.lab.data.documents import EMBEDDED
from steepest.lab.data.images import Images
from steepest.lab.data.own import examples_in, own_batches
from steepest.lab.data.protocols import Data, TrainingBatches
from steepest.lab.data.sampler import Sampler, validation_batches
from steepest.lab.data.shapes import ImageShape, Shape, TextShape
from steepest.lab.data.sources import judged_by_text, load
from steepest.lab.data.text import Corpus

__all__ = [
    "EMBEDDED",
    "Corpus",
    "Data",
    "ImageShape",
    "Images",
    "Sampler",
    "Shape",
    "TextShape",
    "TrainingBatches",
    "examples_in",
    "judged_by_text",
    "load",
    "own_batches",
    "validation_batches",
]
