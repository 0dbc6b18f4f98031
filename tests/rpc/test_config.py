"""Options and variables into a dataclass, and every way to get them wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.rpc.config import ConfigError, describe, parse_config, read_config
from services.rpc.server import ServerConfig

PROG = "microserve-engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(ServerConfig):
    """An example."""

    model: str = field(metadata={"help": "what to serve"})
    pages: int = field(default=10, metadata={"help": "50% of it"})
    share: float = 0.5
    fast: bool = False
    dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16")})
    peers: tuple[str, ...] = ()
    kvtransfer: str | None = "127.0.0.1:1"
    cache: Path = Path("here")
    key: str = field(default="", metadata={"env": "EXAMPLE_KEY", "secret": True})
    fault: str | None = field(default=None, metadata={"hidden": True})

    def __post_init__(self) -> None:
        ServerConfig.__post_init__(self)
        if self.pages < 1:
            raise ValueError("--pages must be at least 1")


def read(*argv: str, **environ: str) -> Example:
    return read_config(Example, ["--model", "m", *argv], PROG, environ)


def test_defaults_come_from_the_class() -> None:
    assert read() == Example(model="m")


def test_every_type_from_the_command_line() -> None:
    config = read(
        *("--pages", "7", "--share", "0.25", "--fast", "--dtype", "bfloat16"),
        *("--peers", "a:1", "--peers", "b:2", "--kvtransfer", "none", "--cache", "/tmp/x"),
        *("--listen", "0.0.0.0:7", "--metrics-port", "none", "--fault", "push:2"),
    )
    expected = Example(
        model="m",
        pages=7,
        share=0.25,
        fast=True,
        dtype="bfloat16",
        peers=("a:1", "b:2"),
        kvtransfer=None,
        cache=Path("/tmp/x"),
        listen="0.0.0.0:7",
        metrics_port=None,
        fault="push:2",
    )
    assert config == expected


def test_every_type_from_the_environment() -> None:
    config = read(
        MICROSERVE_PAGES="7",
        MICROSERVE_SHARE="0.25",
        MICROSERVE_FAST="yes",
        MICROSERVE_PEERS="a:1, b:2",
        MICROSERVE_KVTRANSFER="none",
        EXAMPLE_KEY="k",
    )
    assert (config.pages, config.share, config.fast) == (7, 0.25, True)
    assert (config.peers, config.kvtransfer, config.key) == (("a:1", "b:2"), None, "k")


def test_option_beats_scoped_variable_beats_shared_variable() -> None:
    shared = {"MICROSERVE_PAGES": "1"}
    scoped = {**shared, "MICROSERVE_ENGINE_PAGES": "2"}
    assert read(**shared).pages == 1
    assert read(**scoped).pages == 2
    assert read("--pages", "3", **scoped).pages == 3
    assert read("--no-fast", MICROSERVE_FAST="1").fast is False


def test_required_value_may_come_from_the_environment() -> None:
    assert read_config(Example, [], PROG, {"MICROSERVE_MODEL": "m"}).model == "m"
    with pytest.raises(ConfigError, match="--model is required"):
        read_config(Example, [], PROG, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--page", "3"], "unrecognized arguments: --page 3"),
        (["surplus"], "unrecognized arguments: surplus"),
        (["--pages"], "--pages: expected one argument"),
        (["--pages", "many"], "--pages: 'many' is not a whole number"),
        (["--pages", "0"], "--pages must be at least 1"),
        (["--share", "half"], "--share: 'half' is not a number"),
        (["--dtype", "int4"], "--dtype: 'int4' is not one of float32, bfloat16"),
        (["--listen", "50051"], "'50051' is not host:port"),
        (["--listen", "[::1]:70000"], "is not host:port"),
        (["--tls-cert", "a.pem"], "--tls-cert and --tls-key go together"),
    ],
)
def test_bad_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MICROSERVE_PAGEZ": "3"}, "unknown environment variable MICROSERVE_PAGEZ"),
        ({"MICROSERVE_ENGINE_PAGEZ": "3"}, "unknown environment variable MICROSERVE_ENGINE_PAGEZ"),
        ({"MICROSERVE_PAGES": "x"}, "MICROSERVE_PAGES: 'x' is not a whole number"),
        ({"MICROSERVE_FAST": "perhaps"}, "MICROSERVE_FAST: 'perhaps' is neither true nor false"),
    ],
)
def test_bad_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**environ)


def test_variables_of_others_are_let_be() -> None:
    assert read(
        MICROSERVE_ROUTER_ANYTHING="1",
        MICROSERVE_CLI_TLS_CA="ca.pem",
        MICROSERVE_ENGINE_SERVICE_HOST="10.0.0.1",
        MICROSERVE_ENGINE_PORT_50051_TCP_ADDR="10.0.0.1",
        HOME="/",
    ) == Example(model="m")


def test_failure_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Example, ["--model", "m", "--pages", "x"], PROG)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "microserve-engine: --pages: 'x' is not a whole number\n"


def test_help_shows_text_default_and_variable_but_nothing_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Example, ["--help"], PROG)
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50% of it [MICROSERVE_ENGINE_PAGES] (default 10)" in shown
    assert "--fault" not in shown
    assert "lifeline" not in shown


def test_describe_masks_secrets() -> None:
    shown = describe(Example(model="m", key="hunter2"))
    assert (shown["model"], shown["key"]) == ("m", "***")
