"""Typed parameters of a program: a frozen dataclass `Params` whose fields are bool, int, float or str."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

_TYPES: dict[type, Any] = {int: int, float: float, str: str}
_BOOLEANS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True, slots=True)
class ParamsSpec:
    """A program's Params class, and the type of each of its fields."""

    params_type: type[Any]
    kinds: Mapping[str, type]

    @classmethod
    def of(cls, params_type: object) -> ParamsSpec:
        """ValueError unless it is a frozen dataclass whose fields all have defaults and a type that text can give."""
        if not (isinstance(params_type, type) and dataclasses.is_dataclass(params_type)):
            raise ValueError("Params is not a dataclass")
        if not params_type.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # not in the stubs
            raise ValueError("Params is not frozen: requests share it")
        hints = get_type_hints(params_type)
        kinds = {field.name: hints[field.name] for field in dataclasses.fields(params_type)}
        for name, kind in kinds.items():
            if kind not in (*_TYPES, bool):
                raise ValueError(f"Params.{name} is neither bool, int, float nor str")
        params_type()  # whatever has no default, or a bad one, raises
        return cls(params_type, kinds)

    def parse(self, text: str) -> Any:
        """Params from "0.5" (fields in order), "ratio=0.5" (by name) or both. ValueError, TypeError."""
        names, values = list(self.kinds), dict[str, Any]()
        for index, part in enumerate(text.split(",") if text else ()):
            key, equals, value = (word.strip() for word in part.partition("="))
            name = key if equals else names[index] if index < len(names) else ""
            if name not in self.kinds or name in values:
                raise ValueError(f"{part.strip()!r} is not one of its parameters ({', '.join(names)})")
            values[name] = _convert(name, self.kinds[name], value if equals else key)
        return self.params_type(**values)


def _convert(name: str, kind: type, text: str) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else _TYPES[kind](text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={text!r} is no {kind.__name__}") from None
