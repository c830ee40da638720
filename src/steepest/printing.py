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

    >>> [rough_duration(s) for s in (12.3, 150, 9000, 468_000, 1e11)]
    ['12 s', '2.5 min', '2.5 h', '5.4 days', '3,169 years']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    for length, name, limit in ((3600, "h", 99), (86_400, "days", 999)):
        if (count := seconds / length) < limit:
            return f"{count:.2g} {name}" if count < 99 else f"{count:.0f} {name}"
    return f"{seconds / 31_557_600:,.0f} years"
