"""`microserve up` with the fake services: python -m tests.cli.fakes.up FOLDER MODEL [options of up].

Every start of the model named "slow" counts as a long one at once.
With the one named "patient" it kills nobody by itself who does not end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import services.cli.main
import services.cli.restarts
import services.cli.up
from services.cli.fleet import Fleet


class PatientFleet(Fleet):
    """Its services have an hour to end."""

    def stop(self, *, timeout_s: float = 3600.0) -> None:
        super().stop(timeout_s=timeout_s)


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    kind = PatientFleet if model.name == "patient" else Fleet
    services.cli.up.Fleet = lambda: kind(folder, package="tests.cli.fakes")  # type: ignore
    services.cli.restarts.PERIOD_S = 3600.0  # "again and again" however slow the machine is
    if model.name == "slow":
        services.cli.up._LONG_START_S = 0.0
    services.cli.up.fetch = lambda name, quiet: model  # type: ignore
    sys.argv[1:] = ["up", *sys.argv[3:]]
    services.cli.main.main()
