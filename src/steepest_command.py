"""The command `steepest`. Ctrl-C is a sentence from here on, also while torch is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    from steepest.cli import main as command

    command()


if __name__ == "__main__":
    main()
