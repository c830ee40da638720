"""The commands, a file each: what it takes, and what it prints."""

from collections.abc import Sequence

from steepest.commands.diagnose import Diagnose
from steepest.commands.edge_of_stability import OLD_CLAIM, ReproduceEdge
from steepest.commands.report import Report
from steepest.commands.reproduce import Reproduce
from steepest.commands.study import Study
from steepest.commands.train import Train
from steepest.commands.transfer import Transfer

COMMANDS: dict[str, type] = {
    "study": Study,
    "train": Train,
    "diagnose": Diagnose,
    "transfer": Transfer,
    "reproduce": Reproduce,
    "report": Report,
}
"""Each by its name: a dataclass of what it takes, which has a method `run`."""


def commands_for(arguments: Sequence[str]) -> dict[str, type]:
    """Return the commands, with the one of version 0.1 where the arguments are for it."""
    if list(arguments[:1]) == ["reproduce"] and OLD_CLAIM in arguments[1:]:
        return COMMANDS | {"reproduce": ReproduceEdge}
    return COMMANDS
