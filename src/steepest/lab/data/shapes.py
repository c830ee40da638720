"""What a model must know of the data that it is made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextShape:
    """Sequences of tokens."""

    vocabulary: int
    """Number of different tokens."""
    context: int
    """Longest sequence, in tokens."""


@dataclass(frozen=True)
class ImageShape:
    """Square images of one class each."""

    channels: int
    """Numbers in each pixel: 1 for grey, 3 for colour."""
    side: int
    """Height and width, in pixels; images are (channels, side, side)."""
    classes: int
    """Number of different classes."""


Shape = TextShape | ImageShape | None
"""Text, images, or None for a user's own batches, of which nothing is known."""
