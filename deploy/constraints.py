"""Prints constraints.txt from what is installed beside this interpreter (make constraints).

Versions without their local part: 2.13.0 stands for 2.13.0+cpu too, so that every build of torch fits.
"""

from __future__ import annotations

import re
from importlib import metadata

OWN = {"microserve", "pip", "setuptools", "wheel"}
HEADER = """\
# What the suite is developed and tested with: every direct and transitive dependency of all extras but the GPU
# ones. Used as pip install -c constraints.txt; regenerated from .venv by make constraints.
"""


def constraints() -> str:
    """One name==version a line, sorted."""
    pins = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name not in OWN and not name.startswith(("nvidia-", "triton")):
            pins[name] = distribution.version.partition("+")[0]
    return HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))


if __name__ == "__main__":
    print(constraints(), end="")
