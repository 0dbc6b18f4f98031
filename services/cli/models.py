"""Models for the commands: the engine's own fetching, with errors of one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from services.cli.errors import CliError


def require_engine() -> None:
    """CliError where only the router's part is installed."""
    if find_spec("torch") is None:
        raise CliError("engines are not installed here: pip install '.[engine]' in the repository")


def fetch(name: str, *, quiet: bool = False) -> Path:
    """The folder or file of a model, downloaded into the cache if need be. CliError.

    Progress goes to stderr unless `quiet`.
    """
    # Late: it costs time that the other commands need not spend.
    from services.engine.model.errors import ModelError
    from services.engine.model.fetch import fetch_model

    try:
        return fetch_model(name, show_progress=not quiet)
    except ModelError as error:
        raise CliError(" ".join(str(error).split())) from None
