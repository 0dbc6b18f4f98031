"""What a router can be told, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.router.config import RouterConfig
from services.router.programs.catalogue import Catalogue
from services.router.programs.params import ParamsSpec
from services.rpc.config import ConfigError, read_config

ENGINE = ["--engine", "127.0.0.1:50051"]


def read(*words: str) -> RouterConfig:
    return read_config(RouterConfig, words, "microserve-router", {})


def test_defaults() -> None:
    config = read(*ENGINE)
    assert (config.listen, config.policy, config.engine) == ("127.0.0.1:50050", "data_parallel", ("127.0.0.1:50051",))
    assert config.http_listen is None
    assert config.engine_tls is None
    assert config.run_limits.between_chunks_s == config.policy_timeout


def test_engines_from_the_environment() -> None:
    config = read_config(RouterConfig, [], "microserve-router", {"MICROSERVE_ROUTER_ENGINE": "a:1, b:2"})
    assert config.engine == ("a:1", "b:2")


@pytest.mark.parametrize(
    "words",
    [
        [],
        [*ENGINE, *ENGINE],
        ["--engine", "nowhere"],
        [*ENGINE, "--max-requests", "0"],
        [*ENGINE, "--max-message-bytes", "1048576"],
        [*ENGINE, "--policy-timeout", "-1"],
        [*ENGINE, "--http-listen", "8080"],
        [*ENGINE, "--engine-tls-cert", "x"],
        [*ENGINE, "--engine-tls-name", "x"],
        [*ENGINE, "--max-retries", "-1"],
        [*ENGINE, "--breaker-failures", "0"],
        [*ENGINE, "--queue-timeout", "0"],
        [*ENGINE, "--queue-timeout", "nan"],
        [*ENGINE, "--stranded-timeout", "nan"],
        ["--engine-dns", "nowhere"],
        [*ENGINE, "--engine-tls-cert", "x", "--engine-tls-key", "y"],
        [*ENGINE, "--allow-policy-upload"],
        [*ENGINE, "--allow-policy-upload", "--admin-listen", "127.0.0.1:1"],
        [*ENGINE, "--allow-policy-upload", "--admin-key", "x"],
        [*ENGINE, "--upload-key-file", "x"],
        [*ENGINE, "--allow-policy-upload", "--admin-listen", "0.0.0.0:1", "--admin-key", "x"],
        [*ENGINE, "--unknown"],
    ],
)
def test_what_is_refused(words: Sequence[str]) -> None:
    with pytest.raises(ConfigError):
        read(*words)


def test_uploads_are_taken_from_who_proves_to_be_somebody() -> None:
    upload = [*ENGINE, "--allow-policy-upload", "--admin-listen"]
    for proof in (["--admin-key", "x"], ["--upload-key-file", "f"]):
        assert read(*upload, "127.0.0.1:0", *proof).allow_policy_upload
    tls = ["--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "r"]
    assert read(*upload, "0.0.0.0:50049", *tls).allow_policy_upload


def test_a_program_file_may_be_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("async def policy(request, fleet):\n    yield\n")
    catalogue = Catalogue((), str(path))
    assert catalogue.current.spec == "mine"
    assert catalogue.get("mine").file == str(path)


@dataclass(frozen=True)
class Params:
    ratio: float = 0.1
    deep: bool = False
    name: str = ""
    number: int = 3


def test_parameters_are_typed() -> None:
    spec = ParamsSpec.of(Params)
    assert spec.parse("") == Params()
    assert spec.parse("0.5,true") == Params(0.5, True)
    assert spec.parse("0.5, number=4 ,name=x") == Params(0.5, number=4, name="x")
    for wrong, named in {
        "x": "ratio='x'",
        "0.5,maybe": "deep='maybe'",
        "nope=1": "'nope=1'",
        "1,true,a,4,5": "'5'",
        "ratio=1,ratio=2": "'ratio=2'",
        "number=1.5": "number='1.5'",
    }.items():
        with pytest.raises(ValueError, match=named):
            spec.parse(wrong)
