"""Who imports what, as docs/structure.md says it: read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ROOT / "services"

# The only packages under services/ that each may import beside itself.
MAY_IMPORT = {
    "protocol": set[str](),
    "rpc": {"protocol"},
    "engine": {"protocol", "rpc"},
    "kvtransfer": {"protocol", "rpc"},
    "router": {"protocol", "rpc"},
    "cli": {"protocol", "rpc", "engine", "kvtransfer", "router"},
}
# Modules that know the wire: servicers, clients of other services, and what turns messages into plain data.
WIRE = [
    "rpc/status.py",
    "rpc/kv_messages.py",
    "rpc/timing_messages.py",
    "*/process.py",
    "*/servicer.py",
    "*/convert.py",
    "*/wire.py",
    "*/client.py",
    "engine/registration.py",
    "engine/front/re*.py",
    "kvtransfer/peer_client.py",
    "kvtransfer/transports/tcp/*.py",
    "router/app.py",
    "router/registration.py",
    "router/fleet/session.py",
    "cli/fleet.py",
    "cli/kvbench/*.py",
]


def imports_of(path: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted((SERVICES / package).rglob("*.py"))


def test_every_package_is_known() -> None:
    assert {path.name for path in SERVICES.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    for path in modules(package):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "services" and len(parts) > 1 and parts[1] != package:
                assert parts[1] in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_the_rules_are_pure() -> None:
    for path in modules("protocol"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top == "services" or top in sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {name}"


def test_only_engines_import_torch() -> None:
    found = [path for path in SERVICES.rglob("*.py") for name in imports_of(path) if name.split(".")[0] == "torch"]
    assert found
    assert {path.relative_to(SERVICES).parts[0] for path in found} == {"engine"}


def test_only_the_wire_knows_messages() -> None:
    for path in SERVICES.rglob("*.py"):
        if any(name.startswith("microserve.") for name in imports_of(path)):
            module = path.relative_to(SERVICES).as_posix()
            assert any(fnmatch(module, pattern) for pattern in WIRE), f"services/{module} imports generated code"


@pytest.mark.slow
@pytest.mark.parametrize("service", ["router", "kvtransfer", "engine"])
def test_services_without_torch_load_none(service: str) -> None:
    """Neither by themselves nor through a library; an engine's process not before it has set torch's threads."""
    code = f"import sys, services.{service}.process; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False\n"
