"""What `rich` shows, as plain text."""

from __future__ import annotations

from rich.console import Console, RenderableType


def as_text(shown: RenderableType, width: int) -> str:
    """Return what a terminal of this width would show, without colours.

    >>> as_text("a table", 20)
    'a table\\n'
    """
    with (console := Console(width=width, color_system=None)).capture() as captured:
        console.print(shown)
    return captured.get()


def sentence(text: str) -> str:
    """Return a text with a capital first letter and a full stop.

    >>> sentence("a copy was trained")
    'A copy was trained.'
    """
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def rough_duration(seconds: float) -> str:
    """Return a duration for people.

    >>> [rough_duration(s) for s in (12.3, 150, 9000)]
    ['12 s', '2.5 min', '2.5 h']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
