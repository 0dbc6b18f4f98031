"""Reading a JSON object member by member: each is taken once with its type and bounds, and what is left is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from services.router.openai.errors import Refusal, bad_value, unsupported

MAX_INTEGER = 2**31 - 1
MAX_TOKEN_ID = 2**32 - 1


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


class Fields:
    """The members of one object. A member that is null counts as absent. Every method raises Refusal."""

    def __init__(self, members: Mapping[str, Any], path: str = "") -> None:
        """`path` stands before names in errors, for instance "messages[0]."."""
        self._members = {name: value for name, value in members.items() if value is not None}
        self._path = path

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """From the text of a JSON object."""
        try:
            members = _JSON.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise Refusal(400, f"the body is not valid JSON: {error.msg} at {where}", "invalid_json") from None
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not valid JSON", "invalid_json") from None
        if not isinstance(members, dict):
            raise Refusal(400, "the body is not a JSON object", "invalid_json")
        return cls(members)

    def take(self, name: str) -> Any:
        """The member, whatever it is; None if it is absent."""
        return self._members.pop(name, None)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within [low, high]."""
        value = self._members.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_value(self._path + name, "must be a number")
        if not low <= value <= high:
            raise bad_value(self._path + name, f"must be from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int = MAX_INTEGER) -> int | None:
        """A whole number within [low, high]."""
        value = self._members.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_value(self._path + name, "must be a whole number")
        if not low <= value <= high:
            raise bad_value(self._path + name, f"must be from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if it is absent."""
        value = self._members.pop(name, None)
        if value is not None and not isinstance(value, bool):
            raise bad_value(self._path + name, "must be true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string of whole characters."""
        value = self._members.pop(name, None)
        return None if value is None else text_of(value, self._path + name)

    def texts(self, name: str) -> tuple[str, ...]:
        """One string or an array of strings; empty if it is absent."""
        value = self._members.pop(name, None)
        values = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(text_of(each, self._path + name) for each in values)

    def tokens(self, name: str) -> tuple[int, ...]:
        """An array of token ids; empty if it is absent."""
        value = self._members.pop(name, None)
        return () if value is None else tokens_of(value, self._path + name)

    def nested(self, name: str) -> Fields | None:
        """An object, to be taken apart in turn."""
        value = self._members.pop(name, None)
        return None if value is None else object_of(value, self._path + name)

    def biases(self, name: str) -> tuple[tuple[int, float], ...]:
        """An object from token ids, written as strings, to numbers from -100 to 100."""
        members = self.nested(name)
        if members is None:
            return ()
        biases = []
        for key in tuple(members._members):
            if not (key.isascii() and key.isdecimal() and len(key) < 11 and int(key) <= MAX_TOKEN_ID):
                raise bad_value(self._path + name, "keys must be token ids")
            biases.append((int(key), members.number(key, -100, 100) or 0.0))
        return tuple(biases)

    def ignore(self, names: Iterable[str]) -> None:
        """Lets members pass that change nothing here."""
        for name in names:
            self._members.pop(name, None)

    def only(self, name: str, *neutral: object) -> None:
        """Refuses a member that asks for something unsupported; the `neutral` values ask for nothing."""
        value = self._members.pop(name, None)
        if value is not None and not any(value == each and type(value) is type(each) for each in neutral):
            raise unsupported(self._path + name)

    def end(self) -> None:
        """Refuses what nobody took."""
        for name in self._members:
            shown = self._path + name[:64].encode(errors="backslashreplace").decode()
            raise Refusal(400, f"{shown!r} is not a parameter of this call", "unknown_parameter", param=shown)


def text_of(value: object, path: str) -> str:
    """`value` as a string of whole characters: JSON can spell half of one."""
    if not isinstance(value, str):
        raise bad_value(path, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_value(path, "has half of a surrogate pair") from None
    return value


def tokens_of(value: object, path: str) -> tuple[int, ...]:
    """`value` as token ids."""
    if not isinstance(value, list) or not all(type(each) is int and 0 <= each <= MAX_TOKEN_ID for each in value):
        raise bad_value(path, "must be an array of token ids")
    return tuple(value)


def object_of(value: object, path: str) -> Fields:
    """`value` as an object."""
    if not isinstance(value, dict):
        raise bad_value(path, "must be an object")
    return Fields(value, f"{path}.")


def finite(value: float) -> float:
    """A logarithm that JSON can spell; OpenAI writes -9999 for what is as good as impossible."""
    return value if math.isfinite(value) else -9999.0
