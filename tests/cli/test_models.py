"""`model fetch`, without the network."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_a_folder_is_its_own_cache(microserve: Run, tmp_path: Path) -> None:
    code, out, _ = microserve("model", "fetch", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"model": str(tmp_path), "path": str(tmp_path)})
    assert microserve("model", "fetch", str(tmp_path)) == (0, f"{tmp_path}\n", "")


def test_missing_model_is_one_line(microserve: Run) -> None:
    for argv in (("model", "fetch", "no-such-model"), ("up", "--model", "x.gguf", "--grpc-port=0", "--http-port=0")):
        code, out, err = microserve(*argv)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("microserve: There is no model ")
