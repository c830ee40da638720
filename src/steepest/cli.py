"""The command line: parses, runs a command, and turns errors into sentences and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGTERM, signal

from steepest.commands import commands_for
from steepest.lab.announcements import announced_by
from steepest.lab.arguments import parsed
from steepest.lab.errors import InputError
from steepest.lab.interruption import SENTENCE, Terminated, interruptible
from steepest.lab.terminal import say, screen
from steepest.lab.train.run_folder import sentences_for_os_errors
from steepest.lab.user_code import UserCodeError, user_code_error


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (with a sentence), 130 interrupted."""
    with interruptible():
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt as stopped:
            say(SENTENCE)
            sys.exit(128 + (SIGTERM if isinstance(stopped, Terminated) else SIGINT))
        except BrokenPipeError:  # `steepest train --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except BaseException as error:
            refused = user_code_error(error) or error
            if not isinstance(refused, InputError):
                raise
            screen.print("[bold red]error:[/] ", end="")
            say(str(refused))
            if isinstance(refused, UserCodeError) and refused.traceback:
                say(f"\nIn your code:\n{refused.traceback.rstrip()}")
            sys.exit(2)
        finally:
            if arguments is None:  # the process ends; Ctrl-C has nothing left to stop
                signal(SIGINT, SIG_IGN)


def _run(arguments: list[str]) -> None:
    command = parsed(
        arguments, commands_for(arguments), "In which norm should each weight matrix descend?"
    )
    with announced_by(say), sentences_for_os_errors(command.out or Path("runs")):
        command.run()


if __name__ == "__main__":
    main()
