"""Which version of the package runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """As it was installed; "unknown" where it runs from a folder that was not."""
    try:
        return version("microserve")
    except PackageNotFoundError:
        return "unknown"
