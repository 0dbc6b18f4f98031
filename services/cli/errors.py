"""What ends a command.

CliError              what was asked for did not come about: exit code 1
|-- UsageError        the command line or the environment cannot be understood, or names what is not there: 2
|-- Interrupted       by a signal, before it was done: 130
`-- ServiceFailed     a service that this command started is gone; `log_tail` says why
"""

from __future__ import annotations


class CliError(Exception):
    """The command could not do what it was asked; the message is one line."""

    exit_code = 1


class UsageError(CliError):
    """Nothing was tried: what was given is wrong as it stands."""

    exit_code = 2


class Interrupted(CliError):
    """Somebody wanted it to end."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted")


class ServiceFailed(CliError):
    """A child process ended by itself. No `log_tail` where the message says what the log would."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail
        if log_tail:
            self.add_note(log_tail)  # for whoever sees the traceback: a test, or a program that uses Fleet
