"""The commands, a file each: what it takes, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steepest.commands.diagnose import Diagnose, diagnose
from steepest.commands.report import Report, report
from steepest.commands.reproduce import Reproduce, reproduce
from steepest.commands.study import Study, study
from steepest.commands.train import Train, train
from steepest.commands.transfer import Transfer, transfer

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "study": (Study, study),
    "train": (Train, train),
    "diagnose": (Diagnose, diagnose),
    "transfer": (Transfer, transfer),
    "reproduce": (Reproduce, reproduce),
    "report": (Report, report),
}
"""What each takes, and the function that does it."""
