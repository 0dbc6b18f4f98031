"""What ends a command.

CliError
`-- ServiceFailed     a service that this command started is gone; `log_tail` says why
"""

from __future__ import annotations


class CliError(Exception):
    """The command cannot do what it was asked; the message is one line, the exit code is 2."""

    exit_code = 2


class ServiceFailed(CliError):
    """A child process ended by itself. Exit code 1, or 2 when it said in one line what was wrong with its options."""

    def __init__(self, message: str, log_tail: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.log_tail = log_tail
        if log_tail:
            self.add_note(log_tail)  # for whoever sees the traceback: a test, or a program that uses Fleet
        self.exit_code = exit_code
