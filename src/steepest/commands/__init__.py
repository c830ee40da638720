"""The commands, a file each: what it takes, and what it prints."""

from steepest.commands.diagnose import Diagnose
from steepest.commands.report import Report
from steepest.commands.reproduce import Reproduce
from steepest.commands.study import Study
from steepest.commands.train import Train
from steepest.commands.transfer import Transfer

COMMANDS = {
    "study": Study,
    "train": Train,
    "diagnose": Diagnose,
    "transfer": Transfer,
    "reproduce": Reproduce,
    "report": Report,
}
"""Each by its name: a dataclass of what it takes, which has a method `run`."""
