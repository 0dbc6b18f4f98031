"""Command line and MICROSERVE_* environment variables into one frozen dataclass.

A field `page_size` is the option --page-size and the variable MICROSERVE_PAGE_SIZE; a variable scoped to one
service, MICROSERVE_ENGINE_PAGE_SIZE, wins over it, and the option wins over both. Supported types: bool, int,
float, str, Path, tuple[str, ...] (a repeatable option, a comma separated variable) and each of them | None,
where the word "none" gives None. Field metadata:

- help: a sentence for --help
- choices: the values allowed
- env: a variable's name, in place of the derived ones
- hidden: not shown in --help
- secret: shown as *** by `describe`

Whatever cannot be understood is a ConfigError, one sentence; `parse_config` prints it and exits with code 2.
A ValueError raised by the class's own __post_init__ counts as one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from services.rpc.version import package_version

PREFIX = "MICROSERVE_"
_SCOPES = ("ENGINE_", "KVTRANSFER_", "ROUTER_")
# Kubernetes puts these into every container beside a Service that is named microserve-something.
_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP)(_.*)?)$")
# The command's own.
_COMMAND = "CLI_"
# Read elsewhere, and means the same to every service.
_TESTING = "MICROSERVE_TESTING"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class DataclassType(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


ConfigT = TypeVar("ConfigT", bound=DataclassType)


class ConfigError(Exception):
    """The command line or the environment cannot be understood; the message is one sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    """One field, with its type taken apart."""

    field: dataclasses.Field[Any]
    base: type
    optional: bool
    repeated: bool

    @property
    def flag(self) -> str:
        return "--" + self.field.name.replace("_", "-")

    @property
    def required(self) -> bool:
        missing = dataclasses.MISSING
        return self.field.default is missing and self.field.default_factory is missing

    def variables(self, scope: str) -> tuple[str, ...]:
        """Names of its environment variables, the strongest first."""
        if "env" in self.field.metadata:
            return (str(self.field.metadata["env"]),)
        name = self.field.name.upper()
        return (f"{PREFIX}{scope}{name}", f"{PREFIX}{name}")

    def parse(self, text: str, source: str) -> Any:
        """One value from text; ConfigError names `source`."""
        if self.optional and text.lower() == "none":
            return None
        if self.base is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise ConfigError(f"{source}: {text!r} is neither true nor false")
            return text.lower() in _TRUE
        try:
            value = self.base(text)
        except ValueError:
            raise ConfigError(f"{source}: {text!r} is not {_article(self.base)}") from None
        choices = self.field.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{source}: {text!r} is not one of {', '.join(map(str, choices))}")
        return value

    def parse_variable(self, text: str, source: str) -> Any:
        """The field's value from an environment variable."""
        if self.repeated:
            return tuple(self.parse(part.strip(), source) for part in text.split(",") if part.strip())
        return self.parse(text, source)


class _Parser(argparse.ArgumentParser):
    """Raises in place of printing a usage and exiting."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def parse_config(config_class: type[ConfigT], argv: Sequence[str], prog: str) -> ConfigT:
    """Reads `argv` (without the program's name) and os.environ. Exits with code 2 and one line on stderr if
    they cannot be understood, with code 0 after --help and --version."""
    try:
        return read_config(config_class, argv, prog, os.environ)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_config(config_class: type[ConfigT], argv: Sequence[str], prog: str, environ: Mapping[str, str]) -> ConfigT:
    """As parse_config, but raises ConfigError. The last word of `prog` (microserve-engine) is the scope."""
    scope = re.split(r"[-. ]", prog)[-1].upper() + "_"
    options = [_option(field, hint) for field, hint in _fields(config_class)]
    values = _from_environment(options, environ, scope)
    values |= _from_command_line(options, argv, prog, config_class.__doc__, scope)
    for option in options:
        if option.required and option.field.name not in values:
            raise ConfigError(f"{option.flag} is required")
    try:
        return config_class(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def describe(config: DataclassType) -> dict[str, object]:
    """Every field with its value, for the log line at start; fields marked secret are masked."""
    return {
        field.name: "***" if field.metadata.get("secret") else getattr(config, field.name)
        for field in dataclasses.fields(config)
    }


def _fields(config_class: type[DataclassType]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(config_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(config_class) if field.init]


def _option(field: dataclasses.Field[Any], hint: Any) -> _Option:
    optional = False
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        optional = len(members) < len(get_args(hint))
        hint = members[0] if len(members) == 1 else hint
    repeated = get_origin(hint) is tuple
    base = get_args(hint)[0] if repeated else hint
    if base not in (bool, int, float, str, Path):
        raise TypeError(f"field {field.name}: {hint} cannot be an option")
    return _Option(field, base, optional, repeated)


def _from_environment(options: list[_Option], environ: Mapping[str, str], scope: str) -> dict[str, Any]:
    values = {}
    known = {_TESTING}
    for option in options:
        names = option.variables(scope)
        known.update(names)
        for name in names:
            if name in environ:
                values[option.field.name] = option.parse_variable(environ[name], name)
                break
    foreign = tuple(PREFIX + other for other in (*_SCOPES, _COMMAND) if other != scope)
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(foreign):
            if _KUBERNETES.search(name):
                continue
            raise ConfigError(
                f"unknown environment variable {name}; what is meant for one service only begins with "
                f"{', '.join(PREFIX + each for each in _SCOPES)}"
            )
    return values


def _from_command_line(
    options: list[_Option], argv: Sequence[str], prog: str, description: str | None, scope: str
) -> dict[str, Any]:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"{prog} {package_version()}")
    for option in options:
        _add(parser, option, scope)
    given = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    for option in options:
        if option.field.name not in given:
            continue
        raw = given[option.field.name]
        if isinstance(raw, bool):
            values[option.field.name] = raw
        elif option.repeated:
            values[option.field.name] = tuple(option.parse(part, option.flag) for part in raw)
        else:
            values[option.field.name] = option.parse(raw, option.flag)
    return values


def _add(parser: argparse.ArgumentParser, option: _Option, scope: str) -> None:
    metadata = option.field.metadata
    default = option.field.default
    text = f"{metadata.get('help', '')} [{option.variables(scope)[0]}]"
    if default not in (dataclasses.MISSING, None, ()):
        text += f" (default {default})"
    shown = argparse.SUPPRESS if metadata.get("hidden") else text.strip().replace("%", "%%")
    if option.base is bool:
        parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=shown)
        return
    choices = metadata.get("choices")
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else option.base.__name__.upper()
    action = "append" if option.repeated else "store"
    parser.add_argument(option.flag, action=action, metavar=metavar, help=shown)


def _article(base: type) -> str:
    return {int: "a whole number", float: "a number", Path: "a path"}.get(base, base.__name__)
